"""The decoder of `official` and `field`: features at HR to colours, through learnt waves.

At every HR pixel two 3 x 3 convolutions give amplitudes (coef) and frequencies (freq); the waves
are evaluated at the pixel's position relative to the nearest LR pixel, and an MLP makes them RGB.
An image is decoded by strips of rows, and single points from their 3 x 3 neighbourhoods alone, so
that neither the 512 channels at HR nor a whole HR image of features ever exists.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsr.config import DecoderConfig
from gsr.device import at_once, threaded_map
from gsr.ops.resize import bicubic, bicubic_at, cubic

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


@functools.lru_cache(maxsize=1)
def _loops():
    """`gsr.models.heads.decode_cpu`, or None where Numba does not run."""
    try:
        from gsr.models.heads import decode_cpu
    except ImportError:
        return None
    return decode_cpu


def _nearest_pixels(coord: Tensor, lr_size, size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """HR pixels (y, x) nearest to coord [B, Q, 2], [B, Q], and the coordinates relative to the
    nearest LR pixels, [B, Q, 1], in half of these."""
    pixels, away = [], []
    for q, n, n_hr in zip(coord.unbind(-1), lr_size, size, strict=True):
        pixel = nearest(q, n_hr)
        centre = pixel_centres(n_hr, q.device)[pixel]
        # However a caller rounded the centre of a pixel, `render`'s rounding decides ties.
        q = torch.where((q - centre).abs() < 1e-6, centre, q)
        pixels.append(pixel)
        away.append(relative(q, n)[..., None])
    return *pixels, *away


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`; on the CPU twice as fast.

    PyTorch leaves products of matrices to MKL, which uses half of the vector unit of an AMD
    processor, and convolutions to oneDNN. One of 1 x 1 that is called dilated, whatever that means,
    goes there even from a single thread. Narrow ones gain nothing, and torch.compile would make
    small and large strips of them into graphs of their own.
    """
    fit = x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] >= WIDE
    if x.device.type != "cpu" or not fit:
        return F.linear(x, weight, bias)
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, C, 1, N], channels last
    out = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class FourierDecoder(nn.Module):
    """Features at HR [B, C, H, W] to RGB around [0, 1].

    Args:
        in_channels: C.
        config: widths, and whether what comes out is added to the bicubic enlargement.

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

    def base(self, lr: Tensor) -> Tensor:
        """What `over` needs of the LR image [B, 3, h, w]: that, or [B, 0, h, w] without skip."""
        half = lr.dtype in (torch.float16, torch.bfloat16)  # HR is always fp32
        return (lr.float() if half else lr) if self.skip else lr[:, :0]

    def over(self, out: Tensor, base: Tensor, size, rows=None, band=None) -> Tensor:
        """What `render` gave, added to the bicubic enlargement if there is a skip connection."""
        return out + bicubic(base, size, rows, band) - 0.5 if self.skip else out

    def over_at(self, out: Tensor, base: Tensor, coord: Tensor) -> Tensor:
        """The same of what `query` gave."""
        return out + bicubic_at(base, coord) - 0.5 if self.skip else out

    def render(
        self,
        strip: Callable[[int, int], tuple[Tensor, Tensor]],
        channels: int,
        batch: int,
        lr_size: tuple[int, int],
        size: tuple[int, int],
        rows: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Decode HR row by row: [B, 3, H, W], or only `rows` of it.

        Matrices are multiplied in `dtype`, float32 or bfloat16; the phases and the last layer are
        float32 in both, and so is the result.

        `strip` gives the features of rows first ... last - 1 in two parts: the first `channels`,
        [B, c, last - first, W], and the others before they are resized along the rows,
        [B, C - c, last - first, w]. On the CPU it is called by several threads at a time.
        """
        first, last = rows or (0, size[0])
        weight, bias = merged(self.coef, self.freq)
        cell = relative_cell(weight, lr_size, size)
        ry, rx = (
            relative(pixel_centres(n_hr, weight.device), n).to(weight.dtype)
            for n, n_hr in zip(lr_size, size, strict=True)
        )
        # Allocated first: strips kept for a final `cat` would lie between the large buffers and
        # fragment the heap.
        out = weight.new_empty(batch, 3, last - first, size[1])
        dtype = weight.dtype if dtype == torch.float32 else dtype
        waves = _Waves(weight, bias, channels, size[1], dtype)
        step = max(1, at_once(STRIP, weight) // (batch * size[1]))

        def decode(rows: tuple[int, int]) -> None:
            top, end = rows
            # Zero rows only where the image ends: elsewhere the blocks overlap.
            ends = (0, 0, int(top == 0), int(end == size[0]))
            parts = [F.pad(p, ends) for p in strip(max(top - 1, 0), min(end + 1, size[0]))]
            for a, b in _equal(top, end, math.ceil((end - top) / step)):
                near = (p[:, :, a - top : b + 2 - top] for p in parts)
                rgb = self.rgb(waves(*near), ry[a:b, None, None], rx[:, None], cell, dtype)
                out[:, :, a - first : b - first] = rgb.permute(0, 3, 1, 2)

        # A thread a block, so that a strip stays in the cache of one core, unless something else
        # divides the work: a GPU, or the compiler of `rgb`.
        alone = weight.device.type == "cpu" and "rgb" not in vars(self)
        threads = torch.get_num_threads() if alone and not torch.is_grad_enabled() else 1
        blocks = threads * math.ceil((last - first) / (threads * AT_ONCE * step))
        threaded_map(decode, _equal(first, last, blocks), threads)
        return out

    def query(
        self,
        neighbours: Callable[[Sequence[Tensor], Tensor, Tensor], Tensor],
        tensors: Sequence[Tensor],
        coord: Tensor,
        lr_size: tuple[int, int],
        size: tuple[int, int],
    ) -> Tensor:
        """Decode at `coord` [B, Q, 2], (y, x) in [-1, 1]: [B, Q, 3].

        `neighbours`, of `tensors` [B, ...] cut to some images and of their pixels (y, x), [b, n]
        each, gives the features around these [b, n, 9, C], row by row and zero beyond the image.
        coef and freq of a point are those of the nearest HR pixel.
        """
        weight, bias = merged(self.coef, self.freq)
        weight = weight.permute(0, 2, 3, 1).flatten(1)  # [2 D, 9 C]
        cell, out, most = relative_cell(weight, lr_size, size), [], at_once(QUERIES, weight)
        # Images apart: a part of the queries of all would give gradients of all their features.
        images = max(1, most // coord.shape[1])
        for points, *part in zip(*(t.split(images) for t in (coord, *tensors)), strict=True):
            rgb = []
            for some in points.float().split(max(1, most // len(points)), dim=1):
                y, x, ry, rx = _nearest_pixels(some, lr_size, size)
                waves = affine(neighbours(part, y, x).flatten(2), weight, bias)
                rgb.append(self.rgb(waves, ry.to(waves.dtype), rx.to(waves.dtype), cell))
            out.append(torch.cat(rgb, dim=1))
        return torch.cat(out)

    def rgb(self, waves: Tensor, ry: Tensor, rx: Tensor, cell: Tensor, dtype=None) -> Tensor:
        """[..., 2 D], relative coordinate [..., 1] twice, relative cell [2] to [..., 3].

        Matrices are multiplied in `dtype`, that of the waves if left out.
        """
        dtype = dtype or waves.dtype
        x = modulated(waves, ry, rx, self.phase(cell), dtype)
        *hidden, last = self.layers
        for layer in hidden:
            if isinstance(layer, nn.Linear):
                x = affine(x, layer.weight.to(dtype), layer.bias.to(dtype))
            else:  # in place where nothing needs it any more
                x = layer(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
        return affine(x.to(last.weight.dtype), last.weight, last.bias) * 0.5 + 0.5


def _equal(first: int, last: int, parts: int) -> list[tuple[int, int]]:
    """range(first, last) in so many consecutive parts of nearly the same size, none empty."""
    edges = [first + (last - first) * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]


class _Waves:
    """3 x 3 convolution of the features of HR rows, all but its first and last: [B, n, W, 2 D].

    Resizing along a row and convolving along it are both linear. Where no gradient is wanted, what
    is to be resized is therefore convolved at the columns of LR, for each of the three columns of
    the kernel apart, and these are resized and added: at x4 a quarter of the products.

    Args:
        weight, bias: [2 D, C, 3, 3] and [2 D].
        c: channels that come at HR; the other C - c are to be resized along the rows.
        width: W.
        dtype: that most of it is computed in.
    """

    def __init__(self, weight: Tensor, bias: Tensor, c: int, width: int, dtype: torch.dtype):
        self.weight, self.bias, self.width, self.dtype = weight, bias, width, dtype
        self.at_lr = not torch.is_grad_enabled() and _has_loops(weight)
        if self.at_lr:
            self.weight = weight[:, :c]
            columns = weight[:, c:].permute(3, 0, 1, 2).flatten(0, 1)
            self.columns = columns[..., None].to(dtype)  # [6 D, C - c, 3, 1]

    def __call__(self, splatted: Tensor, tall: Tensor) -> Tensor:
        """splatted [B, c, n + 2, W], tall [B, C - c, n + 2, w]."""
        options = {"dtype": self.dtype, "memory_format": torch.channels_last}
        if self.at_lr:
            if splatted.shape[1]:
                # In float32: these are few channels, and what is added to them is float32.
                narrow = splatted.float().contiguous(memory_format=torch.channels_last)
                waves = F.conv2d(narrow, self.weight, self.bias, padding=(0, 1))
                waves = waves.permute(0, 2, 3, 1)
            else:  # PyTorch convolves no empty tensors
                waves = self.bias.repeat(len(tall), tall.shape[2] - 2, self.width, 1)
            taps = F.conv2d(tall.to(**options), self.columns).permute(0, 2, 3, 1)
            return _loops().add_resized(*(t.float().contiguous() for t in (waves, taps)))
        size = tall.shape[2], self.width
        rest = F.interpolate(tall, size, mode="bicubic", align_corners=False)
        features = torch.cat([splatted, rest], dim=1).to(**options)
        weight, bias = self.weight.to(self.dtype), self.bias.to(self.dtype)
        return F.conv2d(features, weight, bias, padding=(0, 1)).permute(0, 2, 3, 1)


def modulated(waves: Tensor, ry: Tensor, rx: Tensor, phase: Tensor, dtype: torch.dtype) -> Tensor:
    """Amplitudes times waves: [..., 2 D], [..., 1] twice and [D / 2] to [..., D] in `dtype`.

    D amplitudes come first, then the D / 2 frequencies of y and those of x, in half turns a unit of
    ry and rx; the phase is in half turns, too. Half the result goes with cosines, half with sines.
    """
    if _has_loops(waves, ry, rx, phase):
        ry, rx = (r.expand(*waves.shape[:-1], 1) for r in (ry, rx))
        return _loops().modulate(waves.float().contiguous(), ry, rx, phase, dtype)
    d = waves.shape[-1] // 2
    coef, fy, fx = waves.to(phase.dtype).split([d, d // 2, d // 2], dim=-1)
    phase = math.pi * (fy * ry + fx * rx + phase)
    return (coef * torch.cat([phase.cos(), phase.sin()], dim=-1)).to(dtype)


def _has_loops(waves: Tensor, *rest: Tensor) -> bool:
    """Whether `decode_cpu.modulate` takes these tensors."""
    return (
        not torch.compiler.is_compiling()
        and waves.device.type == "cpu"
        and waves.dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype == torch.float32 for t in rest)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in rest[:2]))
        and _loops() is not None
    )


def merged(coef: nn.Conv2d, freq: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of both as one convolution, the frequencies of y before those of x."""
    weight, bias = (
        torch.cat([getattr(coef, name), getattr(freq, name)[0::2], getattr(freq, name)[1::2]])
        for name in ("weight", "bias")
    )
    return weight, bias


def relative_cell(like: Tensor, lr_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Side of an HR pixel in LR half pixels, (y, x): [2]."""
    return like.new_tensor([2 / n_hr * n for n, n_hr in zip(lr_size, size, strict=True)])


def neighbourhoods(features: Tensor, splatted: Tensor, size, row: Tensor, column: Tensor) -> Tensor:
    """The 3 x 3 pixels around HR pixels (row, column), zero beyond the image.

    Args:
        features: [B, C, h, w], of which all but the first c channels are resized bicubically.
        splatted: [B, Q, 9, c], what takes the place of the first c.
        size: (H, W) of the resized image.
        row, column: [B, Q] int64.

    Returns:
        [B, Q, 9, C], row by row.
    """
    if features.device.type == "cpu" and (loops := _loops()):
        return loops.neighbourhoods(features, splatted, size, row, column)
    rest = bicubic_neighbours(features[:, splatted.shape[-1] :], size, row, column)
    step = torch.arange(-1, 2, device=row.device)
    y, x = row[..., None] + step.repeat_interleave(3), column[..., None] + step.repeat(3)
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    return torch.cat([splatted, rest], dim=-1) * inside[..., None]


def bicubic_neighbours(x: Tensor, size: tuple[int, int], row: Tensor, column: Tensor) -> Tensor:
    """The 3 x 3 pixels around HR pixels (row, column) of `gsr.ops.resize.bicubic(x, size, rows)`.

    Nine neighbours of an HR pixel share most of their LR pixels (36 or fewer from x1 upwards), so
    these are fetched once and combined by one small matrix a query.

    Args:
        x: [B, C, h, w].
        size: (H, W) of the resized image.
        row, column: [B, Q] int64. Neighbours beyond the image are extrapolated.

    Returns:
        [B, Q, 9, C], row by row.
    """
    b, c, h, w = x.shape
    step = torch.arange(-1, 2, device=x.device)
    # `bicubic` positions rows in float64, and leaves columns to PyTorch, which uses float32.
    y = (row[..., None] + step + 0.5).double() * h / size[0] - 0.5
    ratio = torch.tensor(float(w), device=x.device) / size[1]
    z = ratio * (column[..., None] + step + 0.5) - 0.5
    (y, wy), (z, wz) = _taps(y, h, size[0]), _taps(z, w, size[1])
    image = torch.arange(b, device=x.device)[:, None, None, None]
    index = (image * h + y[..., :, None]) * w + z[..., None, :]  # [B, Q, n_y, n_x]
    near = x.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, index.flatten())
    weight = wy[..., :, None, :, None] * wz[..., None, :, None, :]  # [B, Q, 3, 3, n_y, n_x]
    taps = index.shape[-2] * index.shape[-1]
    out = weight.reshape(-1, 9, taps).to(x.dtype) @ near.view(-1, taps, c)
    return out.view(*row.shape, 9, c)


def _taps(position: Tensor, n: int, n_hr: int) -> tuple[Tensor, Tensor]:
    """LR indices [..., m] that three positions [..., 3] need between them; weights [..., 3, m]."""
    first = torch.floor(position[..., :1]).long() - 1
    index = first + torch.arange(4 + math.ceil(2 * n / n_hr), device=position.device)
    weight = cubic((position[..., None] - index[..., None, :]).abs().clamp(max=2))
    return index.clamp(0, n - 1), weight
