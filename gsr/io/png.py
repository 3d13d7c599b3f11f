"""PNG files written row by row, in 8 or 16 bits, so that a large result is never in memory whole.

Pillow encodes images that it holds, and holds colours in 8 bits only.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gsr.io.image import Pixels
from gsr.io.source import Metadata

COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels to colour type: grey, grey and alpha, RGB, RGBA


class PngWriter:
    """Writes one image into a file that is empty and open for writing.

    Source: Portable Network Graphics (PNG) Specification, W3C, 2nd edition, sections 9 to 11; the
    choice of filters is that of section 12.8.
    """

    def __init__(self, file: BinaryIO):
        self.file = file

    def page(
        self,
        size: tuple[int, int],
        channels: int,
        dtype: np.dtype[Any],
        meta: Metadata,
        white: float | None = None,
        duration: float | None = None,
    ) -> tuple[Callable[[NDArray[Any]], None], Callable[[], None]]:
        """Begin the image; returns what takes its next rows [n, W, channels], and what ends it.

        Args:
            size: (H, W), pixels.
            channels: 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA).
            dtype: uint8 or uint16.
            meta: profile, EXIF, XMP, resolution and texts to keep.
            white: of no use here, nor is duration: white is the largest level.

        Ending raises ValueError if rows are missing.
        """
        self.height, self.done = size[0], 0
        self.pixel = channels * dtype.itemsize  # bytes
        self.big = np.dtype(f">u{dtype.itemsize}")
        self.above = np.zeros(size[1] * self.pixel, np.uint8)
        self.packer = zlib.compressobj()
        self.file.write(b"\x89PNG\r\n\x1a\n")
        head = struct.pack(
            ">IIBBBBB", size[1], size[0], 8 * dtype.itemsize, COLOURS[channels], 0, 0, 0
        )
        self._chunk(b"IHDR", head)
        self._write_meta(size, meta)
        return self._write, self._end

    def _write_meta(self, size: tuple[int, int], meta: Metadata) -> None:
        if meta.icc:
            self._chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(meta.icc))
        if meta.dpi is not None:
            x, y = (round(value / 0.0254) for value in meta.dpi)
            self._chunk(b"pHYs", struct.pack(">IIB", x, y, 1))  # per metre
        if exif := meta.exif_of(size):
            self._chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        if meta.xmp:
            self._chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + meta.xmp)
        for key, text in meta.text.items():
            name = key.encode("latin-1", "replace")[:79]
            self._chunk(b"iTXt", name + bytes(5) + text.encode(errors="replace"))

    def _write(self, rows: NDArray[Any]) -> None:
        """Take the next rows [n, W, channels]."""
        data = np.ascontiguousarray(rows, self.big).tobytes()
        lines: Pixels = np.reshape(np.frombuffer(data, np.uint8), (len(rows), -1))
        self._chunk(b"IDAT", self.packer.compress(_filtered(lines, self.above, self.pixel).data))
        self.above, self.done = lines[-1].copy(), self.done + len(lines)

    def _end(self) -> None:
        """End the file. Raises ValueError if rows are missing."""
        if self.done != self.height:
            raise ValueError(f"{self.done} of {self.height} rows were written")
        self._chunk(b"IDAT", self.packer.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, name: bytes, data: bytes) -> None:
        self.file.write(struct.pack(">I", len(data)) + name + data)
        self.file.write(struct.pack(">I", zlib.crc32(name + data)))


def _filtered(lines: Pixels, above: Pixels, pixel: int) -> Pixels:
    """Filter rows [n, W c] below the row `above`: [n, 1 + W c], each behind its filter's number.

    `pixel` is how many bytes c a pixel has.

    For each row the filter whose differences are smallest, as signed numbers, in sum.
    """
    b = np.concatenate([above[None], lines[:-1]])
    a, c = (np.pad(x, ((0, 0), (pixel, 0)))[:, : x.shape[1]] for x in (lines, b))
    near = a.astype(np.int16), b.astype(np.int16), c.astype(np.int16)
    predictions = 0, a, b, ((near[0] + near[1]) >> 1).astype(np.uint8), _paeth(*near)
    out = np.empty((len(lines), 1 + lines.shape[1]), np.uint8)
    best = np.full(len(lines), np.iinfo(np.int64).max)
    for number, prediction in enumerate(predictions):
        rest = lines - prediction  # modulo 256
        signed = rest.view(np.int8)  # pyright: ignore[reportUnknownMemberType]: numpy's stubs
        cost = np.abs(signed.astype(np.int16)).sum(axis=1, dtype=np.int64)
        better = cost < best
        best[better] = cost[better]
        out[better, 0], out[better, 1:] = number, rest[better]
    return out


def _paeth(a: NDArray[np.int16], b: NDArray[np.int16], c: NDArray[np.int16]) -> Pixels:
    """Return which of left, above and above left is nearest to left + above - above left."""
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
    return nearest.astype(np.uint8)
