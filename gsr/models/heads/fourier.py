"""What the heads `official`, `field` and `bicubic` share: features at HR, decoded strip by strip.

The first channels of the features are splatted, the others are resized bicubically, and the Fourier
decoder turns both into colours. An image is rendered by strips of rows, and single points from
their 3 x 3 neighbourhoods alone, so that neither the 512 channels of the waves nor the features of
a whole HR image ever exist.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.device import at_once, autocast_dtype, threaded_map
from gsr.models.heads import decode_gpu
from gsr.models.heads.decoder import (
    AT_ONCE,
    QUERIES,
    STRIP,
    FourierDecoder,
    StripDecoder,
    affine,
    decoding_threads,
    merged,
    nearest_pixels,
    neighbourhoods,
    relative_cell,
)
from gsr.ops import rows_needed
from gsr.ops.decode import Strip, decode
from gsr.ops.resize import bicubic, bicubic_at, bicubic_rows


class FourierHead(nn.Module):
    """A head with a Fourier decoder. As it is here it splats nothing.

    A subclass makes `decoder` and has `encode`, whose result begins with `features` [B, C, h, w]
    and has `lr` [B, 3, h, w]. One that splats sets `channels` and replaces the five methods at the
    end.
    """

    channels = 0  # that are splatted, the first ones
    decoder: FourierDecoder

    def rows_needed(self, rows, *, lr_size, size, scale=None) -> tuple[int, int]:
        """See `GaussianSR.rows_needed`."""
        rows = max(rows[0] - 1, 0), min(rows[1] + 1, size[0])  # the decoder's 3 x 3 convolutions
        splat = self.splat_rows_needed(rows, lr_size=lr_size, size=size, scale=scale)
        rest = rows_needed(rows, lr_size[0], size[0], 2)  # the taps of bicubic resizing
        return min(splat[0], rest[0]), max(splat[1], rest[1])

    def render(self, encoded, size, scale=None, *, rows=None, band=None, shared=None) -> Tensor:
        """See `GaussianSR.render`. Nothing but the result is held for more than a strip of rows.

        Within torch.autocast to bfloat16 the decoder multiplies matrices in that.
        """
        b, _, h, w = encoded.features.shape
        lr_size = (h if band is None else band[1], w)
        start, stop = rows or (0, size[0])
        device = encoded.features.device.type
        dtype = autocast_dtype(device) or torch.float32
        with torch.autocast(device, enabled=False):
            splat = self.prepare(encoded, scale, band=band, shared=shared)
            if decode_gpu.takes(self.decoder, encoded.features):
                return self._render_fused(encoded, splat, dtype, size=size, rows=rows, band=band)
            decode = StripDecoder(
                self.decoder, self.channels, lr_size=lr_size, size=size, dtype=dtype
            )
            # Allocated first: strips kept for a final `cat` would lie between the large buffers and
            # fragment the heap.
            out = decode.weight.new_empty(b, 3, stop - start, size[1])

            # A block of rows at a time: the steps that make its features are many and small.
            height = max(1, at_once(STRIP, out) // (b * size[1]))  # rows of a strip
            threads = decoding_threads(self.decoder)
            blocks = threads * math.ceil((stop - start) / (threads * AT_ONCE * height))

            def render_block(block: tuple[int, int]) -> None:
                top, bottom = block
                # One row more above and below, for the decoder's 3 x 3 convolutions; zeros only
                # where the image ends, elsewhere the blocks overlap.
                around = max(top - 1, 0), min(bottom + 1, size[0])
                features = self.strip_features(encoded, splat, around, size=size, band=band)
                zeros = (0, 0, int(top == 0), int(bottom == size[0]))
                splatted, tall = (F.pad(part, zeros) for part in features)
                # A strip at a time, whose waves stay in the cache.
                for strip in split_rows(top, bottom, math.ceil((bottom - top) / height)):
                    near = slice(strip[0] - top, strip[1] + 2 - top)
                    rgb = decode(splatted[:, :, near], tall[:, :, near], strip)
                    out[:, :, strip[0] - start : strip[1] - start] = rgb

            threaded_map(render_block, split_rows(start, stop, blocks), threads)
            return out + bicubic(encoded.lr, size, rows, band) - 0.5 if self.decoder.skip else out

    def _render_fused(self, encoded, splat: Any, dtype, *, size, rows, band) -> Tensor:
        """`render` by one kernel from features to colours, some millions of pixels at a time."""
        features = encoded.features.contiguous(memory_format=torch.channels_last)
        b, _, h, w = features.shape
        whole = Strip(size, rows or (0, size[0]), band or (0, h))
        weights = decode_gpu.lay_out(
            self.decoder, lr_size=(whole.band[1], w), size=size, dtype=dtype
        )
        start, stop = whole.rows
        parts = math.ceil(b * size[1] * (stop - start) / decode_gpu.STRIP)
        out = []
        for part in split_rows(start, stop, parts):
            strip = whole._replace(rows=part)
            splatted = self.splat_rows(splat, strip.around, size=size, band=band)
            out.append(decode(features, splatted, encoded.lr, weights, strip))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def strip_features(
        self, encoded, splat: Any, rows: tuple[int, int], *, size, band
    ) -> tuple[Tensor, Tensor]:
        """Features of HR rows (start, stop), n of them, in two parts, on any thread.

        The splatted channels [B, c, n, W], and the others before they are resized along the rows,
        [B, C - c, n, w]. `splat` is what `prepare` has made.
        """
        splatted = self.splat_rows(splat, rows, size=size, band=band)
        return splatted, bicubic_rows(encoded.features[:, self.channels :], size[0], rows, band)

    def query(self, encoded, size, coord: Tensor, scale=None) -> Tensor:
        """See `GaussianSR.query`. coef and freq of a point are those of the nearest HR pixel."""
        lr_size, most = encoded.features.shape[-2:], at_once(QUERIES, encoded.features)
        weight, bias = merged(self.decoder.coef, self.decoder.freq)
        weight = weight.permute(0, 2, 3, 1).flatten(1)  # [2 D, 9 C]
        cell, out = relative_cell(weight, lr_size, size), []
        tensors = encoded.features, *self.prepare_points(encoded, size, scale, count=coord.shape[1])
        # Images apart: a part of the queries of all would give gradients of all their features.
        images = max(1, most // coord.shape[1])
        parts = zip(*(t.split(images) for t in (coord, *tensors)), strict=True)
        for points, features, *splat in parts:
            rgb = []
            for some in points.float().split(max(1, most // len(points)), dim=1):
                y, x, ry, rx = nearest_pixels(some, lr_size, size)
                splatted = self.splat_3x3(splat, y, x, size=size)
                near = neighbourhoods(features, splatted, y=y, x=x, size=size)
                waves = affine(near.flatten(2), weight, bias)
                ry, rx = ry.to(waves.dtype), rx.to(waves.dtype)
                rgb.append(self.decoder.rgb(waves, ry, rx, cell=cell))
            out.append(torch.cat(rgb, dim=1))
        out = torch.cat(out)
        return out + bicubic_at(encoded.lr, coord) - 0.5 if self.decoder.skip else out

    # ---- the splat ------------------------------------------------------------------------------

    def prepare(self, encoded, scale, *, band=None, shared=None) -> tuple:
        """What `splat_rows` takes, made once for an image."""
        return (encoded.features,)

    def splat_rows(self, splat, rows: tuple[int, int], *, size, band=None) -> Tensor:
        """HR rows (start, stop) of the splatted channels: [B, c, n, W]."""
        (features,) = splat
        return features.new_empty(len(features), 0, rows[1] - rows[0], size[1])

    def splat_rows_needed(self, rows, *, lr_size, size, scale) -> tuple[int, int]:
        """LR rows (start, stop) on which `splat_rows` of HR rows depends."""
        return rows_needed(rows, lr_size[0], size[0], 0)

    def prepare_points(self, encoded, size, scale, *, count: int) -> tuple[Tensor, ...]:
        """The tensors [B, ...] that `splat_3x3` takes, made once for `count` points an image."""
        return (encoded.features,)

    def splat_3x3(self, splat, y: Tensor, x: Tensor, *, size) -> Tensor:
        """The splatted channels at the 3 x 3 pixels around HR pixels (y, x).

        `splat` is `prepare_points`' tensors, cut to the images [b, ...] of y and x, [b, n] each.
        Returns [b, n, 9, c], row by row, and anything finite beyond the image.
        """
        return splat[0].new_empty(*y.shape, 9, 0)


def split_rows(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """range(start, stop) in so many consecutive parts of nearly the same size, none empty."""
    edges = [start + (stop - start) * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]
