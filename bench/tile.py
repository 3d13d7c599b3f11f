"""A splat by tiles, as renderers of scenes have it: a baseline for the kernels of gsr.

Every program renders a tile of HR pixels and goes through all Gaussians that reach it, each of them
at every pixel of the tile (gsplat, Ye et al. 2024, section 3). On a grid of LR pixels their list is
a rectangle, so that nothing has to be sorted; a weight beyond a pixel's window is computed and
dropped, which is what the tile costs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SIDE = 16  # of a tile, HR pixels


@triton.jit
def _nearest(i, n, n_hr):
    """The LR pixel, of n, nearest to HR pixel i, of n_hr."""
    return (2 * i + 1) * n // (2 * n_hr)


@triton.jit
def tiles(
    values, sigma, rho, opacity, offset, out, h, w, big_h, big_w, eps,
    K: tl.constexpr, R: tl.constexpr, NORMALIZE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """out [B, 3, H, W] of contiguous parameters in float32; a program a tile."""
    across = tl.cdiv(big_w, SIDE)
    tile, image = tl.program_id(0), tl.program_id(1)
    top, left = tile // across * SIDE, tile % across * SIDE
    y = top + tl.arange(0, SIDE)[:, None]
    x = left + tl.arange(0, SIDE)[None, :]
    near_y, near_x = _nearest(y, h, big_h), _nearest(x, w, big_w)
    at_y, at_x = (y + 0.5) * h / big_h - 0.5, (x + 0.5) * w / big_w - 0.5
    red = tl.zeros((SIDE, SIDE), tl.float32)
    green, blue, total = red, red, red
    first_y, last_y = _nearest(top, h, big_h) - R, _nearest(top + SIDE - 1, h, big_h) + R
    first_x, last_x = _nearest(left, w, big_w) - R, _nearest(left + SIDE - 1, w, big_w) + R
    for i in range(tl.maximum(first_y, 0), tl.minimum(last_y, h - 1) + 1):
        for j in range(tl.maximum(first_x, 0), tl.minimum(last_x, w - 1) + 1):
            reached = (tl.abs(near_y - i) <= R) & (tl.abs(near_x - j) <= R)
            for k in range(K):
                g = image * K + k
                at, plane = i * w + j, h * w
                s_y = tl.load(sigma + 2 * g * plane + at)
                s_x = tl.load(sigma + (2 * g + 1) * plane + at)
                u = (at_y - i - tl.load(offset + 2 * g * plane + at)) / s_y
                v = (at_x - j - tl.load(offset + (2 * g + 1) * plane + at)) / s_x
                r = tl.load(rho + g * plane + at)
                q = (u * u - 2 * r * u * v + v * v) / (1 - r * r)
                weight = tl.load(opacity + g * plane + at) * tl.exp(-0.5 * q)
                weight = tl.where(reached, weight, 0.0)
                red += weight * tl.load(values + 3 * g * plane + at)
                green += weight * tl.load(values + (3 * g + 1) * plane + at)
                blue += weight * tl.load(values + (3 * g + 2) * plane + at)
                total += weight
    if NORMALIZE:
        red, green, blue = red / (total + eps), green / (total + eps), blue / (total + eps)
    held = (y < big_h) & (x < big_w)
    to = out + 3 * image * big_h * big_w + y * big_w + x
    tl.store(to, red, held)
    tl.store(to + big_h * big_w, green, held)
    tl.store(to + 2 * big_h * big_w, blue, held)


def splat(
    values: Tensor, sigma: Tensor, rho: Tensor, opacity: Tensor, size: tuple[int, int],
    offset: Tensor, radius: int, normalize: bool, eps: float,
) -> Tensor:  # fmt: skip
    """`gsr.ops.splat` of three channels in float32, forward alone."""
    b, k, _, h, w = values.shape
    given = [t.contiguous() for t in (values, sigma, rho, opacity, offset)]
    out = torch.empty(b, 3, *size, device=values.device)
    grid = (triton.cdiv(size[0], SIDE) * triton.cdiv(size[1], SIDE), b)
    kernel: Any = tiles[grid]
    kernel(
        *given, out, h, w, *size, eps,
        K=k, R=radius, NORMALIZE=normalize, SIDE=SIDE, num_warps=4,
    )  # fmt: skip
    return out
