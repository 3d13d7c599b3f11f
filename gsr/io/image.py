"""Image files in and out: any mode that Pillow reads becomes RGB bytes, and nothing half-written.

Images inside the library are either uint8 arrays [H, W, 3] or float32 tensors [1, 3, H, W] in
[0, 1]; this module is the only one that knows about files, modes and orientation.
"""

from __future__ import annotations

import glob
import importlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin

from gsr.errors import InputError
from gsr.io.paths import StrPath, check_path, check_takes_files

# What is read when a folder is searched, and how each suffix is written.
READ_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm")
# The brands by which HEIC files name themselves, in bytes 4 to 12.
HEIC = tuple(f"ftyp{brand}".encode() for brand in ("heic", "heix", "hevc", "hevx", "heim", "heis"))
WRITE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".webp": ("WEBP", {"quality": 95}),
    ".tif": ("TIFF", {"compression": "tiff_lzw"}),
    ".tiff": ("TIFF", {"compression": "tiff_lzw"}),
    ".avif": ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
    ".gif": ("GIF", {}),
    ".bmp": ("BMP", {}),
}
MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}  # pixels; the other formats have no limit in practice
JPEG_SEGMENT = 65000  # bytes that EXIF or XMP may take in a JPEG file
TEMPORARY = ".gsr-tmp"  # how the files end that write_atomic has not renamed yet
Pixels = NDArray[np.uint8]
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def open_image(path: StrPath) -> Image.Image:
    """Decode the image in a file, turned the way up that its EXIF orientation says.

    Returns a Pillow image in the file's own mode, closed to the file; of an animation the first
    frame. Raises InputError if there is no such file, it is no image, it is cut short or
    damaged, or it claims more pixels than Pillow's decompression-bomb limit allows.
    """
    with open_file(path) as file, decoding(path):
        image = Image.open(file)
        image.load()
        return upright(image)


def open_file(path: StrPath) -> BinaryIO:
    """Open an image file for reading; what is a pipe is read to its end, "-" is standard input.

    The file can seek. Raises InputError if it is not there, is a folder, empty or not readable, or
    of a format whose extra is not installed.
    """
    if str(path) == "-":
        return _checked(io.BytesIO(sys.stdin.buffer.read()), "standard input")
    path = check_path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name one image file")
    try:
        file = open(path, "rb")
        if path.is_file():
            return _checked(file, path)
        with file:
            return _checked(io.BytesIO(file.read()), path)
    except PermissionError:
        raise InputError(f"{path} may not be read; check its permissions") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _checked(file: BinaryIO, name: StrPath) -> BinaryIO:
    head = file.read(12)
    file.seek(0)
    try:
        if not head:  # a plugin without magic bytes might take it
            raise InputError(f"{name} is empty; give a PNG, JPEG, WebP, TIFF or BMP file")
        if head[4:] in HEIC:
            _register_heif(name)
    except InputError:
        file.close()
        raise
    return file


def _register_heif(name: StrPath) -> None:
    """Make Pillow read HEIC files, which need a library of their own."""
    try:
        plugin = importlib.import_module("pi_heif")
    except ImportError:
        raise InputError(
            f"{name} is a HEIC file; install what reads them: pip install 'gaussiansr[heif]'"
        ) from None
    plugin.register_heif_opener()


