"""Cases of the kernels of `official`, against `gsr.reference`; JSON of their errors on stdout.

python tests/window_cases.py, with TRITON_INTERPRET=1 where there is no GPU.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gsr import reference
from gsr.kernels import windows

# batch, channels, rows and columns of windows, side of a window (LR), taps, side (HR)
CASES = {
    "one window": (1, 8, 1, 1, 7, 5, (14, 14)),
    "odd and unequal": (2, 8, 2, 3, 7, 5, (9, 23)),
    "as small as allowed": (3, 3, 1, 2, 7, 5, (5, 7)),
    "other windows and taps": (1, 1, 3, 2, 3, 4, (4, 31)),
    "more columns than a block": (2, 5, 3, 4, 4, 3, (6, 5)),
}


def run_case(name, device="cpu"):
    """Largest errors: of the output, and of each gradient relative to its largest value."""
    b, c, rows, columns, window, taps, side = CASES[name]
    g = torch.Generator().manual_seed(0)
    features = torch.rand(b, c, window * rows, window * columns, generator=g) * 3 - 1
    kernels = torch.rand(window**2, taps, taps, generator=g) * 2 / window
    true_features, true_kernels = (
        t.double().to(device).requires_grad_() for t in (features, kernels)
    )
    weights = reference.window_weights(true_kernels, side)
    true = reference.splat_windows(true_features, true_kernels, side)
    grad = torch.randn(true.shape, generator=g).to(device)
    d_features, d_kernels = torch.autograd.grad(
        true, (true_features, true_kernels), grad.double()
    )
    features, kernels = features.to(device).mT.contiguous().mT, kernels.to(device)
    ours = windows.forward(features, kernels, side)
    our_features, our_weights = windows.backward(grad, features, kernels, side)
    our_kernels = torch.autograd.grad(weights, true_kernels, our_weights.double())[0]
    assert 0 < (true == 1).double().mean() < 1 and (true == 0).any()  # the clamp is at work
    return {
        "out": (ours - true).abs().max().item(),
        "d_features": ((our_features - d_features).abs().max() / d_features.abs().max()).item(),
        "d_kernels": ((our_kernels - d_kernels).abs().max() / d_kernels.abs().max()).item(),
    }


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # new memory holds NaN: a lost store shows
    print(json.dumps({name: run_case(name) for name in CASES}))
