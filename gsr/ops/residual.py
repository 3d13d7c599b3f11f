"""The end of a residual branch, in one pass over memory on a GPU."""

# pyright: strict, reportPrivateUsage=false

from __future__ import annotations

import torch
from torch import Tensor

from gsr.ops import operators


def add_residual(y: Tensor, bias: Tensor, x: Tensor, scale: float = 1) -> Tensor:
    """x + scale (y + bias), written over y; for inference, without gradients.

    Args:
        y, x: [B, C, h, w] of one floating type.
        bias: [C], of the same type.
        scale: of the branch.
    """
    formats = torch.contiguous_format, torch.channels_last
    alike = any(all(t.is_contiguous(memory_format=f) for t in (x, y)) for f in formats)
    if operators._runs_triton(y) and alike:
        return operators._kernels("residual").add_residual(y, bias, x, scale)
    y += bias[:, None, None]
    return torch.add(x, y, alpha=scale, out=y)
