"""The `bicubic` head: what is left of `field` and `official` when nothing is splatted.

All feature channels are resized bicubically and go through the same decoder. Without a bank,
nothing is assigned either: it is what the splat's gain is measured against.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gsr.config import ModelConfig
from gsr.models.heads.decoder import FourierDecoder, float32_at_least
from gsr.models.heads.fourier import FourierHead


class BicubicEncoded(NamedTuple):
    """An image as features."""

    features: Tensor  # [B, C, h, w]
    lr: Tensor  # [B, 3, h, w]; [B, 0, h, w] without a skip connection


class BicubicHead(FourierHead):
    """Head of `bicubic`.

    Args:
        config: `encoder.n_feats` and `decoder` are used.
    """

    halo = 0

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.decoder = FourierDecoder(config.encoder.n_feats, config.decoder)

    def encode(self, features: Tensor, lr: Tensor, seeds=None) -> BicubicEncoded:
        """Features [B, C, h, w] and LR [B, 3, h, w], in float32 at least."""
        lr = float32_at_least(lr if self.decoder.skip else lr[:, :0])
        return BicubicEncoded(float32_at_least(features), lr)
