"""Networks at LR run over an image by bands of rows, in the memory of a band.

Rows go in at the top of the image, and come out as soon as all they depend on has come. Every
convolution keeps the few rows of its input that those below still need, so that nothing is
computed twice, and the result is that of the whole image.

    stream = Chain(Convolution(conv), Skip(Layer(block, 2)))
    out = stream.feed(Band(0, (rows,)), last=False)
    rest = stream.feed(None, last=True)

A node is made for one image, fed from top to bottom without gradients, and thrown away. It may
start below the image's top: rows that depend on what is above then never come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Node(Protocol):
    """A part of a network that takes rows and gives rows."""

    def feed(self, band: Band | None, last: bool) -> Band | None:
        """Take the next rows of the image, if any, and return those that can be computed by now.

        `last` says that no more will come: then all that are left are returned.
        """
        ...


class Band(NamedTuple):
    """Rows from `start` on of an image: a tuple, named or not, of tensors [B, ..., rows, w]."""

    start: int
    tensors: tuple[Tensor, ...]

    @property
    def stop(self) -> int:
        return self.start + self.tensors[0].shape[-2]

    def rows(self, start: int, stop: int) -> Band:
        """Rows start to stop, as views."""
        part = slice(start - self.start, stop - self.start)
        return Band(start, self.map(lambda t: t[..., part, :]).tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> Band:
        """The same rows of function(tensor) for every tensor."""
        return Band(self.start, _like(self.tensors, (function(t) for t in self.tensors)))

    def tail(self, start: int, memory: Band | None) -> Band:
        """Rows from `start` on, copied: a view would keep all the others in memory.

        It is that of the last time, if that fits. New pieces between the large tensors that come
        and go would leave the heap full of holes, none of which is large enough for the next.
        """
        new = self.rows(start, self.stop).tensors
        if memory and [t.shape for t in memory.tensors] == [t.shape for t in new]:
            for to, t in zip(memory.tensors, new, strict=True):
                to.copy_(t)
            return Band(start, memory.tensors)
        return Band(start, _like(new, (t.clone() for t in new)))


def join(upper: Band | None, lower: Band | None) -> Band | None:
    """One band of two that follow each other; None is a band without rows."""
    if upper is None or lower is None or upper.stop == upper.start:
        return upper if lower is None else lower
    pairs = zip(upper.tensors, lower.tensors, strict=True)
    return Band(upper.start, _like(lower.tensors, (torch.cat(pair, dim=-2) for pair in pairs)))


def _like(tensors: Any, others: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Others as a tuple of the same kind, named or not."""
    return type(tensors)._make(others) if hasattr(tensors, "_make") else tuple(others)


class RowBuffer:
    """The rows that a node still needs."""

    def __init__(self):
        self.band: Band | None = None
        self._own: Band | None = None  # the same where nobody else has it

    def add(self, band: Band | None) -> Band | None:
        """All of them, with those that have come."""
        self.band = join(self.band, band)
        return self.band

    def keep(self, start: int, last: bool) -> None:
        """Keep the rows from `start` on; none if these were the last."""
        band = None if last else self.band
        self.band = self._own = band and band.tail(start, self._own)


class Layer:
    """A function of all rows within `reach`: convolutions with zero padding, as a rule.

    Args:
        function: of one or more tensors [B, ..., n, w] to a tensor or a tuple with as many rows.
        reach: rows above and below a row that its result depends on.
    """

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], reach: int):
        self.function, self.reach = function, reach
        self.held = RowBuffer()
        self.next = -1  # the next row to come out

    def feed(self, band: Band | None, last: bool) -> Band | None:
        """The rows that can be told from what has come until now, if any."""
        if self.held.band is None and band is not None:
            # At the image's own top the function's padding is right.
            self.next = band.start + self.reach if band.start else 0
        x = self.held.add(band)
        if x is None:
            return None
        stop = x.stop if last else x.stop - self.reach
        if stop <= self.next:
            return None
        y = self.function(*x.tensors)
        y = Band(x.start, y if isinstance(y, tuple) else (y,)).rows(self.next, stop)
        self.held.keep(max(x.start, stop - self.reach), last)
        self.next = stop
        return y


