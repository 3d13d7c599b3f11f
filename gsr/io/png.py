"""PNG files written row by row, so that a large result never lies in memory as a whole.

Pillow encodes images that it holds; this is the one format whose files can be as large as what
`gsr upscale` makes, and whose rows come out in the order that the format wants.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from gsr.io.image import Pixels, atomic_file
from gsr.io.paths import StrPath

COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels to colour type: grey, grey and alpha, RGB, RGBA


@contextmanager
def png_writer(
    path: StrPath, size: tuple[int, int], channels: int, icc: bytes | None = None
) -> Generator[Callable[[Pixels], None]]:
    """Yield a function that takes the next rows of an image, uint8 [n, W, channels].

    The file appears when the context is left, whole, or not at all.

    Args:
        path: of the file.
        size: (H, W), pixels.
        channels: 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA), 8 bits each.
        icc: colour profile.

    Raises:
        InputError: the file cannot be written.
        ValueError: rows are missing at the end.

    Source: Portable Network Graphics (PNG) Specification, W3C, 2nd edition, sections 9 to 11; the
    choice of filters is that of section 12.8.
    """
    height, width = size
    packer = zlib.compressobj()
    above, done = np.zeros(width * channels, np.uint8), 0
    with atomic_file(path) as file:

        def chunk(name: bytes, data: bytes) -> None:
            file.write(struct.pack(">I", len(data)) + name + data)
            file.write(struct.pack(">I", zlib.crc32(name + data)))

        def write(rows: Pixels) -> None:
            nonlocal above, done
            lines = np.reshape(np.ascontiguousarray(rows), (len(rows), -1))
            chunk(b"IDAT", packer.compress(_filtered(lines, above, channels).data))
            above, done = lines[-1].copy(), done + len(lines)

        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, COLOURS[channels], 0, 0, 0))
        if icc:
            chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
        yield write
        if done != height:
            raise ValueError(f"{done} of {height} rows were written")
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")


def _filtered(lines: Pixels, above: Pixels, channels: int) -> Pixels:
    """Filter rows [n, W c] below the row `above`: [n, 1 + W c], each behind its filter's number.

    For each row the filter whose differences are smallest, as signed numbers, in sum.
    """
    b = np.concatenate([above[None], lines[:-1]])
    a, c = (np.pad(x, ((0, 0), (channels, 0)))[:, : x.shape[1]] for x in (lines, b))
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
