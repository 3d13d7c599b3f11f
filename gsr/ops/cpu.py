"""The splat on the CPU: what `gsr.ops.reference.splat` and `splat_at` compute, in compiled loops.

Four plain functions of CPU tensors, without autograd: `forward` and `backward` for an HR grid,
`forward_at` and `backward_at` for points. The loops need Numba, the extra `cpu`. It is imported at
the first call and then compiles for some seconds; later processes read its cache. Without Numba the
functions run `gsr.ops.reference` piece by piece.

Arguments are those of `gsr.ops.splat`, which checks them; tensors may have any strides. Half
precision is computed in float32. The result has the promoted type of the tensors, as in
`gsr.ops.reference`, and every gradient the type of its tensor.
"""

from __future__ import annotations

import functools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gsr.ops import reference

CHANNELS = 16  # the loops are compiled for a number of channels; beyond this one, in parts
THREAD = 1 << 20  # weights, about 0.2 ms: what is worth starting a thread for
PIECE = 1 << 18  # weights at once without Numba, about 60 MB for 3 channels


def forward(
    values: Tensor,  # [B, K, C, h, w]
    sigma: Tensor,  # [B, K, 2, h, w]
    rho: Tensor,  # [B, K, h, w]
    opacity: Tensor,  # [B, K, h, w]
    offset: Tensor | None,  # [B, K, 2, h, w]
    size: tuple[int, int],
    rows: tuple[int, int] | None,  # (first, last)
    radius: int,
    normalize: bool,
    eps: float,
    band: tuple[int, int] | None = None,  # (top, height of the LR image)
) -> Tensor:
    """`gsr.ops.reference.splat`: [B, C, last - first, W]."""
    where = _Rows(*size, *(rows or (0, size[0])), *(band or (0, values.shape[-2])))
    return _forward((values, sigma, rho, opacity, offset), where, radius, normalize, eps)


