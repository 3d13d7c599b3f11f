"""The `liif` head (Chen, Liu, Wang, CVPR 2021), and what it shares with `lte`: the local ensemble.

An MLP turns the code of an LR pixel and a position relative to it into a colour. A point of the HR
image asks the four LR pixels around it, and takes the mean of their answers, each weighted by the
area of the rectangle between the point and the opposite pixel. What the MLP does first with a code
alone is done at LR, once for all positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.config import LIIFConfig, ModelConfig
from gsr.device import at_once, autocast_dtype, threaded_map
from gsr.models.heads.decoder import (
    QUERIES,
    decoding_threads,
    float32_at_least,
    gather_pixels,
    perceptron,
    relative_cell,
)
from gsr.ops import rows_needed

PIXELS = 2**9  # HR pixels that a thread decodes at a time: 2 MB a layer, which stay in the cache


# ---- the local ensemble -------------------------------------------------------------------------


class Side(NamedTuple):
    """Positions along one axis, with the LR pixel before and that behind each."""

    index: Tensor  # [..., 2] int64
    away: Tensor  # [..., 2], position - centre of the pixel, half LR pixels
    weight: Tensor  # [..., 2], the other pixel's distance; sums to 1


def beside(position: Tensor, n: int) -> Side:
    """The two of n LR pixels around each position [...], in LR pixels, pixel i's centre at i.

    Beyond the outermost centres both are the outermost pixel. Areas of rectangles are products of
    two distances, so that the ensemble's weights are products of these; where all areas are 0, on
    the centres of the last row or column, these are their limit.
    """
    before = torch.floor(position)
    index = torch.stack([before, before + 1], dim=-1).clamp(0, n - 1)
    behind = position - before
    return Side(
        index.long(),
        (2 * (position[..., None] - index)).float(),
        torch.stack([1 - behind, behind], dim=-1).float(),
    )


def centres(start: int, stop: int, n: int, *, n_hr: int, device=None) -> Tensor:
    """Centres of HR pixels start ... stop - 1, of n_hr, in LR pixels of n; float64."""
    return (torch.arange(start, stop, device=device, dtype=torch.float64) + 0.5) * n / n_hr - 0.5


class EnsembleHead(nn.Module):
    """A head whose image is a local ensemble of `decoder`'s colours.

    Args:
        decoder: has `encode`, features and LR to a named tuple of the codes [B, D, h, w] and of
            `lr`, the LR image, which is upsampled bilinearly and added, or none of its channels;
            and `rgb`: codes [..., D], the relative position (ry, rx), [..., 1] each in half LR
            pixels, and the `cell` [2] of an HR pixel in these to colours [..., 3], with matrices
            but the last multiplied in `dtype`.
        floats: channels that `encode` gives.
    """

    halo = 1  # a 3 x 3 convolution

    def __init__(self, decoder: nn.Module, floats: int):
        super().__init__()
        self.decoder: Any = decoder
        self.floats = floats

    def encode(self, features: Tensor, lr: Tensor, seeds=None):
        """Features [B, C, h, w] to what the decoder keeps of them at LR, in float32 at least."""
        encoded = self.decoder.encode(features, lr)
        # Channels last: a code is read as a whole.
        last = torch.channels_last
        return encoded._make(float32_at_least(t).contiguous(memory_format=last) for t in encoded)

    def rows_needed(self, rows, *, lr_size, size, scale=None) -> tuple[int, int]:
        """See `GaussianSR.rows_needed`."""
        return rows_needed(rows, lr_size[0], size[0], 1)

    def render(self, encoded, size, scale=None, *, rows=None, band=None, shared=None) -> Tensor:
        """See `GaussianSR.render`. Nothing but the result is held for more than a few pixels.

        Within torch.autocast to bfloat16 the decoder multiplies matrices in that.
        """
        start, stop = rows or (0, size[0])
        b, _, h, w = encoded[0].shape
        top, height = band or (0, h)
        device = encoded[0].device
        dtype = autocast_dtype(device.type)
        with torch.autocast(device.type, enabled=False):
            x = beside(centres(0, size[1], w, n_hr=size[1], device=device), w)
            cell = relative_cell(encoded[0], (height, w), size)
            out = encoded[0].new_empty(b, 3, stop - start, size[1])

            def render_piece(piece: tuple[int, slice, slice]) -> None:
                image, part, columns = piece
                position = centres(part.start, part.stop, height, n_hr=size[0], device=device)
                y = beside(position, height)
                y = y._replace(index=y.index - top)
                rgb = self._ensemble(
                    encoded._make(t[image, None] for t in encoded),
                    Side(*(t[None, :, None] for t in y)),
                    Side(*(t[None, None, columns] for t in x)),
                    cell=cell,
                    dtype=dtype,
                )
                part = slice(part.start - start, part.stop - start)
                out[image, :, part, columns] = rgb[0].permute(2, 0, 1)

            pieces = _pieces(b, (start, stop), size[1], pixels=at_once(PIXELS, out))
            threaded_map(render_piece, pieces, decoding_threads(self.decoder))
            return out

    def query(self, encoded, size, coord: Tensor, scale=None) -> Tensor:
        """See `GaussianSR.query`."""
        lr_size = encoded[0].shape[-2:]
        cell = relative_cell(encoded[0], lr_size, size)
        # Images apart: a part of the queries of all would give gradients of all their codes.
        most, out = at_once(QUERIES, encoded[0]), []
        n = max(1, most // coord.shape[1])
        for points, *part in zip(coord.split(n), *(t.split(n) for t in encoded), strict=True):
            part, rgb = encoded._make(part), []
            for some in points.split(max(1, most // len(points)), dim=1):
                position = ((some.double() + 1) * some.new_tensor(lr_size) - 1) / 2
                y, x = (beside(position[..., i], lr_size[i]) for i in (0, 1))
                rgb.append(self._ensemble(part, y, x, cell=cell))
            out.append(torch.cat(rgb, dim=1))
        return torch.cat(out)

    def _ensemble(self, encoded, y: Side, x: Side, *, cell: Tensor, dtype=None) -> Tensor:
        """Colours [B, ..., 3] at positions whose sides, [B or 1, ..., 2], broadcast together.

        Matrices are multiplied in `dtype`, the codes' own if left out.
        """
        row, column = y.index[..., :, None], x.index[..., None, :]  # [B, ..., 2, 2] together
        ry, rx = y.away[..., :, None, None], x.away[..., None, :, None]
        codes = gather_pixels(encoded[0], row, column)
        rgb = self.decoder.rgb(codes, ry, rx, cell=cell, dtype=dtype)
        if encoded.lr.shape[1]:
            rgb = rgb + gather_pixels(encoded.lr, row, column)
        weight = y.weight[..., :, None] * x.weight[..., None, :]
        return (rgb * weight[..., None]).sum(dim=(-3, -2))


def _pieces(
    batch: int, rows: tuple[int, int], width: int, *, pixels: int
) -> Iterator[tuple[int, slice, slice]]:
    """(image, rows, columns) of pieces of at most so many pixels."""
    columns = math.ceil(width / math.ceil(width / pixels))
    step = max(1, pixels // columns)
    for image in range(batch):
        for top in range(*rows, step):
            for left in range(0, width, columns):
                right = min(left + columns, width)
                yield image, slice(top, min(top + step, rows[1])), slice(left, right)


def make_layers(widths: list[int]) -> nn.Sequential:
    """Linear layers from each width to the next and from the last to 3, with ReLU between."""
    layers = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 3))


# ---- LIIF ---------------------------------------------------------------------------------------


class LIIFEncoded(NamedTuple):
    """An image as codes."""

    codes: Tensor  # [B, D, h, w], what the first layer makes of each pixel's 3 x 3 features
    lr: Tensor  # [B, 3, h, w], [B, 0, h, w] without skip


class LIIFDecoder(nn.Module):
    """The decoding function: 3 x 3 features, relative position and cell to a colour; with
    `config.skip`, to the residual of the LR image's.

    Source: LIIF, section 3: equation 1, feature unfolding and cell decoding.
    """

    def __init__(self, in_channels: int, config: LIIFConfig):
        super().__init__()
        self.skip = config.skip
        self.layers = make_layers([9 * in_channels + 4, *config.hidden_list])

    def encode(self, features: Tensor, lr: Tensor) -> LIIFEncoded:
        """The first layer's part that a position does not change: unfolding and a matrix product
        are a 3 x 3 convolution."""
        layer: Any = self.layers[0]
        kernel = layer.weight[:, :-4].unflatten(1, (-1, 3, 3))
        codes = F.conv2d(features, kernel, layer.bias, padding=1)
        return LIIFEncoded(codes, lr if self.skip else lr[:, :0])

    def rgb(self, codes: Tensor, ry: Tensor, rx: Tensor, *, cell: Tensor, dtype=None) -> Tensor:
        """Colours [..., 3] around [0, 1], with skip around 0; see `EnsembleHead`."""
        layer: Any = self.layers[0]
        dtype, rest = dtype or codes.dtype, layer.weight[:, -4:].to(codes.dtype)
        ry, rx = ry.to(codes.dtype), rx.to(codes.dtype)
        x = codes + (ry * rest[:, 0] + rx * rest[:, 1] + rest[:, 2:] @ cell.to(codes.dtype))
        rgb = perceptron(x.relu_(), list(self.layers)[2:], dtype) * 0.5
        return rgb if self.skip else rgb + 0.5


class LIIFHead(EnsembleHead):
    """Head of `liif`.

    Args:
        config: `encoder.n_feats` and `liif` are used.
    """

    def __init__(self, config: ModelConfig):
        decoder = LIIFDecoder(config.encoder.n_feats, config.liif)
        super().__init__(decoder, config.liif.hidden_list[0] + 3)
