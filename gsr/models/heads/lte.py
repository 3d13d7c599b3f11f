"""The `lte` head (Lee, Jin, CVPR 2022): a local ensemble of MLPs that see learnt waves.

At every LR pixel two 3 x 3 convolutions give amplitudes (coef) and frequencies (freq); the waves
at a position relative to the pixel, with a phase for the cell, go through an MLP. The LR image,
upsampled bilinearly, is added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from gsr.config import LTEConfig, ModelConfig
from gsr.models.heads.decoder import merged, modulated, perceptron
from gsr.models.heads.liif import EnsembleHead, make_layers


class LTEEncoded(NamedTuple):
    """An image as waves."""

    waves: Tensor  # [B, 2 D, h, w]: D amplitudes, D / 2 frequencies down the rows, D / 2 along them
    lr: Tensor  # [B, 3, h, w]


class LTEDecoder(nn.Module):
    """Waves, relative position and cell to a colour, less that of the LR image.

    The phase takes the cell of `scale_max` at larger scales: beyond those of the training it has
    not been learnt.

    Source: LTE, section 3, equations 5 to 8; the limit of the cell is the published evaluation's.
    """

    def __init__(self, in_channels: int, config: LTEConfig):
        super().__init__()
        self.least_cell = 2 / config.scale_max
        d = config.hidden_dim
        self.coef = nn.Conv2d(in_channels, d, 3, padding=1)
        self.freq = nn.Conv2d(in_channels, d, 3, padding=1)
        self.phase = nn.Linear(2, d // 2, bias=False)
        self.layers = make_layers([d, *config.hidden_list])

    def encode(self, features: Tensor, lr: Tensor) -> LTEEncoded:
        """Both convolutions as one; channels of freq come in pairs (y, x)."""
        return LTEEncoded(F.conv2d(features, *merged(self.coef, self.freq), padding=1), lr)

    def rgb(self, waves: Tensor, ry: Tensor, rx: Tensor, *, cell: Tensor, dtype=None) -> Tensor:
        """Colours [..., 3] around 0, less those of the LR image; see `EnsembleHead`."""
        dtype, phase = dtype or waves.dtype, self.phase(cell.clamp(min=self.least_cell))
        ry, rx = ry.to(waves.dtype), rx.to(waves.dtype)
        waves = modulated(waves, ry, rx, phase=phase, dtype=dtype)
        return perceptron(waves, self.layers, dtype) * 0.5


class LTEHead(EnsembleHead):
    """Head of `lte`.

    Args:
        config: `encoder.n_feats` and `lte` are used.
    """

    def __init__(self, config: ModelConfig):
        decoder = LTEDecoder(config.encoder.n_feats, config.lte)
        super().__init__(decoder, 2 * config.lte.hidden_dim + 3)
