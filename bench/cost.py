"""Bytes and operations of the splat by formula: what any implementation has to do at least.

Bytes count every input once and every output once. Operations are those of the formula in
`gsr.ops.reference.splat_at`, a multiply-add being two, exp and a division being one each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: b pictures, K Gaussians a pixel, C channels, radius R, h x w to H x W.

    With `points`, that many points a picture take the place of the H W pixels.
    """

    K: int
    C: int
    R: int
    h: int
    w: int
    H: int
    W: int
    b: int = 1
    offset: bool = True
    normalize: bool = True
    itemsize: int = 4
    points: int = 0

    @property
    def pixels(self) -> int:
        return self.b * (self.points or self.H * self.W)

    @property
    def gaussians(self) -> int:
        return self.b * self.K * self.h * self.w

    @property
    def weights(self) -> int:
        """Weights of all pixels, those beyond the border included."""
        return self.pixels * self.K * (2 * self.R + 1) ** 2

    @property
    def numbers(self) -> int:
        """What describes a Gaussian: values, sigma, rho, opacity and, if there, offset."""
        return self.C + 4 + 2 * self.offset


def forward_bytes(s: Shape) -> int:
    coordinates = 16 * s.pixels if s.points else 0  # two float64 a point
    return s.itemsize * (s.gaussians * s.numbers + s.pixels * s.C) + coordinates


def backward_bytes(s: Shape) -> int:
    """Gaussians and the incoming gradient in, float32 gradients of every input out."""
    return forward_bytes(s) + 4 * s.gaussians * s.numbers


def forward_operations(s: Shape) -> int:
    """A weight: place 2, q 7, its factor, exp, opacity 3, sums 2 C (and 1 if they are divided)."""
    return s.weights * (12 + 2 * s.C + s.normalize) + s.pixels * s.C * s.normalize


def backward_operations(s: Shape) -> int:
    """The weights again, then for each: its gradient 2 C (+ 1), values 2 C, opacity 2, dq 2 and its
    moments, 5 products and 5 sums and the 2 products they share."""
    again = forward_operations(s) if s.normalize else 0
    return again + s.weights * (12 + 4 * s.C + s.normalize + 16)
