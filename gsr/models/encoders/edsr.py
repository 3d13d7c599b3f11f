"""EDSR (Lim et al., CVPRW 2017, section 3) without its upsampler: the encoder at LR."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gsr.config import EncoderConfig
from gsr.models.stream import Chain, Convolution, Layer, Skip


class ResBlock(nn.Module):
    """conv-ReLU-conv on a residual branch, without normalisation."""

    def __init__(self, n_feats: int, res_scale: float):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_feats, n_feats, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_feats, n_feats, 3, padding=1),
        )
        # To torch.compile a whole number is a constant, a float an input, which alpha cannot be.
        self.res_scale = 1 if res_scale == 1 else res_scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.body(x), alpha=self.res_scale)

    def stream(self) -> Skip:
        """`forward` for `gsr.models.stream`."""
        first, relu, second = self.body
        return Skip(Chain(Convolution(first, relu), Convolution(second)), self.res_scale)


class EDSR(nn.Module):
    """[B, 3, h, w] in [0, 1] to features [B, n_feats, h, w].

    EDSR-baseline is n_feats 64, n_blocks 16, res_scale 1; EDSR is 256, 32, 0.1.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        c, n = config.n_feats, config.n_blocks
        self.head = nn.Sequential(nn.Conv2d(3, c, 3, padding=1))
        self.body = nn.Sequential(
            *[ResBlock(c, config.res_scale) for _ in range(n)], nn.Conv2d(c, c, 3, padding=1)
        )
        self.out_channels = c
        self.halo = 2 * n + 2  # one LR pixel a 3 x 3 convolution

    def forward(self, lr: Tensor) -> Tensor:
        x = self.head((lr - 0.5) / 0.5)
        return x + self.body(x)

    def stream(self) -> Chain:
        """`forward` by bands of rows."""
        *blocks, last = self.body
        body = Chain(*[b.stream() for b in blocks if isinstance(b, ResBlock)], Convolution(last))
        return Chain(
            Layer(lambda lr: (lr - 0.5) / 0.5, 0),
            Convolution(self.head[0]),
            Skip(body),
        )
