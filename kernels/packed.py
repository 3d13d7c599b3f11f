"""The `direct` head at inference: pack its Gaussians once, splat them onto the upsampled image.

Formulas are those of `gsr.ops.reference.direct_gaussians`, `pack` and `splat_packed`. A Gaussian is
two numbers of 128 bits and one of 32, three loads where `splat_forward` takes nine and makes the
conic anew; what leaves is the image itself.
"""

# A checker knows nothing of what a kernel's body means; of the launchers it checks all else:
# pyright: strict, reportMissingTypeStubs=false, reportMissingParameterType=false
# pyright: reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportPrivateUsage=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsr.ops.arguments import Grid, Packed, Weighting

from .configs import pack_config, packed_config
from .splat import _exponent, _place, _program, _start, _wide, launch

NUMBERS = [
    "raw_b", "raw_p", "raw_y", "raw_x", "image", "plane", "lr_b", "lr_c", "h", "w", "big_h",
    "big_w", "top", "row0", "rows", "i0", "lines", "blocks_y", "blocks_x",
]  # fmt: skip
_jit = triton.jit(do_not_specialize=NUMBERS)


# ---- packing ------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _put(pointers, one, two, three, four, mask):
    """Four numbers of each lane, stored as 128 bits."""
    # tl.join puts its second argument last: flattened, [one, two, three, four].
    pairs = tl.join(tl.join(one, three), tl.join(two, four))
    tl.store(pointers, tl.reshape(pairs, [pairs.shape[0], 4]), mask[:, None])


