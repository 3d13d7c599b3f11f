"""Image files written row by row: PNG and TIFF as the rows come, other formats at the end.

A TIFF has several pages, and GIF, WebP, PNG and AVIF several frames of an animation.

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


Rows = Callable[[NDArray[Any]], None]


NextPage = Callable[..., Rows]  # what `pages_writer` yields


@contextmanager
def image_writer(
    path: StrPath,
    size: tuple[int, int],
    channels: int,
    dtype: Any = np.uint8,
    meta: Metadata | None = None,
    white: float | None = None,
    options: dict[str, Any] | None = None,
) -> Generator[Rows]:
    """Yield a function that takes the next rows of an image, [n, W, channels].

    Args:
        path: of the file; its suffix says the format.
        size: (H, W), pixels.
        channels: 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA).
        dtype: what `depth_in` returns for the format: uint8, uint16 or float32.
        meta: what else the file shall say.
        white: level of white where it is not the type's largest; TIFF alone says it.
        options: Pillow's for the other formats, such as quality; None is its default.

    Raises what `pages_writer` does.
    """
    total = size[0] * size[1] * channels * np.dtype(dtype).itemsize
    with pages_writer(path, total, options) as next_page:
        yield next_page(size, channels, dtype, meta, white)


@contextmanager
def pages_writer(
    path: StrPath,
    total: int,
    options: dict[str, Any] | None = None,
    *,
    animated: bool = False,
    plays: int = 0,
) -> Generator[NextPage]:
    """Yield a function that begins the next page, or frame of an animation.

    Its arguments are those of `image_writer`, size, channels, dtype, meta and white, and
    `duration`, the milliseconds that a frame is shown. What it returns takes that page's rows.

    Args:
        path: of the file; its suffix says the format.
        total: bytes of all pages, without compression.
        options: Pillow's for the other formats, such as quality; None is its default.
        animated: whether the pages of a format other than TIFF are frames.
        plays: how often an animation is played; 0: for ever.

    Raises:
        InputError: the file cannot be written.
        ValueError: rows are missing in a page.
    """
    kind = file_format(path)
    with atomic_file(path) as file:
        if kind == "TIFF":
            pages: Any = TiffWriter(file, total)
        elif kind == "PNG" and not animated:
            pages = PngWriter(file)
        else:
            pages = _Gathered()
        ends: list[Callable[[], None]] = []  # of the page that is being written

        def next_page(
            size: tuple[int, int],
            channels: int,
            dtype: Any = np.uint8,
            meta: Metadata | None = None,
            white: float | None = None,
            duration: float | None = None,
        ) -> Rows:
            if ends:
                ends.pop()()
            rows, end = pages.page(
                size, channels, np.dtype(dtype), meta or Metadata(), white, duration
            )
            ends.append(end)
            return rows

        yield next_page
        if ends:
            ends.pop()()
        if isinstance(pages, _Gathered):
            pages.save(file, path, options or {}, plays)


class _Gathered:
    """Keeps all frames, to have Pillow encode them at the end."""

    def __init__(self) -> None:
        self.frames: list[NDArray[np.uint8]] = []
        self.durations: list[float] = []
        self.info: dict[str, Any] = {}  # of the first frame

    def page(
        self,
        size: tuple[int, int],
        channels: int,
        dtype: np.dtype[Any],
        meta: Metadata,
        white: float | None,
        duration: float | None,
    ) -> tuple[Rows, Callable[[], None]]:
        """Begin a frame, as `TiffWriter.page` does a page."""
        image, done = np.empty((*size, channels), np.uint8), 0

        def write(rows: NDArray[Any]) -> None:
            nonlocal done
            image[done : done + len(rows)] = rows
            done += len(rows)

        def end() -> None:
            if done != size[0]:
                raise ValueError(f"{done} of {size[0]} rows were written")
            if not self.frames:
                self.info = meta.info(size)
            self.frames.append(image)
            self.durations.append(100 if duration is None else duration)

        return write, end

    def save(self, file: BinaryIO, path: StrPath, options: dict[str, Any], plays: int) -> None:
        """Encode the frames as the suffix of `path` says."""
        kind, options = file_format(path), {**self.info, **options}
        for frame in self.frames:
            if kind == "GIF" and frame.shape[2] in (2, 4):
                # Transparent or not, and of the transparent colours it has one.
                shown = frame[..., -1] > 127
                frame[~shown], frame[shown, -1] = 0, 255
        frames = [Image.fromarray(f[..., 0] if f.shape[2] == 1 else f) for f in self.frames]
        if len(frames) > 1:
            modes = {frame.mode for frame in frames}
            if len(modes) > 1:  # the first frame of a GIF may be all there is without alpha
                mode = "RGBA" if modes & {"LA", "RGBA"} else "RGB"
                frames = [frame.convert(mode) for frame in frames]
            # Of a GIF Pillow says how often it is repeated, if at all.
            loop = plays if kind != "GIF" or plays == 0 else plays - 1 or None
            options |= {"save_all": True, "append_images": frames[1:], "loop": loop}
            options["duration"] = [round(d) for d in self.durations]
            if kind == "GIF" and "A" in frames[0].mode:
                options["disposal"] = 2  # or what was opaque would be seen through the next frame
        encode(file, path, frames[0], options)
