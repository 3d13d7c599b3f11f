"""Data folders to measure on: HR images, their LR images, and the checks of both.

A data folder is FOLDER/HR with FOLDER/LR_bicubic/X2/NAMEx2.png (likewise X3, ...), or plain HR
images, or NAME_HR with NAME_LR_bicubic beside it, as DIV2K is laid out. Where a set has no LR
images for a scale they are made from HR by `imresize`.

Scales may be fractional. An image must have 11 pixels a side left at every scale, after the HR
pixels that LR does not cover and those that the protocol shaves are gone: one of 256 pixels has at
x30, one of 64 has not. If an image is too small for one of the scales, nothing is measured: a mean
over fewer images would not be that of the set.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gsr.errors import InputError
from gsr.io.image import READ_SUFFIXES, list_images, read_image
from gsr.io.paths import check_path
from gsr.metrics import SSIM_WINDOW, Protocol, as_protocol, check_size
from gsr.ops.resize import imresize

MAX_SCALE = 1000


@dataclass(frozen=True)
class ImageFiles:
    name: str  # path below the HR folder without suffix, e.g. "baby"
    hr: Path
    lr: dict[float, Path]  # by scale; a scale that is not here is made by imresize


@dataclass(frozen=True)
class DataSet:
    name: str
    images: list[ImageFiles]
    folders: tuple[Path, Path]  # of HR and of LR, resolved


def open_set(
    folder: str | os.PathLike, scales: Sequence[float], limit: int | None = None
) -> DataSet:
    """Find the HR images of a data folder and their LR images at `scales`; reads none of them.

    Args:
        folder: see the docstring of the module.
        scales: each from 1 to 1000.
        limit: only the first so many images, by name.

    Raises:
        InputError: no such folder, no image, two images of one name, a bad scale or limit, or
            a folder of LR images that lacks one of them or has none for any scale.
    """
    scales = check_scales(scales)
    if limit is not None and limit < 1:
        raise InputError(f"limit (--limit) must be at least 1, not {limit}")
    folder = check_path(folder)
    name, hr_folder, lr_folder = folder.resolve().name, folder, folder / "LR_bicubic"
    if (folder / "HR").is_dir():
        hr_folder = folder / "HR"
    elif name.endswith("_HR"):
        name = name[: -len("_HR")]
        lr_folder = folder.resolve().parent / f"{name}_LR_bicubic"

    # A set whose HR images lie beside its folder LR_bicubic.
    paths = [path for path in list_images(hr_folder) if lr_folder not in path.parents]
    if not paths:
        raise InputError(f"{hr_folder} holds LR images only; put HR images into it")
    names = _by_name(paths, hr_folder)
    if lr_folder.is_dir() and not any(x.is_dir() for x in lr_folder.glob("X[0-9]*")):
        raise InputError(
            f"{lr_folder} holds no folder of a scale, spelt X2, X3, ...; rename what it holds, or "
            "remove it to have LR made from HR"
        )
    lr: dict[float, dict[str, Path]] = {}
    for scale in scales:
        x = lr_folder / f"X{scale}"
        if not x.is_dir():
            continue
        found = _by_name(list_images(x), x)
        missing = [n for n in names if f"{n}x{scale}" not in found]
        if missing:
            raise InputError(
                f"{x} lacks {len(missing)} of the {len(names)} LR images, first "
                f"{missing[0]}x{scale}.png; add them, or remove {x.name} to have LR made from HR"
            )
        lr[scale] = {n: found[f"{n}x{scale}"] for n in names}
    images = [ImageFiles(n, hr, {s: lr[s][n] for s in lr}) for n, hr in names.items()]
    return DataSet(name, images[:limit], (hr_folder.resolve(), lr_folder.resolve()))


def open_sets(
    folders: Sequence[str | os.PathLike],
    scales: Sequence[float],
    limit: int | None = None,
    *,
    option: str = "data",
) -> list[DataSet]:
    """Open each of the folders that an option names; InputError for two of one name."""
    sets = [open_set(folder, scales, limit) for folder in folders]
    names = [data.name for data in sets]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two data folders (--{option}) are called {name}; rename one of them")
    return sets


def check_spared(option: str, path: Path, sets: Sequence[DataSet]) -> None:
    """Raise InputError if a file to write would replace an image of a set, or become one."""
    exists, above = check_path(path).exists(), (path.parent.resolve() / path.name).parents
    is_image = path.suffix.lower() in READ_SUFFIXES
    for data in sets:
        own = (file for p in data.images for file in (p.hr, *p.lr.values()))
        if (is_image and any(folder in above for folder in data.folders)) or (
            exists and any(os.path.samefile(path, file) for file in own)
        ):
            raise InputError(
                f"--{option} would write {path} among the images of {data.name}, or over one of "
                "them; choose another place"
            )


def _by_name(paths: list[Path], folder: Path) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in names:
            raise InputError(f"{names[name]} and {path} have the same name; rename one of them")
        names[name] = path
    return names


def check_scales(scales: Sequence[float]) -> list[float]:
    """Return each scale once, an int where it is whole: files and reports say x2, not x2.0."""
    for scale in scales:
        if not 1 <= scale <= MAX_SCALE:  # NaN is not either
            raise InputError(f"scale (--scale) must be from 1 to {MAX_SCALE}, not {scale}")
    if not scales:
        raise InputError("scale (--scale): give at least one")
    return list(dict.fromkeys(int(s) if s == int(s) else float(s) for s in scales))


def read_pair(image: ImageFiles, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Read LR [h, w, 3] and HR [round(h s), round(w s), 3], uint8, of an image at a scale s.

    The LR file if there is one, else HR cropped and downsampled by `imresize`; either way HR loses
    what LR does not cover, at the bottom and on the right.

    Raises:
        InputError: an unreadable image, one with no LR pixel left, or LR of another size.
    """
    hr = read_image(image.hr)
    if scale in image.lr:
        lr = read_image(image.lr[scale])
        if not _fits(hr.shape, lr.shape, scale):
            raise InputError(
                f"{image.lr[scale]} has {lr.shape[1]} x {lr.shape[0]} pixels, which is not "
                f"{image.hr} ({hr.shape[1]} x {hr.shape[0]}) downsampled {scale} times, "
                "rounded down; replace one of them"
            )
        return lr, _crop(hr, lr.shape, scale)
    size = _lr_size(image, hr.shape, scale)
    hr = _crop(hr, size, scale)
    return imresize(hr, size=size), hr


