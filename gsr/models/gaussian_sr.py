"""GaussianSR: an encoder at LR and a head that renders at any size.

A mode is a head, a module with

    halo                                       LR pixels that `encode` looks at around one
    encode(features, lr, seeds=None)           features to Gaussians, all at LR: a named tuple
    render(encoded, size, scale, *, rows, band, shared)        an image, or some of its rows
    query(encoded, size, coord, scale)                         chosen points
    rows_needed(rows, *, lr_size, size, scale)                 what `render` needs for some rows

as the methods of `GaussianSR` describe them. It may have

    shared(gaussians)      what `render` needs of the whole image, made before the first strip
    decoder                with a method `rgb`, which `GaussianSR.compile` compiles
    floats                 numbers for each LR pixel that `encode` gives, where they are many

`direct`, `field` and `official` splat; `liif`, `lte` and `bicubic` are what they are compared with.
A head or encoder of one's own is named by its import path in the config: docs/extend.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gsr.config import ModelConfig, check
from gsr.errors import InputError
from gsr.models.registry import make_encoder, make_head
from gsr.models.sizes import check_lr, resolve_size
from gsr.models.stream import Chain, Layer, Residual


class GaussianSR(nn.Module):
    """Arbitrary-scale super-resolution by 2D Gaussian splatting (Hu et al., AAAI 2025).

    Args:
        config: the architecture, see `gsr.config.ModelConfig`.

    Raises:
        InputError: the config breaks one of its limits.
    """

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = check(config or ModelConfig())
        # Any: what `nn.Module` lets a type checker know of their methods is nothing.
        self.encoder: Any = make_encoder(self.config.encoder)
        self.head: Any = make_head(self.config)
        # dB of PSNR that bf16 costs, where it was measured; a model folder keeps it.
        self.bf16_loss: float | None = None

    @property
    def halo(self) -> int:
        """LR pixels on each side that `encode` looks at around one LR pixel."""
        return self.encoder.halo + self.head.halo

    def encode(self, lr: Tensor, seeds: Sequence[int] | None = None):
        """LR image [B, 3, h, w] in [0, 1] to a named tuple of tensors [B, ..., h, w].

        All that is learnt at LR happens here, once, whatever is rendered afterwards.

        Args:
            lr: the image.
            seeds: one an image, of the Gumbel noise that `field` and `official` draw in training;
                without them PyTorch's global generator is used.

        Raises:
            InputError: a tensor of another shape, an empty one, or one of integers.
        """
        check_lr(lr)
        return self._encode(lr, seeds)

    def _encode(self, lr: Tensor, seeds: Sequence[int] | None = None):
        return self.head.encode(self.encoder(lr), lr, seeds)

    def stream(self, last: Callable | None = None) -> Chain:
        """`encode` by bands of rows, see `gsr.models.stream`.

        An encoder without a stream of its own is run with its halo around each band. `last`, of
        features and LR, takes the place of the head's `encode`.
        """
        encoder = self.encoder
        inner = encoder.stream() if hasattr(encoder, "stream") else Layer(encoder, encoder.halo)
        both = Residual(inner, lambda lr, features: (*features, *lr))
        return Chain(both, Layer(last or self.head.encode, self.head.halo))

    def rows_needed(self, rows, lr_size, size, scale=None) -> tuple[int, int]:
        """The LR rows (start, stop) of `encoded` on which HR rows (start, stop) depend."""
        size, scale = resolve_size(lr_size, size, scale)
        return self.head.rows_needed(rows, lr_size=lr_size, size=size, scale=scale)

    def render(self, encoded, size, scale=None, rows=None, band=None, shared=None) -> Tensor:
        """HR image [B, 3, H, W] of `size` (H, W) from `encode`'s result, not clamped.

        Args:
            scale: (s_y, s_x), matters to `official` only, see `resolve_size`.
            rows: (start, stop), renders only those rows of the image.
            band: (start, height): `encoded` holds only the rows from `start` on of an LR image of
                that height, among them those that `rows_needed` asks for.
            shared: what `head.shared` has made of the whole image, where the head has that.
        """
        h, w = encoded[0].shape[-2:]
        size, scale = resolve_size((h if band is None else band[1], w), size, scale)
        if rows is not None and not 0 <= rows[0] < rows[1] <= size[0]:
            raise InputError(f"rows {tuple(rows)} are not rows of an image of height {size[0]}")
        return self.head.render(encoded, size, scale, rows=rows, band=band, shared=shared)

    def query(self, encoded, size, coord: Tensor, scale=None) -> Tensor:
        """Colours [B, Q, 3] of the HR image of `size` at `coord` [B, Q, 2].

        `coord` is (y, x) in [-1, 1]; HR pixel i of n has its centre at -1 + (2 i + 1) / n.
        """
        size, scale = resolve_size(encoded[0].shape[-2:], size, scale)
        batch, shape = encoded[0].shape[0], list(coord.shape)
        if coord.dim() != 3 or shape[0] != batch or shape[1] < 1 or shape[2] != 2:
            raise InputError(f"coord must be [{batch}, Q, 2], Q at least 1, not {shape}")
        return self.head.query(encoded, size, coord, scale)

    def compile(self, **options) -> GaussianSR:
        """Have torch.compile make what is learnt into kernels; returns the model itself.

        `encode` becomes one graph and the decoder, where there is one, another, each for all
        image sizes and scales; the splats are kernels already. `options` go to torch.compile.
        """
        options = {"dynamic": True, "fullgraph": True, **options}
        self._encode = torch.compile(self._encode, **options)
        if hasattr(self.head, "decoder"):
            self.head.decoder.rgb = torch.compile(self.head.decoder.rgb, **options)
        return self

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
        check_lr(lr)
        size, scale = resolve_size(lr.shape[-2:], size, scale)
        encoded = self._encode(lr)
        if coord is None:
            return self.head.render(encoded, size, scale)
        return self.head.query(encoded, size, coord, scale)
