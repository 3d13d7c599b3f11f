"""The splat of `official`: windows of features times the kernels that all windows share.

With w[p, n] the weight of shared Gaussian n at HR pixel p of a window and f[n, m] the features of
channel and window m,

    out[p, m] = clamp(sum_n w[p, n] f[n, m], 0, 1)

is one matrix product, [k_y k_x, n] by [n, B c L], on tensor cores.
"""

# A checker knows nothing of what a kernel's body means; of the launchers it checks all else:
# pyright: strict, reportMissingTypeStubs=false, reportMissingParameterType=false
# pyright: reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# Some versions of Triton say that a cdiv gives a constexpr, and their functions nothing:
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import windows_config
from .splat import launch

# As in kernels/splat.py: no compilations for particular numbers.
_jit = triton.jit(do_not_specialize=["rows", "columns", "count", "ky", "kx", "blocks"])


@triton.jit
def _tap(i, y, k, WINDOW: tl.constexpr, TAPS: tl.constexpr):
    """Tap of kernel y at HR pixel i of k, rounded down, and the rest, from whole numbers.

    i + (1 - 2 y / WINDOW) (k - 1) / 2 - floor((k - TAPS) / 2), of which float32 would lose digits.
    """
    parts: tl.constexpr = 2 * WINDOW
    position = (i - (k - TAPS) // 2 + k) * parts + (WINDOW - 2 * y) * (k - 1)  # k more: no sign
    return position // parts - k, (position % parts).to(tl.float32) / parts


@_jit
def windows_weights(
    kernels, out, ky, kx, WINDOW: tl.constexpr, TAPS: tl.constexpr, NP: tl.constexpr
):
    """w [k_y k_x, WINDOW^2] from kernels [WINDOW^2, TAPS, TAPS]. Program (pixel of a window)."""
    pixel, n = tl.program_id(0), tl.arange(0, NP)
    a, fy = _tap(pixel // kx, n // WINDOW, ky, WINDOW, TAPS)
    b, fx = _tap(pixel % kx, n % WINDOW, kx, WINDOW, TAPS)
    # Bilinear placement: a pixel lies between two taps along each axis.
    w = tl.zeros([NP], tl.float32)
    for corner in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        ta, tb = a + corner // 2, b + corner % 2
        share = (fy if corner // 2 else 1.0 - fy) * (fx if corner % 2 else 1.0 - fx)
        inside = (n < WINDOW * WINDOW) & (ta >= 0) & (ta < TAPS) & (tb >= 0) & (tb < TAPS)
        w += share * tl.load(kernels + (n * TAPS + ta) * TAPS + tb, inside, other=0.0)
    at = pixel.to(tl.int64) * (WINDOW * WINDOW) + n
    tl.store(out + at, w, n < WINDOW * WINDOW)


@triton.jit
def _weights(weights, pixel, ky, kx, WINDOW: tl.constexpr, NP: tl.constexpr):
    """w at pixels [P] of a window: [P, NP]."""
    n = tl.arange(0, NP)
    at = (pixel * (WINDOW * WINDOW))[:, None] + n[None, :]
    real = (pixel < ky * kx)[:, None] & (n < WINDOW * WINDOW)[None, :]
    return tl.load(weights + at, real, other=0.0)


@triton.jit
def _columns(m, rows, columns, ky, kx, WINDOW: tl.constexpr):
    """Where column m (channel of an image, row and column of the window) starts: LR and HR."""
    wide = m.to(tl.int64)
    image, row, column = wide // (rows * columns), wide // columns % rows, wide % columns
    lr = ((image * rows + row) * WINDOW * columns + column) * WINDOW
    hr = ((image * rows + row) * ky * columns + column) * kx
    return lr, hr


@triton.jit
def _features(features, lr, columns, m, count, WINDOW: tl.constexpr, NP: tl.constexpr):
    """f [NP, M] and where its values lie."""
    n = tl.arange(0, NP)
    at = lr[None, :] + (n // WINDOW * WINDOW * columns + n % WINDOW)[:, None]
    mask = (n < WINDOW * WINDOW)[:, None] & (m < count)[None, :]
    return tl.load(features + at, mask, other=0.0).to(tl.float32), at, mask


@_jit
def windows_forward(
    features, weights, out, rows, columns, count, ky, kx,
    WINDOW: tl.constexpr, NP: tl.constexpr,
    PIXELS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, block of a window's pixels), both along the grid's one side."""
    blocks = tl.cdiv(count, COLUMNS)
    pixel = (tl.program_id(0) // blocks).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    m = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    lr, hr = _columns(m, rows, columns, ky, kx, WINDOW)
    w = _weights(weights, pixel, ky, kx, WINDOW, NP)
    # Features are read where they lie in the LR image, and the block is written where it belongs
    # in the HR one: no copy of the windows.
    f, _, _ = _features(features, lr, columns, m, count, WINDOW, NP)
    product = tl.dot(w, f, input_precision=PRECISION)
    product = tl.minimum(tl.maximum(product, 0.0), 1.0)
    at = hr[None, :] + (pixel // kx * (columns * kx) + pixel % kx)[:, None]
    mask = (pixel < ky * kx)[:, None] & (m < count)[None, :]
    tl.store(out + at, product.to(out.dtype.element_ty), mask)


@triton.jit
def _masked_gradient(
    grad, w, f, hr, pixel, m, columns, count, ky, kx, PRECISION: tl.constexpr
):  # fmt: skip
    """dL/dproduct [P, M]: the gradient where the clamp let the value through."""
    # The product is recomputed for the clamp's mask.
    product = tl.dot(w, f, input_precision=PRECISION)
    at = hr[None, :] + (pixel // kx * (columns * kx) + pixel % kx)[:, None]
    mask = (pixel < ky * kx)[:, None] & (m < count)[None, :]
    g = tl.load(grad + at, mask, other=0.0).to(tl.float32)
    return tl.where((product >= 0.0) & (product <= 1.0), g, 0.0)


@_jit
def windows_backward_features(
    grad, features, weights, d_features, rows, columns, count, ky, kx,
    WINDOW: tl.constexpr, NP: tl.constexpr,
    PIXELS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of columns): it owns their gradient and loops over the pixels."""
    m = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lr, hr = _columns(m, rows, columns, ky, kx, WINDOW)
    f, at, mask = _features(features, lr, columns, m, count, WINDOW, NP)
    d = tl.zeros([NP, COLUMNS], tl.float32)
    for start in range(0, ky * kx, PIXELS):
        pixel = start + tl.arange(0, PIXELS).to(tl.int64)
        w = _weights(weights, pixel, ky, kx, WINDOW, NP)
        g = _masked_gradient(grad, w, f, hr, pixel, m, columns, count, ky, kx, PRECISION)
        d += tl.dot(tl.trans(w), g, input_precision=PRECISION)
    tl.store(d_features + at, d, mask)


@_jit
def windows_backward_weights(
    grad, features, weights, d_weights, rows, columns, count, ky, kx, blocks,
    WINDOW: tl.constexpr, NP: tl.constexpr,
    PIXELS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part of dL/dw, [parts, k_y k_x, WINDOW^2]. Program (block of pixels, part of the columns)."""
    # The launcher adds the parts in a fixed order: no atomics.
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    part = tl.program_id(1)
    w = _weights(weights, pixel, ky, kx, WINDOW, NP)
    d = tl.zeros([PIXELS, NP], tl.float32)
    for block in range(part * blocks, part * blocks + blocks):
        m = block * COLUMNS + tl.arange(0, COLUMNS)
        lr, hr = _columns(m, rows, columns, ky, kx, WINDOW)
        f, _, _ = _features(features, lr, columns, m, count, WINDOW, NP)
        g = _masked_gradient(grad, w, f, hr, pixel, m, columns, count, ky, kx, PRECISION)
        d += tl.dot(g, tl.trans(f), input_precision=PRECISION)
    n = tl.arange(0, NP)
    at = ((part * ky * kx + pixel) * WINDOW * WINDOW)[:, None] + n[None, :]
    tl.store(d_weights + at, d, (pixel < ky * kx)[:, None] & (n < WINDOW * WINDOW)[None, :])


# ---- launchers ----------------------------------------------------------------------------------


def _weights_of(kernels: Tensor, side: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
    """w [k_y k_x, n] float32, and the constants that all kernels share."""
    n, taps, _ = kernels.shape
    constants = {"WINDOW": math.isqrt(n), "NP": max(16, triton.next_power_of_2(n))}
    weights = torch.empty(side[0] * side[1], n, device=kernels.device, dtype=torch.float32)
    kernels = kernels.float().contiguous()
    launch(windows_weights, (len(weights),), kernels, weights, *side, TAPS=taps, **constants)
    return weights, constants


def _count(features: Tensor, window: int) -> tuple[int, int, int]:
    """Rows and columns of windows, and columns of the product."""
    b, c, h, w = features.shape
    return h // window, w // window, b * c * (h // window) * (w // window)


def forward(features: Tensor, kernels: Tensor, side: tuple[int, int]) -> Tensor:
    """`splat_windows`: [B, c, h / window k_y, w / window k_x] in the features' type."""
    features = features.contiguous()
    weights, constants = _weights_of(kernels, side)
    rows, columns, count = _count(features, constants["WINDOW"])
    ky, kx = side
    shape = *features.shape[:2], rows * ky, columns * kx
    out = torch.empty(shape, device=features.device, dtype=features.dtype)
    config = windows_config("forward", features.device)
    blocks = triton.cdiv(count, config["COLUMNS"]) * triton.cdiv(ky * kx, config["PIXELS"])
    launch(
        windows_forward, (blocks,), features, weights, out, rows, columns, count, ky, kx,
        **constants, **config,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, features: Tensor, kernels: Tensor, side: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients, float32, of features and of the weights w [k_y, k_x, n]."""
    grad, features = grad.contiguous(), features.contiguous()
    weights, constants = _weights_of(kernels, side)
    rows, columns, count = _count(features, constants["WINDOW"])
    ky, kx = side
    config = windows_config("backward", features.device)
    blocks = triton.cdiv(count, config["COLUMNS"])
    each = triton.cdiv(blocks, min(blocks, 32))  # blocks of a part
    parts = triton.cdiv(blocks, each)
    d_features = torch.empty_like(features, dtype=torch.float32)
    d_weights = torch.empty(parts, ky, kx, kernels.shape[0], device=weights.device)
    launch(
        windows_backward_features, (blocks,),
        grad, features, weights, d_features, rows, columns, count, ky, kx, **constants, **config,
    )  # fmt: skip
    launch(
        windows_backward_weights, (triton.cdiv(ky * kx, config["PIXELS"]), parts),
        grad, features, weights, d_weights, rows, columns, count, ky, kx, each,
        **constants, **config,
    )  # fmt: skip
    return d_features, d_weights.sum(0)
