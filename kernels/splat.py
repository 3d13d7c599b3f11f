"""Splat: the Gaussians of the LR pixels nearest to each HR pixel, weighted, summed, divided.

Formula, shapes and units are those of `gsr.ops.reference.splat_at` (GaussianSR, section 3):

    w_i = opacity_i exp(-q_i / 2),   out = sum_i w_i v_i  [ / (sum_i w_i + eps) ]

over the K Gaussians of each of the (2 r + 1)^2 LR pixels around the nearest one.

**Cells.** The HR pixels whose nearest LR pixel is the same, its cell, share all of their Gaussians.
In the grid kernels a thread therefore owns a cell: tensors are [.., pixels, cells] with the cells
along the last axis, which Triton spreads over the lanes, and the pixels of a cell in a thread's
registers. A Gaussian is loaded once and used for PY x PX pixels, and neighbouring lanes load
neighbouring LR pixels. Cell i holds the HR rows Y with floor((2 Y + 1) h / 2 H) = i; positions in
it come from the integers (2 Y + 1) h - (2 i + 1) H, so no image is too large for float32.

**Backward.** With W = sum w + eps, g' = g / W and s = sum_c g'_c out_c, the gradient of a weight is
sum_c g'_c v_c - s. A first pass recomputes W and out and writes g' and s at HR. In a second one a
thread owns an LR pixel and gathers from the HR pixels of the cells around it: no atomics, one
writer per gradient, the same bits every time. What it sums are the moments of dL/dq (dy, dx, dy^2,
...), from which the gradients of sigma, rho and offset follow at the end.

**Points.** A thread of `forward_at` owns a point. For `backward_at` the points are sorted by cell,
so that an LR pixel finds those around it in (2 r + 1)^2 short runs.

Geometry and sums are float32 whatever the storage type; offsets into tensors are int64.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from gsr.kernels.configs import points_config, splat_config
from torch import Tensor

# An argument that is 1 would become a Python number, which the kernels cannot widen to 64 bits.
SIZES = ["h", "w", "big_h", "big_w"]
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
def _first(i, n, n_hr):
    """First of n_hr HR indices in cell i of n: the least Y with (2 Y + 1) n >= 2 n_hr i."""
    return (tl.maximum(2 * n_hr * i - n, 0) + 2 * n - 1) // (2 * n)


@triton.jit
def _place(y, i, n, n_hr):
    """Position of HR index y relative to LR index i, LR pixels, float32."""
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
def _falloff(a, b, c, dy, dx):
    """exp(-q / 2), by the hardware's base 2: the factor is -log2(e) / 2."""
    return tl.exp2(-0.7213475204444817 * (dy * (a * dy + b * dx) + c * dx * dx))


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


