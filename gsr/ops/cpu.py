"""The splat on the CPU: what `gsr.ops.reference.splat` and `splat_at` compute, in compiled loops.

Four plain functions of CPU tensors, without autograd: `forward` and `backward` for an HR grid,
`forward_at` and `backward_at` for points. The loops need Numba, the extra `cpu`. It is imported at
the first call and then compiles for some seconds; later processes read its cache. Without Numba the
functions run `gsr.ops.reference` piece by piece.

`gsr.ops.operators` checks the arguments; tensors may have any strides. Half precision is computed
in float32. The result has the promoted type of the tensors, as in `gsr.ops.reference`, and every
gradient the type of its tensor.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsr.ops import reference
from gsr.ops.arguments import Gaussians, Grid, Weighting, join_channels, split_channels

CHANNELS = 16  # the loops are compiled for a number of channels; beyond this one, in parts
THREAD = 1 << 20  # weights, about 0.2 ms: what is worth starting a thread for
PIECE = 1 << 18  # weights at once without Numba, about 60 MB for 3 channels


def forward(gaussians: Gaussians, grid: Grid, weighting: Weighting) -> Tensor:
    """`gsr.ops.reference.splat`: [B, C, stop - start, W]."""
    return _forward(_Splat(gaussians, _Pixels(grid), weighting))


def backward(grad: Tensor, gaussians: Gaussians, grid: Grid, weighting: Weighting) -> Gaussians:
    """Gradients of the Gaussians from that of `forward`'s result."""
    return _backward(grad, _Splat(gaussians, _Pixels(grid), weighting))


def forward_at(gaussians: Gaussians, points: Tensor, weighting: Weighting) -> Tensor:
    """`gsr.ops.reference.splat_at`: [B, Q, C]."""
    return _forward(_Splat(gaussians, _Points(points.detach()), weighting))


def backward_at(
    grad: Tensor, gaussians: Gaussians, points: Tensor, weighting: Weighting
) -> Gaussians:
    """Gradients of the Gaussians from that of `forward_at`'s result."""
    return _backward(grad, _Splat(gaussians, _Points(points.detach()), weighting))


@dataclass
class _Splat:
    """Which Gaussians go where, and how."""

    gaussians: Gaussians
    where: _Pixels | _Points
    weighting: Weighting

    @property
    def weights(self) -> int:
        """How many there are, as a measure of the work."""
        b, k, _, _, _ = self.gaussians.values.shape
        return math.prod(self.where.shape(b, 1)) * k * (2 * self.weighting.radius + 1) ** 2


def _forward(splat: _Splat) -> Tensor:
    values = splat.gaussians.values
    b, _, c = values.shape[:3]
    working, promoted = _types(splat.gaussians)
    out = torch.empty(splat.where.shape(b, c), dtype=working, device=values.device)
    if out.numel() and (loops := _loops_for(values)):
        _fill(loops, out, splat)
    elif out.numel():
        _fill_in_pieces(out, splat)
    return out.to(promoted)


def _backward(grad: Tensor, splat: _Splat) -> Gaussians:
    gaussians = splat.gaussians
    working, _ = _types(gaussians)
    grad = grad.detach().to(working)
    if not grad.numel():
        return gaussians.map(torch.zeros_like)
    if loops := _loops_for(gaussians.values):
        gradients = _gradients(loops, grad, splat)
    else:
        gradients = _gradients_in_pieces(grad, splat)
    types = iter([t.dtype for t in gaussians if t is not None])
    return gradients.map(lambda gradient: gradient.to(next(types)))


def _types(gaussians: Gaussians) -> tuple[torch.dtype, torch.dtype]:
    """The type to compute in, and that of the result."""
    types = [t.dtype for t in gaussians if t is not None]
    promoted = functools.reduce(torch.promote_types, types)
    return torch.promote_types(promoted, torch.float32), promoted


def _loops_for(tensor: Tensor) -> ModuleType | None:
    """`_loops`, for a tensor whose memory the CPU can read; others have the reference's pieces."""
    return _loops() if tensor.device.type == "cpu" else None


@functools.lru_cache(maxsize=1)
def _loops() -> ModuleType | None:
    """`gsr.ops.cpu_loops`, or None where Numba does not run."""
    try:
        from gsr.ops import cpu_loops
    except ImportError as error:
        print(
            f"gsr: the splat runs many times slower than it could on this CPU ({error}); "
            "fix: pip install 'gaussiansr[cpu]'",
            file=sys.stderr,
        )
        return None
    return cpu_loops


# ---- where to splat ------------------------------------------------------------------------------


