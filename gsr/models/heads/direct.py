"""The `direct` head: every LR pixel emits K coloured Gaussians, and nothing learnt runs at HR.

HR = LR upsampled bicubically + splat of the Gaussians, so an image that has been encoded once can
be rendered at any size for the price of the splat.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.config import ModelConfig
from gsr.models.fused import relu_layer
from gsr.ops import packed, reference, rows_needed, splat, splat_at
from gsr.ops.arguments import Packed
from gsr.ops.resize import bicubic, bicubic_at

CHANNELS = 9  # of a Gaussian, see `gsr.ops.reference.direct_gaussians`
# While the residual is still noise, every step that makes the hidden channels smaller lowers the
# loss; a ReLU that has reached zero everywhere would stay there, for want of a gradient.
ACTIVATIONS = {"leaky_relu": functools.partial(F.leaky_relu, negative_slope=0.1), "relu": F.relu}


class DirectEncoded(NamedTuple):
    """An image as Gaussians; shapes and units as in `gsr.ops.splat`."""

    lr: Tensor  # [B, 3, h, w]
    colour: Tensor  # [B, K, 3, h, w]
    sigma: Tensor  # [B, K, 2, h, w]
    rho: Tensor  # [B, K, h, w]
    opacity: Tensor  # [B, K, h, w]
    offset: Tensor  # [B, K, 2, h, w]


class DirectPacked(NamedTuple):
    """The same as kernels read it, see `gsr.ops.arguments.Packed`: 36 bytes a Gaussian.

    `unpack` gives the parameters.
    """

    lr: Tensor
    conic: Tensor
    centre: Tensor
    blue: Tensor

    def unpack(self) -> DirectEncoded:
        """The Gaussians, but for rounding, as `DirectHead.encode` gives them elsewhere."""
        colour, sigma, rho, opacity, offset = reference.unpack(Packed(*self[1:]))
        assert offset is not None
        return DirectEncoded(self.lr, colour, sigma, rho, opacity, offset)


class DirectHead(nn.Module):
    """Features [B, C, h, w] to Gaussians, Gaussians to images.

    A window of radius r ends at least r + 1/2 LR pixels from a pixel's centre. With offsets within
    `reach` and sigma at most (r + 1/2 - reach) / 3, every Gaussian has fallen to exp(-4.5) of its
    peak or less where its window ends, so that the image shows no seams there.
    """

    halo = 1  # a 3 x 3 convolution
    eps = 1e-2  # where the total weight is far below it, the residual fades out

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config.direct
        self.gaussians, self.radius, self.normalize = c.gaussians, c.radius, c.normalize
        self.reach, self.sigma_range = c.reach, (0.1, (c.radius + 0.5 - c.reach) / 3)
        self.activation = ACTIVATIONS[c.activation]
        self.hidden = nn.Conv2d(config.encoder.n_feats, c.width, 3, padding=1)
        self.out = nn.Conv2d(c.width, c.gaussians * CHANNELS, 1)
        self._start()

    def _start(self):
        """Start as bicubic upsampling: no colour, Gaussians spread evenly over the pixel."""
        side = math.ceil(math.sqrt(self.gaussians))
        with torch.no_grad():
            shape = self.gaussians, CHANNELS, -1
            weight, bias = (p.view(shape) for p in self.out.parameters())
            weight.mul_(0.1)
            weight[:, :3] = 0
            bias.zero_()
            for k in range(self.gaussians):
                for axis, i in enumerate((k // side, k % side)):
                    centre = (i + 0.5) / side - 0.5
                    bias[k, 5 + axis] = math.atanh(centre / self.reach)

    def encode(self, features: Tensor, lr: Tensor, seeds=None) -> DirectEncoded | DirectPacked:
        """Features [B, C, h, w] and LR [B, 3, h, w] to Gaussians, in float32.

        On CUDA without gradients they are packed.
        """
        if self.activation is F.relu:
            x = self.out(relu_layer(self.hidden, features))
        else:
            x = self.out(self.activation(self.hidden(features)))
        arguments = self.gaussians, self.sigma_range, self.reach
        if packed.serves(x) and lr.dtype == torch.float32:
            return DirectPacked(lr, *packed.pack(x, *arguments))
        # Planes: what is computed from here on, and the splat, take a parameter at a time.
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
        colour, sigma, rho, opacity, offset = reference.direct_gaussians(x, *arguments)
        assert offset is not None
        return DirectEncoded(lr, colour, sigma, rho, opacity, offset)

    def rows_needed(self, rows, *, lr_size, size, scale=None) -> tuple[int, int]:
        """See `GaussianSR.rows_needed`; a bicubic tap is within 2."""
        return rows_needed(rows, lr_size[0], size[0], max(self.radius, 2))

    def render(
        self, encoded, size, scale=None, *, rows=None, band=None, shared=None, levels=False
    ) -> Tensor:
        """See `GaussianSR.render`.

        With `levels` the image as files hold it, clamped: uint8 [B, H, W, 3].
        """
        e, how = encoded, (self.radius, self.normalize, self.eps)
        if isinstance(e, DirectPacked):
            gaussians = Packed(*e[1:])
            return packed.splat_packed(gaussians, e.lr, size, *how, rows, band, levels)
        residual = splat(
            e.colour, e.sigma, e.rho, e.opacity, size, e.offset, *how, rows=rows, band=band
        )
        image = bicubic(e.lr, size, rows, band) + residual
        return reference.to_levels(image) if levels else image

    def query(self, encoded, size, coord: Tensor, scale=None) -> Tensor:
        """See `GaussianSR.query`."""
        e = encoded.unpack() if isinstance(encoded, DirectPacked) else encoded
        # In LR pixels; by numbers rather than a tensor of them, for which a GPU would wait.
        y, x = coord.unbind(-1)
        h, w = e.lr.shape[-2:]
        points = torch.stack([((y + 1) * h - 1) / 2, ((x + 1) * w - 1) / 2], dim=-1)
        residual = splat_at(
            e.colour, e.sigma, e.rho, e.opacity, points, e.offset, self.radius,
            self.normalize, self.eps,
        )  # fmt: skip
        return bicubic_at(e.lr, coord) + residual