def backward(
    grad: Tensor, values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band=None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of values, sigma, rho, opacity and offset from that of `forward`'s result."""
    where = _Rows(*size, *(rows or (0, size[0])), *(band or (0, values.shape[-2])))
    return _backward(grad, (values, sigma, rho, opacity, offset), where, radius, normalize, eps)


def forward_at(
    values: Tensor,
    sigma: Tensor,
    rho: Tensor,
    opacity: Tensor,
    offset: Tensor | None,
    points: Tensor,  # [B, Q, 2]
    radius: int,
    normalize: bool,
    eps: float,
) -> Tensor:
    """`gsr.ops.reference.splat_at`: [B, Q, C]."""
    where = _Points(points.detach())
    return _forward((values, sigma, rho, opacity, offset), where, radius, normalize, eps)


def backward_at(
    grad: Tensor, values, sigma, rho, opacity, offset, points, radius, normalize, eps
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of values, sigma, rho, opacity and offset from that of `forward_at`'s result."""
    where = _Points(points.detach())
    return _backward(grad, (values, sigma, rho, opacity, offset), where, radius, normalize, eps)


def _forward(field, where, radius, normalize, eps):
    b, _, c = field[0].shape[:3]
    working, promoted = _types(field)
    out = torch.empty(where.shape(b, c), dtype=working, device=field[0].device)
    if out.numel() and (loops := _loops_for(field)):
        _splat(loops, out, field, where, radius, normalize, eps)
    elif out.numel():
        _splat_in_pieces(out, field, where, radius, normalize, eps)
    return out.to(promoted)


def _backward(grad, field, where, radius, normalize, eps):
    working, _ = _types(field)
    if not grad.numel():
        out = [None if t is None else torch.zeros_like(t, dtype=working) for t in field]
    elif loops := _loops_for(field):
        out = _gradients(loops, grad, field, where, radius, normalize, eps, working)
    else:
        out = _gradients_in_pieces(grad, field, where, radius, normalize, eps, working)
    return tuple(None if t is None else o.to(t.dtype) for o, t in zip(out, field, strict=True))


def _types(field) -> tuple[torch.dtype, torch.dtype]:
    """The type to compute in, and that of the result."""
    promoted = functools.reduce(torch.promote_types, [t.dtype for t in field if t is not None])
    return torch.promote_types(promoted, torch.float32), promoted


def _loops_for(field):
    """`_loops`, for tensors whose memory the CPU can read; others have the reference's pieces."""
    return _loops() if field[0].device.type == "cpu" else None


@functools.lru_cache(maxsize=1)
def _loops():
    """`gsr.ops.cpu_loops`, or None where Numba does not run."""
    try:
        from gsr.ops import cpu_loops
    except ImportError as error:
        print(
            f"gsr: the splat runs many times slower than it could on this CPU ({error}); "
            "mend: pip install 'gaussiansr[cpu]'",
            file=sys.stderr,
        )
        return None
    return cpu_loops


# ---- where to splat ------------------------------------------------------------------------------


@dataclass
class _Rows:
    """HR rows first ... last - 1 of an image H x W, from LR rows top ... of `tall` ones."""

    height: int
    width: int
    first: int
    last: int
    top: int
    tall: int

    along = 2  # the dimension of a result that pieces divide

    def shape(self, b, c):
        return b, c, self.last - self.first, self.width

    def layout(self, c):
        plane = (self.last - self.first) * self.width
        return c * plane, plane, 1

    def shifted(self, h):
        """The LR rows missing above the tensors' first one, and the height of the LR image."""
        return self.top, self.tall

    def cells(self, loops, b, h, w, dtype):
        """As gsr.ops.cpu_loops.Cells, and the first and last LR row that have pixels."""
        row, y, top = _axis(h, self.height)
        _, x, left = _axis(w, self.width)
        none, top = np.empty(0, np.int64), np.clip(top, self.first, self.last)
        y, x = (_flat(torch.from_numpy(away), dtype) for away in (y, x))
        return loops.Cells(top, left, none, none, y, x), row[self.first], row[self.last - 1]

    def piece(self, start, stop):
        return replace(self, first=self.first + start, last=self.first + stop)

    def reference(self, values, sigma, rho, opacity, offset, radius, normalize, eps):
        size, rows, band = (self.height, self.width), (self.first, self.last), (self.top, self.tall)
        return reference.splat(
            values, sigma, rho, opacity, size, offset, radius, normalize, eps, rows, band
        )


@dataclass
class _Points:
    points: Tensor  # [B, Q, 2]

    along = 1

    def shape(self, b, c):
        return b, self.points.shape[1], c

    def layout(self, c):
        return self.points.shape[1] * c, 1, c

    def shifted(self, h):
        return 0, h

    def cells(self, loops, b, h, w, dtype):
        last = torch.tensor([h - 1, w - 1])
        nearest = torch.floor(self.points + 0.5)
        nearest = nearest.clamp(torch.zeros(2).to(nearest), last.to(nearest))
        # A point that is not a number has no nearest pixel, but must be read from an existing one.
        pixel = nearest.long().clamp(torch.zeros_like(last), last)
        cell = _flat((torch.arange(b)[:, None] * h + pixel[..., 0]) * w + pixel[..., 1], torch.long)
        start, order = np.empty(b * h * w + 1, np.int64), np.empty(cell.size, np.int64)
        loops.group(cell, start, order)
        away = self.points - nearest
        y, x = (_flat(away[..., axis], dtype)[order] for axis in (0, 1))
        none = np.empty(0, np.int64)
        return loops.Cells(none, none, start, order % self.points.shape[1], y, x), 0, h - 1

    def piece(self, start, stop):
        return _Points(self.points[:, start:stop])

    def reference(self, values, sigma, rho, opacity, offset, radius, normalize, eps):
        return reference.splat_at(
            values, sigma, rho, opacity, self.points, offset, radius, normalize, eps
        )


def _axis(n: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every HR pixel's nearest LR pixel and distance from it; every LR pixel's first HR pixel.

    HR pixel p sits at (2 p + 1) n / (2 size) - 1/2 LR pixels. Whole numbers say without rounding
    which LR pixel is nearest: in the middle between two, the right one.
    """
    numerator = (2 * np.arange(size, dtype=np.int64) + 1) * n
    nearest = numerator // (2 * size)
    first = -((n - 2 * size * np.arange(n + 1, dtype=np.int64)) // (2 * n))
    return nearest, (numerator - (2 * nearest + 1) * size) / (2 * size), first


# ---- with Numba ----------------------------------------------------------------------------------


def _flat(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor.detach().to(dtype).contiguous().view(-1).numpy()


def _planes(field, dtype: torch.dtype, top: int) -> tuple[np.ndarray, list[Tensor]]:
    """Addresses of the planes [h, w] of all parameters, and the tensors that own them.

    Addresses are those that row 0 of the image would have; the tensors start at row `top`, and
    the loops touch no row above it.

    Flat [B, K, 6 + C] in the order of the loops: offset, sigma, rho, opacity, values; 0 where there
    is no offset.
    """
    values, sigma, rho, opacity, offset = field
    b, k, _, _, w = values.shape
    owners, addresses = [], []
    for tensor in (offset, sigma, rho[:, :, None], opacity[:, :, None], values):
        if tensor is None:
            addresses.append(np.zeros((b, k, 2), np.int64))
            continue
        tensor = tensor.detach().to(dtype)
        if tensor.stride()[3:] != (w, 1):
            tensor = tensor.contiguous()
        steps = np.ogrid[:b, :k, : tensor.shape[2]]
        elements = sum(n * stride for n, stride in zip(steps, tensor.stride(), strict=False))
        addresses.append(tensor.data_ptr() + tensor.element_size() * (elements - top * w))
        owners.append(tensor)
    return np.concatenate(addresses, axis=2).ravel(), owners


def _parts(c: int) -> list[slice]:
    return [slice(first, min(first + CHANNELS, c)) for first in range(0, c, CHANNELS)]


def _channels(part: slice) -> tuple[int, ...]:
    """What stands for a number of channels in the loops."""
    return (0,) * (part.stop - part.start)


def _run(task, b: int, first: int, last: int, weights: int) -> None:
    """task(image, row, stop) for all LR rows first ... last of b images, on torch's threads.

    Python's threads, which the loops leave free to run. Numba's own may be started by one thread at
    a time, and would break a process that forks.
    """
    threads = max(1, min(torch.get_num_threads(), weights // THREAD))
    stop = last + 1
    step = stop - first if threads == 1 else -(-b * (stop - first) // (4 * threads))
    tasks = [(n, i, min(i + step, stop)) for n in range(b) for i in range(first, stop, step)]
    todo = iter(tasks)  # shared, so that a thread that is done early takes more

    def work():
        for block in todo:
            task(*block)

    if threads == 1:
        return work()
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
    for other in others:
        other.result()


def _weights(field, where, radius) -> int:
    b, k, _, _, _ = field[0].shape
    return math.prod(where.shape(b, 1)) * k * (2 * radius + 1) ** 2


def _splat(loops, out, field, where, radius, normalize, eps):
    b, k, c, h, w = field[0].shape
    top, h = where.shifted(h)
    target = out.view(-1).numpy()
    cells, first, last = where.cells(loops, b, h, w, out.dtype)
    shape, layout = loops.Shape(k, h, w, radius), loops.Layout(*where.layout(c))
    for part in _parts(c):
        planes, _owners = _planes((field[0][:, :, part], *field[1:]), out.dtype, top)
        task = functools.partial(
            loops.splat, target[part.start * layout.channel :], planes, _channels(part), cells,
            shape, layout, bool(normalize), float(eps),
        )  # fmt: skip
        _run(task, b, first, last, _weights(field, where, radius))


def _gradients(loops, grad, field, where, radius, normalize, eps, dtype):
    b, k, c, h, w = field[0].shape
    top, h = where.shifted(h)
    source = _flat(grad, dtype)
    cells, first, last = where.cells(loops, b, h, w, dtype)
    shape, layout = loops.Shape(k, h, w, radius), loops.Layout(*where.layout(c))
    begin = np.empty((b, h * -(-w // loops.LANES) + 1), np.int64)
    loops.count_passes(begin, cells, shape)
    weights = _weights(field, where, radius)

    def of(part):
        given = (field[0][:, :, part], *field[1:])
        made = [None if t is None else torch.zeros(t.shape, dtype=dtype) for t in given]
        (out, _), (planes, _owners) = _planes(made, dtype, top), _planes(given, dtype, top)
        channels = _channels(part)
        notes = np.empty(begin[-1, -1] * (3 + len(channels)) * loops.LANES, source.dtype)
        note = functools.partial(
            loops.note, notes, begin, source[part.start * layout.channel :], planes, channels,
            cells, shape, layout, bool(normalize), float(eps),
        )  # fmt: skip
        gather = functools.partial(loops.gather, out, notes, begin, planes, channels, shape)
        _run(note, b, first, last, weights)
        _run(gather, b, max(first - radius, 0), min(last + radius, h - 1), 2 * weights)
        return made

    values, *others = zip(*map(of, _parts(c)), strict=True)
    # The gradient of a weight is a sum over channels, and those of what makes the weight follow it.
    return [
        torch.cat(values, dim=2) if len(values) > 1 else values[0],
        *[None if parts[0] is None else functools.reduce(torch.add, parts) for parts in others],
    ]


# ---- without -------------------------------------------------------------------------------------


def _pieces(field, where, radius):
    """Consecutive parts of the rows or points, with about PIECE weights each."""
    b, k = field[0].shape[:2]
    n = where.shape(b, 1)[where.along]
    step = max(1, PIECE * n // max(1, _weights(field, where, radius)))
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def _splat_in_pieces(out, field, where, radius, normalize, eps):
    with torch.no_grad():
        field = [None if t is None else t.detach().to(out.dtype) for t in field]
        for start, stop in _pieces(field, where, radius):
            piece = where.piece(start, stop).reference(*field, radius, normalize, eps)
            out.narrow(where.along, start, stop - start).copy_(piece)


def _gradients_in_pieces(grad, field, where, radius, normalize, eps, dtype):
    def run():
        leaves = [
            None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in field
        ]
        for start, stop in _pieces(field, where, radius):
            piece = where.piece(start, stop).reference(*leaves, radius, normalize, eps)
            piece.backward(grad.detach().to(dtype).narrow(where.along, start, stop - start))
        return [None if t is None else t.grad for t in leaves]

    # Inside an operator, or in inference mode, autograd does not record; both end with the thread.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
