"""GaussianSR: an encoder at LR and a head that renders at any size.

A mode is a head: a module with `encode` (features to Gaussians, all at LR), `render` (a whole
picture), `query` (chosen points), `rows_needed` and `halo`. `direct`, `field` and `official` splat;
`liif`, `lte` and `bicubic` are what they are compared with. To add one, write the class, name it in
`HEADS` and the mode in `gsr.config.ModelConfig`.

An encoder is a module that turns LR [B, 3, h, w] in [0, 1] into features [B, n_feats, h, w]:

    class Plain(nn.Module):
        def __init__(self, config: EncoderConfig):
            super().__init__()
            self.body = nn.Conv2d(3, config.n_feats, 3, padding=1)
            self.halo = 1  # LR pixels around a pixel on which its features depend

        def forward(self, lr):
            return self.body(lr)

To add it, name it in `ENCODERS` and in `gsr.config.EncoderConfig`, which gets its keys too. Large
pictures are encoded by bands of rows with the halo around each; a deep encoder should have
`stream` (see `gsr.stream` and `gsr.models.rdn`), which computes no row twice, and `floats`: what it
has at a time for each pixel of a band, and keeps for each column of the picture, in numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from gsr.config import EncoderConfig, ModelConfig, check
from gsr.errors import InputError
from gsr.stream import Chain, Layer, Residual

ENCODERS = {
    "edsr": "gsr.models.edsr:EDSR",
    "rdn": "gsr.models.rdn:RDN",
    "swinir": "gsr.models.swinir:SwinIR",
}
HEADS = {
    "direct": "gsr.models.direct:DirectHead",
    "field": "gsr.models.field:FieldHead",
    "official": "gsr.models.official:OfficialHead",
    "bicubic": "gsr.models.bicubic:BicubicHead",
    "liif": "gsr.models.liif:LIIFHead",
    "lte": "gsr.models.lte:LTEHead",
}
MAX_SCALE = 1_000_000
MAX_SIDE = 2**31 - 1  # of a result, pixels


def make_encoder(config: EncoderConfig) -> nn.Module:
    """The encoder that `config.name` names."""
    return _named(ENCODERS[config.name])(config)


def make_head(config: ModelConfig) -> nn.Module:
    """The head that `config.mode` names."""
    return _named(HEADS[config.mode])(config)


def _named(path: str) -> type[nn.Module]:
    """The class that "module:name" means; only what a model needs is ever imported."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


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
        self.encoder = make_encoder(self.config.encoder)
        self.head = make_head(self.config)

    @property
    def halo(self) -> int:
        """LR pixels on each side that `encode` looks at around one LR pixel."""
        return self.encoder.halo + self.head.halo

    def encode(self, lr: Tensor):
        """LR picture [B, 3, h, w] in [0, 1] to a named tuple of tensors [B, ..., h, w].

        All that is learnt at LR happens here, once, whatever is rendered afterwards. Raises
        InputError for a tensor of another shape, an empty one, or one of integers.
        """
        check_picture(lr)
        return self._encode(lr)

    def _encode(self, lr: Tensor):
        return self.head.encode(self.encoder(lr), lr)

    def stream(self, last: Callable | None = None) -> Chain:
        """`encode` by bands of rows, see `gsr.stream`; an encoder without one of its own is run
        with its halo around each band. `last` takes the place of the head's `encode`."""
        encoder = self.encoder
        inner = encoder.stream() if hasattr(encoder, "stream") else Layer(encoder, encoder.halo)
        both = Residual(inner, lambda lr, features: (*features, *lr))
        return Chain(both, Layer(last or self.head.encode, self.head.halo))

    def rows_needed(self, rows, lr_size, size, scale=None) -> tuple[int, int]:
        """First and end of the LR rows of `encoded` on which HR rows (first, last) depend."""
        size, scale = resolve_size(lr_size, size, scale)
        return self.head.rows_needed(rows, lr_size, size, scale)

    def render(self, encoded, size, scale=None, rows=None, band=None, shared=None) -> Tensor:
        """HR picture [B, 3, H, W] of `size` (H, W) from `encode`'s result, not clamped.

        Args:
            scale: (s_y, s_x), matters to `official` only, see `resolve_size`.
            rows: (first, last), renders only those rows of the picture.
            band: (top, height): `encoded` holds only the rows from `top` on of a LR picture of that
                height, among them those that `rows_needed` asks for.
            shared: what `head.shared` has made of the whole picture, where the head has that.
        """
        h, w = encoded[0].shape[-2:]
        size, scale = resolve_size((h if band is None else band[1], w), size, scale)
        if rows is not None and not 0 <= rows[0] < rows[1] <= size[0]:
            raise InputError(f"rows {tuple(rows)} are not rows of a picture of height {size[0]}")
        return self.head.render(encoded, size, scale, rows, band, shared)

    def query(self, encoded, size, coord: Tensor, scale=None) -> Tensor:
        """Colours [B, Q, 3] of the HR picture of `size` at `coord` [B, Q, 2].

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
        picture sizes and scales; the splats are kernels already. `options` go to torch.compile.
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
        check_picture(lr)
        size, scale = resolve_size(lr.shape[-2:], size, scale)
        encoded = self._encode(lr)
        if coord is None:
            return self.head.render(encoded, size, scale, None)
        return self.head.query(encoded, size, coord, scale)


def check_picture(lr: Tensor) -> None:
    """Raise InputError unless lr is a float tensor [B, 3, h, w] that is not empty."""
    if lr.ndim != 4 or lr.shape[1] != 3 or 0 in lr.shape or not lr.is_floating_point():
        raise InputError(
            f"lr must be a float tensor [B, 3, h, w] in [0, 1], not {lr.dtype} {list(lr.shape)}"
        )


def resolve_size(lr_size, size=None, scale=None) -> tuple[tuple[int, int], tuple[float, float]]:
    """The size (H, W) and scale (s_y, s_x) that a call means, from either or both.

    Raises:
        InputError: neither is given, or one is not as `check_size` and `check_scale` want it.
    """
    if size is None and scale is None:
        raise InputError("give size=(H, W) or scale")
    if scale is not None:
        scale = check_scale(scale)
    if size is None:
        size = tuple(round(n * s) for n, s in zip(lr_size, scale, strict=True))
    size = check_size(size)
    return size, scale or tuple(n_hr / n for n, n_hr in zip(lr_size, size, strict=True))


def check_scale(scale: Any) -> tuple[float, float]:
    """A number or a pair (s_y, s_x) as a pair; InputError unless above 0 and at most a million."""
    try:
        values = list(scale)
    except TypeError:  # one number, of whatever kind
        values = [scale]
    try:
        if any(isinstance(value, (bool, str)) for value in values):
            raise TypeError
        numbers = [float(value) for value in values]
        s_y, s_x = numbers if len(numbers) == 2 else numbers * 2
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"scale must be a number or (s_y, s_x), not {scale!r}") from None
    for value in (s_y, s_x):
        if not 0 < value <= MAX_SCALE:  # NaN is not either
            raise InputError(f"scale must be positive and at most {MAX_SCALE:,}, not {value}")
    return s_y, s_x


def check_size(size: Any) -> tuple[int, int]:
    """A pair of whole numbers (H, W) as a pair of int; InputError unless from 1 to 2^31 - 1."""
    try:
        if isinstance(size, str) or any(isinstance(value, bool) for value in size):
            raise TypeError
        height, width = (operator.index(value) for value in size)
    except (TypeError, ValueError):
        raise InputError(f"size must be two whole numbers (H, W), not {size!r}") from None
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise InputError(f"size must be positive, and below 2^31 a side, not {(height, width)}")
    return height, width
