"""Upscaling on a GPU: bands as large as its memory allows, results copied while it computes.

A GPU is busy only with much work at a time, and waits for the CPU at every synchronisation. So the
image is encoded in one band where that fits, strips are for the copies alone, and nothing waits but
the caller, for a strip that has been copied.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsr.inference.strips import (
    STRIP_BYTES,
    _costs,
    check_memory,
    choose_dtype,
    is_out_of_memory,
    model_device,
    refuse,
)
from gsr.models import GaussianSR
from gsr.models.fused import fast_encoder
from gsr.models.stream import Band

STRIP_PIXELS = 2**22  # HR pixels that are copied at once, 12 MB of bytes
SHARE = 0.8  # of the free memory that bands and strips may take
# In page-locked memory: one that the caller writes from, one that has come, one that is coming.
BUFFERS = 3
HR_BYTES = 100  # of an HR pixel while it is rendered: float32 three or four times, and what is made


class Rows(NamedTuple):
    """What is computed at once."""

    band: int  # LR rows
    strip: int  # HR rows


def rows_that_fit(
    free: float, model: GaussianSR, batch: int, lr_size: tuple[int, int], size: tuple[int, int]
) -> Rows:
    """Rows that are encoded and rendered at once on a device with so many bytes free.

    One band where that fits. Where it does not, a band is encoded with the halo around it, which
    the bytes then have to hold as well. At least one row, whatever there is.
    """
    (h, w), (high, wide) = lr_size, size
    strip = min(high, max(1, STRIP_PIXELS // (batch * wide)))
    room = SHARE * free
    # Strips take a quarter at most: what they need they need twice, and bands gain more from it.
    strip = min(strip, max(1, int(room / 4 / (HR_BYTES * batch * wide))))
    room -= HR_BYTES * batch * wide * strip
    row = batch * w * lr_bytes(model)
    if h * row <= room:
        return Rows(h, strip)
    return Rows(min(h, max(1, int(room / row) - 2 * model.halo)), strip)


def lr_bytes(model: GaussianSR) -> int:
    """Bytes of an LR pixel while it is encoded, and of what it becomes."""
    c = model.config.encoder.n_feats
    # An encoder that says what it holds counts float32. The others hold x, two of a branch, the
    # first features, and two that are converted.
    floats, _ = getattr(model.encoder, "floats", (6 * c, 0))
    head = getattr(model.head, "floats", 0)
    if model.config.mode == "direct":
        d = model.config.direct
        head = d.width + 3 * 9 * d.gaussians  # as they come, planes, and parameters
    elif hasattr(model.head, "bank"):
        head = 3 * model.config.bank.points + c
    return 4 * (floats + head)


class GpuRenderer:
    """Upscales one image, as `gsr.inference.strips.StripRenderer` does, on a GPU.

    Args:
        source, shape: as there; the source must not wait for the device.
        finish: applied to every strip, on the device.
        to: the device where the strips are wanted.
        interleaved: the channels of a pixel lie together in a strip's memory.
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
        to: torch.device | str = "cpu",
        interleaved: bool = False,
    ):
        self.model, self.source, self.size, self.scale, self.bar = model, source, size, scale, bar
        self.batch, self.lr_size, self.finish = shape[0], tuple(shape[-2:]), finish
        self.device, self.dtype = model_device(model), choose_dtype(precision, model)
        self.interleaved, self.host = interleaved, torch.device(to).type == "cpu"
        free = free_bytes(self.device)
        self.rows = rows_that_fit(free, model, self.batch, self.lr_size, size)
        self.held: Band | None = None  # the encoded LR rows
        self.stop = 0  # LR rows until there can be used
        # What `GaussianSR.compile` or a subclass has made serves as it is.
        own = "_encode" in vars(model) or type(model) is not GaussianSR
        self.encoder = None if own else fast_encoder(model.encoder, self.dtype)

    def fit(self, max_memory: int | None, result: int) -> None:
        """Choose strips so that the process stays within `max_memory` bytes of the CPU's memory.

        `result` is how many bytes of the result are still to be written. Raises InputError if not
        even single rows fit.
        """
        if max_memory is not None:
            row = BUFFERS * 4 * 4 * self.batch * self.size[1]  # at most float32, and alpha
            left = check_memory(max_memory, result, STRIP_BYTES + row)
            strip = min(self.rows.strip, int((left - STRIP_BYTES) // row))
            self.rows = self.rows._replace(strip=strip)
        if self.bar is not None:
            self.bar.total = (self.bar.total or 0) + self._row_cost() * self.size[0]
            self.bar.refresh()

    def _row_cost(self) -> float:
        """How much there is to do for an HR row, in the unit of `_costs`."""
        encode, render = _costs(self.model)
        lr, hr = math.prod(self.lr_size), math.prod(self.size)
        return self.batch * (encode * lr + render * hr) / self.size[0]

    def strips(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, HR rows [B, 3, stop - start, W] float32), from the top.

        What `finish` makes of the rows, where it is given. On the CPU they are in memory that is
        written again once the next strip but one is asked for.
        """
        copies = HostCopies(self.device) if self.host else None
        before: tuple[int, int, Callable[[], Tensor]] | None = None
        for start, stop, strip in self._compute():
            if self.interleaved:
                strip = strip.movedim(-3, -1).contiguous()
            now = start, stop, copies.start(strip) if copies else lambda strip=strip: strip
            if before is not None:
                yield self._come(*before)
            before = now
        if before is not None:
            yield self._come(*before)

    def _come(self, start: int, stop: int, wait: Callable[[], Tensor]) -> tuple[int, int, Tensor]:
        strip = wait()
        if self.bar is not None:
            self.bar.update(self._row_cost() * (stop - start))
        return start, stop, strip.movedim(-1, -3) if self.interleaved else strip

    def _compute(self) -> Iterator[tuple[int, int, Tensor]]:
        """The strips, as soon as the device has been told to make them."""
        start, shared = 0, None
        while start < self.size[0]:
            strip, stop = None, start
            try:
                if shared is None and hasattr(self.model.head, "shared"):
                    shared = self._shared()
                stop = self._encode(start)
                strip = self._render(start, stop, shared)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
            if strip is None:  # the error and what it held are gone by now
                release(self.device)
            else:
                yield start, stop, strip
                start = stop

    def _needed(self, start: int, stop: int) -> tuple[int, int]:
        return self.model.rows_needed((start, stop), self.lr_size, self.size, self.scale)

    def _encode(self, start: int) -> int:
        """Have the LR rows that a strip from HR row `start` on needs; return where it stops."""
        if self.held is None or self._needed(start, start + 1)[1] > self.stop:
            first, last = self._needed(start, start + 1)
            self.held = None  # its memory serves the next one
            self._encode_rows(first, max(last, min(first + self.rows.band, self.lr_size[0])))
        end = min(start + self.rows.strip, self.size[0])
        ys = range(start, end)
        return start + bisect_right(ys, self.stop, key=lambda y: self._needed(y, y + 1)[1])

    def _encode_rows(self, start: int, stop: int) -> None:
        """Encode LR rows with the halo around them, or all where a band holds all."""
        h, halo = self.lr_size[0], self.model.halo
        if self.rows.band >= h:
            top, bottom, self.stop = 0, h, h
        else:
            step = getattr(self.model.encoder, "alignment", 1)
            top, bottom, self.stop = max(0, start - halo) // step * step, min(h, stop + halo), stop
        lr = self.source(top, bottom)
        with self._autocast():
            if self.encoder is None:
                encoded = self.model.encode(lr)
            else:
                encoded = self.model.head.encode(self.encoder(lr), lr)
        self.held = Band(top, encoded)

    def _render(self, start: int, stop: int, shared: Any) -> Tensor:
        if self.held is None:
            raise RuntimeError("no LR rows are encoded yet")
        whole = self.held.stop - self.held.start == self.lr_size[0]
        band = None if whole else (self.held.start, self.lr_size[0])
        with self._autocast():
            strip = self.model.render(
                self.held.tensors, self.size, self.scale, (start, stop), band, shared
            )
        strip = strip.float()
        return strip if self.finish is None else self.finish(strip)

    def _shared(self) -> Any:
        """What `official` needs to know of the whole image before the first row."""
        whole, start = None, 0
        while start < self.lr_size[0]:
            self.held = None
            self._encode_rows(start, min(start + self.rows.band, self.lr_size[0]))
            held: Any = self.held
            part = held.rows(start, self.stop).tensors.gaussians
            if self.rows.band >= self.lr_size[0]:
                return self.model.head.shared(part)  # and what is held serves all strips
            if whole is None:
                whole = part.new_empty(*part.shape[:-2], *self.lr_size)
            whole[..., start : self.stop, :] = part
            start = self.stop
        self.held = None
        return self.model.head.shared(whole)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16)

    def _halve(self, error: Exception) -> None:
        """Go on with bands and strips of half the size, from where the result has got to."""
        band, strip = self.rows
        if band == strip == 1:
            refuse(error)
        self.rows, self.held = Rows(max(1, band // 2), max(1, strip // 2)), None


class HostCopies:
    """Copies strips to the CPU on a stream of their own, while the device computes the next."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.buffers: list[Tensor | None] = [None] * BUFFERS
        self.next = 0

    def start(self, strip: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a contiguous strip; what is returned waits for it and gives it."""
        i, self.next = self.next, (self.next + 1) % BUFFERS
        buffer = self.buffers[i]
        if buffer is None or buffer.numel() < strip.nbytes:
            # PyTorch keeps page-locked memory for the next image.
            buffer = self.buffers[i] = pinned_bytes(strip.nbytes)
        host = buffer[: strip.nbytes].view(strip.dtype).view(strip.shape)
        done = torch.cuda.Event()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(strip, non_blocking=True)
            done.record(self.stream)
        strip.record_stream(self.stream)  # its memory is free once it is copied, not before

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait


def pinned_bytes(count: int) -> Tensor:
    """So many bytes of page-locked memory, from and to which a device copies by itself."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


def free_bytes(device: torch.device) -> int:
    """Bytes of the device's memory that a computation can have: free, or kept by PyTorch."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def release(device: torch.device) -> None:
    """Give back what PyTorch keeps of the device's memory."""
    with torch.cuda.device(device):
        torch.cuda.empty_cache()


# ---- TF32 ---------------------------------------------------------------------------------------

_lock, _inside, _before = Lock(), 0, []


@contextmanager
def exact_float32() -> Iterator[None]:
    """Have float32 products and convolutions of a GPU keep all their digits within.

    PyTorch has convolutions in TF32, with 10 bits of 23, unless it is told otherwise. Its settings
    are those of the process: they are as before once all calls in all threads have ended.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = [get() for get, _ in _tf32_settings()]
            for (_, put), now in zip(_tf32_settings(), _before, strict=True):
                exact = False if isinstance(now, bool) else "ieee"
                if now not in (exact, "none"):
                    put(exact)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for (get, put), was in zip(_tf32_settings(), _before, strict=True):
                    if get() != was:
                        put(was)


def _tf32_settings() -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """How PyTorch's settings are read and set: strings since 2.9, flags before."""
    new = hasattr(torch.backends.cudnn, "conv")
    places: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    places[0] = torch.backends.cudnn.conv if new else places[0]  # pyright: ignore
    name = "fp32_precision" if new else "allow_tf32"
    return [
        (lambda p=p: getattr(p, name), lambda value, p=p: setattr(p, name, value)) for p in places
    ]
