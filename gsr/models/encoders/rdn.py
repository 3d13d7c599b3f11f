"""RDN (Zhang et al., CVPR 2018, section 3) without its upsampler: the encoder at LR."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.config import EncoderConfig
from gsr.models.stream import Chain, Convolution, Layer, Residual, Skip, StreamedDenseBlock


class DenseBlock(nn.Module):
    """Convolutions that each see the block's input and all results before; fused, and added to it.

    The paper's residual dense block: contiguous memory, local feature fusion, local residual.
    """

    def __init__(self, n_feats: int, growth: int, layers: int):
        super().__init__()
        self.convs: Any = nn.ModuleList(
            nn.Conv2d(n_feats + i * growth, growth, 3, padding=1) for i in range(layers)
        )
        self.fuse = nn.Conv2d(n_feats + layers * growth, n_feats, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in self.convs:
            seen = torch.cat([seen, F.relu(conv(seen), inplace=True)], dim=1)
        return x + self.fuse(seen)

    def stream(self) -> Skip:
        """`forward` for `gsr.models.stream`."""
        return Skip(Chain(StreamedDenseBlock(self.convs, torch.relu_), Convolution(self.fuse)))


class RDN(nn.Module):
    """[B, 3, h, w] in [0, 1] to features [B, n_feats, h, w].

    Configuration "B", the one that LIIF and its descendants take, is n_feats 64 (the paper's G0),
    n_blocks 16 (D), layers 8 (C) and growth 64 (G); "A" is 64, 20, 6, 32.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        c, n, layers = config.n_feats, config.n_blocks, config.layers
        self.first = nn.Conv2d(3, c, 3, padding=1)
        self.second = nn.Conv2d(c, c, 3, padding=1)
        self.blocks: Any = nn.ModuleList(DenseBlock(c, config.growth, layers) for _ in range(n))
        self.fuse = nn.Conv2d(n * c, c, 1)
        self.last = nn.Conv2d(c, c, 3, padding=1)
        self.out_channels = c
        self.halo = n * layers + 3  # one LR pixel a 3 x 3 convolution
        # As a stream: for each pixel of a band, measured; for each column, one row a convolution
        # that is waited for: in a block by every result for those after it, by the result of a
        # block for all later blocks, by the first layer's for everything.
        widest = c + layers * config.growth
        dense = sum((layers + 1 - i) * (c if i == 0 else config.growth) for i in range(layers + 1))
        waits = dense + layers * c
        self.floats = (
            15 * widest,
            n * waits + c * layers * n * (n - 1) // 2 + c * self.halo,
        )

    def forward(self, lr: Tensor) -> Tensor:
        first = self.first((lr - 0.5) / 0.5)
        x, every = self.second(first), []
        for block in self.blocks:
            x = block(x)
            every.append(x)
        return first + self.last(self.fuse(torch.cat(every, dim=1)))

    def stream(self) -> Chain:
        """`forward` by bands of rows."""
        # Fusion is a sum over the blocks, each of which adds its part to that of all later ones.
        *blocks, last = self.blocks
        *parts, part = self.fuse.weight.split(self.out_channels, dim=1)
        fuse = partial(F.conv2d, weight=part, bias=self.fuse.bias)
        every = Chain(last.stream(), Layer(fuse, 0))
        for block, part in zip(reversed(blocks), reversed(parts), strict=True):
            every = Chain(block.stream(), Residual(every, partial(_add_fused, part)))
        return Chain(
            Layer(lambda lr: (lr - 0.5) / 0.5, 0),
            Convolution(self.first),
            Skip(Chain(Convolution(self.second), every, Convolution(self.last))),
        )


def _add_fused(part: Tensor, x: tuple[Tensor], later: tuple[Tensor]) -> tuple[Tensor]:
    """What a block adds to the sum of the later ones, written over it."""
    return (later[0].add_(F.conv2d(x[0], part)),)
