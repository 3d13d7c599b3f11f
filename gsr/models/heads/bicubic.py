"""The `bicubic` head: what is left of `field` and `official` when nothing is splatted.

All feature channels are resized bicubically and go through the same decoder. Without a bank,
nothing is assigned either: it is what the splat's gain is measured against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gsr.config import ModelConfig
from gsr.device import autocast_dtype
from gsr.models.heads.decoder import FourierDecoder, neighbourhoods
from gsr.ops import rows_needed
from gsr.ops.resize import bicubic_rows


class BicubicEncoded(NamedTuple):
    """An image as features."""

    features: Tensor  # [B, C, h, w]
    base: Tensor  # see `FourierDecoder.base`


class BicubicHead(nn.Module):
    """Head of `bicubic`.

    Args:
        config: `encoder.n_feats` and `decoder` are used.
    """

    halo = 0

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.decoder = FourierDecoder(config.encoder.n_feats, config.decoder)

    def encode(self, features: Tensor, lr: Tensor) -> BicubicEncoded:
        half = features.dtype in (torch.float16, torch.bfloat16)  # HR is always fp32
        return BicubicEncoded(features.float() if half else features, self.decoder.base(lr))

    def rows_needed(self, rows, lr_size, size, scale) -> tuple[int, int]:
        """First and end of the LR rows on which HR rows depend."""
        rows = max(rows[0] - 1, 0), min(rows[1] + 1, size[0])  # the decoder's 3 x 3 convolutions
        return rows_needed(rows, lr_size[0], size[0], 2)  # the taps of bicubic resizing

    def render(
        self, encoded: BicubicEncoded, size, scale=None, rows=None, band=None, shared=None
    ) -> Tensor:
        """See `GaussianSR.render`. Nothing but the result is held for more than a strip of rows.

        Within torch.autocast to bfloat16 the decoder multiplies matrices in that.
        """
        features = encoded.features
        b, _, h, w = features.shape

        def strip(first: int, last: int) -> tuple[Tensor, Tensor]:
            nothing = features.new_empty(b, 0, last - first, size[1])
            return nothing, bicubic_rows(features, size[0], (first, last), band)

        lr_size, device = (h if band is None else band[1], w), features.device.type
        dtype = autocast_dtype(device) or torch.float32
        with torch.autocast(device, enabled=False):
            out = self.decoder.render(strip, 0, b, lr_size, size, rows, dtype)
            return self.decoder.over(out, encoded.base, size, rows, band)

    def query(self, encoded: BicubicEncoded, size, coord: Tensor, scale=None) -> Tensor:
        """See `GaussianSR.query`."""

        def neighbours(tensors, y: Tensor, x: Tensor) -> Tensor:
            (features,) = tensors
            return neighbourhoods(features, features.new_empty(*y.shape, 9, 0), size, y, x)

        lr_size = encoded.features.shape[-2:]
        out = self.decoder.query(neighbours, encoded[:1], coord, lr_size, size)
        return self.decoder.over_at(out, encoded.base, coord)