def check_sizes(
    data: DataSet, scales: Sequence[float], protocol: str | Protocol, *, least: int = SSIM_WINDOW
) -> None:
    """Raise InputError if an image is too small to measure at a scale, or LR does not fit HR.

    Of good files only the headers are read. `least`: pixels that must be left a side after shaving.
    """
    protocol = as_protocol(protocol)
    for image in data.images:
        size = _header_size(image.hr)
        for scale in scales:
            hr_size = [round(n * scale) for n in _lr_size(image, size, scale)]
            with named_image(image, scale):
                check_size(hr_size, protocol.shave(scale), least)
            if scale in image.lr and not _fits(size, _header_size(image.lr[scale]), scale):
                read_pair(image, scale)  # which turns images upright and has the last word


@contextmanager
def named_image(image: ImageFiles, scale: float) -> Iterator[None]:
    """Name the image and the scale in an InputError that is raised within."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{image.hr} at x{scale}: {error}, or remove it") from None


def _header_size(path: Path) -> tuple[int, int]:
    """Read (H, W) from a file's header; InputError as `read_image` raises it."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            return image.height, image.width
    except Exception:  # whatever is wrong with the file, reading it says so
        return read_image(path).shape[:2]


def _fits(hr_size: Sequence[int], lr_size: Sequence[int], scale: float) -> bool:
    """Return whether LR has the size of HR downsampled, rounded down."""
    # The slack is for scales that binary cannot express.
    return all(-1e-6 < hr_size[axis] - lr_size[axis] * scale < scale for axis in (0, 1))


def _lr_size(image: ImageFiles, hr_shape: Sequence[int], scale: float) -> tuple[int, int]:
    h, w = (math.floor(n / scale + 1e-9) for n in hr_shape[:2])
    if not (h and w):
        raise InputError(
            f"{image.hr} has {hr_shape[1]} x {hr_shape[0]} pixels, too few for scale {scale}; "
            "remove it"
        )
    return h, w


def _crop(hr: np.ndarray, lr_shape: Sequence[int], scale: float) -> np.ndarray:
    return hr[: round(lr_shape[0] * scale), : round(lr_shape[1] * scale)]
