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


def cases():
    pytest.importorskip("triton", reason="triton is not installed: there are no kernels")
    spec = importlib.util.spec_from_file_location("window_cases", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_interpreted():
    failures = cases().failures
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, errors in json.loads(done.stdout).items():
        assert failures(errors) == [], name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    module = cases()
    for name in module.CASES:
        assert module.failures(module.run_case(name, "cuda")) == [], name