@triton.jit(do_not_specialize=SIZES)
def splat_forward(
    values, sigma, rho, opacity, offset, grad, out,
    h, w, big_h, big_w, top, held, row0, rows, i0, lines, blocks_y, blocks_x, eps,
    K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_OFFSET: tl.constexpr, PREPARE: tl.constexpr,
    WIDE: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """out [B, C, rows, W]; with PREPARE g' and s, [B, C + 1, rows, W], for the backward pass.

    The Gaussians' tensors hold LR rows top ... top + held - 1 of h; `rows` HR rows from row0 on are
    wanted. Program (cells of a row x PY x PX pixels of each, of `lines` rows, image).
    """
    pid, cell, b = _program(tl.cdiv(w, CELLS) * blocks_y * blocks_x, lines)
    if WIDE:
        h, w, big_h, big_w = h.to(tl.int64), w.to(tl.int64), big_h.to(tl.int64), big_w.to(tl.int64)
    i = (i0 + cell).to(h.dtype)
    plane, size = w.to(tl.int64) * held, big_w.to(tl.int64) * rows
    j = pid // (blocks_x * blocks_y) * CELLS + tl.arange(0, CELLS)
    wide = j.to(w.dtype)
    pixel = tl.arange(0, PY * PX)
    y = _first(i, h, big_h) + (pid // blocks_x) % blocks_y * PY + pixel // PX  # [pixels]
    x = _first(wide, w, big_w)[None, :] + (pid % blocks_x * PX + pixel % PX)[:, None]
    inside = (y < _first(i + 1, h, big_h)) & (y >= row0) & (y < row0 + rows)
    inside = inside[:, None] & (x < _first(wide + 1, w, big_w)[None, :]) & (j < w)[None, :]
    fy = _place(y, i, h, big_h)[:, None]
    fx = _place(x, wide[None, :], w, big_w)
    x = x.to(tl.int32)

    channel = tl.arange(0, CP)
    zeros = tl.zeros([CELLS], h.dtype)  # the interpreter cannot combine scalar masks with blocks
    total = tl.zeros([PY * PX, CELLS], tl.float32)
    acc = tl.zeros([CP, PY * PX, CELLS], tl.float32)
    for n in range((2 * R + 1) * (2 * R + 1)):
        di, dj = n // (2 * R + 1) - R, n % (2 * R + 1) - R
        ii, jj = zeros + i + di, j + dj
        exists = (ii >= 0) & (ii < h) & (jj >= 0) & (jj < w)
        row = (i + di - top).to(tl.int64) * w
        for k in range(K):
            g = b * K + k
            sy, sx, r, alpha, oy, ox = _gaussian(
                sigma, rho, opacity, offset, g, plane, row, jj, exists, HAS_OFFSET
            )
            ca, cb, cc = _conic(sy, sx, r)
            v = tl.load(
                values + ((g * C + channel) * plane + row)[:, None] + jj[None, :],
                exists[None, :] & (channel < C)[:, None],
                other=0.0,
            ).to(tl.float32)
            dy, dx = fy - (oy + di)[None, :], fx - (ox + dj)[None, :]
            weight = alpha[None, :] * _falloff(ca[None, :], cb[None, :], cc[None, :], dy, dx)
            total += weight
            acc += weight[None, :, :] * v[:, None, :]

    line = (y - row0).to(tl.int64) * big_w
    mask = inside[None, :, :] & (channel < C)[:, None, None]
    if NORMALIZE:
        share = 1.0 / (total + eps)
        acc = acc * share[None, :, :]
    if PREPARE:
        place = ((b * C + channel)[:, None] * size + line[None, :])[:, :, None] + x[None, :, :]
        scaled = tl.load(grad + place, mask, other=0.0).to(tl.float32) * share[None, :, :]
        s = tl.sum(scaled * acc, axis=0)
        first = b * (C + 1)
        place = ((first + channel)[:, None] * size + line[None, :])[:, :, None] + x[None, :, :]
        tl.store(out + place, scaled, mask)
        tl.store(out + ((first + C) * size + line)[:, None] + x, s, inside)
    else:
        place = ((b * C + channel)[:, None] * size + line[None, :])[:, :, None] + x[None, :, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=SIZES)
def splat_backward(
    grad, values, sigma, rho, opacity, offset, d_values, d_sigma, d_rho, d_opacity, d_offset,
    h, w, big_h, big_w, top, held, row0, rows, max_x,
    K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_OFFSET: tl.constexpr,
    WIDE: tl.constexpr, PX: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Gradients of the Gaussians, each summed by the thread that owns its LR pixel.

    `grad` is g' and s, [B, C + 1, rows, W], from PREPARE; without NORMALIZE it is dL/dout itself.
    Program (LR pixels of a row, row, image and k).
    """
    block, held_row, g = _program(tl.cdiv(w, CELLS), held)
    if WIDE:
        h, w, big_h, big_w = h.to(tl.int64), w.to(tl.int64), big_h.to(tl.int64), big_w.to(tl.int64)
    plane, row = w.to(tl.int64) * held, held_row.to(tl.int64) * w
    i = (top + held_row).to(h.dtype)
    planes: tl.constexpr = C + 1 if NORMALIZE else C
    j = block * CELLS + tl.arange(0, CELLS)
    wide = j.to(w.dtype)
    own = j < w
    channel, pixel = tl.arange(0, CP), tl.arange(0, PX)
    sy, sx, r, alpha, oy, ox = _gaussian(
        sigma, rho, opacity, offset, g, plane, row, j, own, HAS_OFFSET
    )
    ca, cb, cc = _conic(sy, sx, r)
    v_mask = own[None, :] & (channel < C)[:, None]
    v_at = ((g * C + channel) * plane + row)[:, None] + j[None, :]
    v = tl.load(values + v_at, v_mask, other=0.0).to(tl.float32)

    dv = tl.zeros([CP, CELLS], tl.float32)
    d_alpha = tl.zeros([CELLS], tl.float32)
    myy, myx, mxx = tl.zeros_like(d_alpha), tl.zeros_like(d_alpha), tl.zeros_like(d_alpha)
    my, mx = tl.zeros_like(d_alpha), tl.zeros_like(d_alpha)
    y0 = tl.maximum(_first(tl.maximum(i - R, 0), h, big_h), row0)
    y1 = tl.minimum(_first(tl.minimum(i + R + 1, h), h, big_h), row0 + rows)
    for y in range(y0, y1):
        dy = _place(y, i, h, big_h) - oy
        line = ((g // K * planes + channel) * rows + (y - row0)) * big_w
        for dj in range(-R, R + 1):
            jj = wide + dj
            exists = (jj >= 0) & (jj < w)
            x0, x1 = _first(jj, w, big_w), _first(jj + 1, w, big_w)
            for cx in range(0, max_x, PX):
                x = x0[None, :] + (cx + pixel)[:, None]
                inside = (x < x1[None, :]) & exists[None, :]
                dx = _place(x, wide[None, :], w, big_w) - ox[None, :]
                x = x.to(tl.int32)
                scaled = tl.load(
                    grad + line[:, None, None] + x[None, :, :],
                    inside[None, :, :] & (channel < C)[:, None, None],
                    other=0.0,
                ).to(tl.float32)
                d_weight = tl.sum(scaled * v[:, None, :], axis=0)
                if NORMALIZE:
                    last = ((g // K * planes + C) * rows + (y - row0)) * big_w
                    d_weight -= tl.load(grad + last + x, inside, other=0.0)
                e = _falloff(ca[None, :], cb[None, :], cc[None, :], dy[None, :], dx)
                weight = alpha[None, :] * e
                dv += tl.sum(scaled * weight[None, :, :], axis=1)
                d_alpha += tl.sum(e * d_weight, axis=0)
                dq = -0.5 * weight * d_weight
                sum_q = tl.sum(dq, axis=0)
                sum_x = tl.sum(dq * dx, axis=0)
                myy += sum_q * dy * dy
                my += sum_q * dy
                myx += sum_x * dy
                mx += sum_x
                mxx += tl.sum(dq * dx * dx, axis=0)

    tl.store(d_values + v_at, dv, v_mask)
    _write_gradients(
        d_sigma, d_rho, d_opacity, d_offset, g, plane, row, j, own,
        sy, sx, r, d_alpha, myy, myx, mxx, my, mx, HAS_OFFSET,
    )  # fmt: skip


# ---- points -------------------------------------------------------------------------------------


@triton.jit
def _nearest(p, n):
    """LR index nearest to coordinate p, within the image, in p's type."""
    return tl.minimum(tl.maximum(tl.floor(p + 0.5), 0.0), (n - 1).to(p.dtype))


@triton.jit(do_not_specialize=SIZES[:2])
def points_forward(
    values, sigma, rho, opacity, offset, points, grad, out,
    h, w, queries, eps,
    K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_OFFSET: tl.constexpr, PREPARE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, Q, C]; with PREPARE g' and s, [B, Q, C + 1]. Program (points, image)."""
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

    channel = tl.arange(0, CP)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([CP, BLOCK], tl.float32)
    for n in range((2 * R + 1) * (2 * R + 1)):
        di, dj = n // (2 * R + 1) - R, n % (2 * R + 1) - R
        exists = (i + di >= 0) & (i + di < h) & (j + dj >= 0) & (j + dj < w) & real
        at = (i + di) * w + j + dj
        for k in range(K):
            g = b * K + k
            sy, sx, r, alpha, oy, ox = _gaussian(
                sigma, rho, opacity, offset, g, plane, 0, at, exists, HAS_OFFSET
            )
            ca, cb, cc = _conic(sy, sx, r)
            v = tl.load(
                values + (g * C + channel[:, None]) * plane + at[None, :],
                exists[None, :] & (channel < C)[:, None],
                other=0.0,
            ).to(tl.float32)
            weight = alpha * _falloff(ca, cb, cc, fy - (oy + di), fx - (ox + dj))
            total += weight
            acc += weight[None, :] * v

    mask = real[None, :] & (channel < C)[:, None]
    if NORMALIZE:
        share = 1.0 / (total + eps)
        acc = acc * share[None, :]
    place = (b * queries + q)[None, :] * C + channel[:, None]
    if PREPARE:
        scaled = tl.load(grad + place, mask, other=0.0).to(tl.float32) * share[None, :]
        s = tl.sum(scaled * acc, axis=0)
        place = (b * queries + q) * (C + 1)
        tl.store(out + place[None, :] + channel[:, None], scaled, mask)
        tl.store(out + place + C, s, real)
    else:
        tl.store(out + place, acc.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=SIZES[:2])
def points_backward(
    grad, points, order, start,
    values, sigma, rho, opacity, offset, d_values, d_sigma, d_rho, d_opacity, d_offset,
    h, w,
    K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_OFFSET: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """As `splat_backward`; the points of cell n of all images are order[start[n]:start[n + 1]].

    `grad` is [B Q, C + 1] from PREPARE, or [B Q, C] without NORMALIZE; `points` [B Q, 2].
    """
    block, i, g = _program(tl.cdiv(w, CELLS), h)
    i, b = i.to(tl.int64), g // K
    h, w = h.to(tl.int64), w.to(tl.int64)
    plane = h * w
    planes: tl.constexpr = C + 1 if NORMALIZE else C
    j = block.to(tl.int64) * CELLS + tl.arange(0, CELLS)
    own, row = j < w, i * w
    channel = tl.arange(0, CP)
    sy, sx, r, alpha, oy, ox = _gaussian(
        sigma, rho, opacity, offset, g, plane, row, j, own, HAS_OFFSET
    )
    ca, cb, cc = _conic(sy, sx, r)
    v_mask = own[None, :] & (channel < C)[:, None]
    v_at = ((g * C + channel) * plane + row)[:, None] + j[None, :]
    v = tl.load(values + v_at, v_mask, other=0.0).to(tl.float32)

    zeros = tl.zeros([CELLS], tl.int64)  # see splat_forward
    dv = tl.zeros([CP, CELLS], tl.float32)
    d_alpha = tl.zeros([CELLS], tl.float32)
    myy, myx, mxx = tl.zeros_like(d_alpha), tl.zeros_like(d_alpha), tl.zeros_like(d_alpha)
    my, mx = tl.zeros_like(d_alpha), tl.zeros_like(d_alpha)
    for n in range((2 * R + 1) * (2 * R + 1)):
        di, dj = n // (2 * R + 1) - R, n % (2 * R + 1) - R
        ii, jj = zeros + i + di, j + dj
        exists = (ii >= 0) & (ii < h) & (jj >= 0) & (jj < w)
        cell = b * plane + ii * w + jj
        begin = tl.load(start + cell, exists, other=0)
        end = tl.load(start + cell + 1, exists, other=0)
        for t in range(tl.max(end - begin, axis=0)):
            real = begin + t < end
            q = tl.load(order + begin + t, real, other=0)
            y = tl.load(points + 2 * q, real, other=0.0)
            x = tl.load(points + 2 * q + 1, real, other=0.0)
            scaled = tl.load(
                grad + q[None, :] * planes + channel[:, None],
                real[None, :] & (channel < C)[:, None],
                other=0.0,
            ).to(tl.float32)
            d_weight = tl.sum(scaled * v, axis=0)
            if NORMALIZE:
                d_weight -= tl.load(grad + q * planes + C, real, other=0.0)
            dy = (y - ii.to(y.dtype)).to(tl.float32) + di - oy
            dx = (x - jj.to(x.dtype)).to(tl.float32) + dj - ox
            e = tl.where(real, _falloff(ca, cb, cc, dy, dx), 0.0)
            weight = alpha * e
            dv += scaled * weight[None, :]
            d_alpha += e * d_weight
            dq = -0.5 * weight * d_weight
            myy += dq * dy * dy
            myx += dq * dy * dx
            mxx += dq * dx * dx
            my += dq * dy
            mx += dq * dx

    tl.store(d_values + v_at, dv, v_mask)
    _write_gradients(
        d_sigma, d_rho, d_opacity, d_offset, g, plane, row, j, own,
        sy, sx, r, d_alpha, myy, myx, mxx, my, mx, HAS_OFFSET,
    )  # fmt: skip


# ---- launchers ----------------------------------------------------------------------------------


def on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _wide(h: int, w: int, big_h: int, big_w: int) -> bool:
    """Whether positions need 64 bits, whose divisions cost several times those of 32.

    They come from products up to 2 n n_hr, with indices a block or a window beyond the image.
    """
    return 2 * max((h + 512) * (big_h + 512), (w + 512) * (big_w + 512)) >= 2**31


def _forward(
    values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band=None, grad=None
):
    values, sigma, rho, opacity = (t.contiguous() for t in (values, sigma, rho, opacity))
    offset = None if offset is None else offset.contiguous()
    b, k, c, held, w = values.shape
    top, h = band or (0, held)
    (first, last), (big_h, big_w) = rows, size
    prepare = grad is not None
    out = torch.empty(
        b, c + prepare, last - first, big_w,
        device=values.device, dtype=torch.float32 if prepare else values.dtype,
    )  # fmt: skip
    # Cells of the first and the last row wanted.
    i0, i1 = ((2 * y + 1) * h // (2 * big_h) for y in (first, last - 1))
    kind = "prepare" if prepare else "forward"
    wide = _wide(h, w, big_h, big_w)
    config = splat_config(kind, values.device, h, w, big_h, big_w, c, wide)
    blocks_y = triton.cdiv(triton.cdiv(big_h, h), config["PY"])
    blocks_x = triton.cdiv(triton.cdiv(big_w, w), config["PX"])
    across, lines = triton.cdiv(w, config["CELLS"]) * blocks_y * blocks_x, i1 - i0 + 1
    with on_device(values):
        splat_forward[(across * lines * b,)](
            values, sigma, rho, opacity, values if offset is None else offset,
            grad if prepare else values, out,
            h, w, big_h, big_w, top, held, first, last - first, i0, lines, blocks_y, blocks_x, eps,
            K=k, C=c, CP=triton.next_power_of_2(c), R=radius,
            NORMALIZE=normalize, HAS_OFFSET=offset is not None, PREPARE=prepare,
            WIDE=wide, **config,
        )  # fmt: skip
    return out


def forward(
    values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band=None
) -> Tensor:  # fmt: skip
    """`gsr.ops.reference.splat` of HR rows rows[0] to rows[1]: [B, C, rows, W] in values' type."""
    rest = sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band
    return torch.cat([_forward(part, *rest) for part in values.split(CHANNELS, 2)], 1)


def backward(
    grad, values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band=None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients, float32, of values, sigma, rho, opacity, offset from that of `forward`."""
    rest = sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band
    parts = zip(grad.split(CHANNELS, 1), values.split(CHANNELS, 2), strict=True)
    return _joined([_backward(part, of, *rest) for part, of in parts])


def _joined(parts):
    """Gradients of all channels from those of some: of the weights they are sums."""
    values, *others = zip(*parts, strict=True)
    return torch.cat(values, 2), *(None if t[0] is None else sum(t[1:], t[0]) for t in others)


def _backward(grad, values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band):
    grad, values, sigma, rho, opacity = (
        t.contiguous() for t in (grad, values, sigma, rho, opacity)
    )
    offset = None if offset is None else offset.contiguous()
    if normalize:
        grad = _forward(
            values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band, grad
        )
    b, k, c, held, w = values.shape
    top, h = band or (0, held)
    (first, last), (big_h, big_w) = rows, size
    gradients = _empty_gradients(values, sigma, rho, opacity, offset)
    wide = _wide(h, w, big_h, big_w)
    config = splat_config("backward", values.device, h, w, big_h, big_w, c, wide)
    with on_device(values):
        splat_backward[(triton.cdiv(w, config["CELLS"]) * held * b * k,)](
            grad, values, sigma, rho, opacity, values if offset is None else offset,
            *gradients[:4], values if offset is None else gradients[4],
            h, w, big_h, big_w, top, held, first, last - first, triton.cdiv(big_w, w),
            K=k, C=c, CP=triton.next_power_of_2(c), R=radius, NORMALIZE=normalize,
            HAS_OFFSET=offset is not None, WIDE=wide, **config,
        )  # fmt: skip
    return gradients


def _empty_gradients(values, sigma, rho, opacity, offset):
    return tuple(
        None if t is None else torch.empty_like(t, dtype=torch.float32)
        for t in (values, sigma, rho, opacity, offset)
    )


def _forward_at(values, sigma, rho, opacity, offset, points, radius, normalize, eps, grad=None):
    values, sigma, rho, opacity, points = (
        t.contiguous() for t in (values, sigma, rho, opacity, points)
    )
    offset = None if offset is None else offset.contiguous()
    b, k, c, h, w = values.shape
    queries, prepare = points.shape[1], grad is not None
    out = torch.empty(
        b, queries, c + prepare,
        device=values.device, dtype=torch.float32 if prepare else values.dtype,
    )  # fmt: skip
    config = points_config("forward", values.device)
    if queries:
        with on_device(values):
            points_forward[(triton.cdiv(queries, config["BLOCK"]) * b,)](
                values, sigma, rho, opacity, values if offset is None else offset, points,
                grad if prepare else values, out, h, w, queries, eps,
                K=k, C=c, CP=triton.next_power_of_2(c), R=radius,
                NORMALIZE=normalize, HAS_OFFSET=offset is not None, PREPARE=prepare, **config,
            )  # fmt: skip
    return out


def forward_at(
    values, sigma, rho, opacity, offset, points, radius, normalize, eps
) -> Tensor:  # fmt: skip
    """`gsr.ops.reference.splat_at`: [B, Q, C] in values' type."""
    rest = sigma, rho, opacity, offset, points, radius, normalize, eps
    return torch.cat([_forward_at(part, *rest) for part in values.split(CHANNELS, 2)], 2)


def backward_at(
    grad, values, sigma, rho, opacity, offset, points, radius, normalize, eps
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients as `backward` gives them, from that of `forward_at`'s result."""
    rest = sigma, rho, opacity, offset, points, radius, normalize, eps
    parts = zip(grad.split(CHANNELS, 2), values.split(CHANNELS, 2), strict=True)
    return _joined([_backward_at(part, of, *rest) for part, of in parts])


def _backward_at(grad, values, sigma, rho, opacity, offset, points, radius, normalize, eps):
    grad, values, sigma, rho, opacity, points = (
        t.contiguous() for t in (grad, values, sigma, rho, opacity, points)
    )
    offset = None if offset is None else offset.contiguous()
    if normalize:
        grad = _forward_at(
            values, sigma, rho, opacity, offset, points, radius, normalize, eps, grad
        )
    b, k, c, h, w = values.shape
    order, start = sort_points(points, h, w)
    gradients = _empty_gradients(values, sigma, rho, opacity, offset)
    config = points_config("backward", values.device)
    with on_device(values):
        points_backward[(triton.cdiv(w, config["CELLS"]) * h * b * k,)](
            grad, points, order, start,
            values, sigma, rho, opacity, values if offset is None else offset,
            *gradients[:4], values if offset is None else gradients[4], h, w,
            K=k, C=c, CP=triton.next_power_of_2(c), R=radius,
            NORMALIZE=normalize, HAS_OFFSET=offset is not None, **config,
        )  # fmt: skip
    return gradients


def sort_points(points: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Points [B, Q, 2] by cell: their indices in B Q, and where each of the B h w cells starts."""
    extent = points.new_tensor([h - 1, w - 1])
    y, x = torch.floor(points + 0.5).clamp(torch.zeros_like(extent), extent).long().unbind(-1)
    image = torch.arange(points.shape[0], device=points.device)[:, None]
    # Stable, so that the sums over a cell's points always run in the same order.
    cells, order = torch.sort(((image * h + y) * w + x).flatten(), stable=True)
    edges = torch.arange(points.shape[0] * h * w + 1, device=points.device)
    return order, torch.searchsorted(cells, edges)
