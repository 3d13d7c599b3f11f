"""EDSR on a GPU, in fewer passes over memory than its layers take one by one.

There a layer at LR costs what reading and writing its feature maps costs. PyTorch convolves, adds
the bias and applies the ReLU in three passes; cuDNN does all that in one, without anything being
compiled. What adds the bias and the skip connection is one kernel (`gsr.ops.residual`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.models.encoders.edsr import EDSR, ResBlock
from gsr.ops.residual import add_residual

ALIGNED = 8  # channels: tensor cores of 16-bit types take so many at a time


def fast_encoder(encoder: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What computes `encoder(lr)` on its GPU, in inference, in float32 or bfloat16.

    The weights are cast once, now. An encoder other than EDSR is called as it is, and expects to be
    within torch.autocast for bfloat16.
    """
    if type(encoder) is EDSR:
        return FusedEDSR(encoder, dtype)
    if dtype == torch.float32:
        return encoder
    return lambda lr: encoder(lr.contiguous(memory_format=torch.channels_last))


class FusedEDSR:
    """An EDSR with its weights in `dtype`; called with lr [B, 3, h, w] as that is.

    Matrix units want channels last; without them, in float32, planes are faster.
    """

    def __init__(self, encoder: EDSR, dtype: torch.dtype):
        self.dtype = dtype
        self.format: Any = (
            torch.contiguous_format if dtype == torch.float32 else torch.channels_last
        )
        head, *convs = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
        self.head = _with_bias(head).to(dtype, memory_format=self.format)
        # All of one shape, so that they are cast at once: two operations, not two for each.
        weights = torch.stack([c.weight for c in convs])  # [2 n + 1, C, C, 3, 3]
        biases = torch.stack([c.bias for c in convs])  # pyright: ignore[reportArgumentType]
        if dtype != torch.float32:
            last = weights.permute(0, 1, 3, 4, 2)
            last = last.to(dtype, memory_format=torch.contiguous_format)
            weights, biases = last.permute(0, 1, 4, 2, 3), biases.to(dtype)
        self.convs = list(zip(weights, biases, strict=True))
        self.scales = [m.res_scale for m in encoder.modules() if isinstance(m, ResBlock)]

    def __call__(self, lr: Tensor) -> Tensor:
        # The bias of the first convolution is the weight of a channel of ones: no pass for it.
        x = F.pad((lr - 0.5) / 0.5, (0, 0, 0, 0, 0, self.head.shape[1] - 3))
        x[:, 3].fill_(1)
        x = x.to(self.dtype, memory_format=self.format)
        x = first = F.conv2d(x, self.head, padding=1)
        pairs = zip(self.convs[0:-1:2], self.convs[1::2], self.scales, strict=True)
        for first_conv, (weight, bias), scale in pairs:
            y = relu_convolution(x, *first_conv)
            x = add_residual(F.conv2d(y, weight, padding=1), bias, x, scale)
        weight, bias = self.convs[-1]
        return add_residual(F.conv2d(x, weight, padding=1), bias, first)


def _with_bias(conv: nn.Conv2d) -> Tensor:
    """The weight of a convolution of three channels and of a fourth, of ones, for the bias.

    More channels of zeros make them as many as tensor cores take.
    """
    if conv.bias is None:
        raise TypeError("the encoder's first convolution must have a bias")
    up, left = (n // 2 for n in conv.kernel_size)
    plane = F.pad(conv.bias[:, None, None, None], (left, left, up, up))
    weight = torch.cat([conv.weight, plane], dim=1)
    return F.pad(weight, (0, 0, 0, 0, 0, ALIGNED - weight.shape[1]))


def relu_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(conv2d(x)), with the zero padding that keeps the size, in one pass where cuDNN can."""
    padding = [n // 2 for n in weight.shape[2:]]
    if _has_fused(x.device, x.dtype):
        return torch.cudnn_convolution_relu(x, weight, bias, [1, 1], padding, [1, 1], 1)
    return F.conv2d(x, weight, bias, padding=padding).relu_()


def relu_layer(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """relu(conv(x)) of a head; on a GPU, without gradients, in one pass and in the type of x."""
    plain, bias = torch.compiler.is_compiling() or torch.is_grad_enabled(), conv.bias
    if plain or bias is None or not _has_fused(x.device, x.dtype):
        return F.relu(conv(x))
    last = x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    return relu_convolution(x, conv.weight.to(x.dtype, memory_format=form), bias.to(x.dtype))


@functools.cache
def _has_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN convolves with bias and ReLU there; tried, since PyTorch does not say."""
    if device.type != "cuda" or torch.version.hip or not torch.backends.cudnn.is_available():
        return False
    x, weight = (torch.zeros(ALIGNED, ALIGNED, 3, 3, device=device, dtype=dtype) for _ in range(2))
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    try:
        torch.cudnn_convolution_relu(x, weight, x[0, :, 0, 0], [1, 1], [1, 1], [1, 1], 1)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True
