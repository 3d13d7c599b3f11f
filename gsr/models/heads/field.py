"""The `field` head: what the paper describes, a continuous field of features.

Every LR pixel has one Gaussian, chosen from the bank for that pixel alone, with sigma in LR pixels
and its centre on the pixel. Every HR pixel averages the features of the LR pixels nearest to it,
weighted by their Gaussians. No windows, no taps, no dependence on the batch or on the position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsr.config import ModelConfig
from gsr.models.heads.bank import BankEncoded, BankHead, BoundedBank, around, gather_pixels
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

    def splat_rows(self, encoded: BankEncoded, size, scale, band=None, shared=None):
        gaussians = self._gaussians(encoded)
        return lambda first, last: splat(
            *gaussians, size, radius=self.radius, eps=EPS, rows=(first, last), band=band
        )

    def splat_rows_needed(self, rows, lr_size, size, scale) -> tuple[int, int]:
        return rows_needed(rows, lr_size[0], size[0], self.radius)

    def splat_around(self, encoded: BankEncoded, size, scale, queries: int):
        gaussians, (h, w) = self._gaussians(encoded), encoded.features.shape[-2:]
        whole = 9 * queries >= size[0] * size[1]  # then the whole image is less work
        if whole:
            gaussians = (self.splat_rows(encoded, size, scale)(0, size[0]),)

        def splatted(tensors, y: Tensor, x: Tensor) -> Tensor:
            y_all, x_all = around(y, x, size)
            if whole:
                out = gather_pixels(*tensors, y_all, x_all)
            else:
                y_all = (y_all.double() + 0.5) * h / size[0] - 0.5
                x_all = (x_all.double() + 0.5) * w / size[1] - 0.5
                points = torch.stack([y_all, x_all], dim=-1)  # LR pixels, rounded as `splat` rounds
                out = splat_at(*tensors, points, radius=self.radius, eps=EPS)
            return out.view(*y.shape, 9, self.config.channels)

        return gaussians, splatted

    def _gaussians(self, encoded: BankEncoded) -> tuple[Tensor, ...]:
        """values [B, 1, c, h, w], sigma [B, 1, 2, h, w], rho and opacity [B, 1, h, w]."""
        sigma, opacity, rho = encoded.gaussians.split([2, 1, 1], dim=1)
        values = encoded.features[:, : self.config.channels]
        return values[:, None], sigma[:, None], rho, opacity
