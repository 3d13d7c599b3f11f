"""Splat: the Gaussians of the LR pixels nearest to each HR pixel, weighted, summed, divided.

Formula, shapes and units are those of `gsr.ops.reference.splat_at` (GaussianSR, section 3):

    w_i = opacity_i exp(-q_i / 2),   out = sum_i w_i v_i  [ / (sum_i w_i + eps) ]

over the K Gaussians of each of the (2 r + 1)^2 LR pixels around the nearest one.

Geometry and sums are float32 whatever the storage type; offsets into tensors are int64.
"""

# A checker knows nothing of what a kernel's body means; of the launchers it checks all else:
# pyright: strict, reportMissingTypeStubs=false, reportMissingParameterType=false
# pyright: reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# Some versions of Triton say that cdiv gives a constexpr:
# pyright: reportArgumentType=false

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsr.ops.arguments import Gaussians, Grid, Weighting, join_channels, split_channels

from .configs import points_config, splat_config

# Triton would compile anew for numbers that are 1, which it makes Python's, or multiples of 16. The
# rows of a strip are now this, now that, and what is to be widened to 64 bits must be a tensor.
NUMBERS = [
    "h", "w", "big_h", "big_w", "top", "held", "row0", "rows", "i0", "lines", "blocks_y",
    "blocks_x", "queries", "values_b", "values_k",
]  # fmt: skip
_jit = triton.jit(do_not_specialize=NUMBERS)
CHANNELS = 8  # a launch takes; more, in registers, would spill

# ---- shared pieces ------------------------------------------------------------------------------


