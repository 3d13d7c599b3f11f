"""`decode`: a strip of HR rows from features to colours, for inference.

An operator, `gsr::decode`, with a Triton kernel (kernels/decode.py) on the GPU and plain PyTorch
elsewhere. It is not differentiable: training decodes sampled pixels and leaves them to the
compiler. On the CPU the heads have loops of their own, and do not call it.
"""

# PyTorch knows neither the types of its sizes nor of its decorators, see operators.py:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gsr.ops.operators import _kernels, _runs_triton
from gsr.ops.resize import bicubic


class DecoderWeights(NamedTuple):
    """A Fourier decoder, laid out for `decode`: with m phases, units wide, C channels.

    m, units = 2 m and C are padded with zeros, so that the kernel's blocks need no masks. `conv`
    and `weights` have the type that matrices are multiplied in, all else is float32.

    Attributes:
        conv: [9, 4, m, C], for each tap of 3 x 3 what makes amplitudes of cosines, amplitudes of
            sines, frequencies of y, frequencies of x.
        conv_bias: [4, m].
        phase: [m], of the cell, half turns.
        weights: [layers, 2 m, 2 m], (out, in), of the hidden layers, each with a GELU behind it.
        biases: [layers, 2 m].
        last: [3, 2 m].
        last_bias: [3].
        ry, rx: [H] and [W], positions of HR pixels relative to the nearest LR pixel.
    """

    conv: Tensor
    conv_bias: Tensor
    phase: Tensor
    weights: Tensor
    biases: Tensor
    last: Tensor
    last_bias: Tensor
    ry: Tensor
    rx: Tensor


class Strip(NamedTuple):
    """Rows of an HR image, seen from a band of LR rows.

    Attributes:
        size: (H, W).
        rows: (start, stop), of H.
        band: (top, height): features hold only the rows from `top` on of an LR image that high.
    """

    size: tuple[int, int]
    rows: tuple[int, int]
    band: tuple[int, int]

    @property
    def around(self) -> tuple[int, int]:
        """`rows`, and one more above and below where the image has one."""
        return max(self.rows[0] - 1, 0), min(self.rows[1] + 1, self.size[0])


def decode(
    features: Tensor, splatted: Tensor, lr: Tensor, weights: DecoderWeights, strip: Strip
) -> Tensor:
    """Colours of a strip around [0, 1], [B, 3, stop - start, W] float32; no gradients.

    Args:
        features: [B, C', h', w], C' <= C, float32, channels last for speed. All but the first c
            channels are resized bicubically.
        splatted: [B, c, n, W], what takes the place of the first c, rows `strip.around`.
        lr: [B, 3, h', w], to be upsampled bicubically and added, less 1/2; or [B, 0, h', w].
        weights: the decoder.
        strip: the rows.

    Source: GaussianSR (AAAI 2025), section 3.4.
    """
    size, rows, band = strip
    arguments: tuple[Any, ...] = (features, splatted, lr, *weights, size, rows, band)
    if torch.compiler.is_compiling() or type(features) is not Tensor:
        return _decode(*arguments)
    # Without PyTorch's registry, which imports torch._dynamo: see `gsr.ops.operators`.
    return _run(*arguments)


def has_kernel(features: Tensor) -> bool:
    """Whether `decode` of these features is a Triton kernel."""
    return _runs_triton(features)


def reference(
    features: Tensor, splatted: Tensor, lr: Tensor, weights: DecoderWeights, strip: Strip
) -> Tensor:
    """`decode` in plain PyTorch, in the types of the weights."""
    w, (start, stop) = weights, strip.rows
    top, bottom = strip.around
    m, channels = w.conv.shape[2:]
    narrow = splatted.shape[1]
    rest = bicubic(features[:, narrow:], strip.size, strip.around, strip.band)
    q = torch.cat([splatted, rest], dim=1).to(w.conv.dtype)
    beyond = (1, 1, int(top == start), int(bottom == stop))
    q = F.pad(q, (*beyond, 0, channels - q.shape[1]))
    kernel = w.conv.unflatten(0, (3, 3)).flatten(2, 3).permute(2, 3, 0, 1)
    waves = F.conv2d(q, kernel).permute(0, 2, 3, 1).to(w.phase.dtype) + w.conv_bias.flatten()
    a_cos, a_sin, f_y, f_x = waves.split(m, dim=-1)
    phase = torch.pi * (f_y * w.ry[start:stop, None, None] + f_x * w.rx[:, None] + w.phase)
    x = torch.cat([a_cos * phase.cos(), a_sin * phase.sin()], dim=-1)
    for matrix, bias in zip(w.weights, w.biases, strict=True):
        x = F.gelu(F.linear(x.to(matrix.dtype), matrix, bias.to(matrix.dtype)))
    x = F.linear(x.to(w.last.dtype), w.last, w.last_bias) * 0.5 + 0.5
    out = x.permute(0, 3, 1, 2).contiguous()
    return out + bicubic(lr, *strip) - 0.5 if lr.shape[1] else out


def _run(
    features: Tensor, splatted: Tensor, lr: Tensor, conv: Tensor, conv_bias: Tensor, phase: Tensor,
    weights: Tensor, biases: Tensor, last: Tensor, last_bias: Tensor, ry: Tensor, rx: Tensor,
    size: Sequence[int], rows: Sequence[int], band: Sequence[int],
) -> Tensor:  # fmt: skip
    (h_hr, w_hr), (start, stop), (top, height) = size, rows, band
    backend = _kernels("decode").forward if has_kernel(features) else reference
    return backend(
        features, splatted, lr,
        DecoderWeights(conv, conv_bias, phase, weights, biases, last, last_bias, ry, rx),
        Strip((h_hr, w_hr), (start, stop), (top, height)),
    )  # fmt: skip


_decode = torch.library.custom_op("gsr::decode", _run, mutates_args=())


@_decode.register_fake
def _(features: Tensor, *others: Any) -> Tensor:
    size, rows = others[-3:-1]
    return features.new_empty(len(features), 3, rows[1] - rows[0], size[1])
