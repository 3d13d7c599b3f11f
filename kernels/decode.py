"""The Fourier decoder of `official`, `field` and `bicubic`: features at HR to colours.

Two kernels for a strip of HR rows. `decode_features` resizes the features, and writes them as the
products want them: channels last, in the type of the products. `decode_colours` does all the rest
for a block of pixels at a time: the 3 x 3 convolutions to amplitudes and frequencies, the waves,
the MLP, and the skip connection. Neither the 512 channels of the waves nor those of the MLP leave
the multiprocessor's caches.

Each step of `decode_colours` is one product of [pixels, k] by [k, n], on tensor cores. A program
owns a block of pixels, and all programs of a GPU together own a few per cent of a strip, so that
each goes through many blocks. Between the steps a block's numbers wait in a part of `scratch` that
is the program's own, and small enough for L2. Weights are read from there too, by blocks of k.
"""

# A checker knows nothing of what a kernel's body means; of the launchers it checks all else:
# pyright: strict, reportMissingTypeStubs=false, reportMissingParameterType=false
# pyright: reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# Some versions of Triton say that a cdiv gives a constexpr, and their functions nothing:
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsr.ops.decode import DecoderWeights, Strip

from .configs import decode_config, decode_programs
from .splat import launch

# As in kernels/splat.py: no compilations for particular numbers.
NUMBERS = """
    h w top held big_h big_w start rows q_start q_rows lines channels narrow layers
""".split()
_jit = triton.jit(do_not_specialize=NUMBERS)
FEATURES = 512  # numbers of a program of `decode_features`

# ---- bicubic resizing ---------------------------------------------------------------------------


@triton.jit
def _position(i, n, n_hr):
    """The pixel of n before HR pixel i of n_hr, and how far behind it, from whole numbers.

    (i + 1 / 2) n / n_hr - 1 / 2, of which float32 would lose digits.
    """
    twice = 2 * n_hr.to(tl.int64)
    over = (2 * i.to(tl.int64) + 1) * n - n_hr + twice  # a pixel more: no sign
    before = over // twice
    return (before - 1).to(tl.int32), (over - before * twice).to(tl.float32) / twice.to(tl.float32)


@triton.jit
def _cubic(t, TAP: tl.constexpr):
    """Keys' weight, a = -0.75, of the pixel TAP - 1 behind the one before, at t in [0, 1)."""
    if TAP == 0 or TAP == 3:
        d = t + 1.0 if TAP == 0 else 2.0 - t
        return ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    else:
        d = t if TAP == 1 else 1.0 - t
        return (1.25 * d - 2.25) * d * d + 1.0


