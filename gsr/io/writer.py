"""Image files written row by row: PNG and TIFF as the rows come, other formats at the end.

The file appears when it is complete, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gsr.io.image import atomic_file, encode, file_format
from gsr.io.paths import StrPath
from gsr.io.png import PngWriter
from gsr.io.source import Metadata
from gsr.io.tiff import TiffWriter

DEPTHS = {"PNG": "u1 u2", "TIFF": "u1 u2 f4"}  # of others: u1, which is uint8


def depth_in(kind: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that a format holds of an image of this type: the nearest it has."""
    held = DEPTHS.get(kind, "u1").split()
    return dtype if f"{dtype.kind}{dtype.itemsize}" in held else np.dtype(held[-1])


@contextmanager
def image_writer(
    path: StrPath,
    size: tuple[int, int],
    channels: int,
    dtype: Any = np.uint8,
    meta: Metadata | None = None,
    white: float | None = None,
    options: dict[str, Any] | None = None,
) -> Generator[Callable[[NDArray[Any]], None]]:
    """Yield a function that takes the next rows of an image, [n, W, channels].

    Args:
        path: of the file; its suffix says the format.
        size: (H, W), pixels.
        channels: 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA).
        dtype: what `depth_in` returns for the format: uint8, uint16 or float32.
        meta: what else the file shall say.
        white: level of white where it is not the type's largest; TIFF alone says it.
        options: Pillow's for the other formats, such as quality; None is its default.

    Raises:
        InputError: the file cannot be written.
        ValueError: rows are missing at the end.
    """
    kind, meta, dtype = file_format(path), meta or Metadata(), np.dtype(dtype)
    with atomic_file(path) as file:
        if kind == "PNG":
            png = PngWriter(file, size, channels, dtype, meta)
            yield png.write
            png.end()
        elif kind == "TIFF":
            total = size[0] * size[1] * channels * dtype.itemsize
            write, end = TiffWriter(file, total).page(size, channels, dtype, meta, white)
            yield write
            end()
        else:
            yield from _gather(file, path, size, channels, {**meta.info(size), **(options or {})})


def _gather(
    file: BinaryIO, path: StrPath, size: tuple[int, int], channels: int, options: dict[str, Any]
) -> Generator[Callable[[NDArray[Any]], None]]:
    """Keep the rows, and have Pillow encode them at the end."""
    image, done = np.empty((*size, channels), np.uint8), 0

    def write(rows: NDArray[Any]) -> None:
        nonlocal done
        image[done : done + len(rows)] = rows
        done += len(rows)

    yield write
    if done != size[0]:
        raise ValueError(f"{done} of {size[0]} rows were written")
    result = Image.fromarray(image[..., 0] if channels == 1 else image)
    encode(file, path, result, options)
