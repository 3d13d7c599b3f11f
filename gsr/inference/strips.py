"""Enlarging images of any size in bounded memory: bands of LR rows in, strips of HR rows out.

`upscale` is the function for users: whatever kind of image goes in comes out, larger. `run` is
the same for one float tensor. Both equal the model on the whole image (to 1e-5): the encoder is
run as a stream of rows (`gsr.models.stream`) that computes hardly anything twice, a strip of HR is
rendered from the LR rows around it, and both are forgotten as soon as nothing depends on them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gsr.device import at_once, keep_pieces, trim_malloc
from gsr.errors import InputError
from gsr.models.stream import Band, join

if TYPE_CHECKING:
    from gsr.models import GaussianSR

BAND_PIXELS = 2**14  # LR pixels encoded at once
STRIP_PIXELS = 2**16  # HR pixels rendered at once
STRIP_BYTES = 60_000_000  # besides what goes with its pixels
KEEP = 2**28  # bytes of encoded LR that `official` keeps, rather than encode twice
PRECISIONS = ("auto", "fp32", "bf16")
PROBE = 128  # side of the part of an image on which bf16 is tried
LOSS = 0.01  # dB of PSNR that it may cost there


def run(
    model: GaussianSR,
    lr: torch.Tensor,
    size: tuple[int, int],
    scale: float | tuple[float, float] | None = None,
    progress: bool = False,
    max_memory: int | None = None,
    precision: str = "fp32",
) -> torch.Tensor:
    """Enlarge lr [B, 3, h, w] in [0, 1] to float32 [B, 3, H, W], size = (H, W), not clamped.

    Equals `model(lr, size=size, scale=scale)` in evaluation mode to 1e-5, in memory that hardly
    grows with the image but by the result. Works on the model's device and gives the result on
    that of lr. `scale` (s or (s_y, s_x)) is H / h and W / w if left out; `progress` shows a bar on
    stderr; `max_memory` and `precision` as in `upscale`. The model's training flags are left as
    they were.
    """

    from gsr.models.sizes import check_lr

    check_lr(lr)

    def source(first: int, end: int) -> torch.Tensor:
        return lr[..., first:end, :].detach().to(model_device(model), torch.float32)

    out = torch.empty(lr.shape[0], 3, *size, dtype=torch.float32, device=lr.device)
    with progress_bar(progress) as bar, inference(model):
        work = StripRenderer(model, source, lr.shape, size, scale, precision, bar)
        work.fit(max_memory, out.nbytes)
        for first, end, strip in work.strips():
            out[:, :, first:end] = strip
    return out


class StripRenderer:
    """One image's enlargement: LR rows in by bands, HR rows out by strips.

    Args:
        source: (first, end) to these LR rows, [B, 3, end - first, w] float32 on the model's device.
        shape: [B, 3, h, w] of the LR image.
    """

    def __init__(self, model, source, shape, size, scale, precision, bar=None):
        if model_device(model).type == "cpu":
            keep_pieces()
        self.model, self.source, self.size, self.scale, self.bar = model, source, size, scale, bar
        self.batch, self.lr_size = shape[0], tuple(shape[-2:])
        weight = next(model.parameters())
        band, strip = (at_once(n, weight) // self.batch for n in (BAND_PIXELS, STRIP_PIXELS))
        strip *= max(1, torch.get_num_threads() // 4)  # enough for each thread
        # Where a band is encoded with its halo, that must not be most of the work.
        least = 1 if hasattr(model.encoder, "stream") else max(1, 4 * model.halo)
        self.band = min(self.lr_size[0], max(least, band // self.lr_size[1]))  # rows
        self.strip = min(size[0], max(1, strip // size[1]))
        self.keep = KEEP
        self.dtype = _dtype(precision, self)
        self._rewind()

    def fit(self, max_memory: int | None, result: int) -> None:
        """Choose bands and strips so that the process stays within `max_memory` bytes.

        `result` is how many bytes of the result are still to be written. Raises InputError if not
        even single rows fit.
        """
        if max_memory is not None:
            if isinstance(max_memory, bool) or not isinstance(max_memory, (int, float)):
                raise InputError(f"max_memory must be a number of bytes, not {max_memory!r}")
            taken = _resident() + result
            left, least = max_memory - taken, taken + self._bytes(1, 1)
            if least > max_memory:
                raise InputError(
                    f"this image takes about {least / 1e6:.0f} MB, more than max_memory "
                    f"(--max-memory) = {max_memory / 1e6:.0f} MB; allow more, or enlarge less"
                )
            while self._bytes(self.band, self.strip) > left:
                self.band, self.strip = max(1, self.band // 2), max(1, self.strip // 2)
            self.keep = min(KEEP, left - self._bytes(self.band, self.strip))
        self._start_bar()

    def _bytes(self, band: int, strip: int) -> int:
        """What bands and strips of so many rows take, from the peaks of many runs."""
        from gsr.models.heads.decoder import STRIP

        (h, w), c = self.lr_size, self.model.config.encoder.n_feats
        # A band in the encoder, and the rows that each of its convolutions keeps.
        pixel, column = getattr(self.model.encoder, "floats", (20 * c, 4 * self.model.halo * c))
        pixel += 4 * getattr(self.model.head, "floats", 0)  # what it makes of features, twice
        lr = 4 * w * (pixel * min(band, h) + column)
        if hasattr(self.model.head, "shared"):
            lr += 32 * h * w  # all Gaussians, and once more in whole windows
        row = self.batch * self.size[1]
        hr = row * strip * 600
        if hasattr(self.model.head, "decoder"):  # waves and two layers, of each thread's own strip
            hr += 4000 * min(row * strip, torch.get_num_threads() * max(STRIP, row))
        return self.batch * lr + hr + STRIP_BYTES

    def _start_bar(self) -> None:
        if self.bar is not None:
            self.bar.total = (self.bar.total or 0) + self.cost()
            self.bar.refresh()

    def cost(self) -> float:
        """How much there is to do, in the unit of `_costs`."""
        encode, render = _costs(self.model)
        encode *= math.prod(self.lr_size) * (2 if self._two_passes() else 1)
        return self.batch * (encode + math.prod(self.size) * render)

    def strips(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, end row, HR rows [B, 3, rows, W] float32), from the top."""
        shared, first = None, 0
        while first < self.size[0]:
            try:
                if shared is None and self.band < self.lr_size[0]:
                    shared = self._shared()
                end = min(self.size[0], first + self.strip)
                strip = self._render(first, end, shared)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(error)
                continue
            yield first, end, strip
            self._advance((end - first) * self.size[1], 1)
            first = end

    def _render(self, first: int, end: int, shared) -> torch.Tensor:
        rows = first, end
        needed = self.model.rows_needed(rows, self.lr_size, self.size, self.scale)
        lr = self._encoded(*needed)
        band = None if lr.end - lr.first == self.lr_size[0] else (lr.first, self.lr_size[0])
        device = model_device(self.model).type
        with torch.autocast(device, torch.bfloat16, self.dtype != torch.float32):
            strip = self.model.render(lr.tensors, self.size, self.scale, rows, band, shared)
        return strip.float()

    def _encoded(self, first: int, end: int) -> Band:
        """Encoded LR rows, at least first ... end - 1; those above are forgotten."""
        while self.held is None or self.held.end < end:
            if self.stream is None:
                self.stream, self.next = self.model.stream(), max(0, first - self.model.halo)
            stop = min(self.next + self.band, self.lr_size[0])
            last, pixels = stop == self.lr_size[0], self.source(self.next, stop)
            with torch.autocast(pixels.device.type, torch.bfloat16, self.dtype != torch.float32):
                if self.next == 0 and last:
                    # In one piece, so that what `GaussianSR.compile` has made serves.
                    band = Band(0, self.model.encode(pixels))
                else:
                    band = self.stream.feed(Band(self.next, (pixels,)), False)
                    # The last rows for themselves: together with a band they would make each tensor
                    # a little larger than the one before, and none would fit where that has been.
                    band = join(band, self.stream.feed(None, True) if last else None)
                    if hasattr(self.model.encoder, "floats"):
                        # A deep network's many sizes of tensors leave the heap full of holes, and
                        # beside its arithmetic new pages cost nothing.
                        trim_malloc()
            self._advance((stop - self.next) * self.lr_size[1], 0)
            self.next = stop
            self.held = self.held if band is None else join(self.held, band)
        if first > self.held.first and self.band < self.lr_size[0]:
            self.held = self.held.rows(first, self.held.end)
        return self.held

    def _shared(self):
        """What `official` needs to know of the whole image before the first row."""
        if not hasattr(self.model.head, "shared"):
            return None
        # Of two passes the first keeps the Gaussians alone. All is written in place: bands joined
        # to what is there already would take the memory twice.
        two, whole, done = self._two_passes(), None, 0
        while done < self.lr_size[0]:
            band = self._encoded(done, done + 1)
            fields = {"gaussians": band.tensors.gaussians} if two else band.tensors._asdict()
            if whole is None:
                shapes = {n: (*t.shape[:-2], *self.lr_size) for n, t in fields.items()}
                whole = {n: t.new_empty(shapes[n]) for n, t in fields.items()}
            for name, t in fields.items():
                whole[name][..., done : band.end, :] = t
            done, self.held = band.end, None
        if two:
            self._rewind()
        else:
            self.held = Band(0, type(band.tensors)(**whole))
        return self.model.head.shared(whole["gaussians"])

    def _two_passes(self) -> bool:
        if not hasattr(self.model.head, "shared") or self.band >= self.lr_size[0]:
            return False
        channels = self.model.config.encoder.n_feats
        return 4 * channels * self.batch * math.prod(self.lr_size) > self.keep

    def _rewind(self) -> None:
        self.stream, self.held, self.next = None, None, 0

    def _halve(self, error: Exception) -> None:
        """Go on with bands and strips of half the size, from where the result has got to."""
        if self.band == self.strip == 1:
            raise InputError(
                "there is not enough memory to encode and render even single rows of this image; "
                "cut it into parts, or use a machine with more memory"
            ) from error
        self.band, self.strip = max(1, self.band // 2), max(1, self.strip // 2)
        self._rewind()

    def _advance(self, pixels: int, which: int) -> None:
        if self.bar is not None:
            step = self.batch * pixels * _costs(self.model)[which]
            self.bar.update(min(step, max(self.bar.total - self.bar.n, 0)))


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator has no exception of its own.
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or "allocate memory" in str(error)


def _resident() -> int:
    """Bytes of memory that the process holds now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _dtype(precision: str, work: StripRenderer) -> torch.dtype:
    """The type that convolutions run in."""
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "auto":
        large = work.lr_size[0] * work.lr_size[1] >= 8 * PROBE**2
        precision = "bf16" if large and _has_bf16(work.model) and _bf16_is_enough(work) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _has_bf16(model: GaussianSR) -> bool:
    device = model_device(model)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without instructions for it, a processor is slower in bf16 than in float32.
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def _bf16_is_enough(work: StripRenderer) -> bool:
    """Whether bf16 loses at most LOSS dB in giving back the image's middle from its half size."""
    (h, w), side = work.lr_size, PROBE
    top, left = (h - min(h, side)) // 2, (w - min(w, side)) // 2
    true = work.source(top, top + min(h, side))[:1, :, :, left : left + side]
    from gsr.ops.resize import imresize

    half = imresize(true[0].permute(1, 2, 0).cpu().numpy(), 0.5)
    lr = torch.from_numpy(half).permute(2, 0, 1)[None].to(true)
    error = {
        p: (run(work.model, lr, true.shape[-2:], precision=p) - true).square().mean().item()
        for p in ("fp32", "bf16")
    }
    return error["bf16"] <= error["fp32"] * 10 ** (LOSS / 10)


def _costs(model: GaussianSR) -> tuple[float, float]:
    """Rough work per LR pixel encoded and per HR pixel rendered, in one unit, for the bar."""
    # The encoder is convolutions at LR, whose multiply-adds per pixel are their weights.
    encode = sum(weight.numel() for weight in model.encoder.parameters())
    config = model.config
    if config.mode == "direct":
        # A weight of the compiled splat, with its share of the bicubic base, took as long as 70
        # multiply-adds of a convolution (measured on a CPU).
        return encode, 70.0 * config.direct.gaussians * (2 * config.direct.radius + 1) ** 2
    return encode, sum(weight.numel() for weight in model.head.parameters())


def estimate(
    model: GaussianSR, shape: tuple[int, int], size: tuple[int, int], precision: str = "auto"
) -> float:
    """Seconds that `upscale` will take, about, from an image of `shape` (h, w) to `size` (H, W).

    Measured on a piece of at most 128 x 128, which takes its time twice.
    """
    part = tuple(min(n, PROBE) for n in shape)
    large = tuple(max(1, n_hr * p // n) for p, n, n_hr in zip(part, shape, size, strict=True))
    if precision == "auto":  # as it will be for nearly all images
        bf16 = math.prod(shape) >= 8 * PROBE**2 and _has_bf16(model)
        precision = "bf16" if bf16 else "fp32"
    lr = torch.rand(1, 3, *part, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the first compiles and allocates
        start = time.perf_counter()
        run(model, lr, large, precision=precision)
        seconds = time.perf_counter() - start
    work = [
        StripRenderer(model, None, (1, 3, *of), to, None, "fp32").cost()
        for of, to in ((part, large), (shape, size))
    ]
    return seconds * work[1] / work[0]


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within; every module's own training flag restored after."""
    before = [(module, True) for module in model.modules() if module.training]
    if before:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def progress_bar(progress: bool) -> Iterator[Any]:
    if not progress:
        yield None
        return
    from tqdm import tqdm

    shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(desc="gsr", total=0, bar_format=shape, leave=False) as bar:
        yield bar


def model_device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
