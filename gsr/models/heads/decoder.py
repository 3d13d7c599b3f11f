"""The Fourier decoder of `official`, `field` and `bicubic`: features at HR to colours.

At every HR pixel two 3 x 3 convolutions give amplitudes (coef) and frequencies (freq); the waves
are evaluated at the pixel's position relative to the nearest LR pixel, and an MLP makes them RGB.
`gsr.models.heads.fourier` calls it: `StripDecoder` for rows of an image, `FourierDecoder.rgb` for
single points.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.config import DecoderConfig
from gsr.ops.resize import cubic

STRIP = 2**11  # HR pixels that a thread decodes at a time: 4 MB of waves, which stay in the cache
QUERIES = 2**12  # HR pixels decoded at a time where single ones are asked for
AT_ONCE = 16  # strips whose features are made at a time: these are small, but cost many steps
WIDE = 64  # channels from which on `affine` is a convolution


def pixel_centres(n: int, device=None) -> Tensor:
    """Centres of n pixels in [-1, 1], [n] float32, rounded as the published code rounds them."""
    return (-1 + 1 / n) + (2 / n) * torch.arange(n, device=device, dtype=torch.float32)


def nearest(q: Tensor, n: int) -> Tensor:
    """Index of the pixel, out of n, nearest to coordinate q in [-1, 1]; int64.

    Halfway between two pixels the float32 rounding of this very expression decides, as published.
    """
    return torch.round(((q + 1) * n - 1) / 2).clamp(0, n - 1).long()


def relative(q: Tensor, n: int) -> Tensor:
    """q - centre of the nearest of n pixels, in half pixels."""
    return (q - pixel_centres(n, q.device)[nearest(q, n)]) * n


def nearest_pixels(
    coord: Tensor, lr_size: Sequence[int], size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The HR pixels nearest to points, and the points relative to the nearest LR pixels.

    Args:
        coord: [B, Q, 2], (y, x) in [-1, 1].
        lr_size, size: (h, w) and (H, W).

    Returns:
        y and x of the pixels, [B, Q] int64 each; relative y and x, [B, Q, 1], in half LR pixels.
    """
    pixels, away = [], []
    for q, n, n_hr in zip(coord.unbind(-1), lr_size, size, strict=True):
        pixel = nearest(q, n_hr)
        centre = pixel_centres(n_hr, q.device)[pixel]
        # However a caller rounded the centre of a pixel, `render`'s rounding decides ties.
        q = torch.where((q - centre).abs() < 1e-6, centre, q)
        pixels.append(pixel)
        away.append(relative(q, n)[..., None])
    return pixels[0], pixels[1], away[0], away[1]


def relative_cell(like: Tensor, lr_size: Sequence[int], size: Sequence[int]) -> Tensor:
    """Side of an HR pixel in LR half pixels, (y, x): [2], in the type and on the device of like."""
    return like.new_tensor([2 / n_hr * n for n, n_hr in zip(lr_size, size, strict=True)])


