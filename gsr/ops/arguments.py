"""The arguments of a splat in three parts: which Gaussians, how they are weighed, which pixels.

`gsr.ops.splat` and the operators in PyTorch's registry take flat arguments, everything behind them
(`reference`, `cpu`, the launchers of `gsr.kernels`) takes these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Gaussians(NamedTuple):
    """K Gaussians at every LR pixel, or the gradients of their parameters.

    Attributes:
        values: [B, K, C, h, w], what they carry (colours, features).
        sigma: [B, K, 2, h, w], standard deviations (y, x) in LR pixels, > 0.
        rho: [B, K, h, w], correlation in (-1, 1).
        opacity: [B, K, h, w], peak weight, >= 0.
        offset: [B, K, 2, h, w], centre (y, x) relative to the LR pixel's, LR pixels; or None.
    """

    values: Tensor
    sigma: Tensor
    rho: Tensor
    opacity: Tensor
    offset: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Gaussians:
        """The function's result for every tensor."""
        values, sigma, rho, opacity, offset = self
        return Gaussians(
            function(values), function(sigma), function(rho), function(opacity),
            None if offset is None else function(offset),
        )  # fmt: skip


def split_channels(gaussians: Gaussians, most: int) -> list[Gaussians]:
    """The same Gaussians several times, with at most so many channels of their values each."""
    return [gaussians._replace(values=part) for part in torch.split(gaussians.values, most, dim=2)]


def join_channels(parts: list[Gaussians]) -> Gaussians:
    """Gradients for all channels from those for the parts of `split_channels`.

    The gradient of a weight is a sum over channels, and so are those of what makes the weight.
    """
    if len(parts) == 1:
        return parts[0]
    values, sigma, rho, opacity, offset = zip(*parts, strict=True)

    def total(gradients: Sequence[Tensor]) -> Tensor:
        return functools.reduce(torch.add, gradients)

    return Gaussians(
        torch.cat(values, dim=2), total(sigma), total(rho), total(opacity),
        None if offset[0] is None else total(offset),
    )  # fmt: skip


class Packed(NamedTuple):
    """K Gaussians of three colours at every LR pixel, as the kernels of `direct` read them.

    A complex128 stands for four float32, which a GPU loads at once. So all are [B, K, h, w].

    Attributes:
        conic: a, b, c and log2(opacity) of weight 2^(a dy^2 + b dy dx + c dx^2 + log2(opacity)).
        centre: offset y and x, LR pixels; red, green.
        blue: float32.
    """

    conic: Tensor
    centre: Tensor
    blue: Tensor


class Weighting(NamedTuple):
    """How Gaussians are weighed.

    Attributes:
        radius: the (2 radius + 1)^2 nearest LR pixels take part.
        normalize: divide by the total weight plus eps.
        eps: > 0.
    """

    radius: int
    normalize: bool
    eps: float


class Grid(NamedTuple):
    """The HR pixels to splat onto: rows of an image, seen from a band of LR rows.

    Attributes:
        size: (H, W).
        rows: (start, stop), of H.
        band: (top, height): the tensors hold only the rows from `top` on of an LR image that high.
    """

    size: tuple[int, int]
    rows: tuple[int, int]
    band: tuple[int, int]
