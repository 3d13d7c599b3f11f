"""The `liif` head (Chen, Liu, Wang, CVPR 2021), and what it shares with `lte`: the local ensemble.

An MLP turns the code of an LR pixel and a position relative to it into a colour. A point of the HR
image asks the four LR pixels around it, and takes the mean of their answers, each weighted by the
area of the rectangle between the point and the opposite pixel. What the MLP does first with a code
alone is done at LR, once for all positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.config import LIIFConfig, ModelConfig
from gsr.device import at_once, autocast_dtype, threaded_map
from gsr.models.heads.decoder import QUERIES, affine, relative_cell
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
    first = torch.floor(position)
    index = torch.stack([first, first + 1], dim=-1).clamp(0, n - 1)
    behind = position - first
    return Side(
        index.long(),
        (2 * (position[..., None] - index)).float(),
        torch.stack([1 - behind, behind], dim=-1).float(),
    )


def centres(first: int, end: int, n: int, n_hr: int, device=None) -> Tensor:
    """Centres of HR pixels first ... end - 1 of n_hr, in LR pixels of n; float64."""
    return (torch.arange(first, end, device=device, dtype=torch.float64) + 0.5) * n / n_hr - 0.5


class EnsembleHead(nn.Module):
    """A head whose image is a local ensemble of `decoder`'s colours.

    Args:
        decoder: has `encode` (features and LR to a named tuple, of which the first is what
            `rgb` takes, and the second the LR image, which is enlarged bilinearly and added,
            or none of its channels) and `rgb`.
        floats: channels that `encode` gives.
    """

    halo = 1  # a 3 x 3 convolution

    def __init__(self, decoder: nn.Module, floats: int):
        super().__init__()
        self.decoder, self.floats = decoder, floats

    def encode(self, features: Tensor, lr: Tensor):
        """Features [B, C, h, w] to what the decoder keeps of them at LR, in float32 at least."""
        encoded = self.decoder.encode(features, lr)
        half = torch.float16, torch.bfloat16
        # Channels last: a code is read as a whole.
        return type(encoded)._make(
            (t.float() if t.dtype in half else t).contiguous(memory_format=torch.channels_last)
            for t in encoded
        )

    def rows_needed(self, rows, lr_size, size, scale) -> tuple[int, int]:
        """First and end of the LR rows on which HR rows depend."""
        return rows_needed(rows, lr_size[0], size[0], 1)

    def render(self, encoded, size, scale=None, rows=None, band=None, shared=None) -> Tensor:
        """See `GaussianSR.render`. Nothing but the result is held for more than a few pixels.

        Within torch.autocast to bfloat16 the decoder multiplies matrices in that.
        """
        device = encoded[0].device.type
        dtype = autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return self._render(encoded, size, rows, band, dtype)

    def _render(self, encoded, size, rows, band, dtype: torch.dtype | None) -> Tensor:
        first, last = rows or (0, size[0])
        b, _, h, w = encoded[0].shape
        top, height = band or (0, h)
        device = encoded[0].device
        x = beside(centres(0, size[1], w, size[1], device), w)
        cell = relative_cell(encoded[0], (height, w), size)
        out = encoded[0].new_empty(b, 3, last - first, size[1])

        def decode(part: tuple[int, int, int, int, int]) -> None:
            image, above, below, left, right = part
            y = beside(centres(above, below, height, size[0], device), height)
            y = y._replace(index=y.index - top)
            one = type(encoded)._make(t[image, None] for t in encoded)
            rgb = self._ensemble(
                one,
                Side(*(t[None, :, None] for t in y)),
                Side(*(t[None, None, left:right] for t in x)),
                cell,
                dtype,
            )
            out[image, :, above - first : below - first, left:right] = rgb[0].permute(2, 0, 1)

        alone = device.type == "cpu" and "rgb" not in vars(self.decoder)
        threads = torch.get_num_threads() if alone and not torch.is_grad_enabled() else 1
        pixels = at_once(PIXELS, encoded[0])
        threaded_map(decode, _parts(b, (first, last), size[1], pixels), threads)
        return out

    def query(self, encoded, size, coord: Tensor, scale=None) -> Tensor:
        """See `GaussianSR.query`."""
        lr_size = encoded[0].shape[-2:]
        cell = relative_cell(encoded[0], lr_size, size)
        # Images apart: a part of the queries of all would give gradients of all their codes.
        most, out = at_once(QUERIES, encoded[0]), []
        n = max(1, most // coord.shape[1])
        for points, *part in zip(coord.split(n), *(t.split(n) for t in encoded), strict=True):
            part, rgb = type(encoded)._make(part), []
            for some in points.split(max(1, most // len(points)), dim=1):
                position = ((some.double() + 1) * some.new_tensor(lr_size) - 1) / 2
                y, x = (beside(position[..., i], lr_size[i]) for i in (0, 1))
                rgb.append(self._ensemble(part, y, x, cell))
            out.append(torch.cat(rgb, dim=1))
        return torch.cat(out)

    def _ensemble(self, encoded, y: Side, x: Side, cell: Tensor, dtype=None) -> Tensor:
        """Colours [B, ..., 3] at positions whose sides, [B or 1, ..., 2], broadcast together.

        Matrices are multiplied in `dtype`, the codes' own if left out.
        """
        b, _, h, w = encoded[0].shape
        image = torch.arange(b, device=encoded[0].device).view(-1, *[1] * y.index.dim())
        index = (image * h + y.index[..., :, None]) * w + x.index[..., None, :]  # [B, ..., 2, 2]
        ry, rx = y.away[..., :, None, None], x.away[..., None, :, None]
        rgb = self.decoder.rgb(_pick(encoded[0], index), ry, rx, cell, dtype)
        if encoded.lr.shape[1]:
            rgb = rgb + _pick(encoded.lr, index)
        weight = y.weight[..., :, None] * x.weight[..., None, :]
        return (rgb * weight[..., None]).sum(dim=(-3, -2))


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Pixels of [B, D, h, w] of that number, all images' rows counted: [..., D]."""
    flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return flat.index_select(0, index.flatten()).view(*index.shape, -1)


