"""The end of a residual branch, in one pass over memory on a GPU."""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def add_residual(y: Tensor, bias: Tensor, x: Tensor, scale: float = 1) -> Tensor:
    """x + scale (y + bias), written over y; for inference, without gradients.

    Args:
        y, x: [B, C, h, w] of one floating type.
        bias: [C], of the same type.
        scale: of the branch.
    """
    formats = torch.contiguous_format, torch.channels_last
    alike = any(all(t.is_contiguous(memory_format=f) for t in (x, y)) for f in formats)
    if y.is_cuda and _has_triton() and alike:
        kernels: Any = import_module("gsr.kernels.residual")
        return kernels.add_residual(y, bias, x, scale)
    y += bias[:, None, None]
    return torch.add(x, y, alpha=scale, out=y)
