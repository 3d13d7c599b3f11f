"""The kernels of `official` on Triton's interpreter, and on CUDA where it is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "window_cases.py"
BOUNDS = {"out": 1e-5, "d_features": 1e-4, "d_kernels": 1e-4}


def run(**environment):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the kernels cannot be interpreted")
    done = subprocess.run(
        [sys.executable, SCRIPT], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_interpreted():
    for name, errors in run(TRITON_INTERPRET="1", OMP_NUM_THREADS="1").items():
        assert all(errors[key] <= bound for key, bound in BOUNDS.items()), (name, errors)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    spec = importlib.util.spec_from_file_location("window_cases", SCRIPT)
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    for name in cases.CASES:
        errors = cases.run_case(name, "cuda")
        assert all(errors[key] <= bound for key, bound in BOUNDS.items()), (name, errors)
