"""The splat kernels against the oracle: on Triton's interpreter anywhere, and on a GPU where it is.

`kernel_cases.py` has the cases and the tolerances, `far_addresses.py` those of huge images.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gsr.ops import reference
from gsr.ops.arguments import Gaussians, Grid, Weighting

HERE = Path(__file__).resolve().parent


def load(name):
    """A module of this folder, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


cases = load("kernel_cases")
by_name = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)


def interpret(script, *arguments):
    """A script of this folder, run on Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the kernels can be neither interpreted nor compiled")
    return subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=3600,
    )  # fmt: skip


def printed(script, *arguments):
    """What it prints as JSON."""
    done = interpret(script, *arguments)
    if not done.stdout.startswith("{"):
        pytest.fail(f"{script} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


# ---- on the interpreter -------------------------------------------------------------------------

REPEATED = "views"


@pytest.fixture(scope="session")
def results():
    return printed("kernel_cases.py", "--repeat", REPEATED)


@by_name
def test_interpreted(case, results):
    assert cases.failures(case, results["cases"][case.name]["errors"]) == []


def test_the_interpreter_repeats_every_bit(results):
    assert results["differing"] == 0


def test_wider_bounds_are_earned(results):
    """A case whose tolerance follows float32's own error is one where that error is large."""
    for case in (case for case in cases.CASES if case.rounding):
        bounds = cases.tolerances(case, results["cases"][case.name]["errors"])
        usual = cases.tolerances(case, {})
        assert any(bounds[name] > usual[name] for name in bounds), case.name


def test_offsets_beyond_32_bits():
    far = load("far_addresses")
    wrong = {k: v for k, v in printed("far_addresses.py").items() if not v <= far.TOLERANCE}
    assert wrong == {}


@pytest.mark.slow
def test_every_fault_is_noticed():
    done = interpret("mutations.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_that_the_kernels_can_be_asked_is_among_the_cases():
    """What the list above is meant to hold, so that no one thins it out unnoticed."""
    for op in ("splat", "splat_at"):
        of_op = [case for case in cases.CASES if case.op == op]
        assert {0, 1, 2, 3} == {case.radius for case in of_op}
        assert {1, 9} <= {case.k for case in of_op} and {1, 3, 8, 16} <= {c.c for c in of_op}
        assert {"float32", "bfloat16", "float16"} == {case.dtype for case in of_op}
        assert {True, False} == {case.offset for case in of_op}
        assert {True, False} == {case.normalize for case in of_op}
        assert {True, False} == {case.views for case in of_op}
        assert {"drawn", "ones", "transposed"} == {case.grad for case in of_op}
        assert any(case.lr == (1, 1) for case in of_op)
        assert any(case.opacity[1] == 0 for case in of_op)
        assert min(c.sigma[0] for c in of_op) == 0.05 and max(c.sigma[1] for c in of_op) == 3
        assert max(case.rho[1] for case in of_op) == 0.99
    grid = [case for case in cases.CASES if case.hr]
    scales = {case.hr[axis] / case.lr[axis] for case in grid for axis in (0, 1)}
    assert min(scales) < 0.5 and 0.6 in scales and max(scales) == 30
    assert {1, 2, 3} == {case.b for case in grid}
    assert sum(case.rows is not None for case in grid) >= 6


# ---- on a GPU -----------------------------------------------------------------------------------

on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("case", cases.CASES + cases.LARGE, ids=lambda case: case.name)
    def test_compiled(self, case):
        assert cases.failures(case, cases.run_case(case, "cuda")) == []

    @pytest.mark.parametrize("case", cases.LARGE, ids=lambda case: case.name)
    def test_repeats_every_bit(self, case):
        assert [cases.differing(case, "cuda") for _ in range(5)] == [0] * 5

    def test_more_than_2_to_the_31_numbers(self):
        """The last rows of an image whose offsets do not fit into 32 bits."""
        from gsr.kernels import splat

        size, lr, rows = (17_001, 17_002), (4_251, 4_253), (16_990, 17_001)
        if torch.cuda.mem_get_info()[0] < 8 << 30:
            pytest.skip("needs 8 GiB of GPU memory")
        g = torch.Generator("cuda").manual_seed(0)

        def rand(*shape):
            return torch.rand(1, 1, *shape, *lr, generator=g, device="cuda")

        inputs = Gaussians(rand(8) * 2 - 1, rand(2) + 0.2, rand() - 0.5, rand() + 0.1)
        inputs = inputs.map(torch.Tensor.half)
        grid, weighting = Grid(size, (0, size[0]), (0, lr[0])), Weighting(1, True, 0.01)
        out = splat.forward(inputs, grid, weighting)
        assert out.numel() > 2**31
        want = reference.splat(inputs.map(torch.Tensor.float), grid._replace(rows=rows), weighting)
        torch.testing.assert_close(out[:, :, rows[0] :].float(), want, atol=2e-3, rtol=0)
