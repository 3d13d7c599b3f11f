"""Losses: of what a model renders and the HR pixels, both around [0, 1].

A loss is a function of (out, target), tensors of one shape, to a number. It gets the sampled
queries, [B, Q, 3], or, if it has the attribute `dense` and that is true, whole HR patches,
[B, 3, H, W]. A weighted sum with one such term renders patches for all of its terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gsr import parts
from gsr.config import LossConfig
from gsr.errors import InputError

LOSSES = {name: f"gsr.losses.{name}" for name in ("l1", "mse", "charbonnier", "fft")}


def l1(out: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (out - target).abs().mean()


def mse(out: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return (out - target).square().mean()


def charbonnier(out: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt(difference^2 + eps^2): l1 with a smooth minimum.

    Source: Lai et al., "Deep Laplacian Pyramid Networks" (LapSRN), CVPR 2017, section 3.3.
    """
    return ((out - target).square() + eps**2).sqrt().mean()


def fft(out: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of real and imaginary parts of the orthonormal Fourier transform.

    Source: Cho et al., "Rethinking Coarse-to-Fine Approach in Single Image Deblurring" (MIMO-UNet),
    ICCV 2021, section 3.4, there without the factor of orthonormality.
    """
    return torch.view_as_real(torch.fft.rfft2(out - target, norm="ortho")).abs().mean()


fft.dense = True


class WeightedSum(nn.Module):
    """The weighted sum of the losses that `train.loss` names.

    Modules among them move to the model's device with it; nothing of theirs is trained.

    Attributes:
        dense: whether it takes whole HR patches.

    Raises:
        InputError: a name that cannot be found, a key that the loss does not take, or, when it is
            called, a loss that gives no number.
    """

    def __init__(self, terms: Sequence[LossConfig]):
        super().__init__()
        self.terms = [(term, *_make(term)) for term in terms]
        self.dense = any(dense for *_, dense in self.terms)
        self.frozen = nn.ModuleList(
            loss for _, loss, _ in self.terms if isinstance(loss, nn.Module)
        )
        self.frozen.requires_grad_(False)

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        """out and target [B, Q, 3], or [B, 3, H, W] where `dense`."""
        total = out.new_zeros(())
        for term, loss, dense in self.terms:
            pair = out, target
            if self.dense and not dense:  # all pixels are its queries
                pair = (x.flatten(2).mT for x in pair)
            value = loss(*pair)
            if not isinstance(value, Tensor) or value.numel() != 1:
                given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"train.loss: {term.name} gives {given}; it must give a tensor of one number"
                )
            total = total + term.weight * value
        return total


def _make(term: LossConfig) -> tuple[Callable[[Tensor, Tensor], Tensor], bool]:
    """A loss, and whether it takes whole HR patches."""
    key = f"train.loss: {term.name}"
    part = loss = parts.find(term.name, LOSSES, "train.loss")
    if isinstance(part, type):
        part = loss = parts.make(part, (), term.keys, key)
    else:
        parts.check_keys(part, (None, None), term.keys, key)
        loss = functools.partial(part, **term.keys)
    return loss, getattr(part, "dense", False) if term.dense is None else term.dense
