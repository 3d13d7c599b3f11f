"""The kernel that ends a residual branch, on Triton's interpreter, and on CUDA where it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from gsr.ops.residual import add_residual  # noqa: E402

# shape, storage, channels last, scale
CASES = {
    "a part of a block": ((1, 5, 3, 7), torch.float32, True, 1.0),
    "planes": ((2, 5, 31, 37), torch.float32, False, 0.1),
    "several blocks": ((2, 64, 9, 11), torch.float32, True, 0.1),
    "channels that divide no block": ((3, 48, 8, 9), torch.float32, True, 1.0),
    "one channel": ((2, 1, 40, 60), torch.float32, False, 1.0),
    "one pixel": ((3, 2500, 1, 1), torch.float32, True, 1.0),
    "bfloat16": ((1, 64, 10, 13), torch.bfloat16, True, 1.0),
}


def error(name, device, function):
    """How far a result is from the truth, beyond what its type rounds."""
    shape, dtype, last, scale = CASES[name]
    g = torch.Generator().manual_seed(0)
    y, x = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(2))
    if last:
        y, x = (t.contiguous(memory_format=torch.channels_last) for t in (y, x))
    bias = torch.randn(shape[1], generator=g).to(device, dtype)
    truth = x.double() + scale * (y.double() + bias.double()[:, None, None])
    out = function(y, bias, x, scale)
    assert out.data_ptr() == y.data_ptr()
    # A unit of the last digit of bfloat16: the interpreter cuts off what a GPU rounds.
    allowed = 1e-6 if dtype == torch.float32 else truth.abs() * 2**-7 + 1e-6
    return ((out - truth).abs() - allowed).max().item()


def main():
    from gsr.kernels import residual

    for name in CASES:
        assert error(name, "cpu", residual.add_residual) <= 0, name


def test_interpreted():
    pytest.importorskip("triton", reason="triton is not installed: there are no kernels")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("values, loads", [("bf16", 6), ("fp32", 12)])
def test_a_load_takes_128_bits(values, loads):
    """Of channels last: a thread's 16 numbers of y, x and the bias."""
    triton = pytest.importorskip("triton", reason="triton is not installed: there are no kernels")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gsr.kernels import residual

    constants = {"C": 64, "LAST": True, "BLOCK": residual.BLOCK}
    kinds = {
        "count": "i32",
        "inner": "i32",
        "scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    names = residual.residual.arg_names
    aligned = ("y_ptr", "bias_ptr", "x_ptr", "count")
    source = ASTSource(
        residual.residual, {n: kinds.get(n, f"*{values}") for n in names}, constants,
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )  # fmt: skip
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert code.asm["ptx"].count("ld.global.v4") == code.asm["ptx"].count("ld.global") == loads


@pytest.mark.parametrize("name", [n for n in CASES if n != "bfloat16"])
def test_without_the_kernel(name):
    assert error(name, "cpu", add_residual) <= 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_cuda(name):
    assert error(name, "cuda", add_residual) <= 0


if __name__ == "__main__":
    main()
