"""SwinIR (Liang et al., ICCVW 2021, section 3) without its upsampler: the encoder at LR.

Convolutions and attention within windows of pixels. Every second block has its windows shifted by
half a window, and those that the border cuts are smaller there; the published code has it the same
by rolling the image round and masking what does not belong together. The image is continued by
reflection to whole windows first. Stochastic depth, which the published code has in training, is
left out: it notes itself that it does nothing for super-resolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gsr.config import EncoderConfig
from gsr.models.stream import Band, Chain, Convolution, Layer, Node, RowBuffer, Skip, join

MLP_RATIO = 2  # hidden channels of a block's MLP, over its channels


def edge(row: int, window: int, shift: int) -> int:
    """The first row, from `row` on, at which windows begin that are shifted by so many rows."""
    return row + (shift - row) % window


def reflected(n: int, window: int, device=None) -> Tensor:
    """Indices of n pixels, continued by reflection to the next multiple of `window`."""
    turn = max(2 * n - 2, 1)
    index = torch.arange(n + -n % window, device=device) % turn
    return torch.minimum(index, turn - index)


class Attention(nn.Module):
    """Self-attention within windows, with a learnt bias for every relative position.

    Source: Liang et al., equation 4; Liu et al., "Swin Transformer", ICCV 2021, equation 4.
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor, cuts: list[tuple[int, int]], shift: int) -> Tensor:
        """x [B, n, m, C], m a multiple of the window, to the same shape.

        Args:
            cuts: (rows of windows, their height), one after the other from the top.
            shift: of the windows along the rows, pixels.
        """
        x = self.qkv(x.roll(-shift, dims=2) if shift else x)
        parts = x.split([count * side for count, side in cuts], dim=1)
        x = torch.cat([self._attend(p, c[1], shift) for p, c in zip(parts, cuts, strict=True)], 1)
        return self.out(x.roll(shift, dims=2) if shift else x)

    def _attend(self, x: Tensor, side: int, shift: int) -> Tensor:
        """Attention in windows of `side` rows; x [B, n, m, 3 C] to [B, n, m, C]."""
        columns, window = x.shape[2] // self.window, self.window
        # All windows of a row are like heads: what may see what differs between them.
        q, k, v = rearrange(
            x, "b (i y) (j x) (p h d) -> p (b i) (j h) (y x) d",
            y=side, x=window, p=3, h=self.heads,
        )  # fmt: skip
        bias = self.bias[self._relative(side)].permute(2, 0, 1).expand(columns, -1, -1, -1)
        if shift:  # the last window of a row holds both ends of the image
            end = torch.arange(window, device=x.device).repeat(side) >= window - shift
            apart = (end[:, None] != end).expand(columns, 1, -1, -1).clone()
            apart[:-1] = False
            bias = bias.masked_fill(apart, -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, bias.flatten(0, 1)[None].to(q.dtype))
        return rearrange(
            out, "(b i) (j h) (y x) d -> b (i y) (j x) (h d)", b=len(x), h=self.heads, y=side
        )

    def _relative(self, side: int) -> Tensor:
        """Rows of `bias` that belong to pairs of pixels of a window, [side window] twice."""
        window, device = self.window, self.bias.device
        y = torch.arange(side, device=device).repeat_interleave(window)
        x = torch.arange(window, device=device).repeat(side)
        dy, dx = (t[:, None] - t + window - 1 for t in (y, x))
        return dy * (2 * window - 1) + dx


class Block(nn.Module):
    """Attention and an MLP, each behind a normalisation and added to its input."""

    def __init__(self, dim: int, heads: int, window: int, shift: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, window)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, MLP_RATIO * dim),
            nn.GELU(),
            nn.Linear(MLP_RATIO * dim, dim),
        )

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """[B, C, n, m]; the rows are those from `first` on, and no window is cut but by the
        image's border."""
        n, window = x.shape[2], self.window
        above = min(edge(first, window, self.shift) - first, n)
        whole, below = (n - above) // window, (n - above) % window
        cuts = [(1, above), (whole, window), (1, below)]
        cuts = [(count, side) for count, side in cuts if count * side > 0]
        x = x.permute(0, 2, 3, 1)
        x = x + self.attention(self.norm(x), cuts, self.shift)
        return (x + self.mlp(x)).permute(0, 3, 1, 2)


