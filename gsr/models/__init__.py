"""GaussianSR: an encoder at LR and one of three heads that render at any size.

A mode is a head: a module with `encode` (features to Gaussians, all at LR), `render` (a whole
picture) and `query` (chosen points). To add one, write the class and name it in `HEADS`.
"""

from __future__ import annotations

import math
from importlib import import_module

from torch import Tensor, nn

from gsr.config import EncoderConfig, ModelConfig
from gsr.errors import InputError
from gsr.models.edsr import EDSR

ENCODERS = {"edsr": EDSR}
HEADS = {
    "direct": "gsr.models.direct:DirectHead",
    "field": "gsr.models.field:FieldHead",
    "official": "gsr.models.official:OfficialHead",
}


def make_encoder(config: EncoderConfig) -> nn.Module:
    """The encoder that `config.name` names."""
    return ENCODERS[config.name](config)


def make_head(config: ModelConfig) -> nn.Module:
    """The head that `config.mode` names."""
    module, name = HEADS[config.mode].split(":")
    return getattr(import_module(module), name)(config)


class GaussianSR(nn.Module):
    """Arbitrary-scale super-resolution by 2D Gaussian splatting (Hu et al., AAAI 2025).

    Args:
        config: the architecture, see `gsr.config.ModelConfig`.
    """

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = config or ModelConfig()
        self.encoder = make_encoder(self.config.encoder)
        self.head = make_head(self.config)

    @property
    def halo(self) -> int:
        """LR pixels on each side that `encode` looks at around one LR pixel."""
        return self.encoder.halo + self.head.halo

    def encode(self, lr: Tensor):
        """LR picture [B, 3, h, w] in [0, 1] to a named tuple of tensors [B, ..., h, w].

        All that is learnt at LR happens here, once, whatever is rendered afterwards.
        """
        return self.head.encode(self.encoder(lr), lr)

    def render(self, encoded, size, scale=None, rows=None) -> Tensor:
        """HR picture [B, 3, H, W] of `size` (H, W) from `encode`'s result, not clamped.

        `scale` (s_y, s_x) matters to `official` only, see `resolve_size`; `rows` (first, last)
        renders only those rows of the picture.
        """
        size, scale = resolve_size(encoded[0].shape[-2:], size, scale)
        return self.head.render(encoded, size, scale, rows)

    def query(self, encoded, size, coord: Tensor, scale=None) -> Tensor:
        """Colours [B, Q, 3] of the HR picture of `size` at `coord` [B, Q, 2].

        `coord` is (y, x) in [-1, 1]; HR pixel i of n has its centre at -1 + (2 i + 1) / n.
        """
        size, scale = resolve_size(encoded[0].shape[-2:], size, scale)
        return self.head.query(encoded, size, coord, scale)

    def forward(self, lr: Tensor, size=None, scale=None, coord: Tensor | None = None) -> Tensor:
        """Upscale `lr` [B, 3, h, w] in [0, 1].

        Args:
            size: (H, W) of the result; or
            scale: a number or (s_y, s_x), from which the size is round(h s_y), round(w s_x).
                Both may be given: the published windows depend on the scale itself.
            coord: [B, Q, 2]; if given, only these points are computed, see `query`.

        Returns:
            [B, 3, H, W], or [B, Q, 3] with `coord`; around [0, 1], not clamped.
        """
        size, scale = resolve_size(lr.shape[-2:], size, scale)
        encoded = self.encode(lr)
        if coord is None:
            return self.head.render(encoded, size, scale, None)
        return self.head.query(encoded, size, coord, scale)


def resolve_size(lr_size, size=None, scale=None) -> tuple[tuple[int, int], tuple[float, float]]:
    """The size (H, W) and scale (s_y, s_x) that a call means, from either or both.

    Raises:
        InputError: neither is given, or one is not positive and finite.
    """
    h, w = lr_size
    if scale is not None:
        scale = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
        if len(scale) != 2 or not all(math.isfinite(s) and s > 0 for s in scale):
            raise InputError(f"scale must be positive and finite, not {scale}")
        scale = (float(scale[0]), float(scale[1]))
    if size is None:
        if scale is None:
            raise InputError("give size=(H, W) or scale")
        size = (round(h * scale[0]), round(w * scale[1]))
    size = (int(size[0]), int(size[1]))
    if min(size) < 1:
        raise InputError(f"size must be at least one pixel a side, not {size[0]} x {size[1]}")
    return size, scale or (size[0] / h, size[1] / w)
