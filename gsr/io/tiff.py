"""TIFF files written strip by strip, in 8 and 16 bits and float, and several pages in one.

Compressed by deflate behind a horizontal predictor. A file of more than 4 GB is a BigTIFF.
"""

# pyright: basic
# Pillow types neither tiles nor tags.

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import IFDRational
from PIL.TiffImagePlugin import ImageFileDirectory_v2 as Directory

from gsr.io.source import KEPT, MAX_SAMPLE_VALUE, Metadata

ROWS_BYTES = 2**20  # of a strip, about
LARGE = int(0.95 * 2**32)  # bytes, from which on offsets take eight
STRIP_OFFSETS, STRIP_COUNTS = 273, 279
PRIVATE = 32768
LONG, LONG8, UNDEFINED, BYTE = 4, 16, 7, 1


class TiffWriter:
    """Writes pages into a file that can seek, one after another.

    Args:
        file: empty, open for writing.
        total: bytes of all pages without compression; above 4 GB the file is a BigTIFF.

    Source: TIFF Revision 6.0, sections 2, 14 (predictor) and 8; Technical Note 2 (deflate).
    """

    def __init__(self, file: BinaryIO, total: int):
        self.file, self.big = file, total > LARGE
        self.head = b"II+\0\x08\0\0\0" if self.big else b"II*\0"
        self.width = 8 if self.big else 4  # bytes of an offset
        file.write(self.head + bytes(self.width))
        self.link = len(self.head)  # where the next page's offset goes

    def page(
        self,
        size: tuple[int, int],
        channels: int,
        dtype: np.dtype[Any],
        meta: Metadata,
        white: float | None = None,
        duration: float | None = None,
    ) -> tuple[Callable[[NDArray[Any]], None], Callable[[], None]]:
        """Begin a page; returns what takes its next rows [n, W, channels], and what ends it.

        `white` is the level of white where it is not the largest of the type; a page has no
        duration. Ending raises ValueError if rows are missing.
        """
        height, width = size
        step = max(1, ROWS_BYTES // (width * channels * dtype.itemsize))
        offsets: list[int] = []
        counts: list[int] = []
        waiting: list[NDArray[Any]] = []
        done = 0

        def put(rows: NDArray[Any]) -> None:
            data = zlib.compress(_predicted(rows), 6)
            offsets.append(self.file.tell())
            counts.append(len(data))
            self.file.write(data)

        def write(rows: NDArray[Any]) -> None:
            nonlocal done
            done += len(rows)
            waiting.append(np.reshape(rows, (len(rows), width, channels)))
            if sum(map(len, waiting)) >= step or done == height:
                joined = np.concatenate(waiting)
                waiting.clear()
                whole = len(joined) if done == height else len(joined) // step * step
                for row in range(0, whole, step):
                    put(joined[row : row + step])
                if whole < len(joined):
                    waiting.append(joined[whole:].copy())

        def end() -> None:
            if done != height:
                raise ValueError(f"{done} of {height} rows were written")
            tags = self._tags(size, channels, dtype, meta)
            where = LONG8 if self.big else LONG
            tags.tagtype[STRIP_OFFSETS] = tags.tagtype[STRIP_COUNTS] = where
            tags[STRIP_OFFSETS], tags[STRIP_COUNTS] = tuple(offsets), tuple(counts)
            tags[278] = step
            if white is not None:
                tags[MAX_SAMPLE_VALUE] = (int(white),) * channels
            self.file.write(bytes(self.file.tell() % 2))
            start = self.file.tell()
            self.file.write(_encode(tags, start))
            entry = 20 * len(tags) + 8 if self.big else 12 * len(tags) + 2
            self.file.seek(self.link)
            self.file.write(start.to_bytes(self.width, "little"))
            self.file.seek(0, 2)
            self.link = start + entry

        return write, end

    def _tags(
        self, size: tuple[int, int], channels: int, dtype: np.dtype[Any], meta: Metadata
    ) -> Directory:
        tags = Directory(self.head + bytes(8 if self.big else 4))
        # EXIF describes the image in the main directory too: camera, date, author.
        for tag, value in (meta.exif_of(size) or {}).items():
            if tag in KEPT or tag >= PRIVATE:  # others say how another file was stored
                tags[tag] = value
        tags[257], tags[256] = size
        tags[258] = (8 * dtype.itemsize,) * channels
        tags[259] = 8  # deflate
        tags[262] = 2 if channels > 2 else 1  # RGB, or grey from black to white
        tags[277], tags[284] = channels, 1
        tags[317] = 2 if dtype.kind == "u" else 1
        tags[339] = (1 if dtype.kind == "u" else 3,) * channels
        if channels in (2, 4):
            tags[338] = (2,)  # alpha that colours are not multiplied by
        if meta.dpi is not None:
            tags[282], tags[283] = (IFDRational(round(100 * x), 100) for x in meta.dpi)
            tags[296] = 2  # inches
        for tag, data, kind in ((700, meta.xmp, BYTE), (34675, meta.icc, UNDEFINED)):
            if data:
                tags.tagtype[tag] = kind
                tags[tag] = data
        return tags


def _predicted(rows: NDArray[Any]) -> bytes:
    """Take each pixel's difference from the one to its left, of whole numbers; little-endian."""
    if rows.dtype.kind == "u":
        rows = np.concatenate([rows[:, :1], rows[:, 1:] - rows[:, :-1]], axis=1)
    return rows.astype(rows.dtype.newbyteorder("<")).tobytes()


def _encode(tags: Directory, start: int) -> bytes:
    """Encode a directory that begins at this offset of the file."""
    data = bytearray(tags.tobytes(start))
    # Pillow has moved the offsets of strips, as it puts them behind the directory: put them back.
    big = data[:8] == len(tags).to_bytes(8, "little")
    head, entry, width = (8, 20, 8) if big else (2, 12, 4)
    place = head + entry * sorted(tags).index(STRIP_OFFSETS) + entry - width
    offsets = tags[STRIP_OFFSETS]
    if len(offsets) > 1:
        place = int.from_bytes(data[place : place + width], "little") - start
    for i, offset in enumerate(offsets):
        data[place + i * width : place + (i + 1) * width] = offset.to_bytes(width, "little")
    return bytes(data)
