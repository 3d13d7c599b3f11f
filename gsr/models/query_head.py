"""A base for heads of one's own whose colour at a point is a function of the LR pixels near it.

A subclass gives `encode` and `colour`; whole images, single points and strips of rows follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.device import at_once
from gsr.ops import rows_needed

POINTS = 2**14  # HR pixels rendered at once


class QueryHead(nn.Module):
    """A head that is called for colours at positions in LR.

    A subclass may take any keyword arguments besides `n_feats`, which are the keys of `model.head`.

    Attributes:
        halo: LR pixels around a pixel on which `encode` depends there, such as 1 of a 3 x 3
            convolution.
        reach: LR pixels that `colour` reads on each side of the pixel nearest to a position.
    """

    halo = 0
    reach = 1

    def encode(self, features: Tensor, lr: Tensor, seeds=None) -> NamedTuple:
        """Features [B, n_feats, h, w] and LR [B, 3, h, w] to a named tuple of [B, ..., h, w].

        `seeds` are one an image, in training, for a head that draws random numbers.
        """
        raise NotImplementedError

    def colour(self, encoded: NamedTuple, position: Tensor, cell: Tensor) -> Tensor:
        """Colours [B, P, 3] at `position` [B, P, 2], which should be continuous in it.

        Args:
            encoded: what `encode` gave, of all LR rows or of some.
            position: (y, x) in LR pixels of `encoded`; pixel i has its centre at i.
            cell: [2], sides (y, x) of an HR pixel in LR pixels.
        """
        raise NotImplementedError

    def rows_needed(self, rows, lr_size, size, scale) -> tuple[int, int]:
        """LR rows, start and stop, on which HR rows depend."""
        return rows_needed(rows, lr_size[0], size[0], self.reach)

    def render(self, encoded, size, scale=None, rows=None, band=None, shared=None) -> Tensor:
        """See `GaussianSR.render`."""
        start, stop = rows or (0, size[0])
        b, (h, w), device = len(encoded[0]), encoded[0].shape[-2:], encoded[0].device
        top, height = band or (0, h)
        y = _centres(start, stop, height, size[0], device) - top
        x = _centres(0, size[1], w, size[1], device)
        strips = []
        for part in y.split(max(1, at_once(POINTS, encoded[0]) // (b * size[1]))):
            position = torch.stack(torch.meshgrid(part, x, indexing="ij"), dim=-1)
            colours = self._colour(encoded, position.flatten(0, 1).expand(b, -1, -1), height, size)
            strips.append(colours.mT.unflatten(2, (len(part), size[1])))
        return torch.cat(strips, dim=2)

    def query(self, encoded, size, coord: Tensor, scale=None) -> Tensor:
        """See `GaussianSR.query`."""
        extent = torch.tensor(encoded[0].shape[-2:], device=coord.device)
        position = ((coord.double() + 1) * extent - 1) / 2
        return self._colour(encoded, position, encoded[0].shape[-2], size)

    def _colour(self, encoded, position: Tensor, height: int, size) -> Tensor:
        """`colour`, in float32 at least, of an LR image of that height."""
        half = torch.float16, torch.bfloat16
        with torch.autocast(position.device.type, enabled=False):
            encoded = type(encoded)._make(t.float() if t.dtype in half else t for t in encoded)
            like = encoded[0]
            cell = like.new_tensor([height / size[0], like.shape[-1] / size[1]])
            return self.colour(encoded, position.to(like.dtype), cell)


def _centres(start: int, stop: int, n: int, n_hr: int, device: torch.device) -> Tensor:
    """Centres of HR pixels start to stop of n_hr, in LR pixels of n; float64."""
    return (torch.arange(start, stop, device=device, dtype=torch.float64) + 0.5) * n / n_hr - 0.5


def bilinear_at(values: Tensor, position: Tensor) -> Tensor:
    """Values [B, C, h, w] at `position` [B, P, 2] in their pixels, interpolated: [B, P, C]."""
    size = position.new_tensor(values.shape[-2:])
    grid = (2 * position + 1) / size - 1
    grid = grid.flip(-1)[:, :, None]  # (x, y)
    read = F.grid_sample(values, grid, "bilinear", "border", align_corners=False)
    return read[..., 0].mT