@dataclass
class _Pixels:
    """The HR pixels of a grid."""

    grid: Grid

    along = 2  # the dimension of a result that pieces divide

    def shape(self, b: int, c: int) -> tuple[int, ...]:
        (start, stop), (_, width) = self.grid.rows, self.grid.size
        return b, c, stop - start, width

    def layout(self, c: int) -> tuple[int, int, int]:
        plane = math.prod(self.shape(1, 1))
        return c * plane, plane, 1

    def band(self, h: int) -> tuple[int, int]:
        return self.grid.band

    def cells(
        self, loops: ModuleType, lr_shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Any, tuple[int, int]]:
        """As gsr.ops.cpu_loops.Cells; (start, stop) of the LR rows that have pixels."""
        (_, h, w), (height, width), (start, stop) = lr_shape, self.grid.size, self.grid.rows
        row, y, top = _axis(h, height)
        _, x, left = _axis(w, width)
        none, top = np.empty(0, np.int64), top.clip(start, stop)
        y, x = (_flat(torch.as_tensor(away), dtype) for away in (y, x))
        return loops.Cells(top, left, none, none, y, x), (row[start], row[stop - 1] + 1)

    def piece(self, start: int, stop: int) -> _Pixels:
        top, _ = self.grid.rows
        return _Pixels(self.grid._replace(rows=(top + start, top + stop)))

    def reference(self, gaussians: Gaussians, weighting: Weighting) -> Tensor:
        return reference.splat(gaussians, self.grid, weighting)


@dataclass
class _Points:
    """Points, with the methods of `_Pixels`."""

    points: Tensor  # [B, Q, 2]

    along = 1

    def shape(self, b: int, c: int) -> tuple[int, ...]:
        return b, self.points.shape[1], c

    def layout(self, c: int) -> tuple[int, int, int]:
        return self.points.shape[1] * c, 1, c

    def band(self, h: int) -> tuple[int, int]:
        return 0, h

    def cells(
        self, loops: ModuleType, lr_shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Any, tuple[int, int]]:
        b, h, w = lr_shape
        corner = torch.tensor([h - 1, w - 1])
        nearest = torch.floor(self.points + 0.5)
        nearest = nearest.clamp(torch.zeros(2).to(nearest), corner.to(nearest))
        # A point that is not a number has no nearest pixel, but must be read from an existing one.
        pixel = nearest.long().clamp(torch.zeros_like(corner), corner)
        cell = _flat((torch.arange(b)[:, None] * h + pixel[..., 0]) * w + pixel[..., 1], torch.long)
        start, order = np.empty(b * h * w + 1, np.int64), np.empty(cell.size, np.int64)
        loops.group(cell, start, order)
        away = self.points - nearest
        y, x = (_flat(away[..., axis], dtype)[order] for axis in (0, 1))
        none = np.empty(0, np.int64)
        return loops.Cells(none, none, start, order % self.points.shape[1], y, x), (0, h)

    def piece(self, start: int, stop: int) -> _Points:
        return _Points(self.points[:, start:stop])

    def reference(self, gaussians: Gaussians, weighting: Weighting) -> Tensor:
        return reference.splat_at(gaussians, self.points, weighting)