def float32_at_least(tensor: Tensor) -> Tensor:
    """float32 of 16-bit floats, which an encoder may give: all at HR is float32 or more."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@functools.lru_cache(maxsize=1)
def _loops():
    """`gsr.models.heads.decode_cpu`, or None where Numba does not run."""
    try:
        from gsr.models.heads import decode_cpu
    except ImportError:
        return None
    return decode_cpu


def _loops_for(waves: Tensor, *rest: Tensor):
    """`_loops`, if its `modulate` takes these tensors, else None."""
    fit = (
        not torch.compiler.is_compiling()
        and waves.device.type == "cpu"
        and waves.dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype == torch.float32 for t in rest)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in rest[:2]))
    )
    return _loops() if fit else None


# ---- layers -------------------------------------------------------------------------------------


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`; on the CPU twice as fast."""
    # Narrow ones gain nothing, and torch.compile would make small and large strips of them into
    # graphs of their own.
    fit = x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] >= WIDE
    if x.device.type != "cpu" or not fit:
        return F.linear(x, weight, bias)
    # PyTorch leaves products of matrices to MKL, which uses half of the vector unit of an AMD
    # processor, and convolutions to oneDNN. One of 1 x 1 that is called dilated, whatever that
    # means, goes there even from a single thread.
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, C, 1, N], channels last
    out = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def perceptron(x: Tensor, layers: Iterable[Any], dtype: torch.dtype) -> Tensor:
    """x [..., C] through Linear, activation, ..., Linear; matrices but the last in `dtype`.

    The activations are ReLU or GELU; x may be overwritten.
    """
    *hidden, last = layers
    for layer in hidden:
        if isinstance(layer, nn.Linear):
            x = affine(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
        elif isinstance(layer, nn.ReLU):
            x = x.relu_()
        else:  # GELU, whose gradient needs its input
            x = layer(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
    return affine(x.to(last.weight.dtype), last.weight, last.bias)


def merged(coef: nn.Conv2d, freq: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of both as one convolution, the frequencies of y before those of x."""
    weight, bias = (
        torch.cat([getattr(coef, name), getattr(freq, name)[0::2], getattr(freq, name)[1::2]])
        for name in ("weight", "bias")
    )
    return weight, bias


def modulated(
    waves: Tensor, ry: Tensor, rx: Tensor, *, phase: Tensor, dtype: torch.dtype
) -> Tensor:
    """Amplitudes times waves.

    Args:
        waves: [..., 2 D]: D amplitudes, then the D / 2 frequencies of y and those of x, in half
            turns a unit of ry and rx.
        ry, rx: [..., 1], relative position.
        phase: [D / 2], half turns.
        dtype: of the result.

    Returns:
        [..., D], the first half with cosines and the second with sines.
    """
    if loops := _loops_for(waves, ry, rx, phase):
        ry, rx = (r.expand(*waves.shape[:-1], 1) for r in (ry, rx))
        return loops.modulate(waves.float().contiguous(), ry, rx, phase=phase, dtype=dtype)
    d = waves.shape[-1] // 2
    coef, fy, fx = waves.to(phase.dtype).split([d, d // 2, d // 2], dim=-1)
    phase = math.pi * (fy * ry + fx * rx + phase)
    return (coef * torch.cat([phase.cos(), phase.sin()], dim=-1)).to(dtype)


# ---- the decoder --------------------------------------------------------------------------------


class FourierDecoder(nn.Module):
    """Features at HR to RGB around [0, 1].

    Args:
        in_channels: of the features.
        config: widths; with `skip`, heads add the LR image, upsampled bicubically, less 1/2.

    Source: GaussianSR (AAAI 2025), section 3.4, after LTE (CVPR 2022), section 3.
    """

    def __init__(self, in_channels: int, config: DecoderConfig):
        super().__init__()
        d, self.skip = config.hidden_dim, config.skip
        self.coef = nn.Conv2d(in_channels, d, 3, padding=1)
        self.freq = nn.Conv2d(in_channels, d, 3, padding=1)
        self.phase = nn.Linear(2, d // 2, bias=False)
        layers, last = [], d
        for width in config.hidden_list:
            layers += [nn.Linear(last, width), nn.GELU()]
            last = width
        self.layers = nn.Sequential(*layers, nn.Linear(last, 3))

    def rgb(self, waves: Tensor, ry: Tensor, rx: Tensor, *, cell: Tensor, dtype=None) -> Tensor:
        """Colours [..., 3] of amplitudes and frequencies.

        Args:
            waves: [..., 2 D], what the convolutions of `merged` give.
            ry, rx: [..., 1], position relative to the nearest LR pixel, in half LR pixels.
            cell: [2], see `relative_cell`.
            dtype: that matrices but the last are multiplied in; the waves' own if left out.
        """
        dtype = dtype or waves.dtype
        x = modulated(waves, ry, rx, phase=self.phase(cell), dtype=dtype)
        return perceptron(x, self.layers, dtype) * 0.5 + 0.5


class StripDecoder:
    """A `FourierDecoder` for strips of rows of one HR image: what they share is computed once.

    Args:
        decoder: the decoder.
        channels: c of its C input channels come at HR, the others are to be resized along the rows.
        lr_size, size: (h, w) and (H, W).
        dtype: that matrices are multiplied in, float32 or bfloat16; the phases and the last layer
            are float32 in both, and so is the result.
    """

    def __init__(
        self,
        decoder: FourierDecoder,
        channels: int,
        *,
        lr_size: tuple[int, int],
        size: tuple[int, int],
        dtype: torch.dtype,
    ):
        weight, bias = merged(decoder.coef, decoder.freq)  # [2 D, C, 3, 3], [2 D]
        self.decoder, self.weight, self.bias, self.width = decoder, weight, bias, size[1]
        self.dtype = weight.dtype if dtype == torch.float32 else dtype  # float64 remains
        self.cell = relative_cell(weight, lr_size, size)
        self.ry, self.rx = (
            relative(pixel_centres(n_hr, weight.device), n).to(weight.dtype)[:, None]
            for n, n_hr in zip(lr_size, size, strict=True)
        )
        # Resizing along a row and convolving along it are both linear. Where no gradient is wanted,
        # what is to be resized is therefore convolved at the columns of LR, for each of the three
        # columns of the kernel apart, and these are resized and added: at x4 a quarter of the
        # products.
        self.loops = None if torch.is_grad_enabled() else _loops_for(weight)
        if self.loops:
            self.weight = weight[:, :channels]
            columns = weight[:, channels:].permute(3, 0, 1, 2).flatten(0, 1)
            self.columns = columns[..., None].to(self.dtype)  # [6 D, C - c, 3, 1]

    def __call__(self, splatted: Tensor, tall: Tensor, rows: tuple[int, int]) -> Tensor:
        """Colours [B, 3, n, W] of the n HR rows (start, stop).

        Args:
            splatted: [B, c, n + 2, W], features of these rows and of one above and below.
            tall: [B, C - c, n + 2, w], the other channels before they are resized along the rows.
            rows: (start, stop).
        """
        ry, waves = self.ry[slice(*rows), None], self._waves(splatted, tall)
        rgb = self.decoder.rgb(waves, ry, self.rx, cell=self.cell, dtype=self.dtype)
        return rgb.permute(0, 3, 1, 2)

    def _waves(self, splatted: Tensor, tall: Tensor) -> Tensor:
        """The features convolved, all rows but the first and the last: [B, n, W, 2 D]."""
        options: dict[str, Any] = {"dtype": self.dtype, "memory_format": torch.channels_last}
        if not self.loops:
            size = tall.shape[2], self.width
            rest = F.interpolate(tall, size, mode="bicubic", align_corners=False)
            features = torch.cat([splatted, rest], dim=1).to(**options)
            weight, bias = self.weight.to(self.dtype), self.bias.to(self.dtype)
            return F.conv2d(features, weight, bias, padding=(0, 1)).permute(0, 2, 3, 1)
        if splatted.shape[1]:
            # In float32: these are few channels, and what is added to them is float32.
            narrow = splatted.float().contiguous(memory_format=torch.channels_last)
            waves = F.conv2d(narrow, self.weight, self.bias, padding=(0, 1)).permute(0, 2, 3, 1)
        else:  # PyTorch convolves no empty tensors
            waves = self.bias.repeat(len(tall), tall.shape[2] - 2, self.width, 1)
        taps = F.conv2d(tall.to(**options), self.columns).permute(0, 2, 3, 1)
        return self.loops.add_resized(*(t.float().contiguous() for t in (waves, taps)))


def decoding_threads(decoder: nn.Module) -> int:
    """Threads on which strips are decoded, each on its own.

    A thread a strip, so that it stays in the cache of one core, unless something else divides the
    work: a GPU, or the compiler of `rgb`.
    """
    cpu = next(decoder.parameters()).device.type == "cpu"
    alone = cpu and "rgb" not in vars(decoder) and not torch.is_grad_enabled()
    return torch.get_num_threads() if alone else 1


# ---- pixels and their neighbours ----------------------------------------------------------------


def gather_pixels(values: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Pixels (y, x) of an image [B, C, H, W]: [B, ..., C].

    y and x, int64, broadcast together to [B, ...] or [1, ...].
    """
    b, c, h, w = values.shape
    image = torch.arange(b, device=y.device).view(-1, *[1] * (y.dim() - 1))
    index = (image * h + y) * w + x
    flat = values.permute(0, 2, 3, 1).reshape(-1, c)
    return flat.index_select(0, index.flatten()).view(*index.shape, c)


def neighbours_3x3(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The 3 x 3 pixels around pixels (y, x), [B, Q] each, row by row: [B, Q, 9] each."""
    step = torch.arange(-1, 2, device=y.device)
    return y[..., None] + step.repeat_interleave(3), x[..., None] + step.repeat(3)


def neighbourhoods(
    features: Tensor, splatted: Tensor, *, y: Tensor, x: Tensor, size: tuple[int, int]
) -> Tensor:
    """Features at the 3 x 3 pixels around HR pixels (y, x), zero beyond the image.

    Args:
        features: [B, C, h, w], of which all but the first c channels are resized bicubically.
        splatted: [B, Q, 9, c], what takes the place of the first c.
        y, x: [B, Q] int64.
        size: (H, W) of the resized image.

    Returns:
        [B, Q, 9, C], row by row.
    """
    if features.device.type == "cpu" and (loops := _loops()):
        return loops.neighbourhoods(features, splatted, y=y, x=x, size=size)
    rest = bicubic_neighbours(features[:, splatted.shape[-1] :], y, x, size=size)
    y, x = neighbours_3x3(y, x)
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    return torch.cat([splatted, rest], dim=-1) * inside[..., None]


def bicubic_neighbours(image: Tensor, y: Tensor, x: Tensor, *, size: tuple[int, int]) -> Tensor:
    """The 3 x 3 pixels around HR pixels (y, x) of `gsr.ops.resize.bicubic(image, size, rows)`.

    Args:
        image: [B, C, h, w].
        y, x: [B, Q] int64. Neighbours beyond the image are extrapolated.
        size: (H, W) of the resized image.

    Returns:
        [B, Q, 9, C], row by row.
    """
    b, c, h, w = image.shape
    step = torch.arange(-1, 2, device=image.device)
    # `bicubic` positions rows in float64, and leaves columns to PyTorch, which uses float32.
    v = (y[..., None] + step + 0.5).double() * h / size[0] - 0.5
    u = torch.tensor(float(w), device=image.device) / size[1] * (x[..., None] + step + 0.5) - 0.5
    (row, w_row), (column, w_column) = _taps(v, h, size[0]), _taps(u, w, size[1])
    # Nine neighbours share most of their LR pixels (36 or fewer from x1 upwards): these are fetched
    # once, and combined by one small matrix a query.
    near = gather_pixels(image, row[..., :, None], column[..., None, :])  # [B, Q, n_y, n_x, C]
    weight = w_row[..., :, None, :, None] * w_column[..., None, :, None, :]
    taps = row.shape[-1] * column.shape[-1]
    out = weight.reshape(-1, 9, taps).to(image.dtype) @ near.view(-1, taps, c)
    return out.view(*y.shape, 9, c)


def _taps(position: Tensor, n: int, n_hr: int) -> tuple[Tensor, Tensor]:
    """LR indices [..., m] that three positions [..., 3] need between them; weights [..., 3, m]."""
    start = torch.floor(position[..., :1]).long() - 1
    index = start + torch.arange(4 + math.ceil(2 * n / n_hr), device=position.device)
    weight = cubic((position[..., None] - index[..., None, :]).abs().clamp(max=2))
    return index.clamp(0, n - 1), weight
