"""Cases of the kernels of `official`, against `gsr.ops.reference`; JSON of their errors on stdout.

python tests/kernels/window_cases.py, with TRITON_INTERPRET=1 where there is no GPU.
"""

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from kernel_cases import GuardedAllocations, interpreted  # noqa: E402

from gsr.kernels import windows  # noqa: E402
from gsr.ops import reference  # noqa: E402

# batch, channels, rows and columns of windows, side of a window (LR), taps, side (HR), storage
CASES = {
    "one window": (1, 8, 1, 1, 7, 5, (9, 14), torch.float32),
    "odd and unequal": (2, 8, 2, 3, 7, 5, (9, 23), torch.float32),
    "as small as allowed": (3, 3, 1, 2, 7, 5, (5, 7), torch.float32),
    "other windows and taps": (1, 1, 3, 2, 3, 4, (4, 31), torch.float32),
    "more columns than a block": (2, 5, 3, 4, 4, 3, (6, 5), torch.float32),
    "more blocks than parts": (3, 8, 7, 7, 2, 2, (3, 2), torch.float32),  # 37 blocks of columns
    "x15 across": (1, 2, 1, 2, 7, 5, (5, 105), torch.float32),
    "bfloat16": (2, 3, 2, 1, 7, 5, (8, 9), torch.bfloat16),
    "float16": (1, 8, 1, 2, 7, 5, (14, 9), torch.float16),
}


def run_case(name, device="cpu", windows=windows):
    """Largest errors: of the output, and of each gradient relative to its largest value.

    With 16-bit storage the output's is what exceeds twice the cost of rounding the truth.
    """
    b, c, rows, columns, window, taps, side, dtype = CASES[name]
    g = torch.Generator().manual_seed(0)
    features = torch.rand(b, c, window * rows, window * columns, generator=g) * 3 - 1
    features = features.to(device, dtype).mT.contiguous().mT  # the values as stored, a view
    kernels = (torch.rand(taps, window**2, taps, generator=g) * 2 / window).to(device)
    kernels = kernels.transpose(0, 1)
    true_features, true_kernels = (t.double().requires_grad_() for t in (features, kernels))
    weights = reference.window_weights(true_kernels, side)
    true = reference.splat_windows(true_features, true_kernels, side)
    grad = torch.randn(true.shape, generator=g).to(device, dtype)
    d_features, d_kernels = torch.autograd.grad(true, (true_features, true_kernels), grad.double())
    with GuardedAllocations() as allocations:
        ours = windows.forward(features, kernels, side)
        our_features, our_weights = windows.backward(grad, features, kernels, side)
        disturbed = allocations.disturbed()
    our_kernels = torch.autograd.grad(weights, true_kernels, our_weights.double())[0]
    assert 0 < (true == 1).double().mean() < 1 and (true == 0).any()  # the clamp is at work
    assert ours.dtype == dtype and our_features.dtype == our_weights.dtype == torch.float32
    error, allowed = (ours - true).abs(), 2 * (true.to(dtype) - true).abs()
    if dtype == torch.bfloat16 and interpreted():  # there digits are cut off: a unit of the last
        allowed = torch.exp2(torch.frexp(true).exponent.double() - 8)
    if dtype != torch.float32:
        error = (error - allowed).clamp(min=0)
    return {
        "beside": disturbed,
        "out": error.max().item(),
        "d_features": ((our_features - d_features).abs().max() / d_features.abs().max()).item(),
        "d_kernels": ((our_kernels - d_kernels).abs().max() / d_kernels.abs().max()).item(),
    }


BOUNDS = {"beside": 0, "out": 1e-5, "d_features": 1e-4, "d_kernels": 1e-4}


def failures(errors):
    """What of `run_case`'s errors is out of bounds (NaN is)."""
    return [f"{k} {v:.2g}" for k, v in errors.items() if not v <= BOUNDS[k]]


if __name__ == "__main__":
    on = "cuda" if "--cuda" in sys.argv else "cpu"
    found = {name: run_case(name, on) for name in CASES}
    wrong = {name: failures(errors) for name, errors in found.items() if failures(errors)}
    print(json.dumps({"failures": wrong} if on == "cuda" else found))