def _parts(batch: int, rows: tuple[int, int], width: int, pixels: int) -> Iterable[tuple]:
    """(image, first row, end row, first column, end column) of pieces of at most so many pixels."""
    columns = math.ceil(width / math.ceil(width / pixels))
    step = max(1, pixels // columns)
    for image in range(batch):
        for top in range(*rows, step):
            for left in range(0, width, columns):
                yield image, top, min(top + step, rows[1]), left, min(left + columns, width)


def perceptron(x: Tensor, layers: Iterable[nn.Module], dtype: torch.dtype) -> Tensor:
    """x [..., C] through Linear, ReLU, ..., Linear, matrices but the last in `dtype`."""
    *hidden, last = layers
    for layer in hidden:
        if isinstance(layer, nn.Linear):
            x = affine(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
        else:
            x = x.relu_()
    return affine(x.to(last.weight.dtype), last.weight, last.bias)


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
    `config.skip`, to its difference from the LR image's.

    Source: LIIF, section 3: equation 1, feature unfolding and cell decoding.
    """

    def __init__(self, in_channels: int, config: LIIFConfig):
        super().__init__()
        self.skip = config.skip
        self.layers = make_layers([9 * in_channels + 4, *config.hidden_list])

    def encode(self, features: Tensor, lr: Tensor) -> LIIFEncoded:
        """The first layer's part that a position does not change: unfolding and a matrix product
        are a 3 x 3 convolution."""
        first = self.layers[0]
        kernel = first.weight[:, :-4].unflatten(1, (-1, 3, 3))
        codes = F.conv2d(features, kernel, first.bias, padding=1)
        return LIIFEncoded(codes, lr if self.skip else lr[:, :0])

    def rgb(self, codes: Tensor, ry: Tensor, rx: Tensor, cell: Tensor, dtype=None) -> Tensor:
        """Codes [..., D], relative position [..., 1] twice in half LR pixels, cell [2] of an HR
        pixel in these, to [..., 3] around [0, 1], with skip around 0; matrices but the last
        multiplied in `dtype`."""
        dtype = dtype or codes.dtype
        rest = self.layers[0].weight[:, -4:].to(codes.dtype)
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
