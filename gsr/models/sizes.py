"""What sizes, scales and LR images a model takes; everything else is refused by name."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from gsr.errors import InputError

MAX_SCALE = 1_000_000
MAX_SIDE = 2**31 - 1  # of a result, pixels


def check_lr(lr: Tensor) -> None:
    """Raise InputError unless lr is a float tensor [B, 3, h, w] that is not empty."""
    if lr.ndim != 4 or lr.shape[1] != 3 or 0 in lr.shape or not lr.is_floating_point():
        raise InputError(
            f"lr must be a float tensor [B, 3, h, w] in [0, 1], not {lr.dtype} {list(lr.shape)}"
        )


def resolve_size(lr_size, size=None, scale=None) -> tuple[tuple[int, int], tuple[float, float]]:
    """The size (H, W) and scale (s_y, s_x) that a call means, from either or both.

    Raises:
        InputError: neither is given, or one is not as `check_size` and `check_scale` want it.
    """
    h, w = lr_size
    if scale is None:
        if size is None:
            raise InputError("give size=(H, W) or scale")
        size = check_size(size)
        return size, (size[0] / h, size[1] / w)
    s_y, s_x = check_scale(scale)
    return check_size((round(h * s_y), round(w * s_x)) if size is None else size), (s_y, s_x)


def check_scale(scale: Any) -> tuple[float, float]:
    """A number or a pair (s_y, s_x) as a pair; InputError unless above 0 and at most a million."""
    try:
        values = list(scale)
    except TypeError:  # one number, of whatever kind
        values = [scale]
    try:
        if any(isinstance(value, (bool, str)) for value in values):
            raise TypeError
        numbers = [float(value) for value in values]
        s_y, s_x = numbers if len(numbers) == 2 else numbers * 2
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"scale must be a number or (s_y, s_x), not {scale!r}") from None
    for value in (s_y, s_x):
        if not 0 < value <= MAX_SCALE:  # NaN is not either
            raise InputError(f"scale must be positive and at most {MAX_SCALE:,}, not {value}")
    return s_y, s_x


def check_size(size: Any) -> tuple[int, int]:
    """A pair of whole numbers (H, W) as a pair of int; InputError unless from 1 to 2^31 - 1."""
    try:
        if isinstance(size, str) or any(isinstance(value, bool) for value in size):
            raise TypeError
        height, width = (operator.index(value) for value in size)
    except (TypeError, ValueError):
        raise InputError(f"size must be two whole numbers (H, W), not {size!r}") from None
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise InputError(f"size must be positive, and below 2^31 a side, not {(height, width)}")
    return height, width
