"""The `field` head: what the paper describes, a continuous field of features.

Every LR pixel has one Gaussian, chosen from the bank for that pixel alone, with sigma in LR pixels
and its centre on the pixel. Every HR pixel averages the features of the LR pixels nearest to it,
weighted by their Gaussians. No windows, no taps, no dependence on the batch or on the position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsr.config import ModelConfig
from gsr.models.heads.bank import BankEncoded, BankHead, BoundedBank
from gsr.models.heads.decoder import gather_pixels, neighbours_3x3
from gsr.ops import rows_needed, splat, splat_at

EPS = 1e-12  # far below the least total weight, see BoundedBank: constant features stay constant


class FieldHead(BankHead):
    """Head of `field`.

    Args:
        config: `encoder.n_feats`, `bank` and `decoder` are used.
    """

    def __init__(self, config: ModelConfig):
        self.radius = config.bank.window // 2
        super().__init__(config, BoundedBank(config.bank.points, self.radius))

    def prepare(self, encoded: BankEncoded, scale, *, band=None, shared=None):
        """values [B, 1, c, h, w], sigma [B, 1, 2, h, w], rho and opacity [B, 1, h, w]."""
        sigma, opacity, rho = encoded.gaussians.split([2, 1, 1], dim=1)
        values = encoded.features[:, : self.channels]
        return values[:, None], sigma[:, None], rho, opacity

    def splat_rows(self, gaussians, rows, *, size, band=None) -> Tensor:
        values, sigma, rho, opacity = gaussians
        return splat(
            values, sigma, rho, opacity, size, radius=self.radius, eps=EPS, rows=rows, band=band
        )

    def splat_rows_needed(self, rows, *, lr_size, size, scale) -> tuple[int, int]:
        return rows_needed(rows, lr_size[0], size[0], self.radius)

    def prepare_points(self, encoded: BankEncoded, size, scale, *, count: int):
        """The Gaussians; or for many points the image [B, c, H, W] of all, which is less work."""
        gaussians = self.prepare(encoded, scale)
        if 9 * count < size[0] * size[1]:
            return gaussians
        return (self.splat_rows(gaussians, (0, size[0]), size=size),)

    def splat_3x3(self, gaussians, y: Tensor, x: Tensor, *, size) -> Tensor:
        rows, columns = neighbours_3x3(y, x)  # moved into the image, [b, n, 9] each
        rows, columns = rows.clamp(0, size[0] - 1), columns.clamp(0, size[1] - 1)
        if len(gaussians) == 1:
            return gather_pixels(gaussians[0], rows, columns)
        h, w = gaussians[0].shape[-2:]
        rows = (rows.double() + 0.5) * h / size[0] - 0.5
        columns = (columns.double() + 0.5) * w / size[1] - 0.5
        # LR pixels, rounded as `splat` rounds.
        points = torch.stack([rows, columns], dim=-1).flatten(1, 2)
        values, sigma, rho, opacity = gaussians
        out = splat_at(values, sigma, rho, opacity, points, radius=self.radius, eps=EPS)
        return out.view(*y.shape, 9, self.channels)