@triton.jit
def _program(across, lines):
    """(index in a row, row, image) of this program, of across programs a row, lines rows an image.

    CUDA takes 65,535 blocks at most but along the first dimension of a grid, so all are along it.
    """
    pid = tl.program_id(0)
    rest = pid // across
    return pid - rest * across, rest % lines, (rest // lines).to(tl.int64)


@triton.jit
def _start(i, n, n_hr):
    """Where cell i of n starts: the least of n_hr HR indices Y with (2 Y + 1) n >= 2 n_hr i."""
    return (tl.maximum(2 * n_hr * i - n, 0) + 2 * n - 1) // (2 * n)


@triton.jit
def _place(y, i, n, n_hr):
    """Position of HR index y relative to LR index i, LR pixels, float32.

    The difference is one of whole numbers, so no image is too large for float32.
    """
    return ((2 * y + 1) * n - (2 * i + 1) * n_hr).to(tl.float32) / (2 * n_hr).to(tl.float32)


@triton.jit
def _gaussian(sigma, rho, opacity, offset, g, plane, row, j, exists, HAS_OFFSET: tl.constexpr):
    """Shape, opacity, offset of Gaussian plane g at LR pixels row + j; opacity 0 off the image.

    row (int64, one number) carries all that may exceed 32 bits, j [cells] is int32.
    """
    one = g * plane + row
    two = one + g * plane  # sigma and offset have two planes for each of the others'
    sy = tl.load(sigma + two + j, exists, other=1.0).to(tl.float32)
    sx = tl.load(sigma + two + plane + j, exists, other=1.0).to(tl.float32)
    r = tl.load(rho + one + j, exists, other=0.0).to(tl.float32)
    alpha = tl.load(opacity + one + j, exists, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        oy = tl.load(offset + two + j, exists, other=0.0).to(tl.float32)
        ox = tl.load(offset + two + plane + j, exists, other=0.0).to(tl.float32)
    else:
        oy = tl.zeros_like(sy)
        ox = tl.zeros_like(sy)
    return sy, sx, r, alpha, oy, ox


@triton.jit
def _conic(sy, sx, r):
    """a, b, c of q = a dy^2 + b dy dx + c dx^2."""
    k = 1.0 / (1.0 - r * r)
    u, v = 1.0 / sy, 1.0 / sx
    return k * u * u, -2.0 * k * r * u * v, k * v * v


@triton.jit
def _exponent(sy, sx, r):
    """The conic of -q / 2 for the hardware's base 2: times -log2(e) / 2."""
    a, b, c = _conic(sy, sx, r)
    return -0.7213475204444817 * a, -0.7213475204444817 * b, -0.7213475204444817 * c


@triton.jit
def _falloff(a, b, c, dy, dx):
    """exp(-q / 2). What holds dy alone comes first: the pixels of a row of a cell share it."""
    return tl.exp2(a * dy * dy + dx * (b * dy + c * dx))


@triton.jit
def _write_gradients(
    d_sigma, d_rho, d_opacity, d_offset, g, plane, row, j, mask,
    sy, sx, r, d_alpha, myy, myx, mxx, my, mx, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """Gradients from the moments of dL/dq: myy = sum of dL/dq dy^2, my = sum of dL/dq dy, ..."""
    a, b, c = _conic(sy, sx, r)
    k = 1.0 / (1.0 - r * r)
    u, v = 1.0 / sy, 1.0 / sx
    d_sy = -(2.0 * a * myy + b * myx) * u
    d_sx = -(2.0 * c * mxx + b * myx) * v
    d_r = 2.0 * k * k * (r * (u * u * myy + v * v * mxx) - (1.0 + r * r) * u * v * myx)
    one = g * plane + row
    two = one + g * plane
    tl.store(d_sigma + two + j, d_sy, mask)
    tl.store(d_sigma + two + plane + j, d_sx, mask)
    tl.store(d_rho + one + j, d_r, mask)
    tl.store(d_opacity + one + j, d_alpha, mask)
    if HAS_OFFSET:
        tl.store(d_offset + two + j, -(2.0 * a * my + b * mx), mask)
        tl.store(d_offset + two + plane + j, -(2.0 * c * mx + b * my), mask)


# ---- the grid -----------------------------------------------------------------------------------
# The HR pixels whose nearest LR pixel is i, its cell, are those Y with
# floor((2 Y + 1) h / 2 H) = i. All of them share the same Gaussians.


@_jit
def splat_forward(
    values, sigma, rho, opacity, offset, grad, out, values_b, values_k,
    h, w, big_h, big_w, top, held, row0, rows, i0, lines, blocks_y, blocks_x, eps,
    K: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_OFFSET: tl.constexpr, PREPARE: tl.constexpr,
    WIDE: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """out [B, C, rows, W]; with PREPARE g' and s, [B, C + 1, rows, W], for the backward pass.

    The Gaussians' tensors hold LR rows top ... top + held - 1 of h; `rows` HR rows from row0 on are
    wanted. `values` may be part of a larger tensor: values_b and values_k are its strides of the
    image and the Gaussian. Program (cells of a row x PY x PX pixels of each, of `lines` rows,
    image).
    """
    # A thread owns a cell, whose pixels are numbers of their own: tensors are [cells], and there
    # may be as many pixels as a cell has, not only powers of 2.
    pid, cell, b = _program(tl.cdiv(w, CELLS) * blocks_y * blocks_x, lines)
    if WIDE:
        h, w, big_h, big_w = h.to(tl.int64), w.to(tl.int64), big_h.to(tl.int64), big_w.to(tl.int64)
    i = (i0 + cell).to(h.dtype)
    y_start = _start(i, h, big_h).to(tl.int32) + (pid // blocks_x) % blocks_y * PY
    y_stop = tl.minimum(_start(i + 1, h, big_h).to(tl.int32), row0 + rows)
    if (y_start >= y_stop) | (y_start + PY <= row0):
        return  # cells of a row are equally high, so that all of these may have no row left
    plane, size = w.to(tl.int64) * held, big_w.to(tl.int64) * rows
    j = pid // (blocks_x * blocks_y) * CELLS + tl.arange(0, CELLS)
    wide = j.to(w.dtype)
    x_start = _start(wide, w, big_w).to(tl.int32) + pid % blocks_x * PX
    x_stop = _start(wide + 1, w, big_w).to(tl.int32)
    fy, fx = (), ()
    for py in tl.static_range(PY):
        fy = fy + (_place((y_start + py).to(h.dtype), i, h, big_h),)
    for px in tl.static_range(PX):
        fx = fx + (_place((x_start + px).to(w.dtype), wide, w, big_w),)

    # The interpreter cannot combine scalar masks with blocks.
    zeros, zeros_32 = tl.zeros([CELLS], h.dtype), tl.zeros([CELLS], tl.int32)
    total, acc = (), ()  # of each pixel, and of each pixel and channel
    for _ in tl.static_range(PY * PX):
        total = total + (tl.zeros([CELLS], tl.float32),)
    for _ in tl.static_range(PY * PX * C):
        acc = acc + (tl.zeros([CELLS], tl.float32),)
    for n in range((2 * R + 1) * (2 * R + 1)):
        di, dj = n // (2 * R + 1) - R, n % (2 * R + 1) - R
        ii, jj = zeros + i + di, j + dj
        exists = (ii >= 0) & (ii < h) & (jj >= 0) & (jj < w)
        row = (i + di - top).to(tl.int64) * w
        # A Gaussian is loaded once and used for PY x PX pixels; neighbouring lanes load
        # neighbouring LR pixels.
        for k in range(K):
            g = b * K + k
            sy, sx, r, alpha, oy, ox = _gaussian(
                sigma, rho, opacity, offset, g, plane, row, jj, exists, HAS_OFFSET
            )
            a2, b2, c2 = _exponent(sy, sx, r)
            v = ()  # the opacity goes with what is multiplied by the falloff anyway
            for c in tl.static_range(C):
                at = b * values_b + (g - b * K) * values_k + c * plane + row
                v = v + (alpha * tl.load(values + at + jj, exists, other=0.0).to(tl.float32),)
            totals, sums = (), ()
            for p in tl.static_range(PY * PX):
                e = _falloff(a2, b2, c2, fy[p // PX] - (oy + di), fx[p % PX] - (ox + dj))
                totals = totals + (total[p] + alpha * e,)
                for c in tl.static_range(C):
                    sums = sums + (acc[p * C + c] + v[c] * e,)
            total, acc = totals, sums

    for p in tl.static_range(PY * PX):
        y, x = zeros_32 + (y_start + p // PX), x_start + p % PX
        inside = (x < x_stop) & (j < w) & (y >= row0) & (y < y_stop)
        at = (y - row0).to(tl.int64) * big_w + x
        if NORMALIZE:
            share = 1.0 / (total[p] + eps)
        if PREPARE:
            # With W = sum w + eps, g' = g / W and s = sum_c g'_c out_c, the gradient of a weight
            # is sum_c g'_c v_c - s. Both are written here, for `splat_backward` to gather.
            s = tl.zeros([CELLS], tl.float32)
            for c in tl.static_range(C):
                scaled = tl.load(grad + (b * C + c) * size + at, inside, other=0.0).to(tl.float32)
                scaled = scaled * share
                s += scaled * (acc[p * C + c] * share)
                tl.store(out + (b * (C + 1) + c) * size + at, scaled, inside)
            tl.store(out + (b * (C + 1) + C) * size + at, s, inside)
        else:
            for c in tl.static_range(C):
                value = acc[p * C + c]
                if NORMALIZE:
                    value = value * share
                tl.store(out + (b * C + c) * size + at, value.to(out.dtype.element_ty), inside)


@_jit
def splat_backward(
    grad, values, sigma, rho, opacity, offset, d_values, d_sigma, d_rho, d_opacity, d_offset,
    values_b, values_k, h, w, big_h, big_w, top, held, row0, rows,
    K: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_OFFSET: tl.constexpr, WIDE: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Gradients of the Gaussians, each summed by the thread that owns its LR pixel.

    `grad` is g' and s, [B, C + 1, rows, W], from PREPARE; without NORMALIZE it is dL/dout itself.
    Program (LR pixels of a row, row, image and k).
    """
    # A thread owns a Gaussian and gathers from the HR pixels of the cells around it: no atomics,
    # one writer for each gradient, the same bits every time.
    block, held_row, g = _program(tl.cdiv(w, CELLS), held)
    if WIDE:
        h, w, big_h, big_w = h.to(tl.int64), w.to(tl.int64), big_h.to(tl.int64), big_w.to(tl.int64)
    plane, row = w.to(tl.int64) * held, held_row.to(tl.int64) * w
    i = (top + held_row).to(h.dtype)
    planes: tl.constexpr = C + 1 if NORMALIZE else C
    j = block * CELLS + tl.arange(0, CELLS)
    wide = j.to(w.dtype)
    own = j < w
    sy, sx, r, alpha, oy, ox = _gaussian(
        sigma, rho, opacity, offset, g, plane, row, j, own, HAS_OFFSET
    )
    a2, b2, c2 = _exponent(sy, sx, r)

    # Sums: gradients of the values and the opacity, and the moments of dL/dq (dy^2, dy dx, ...),
    # from which those of sigma, rho and offset follow at the end.
    d_alpha = tl.zeros([CELLS], tl.float32)
    myy, myx, mxx = tl.zeros_like(d_alpha), tl.zeros_like(d_alpha), tl.zeros_like(d_alpha)
    my, mx = tl.zeros_like(d_alpha), tl.zeros_like(d_alpha)
    v, dv = (), ()  # [cells] of each channel
    for c in tl.static_range(C):
        at = g // K * values_b + g % K * values_k + c * plane + row + j
        v = v + (tl.load(values + at, own, other=0.0).to(tl.float32),)
        dv = dv + (tl.zeros([CELLS], tl.float32),)
    # The HR pixels of the cells within R are one run of rows and one of columns.
    y_start = tl.maximum(_start(tl.maximum(i - R, 0), h, big_h), row0)
    y_stop = tl.minimum(_start(tl.minimum(i + R + 1, h), h, big_h), row0 + rows)
    x_start = _start(tl.maximum(wide - R, 0), w, big_w).to(tl.int32)
    x_stop = _start(tl.minimum(wide + R + 1, w), w, big_w).to(tl.int32)
    size = big_w.to(tl.int64) * rows
    for y in range(y_start, y_stop):
        dy = _place(y, i, h, big_h) - oy
        line = g // K * planes * size + (y - row0).to(tl.int64) * big_w
        for t in range(tl.max(x_stop - x_start, axis=0)):  # pyright: ignore[reportArgumentType]
            x = x_start + t
            inside = x < x_stop
            dx = _place(x.to(w.dtype), wide, w, big_w) - ox
            e = _falloff(a2, b2, c2, dy, dx)
            weight = alpha * e
            d_weight = tl.zeros_like(e)
            if NORMALIZE:
                d_weight -= tl.load(grad + line + C * size + x, inside, other=0.0)
            sums = ()
            for c in tl.static_range(C):
                scaled = tl.load(grad + line + c * size + x, inside, other=0.0).to(tl.float32)
                d_weight += scaled * v[c]
                sums = sums + (dv[c] + scaled * weight,)
            dv = sums
            d_alpha += e * d_weight
            dq = -0.5 * weight * d_weight
            myy += dq * dy * dy
            myx += dq * dy * dx
            mxx += dq * dx * dx
            my += dq * dy
            mx += dq * dx

    for c in tl.static_range(C):
        tl.store(d_values + (g * C + c) * plane + row + j, dv[c], own)
    _write_gradients(
        d_sigma, d_rho, d_opacity, d_offset, g, plane, row, j, own,
        sy, sx, r, d_alpha, myy, myx, mxx, my, mx, HAS_OFFSET,
    )  # fmt: skip


# ---- points -------------------------------------------------------------------------------------


@triton.jit
def _nearest(p, n):
    """LR index nearest to coordinate p, within the image, in p's type."""
    return tl.minimum(tl.maximum(tl.floor(p + 0.5), 0.0), (n - 1).to(p.dtype))


@_jit
def points_forward(
    values, sigma, rho, opacity, offset, points, grad, out,
    values_b, values_k, h, w, queries, eps,
    K: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_OFFSET: tl.constexpr, PREPARE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, Q, C]; with PREPARE g' and s, [B, Q, C + 1]. Program (points, image)."""
    # A thread owns a point.
    block, _, b = _program(tl.cdiv(queries, BLOCK), 1)
    h, w = h.to(tl.int64), w.to(tl.int64)
    plane = h * w
    q = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = q < queries
    y = tl.load(points + 2 * (b * queries + q), real, other=0.0)
    x = tl.load(points + 2 * (b * queries + q) + 1, real, other=0.0)
    ny, nx = _nearest(y, h), _nearest(x, w)
    fy, fx = (y - ny).to(tl.float32), (x - nx).to(tl.float32)
    i, j = ny.to(tl.int64), nx.to(tl.int64)

    total = tl.zeros([BLOCK], tl.float32)
    acc = ()
    for _ in tl.static_range(C):
        acc = acc + (tl.zeros([BLOCK], tl.float32),)
    for n in range((2 * R + 1) * (2 * R + 1)):
        di, dj = n // (2 * R + 1) - R, n % (2 * R + 1) - R
        exists = (i + di >= 0) & (i + di < h) & (j + dj >= 0) & (j + dj < w) & real
        at = (i + di) * w + j + dj
        for k in range(K):
            g = b * K + k
            sy, sx, r, alpha, oy, ox = _gaussian(
                sigma, rho, opacity, offset, g, plane, 0, at, exists, HAS_OFFSET
            )
            a2, b2, c2 = _exponent(sy, sx, r)
            weight = alpha * _falloff(a2, b2, c2, fy - (oy + di), fx - (ox + dj))
            total += weight
            sums = ()
            for c in tl.static_range(C):
                own = b * values_b + (g - b * K) * values_k + c * plane
                v = tl.load(values + own + at, exists, other=0.0).to(tl.float32)
                sums = sums + (acc[c] + weight * v,)
            acc = sums

    if NORMALIZE:
        share = 1.0 / (total + eps)
    place = b * queries + q
    if PREPARE:
        s = tl.zeros([BLOCK], tl.float32)
        for c in tl.static_range(C):
            scaled = tl.load(grad + place * C + c, real, other=0.0).to(tl.float32) * share
            s += scaled * (acc[c] * share)
            tl.store(out + place * (C + 1) + c, scaled, real)
        tl.store(out + place * (C + 1) + C, s, real)
    else:
        for c in tl.static_range(C):
            value = acc[c] * share if NORMALIZE else acc[c]
            tl.store(out + place * C + c, value.to(out.dtype.element_ty), real)


@_jit
def points_backward(
    grad, points, order, starts,
    values, sigma, rho, opacity, offset, d_values, d_sigma, d_rho, d_opacity, d_offset,
    values_b, values_k, h, w,
    K: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_OFFSET: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """As `splat_backward`; the points of cell n of all images are order[starts[n]:starts[n + 1]].

    `grad` is [B Q, C + 1] from PREPARE, or [B Q, C] without NORMALIZE; `points` [B Q, 2].
    """
    block, i, g = _program(tl.cdiv(w, CELLS), h)
    i, b = i.to(tl.int64), g // K
    h, w = h.to(tl.int64), w.to(tl.int64)
    plane = h * w
    planes: tl.constexpr = C + 1 if NORMALIZE else C
    j = block.to(tl.int64) * CELLS + tl.arange(0, CELLS)
    own, row = j < w, i * w
    sy, sx, r, alpha, oy, ox = _gaussian(
        sigma, rho, opacity, offset, g, plane, row, j, own, HAS_OFFSET
    )
    a2, b2, c2 = _exponent(sy, sx, r)
    v, dv = (), ()
    for c in tl.static_range(C):
        at = g // K * values_b + g % K * values_k + c * plane + row + j
        v = v + (tl.load(values + at, own, other=0.0).to(tl.float32),)
        dv = dv + (tl.zeros([CELLS], tl.float32),)

    zeros = tl.zeros([CELLS], tl.int64)  # see splat_forward
    d_alpha = tl.zeros([CELLS], tl.float32)
    myy, myx, mxx = tl.zeros_like(d_alpha), tl.zeros_like(d_alpha), tl.zeros_like(d_alpha)
    my, mx = tl.zeros_like(d_alpha), tl.zeros_like(d_alpha)
    for n in range((2 * R + 1) * (2 * R + 1)):
        di, dj = n // (2 * R + 1) - R, n % (2 * R + 1) - R
        ii, jj = zeros + i + di, j + dj
        exists = (ii >= 0) & (ii < h) & (jj >= 0) & (jj < w)
        cell = b * plane + ii * w + jj
        # The points are sorted by cell, so those around an LR pixel are (2 R + 1)^2 short runs.
        start = tl.load(starts + cell, exists, other=0)
        stop = tl.load(starts + cell + 1, exists, other=0)
        for t in range(tl.max(stop - start, axis=0)):  # pyright: ignore[reportArgumentType]
            real = start + t < stop
            q = tl.load(order + start + t, real, other=0)
            y = tl.load(points + 2 * q, real, other=0.0)
            x = tl.load(points + 2 * q + 1, real, other=0.0)
            dy = (y - ii.to(y.dtype)).to(tl.float32) + di - oy
            dx = (x - jj.to(x.dtype)).to(tl.float32) + dj - ox
            e = tl.where(real, _falloff(a2, b2, c2, dy, dx), 0.0)
            weight = alpha * e
            d_weight = tl.zeros_like(e)
            if NORMALIZE:
                d_weight -= tl.load(grad + q * planes + C, real, other=0.0)
            sums = ()
            for c in tl.static_range(C):
                scaled = tl.load(grad + q * planes + c, real, other=0.0).to(tl.float32)
                d_weight += scaled * v[c]
                sums = sums + (dv[c] + scaled * weight,)
            dv = sums
            d_alpha += e * d_weight
            dq = -0.5 * weight * d_weight
            myy += dq * dy * dy
            myx += dq * dy * dx
            mxx += dq * dx * dx
            my += dq * dy
            mx += dq * dx

    for c in tl.static_range(C):
        tl.store(d_values + (g * C + c) * plane + row + j, dv[c], own)
    _write_gradients(
        d_sigma, d_rho, d_opacity, d_offset, g, plane, row, j, own,
        sy, sx, r, d_alpha, myy, myx, mxx, my, mx, HAS_OFFSET,
    )  # fmt: skip


# ---- launchers ----------------------------------------------------------------------------------


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run the programs of a kernel whose first argument is a tensor."""
    # Triton launches on the current device, which need not be the tensor's.
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants)


def _wide(h: int, w: int, big_h: int, big_w: int) -> bool:
    """Whether positions need 64 bits, whose divisions cost several times those of 32.

    They come from products up to 2 n n_hr, with indices a block or a window beyond the image.
    """
    return 2 * max((h + 512) * (big_h + 512), (w + 512) * (big_w + 512)) >= 2**31


def _constants(gaussians: Gaussians, weighting: Weighting) -> dict[str, Any]:
    """What all kernels are compiled for."""
    _, k, c, _, _ = gaussians.values.shape
    return {
        "K": k, "C": c, "R": weighting.radius,
        "NORMALIZE": weighting.normalize, "HAS_OFFSET": gaussians.offset is not None,
    }  # fmt: skip


def _pointers(gaussians: Gaussians) -> list[Tensor]:
    """The tensors in the order of the kernels' arguments, with any of them for no offset."""
    return [gaussians.values if t is None else t for t in gaussians]


def _strides(values: Tensor) -> tuple[int, int]:
    """values_b and values_k."""
    return values.stride(0), values.stride(1)


def _laid_out(gaussians: Gaussians) -> Gaussians:
    """The Gaussians as the kernels read them: contiguous, but for the values' first two axes.

    What a head cuts from the output of its convolution is not copied.
    """
    values = gaussians.values
    *_, h, w = values.shape
    planes = values.stride()[2:] == (h * w, w, 1)
    laid_out = gaussians._replace(values=gaussians.rho).map(Tensor.contiguous)
    return laid_out._replace(values=values if planes else values.contiguous())


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def forward(gaussians: Gaussians, grid: Grid, weighting: Weighting) -> Tensor:
    """`gsr.ops.reference.splat`: [B, C, stop - start, W] in values' type."""
    parts = split_channels(gaussians, CHANNELS)
    return _join([_forward(part, grid, weighting) for part in parts], 1)


def backward(grad: Tensor, gaussians: Gaussians, grid: Grid, weighting: Weighting) -> Gaussians:
    """Gradients, float32, of the Gaussians from that of `forward`'s result."""
    parts = zip(grad.split(CHANNELS, 1), split_channels(gaussians, CHANNELS), strict=True)
    return join_channels([_backward(g, part, grid, weighting) for g, part in parts])


def _forward(
    gaussians: Gaussians, grid: Grid, weighting: Weighting, *, grad: Tensor | None = None
) -> Tensor:
    gaussians, prepare = _laid_out(gaussians), grad is not None
    values = gaussians.values
    b, _, c, held, w = values.shape
    (big_h, big_w), (start, stop), (top, h) = grid
    out = torch.empty(
        b, c + prepare, stop - start, big_w,
        device=values.device, dtype=torch.float32 if prepare else values.dtype,
    )  # fmt: skip
    kind, wide = "prepare" if prepare else "forward", _wide(h, w, big_h, big_w)
    config = splat_config(kind, values.device, (big_h / h, big_w / w), channels=c, wide=wide)
    blocks_y = triton.cdiv(triton.cdiv(big_h, h), config["PY"])
    blocks_x = triton.cdiv(triton.cdiv(big_w, w), config["PX"])
    across = triton.cdiv(w, config["CELLS"]) * blocks_y * blocks_x
    # Rows of cells: from that of the first HR row wanted to that of the last one.
    i0, i1 = ((2 * y + 1) * h // (2 * big_h) for y in (start, stop - 1))
    lines = i1 + 1 - i0
    launch(
        splat_forward, (across * lines * b,),
        *_pointers(gaussians), values if grad is None else grad, out, *_strides(values),
        h, w, big_h, big_w, top, held, start, stop - start, i0, lines, blocks_y, blocks_x,
        weighting.eps, PREPARE=prepare, WIDE=wide, **_constants(gaussians, weighting), **config,
    )  # fmt: skip
    return out


def _backward(grad: Tensor, gaussians: Gaussians, grid: Grid, weighting: Weighting) -> Gaussians:
    grad, gaussians = grad.contiguous(), _laid_out(gaussians)
    values = gaussians.values
    if weighting.normalize:
        grad = _forward(gaussians, grid, weighting, grad=grad)
    b, k, c, held, w = values.shape
    (big_h, big_w), (start, stop), (top, h) = grid
    gradients = gaussians.map(_empty_gradient)
    wide = _wide(h, w, big_h, big_w)
    config = splat_config("backward", values.device, (big_h / h, big_w / w), channels=c, wide=wide)
    launch(
        splat_backward, (triton.cdiv(w, config["CELLS"]) * held * b * k,),
        grad, *_pointers(gaussians), *_pointers(gradients), *_strides(values),
        h, w, big_h, big_w, top, held, start, stop - start,
        WIDE=wide, **_constants(gaussians, weighting), **config,
    )  # fmt: skip
    return gradients


def _empty_gradient(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, dtype=torch.float32)


def forward_at(gaussians: Gaussians, points: Tensor, weighting: Weighting) -> Tensor:
    """`gsr.ops.reference.splat_at`: [B, Q, C] in values' type."""
    parts = split_channels(gaussians, CHANNELS)
    return _join([_forward_at(part, points, weighting) for part in parts], 2)


def backward_at(
    grad: Tensor, gaussians: Gaussians, points: Tensor, weighting: Weighting
) -> Gaussians:
    """Gradients as `backward` gives them, from that of `forward_at`'s result."""
    parts = zip(grad.split(CHANNELS, 2), split_channels(gaussians, CHANNELS), strict=True)
    return join_channels([_backward_at(g, part, points, weighting) for g, part in parts])


def _forward_at(
    gaussians: Gaussians, points: Tensor, weighting: Weighting, *, grad: Tensor | None = None
) -> Tensor:
    gaussians, points, prepare = _laid_out(gaussians), points.contiguous(), grad is not None
    values, queries = gaussians.values, points.shape[1]
    b, _, c, h, w = values.shape
    out = torch.empty(
        b, queries, c + prepare,
        device=values.device, dtype=torch.float32 if prepare else values.dtype,
    )  # fmt: skip
    config = points_config("forward", values.device)
    if queries:
        launch(
            points_forward, (triton.cdiv(queries, config["BLOCK"]) * b,),
            *_pointers(gaussians), points, values if grad is None else grad, out,
            *_strides(values), h, w, queries, weighting.eps,
            PREPARE=prepare, **_constants(gaussians, weighting), **config,
        )  # fmt: skip
    return out


def _backward_at(
    grad: Tensor, gaussians: Gaussians, points: Tensor, weighting: Weighting
) -> Gaussians:
    grad, points = grad.contiguous(), points.contiguous()
    gaussians = _laid_out(gaussians)
    values = gaussians.values
    if weighting.normalize:
        grad = _forward_at(gaussians, points, weighting, grad=grad)
    b, k, _, h, w = values.shape
    order, starts = sort_points(points, h, w)
    gradients = gaussians.map(_empty_gradient)
    config = points_config("backward", values.device)
    launch(
        points_backward, (triton.cdiv(w, config["CELLS"]) * h * b * k,),
        grad, points, order, starts, *_pointers(gaussians), *_pointers(gradients),
        *_strides(values), h, w,
        **_constants(gaussians, weighting), **config,
    )  # fmt: skip
    return gradients


def sort_points(points: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Points [B, Q, 2] by cell: their indices in B Q, and where each of the B h w cells starts.

    The last number is where the last cell stops.
    """
    # Numbers rather than a tensor of them, whose copy from the CPU would make it wait.
    y, x = torch.floor(points + 0.5).unbind(-1)
    y, x = y.clamp(0, h - 1).long(), x.clamp(0, w - 1).long()
    image = torch.arange(points.shape[0], device=points.device)[:, None]
    # Stable, so that the sums over a cell's points always run in the same order.
    cells, order = torch.sort(((image * h + y) * w + x).flatten(), stable=True)
    edges = torch.arange(points.shape[0] * h * w + 1, device=points.device)
    return order, torch.searchsorted(cells, edges)