def _axis(n: int, size: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Every HR pixel's nearest LR pixel and distance from it, and where LR pixels' HR pixels start.

    HR pixel p sits at (2 p + 1) n / (2 size) - 1/2 LR pixels. Whole numbers say without rounding
    which LR pixel is nearest: in the middle between two, the right one.
    """
    numerator = (2 * np.arange(size, dtype=np.int64) + 1) * n
    nearest = numerator // (2 * size)
    start = -((n - 2 * size * np.arange(n + 1, dtype=np.int64)) // (2 * n))
    return nearest, (numerator - (2 * nearest + 1) * size) / (2 * size), start


# ---- with Numba ----------------------------------------------------------------------------------


def _flat(tensor: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    return tensor.detach().to(dtype).contiguous().view(-1).numpy()


def _planes(
    gaussians: Gaussians, dtype: torch.dtype, top: int
) -> tuple[NDArray[np.int64], list[Tensor]]:
    """Addresses of the planes [h, w] of all parameters, and the tensors that own them.

    Flat [B, K, 6 + C] in the order of the loops: offset, sigma, rho, opacity, values; 0 where there
    is no offset.
    """
    values, sigma, rho, opacity, offset = gaussians
    b, k, _, _, w = values.shape
    owners: list[Tensor] = []
    addresses: list[NDArray[np.int64]] = []
    for tensor in (offset, sigma, rho[:, :, None], opacity[:, :, None], values):
        if tensor is None:
            addresses.append(np.zeros((b, k, 2), np.int64))
            continue
        tensor = tensor.detach().to(dtype)
        if tensor.stride()[3:] != (w, 1):
            tensor = tensor.contiguous()
        steps = np.ogrid[:b, :k, : tensor.shape[2]]
        elements: Any = sum(n * stride for n, stride in zip(steps, tensor.stride(), strict=False))
        # The address that row 0 of the image would have; the loops touch no row above `top`, where
        # the tensors start.
        addresses.append(tensor.data_ptr() + tensor.element_size() * (elements - top * w))
        owners.append(tensor)
    return np.concatenate(addresses, axis=2).ravel(), owners


def _channels(part: Gaussians) -> tuple[int, ...]:
    """What stands for a number of channels in the loops."""
    return (0,) * part.values.shape[2]


def _run(
    task: Callable[[int, int, int], object], images: int, rows: tuple[int, int], *, weights: int
) -> None:
    """task(image, start, stop) for parts of the LR rows (start, stop) of all images, in threads.

    As many threads as torch has, if there are weights enough for them.
    """
    start, stop = rows
    threads = max(1, min(torch.get_num_threads(), weights // THREAD))
    step = stop - start if threads == 1 else -(-images * (stop - start) // (4 * threads))
    tasks = [(n, i, min(i + step, stop)) for n in range(images) for i in range(start, stop, step)]
    todo = iter(tasks)  # shared, so that a thread that is done early takes more

    def work() -> None:
        for block in todo:
            task(*block)

    if threads == 1:
        return work()
    # Python's threads, for which the loops release the lock. Numba's own may be started by one
    # thread at a time, and would break a process that forks.
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
    for other in others:
        other.result()


def _fill(loops: ModuleType, out: Tensor, splat: _Splat) -> None:
    gaussians, where, weighting = splat.gaussians, splat.where, splat.weighting
    b, k, c, h, w = gaussians.values.shape
    top, h = where.band(h)
    target = out.view(-1).numpy()
    cells, rows = where.cells(loops, (b, h, w), out.dtype)
    shape, layout = loops.Shape(k, h, w, weighting.radius), loops.Layout(*where.layout(c))
    for n, part in enumerate(split_channels(gaussians, CHANNELS)):
        planes, _owners = _planes(part, out.dtype, top)
        task = functools.partial(
            loops.splat, target[n * CHANNELS * layout.channel :], planes, _channels(part), cells,
            shape, layout, bool(weighting.normalize), float(weighting.eps),
        )  # fmt: skip
        _run(task, b, rows, weights=splat.weights)


def _gradients(loops: ModuleType, grad: Tensor, splat: _Splat) -> Gaussians:
    gaussians, where, weighting = splat.gaussians, splat.where, splat.weighting
    b, k, c, h, w = gaussians.values.shape
    radius, dtype = weighting.radius, grad.dtype
    top, h = where.band(h)
    source = _flat(grad, dtype)
    cells, rows = where.cells(loops, (b, h, w), dtype)
    around = max(rows[0] - radius, 0), min(rows[1] + radius, h)
    shape, layout = loops.Shape(k, h, w, radius), loops.Layout(*where.layout(c))
    begin = np.empty((b, h * -(-w // loops.LANES) + 1), np.int64)
    loops.count_passes(begin, cells, shape)
    parts: list[Gaussians] = []
    for n, part in enumerate(split_channels(gaussians, CHANNELS)):
        parts.append(part.map(lambda t: torch.zeros(t.shape, dtype=dtype)))
        (out, _), (planes, _owners) = _planes(parts[-1], dtype, top), _planes(part, dtype, top)
        channels = _channels(part)
        notes = np.empty(begin[-1, -1] * (3 + len(channels)) * loops.LANES, source.dtype)
        note = functools.partial(
            loops.note, notes, begin, source[n * CHANNELS * layout.channel :], planes, channels,
            cells, shape, layout, bool(weighting.normalize), float(weighting.eps),
        )  # fmt: skip
        gather = functools.partial(loops.gather, out, notes, begin, planes, channels, shape)
        _run(note, b, rows, weights=splat.weights)
        _run(gather, b, around, weights=2 * splat.weights)
    return join_channels(parts)


# ---- without -------------------------------------------------------------------------------------


def _pieces(splat: _Splat) -> list[tuple[int, int]]:
    """Consecutive parts (start, stop) of the rows or points, with about PIECE weights each."""
    n = splat.where.shape(1, 1)[splat.where.along]
    step = max(1, PIECE * n // max(1, splat.weights))
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def _fill_in_pieces(out: Tensor, splat: _Splat) -> None:
    where = splat.where
    with torch.no_grad():
        gaussians = splat.gaussians.map(lambda t: t.detach().to(out.dtype))
        for start, stop in _pieces(splat):
            piece = where.piece(start, stop).reference(gaussians, splat.weighting)
            out.narrow(where.along, start, stop - start).copy_(piece)


def _gradients_in_pieces(grad: Tensor, splat: _Splat) -> Gaussians:
    where = splat.where

    def run() -> Gaussians:
        leaves = splat.gaussians.map(lambda t: t.detach().to(grad.dtype, copy=True))
        leaves = leaves.map(Tensor.requires_grad_)
        for start, stop in _pieces(splat):
            piece = where.piece(start, stop).reference(leaves, splat.weighting)
            torch.autograd.backward(piece, grad.narrow(where.along, start, stop - start))
        return leaves.map(_gradient)

    # Inside an operator, or in inference mode, autograd does not record; both end with the thread.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