class Group(nn.Module):
    """Blocks, their windows shifted in turn, and a convolution; added to the input.

    The paper's residual Swin Transformer block, equation 3.
    """

    def __init__(self, dim: int, depth: int, heads: int, window: int):
        super().__init__()
        self.blocks: Any = nn.Sequential(
            *[Block(dim, heads, window, i % 2 * (window // 2)) for i in range(depth)]
        )
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.blocks(x))

    def stream(self) -> Skip:
        """`forward` for `gsr.models.stream`."""
        return Skip(Chain(*[Windows(block) for block in self.blocks], Convolution(self.conv)))


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SwinIR(nn.Module):
    """[B, 3, h, w] in [0, 1] to features [B, n_feats, h, w].

    LIIF's descendants, LTE first, take n_feats 64, dim 180, six groups of six blocks (depths), six
    heads and windows of 8, with one convolution a group and a LeakyReLU at the end.

    `halo` is exact: a result depends on as many rows above and below in the worst place.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        dim, self.window = config.dim, config.window
        self.first = nn.Conv2d(3, dim, 3, padding=1)
        self.norm = Norm(dim)
        self.groups: Any = nn.Sequential(
            *[Group(dim, depth, config.heads, self.window) for depth in config.depths]
        )
        self.last_norm = Norm(dim)
        self.last = nn.Conv2d(dim, dim, 3, padding=1)
        self.out = nn.Conv2d(dim, config.n_feats, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.out_channels = config.n_feats
        self.alignment = self.window  # windows are counted from the image's corner
        self.halo = max(self._starts(row) - row for row in range(self.window))
        # As a stream: for each pixel of a band, measured; for each column, at most a window a block
        # and what the skip connections wait for.
        blocks = sum(config.depths)
        self.floats = 34 * dim, dim * (blocks * self.window + 2 * self.halo)

    def _starts(self, row: int) -> int:
        """The first row of features for which all rows from `row` on suffice."""
        row += 1
        for group in self.groups:
            for block in group.blocks:
                row = edge(row, self.window, block.shift)
            row += 1
        return row + 2

    def forward(self, lr: Tensor) -> Tensor:
        h, w = lr.shape[-2:]
        y, x = (reflected(n, self.window, lr.device) for n in (h, w))
        first = self.first(normal(lr).index_select(2, y).index_select(3, x))
        x = first + self.last(self.last_norm(self.groups(self.norm(first))))
        return F.leaky_relu(self.out(x))[:, :, :h, :w]

    def stream(self) -> Reflected:
        """`forward` by bands of rows."""
        body = Chain(
            Layer(self.norm, 0),
            *[group.stream() for group in self.groups],
            Layer(self.last_norm, 0),
            Convolution(self.last),
        )
        inner = Chain(
            Layer(normal, 0),
            Convolution(self.first),
            Skip(body),
            Convolution(self.out, F.leaky_relu),
        )
        return Reflected(inner, self.window)


def normal(lr: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]."""
    return (lr - 0.5) / 0.5


# ---- streams ------------------------------------------------------------------------------------


class Windows:
    """A `Block` for `gsr.models.stream`: rows wait until their windows are complete."""

    def __init__(self, block: Block):
        self.block, self.held = block, RowBuffer()

    def feed(self, band: Band | None, last: bool) -> Band | None:
        window, shift = self.block.window, self.block.shift
        if self.held.band is None and band is not None and band.start:
            # The window that the first of these rows is in may be cut, and never comes out.
            start = edge(band.start, window, shift)
            if start >= band.stop:
                return None
            band = band.rows(start, band.stop)
        x = self.held.add(band)
        if x is None:
            return None
        # The last edge that has been reached.
        end = x.stop if last else max(x.start, edge(x.stop - window + 1, window, shift))
        self.held.keep(end, last)
        if end <= x.start:
            return None
        return Band(x.start, (self.block(x.rows(x.start, end).tensors[0], x.start),))


class Reflected:
    """`inner` on rows that are continued by reflection to whole windows, cut off again at its end.

    Rows and columns; the last rows are remembered until the image's end is known.
    """

    def __init__(self, inner: Node, window: int):
        self.inner, self.window = inner, window
        self.held = RowBuffer()  # the last rows, up to a window
        self.width = 0

    def feed(self, band: Band | None, last: bool) -> Band | None:
        if band is not None:
            (lr,) = band.tensors
            self.width = lr.shape[-1]
            columns = reflected(self.width, self.window, lr.device)
            band = Band(band.start, (lr.index_select(-1, columns),))
        held = self.held.add(band)
        if held is None:
            return None
        if last:
            rows = reflected(held.stop, self.window, held.tensors[0].device)[held.stop :]
            more = held.tensors[0].index_select(-2, rows - held.start)
            band = join(band, Band(held.stop, (more,))) if len(rows) else band
        self.held.keep(max(held.start, held.stop - self.window), last)
        out = self.inner.feed(band, last)
        if out is None or out.start >= held.stop:
            return None
        out = out.rows(out.start, min(out.stop, held.stop))
        return Band(out.start, (out.tensors[0][..., : self.width],))
