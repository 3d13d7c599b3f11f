"""The Gaussian bank, and what `official` and `field` build around it.

A bank holds N Gaussians. At every LR pixel a classifier weighs them ("selective Gaussian
assignment"), and the pixel's own Gaussian is the weighted mean of their parameters. With these
Gaussians the first few feature channels are splatted, see `gsr.models.heads.fourier`. The two modes
differ in the splat only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gsr.config import ModelConfig
from gsr.errors import InputError
from gsr.models.heads.decoder import FourierDecoder, float32_at_least
from gsr.models.heads.fourier import FourierHead


def assign(
    logits: Tensor, kind: str, *, hard: bool = False, seeds: Sequence[int] | None = None
) -> Tensor:
    """Weights of the Gaussians of the bank at every pixel, summing to 1: [B, N, h, w] both.

    Args:
        kind: "argmax", one-hot of the largest logit (no gradient); "softmax"; or "gumbel", a sample
            of the Gumbel-softmax distribution at temperature 1.
        hard: round a Gumbel sample to one-hot (straight-through gradient).
        seeds: of the noise, one an image, which then depends on nothing else in the batch; None:
            PyTorch's global generator.

    Raises:
        InputError: another kind.

    Source: GaussianSR (AAAI 2025), section 3.2; argmax is the mode of the Gumbel distribution.
    """
    if kind == "argmax":
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1)
    if kind == "softmax":
        return logits.softmax(1)
    if kind == "gumbel":
        # As F.gumbel_softmax, whose exponentially distributed numbers take the CPU 3 times as long.
        gumbel = -_uniform(logits, seeds).log_().neg_().log_()
        soft = (logits + gumbel.to(logits.dtype)).softmax(1)
        return assign(soft, "argmax") + soft - soft.detach() if hard else soft
    raise InputError(f"the assignment must be argmax, softmax or gumbel, not {kind!r}")


def _uniform(like: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """Random numbers in [0, 1), float32, in the shape and on the device of `like`."""
    out = torch.empty_like(like, dtype=torch.float32)
    if seeds is None:
        return out.uniform_()
    generator = torch.Generator(like.device)
    for noise, seed in zip(out, seeds, strict=True):
        noise.uniform_(generator=generator.manual_seed(seed))
    return out


class GaussianBank(nn.Module):
    """N learnt Gaussians: unconstrained, as published.

    Starts as a grid of sigma in [0.2, 3] for (sigma_x, sigma_y), opacity sigmoid(1) and rho 0.
    As published, sigma_x acts down the rows.

    Args:
        points: N, a square number.
    """

    def __init__(self, points: int):
        super().__init__()
        side = math.isqrt(points)
        sigma_x, sigma_y, opacity = self._start(side)
        self.sigma_x = nn.Parameter(sigma_x.repeat_interleave(side))
        self.sigma_y = nn.Parameter(sigma_y.repeat(side))
        self.opacity = nn.Parameter(torch.full((points, 1), opacity))
        self.rho = nn.Parameter(torch.zeros(points, 1))

    def _start(self, side: int) -> tuple[Tensor, Tensor, float]:
        grid = torch.linspace(0.2, 3.0, side)
        return grid, grid, 1 / (1 + math.exp(-1))

    def table(self) -> Tensor:
        """[N, 4]: sigma down the rows, sigma along the columns, opacity, rho."""
        sigma = torch.stack([self.sigma_x, self.sigma_y], dim=1)
        return torch.cat([sigma, self.opacity, self.rho], dim=1)

    def forward(self, assignment: Tensor) -> Tensor:
        """Weights [B, N, h, w] to each pixel's own Gaussian [B, 4, h, w], in `table`'s order."""
        return torch.einsum("bnhw,np->bphw", assignment, self.table())


class BoundedBank(GaussianBank):
    """A bank whose Gaussians stay within bounds, in LR pixels; what is learnt is unconstrained.

    sigma lies between 1/4 and (radius + 1/2) / 4, so that a Gaussian has faded to exp(-8) of its
    peak where its window ends and the field has no seams there; |rho| < 3/4; opacity in (0, 1). The
    lower bound of sigma and that of rho keep the total weight above 1e-7 of the opacity midway
    between pixels, so the field has no holes either. A weighted mean stays within the same bounds.

    Args:
        points: N, a square number.
        radius: of the window, LR pixels, at least 1.
    """

    def __init__(self, points: int, radius: int):
        self.low, self.high = 0.25, (radius + 0.5) / 4
        super().__init__(points)

    def _start(self, side: int) -> tuple[Tensor, Tensor, float]:
        grid = torch.logit(torch.linspace(0.1, 0.9, side))  # evenly over the middle of the range
        return grid, grid, 1.0

    def table(self) -> Tensor:
        raw = super().table()
        sigma = self.low + (self.high - self.low) * torch.sigmoid(raw[:, :2])
        opacity, rho = torch.sigmoid(raw[:, 2:3]), 0.75 * torch.tanh(raw[:, 3:])
        return torch.cat([sigma, opacity, rho], dim=1)


class BankEncoded(NamedTuple):
    """An image as features and one Gaussian per LR pixel."""

    features: Tensor  # [B, C, h, w]
    gaussians: Tensor  # [B, 4, h, w], in the order of `GaussianBank.table`
    lr: Tensor  # [B, 3, h, w]; [B, 0, h, w] without a skip connection


class BankHead(FourierHead):
    """What `official` and `field` share: everything but the splat.

    Args:
        config: the model's.
        bank: the Gaussians to choose from.
    """

    halo = 1  # the classifier

    def __init__(self, config: ModelConfig, bank: GaussianBank):
        super().__init__()
        n_feats, self.config = config.encoder.n_feats, config.bank
        self.channels = self.config.channels
        self.classifier = nn.Conv2d(n_feats, self.config.points, 3, padding=1)
        self.bank = bank
        self.decoder = FourierDecoder(n_feats, config.decoder)

    def encode(
        self, features: Tensor, lr: Tensor, seeds: Sequence[int] | None = None
    ) -> BankEncoded:
        """Features [B, C, h, w] and LR [B, 3, h, w] to features and Gaussians.

        The Gumbel noise is drawn here, if any; `seeds` are those of `assign`.
        """
        logits = self.classifier(features)
        kind = self.config.train_assignment if self.training else self.config.assignment
        lr = lr if self.decoder.skip else lr[:, :0]
        with torch.autocast(features.device.type, enabled=False):
            features, logits, lr = (float32_at_least(t) for t in (features, logits, lr))
            weights = assign(logits, kind, hard=not self.training, seeds=seeds)
            return BankEncoded(features, self.bank(weights), lr)