@contextmanager
def decoding(path: StrPath, max_pixels: int | None = None) -> Generator[None]:
    """Raise InputError that names the file for whatever Pillow raises within.

    An image may have `max_pixels` pixels, or as many as Pillow's limit allows.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags, which say nothing about the pixels
            # Pillow only warns between one and two times its limit. Both count as a refusal here.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; cut it into smaller images"
        ) from None
    except Image.UnidentifiedImageError:
        raise InputError(
            f"{path} is not an image that Pillow can read; give a PNG, JPEG, WebP, TIFF or BMP file"
        ) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (MemoryError, OverflowError) as error:
        raise InputError(f"{path} does not fit in memory ({type(error).__name__})") from None
    except Exception as error:  # damaged files leave Pillow's decoders with any of them
        raise InputError(f"{path} is a damaged or truncated image ({error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def lossy_compression(file: StrPath | BinaryIO) -> str | None:
    """Name the lossy compression of an image file, such as "JPEG"; None if it lost nothing.

    Told from the file's header. Formats that have both kinds count by what this file has.
    """
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return lossy_compression(opened)
    file.seek(0)
    image = Image.open(file)
    kind, compression = image.format, str(image.info.get("compression"))
    if kind in ("JPEG", "MPO"):
        return "JPEG"
    if kind in ("AVIF", "HEIF"):
        return kind
    if kind == "TIFF" and compression in ("jpeg", "tiff_jpeg", "webp"):
        return f"TIFF with {compression.removeprefix('tiff_')}"
    if kind == "WEBP" and _webp_is_lossy(file):
        return "lossy WebP"
    return None


def _webp_is_lossy(file: BinaryIO) -> bool:
    """Return whether any frame of a WebP file is VP8; VP8L is lossless."""
    file.seek(12)
    while len(header := file.read(8)) == 8:
        kind, length = header[:4], int.from_bytes(header[4:], "little")
        if kind == b"VP8 ":
            return True
        if kind == b"ANMF":  # a frame: 16 bytes, then chunks of its own
            length = 16
        file.seek(length + length % 2, os.SEEK_CUR)
    return False


def upright(image: Image.Image) -> Image.Image:
    """Copy a Pillow image, turned as its EXIF orientation says (which the copy lacks).

    Colours that were multiplied by alpha are divided by it: Pillow converts such modes only so.
    """
    image.load()
    try:
        # A TIFF is turned as it is decoded; an orientation in its XMP would turn it once more.
        turned = isinstance(image, TiffImagePlugin.TiffImageFile)
        image = image.copy() if turned else ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data says nothing about orientation, and the pixels are fine
        image = image.copy()
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    return image.convert(straight) if straight else image


def has_alpha(image: Image.Image) -> bool:
    """Return whether a Pillow image has transparency, as a channel or a palette entry."""
    return image.mode in _TRANSPARENT or "transparency" in image.info


def on_white(image: Image.Image) -> Image.Image:
    """Lay a Pillow image on white: L or RGB, if it had any transparency."""
    if not has_alpha(image):
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("L" if image.mode in ("LA", "La", "L") else "RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, 8 bits a channel; alpha is dropped, not composited.

    16-bit grey (I;16 and its kin, or I from a 16-bit PNG) keeps its top 8 bits, rounded; a float
    image (F) must hold [0, 1] or [0, 255] and InputError is raised otherwise.
    """
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        return _grey(values * (255 / 65535))
    if mode == "I":
        values = np.asarray(image).astype(np.float64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise InputError(
                "a 32-bit integer image must hold values in 0..65535; save it as 8 or 16 bits"
            )
        return _grey(values * (255 / 65535))
    if mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255:
            raise InputError(
                "a floating-point image must hold finite values in [0, 1] or [0, 255]; "
                "save it as 8 or 16 bits"
            )
        return _grey(values * (255 if values.max() <= 1 else 1))
    if "transparency" in image.info and mode in ("P", "L", "1", "RGB"):
        # Through RGBA, or Pillow would warn that the transparency is lost.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _grey(values: NDArray[np.float64]) -> Image.Image:
    """Round levels of 255 to an RGB image."""
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8)).convert("RGB")


def read_image(path: StrPath) -> Pixels:
    """Read a file as RGB: uint8 [H, W, 3]. Raises InputError, as `open_image` does."""
    image = open_image(path)
    try:
        return np.array(to_rgb(image))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def list_images(folder: StrPath, suffixes: Sequence[str] = READ_SUFFIXES) -> list[Path]:
    """Find all images below a folder, sorted by path, hidden files left out.

    Told by suffix, in any case. Raises InputError if the folder does not exist,
    is a file, or holds no image.
    """
    folder = check_path(folder)
    if not folder.exists():
        raise InputError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder of images")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        raise InputError(
            f"{folder} holds no image; looked for {', '.join(suffixes)} in it and below"
        )
    return paths


def check_format(path: StrPath, size: tuple[int, int]) -> None:
    """Raise InputError if no image of `size` (width, height) can be written under that suffix."""
    kind, _ = _format(Path(path))
    if max(size) > MAX_SIDE.get(kind, max(size)):
        raise InputError(
            f"{path}: {kind} takes at most {MAX_SIDE[kind]} pixels a side, not {size[0]} x "
            f"{size[1]}; choose another suffix, such as .png"
        )


def check_writable(path: StrPath) -> None:
    """Raise InputError, before anything is computed, if `write_image(path, ...)` could not work.

    Checks the suffix, that the folder exists and takes new files, and that path is no folder.
    """
    path = check_path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the image file to write")
    _format(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent} to write it into; create it")
    check_takes_files(path.parent)


def write_image(path: StrPath, array: Pixels) -> None:
    """Write uint8 [H, W, 3] (or [H, W]) to a file, in the format that its suffix says.

    One of `WRITE_FORMATS`: jpg, webp and avif with quality 95. The file appears whole or not at
    all. Raises InputError for another suffix, a folder that is missing or takes no file, or an
    array of another kind.
    """
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise InputError(
            f"{path}: an image to write must be uint8 [H, W, 3], "
            f"not {array.dtype} {list(array.shape)}"
        )
    save_image(path, Image.fromarray(np.ascontiguousarray(array)))