class Convolution:
    """nn.Conv2d of an odd kernel, with the zero padding that keeps the size, then `after`.

    Where a `Layer` computes `reach` rows above and below each band and throws them away, this one
    computes no row twice, however narrow the bands are.
    """

    def __init__(self, conv: nn.Module, after: Callable[[Tensor], Tensor] | None = None):
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"a stream's Convolution is made of an nn.Conv2d, not {type(conv)}")
        self.conv, self.after, self.reach = conv, after, conv.kernel_size[0] // 2
        self.held = RowBuffer()

    def feed(self, band: Band | None, last: bool) -> Band | None:
        above = self.reach if self.held.band is None and band is not None and not band.start else 0
        x = self.held.add(band)
        if x is None:
            return None
        if above or last:
            zeros = (0, 0, above, self.reach if last else 0)
            x = self.held.band = Band(x.start - above, (F.pad(x.tensors[0], zeros),))
        if x.stop - x.start <= 2 * self.reach:
            return None
        conv = self.conv
        y = F.conv2d(x.tensors[0], conv.weight, conv.bias, padding=(0, conv.kernel_size[1] // 2))
        y = Band(x.start + self.reach, (y if self.after is None else self.after(y),))
        self.held.keep(x.stop - 2 * self.reach, last)
        return y


class Chain:
    """One node after the other.

    At the image's end each gives all the rows that have waited in it and before, in a deep
    network more than a band has; the next takes them in pieces no higher than that.
    """

    def __init__(self, *nodes: Node):
        self.nodes = nodes
        self.height = 0  # of the highest band before the last

    def feed(self, band: Band | None, last: bool) -> Band | None:
        if last:
            return self._feed(self.nodes, band, last)
        if band is not None:
            self.height = max(self.height, band.stop - band.start)
        for node in self.nodes:  # each band is forgotten once the next node has taken it
            band = band and node.feed(band, False)
        return band

    def _feed(self, nodes: tuple[Node, ...], band: Band | None, last: bool) -> Band | None:
        if not nodes:
            return band
        out = None
        for piece, ends in self._pieces(band, last):
            y = nodes[0].feed(piece, ends)
            if y is not None or ends:
                out = join(out, self._feed(nodes[1:], y, ends))
        return out

    def _pieces(self, band: Band | None, last: bool) -> Iterator[tuple[Band | None, bool]]:
        """A band, cut if it is too high, and whether each piece is the image's last."""
        if band is None or not last or not 0 < self.height < band.stop - band.start:
            yield band, last
            return
        for start in range(band.start, band.stop, self.height):
            stop = min(start + self.height, band.stop)
            yield band.rows(start, stop), stop == band.stop


class Residual:
    """merge(x, inner(x)), each a tuple of tensors; the rows of x wait for those of inner(x)."""

    def __init__(self, inner: Node, merge: Callable[[tuple, tuple], tuple]):
        self.inner, self.merge = inner, merge
        self.held = RowBuffer()

    def feed(self, band: Band | None, last: bool) -> Band | None:
        held = self.held.add(band)
        out = self.inner.feed(band, last)
        if out is None or held is None:
            return None
        x = held.rows(out.start, out.stop)
        out = Band(out.start, self.merge(x.tensors, out.tensors))
        self.held.keep(out.stop, last)
        return out


class Skip:
    """x + scale inner(x), of one tensor each; written over what inner(x) gave.

    A `Residual` that joins no bands, and copies but the rows of one that is used in part.
    """

    def __init__(self, inner: Node, scale: float = 1.0):
        self.inner, self.scale = inner, scale
        self.held: list[Band] = []
        self.own: Band | None = None  # memory for the first of them

    def feed(self, band: Band | None, last: bool) -> Band | None:
        self.held += [] if band is None else [band]
        out = self.inner.feed(band, last)
        if out is None:
            return None
        for x in self.held:
            start, stop = max(x.start, out.start), min(x.stop, out.stop)
            if start < stop:
                (y,), (part,) = out.rows(start, stop).tensors, x.rows(start, stop).tensors
                torch.add(part, y, alpha=self.scale, out=y)
        self.held = [x for x in self.held if x.stop > out.stop]
        if self.held and self.held[0].start < out.stop:
            self.own = self.held[0] = self.held[0].tail(out.stop, self.own)
        return out


class StreamedDenseBlock:
    """cat(x, y_1, ..., y_n) along the channels; y_i is convolution i of cat(x, ..., y_{i - 1}).

    A chain of one `Residual` a convolution gives the same, but holds a row once for each of the
    convolutions that read it, not once.

    Args:
        convs: of odd kernels, with the zero padding that keeps the size.
        after: applied to the result of each.
    """

    def __init__(self, convs: Iterable[nn.Conv2d], after: Callable[[Tensor], Tensor]):
        self.convs, self.after = list(convs), after
        self.reach = max(conv.kernel_size[0] // 2 for conv in self.convs)
        self.parts = [RowBuffer() for _ in range(len(self.convs) + 1)]  # x, y_1, ...
        self.next = -1  # the next row to come out

    def feed(self, band: Band | None, last: bool) -> Band | None:
        self.parts[0].add(band)
        for i in range(len(self.convs)):
            if self.parts[i].band is not None:
                self.parts[i + 1].add(self._convolve(i, last))
        y = self.parts[-1].band
        start = -1 if y is None else max(self.next, y.start)
        if y is None or y.stop <= start:
            return None
        out = Band(start, (torch.cat(self._rows(len(self.parts), start, y.stop), dim=1),))
        for part in self.parts:
            part.keep(max(_band(part).start, y.stop - self.reach), last)
        self.next = y.stop
        return out

    def _convolve(self, i: int, last: bool) -> Band | None:
        """The rows of y_{i + 1} that can be told and have not been."""
        conv, (reach, along) = self.convs[i], (n // 2 for n in self.convs[i].kernel_size)
        source, done = _band(self.parts[i]), self.parts[i + 1].band
        if done is not None:
            start = done.stop
        else:
            start = source.start + reach if source.start else 0
        stop = source.stop - (0 if last else reach)
        if stop <= start:
            return None
        above, below = max(reach - start, 0), stop + reach - source.stop if last else 0
        x = torch.cat(self._rows(i + 1, start - reach + above, stop + reach - below), dim=1)
        if above or below:  # zeros where the image ends
            x = F.pad(x, (0, 0, above, below))
        y = F.conv2d(x, conv.weight, conv.bias, padding=(0, along))
        return Band(start, (self.after(y),))

    def _rows(self, count: int, start: int, stop: int) -> list[Tensor]:
        """Rows start to stop of the first `count` parts."""
        return [_band(part).rows(start, stop).tensors[0] for part in self.parts[:count]]


def _band(buffer: RowBuffer) -> Band:
    """The rows of a buffer that has some."""
    if buffer.band is None:
        raise RuntimeError("a row buffer is empty that should hold rows")
    return buffer.band
