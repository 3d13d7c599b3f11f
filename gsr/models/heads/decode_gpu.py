"""The Fourier decoder on the GPU: its weights as `gsr.ops.decode` wants them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.models.heads.decoder import (
    FourierDecoder,
    merged,
    pixel_centres,
    relative,
    relative_cell,
)
from gsr.ops.decode import DecoderWeights, has_kernel

STRIP = 2**21  # HR pixels decoded at a time: half a GB of features in float32


def takes(decoder: FourierDecoder, features: Tensor) -> bool:
    """Whether the kernel decodes these features: on CUDA, for inference, in float32."""
    return (
        has_kernel(features)
        and features.dtype == decoder.coef.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and len(decoder.layers) > 1
    )


def lay_out(
    decoder: FourierDecoder, *, lr_size: tuple[int, int], size: tuple[int, int], dtype: torch.dtype
) -> DecoderWeights:
    """A decoder of images of lr_size (h, w) to size (H, W), matrices in `dtype`.

    Widths are padded with zeros to one that all layers share: what they add is 0 behind every GELU.
    """
    weight, bias = merged(decoder.coef, decoder.freq)  # [2 D, C, 3, 3], [2 D]
    linear = [layer for layer in decoder.layers if isinstance(layer, nn.Linear)]
    d = len(bias) // 2
    half = _padded((max(layer.in_features for layer in linear) + 1) // 2)
    channels = _padded(weight.shape[1])

    conv = weight.view(4, d // 2, -1, 9).permute(3, 0, 1, 2)
    conv = F.pad(conv, (0, channels - conv.shape[3], 0, half - d // 2))
    matrices = [layer.weight for layer in linear]
    # Of the waves the first half are cosines, each half padded by itself.
    first = matrices[0].unflatten(1, (2, -1))
    matrices[0] = F.pad(first, (0, half - d // 2)).flatten(1)
    *hidden, last = (F.pad(m, (0, 2 * half - m.shape[1])) for m in matrices)
    hidden = [F.pad(m, (0, 0, 0, 2 * half - len(m))) for m in hidden]
    biases = [F.pad(layer.bias, (0, 2 * half - len(layer.bias))) for layer in linear[:-1]]
    ry, rx = (
        relative(pixel_centres(n_hr, weight.device), n)
        for n, n_hr in zip(lr_size, size, strict=True)
    )
    return DecoderWeights(
        conv=conv.to(dtype).contiguous(),
        conv_bias=F.pad(bias.view(4, -1), (0, half - d // 2)),
        phase=F.pad(decoder.phase(relative_cell(weight, lr_size, size)), (0, half - d // 2)),
        weights=torch.stack(hidden).to(dtype),
        biases=torch.stack(biases),
        last=last,
        last_bias=linear[-1].bias,
        ry=ry,
        rx=rx,
    )


def _padded(n: int) -> int:
    """A power of 2, and what a product on tensor cores takes at the least."""
    return max(16, 1 << (n - 1).bit_length())