def save_image(path: StrPath, image: Image.Image) -> None:
    """Write a Pillow image of mode L, LA, RGB or RGBA as `write_image` does, with its profile.

    JPEG and BMP cannot hold transparency: the image is laid on white there.
    """
    check_format(path, image.size)
    check_writable(path)
    buffer = io.BytesIO()
    encode(buffer, path, image, {"icc_profile": image.info.get("icc_profile")})
    write_atomic(path, buffer.getvalue())


def encode(file: BinaryIO, path: StrPath, image: Image.Image, options: dict[str, Any]) -> None:
    """Encode a Pillow image as the suffix of `path` says, with Pillow's options for saving it.

    JPEG and BMP cannot hold transparency: the image is laid on white there. Options that are None
    are left out. Raises InputError if the format cannot hold the image.
    """
    kind, defaults = _format(Path(path))
    options = {**defaults, **{key: value for key, value in options.items() if value is not None}}
    if kind in ("JPEG", "BMP"):
        image = on_white(image)
    if kind == "BMP":
        options.pop("icc_profile", None)
    if kind not in ("JPEG", "AVIF"):
        options.pop("subsampling", None)
    if kind == "JPEG":  # one segment each: more cannot be said
        options = {
            key: value
            for key, value in options.items()
            if key not in ("exif", "xmp") or len(value) <= JPEG_SEGMENT
        }
    try:
        image.save(file, kind, **options)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(
            f"{path}: a {image.width} x {image.height} {image.mode} image cannot be saved as "
            f"{kind} ({error}); choose another suffix"
        ) from None


def write_atomic(path: StrPath, data: bytes | memoryview) -> None:
    """Put bytes into a file so that a reader, or a crash, sees the old file or the whole new one.

    Raises InputError if the operating system refuses.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: StrPath) -> Generator[BinaryIO]:
    """Open a file that takes the name `path` at the end, and is removed if anything fails.

    Raises InputError if the operating system refuses.
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = _make_temporary(path)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a crash could leave the new name on an empty file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _make_temporary(path: Path) -> tuple[int, str]:
    """Make a file beside `path` and lock it, so that `remove_left_over` knows it is in use."""
    while True:
        handle, temporary = tempfile.mkstemp(TEMPORARY, _prefix(path), path.parent)
        _lock(handle, wait=True)
        if os.path.exists(temporary):
            return handle, temporary
        os.close(handle)  # removed by another process before it was locked


def _prefix(path: Path) -> str:
    return f".{path.name[:32]}."


def _lock(handle: int, wait: bool) -> bool:
    """Lock a file until it is closed; returns whether another process has not."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass  # Windows, where a file in use cannot be removed; a file system without locks
    return True


def remove_left_over(folder: StrPath) -> None:
    """Remove the temporary files that `write_atomic` left in a folder when it was killed.

    Those that a running process writes stay.
    """
    for path in Path(folder).glob(f".*{TEMPORARY}"):
        with suppress(OSError), open(path, "rb") as file:
            if _lock(file.fileno(), wait=False):
                path.unlink()


def being_written(path: StrPath) -> bool:
    """Return whether another process is writing the file of this name."""
    path = Path(path)
    for temporary in path.parent.glob(f"{glob.escape(_prefix(path))}*{TEMPORARY}"):
        with suppress(OSError), open(temporary, "rb") as file:
            if not _lock(file.fileno(), wait=False):
                return True
    return False


def file_format(path: StrPath) -> str:
    """Return the format that a suffix stands for, as Pillow names it; InputError for others."""
    return _format(Path(path))[0]


def _format(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        return WRITE_FORMATS[path.suffix.lower()]
    except KeyError:
        raise InputError(
            f"{path}: the suffix {path.suffix!r} is none of {', '.join(WRITE_FORMATS)}"
        ) from None


def to_tensor(array: Pixels) -> torch.Tensor:
    """Convert uint8 [H, W, 3] to float32 [1, 3, H, W] in [0, 1]."""
    # torch.tensor copies: Pillow's arrays are read-only, and tensors must not be.
    return torch.tensor(array).permute(2, 0, 1)[None].contiguous().float().div_(255)


def to_uint8(tensor: torch.Tensor) -> Pixels:
    """Clamp float [1, 3, H, W] or [3, H, W] to [0, 1] and round it to uint8 [H, W, 3]."""
    if tensor.ndim == 4:
        tensor = tensor.squeeze(0)
    levels = tensor.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()
