"""SPAN (Wan et al., CVPR workshops 2024, section 3) without its upsampler: the encoder at LR.

Blocks of three convolutions whose result gates itself: attention that needs neither parameters nor
anything but the pixel's own neighbourhood, so that an image can be encoded by bands of rows.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.config import EncoderConfig
from gsr.models.stream import Chain, Convolution, Layer, Residual

SLOPE = 0.1  # of the leaky ReLU; the paper has SiLU there


class AttentionBlock(nn.Module):
    """(x + y) (sigmoid(y) - 1/2), y three convolutions of x: equation 4 of the paper.

    The gate is odd in y and zero where y is: what the convolutions do not find is suppressed.
    """

    def __init__(self, n_feats: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n_feats, n_feats, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:2]:
            y = F.leaky_relu(conv(y), SLOPE, inplace=True)
        return gate(x, self.convs[2](y))

    def stream(self) -> Residual:
        """`forward` for `gsr.models.stream`."""
        first, second, third = self.convs
        act = partial(F.leaky_relu, negative_slope=SLOPE, inplace=True)
        inner = Chain(Convolution(first, act), Convolution(second, act), Convolution(third))
        return Residual(inner, lambda x, y: (gate(x[0], y[0]),))


def gate(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) * (torch.sigmoid(y) - 0.5)


class SPAN(nn.Module):
    """[B, 3, h, w] in [0, 1] to features [B, n_feats, h, w].

    SPAN is n_feats 48, n_blocks 6; n_blocks is at least 2. The result fuses the first convolution,
    the first block, the block before the last and, through one more convolution, the last block.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        c, n = config.n_feats, config.n_blocks
        self.head = nn.Conv2d(3, c, 3, padding=1)
        self.blocks = nn.ModuleList(AttentionBlock(c) for _ in range(n))
        self.tail = nn.Conv2d(c, c, 3, padding=1)
        self.fuse = nn.Conv2d(4 * c, c, 1)
        self.out_channels = c
        self.halo = 3 * n + 2  # one LR pixel a 3 x 3 convolution

    def forward(self, lr: Tensor) -> Tensor:
        x = self.head((lr - 0.5) / 0.5)
        outs = [x]
        for block in self.blocks:
            x = block(x)
            outs.append(x)
        return self.fuse(torch.cat([outs[0], self.tail(x), outs[1], outs[-2]], dim=1))

    def stream(self) -> Chain:
        """`forward` by bands of rows."""
        blocks = (block for block in self.blocks if isinstance(block, AttentionBlock))
        first, *middle, last = (block.stream() for block in blocks)
        # Each of the parts that are fused waits for what comes after it.
        parts = Residual(Chain(last, Convolution(self.tail)), lambda x, y: (*y, *x))
        parts = Residual(Chain(*middle, parts), lambda x, y: (y[0], *x, y[1]))
        parts = Residual(Chain(first, parts), lambda x, y: (*x, *y))
        return Chain(
            Layer(lambda lr: (lr - 0.5) / 0.5, 0),
            Convolution(self.head),
            parts,
            Layer(lambda *parts: self.fuse(torch.cat(parts, dim=1)), 0),
        )