@_jit
def packed_gaussians(
    raw, conic, centre, blue, raw_b, raw_p, raw_y, raw_x, h, w, low, high, reach,
    K: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """[B, 9 K, h, w] of any strides to `Packed`. Program (LR pixels of a row, row, image)."""
    block, row, b = _program(tl.cdiv(w, CELLS), h)
    plane = w.to(tl.int64) * h
    x = block * CELLS + tl.arange(0, CELLS)
    real = x < w
    # A program takes all Gaussians of its pixels, which lie side by side in a channels-last `raw`.
    at = raw + (b * raw_b + row.to(tl.int64) * raw_y) + x.to(tl.int64) * raw_x
    to = b * K * plane + row.to(tl.int64) * w + x
    four = 4 * to[:, None] + tl.arange(0, 4)[None, :]
    step = raw_p.to(tl.int64)
    for k in range(K):
        n = ()
        for p in tl.static_range(9):
            n = n + (tl.load(at + (9 * k + p) * step, real, other=0.0).to(tl.float32),)
        sy, sx = low + (high - low) * tl.sigmoid(n[3]), low + (high - low) * tl.sigmoid(n[4])
        a2, b2, c2 = _exponent(sy, sx, 0.95 * _tanh(n[7]))
        opacity = -tl.log2(1.0 + tl.exp(-n[8]))
        _put(conic + (four + 4 * k * plane), a2, b2, c2, opacity, real)
        oy, ox = reach * _tanh(n[5]), reach * _tanh(n[6])
        _put(centre + (four + 4 * k * plane), oy, ox, n[0], n[1], real)
        tl.store(blue + (to + k * plane), n[2], real)


# ---- splatting ----------------------------------------------------------------------------------


@triton.jit
def _take(pointers):
    """Four numbers of each lane, [cells] each, by one load of 128 bits."""
    quad = tl.load(pointers)
    odd, even = tl.split(tl.reshape(quad, [quad.shape[0], 2, 2]))
    one, three = tl.split(odd)
    two, four = tl.split(even)
    return one, two, three, four


@triton.jit
def _cubic(t):
    """Keys' cubic, a = -0.75, at distances t >= 0 (see `gsr.ops.resize.cubic`)."""
    near = (1.25 * t - 2.25) * t * t + 1.0
    far = ((-0.75 * t + 3.75) * t - 6.0) * t + 3.0
    return tl.where(t <= 1.0, near, tl.where(t < 2.0, far, 0.0))


@triton.jit
def _render(
    conic, centre, blue, lr, out, b, i, j, y_start, y_stop, x_start, x_stop,
    image, plane, lr_b, lr_c, h, w, big_h, big_w, top, row0, rows, eps,
    K: tl.constexpr, R: tl.constexpr, NORMALIZE: tl.constexpr, LEVELS: tl.constexpr,
    PY: tl.constexpr, PX: tl.constexpr,
):  # fmt: skip
    """PY x PX pixels of the cells (i, j [cells]), up to y_stop and x_stop."""
    last = (w - 1).to(tl.int32)
    # The interpreter cannot combine scalar masks with blocks.
    zeros = tl.zeros_like(j).to(h.dtype)
    fy, fx = (), ()
    for py in tl.static_range(PY):
        fy = fy + (_place((y_start + py).to(h.dtype), i, h, big_h),)
    for px in tl.static_range(PX):
        fx = fx + (_place((x_start + px).to(w.dtype), j.to(w.dtype), w, big_w),)

    total, acc = (), ()  # of each pixel, and of each pixel and channel
    for _ in tl.static_range(PY * PX):
        total = total + (tl.zeros_like(fx[0]),)
    for _ in tl.static_range(PY * PX * 3):
        acc = acc + (tl.zeros_like(fx[0]),)
    for n in range((2 * R + 1) * (2 * R + 1)):
        di, dj = n // (2 * R + 1) - R, n % (2 * R + 1) - R
        ii, jj = i + di, j + dj
        # Off the image another Gaussian is read, one that is there, and has no weight.
        exists = (zeros + ii >= 0) & (zeros + ii < h) & (jj >= 0) & (jj <= last)
        hidden = tl.where(exists, 0.0, -float("inf"))
        ii, jj = tl.minimum(tl.maximum(ii, 0), h - 1) - top, tl.minimum(tl.maximum(jj, 0), last)
        at = b * image + ii.to(tl.int64) * w + jj
        four = 4 * at[:, None] + tl.arange(0, 4)[None, :]
        conic_at, centre_at, blue_at = conic + four, centre + four, blue + at
        ey, ex = (), ()
        for py in tl.static_range(PY):
            ey = ey + (fy[py] - di,)
        for px in tl.static_range(PX):
            ex = ex + (fx[px] - dj,)
        for _k in range(K):
            a2, b2, c2, opacity = _take(conic_at)
            oy, ox, red, green = _take(centre_at)
            v = red, green, tl.load(blue_at)
            opacity += hidden
            conic_at += 4 * plane
            centre_at += 4 * plane
            blue_at += plane
            totals, sums = (), ()
            for p in tl.static_range(PY * PX):
                dy, dx = ey[p // PX] - oy, ex[p % PX] - ox
                # What holds dy alone stands apart: the pixels of a row share it.
                weight = tl.exp2(dx * (b2 * dy + c2 * dx) + (a2 * dy * dy + opacity))
                totals = totals + (total[p] + weight,)
                for c in tl.static_range(3):
                    sums = sums + (acc[p * 3 + c] + weight * v[c],)
            total, acc = totals, sums
    if NORMALIZE:
        sums = ()
        for p in tl.static_range(PY * PX):
            share = 1.0 / (total[p] + eps)
            for c in tl.static_range(3):
                sums = sums + (acc[p * 3 + c] * share,)
        acc = sums

    # The bicubic image: 5 x 5 LR pixels, of which the pixels left and right of (above and below)
    # the cell's centre use 4. Across first, then down, as `gsr.ops.resize.bicubic` of rows.
    taps = ()
    for px in tl.static_range(PX):
        for t in tl.static_range(5):
            taps = taps + (_cubic(tl.abs(fx[px] - (t - 2))),)
    for di in range(-2, 3):
        ii = tl.minimum(tl.maximum(i + di, 0), h - 1) - top
        row = lr + (b * lr_b + ii.to(tl.int64) * w)
        across = ()
        for c in tl.static_range(3):
            near = ()
            for t in tl.static_range(5):
                jj = tl.minimum(tl.maximum(j + (t - 2), 0), last)
                near = near + (tl.load(row + c * lr_c.to(tl.int64) + jj),)
            for px in tl.static_range(PX):
                colour = near[0] * taps[px * 5]
                for t in tl.static_range(1, 5):
                    colour += near[t] * taps[px * 5 + t]
                across = across + (colour,)
        sums = ()
        for p in tl.static_range(PY * PX):
            down = _cubic(tl.abs(fy[p // PX] - di))
            for c in tl.static_range(3):
                sums = sums + (acc[p * 3 + c] + down * across[c * PX + p % PX],)
        acc = sums

    size = big_w.to(tl.int64) * rows
    step: tl.constexpr = 3 if LEVELS else 1  # from pixel to pixel; from channel to channel:
    channel = 1 if LEVELS else size
    at = out + (3 * b * size + (y_start - row0).to(tl.int64) * big_w * step) + x_start * step
    for py in tl.static_range(PY):
        y = zeros + (y_start + py)
        inside = (j <= last) & (y >= row0) & (y < y_stop)
        for c in tl.static_range(3):
            line = at + (py * big_w.to(tl.int64) * step + c * channel)
            for px in tl.static_range(PX):
                value = acc[(py * PX + px) * 3 + c]
                if LEVELS:
                    # Beyond 2^23 a float32 holds whole numbers, rounded to even, in its low bits.
                    value = tl.minimum(tl.maximum(value, 0.0), 1.0) * 255.0 + 8388608.0
                    value = value.to(tl.int32, bitcast=True).to(tl.uint8)
                tl.store(line + px * step, value, inside & (x_start + px < x_stop))


@_jit
def packed_splat(
    conic, centre, blue, lr, out, image, plane, lr_b, lr_c,
    h, w, big_h, big_w, top, row0, rows, i0, lines, blocks_y, blocks_x, eps,
    K: tl.constexpr, R: tl.constexpr, NORMALIZE: tl.constexpr, LEVELS: tl.constexpr,
    WIDE: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, SPLIT: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """float32 [B, 3, rows, W]; with LEVELS uint8 [B, rows, W, 3], clamped.

    As `splat_forward`; `image` and `plane` are the packed tensors' strides of the image and the
    Gaussian, lr_b and lr_c those of `lr`. With SPLIT some blocks have a row less than PY.
    """
    pid, cell, b = _program(tl.cdiv(w, CELLS) * blocks_y * blocks_x, lines)
    if WIDE:
        h, w, big_h, big_w = h.to(tl.int64), w.to(tl.int64), big_h.to(tl.int64), big_w.to(tl.int64)
    i = (i0 + cell).to(h.dtype)
    y_start = _start(i, h, big_h).to(tl.int32) + (pid // blocks_x) % blocks_y * PY
    y_end = _start(i + 1, h, big_h).to(tl.int32)
    y_stop = tl.minimum(y_end, row0 + rows)
    if (y_start >= y_stop) | (y_start + PY <= row0):
        return
    j = pid // (blocks_x * blocks_y) * CELLS + tl.arange(0, CELLS)
    x_start = _start(j.to(w.dtype), w, big_w).to(tl.int32) + pid % blocks_x * PX
    x_stop = _start(j.to(w.dtype) + 1, w, big_w).to(tl.int32)
    plane = plane.to(tl.int64)
    # Code for each of the two heights: at x4.1 a tenth of the cells has 5 rows, the others 4.
    if SPLIT:
        if y_start + PY > y_end:
            _render(
                conic, centre, blue, lr, out, b, i, j, y_start, y_stop, x_start, x_stop,
                image, plane, lr_b, lr_c, h, w, big_h, big_w, top, row0, rows, eps,
                K, R, NORMALIZE, LEVELS, PY - 1, PX,
            )  # fmt: skip
            return
    _render(
        conic, centre, blue, lr, out, b, i, j, y_start, y_stop, x_start, x_stop,
        image, plane, lr_b, lr_c, h, w, big_h, big_w, top, row0, rows, eps,
        K, R, NORMALIZE, LEVELS, PY, PX,
    )  # fmt: skip


# ---- launchers ----------------------------------------------------------------------------------


def pack(raw: Tensor, gaussians: int, sigma: tuple[float, float], reach: float) -> Packed:
    """`gsr.ops.reference.pack` of its `direct_gaussians`."""
    b, _, h, w = raw.shape
    conic, centre, blue = (
        torch.empty(b, gaussians, h, n * w, device=raw.device) for n in (4, 4, 1)
    )
    config = pack_config(raw.device)
    launch(
        packed_gaussians, (triton.cdiv(w, config["CELLS"]) * h * b,),
        raw, conic, centre, blue, *raw.stride(), h, w, *sigma, reach, K=gaussians, **config,
    )  # fmt: skip
    return Packed(conic.view(torch.complex128), centre.view(torch.complex128), blue)


def splat(
    packed: Packed, lr: Tensor, grid: Grid, weighting: Weighting, levels: bool = False
) -> Tensor:
    """`gsr.ops.reference.splat_packed`."""
    b, k, _, w = packed.blue.shape
    (big_h, big_w), (start, stop), (top, h) = grid
    packed, lr = _laid_out(packed), lr.contiguous()
    shape = (b, stop - start, big_w, 3) if levels else (b, 3, stop - start, big_w)
    out = torch.empty(*shape, device=lr.device, dtype=torch.uint8 if levels else torch.float32)
    i0, i1 = ((2 * y + 1) * h // (2 * big_h) for y in (start, stop - 1))
    lines = i1 + 1 - i0
    config = packed_config(lr.device, (big_h / h, big_w / w), cells=(lines * b, w))
    blocks_y = triton.cdiv(triton.cdiv(big_h, h), config["PY"])
    blocks_x = triton.cdiv(triton.cdiv(big_w, w), config["PX"])
    across = triton.cdiv(w, config["CELLS"]) * blocks_y * blocks_x
    conic, centre = packed.conic.view(torch.float32), packed.centre.view(torch.float32)
    launch(
        packed_splat, (across * lines * b,),
        conic, centre, packed.blue, lr, out, *packed.blue.stride()[:2], *lr.stride()[:2],
        h, w, big_h, big_w, top, start, stop - start, i0, lines, blocks_y, blocks_x, weighting.eps,
        K=k, R=weighting.radius, NORMALIZE=weighting.normalize, LEVELS=levels,
        WIDE=_wide(h, w, big_h, big_w), **config,
    )  # fmt: skip
    return out


def _laid_out(packed: Packed) -> Packed:
    """As the kernel reads them: rows of rows, of one stride for all three."""
    same = all(t.stride() == packed.blue.stride() for t in packed)
    rows = packed.blue.stride()[2:] == (packed.blue.shape[3], 1)
    return packed if same and rows else Packed(*(t.contiguous() for t in packed))
