"""Upscale images of any size in bounded memory: bands of LR rows in, strips of HR rows out.

The encoder runs as a stream of rows (`gsr.models.stream`), one stream for each tile of columns, so
that hardly anything is computed twice; a strip of HR rows is rendered from the encoded LR rows
around it; and both are forgotten as soon as nothing depends on them. The result is that of the
model on the whole image, to 1e-5 in float32 (see `gsr.ops.resize.bicubic` for very tall images).
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from numbers import Real
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gsr.device import at_once, has_fast_bf16, keep_pieces, threaded_map, trim_malloc
from gsr.errors import InputError
from gsr.models.stream import Band, join

if TYPE_CHECKING:
    from gsr.models import GaussianSR

BAND_PIXELS = 2**14  # LR pixels that a thread encodes at once
STRIP_PIXELS = 2**16  # HR pixels that a thread renders at once
AT_ONCE = 8  # strips that each thread renders before the caller gets them
TILE = 1024  # LR columns of a tile, about
HALO_SHARE = 0.1  # of the encoder's work may go into the halos between tiles
STRIP_BYTES = 60_000_000  # besides what goes with its pixels
KEEP = 2**28  # bytes of encoded LR that `official` keeps, rather than encode twice
PRECISIONS = ("auto", "fp32", "bf16")
BF16_LOSS = 0.01  # dB of PSNR that bf16 may cost a model for "auto" to take it


def run(
    model: GaussianSR,
    lr: Tensor,
    size: tuple[int, int],
    scale: float | tuple[float, float] | None = None,
    progress: bool = False,
    max_memory: int | None = None,
    precision: str = "fp32",
) -> Tensor:
    """Upscale lr [B, 3, h, w] in [0, 1] to float32 [B, 3, H, W], size = (H, W), not clamped.

    Equals `model(lr, size=size, scale=scale)` in evaluation mode to 1e-5, in memory that hardly
    grows with the image but by the result. Works on the model's device and gives the result on
    that of lr. `scale` (s or (s_y, s_x)) is H / h and W / w if left out; `progress` shows a bar on
    stderr; `max_memory` and `precision` as in `upscale`. The model's training flags are left as
    they were.
    """

    from gsr.models.sizes import check_lr

    check_lr(lr)

    def source(start: int, stop: int) -> Tensor:
        rows = lr[..., start:stop, :].detach()
        return rows.to(model_device(model), torch.float32, non_blocking=True)

    out = torch.empty(lr.shape[0], 3, *size, dtype=torch.float32, device=lr.device)
    with progress_bar(progress) as bar, inference(model):
        renderer = make_renderer(
            model, source, lr.shape, size, scale, precision, bar=bar, to=lr.device
        )
        renderer.fit(max_memory, out.nbytes)
        for start, stop, strip in renderer.strips():
            out[:, :, start:stop] = strip
    return out


def make_renderer(
    model: GaussianSR,
    *arguments: Any,
    to: torch.device | str,
    interleaved: bool = False,
    **options: Any,
) -> Any:
    """A `StripRenderer` with these arguments, or what takes its place on a GPU.

    `to` is the device where the strips are wanted; `interleaved` says that the channels of a pixel
    lie together in what is made of them.
    """
    if model_device(model).type != "cuda":
        return StripRenderer(model, *arguments, **options)
    from gsr.inference.gpu import GpuRenderer

    return GpuRenderer(model, *arguments, **options, to=to, interleaved=interleaved)


class Tile(NamedTuple):
    """LR columns start to stop, encoded from columns left to right."""

    start: int
    stop: int
    left: int
    right: int


def make_tiles(model: GaussianSR, width: int, threads: int) -> list[Tile]:
    """Cut the LR columns so that each of the threads has as many tiles, or into one."""
    least = 2 * max(model.halo, 1) / HALO_SHARE  # columns that are worth their halo
    count = math.ceil(width / TILE / threads) * threads
    if count * least > width:
        count = int(width / least) // threads * threads or 1
    edges = [width * i // count for i in range(count + 1)]
    step = getattr(model.encoder, "alignment", 1)
    return [
        Tile(
            start,
            stop,
            max(0, start - model.halo) // step * step if count > 1 else 0,
            min(width, stop + model.halo),
        )
        for start, stop in zip(edges, edges[1:], strict=False)
    ]


class _Room:
    """Room for the rows that come out of the tiles' streams, below those that are still needed.

    The streams write into it: joined afterwards, all rows would be in memory twice. It is made when
    the first of them knows how many rows there are.
    """

    def __init__(self, above: Band | None, width: int):
        self.above, self.width, self.lock = above, width, Lock()
        self.count = 0 if above is None else above.stop - above.start
        self.made: Band | None = None

    def put(self, out: Band, tile: Tile) -> None:
        with self.lock:
            if self.made is None:
                rows = self.count + out.stop - out.start
                new = out.map(lambda t: t.new_empty(*t.shape[:-2], rows, self.width))
                if self.above is not None:
                    for to, t in zip(new.tensors, self.above.tensors, strict=True):
                        to[..., : self.count, :] = t
                self.made = Band(out.start - self.count, new.tensors)
        columns = slice(tile.start - tile.left, tile.stop - tile.left)
        for to, t in zip(self.made.tensors, out.tensors, strict=True):
            to[..., self.count :, tile.start : tile.stop] = t[..., columns]


class StripRenderer:
    """Upscales one image: takes bands of LR rows, yields strips of HR rows.

    On the CPU every thread encodes tiles and renders strips of its own, with PyTorch computing on
    one thread in each: there are no barriers within the network, at which the threads of a busy
    machine would wait for the slowest.

    Args:
        source: (start, stop) to these LR rows, [B, 3, stop - start, w] float32 on the model's
            device.
        shape: [B, 3, h, w] of the LR image.
        finish: applied to every strip, on the thread that rendered it.
    """

    def __init__(
        self,
        model: GaussianSR,
        source: Callable[[int, int], Tensor],
        shape,
        size: tuple[int, int],
        scale,
        precision: str,
        *,
        finish: Callable[[Tensor], Tensor] | None = None,
        bar: Any = None,
    ):
        weight = next(model.parameters())
        self.device, self.threads = weight.device.type, 1
        self.model, self.source, self.size, self.scale, self.bar = model, source, size, scale, bar
        self.batch, self.lr_size, self.finish = shape[0], tuple(shape[-2:]), finish
        self.dtype = choose_dtype(precision, model)
        self.tiles = [Tile(0, shape[-1], 0, shape[-1])]
        if self.device == "cpu":
            keep_pieces()
            self.threads = torch.get_num_threads()
            self.tiles = make_tiles(model, shape[-1], self.threads)
        band, strip = (at_once(n, weight) // self.batch for n in (BAND_PIXELS, STRIP_PIXELS))
        # Where a band is encoded with its halo, that must not be most of the work.
        least = 1 if hasattr(model.encoder, "stream") else max(1, 4 * model.halo)
        widest = max(tile.right - tile.left for tile in self.tiles)
        self.band = min(self.lr_size[0], max(least, band // widest))  # rows
        self.strip = min(size[0], max(1, strip // size[1]))  # rows
        self.keep = KEEP
        self._rewind()

    # ---- memory and progress --------------------------------------------------------------------

    def fit(self, max_memory: int | None, result: int) -> None:
        """Choose bands and strips so that the process stays within `max_memory` bytes.

        `result` is how many bytes of the result are still to be written. Raises InputError if not
        even single rows fit.
        """
        if max_memory is not None:
            left = check_memory(max_memory, result, self._bytes(1, 1))
            while self._bytes(self.band, self.strip) > left:
                self.band, self.strip = max(1, self.band // 2), max(1, self.strip // 2)
            self.keep = min(KEEP, left - self._bytes(self.band, self.strip))
        if self.bar is not None:
            self.bar.total = (self.bar.total or 0) + self._cost()
            self.bar.refresh()

    def _bytes(self, band: int, strip: int) -> int:
        """What bands and strips of so many rows take, from the peaks of many runs."""
        (h, w), c = self.lr_size, self.model.config.encoder.n_feats
        # Of a band in the encoder, and of the rows that each of its convolutions keeps.
        pixel, column = getattr(self.model.encoder, "floats", (20 * c, 4 * self.model.halo * c))
        pixel += 4 * getattr(self.model.head, "floats", 0)  # what it makes of features, twice
        busy = sorted((tile.right - tile.left for tile in self.tiles), reverse=True)
        # All columns of what is encoded wait, twice while rows are joined.
        lr = 4 * min(band, h) * (pixel * sum(busy[: self.threads]) + 4 * c * w) + 4 * column * w
        if hasattr(self.model.head, "shared"):
            lr += 32 * h * w  # all Gaussians, and once more in whole windows
        hr = 600 * self.size[1] * strip
        if hasattr(self.model.head, "decoder"):
            hr += 4000 * self.size[1] * strip  # waves and two layers
        return self.batch * (lr + hr * self.threads) + STRIP_BYTES

    def _cost(self) -> float:
        """How much there is to do, in the unit of `_costs`."""
        encode, render = _costs(self.model)
        encode *= math.prod(self.lr_size) * (2 if self._two_passes() else 1)
        return self.batch * (encode + math.prod(self.size) * render)

    def _advance(self, pixels: int, which: int) -> None:
        if self.bar is not None:
            step = self.batch * pixels * _costs(self.model)[which]
            self.bar.update(min(step, max(self.bar.total - self.bar.n, 0)))

    # ---- rows -----------------------------------------------------------------------------------

    def strips(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, HR rows [B, 3, stop - start, W] float32), from the top.

        What `finish` makes of the rows, where it is given.
        """
        shared, start = None, 0
        while start < self.size[0]:
            try:
                if shared is None and self.band < self.lr_size[0]:
                    shared = self._shared()
                ready = self._ready(start)
                todo = ready[: self.threads * AT_ONCE]
                after = todo[-1][1] if todo else start
                tasks = [partial(self._render, rows, shared) for rows in todo]
                # The next band's tiles beside them: short tasks at the end keep all threads busy.
                done = self._encode(after, tasks) if todo == ready else self._run(tasks)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
                continue
            for rows, strip in zip(todo, done, strict=True):
                yield *rows, strip
                self._advance((rows[1] - rows[0]) * self.size[1], 1)
            start = after

    def _ready(self, start: int) -> list[tuple[int, int]]:
        """The strips from HR row `start` on for which the LR rows at hand suffice."""
        if self.held is None:
            return []
        stop = bisect_right(
            range(self.size[0]), self.held.stop, start, key=lambda y: self._needed(y, y + 1)[1]
        )
        count = math.ceil((stop - start) / self.strip)
        count = min(math.ceil(count / self.threads) * self.threads, stop - start)  # as many each
        edges = [start + (stop - start) * i // count for i in range(count + 1)] if count else []
        return list(zip(edges, edges[1:], strict=False))

    def _holds_all(self) -> bool:
        """Whether all encoded LR rows stay until the end."""
        return self.complete or self.band >= self.lr_size[0]

    def _held(self) -> Band:
        if self.held is None:
            raise RuntimeError("no LR rows are encoded yet")
        return self.held

    def _needed(self, start: int, stop: int) -> tuple[int, int]:
        return self.model.rows_needed((start, stop), self.lr_size, self.size, self.scale)

    def _render(self, rows: tuple[int, int], shared: Any) -> Tensor:
        lr = self._held()
        if not self._holds_all():
            lr = lr.rows(*self._needed(*rows))
        band = None if lr.stop - lr.start == self.lr_size[0] else (lr.start, self.lr_size[0])
        with self._autocast():
            strip = self.model.render(lr.tensors, self.size, self.scale, rows, band, shared)
        strip = strip.float()
        return strip if self.finish is None else self.finish(strip)

    def _autocast(self):
        return torch.autocast(self.device, torch.bfloat16, self.dtype == torch.bfloat16)

    def _encode(self, hr_row: int, others: Sequence[Callable[[], Tensor]] = ()) -> list[Tensor]:
        """Encode the next band of LR rows, if there is one, tile by tile, beside other tasks.

        Then those LR rows are at hand on which HR rows from `hr_row` on depend. Returns the results
        of the other tasks.
        """
        (h, w), start = self.lr_size, self.next
        if start == h or hr_row == self.size[0]:
            return self._run(others)
        needed = 0 if self._holds_all() else self._needed(hr_row, hr_row + 1)[0]
        if start is None:
            start = max(0, needed - self.model.halo)
        stop, count = min(start + self.band, h), len(self.tiles)
        pixels = self.source(start, stop)
        if self.device == "cpu":
            # oneDNN's convolutions are faster in this format. Not `contiguous`: it leaves the
            # stride of a batch of one as it is, from which convolutions take it for another.
            pixels = pixels.clone(memory_format=torch.channels_last)
        above = None  # the rows that the next ones are added to
        if self.held is not None:
            stop_held = self.held.stop
            above = self.held.rows(min(max(needed, self.held.start), stop_held), stop_held)
        room = _Room(above, w)
        tiles = [partial(self._encode_tile, i, Band(start, (pixels,)), room) for i in range(count)]
        if count > 1:
            results = self._run([*tiles, *others])[count:]
        else:  # PyTorch's own threads share its convolutions
            tiles[0]()
            results = self._run(others)
        if hasattr(self.model.encoder, "floats"):
            # A deep network's many sizes of tensors leave the heap full of holes, and beside its
            # arithmetic new pages cost nothing.
            trim_malloc()
        self.held, self.next = room.made or above, stop
        self._advance((stop - start) * w, 0)
        return results

    def _encode_tile(self, i: int, band: Band, room: _Room) -> None:
        """Feed these rows of all columns to a tile's stream; put what comes out into the room."""
        tile, ends = self.tiles[i], band.stop == self.lr_size[0]
        with self._autocast():
            if band.start == 0 and ends and len(self.tiles) == 1:
                # In one piece, so that what `GaussianSR.compile` has made serves.
                out = Band(0, self.model.encode(band.tensors[0]))
            else:
                if self.streams[i] is None:
                    self.streams[i] = self.model.stream()
                lr = band.map(lambda t: t[..., tile.left : tile.right])
                out = self.streams[i].feed(lr, False)
                if ends:
                    # The last rows for themselves: together with a band they would make each tensor
                    # a little larger than the one before, and none would fit where that has been.
                    out = join(out, self.streams[i].feed(None, True))
        if out is not None:
            room.put(out, tile)

    def _run(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of tasks, each run on one of the threads."""
        results = [None] * len(tasks)

        def run_one(i: int) -> None:
            results[i] = tasks[i]()

        threaded_map(run_one, range(len(tasks)), min(self.threads, len(tasks)))
        return results

    # ---- what needs the whole image -------------------------------------------------------------

    def _shared(self) -> Any:
        """What `official` needs to know of the whole image before the first row."""
        if not hasattr(self.model.head, "shared"):
            return None
        # Of two passes the first keeps the Gaussians alone. All is written in place: bands joined
        # to what is there already would take the memory twice.
        two, whole = self._two_passes(), {}
        kind: Any = None
        while self.next is None or self.next < self.lr_size[0]:
            self._encode(0)
            if self.held is None:
                continue
            band, self.held, kind = self.held, None, type(self.held.tensors)
            fields = dict(zip(kind._fields, band.tensors, strict=True))
            fields = {"gaussians": fields["gaussians"]} if two else fields
            for name, t in fields.items():
                if name not in whole:
                    whole[name] = t.new_empty(*t.shape[:-2], *self.lr_size)
                whole[name][..., band.start : band.stop, :] = t
        if two:
            self._rewind()
        else:
            self.held, self.complete = Band(0, kind(**whole)), True
        return self.model.head.shared(whole["gaussians"])

    def _two_passes(self) -> bool:
        if not hasattr(self.model.head, "shared") or self.band >= self.lr_size[0]:
            return False
        channels = self.model.config.encoder.n_feats
        return 4 * channels * self.batch * math.prod(self.lr_size) > self.keep

    def _rewind(self) -> None:
        self.streams: list[Any] = [None] * len(self.tiles)
        self.held: Band | None = None  # the encoded LR rows that are still needed
        self.complete = False
        self.next: int | None = None  # the next LR row to encode

    def _halve(self, error: Exception) -> None:
        """Go on with bands and strips of half the size, from where the result has got to."""
        if self.band == self.strip == 1:
            refuse(error)
        self.band, self.strip = max(1, self.band // 2), max(1, self.strip // 2)
        self.keep //= 2
        self._rewind()


def is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator has no exception of its own.
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or "allocate memory" in str(error)


def refuse(error: Exception) -> NoReturn:
    """Raise InputError: not even single rows fit into memory."""
    raise InputError(
        "there is not enough memory to encode and render even single rows of this image; "
        "cut it into parts, or use a machine with more memory"
    ) from error


def check_memory(max_memory: Any, result: int, least: int) -> float:
    """Return the bytes that are left of `max_memory` when the result, of so many, is written.

    Raises:
        InputError: it is no number, or less than `least` would be left.
    """
    number = isinstance(max_memory, Real) and not isinstance(max_memory, bool)
    if not number or math.isnan(max_memory):
        raise InputError(f"max_memory must be a number of bytes, not {max_memory!r}")
    taken = _resident() + result
    if taken + least > max_memory:
        raise InputError(
            f"this image takes about {(taken + least) / 1e6:.0f} MB, more than max_memory "
            f"(--max-memory) = {max_memory / 1e6:.0f} MB; allow more, or a smaller size"
        )
    return float(max_memory) - taken


def _resident() -> int:
    """Bytes of memory that the process holds now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def choose_dtype(precision: str, model: GaussianSR) -> torch.dtype:
    """The type that a model's convolutions run in.

    "auto" is bf16 where the device is fast in it and the model folder says that it costs little.

    Raises:
        InputError: precision is none of auto, fp32 and bf16.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "auto":
        loss = getattr(model, "bf16_loss", None)
        enough = loss is not None and loss <= BF16_LOSS
        precision = "bf16" if enough and has_fast_bf16(model_device(model)) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _costs(model: GaussianSR) -> tuple[float, float]:
    """Rough work per LR pixel encoded and per HR pixel rendered, in one unit, for the bar."""
    # The encoder is convolutions at LR, whose multiply-adds per pixel are their weights.
    encode = sum(weight.numel() for weight in model.encoder.parameters())
    config = model.config
    if config.mode == "direct":
        # A weight of the compiled splat, with its share of the bicubic upsampling, took as long as
        # 70 multiply-adds of a convolution (measured on a CPU).
        return encode, 70.0 * config.direct.gaussians * (2 * config.direct.radius + 1) ** 2
    return encode, sum(weight.numel() for weight in model.head.parameters())


def work(model: GaussianSR, shape: tuple[int, int], size: tuple[int, int]) -> float:
    """About how much it is to upscale an image of shape (h, w) to (H, W), in the bar's unit."""
    encode, render = _costs(model)
    return encode * math.prod(shape) + render * math.prod(size)


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within; every module's own training flag restored after.

    What is float32 is computed as that, also on a GPU.
    """
    before = [(module, True) for module in model.modules() if module.training]
    if before:
        model.eval()
    try:
        with torch.inference_mode(), _exact(model):
            yield
    finally:
        for module, training in before:
            module.training = training


def _exact(model: torch.nn.Module):
    if model_device(model).type != "cuda":
        return nullcontext()
    from gsr.inference.gpu import exact_float32

    return exact_float32()


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
