"""The Gaussian bank, and what `official` and `field` build around it.

A bank holds N Gaussians. At every LR pixel a classifier weighs them ("selective Gaussian
assignment"), and the pixel's own Gaussian is the weighted mean of their parameters. The first few
feature channels are splatted with these Gaussians, the others are resized bicubically, and a
Fourier decoder turns both into colours. The two modes differ in the splat only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gsr.config import ModelConfig
from gsr.device import autocast_dtype
from gsr.errors import InputError
from gsr.models.heads.decoder import FourierDecoder, neighbourhoods
from gsr.ops import rows_needed
from gsr.ops.resize import bicubic_rows


def assign(
    logits: Tensor, kind: str, hard: bool = False, seeds: Sequence[int] | None = None
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
    base: Tensor  # see `FourierDecoder.base`


class BankHead(nn.Module):
    """What `official` and `field` share: everything but the splat.

    A subclass gives `splat_rows` and `splat_around`, each of which prepares a splat onto an HR
    image and returns a function that evaluates some of it.

    Args:
        config: the model's.
        bank: the Gaussians to choose from.
    """

    halo = 1  # the classifier
    seeds: Sequence[int] | None = None  # of the Gumbel noise in training, see `assign`

    def __init__(self, config: ModelConfig, bank: GaussianBank):
        super().__init__()
        n_feats, self.config = config.encoder.n_feats, config.bank
        self.classifier = nn.Conv2d(n_feats, self.config.points, 3, padding=1)
        self.bank = bank
        self.decoder = FourierDecoder(n_feats, config.decoder)

    def encode(self, features: Tensor, lr: Tensor) -> BankEncoded:
        """Features [B, C, h, w] to features and Gaussians; the Gumbel noise is drawn here."""
        logits = self.classifier(features)
        kind = self.config.train_assignment if self.training else self.config.assignment
        with torch.autocast(features.device.type, enabled=False):
            if features.dtype in (torch.float16, torch.bfloat16):  # HR is always fp32
                features, logits = features.float(), logits.float()
            weights = assign(logits, kind, not self.training, self.seeds if self.training else None)
            return BankEncoded(features, self.bank(weights), self.decoder.base(lr))

    def rows_needed(self, rows, lr_size, size, scale) -> tuple[int, int]:
        """First and end of the LR rows on which HR rows depend."""
        rows = max(rows[0] - 1, 0), min(rows[1] + 1, size[0])  # the decoder's 3 x 3 convolutions
        splat = self.splat_rows_needed(rows, lr_size, size, scale)
        rest = rows_needed(rows, lr_size[0], size[0], 2)  # the taps of bicubic resizing
        return min(splat[0], rest[0]), max(splat[1], rest[1])

    def render(
        self, encoded: BankEncoded, size, scale, rows=None, band=None, shared=None
    ) -> Tensor:
        """See `GaussianSR.render`. Nothing but the result is held for more than a strip of rows.

        Within torch.autocast to bfloat16 the decoder multiplies matrices in that.
        """
        device = encoded.features.device.type
        dtype = autocast_dtype(device) or torch.float32
        with torch.autocast(device, enabled=False):
            out = self._render(encoded, size, scale, rows, band, shared, dtype)
            return self.decoder.over(out, encoded.base, size, rows, band)

    def _render(self, encoded: BankEncoded, size, scale, rows, band, shared, dtype) -> Tensor:
        splat = self.splat_rows(encoded, size, scale, band, shared)
        channels = self.config.channels

        def strip(first: int, last: int) -> tuple[Tensor, Tensor]:
            tall = bicubic_rows(encoded.features[:, channels:], size[0], (first, last), band)
            return splat(first, last), tall

        b, _, h, w = encoded.features.shape
        lr_size = h if band is None else band[1], w
        return self.decoder.render(strip, channels, b, lr_size, size, rows, dtype)

    def query(self, encoded: BankEncoded, size, coord: Tensor, scale) -> Tensor:
        """See `GaussianSR.query`."""
        tensors, splat = self.splat_around(encoded, size, scale, coord.shape[1])

        def neighbours(tensors, y: Tensor, x: Tensor) -> Tensor:
            features, *rest = tensors
            return neighbourhoods(features, splat(rest, y, x), size, y, x)

        lr_size = encoded.features.shape[-2:]
        tensors = encoded.features, *tensors
        out = self.decoder.query(neighbours, tensors, coord, lr_size, size)
        return self.decoder.over_at(out, encoded.base, coord)

    def splat_rows(self, encoded: BankEncoded, size, scale, band=None, shared=None):
        """A function of (first, last) giving those rows of the splatted stream [B, c, rows, W]."""
        raise NotImplementedError

    def splat_rows_needed(self, rows, lr_size, size, scale) -> tuple[int, int]:
        """First and end of the LR rows on which those rows of it depend."""
        raise NotImplementedError

    def splat_around(self, encoded: BankEncoded, size, scale, queries: int):
        """Tensors [B, ...], and a function of such for some images and of HR pixels (y, x),
        [B, Q] each, giving [B, Q, 9, c]: the splatted stream at the 3 x 3 pixels around each, row
        by row, and anything finite beyond the image."""
        raise NotImplementedError


def around(y: Tensor, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The 3 x 3 pixels around pixels (y, x), [B, Q] each, moved into an image: [B, 9 Q] each."""
    step = torch.arange(-1, 2, device=y.device)
    y, x = y[..., None] + step.repeat_interleave(3), x[..., None] + step.repeat(3)
    return y.clamp(0, size[0] - 1).flatten(1), x.clamp(0, size[1] - 1).flatten(1)


def gather_pixels(values: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Pixels (y, x), [B, P] each, of an image [B, C, H, W]: [B, P, C]."""
    b, c, h, w = values.shape
    image = torch.arange(b, device=y.device)[:, None]
    index = ((image * h + y) * w + x).flatten()
    return values.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, index).view(*y.shape, c)
