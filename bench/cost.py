"""Bytes and operations of the splat by formula, and multiply-adds of a whole model as counted.

Of the splat it is what any implementation has to do at least. Bytes count every input once and
every output once. Operations are those of the formula in `gsr.ops.reference.splat_at`, a
multiply-add being two, exp and a division being one each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gsr.config import ModelConfig
from gsr.models import GaussianSR

COST_SIDE, COST_SCALE = 48, 4  # side of the LR image, and scale, at which a model is counted


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: b images, K Gaussians a pixel, C channels, radius R, h x w to H x W.

    With `points`, that many points an image take the place of the H W pixels.
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


def model_cost(config: ModelConfig) -> dict[str, Any]:
    """Count the parameters and multiply-adds of a model.

    Returns:
        "parameters"; "lr_macs", multiply-adds of convolutions and matrix products for an LR pixel
        that is encoded, and "hr_macs" for an HR pixel that is rendered at x4: half the FLOPs that
        PyTorch counts; "splat_weights", the Gaussians that are weighed for an HR pixel (None in a
        mode without). Not counted: those weights, what is done to single numbers, and bicubic
        resizing.
    """
    with torch.random.fork_rng(devices=[]):
        model = GaussianSR(config).eval()
    lr, size = torch.zeros(1, 3, COST_SIDE, COST_SIDE), (COST_SIDE * COST_SCALE,) * 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what other threads do is not counted
    try:
        # With gradients and plain attention: the CPU's quicker ways hide products.
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.enable_grad(), plain, FlopCounterMode(display=False) as counter:
            encoded = model.encode(lr)
            encode = counter.get_total_flops()
            model.render(encoded, size, COST_SCALE)
            render = counter.get_total_flops() - encode
    finally:
        torch.set_num_threads(threads)
    near = config.direct.gaussians * (2 * config.direct.radius + 1) ** 2
    weights = {"direct": near, "field": config.bank.window**2, "official": config.bank.window**2}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "lr_macs": encode / 2 / COST_SIDE**2,
        "hr_macs": render / 2 / math.prod(size),
        "splat_weights": weights.get(config.mode),
    }
