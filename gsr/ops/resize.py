"""Bicubic resizing: PyTorch's, by strips of rows, and MATLAB's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsr.errors import InputError


def bicubic(
    x: Tensor,
    size: tuple[int, int],
    rows: tuple[int, int] | None = None,
    band: tuple[int, int] | None = None,
) -> Tensor:
    """Bicubic resizing as in `F.interpolate(mode="bicubic", align_corners=False)` (a = -0.75).

    Args:
        x: [B, C, h, w].
        size: (H, W) of the whole result.
        rows: (start, stop): only these rows of it, at the cost of those rows.
        band: (top, height): x holds only the rows from `top` on of an image of that height, among
            them those within 2 of the nearest to `rows`.

    With `rows` or `band` the positions of rows are float64; PyTorch's are float32, and cost a whole
    image of white noise 4e-4 at 5,000 rows and an odd scale.

    Returns:
        [B, C, H, W], or [B, C, stop - start, W].
    """
    if rows is None and band is None:
        return F.interpolate(x, size, mode="bicubic", align_corners=False)
    rows = rows or (0, size[0])
    tall = bicubic_rows(x, size[0], rows, band)
    return F.interpolate(tall, (rows[1] - rows[0], size[1]), mode="bicubic", align_corners=False)


def bicubic_at(x: Tensor, coord: Tensor) -> Tensor:
    """`bicubic` at `coord` [B, Q, 2], (y, x) in [-1, 1], of x [B, C, h, w]: [B, Q, C]."""
    out = F.grid_sample(x, coord.flip(-1)[:, None], "bicubic", "border", align_corners=False)
    return out[:, :, 0].mT


def bicubic_rows(
    x: Tensor, height: int, rows: tuple[int, int], band: tuple[int, int] | None = None
) -> Tensor:
    """The first half of `bicubic`: HR rows (start, stop) at LR columns, [B, C, stop - start, w]."""
    top, h = band or (0, x.shape[-2])
    # Rows and weights are made on the CPU: on a GPU each of these steps is an operation.
    y = (torch.arange(*rows, dtype=torch.float64) + 0.5) * h / height
    above = torch.floor(y - 0.5)
    t = (y - 0.5 - above).to(x.dtype)
    taps = range(-1, 3)
    index = torch.stack([(above.long() + tap).clamp(0, h - 1) - top for tap in taps])
    weight = torch.stack([cubic((t - tap).abs()) for tap in taps])[:, :, None]
    tall = x.new_zeros(())
    for row, w in zip(*(a.to(x.device, non_blocking=True) for a in (index, weight)), strict=True):
        tall = tall + x.index_select(-2, row) * w
    return tall


def cubic(t: Tensor, a: float = -0.75) -> Tensor:
    """Cubic convolution kernel (Keys 1981) at distances t in [0, 2]."""
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return torch.where(t <= 1, near, far)


def imresize(
    image: np.ndarray,
    scale: float | tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """MATLAB's `imresize(..., "bicubic")`: what made the LR images of the benchmark sets.

    Keys' cubic with a = -0.5, widened by 1 / scale where a dimension shrinks (antialiasing);
    pixels beyond an edge repeat the edge. One dimension after the other, the smaller scale first,
    rows first if they are equal. uint8 is rounded, halves up, and clipped after *each* of them, as
    MATLAB does: with that, and HR cropped to a multiple of the scale, the LR files of Set5, Set14
    and B100 at x2, x3 and x4 come out bit for bit.

    Args:
        image: [H, W] or [H, W, C], uint8 or floating point (of any range).
        scale: factor, or (s_y, s_x), finite and > 0; the result has ceil(H s_y) x ceil(W s_x).
        size: instead of scale, the (H', W') of the result; the scale is then (H' / H, W' / W).

    Returns:
        An array of image's dtype, [H', W'] or [H', W', C]; floats are neither rounded nor clipped.

    Raises:
        InputError: wrong shape, dtype, scale or size, or not exactly one of scale and size.

    Source: R. Keys, "Cubic convolution interpolation", IEEE TASSP 29 (6), 1981, for the kernel.
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise InputError(f"imresize: image must be [H, W] or [H, W, C], not {list(image.shape)}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise InputError(f"imresize: image must be uint8 or floating point, not {image.dtype}")
    h, w = image.shape[:2]
    if size is None and scale is not None:
        scales = tuple(scale) if isinstance(scale, Sequence) else (scale, scale)
        if len(scales) != 2 or not all(math.isfinite(s) and s > 0 for s in scales):
            raise InputError(f"imresize: scale must be finite and greater than 0, not {scale}")
        size = math.ceil(h * scales[0]), math.ceil(w * scales[1])
    elif size is not None and scale is None:
        whole = [isinstance(n, (int, np.integer)) for n in size]  # pyright: ignore
        if len(size) != 2 or not all(whole) or min(size) < 1:
            raise InputError(f"imresize: size must be two whole numbers > 0, not {size}")
        scales = size[0] / h, size[1] / w
    else:
        raise InputError("imresize: give either scale or size")

    result = image
    for axis in (0, 1) if scales[0] <= scales[1] else (1, 0):
        result = _imresize_axis(result, axis, size=size[axis], scale=scales[axis])
    return result


def _imresize_axis(image: np.ndarray, axis: int, *, size: int, scale: float) -> np.ndarray:
    """`imresize` along one axis: [..., n, ...] to [..., size, ...] of the same dtype."""
    shrink = min(scale, 1.0)
    taps = math.ceil(4 / shrink) + 2
    # MATLAB counts pixels from 1, and the last bits of `centre` depend on that.
    centre = np.arange(1, size + 1) / scale + 0.5 * (1 - 1 / scale)  # [size], in input pixels
    index = np.floor(centre - 2 / shrink)[:, None] + np.arange(taps)  # [size, taps]
    weight = _keys(shrink * (centre[:, None] - index))
    weight /= weight.sum(axis=1, keepdims=True)
    index = (index.astype(np.int64) - 1).clip(0, image.shape[axis] - 1)

    source = np.moveaxis(image, axis, 0)
    result = np.zeros((size, *source.shape[1:]))
    for k in np.flatnonzero(weight.any(axis=0)):
        # float64 times uint8 is exact: no copy of the whole input as float64 is needed.
        result += weight[:, k].reshape(-1, *[1] * (source.ndim - 1)) * source[index[:, k]]
    if image.dtype == np.uint8:
        result = np.floor(result + 0.5).clip(0, 255)
    return np.moveaxis(result.astype(image.dtype), 0, axis)


def _keys(x: np.ndarray) -> np.ndarray:
    """Keys' cubic, a = -0.5: 1 at 0, 0 at the other integers and beyond +-2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
