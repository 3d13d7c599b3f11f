"""The loops of the Fourier decoder on the CPU, compiled by Numba.

Two differentiable functions, each one pass over memory where PyTorch makes a dozen: `modulate`, the
waves of pixels, and `neighbourhoods`, the features around them. No sum depends on the number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from gsr.ops.resize import cubic

if numba.config.DISABLE_JIT:  # pyright: ignore  # Numba sets it as it is imported
    raise ImportError("NUMBA_DISABLE_JIT is set")

BLOCK = 1024  # pixels of a task
# sin(pi r) / r and cos(pi r) for |r| <= 1/2 in powers of r^2: minimax fits whose coefficients are
# float32 numbers, each found with those before it fixed. The errors stay below 1.4e-7.
_SIN = tuple(np.float32(c) for c in (3.1415925, -5.167702, 2.5499578, -0.5976252, 0.07643289))
_COS = tuple(
    np.float32(c) for c in (1.0, -4.934802, 4.0587053, -1.3351616, 0.23468372, -0.023963654)
)
_ONE, _HALF, _EIGHT, _PI = (np.float32(x) for x in (1, 0.5, 8, np.pi))


def _entry(function):
    # "contract" allows a fused multiply-add and nothing else: additions keep their order.
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)


def _run(
    function: Callable, arguments: Sequence[Any], n: int, *, step: int = BLOCK, pixels: int = 1
) -> None:
    """function(*arguments, start, stop) for consecutive parts of range(n), on PyTorch's threads.

    Each of the n is so many pixels.
    """
    parts = [(start, min(start + step, n)) for start in range(0, n, step)]
    # Between PyTorch's steps, whose threads spin for a while, another thread for little work costs
    # more than it brings.
    if torch.get_num_threads() == 1 or n * pixels <= 4 * BLOCK:
        for part in parts:
            function(*arguments, *part)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda part: function(*arguments, *part), parts))


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).numpy()


# ---- waves ---------------------------------------------------------------------------------------


@numba.njit(fastmath={"contract"}, forceinline=True)
def _sin_cos(t):
    """sin(pi t) and cos(pi t). Half turns are taken off t without rounding."""
    n = np.rint(t)
    r = t - n
    odd = n * _HALF - np.rint(n * _HALF)  # 0, or 1/2 either way
    sign = _ONE - _EIGHT * odd * odd
    u = r * r
    sin = (((_SIN[4] * u + _SIN[3]) * u + _SIN[2]) * u + _SIN[1]) * u + _SIN[0]
    cos = ((((_COS[5] * u + _COS[4]) * u + _COS[3]) * u + _COS[2]) * u + _COS[1]) * u + _COS[0]
    return sign * r * sin, sign * cos


@_entry
def _waves(out, both, ry, rx, phase, start, stop):
    m = len(phase)
    for n in range(start, stop):
        a, f = both[4 * m * n : 4 * m * n + 2 * m], both[4 * m * n + 2 * m : 4 * m * (n + 1)]
        o, y, x = out[2 * m * n : 2 * m * (n + 1)], ry[n], rx[n]
        for i in range(m):
            sin, cos = _sin_cos(f[i] * y + f[i + m] * x + phase[i])
            o[i] = a[i] * cos
            o[i + m] = a[i + m] * sin


@_entry
def _waves_backward(out, phases, grad, both, ry, rx, phase, start, stop):
    """`out` is the gradient of `both`; that of the phase is added to the task's row of `phases`."""
    m, phase_sums = len(phase), phases[start // BLOCK]
    for n in range(start, stop):
        a, f = both[4 * m * n : 4 * m * n + 2 * m], both[4 * m * n + 2 * m : 4 * m * (n + 1)]
        to_a, to_f = out[4 * m * n : 4 * m * n + 2 * m], out[4 * m * n + 2 * m : 4 * m * (n + 1)]
        g, y, x = grad[2 * m * n : 2 * m * (n + 1)], ry[n], rx[n]
        for i in range(m):
            sin, cos = _sin_cos(f[i] * y + f[i + m] * x + phase[i])
            to_a[i] = g[i] * cos
            to_a[i + m] = g[i + m] * sin
            turn = _PI * (g[i + m] * a[i + m] * cos - g[i] * a[i] * sin)
            to_f[i] = turn * y
            to_f[i + m] = turn * x
            phase_sums[i] += turn


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both, ry, rx, phase):
        ctx.save_for_backward(both, ry, rx, phase)
        out = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
        _run(_waves, [_flat(t) for t in (out, both, ry, rx, phase)], ry.numel())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        _, _, _, phase = ctx.saved_tensors
        out, n = torch.empty_like(ctx.saved_tensors[0]), ctx.saved_tensors[1].numel()
        phases = torch.zeros(-(-n // BLOCK), len(phase))
        arrays = [_flat(t) for t in (grad, *ctx.saved_tensors)]
        _run(_waves_backward, [_flat(out), phases.numpy(), *arrays], n)
        return out, None, None, phases.sum(0)


@_entry
def _waves_bf16(out, both, ry, rx, phase, start, stop):
    """`_waves` with a result of bfloat16 as int16: the upper halves of float32."""
    m = len(phase)
    sums = np.empty(2 * m, np.int32)
    results = sums.view(np.float32)
    for n in range(start, stop):
        _waves(results, both[4 * m * n :], ry[n : n + 1], rx[n : n + 1], phase, 0, 1)
        for i in range(2 * m):  # to the nearest, halves to even
            out[2 * m * n + i] = (sums[i] + 0x7FFF + ((sums[i] >> 16) & 1)) >> 16


def modulate(both: Tensor, ry: Tensor, rx: Tensor, *, phase: Tensor, dtype: torch.dtype) -> Tensor:
    """Amplitudes times waves, computed in float32.

    Args:
        both: [..., 2 D] float32, contiguous: D amplitudes, then the D / 2 frequencies of y and
            those of x, half turns a unit of ry and rx.
        ry, rx: [...], without gradient.
        phase: [D / 2], half turns.
        dtype: of the result, float32 or bfloat16.

    Returns:
        [..., D], the first half with cosines and the second with sines.
    """
    wanted = torch.is_grad_enabled() and (both.requires_grad or phase.requires_grad)
    if dtype == torch.float32 or wanted:
        out: Any = _Modulate.apply(both, ry, rx, phase)
        return out.to(dtype)
    out = both.new_empty(*both.shape[:-1], both.shape[-1] // 2, dtype=dtype)
    arrays = [_flat(t) for t in (out.view(torch.int16), both, ry, rx, phase)]
    _run(_waves_bf16, arrays, ry.numel())
    return out


# ---- convolved and resized -----------------------------------------------------------------------


@_entry
def _resize(out, taps, at, weights, start, stop):
    """Add to rows start ... stop - 1 of out [N, W, D] what taps [N, w, 3, D] give resized.

    at [W, 3] and weights [W, 3, 4]: the leftmost LR column, and the weight of four, for a kernel's
    column at an HR column.
    """
    _, width, depth = out.shape
    w = taps.shape[1]
    for n in range(start, stop):
        for x in range(width):
            o = out[n, x]
            for j in range(3):
                v_0, v_1, v_2, v_3 = _four(weights[x, j])
                c = at[x, j]
                c_0, c_1 = min(max(c, 0), w - 1), min(max(c + 1, 0), w - 1)
                c_2, c_3 = min(max(c + 2, 0), w - 1), min(max(c + 3, 0), w - 1)
                t_0, t_1 = taps[n, c_0, j], taps[n, c_1, j]
                t_2, t_3 = taps[n, c_2, j], taps[n, c_3, j]
                for i in range(depth):
                    o[i] += v_0 * t_0[i] + v_1 * t_1[i] + v_2 * t_2[i] + v_3 * t_3[i]


def add_resized(waves: Tensor, taps: Tensor) -> Tensor:
    """waves [B, n, W, D] plus the sum over j of taps [B, n, w, 3 D] resized bicubically along w.

    Part j of the taps belongs to the HR column one left of (j = 0), at, or one right of a pixel;
    beyond the image there is nothing. float32, contiguous; `waves` is overwritten and returned.
    """
    b, n, width, depth = waves.shape
    w = taps.shape[2]
    column = torch.arange(width)[:, None] + torch.arange(-1, 2)
    position = torch.tensor(float(w)) / width * (column + 0.5) - 0.5  # float32, as PyTorch's
    before = torch.floor(position)
    weights = cubic(((position - before)[..., None] - torch.arange(-1, 3)).abs())
    weights = weights * ((column >= 0) & (column < width))[..., None]
    arrays = [
        t.numpy() for t in (waves.view(b * n, width, depth), taps.view(b * n, w, 3, depth),
                            before.long() - 1, weights)
    ]  # fmt: skip
    _run(_resize, arrays, b * n, step=max(1, BLOCK // width), pixels=width)
    return waves


# ---- neighbourhoods ------------------------------------------------------------------------------
# Bicubic resizing of one pixel takes 4 x 4 LR pixels, that of 3 x 3 neighbours shares most of them:
# a row of neighbours first interpolates its columns (at most 12, fewer where they overlap) down the
# rows, then along them.


@_entry
def _gather(out, features, splatted, at, weights, outside, h, w, queries, start, stop):
    """Fill out [B Q, 3, 3, C] for the queries start ... stop - 1.

    features [B h, w, C], splatted [B Q, 3, 3, c], at [B Q, 2, 3] (the first of four taps), weights
    [B Q, 2, 3, 4], outside [B Q, 2, 3].
    """
    c = splatted.shape[3]
    rest = features.shape[2] - c
    tall = np.empty((12, rest), features.dtype)
    for q in range(start, stop):
        image = q // queries * h
        for i in range(3):
            y, (v_0, v_1, v_2, v_3) = at[q, 0, i], _four(weights[q, 0, i])
            row_0, row_1, row_2, row_3 = _four_rows(features, image, y, h)
            done = slot = 0
            for j in range(3):
                if j > 0:
                    slot += min(at[q, 1, j] - at[q, 1, j - 1], 4)
                while done < slot + 4:
                    x, t = min(max(at[q, 1, j] + done - slot, 0), w - 1), tall[done]
                    f_0, f_1 = row_0[x, c:], row_1[x, c:]
                    f_2, f_3 = row_2[x, c:], row_3[x, c:]
                    for n in range(rest):
                        t[n] = v_0 * f_0[n] + v_1 * f_1[n] + v_2 * f_2[n] + v_3 * f_3[n]
                    done += 1
                o = out[q, i, j]
                if outside[q, 0, i] or outside[q, 1, j]:
                    o[:] = 0
                    continue
                o[:c] = splatted[q, i, j]
                o, (v_a, v_b, v_c, v_d) = o[c:], _four(weights[q, 1, j])
                t_0, t_1, t_2, t_3 = tall[slot], tall[slot + 1], tall[slot + 2], tall[slot + 3]
                for n in range(rest):
                    o[n] = v_a * t_0[n] + v_b * t_1[n] + v_c * t_2[n] + v_d * t_3[n]


@numba.njit(forceinline=True)
def _four(a):
    return a[0], a[1], a[2], a[3]


@numba.njit(forceinline=True)
def _four_rows(features, image, y, h):
    return (
        features[image + min(max(y, 0), h - 1)], features[image + min(max(y + 1, 0), h - 1)],
        features[image + min(max(y + 2, 0), h - 1)], features[image + min(max(y + 3, 0), h - 1)],
    )  # fmt: skip


@_entry
def _scatter(features, grad, at, weights, outside, h, w, queries, c, start, stop):
    """Add to features [B h, w, C] what the queries of the images start ... stop - 1 give back."""
    rest = features.shape[2] - c
    tall = np.empty((12, rest), features.dtype)
    for q in range(start * queries, stop * queries):
        image = q // queries * h
        for i in range(3):
            if outside[q, 0, i]:
                continue
            tall[:] = 0
            slot = 0
            for j in range(3):
                if j > 0:
                    slot += min(at[q, 1, j] - at[q, 1, j - 1], 4)
                if outside[q, 1, j]:
                    continue
                g, (v_a, v_b, v_c, v_d) = grad[q, i, j, c:], _four(weights[q, 1, j])
                t_0, t_1, t_2, t_3 = tall[slot], tall[slot + 1], tall[slot + 2], tall[slot + 3]
                for n in range(rest):
                    t_0[n] += v_a * g[n]
                    t_1[n] += v_b * g[n]
                    t_2[n] += v_c * g[n]
                    t_3[n] += v_d * g[n]
            y, (v_0, v_1, v_2, v_3) = at[q, 0, i], _four(weights[q, 0, i])
            row_0, row_1, row_2, row_3 = _four_rows(features, image, y, h)
            done = slot = 0
            for j in range(3):
                if j > 0:
                    slot += min(at[q, 1, j] - at[q, 1, j - 1], 4)
                while done < slot + 4:
                    x, t = min(max(at[q, 1, j] + done - slot, 0), w - 1), tall[done]
                    f_0, f_1 = row_0[x, c:], row_1[x, c:]
                    f_2, f_3 = row_2[x, c:], row_3[x, c:]
                    for n in range(rest):  # rows may coincide at the borders: one after the other
                        f_0[n] += v_0 * t[n]
                    for n in range(rest):
                        f_1[n] += v_1 * t[n]
                    for n in range(rest):
                        f_2[n] += v_2 * t[n]
                    for n in range(rest):
                        f_3[n] += v_3 * t[n]
                    done += 1


class _Neighbourhoods(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, splatted, at, weights, outside):
        b, c_all, h, w = features.shape
        queries, c = splatted.shape[1], splatted.shape[-1]
        ctx.shape, ctx.c = features.shape, c
        ctx.save_for_backward(at, weights, outside)
        out = features.new_empty(b, queries, 9, c_all)
        pixels = features.detach().permute(0, 2, 3, 1).reshape(b * h, w, c_all).numpy()
        cut = splatted.detach().reshape(b * queries, 3, 3, c).numpy()
        tables = [t.flatten(0, 1).numpy() for t in (at, weights, outside)]
        to = out.view(b * queries, 3, 3, c_all).numpy()
        _run(_gather, [to, pixels, cut, *tables, h, w, queries], b * queries)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        b, c_all, h, w = ctx.shape
        queries = grad.shape[1]
        features = grad.new_zeros(b, h, w, c_all)
        to, given = features.view(b * h, w, c_all).numpy(), grad.reshape(-1, 3, 3, c_all).numpy()
        tables = [t.flatten(0, 1).numpy() for t in ctx.saved_tensors]
        # An image a task, so that its sums have one order.
        _run(_scatter, [to, given, *tables, h, w, queries, ctx.c], b, step=1, pixels=queries)
        outside = ctx.saved_tensors[2]
        outside = (outside[:, :, 0, :, None] | outside[:, :, 1, None, :]).flatten(2)
        splatted = grad[..., : ctx.c].masked_fill(outside[..., None], 0)
        return features.permute(0, 3, 1, 2), splatted, None, None, None


def neighbourhoods(
    features: Tensor, splatted: Tensor, *, y: Tensor, x: Tensor, size: tuple[int, int]
) -> Tensor:
    """`gsr.models.heads.decoder.neighbourhoods`, which says what the arguments are."""
    h, w = features.shape[-2:]
    step = torch.arange(-1, 2)
    pixel = torch.stack([y, x], dim=-1)[..., None] + step  # [B, Q, 2, 3]
    outside = (pixel < 0) | (pixel >= torch.tensor(size)[:, None])
    # As in `gsr.ops.resize.bicubic`: rows in float64, columns as PyTorch has them, in float32.
    row = (pixel[:, :, 0] + 0.5).double() * h / size[0] - 0.5
    column = torch.tensor(float(w)) / size[1] * (pixel[:, :, 1] + 0.5) - 0.5
    position = torch.stack([row, column.double()], dim=2)
    before = torch.floor(position)
    away = (position - before).to(features.dtype)[..., None] - step.new_tensor([-1, 0, 1, 2])
    tables = before.long() - 1, cubic(away.abs()), outside
    return _Neighbourhoods.apply(features, splatted, *tables)