@_jit
def decode_features(
    features, splatted, lr, q, out, h, w, top, held, big_h, big_w, q_start, q_rows, start, rows,
    channels, narrow, CP: tl.constexpr, PIXELS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Features at HR, channels last, and the LR image at HR, with SKIP, or 1/2.

    Program (block of columns, row of q, image).

    Args:
        features: [B, held, w, channels], LR rows from `top` on.
        splatted: [B, narrow, q_rows, W], what the first channels are instead.
        lr: [B, 3, held, w].
        q: [B, q_rows, W, CP], the result, HR rows from `q_start` on.
        out: [B, 3, rows, W], HR rows from `start` on.
    """
    blocks = tl.cdiv(big_w, PIXELS)
    pid = tl.program_id(0)
    line = (pid // blocks).to(tl.int64)
    b, row = line // q_rows, (line % q_rows).to(tl.int32)
    x = pid % blocks * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, CP)
    i, ty = _position(row + q_start, h, big_h)
    j, tx = _position(x, w, big_w)
    real = (x < big_w)[:, None]
    mine = real & (c < channels)[None, :]
    wide = mine & (c >= narrow)[None, :]
    value = tl.zeros([PIXELS, CP], tl.float32)
    red = tl.full([PIXELS], 0.0 if SKIP else 0.5, tl.float32)
    green, blue = red, red
    size = held.to(tl.int64) * w
    for across in tl.static_range(4):
        column = tl.minimum(tl.maximum(j + (across - 1), 0), w - 1)
        tall = tl.zeros([PIXELS, CP], tl.float32)
        for down in tl.static_range(4):
            ii = tl.minimum(tl.maximum(i + (down - 1), 0), h - 1) - top
            at = ((b * held + ii) * w + column) * channels
            loaded = tl.load(features + at[:, None] + c[None, :], wide, other=0.0)
            tall += _cubic(ty, down) * loaded.to(tl.float32)
            if SKIP:
                weight = _cubic(ty, down) * _cubic(tx, across)
                at = lr + (b * 3 * held + ii) * w + column
                red += weight * tl.load(at, x < big_w, other=0.0)
                green += weight * tl.load(at + size, x < big_w, other=0.0)
                blue += weight * tl.load(at + 2 * size, x < big_w, other=0.0)
        value += _cubic(tx, across)[:, None] * tall
    at = ((b * narrow + c.to(tl.int64)) * q_rows + row) * big_w
    taken = mine & (c < narrow)[None, :]
    value += tl.load(splatted + at[None, :] + x[:, None], taken, other=0.0).to(tl.float32)
    at = (line * big_w + x) * CP
    tl.store(q + at[:, None] + c[None, :], value.to(q.dtype.element_ty), real)
    size = rows.to(tl.int64) * big_w
    y = tl.full([PIXELS], 0, tl.int32) + (row + q_start - start)
    at = out + b * 3 * size + y.to(tl.int64) * big_w + x
    taken = (x < big_w) & (y >= 0) & (y < rows)
    tl.store(at, red, taken)
    tl.store(at + size, green, taken)
    tl.store(at + 2 * size, blue, taken)


# ---- colours ------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # Triton's interpreter multiplies bfloat16 wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _sin_cos(t):
    """sin(pi t) and cos(pi t): half turns are taken off t without rounding.

    Polynomials as in gsr/models/heads/decode_cpu.py, errors below 1.4e-7.
    """
    n = tl.floor(t + 0.5)
    r = t - n
    odd = n - 2.0 * tl.floor(n * 0.5)
    sign = 1.0 - 2.0 * odd
    u = r * r
    sin = (((0.07643289 * u - 0.5976252) * u + 2.5499578) * u - 5.167702) * u + 3.1415925
    cos = -0.023963654 * u + 0.23468372
    cos = (((cos * u - 1.3351616) * u + 4.0587053) * u - 4.934802) * u + 1.0
    return sign * r * sin, sign * cos


@triton.jit
def _gelu(x, EXACT: tl.constexpr):
    """x times the normal distribution's probability below x."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        # A polynomial in x^2, off by 1.7e-4 at most (a minimax fit that is 0 and 1 beyond 3.95): a
        # third of the instructions of erf, of which a pixel takes a thousand.
        z = tl.minimum(tl.maximum(x, -3.95), 3.95)
        u = z * z
        f = (2.44358146e-08 * u - 1.68115419e-06) * u + 4.95519704e-05
        f = ((f * u - 8.29039607e-04) * u + 8.84291874e-03) * u - 6.47227484e-02
        return x * (z * (f * u + 0.39798669) + 0.5)


@_jit
def decode_colours(
    q, conv, conv_bias, phase, weights, biases, last, last_bias, ry, rx, scratch, out,
    big_h, big_w, q_start, q_rows, start, rows, lines, layers,
    CP: tl.constexpr, HALF: tl.constexpr, PIXELS: tl.constexpr,
    WAVES: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Colours of HR rows [start, start + rows) of B images, lines = B rows: out [B, 3, rows, W].

    Program (one of so many, which share the blocks of PIXELS pixels).

    Args:
        q: [B, q_rows, W, CP], rows from `q_start` on.
        conv: [9, 4, HALF, CP], for each tap of 3 x 3 what makes the amplitudes of cosines and
            sines, and the frequencies of y and x; conv_bias [4, HALF]; phase [HALF].
        weights: [layers, 2 HALF, 2 HALF], (out, in); biases [layers, 2 HALF].
        last: [3, 2 HALF]; last_bias [3].
        ry, rx: [H] and [W], positions relative to the nearest LR pixel.
        scratch: [programs, 2, PIXELS, 2 HALF].
        out: what `decode_features` has left there, to which the colours less 1/2 are added.
    """
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    WIDTH: tl.constexpr = 2 * HALF
    p, depth = tl.arange(0, PIXELS), tl.arange(0, DEPTH)
    n, unit = tl.arange(0, WAVES), tl.arange(0, UNITS)
    own = scratch + tl.program_id(0).to(tl.int64) * (2 * PIXELS * WIDTH)
    place = (p * WIDTH)[:, None]
    blocks = tl.cdiv(lines.to(tl.int64) * big_w, PIXELS)
    for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        # Where the pixels are. Blocks go on from row to row and from image to image.
        line0 = (block * PIXELS // big_w).to(tl.int32)
        x0 = (block * PIXELS % big_w).to(tl.int32)
        line, x = line0 + (x0 + p) // big_w, (x0 + p) % big_w
        b, b0, row, real = line // rows, line0 // rows, line % rows, line < lines
        y = tl.where(real, start + row, -4)  # whose neighbours are outside as well
        # 64 bits up to the first pixel. From there on 32 are enough: (3 PIXELS + 4 W) CP at most,
        # since with each image no more than two rows of q are left out.
        q0 = q + ((b0.to(tl.int64) * q_rows + line0 % rows + start - q_start) * big_w + x0) * CP
        away = ((line - line0 + (b - b0) * (q_rows - rows)) * big_w + x - x0) * CP

        # Amplitudes, frequencies and waves, for WAVES phases at a time.
        tl.debug_barrier()  # before the last layer's source is written over
        for low in range(0, HALF, WAVES):
            a_cos = tl.zeros([PIXELS, WAVES], tl.float32)
            a_sin = tl.zeros([PIXELS, WAVES], tl.float32)
            f_y = tl.zeros([PIXELS, WAVES], tl.float32)
            f_x = tl.zeros([PIXELS, WAVES], tl.float32)
            for k in tl.range(0, 9 * (CP // DEPTH), num_stages=STAGES):
                tap, c = k // (CP // DEPTH), k % (CP // DEPTH) * DEPTH + depth
                dy, dx = tap // 3 - 1, tap % 3 - 1
                inside = (y + dy >= 0) & (y + dy < big_h) & (x + dx >= 0) & (x + dx < big_w)
                near = away + (dy * big_w + dx) * CP
                a = tl.load(q0 + (near[:, None] + c[None, :]), inside[:, None], other=0.0)
                part = conv + ((tap * 4 * HALF + low + n)[None, :] * CP + c[:, None])
                a_cos = _dot(a, tl.load(part), a_cos, PRECISION, WIDEN)
                a_sin = _dot(a, tl.load(part + HALF * CP), a_sin, PRECISION, WIDEN)
                f_y = _dot(a, tl.load(part + 2 * HALF * CP), f_y, PRECISION, WIDEN)
                f_x = _dot(a, tl.load(part + 3 * HALF * CP), f_x, PRECISION, WIDEN)
            bias = conv_bias + low + n
            f_y += tl.load(bias + 2 * HALF)[None, :]
            f_x += tl.load(bias + 3 * HALF)[None, :]
            # Masked, though without need: else LLVM loads it early, and lacks the registers.
            py = tl.load(ry + y, real, other=0.0)[:, None]
            px = tl.load(rx + x, real, other=0.0)[:, None]
            sin, cos = _sin_cos(f_y * py + f_x * px + tl.load(phase + low + n)[None, :])
            to = own + (place + (low + n)[None, :])
            a_cos += tl.load(bias)[None, :]
            a_sin += tl.load(bias + HALF)[None, :]
            tl.store(to, (a_cos * cos).to(scratch.dtype.element_ty))
            tl.store(to + HALF, (a_sin * sin).to(scratch.dtype.element_ty))

        # The hidden layers, from one half of the program's scratch to the other. What one thread
        # has written another reads, hence the barriers; one a layer is enough, since a half is
        # written again only a layer later.
        red = tl.zeros([PIXELS], tl.float32)
        green = tl.zeros([PIXELS], tl.float32)
        blue = tl.zeros([PIXELS], tl.float32)
        for layer in range(layers):
            tl.debug_barrier()
            source = own + layer % 2 * (PIXELS * WIDTH)
            to = own + (1 - layer % 2) * (PIXELS * WIDTH)
            for low in range(0, WIDTH, UNITS):
                total = tl.zeros([PIXELS, UNITS], tl.float32)
                matrix = weights + (layer * WIDTH + low) * WIDTH
                for k in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
                    a = tl.load(source + (place + (k + depth)[None, :]))
                    w_block = tl.load(matrix + ((unit * WIDTH)[None, :] + (k + depth)[:, None]))
                    total = _dot(a, w_block, total, PRECISION, WIDEN)
                total += tl.load(biases + layer * WIDTH + low + unit)[None, :]
                total = _gelu(total, EXACT)
                if layer < layers - 1:
                    at = to + (place + (low + unit)[None, :])
                    tl.store(at, total.to(scratch.dtype.element_ty))
                else:
                    colour = last + low + unit
                    red += tl.sum(total * tl.load(colour)[None, :], axis=1)
                    green += tl.sum(total * tl.load(colour + WIDTH)[None, :], axis=1)
                    blue += tl.sum(total * tl.load(colour + 2 * WIDTH)[None, :], axis=1)

        red = 0.5 * (red + tl.load(last_bias)) + 0.5
        green = 0.5 * (green + tl.load(last_bias + 1)) + 0.5
        blue = 0.5 * (blue + tl.load(last_bias + 2)) + 0.5
        plane = rows.to(tl.int64) * big_w
        at = out + b.to(tl.int64) * 3 * plane + row.to(tl.int64) * big_w + x
        red += tl.load(at, real, other=0.0) - 0.5
        green += tl.load(at + plane, real, other=0.0) - 0.5
        blue += tl.load(at + 2 * plane, real, other=0.0) - 0.5
        tl.store(at, red, real)
        tl.store(at + plane, green, real)
        tl.store(at + 2 * plane, blue, real)


# ---- launchers ----------------------------------------------------------------------------------


def forward(
    features: Tensor, splatted: Tensor, lr: Tensor, weights: DecoderWeights, strip: Strip
) -> Tensor:
    """`gsr.ops.decode.decode`: [B, 3, stop - start, W] float32."""
    (big_h, big_w), (start, stop), (top, h) = strip
    first, last = strip.around
    b, channels, held, w = features.shape
    device, dtype = features.device, weights.conv.dtype
    out = torch.empty(b, 3, stop - start, big_w, device=device)
    if out.numel() == 0:
        return out
    _, _, half, padded = weights.conv.shape
    q = torch.empty(b, last - first, big_w, padded, device=device, dtype=dtype)
    pixels = max(1, FEATURES // padded)
    launch(
        decode_features, (triton.cdiv(big_w, pixels) * (last - first) * b,),
        features.permute(0, 2, 3, 1).contiguous(), splatted.contiguous(), lr.contiguous(), q, out,
        h, w, top, held, big_h, big_w, first, last - first, start, stop - start,
        channels, splatted.shape[1], CP=padded, PIXELS=pixels, SKIP=lr.shape[1] > 0,
    )  # fmt: skip
    config = decode_config(dtype, device, half=half, channels=padded)
    lines = b * (stop - start)
    programs = min(decode_programs(device), triton.cdiv(lines * big_w, config["PIXELS"]))
    scratch = torch.empty(programs, 2, config["PIXELS"], 2 * half, device=device, dtype=dtype)
    launch(
        decode_colours, (programs,),
        q, *(t.contiguous() for t in weights), scratch, out,
        big_h, big_w, first, last - first, start, stop - start, lines, len(weights.weights),
        CP=padded, HALF=half, WIDEN=device.type == "cpu", **config,
    )  # fmt: skip
    return out
