"""An image as it is upscaled: planes in the file's own depth, alpha, and what else the file says.

Pillow holds 16 bits for grey images only. Of colours in 16 bits it decodes the high bytes or, read
as if in the other byte order, the low ones: two passes make the whole values.
"""

# pyright: basic
# Pillow types neither tiles nor tags.

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, TiffImagePlugin

from gsr.errors import InputError
from gsr.io.image import has_alpha, to_rgb, upright

ORIENTATION, EXIF_IFD, GPS_IFD = 0x0112, 0x8769, 0x8825
MAX_SAMPLE_VALUE, BITS, PLANAR, RESOLUTION, SUBFILE = 281, 258, 284, 282, 254  # TIFF's tags
# What of a TIFF's main directory is about the image rather than about how it is stored: the EXIF
# tags of Make, Model, dates and so on.
KEPT = (270, 271, 272, 305, 306, 315, 316, 33432, EXIF_IFD, GPS_IFD)
WIDTH_IN_EXIF, HEIGHT_IN_EXIF, INTEROP_IFD = 0xA002, 0xA003, 0xA005
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B"}  # N: little-endian machines only


@dataclass
class Metadata:
    """What a file says about its image besides the pixels; orientation is not in it."""

    icc: bytes | None = None
    exif: Image.Exif | None = None  # the directories in it as dicts
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: dict[str, str] = field(default_factory=dict)

    def exif_of(self, size: tuple[int, int]) -> Image.Exif | None:
        """EXIF for an image of size (H, W); None as well if it is too damaged to be written."""
        if self.exif is None:
            return None
        details = self.exif.get(EXIF_IFD, {})
        details.pop(INTEROP_IFD, None)  # where it was in the file that was read
        for tag, pixels in ((HEIGHT_IN_EXIF, size[0]), (WIDTH_IN_EXIF, size[1])):
            if tag in details:
                details[tag] = pixels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.exif.tobytes()
        except Exception:  # Pillow raises almost anything for a camera's damaged tags
            return None
        return self.exif

    def info(self, size: tuple[int, int]) -> dict[str, Any]:
        """Return what a Pillow image of size (H, W) has of it in `info`."""
        exif = self.exif_of(size)
        found = {
            "icc_profile": self.icc,
            "exif": exif.tobytes() if exif else None,
            "xmp": self.xmp,
            "dpi": self.dpi,
        }
        return {key: value for key, value in found.items() if value is not None}


@dataclass
class Source:
    """A decoded image, upright.

    colour is [h, w, 1] (grey) or [h, w, 3] of uint8, uint16 or float32, and alpha [h, w] of the
    same type, or None. White is the level that becomes 1 for the network, shown the one that is
    white in a file of 8 bits; for whole numbers they are one level, 255, 65535 or 4095.
    """

    colour: NDArray[Any]
    alpha: NDArray[Any] | None = None
    white: float = 255
    shown: float = 255
    meta: Metadata = field(default_factory=Metadata)
    duration: float | None = None  # milliseconds, of a frame of an animation

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        return self.colour.shape[0], self.colour.shape[1]

    @property
    def channels(self) -> int:
        """Colours and alpha: 1 to 4."""
        return self.colour.shape[2] + (self.alpha is not None)


def read_source(file: BinaryIO, frame: int = 0) -> Source:
    """Decode a frame of an image file that Pillow can open, in the depth that it has.

    Raises what Pillow does, see `gsr.io.image.decoding`, and InputError as `from_image`.
    """
    image = _open(file, frame)
    kind = image.format
    animated = kind == "PNG" and getattr(image, "n_frames", 1) > 1  # Pillow has 8 bits of them
    low = None if animated else _low_bytes(image, file, frame)
    if low is None:
        source = from_image(image)
    else:
        source = _from_two(image, low)
    source.duration = image.info.get("duration")  # known once the frame is decoded
    if kind == "TIFF" and source.colour.dtype == np.uint16:
        source.white = source.shown = _tiff_white(image, source.colour)
    return source


class Frames(NamedTuple):
    """What of a file is upscaled: the numbers of its pages, or of its animation's frames."""

    numbers: list[int]
    animated: bool
    plays: int  # of an animation; 0: for ever


def find_frames(image: Image.Image) -> Frames:
    """Find the pages or frames of an image that is open, not those that are previews of others."""
    count, kind = getattr(image, "n_frames", 1), image.format
    if count > 1 and kind == "TIFF":
        numbers: list[int] = []
        for number in range(count):
            image.seek(number)
            if not image.tag_v2.get(SUBFILE, 0) & 1:  # pyright: ignore[reportAttributeAccessIssue]
                numbers.append(number)
        image.seek(0)
        return Frames(numbers or [0], False, 0)
    if count > 1 and kind in ANIMATED:
        # The picture of a PNG may be none of its frames.
        first = 1 if image.info.get("default_image") else 0
        plays = image.info.get("loop", 1 if kind == "GIF" else 0)
        if kind == "GIF" and plays:  # how often it is repeated, for those that say it
            plays += "loop" in image.info
        return Frames(list(range(first, count)), True, plays)
    # The further images of a phone's JPEG (MPO) are depths and previews.
    return Frames([0], False, 0)


def from_image(image: Image.Image) -> Source:
    """Take a Pillow image. Raises InputError for an empty one, and for levels out of range."""
    if 0 in image.size:
        raise InputError("the image has no pixels")
    meta = _metadata(image)
    image = upright(image)
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise InputError(
                "a 32-bit integer image must hold values in 0..65535; save it as 8 or 16 bits"
            )
        alpha = _transparent(levels[..., None], image.info.get("transparency"))
        return Source(levels.astype(np.uint16)[..., None], alpha, 65535, 65535, meta)
    if mode == "F":
        levels = np.array(image, np.float32)
        shown = float_white(levels)
        return Source(levels[..., None], None, max(shown, float(levels.max())), shown, meta)
    grey = mode in ("L", "LA", "La", "1")
    array = np.array(to_rgb(image))
    alpha = np.array(image.convert("RGBA"))[..., 3] if has_alpha(image) else None
    # The profile of a CMYK or Lab file does not describe RGB.
    if not (grey or mode in ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA")):
        meta.icc = None
    return Source(np.ascontiguousarray(array[..., :1]) if grey else array, alpha, meta=meta)


def wrap_around(source: Source, size: tuple[int, int], least: int) -> tuple[int, int]:
    """Continue an image that is to become `size` (H, W) as if it were laid in tiles.

    At least `least` pixels on every side, as many above as below. Returns the size of the result,
    whose middle is the result without them: a whole number of its pixels for those that are added.
    """
    pads, wrapped = [], []
    for n, big in zip(source.shape, size, strict=True):
        step = n // math.gcd(n, big)  # pixels that become a whole number of pixels
        pad = math.ceil(least / step) * step
        pads.append((pad, pad))
        wrapped.append(big + 2 * pad * big // n)
    source.colour = np.pad(source.colour, [*pads, (0, 0)], "wrap")
    if source.alpha is not None:
        source.alpha = np.pad(source.alpha, pads, "wrap")
    return wrapped[0], wrapped[1]


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the size (h, w) that an image that is not decoded yet has when it is upright."""
    sideways = (5, 6, 7, 8)
    try:
        turned = image.getexif().get(ORIENTATION, 1) in sideways  # said by EXIF, or else by XMP
    except Exception:  # damaged; Pillow raises almost anything for it
        turned = False
    if getattr(image, "tag_v2", {}).get(ORIENTATION) in sideways:
        turned = False  # Pillow has it in the size of a TIFF already
    return (image.width, image.height) if turned else (image.height, image.width)


def float_white(levels: NDArray[Any]) -> float:
    """Return the level of white in a floating-point image: 1, or 255.

    Levels a little above 1 are highlights; an image of levels up to 255 has some above 16.
    Raises InputError for levels that are not finite, negative or above 255.
    """
    low, high = float(levels.min()), float(levels.max())
    if not (low >= 0 and high <= 255):  # false for NaN as well
        raise InputError(
            "a floating-point image must hold finite values in [0, 1] or [0, 255]; "
            "save it as 8 or 16 bits"
        )
    return 1.0 if high <= 16 else 255.0


def _open(file: BinaryIO, frame: int) -> Image.Image:
    file.seek(0)
    image = Image.open(file)
    if frame:
        image.seek(frame)
    return image


def _low_bytes(image: Image.Image, file: BinaryIO, frame: int) -> NDArray[np.uint8] | None:
    """Decode the low bytes [h, w, C] of colours in 16 bits; None if the image has none.

    In an image of grey and alpha these are bytes: grey's high and low, alpha's high and low.
    """
    if not isinstance(image, PngImagePlugin.PngImageFile | TiffImagePlugin.TiffImageFile):
        return None
    raws = {_raw(tile) for tile in image.tile}
    raw = raws.pop() if len(raws) == 1 else ""
    tags = getattr(image, "tag_v2", {})
    if tags.get(PLANAR) == 2 and tags.get(BITS, (8,))[0] == 16:  # Pillow mixes up their bytes
        raise InputError(
            "this TIFF has each colour of 16 bits in a plane of its own; save it interleaved"
        )
    if raw.startswith("RGBa") or raw[-4:] not in OTHER_BYTE or raw[:2] == "I;":
        return None  # 8 bits, grey, or what is seldom enough to be read with 8 bits
    other = "RGBA" if raw == "LA;16B" else raw[:-4] + OTHER_BYTE[raw[-4:]]
    if image.mode not in ("RGB", "RGBA"):
        return None
    again: Any = _open(file, frame)
    again.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
        for tile in again.tile
    ]
    again.load()
    return np.array(again)


def _raw(tile: Any) -> str:
    """Return how the bytes of a Pillow tile lie, such as "RGB;16B"."""
    return tile.args if isinstance(tile.args, str) else tile.args[0]


def _from_two(image: Image.Image, low: NDArray[np.uint8]) -> Source:
    """Join the bytes of colours in 16 bits."""
    grey_alpha = isinstance(image, PngImagePlugin.PngImageFile) and image.tile[0].args == "LA;16B"
    image.load()
    orientation = image.getexif().get(ORIENTATION, 1)
    meta = _metadata(image)
    if grey_alpha:
        values = low.view(">u2").astype(np.uint16)
    else:
        values = np.array(image).astype(np.uint16)
        values <<= 8
        values |= low
    values = _turned(values, orientation)
    count = (values.shape[2] + 1) // 2 * 2 - 1  # colours: 1 of 2, 3 of 3 or 4
    colour, alpha = values[..., :count], None
    if values.shape[2] > count:
        colour, alpha = np.ascontiguousarray(colour), np.ascontiguousarray(values[..., count])
    else:
        alpha = _transparent(values, image.info.get("transparency"))
    return Source(colour, alpha, 65535, 65535, meta)


def _transparent(values: NDArray[Any], colour: Any) -> NDArray[np.uint16] | None:
    """Make alpha [h, w] of a PNG's one transparent colour of 16 bits."""
    if not isinstance(colour, int | tuple):
        return None
    return np.where((values == np.array(colour)).all(-1), 0, 65535).astype(np.uint16)


def _turned(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn [h, w, C] the way up that an EXIF orientation from 1 to 8 says."""
    if orientation in (5, 6, 7, 8):
        values = values.transpose(1, 0, 2)
    flip_y, flip_x = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(values[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _tiff_white(image: Image.Image, levels: NDArray[Any]) -> int:
    """Return the level of white: what the file says, or 12 bits if it has nothing above them."""
    said = image.tag_v2.get(MAX_SAMPLE_VALUE)  # pyright: ignore[reportAttributeAccessIssue]
    said = max(said) if isinstance(said, tuple) else said
    most = int(levels.max())
    if isinstance(said, int) and most <= said < 65535 and said > 0:
        return said
    return 4095 if most <= 4095 else 65535


def _metadata(image: Image.Image) -> Metadata:
    """Read what the file says besides pixels; damaged parts say nothing."""
    image.load()  # some of a PNG's texts are behind the pixels
    info = image.info
    xmp = info.get("xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    if xmp:  # turned upright, and so without an orientation
        xmp = re.sub(rb'tiff:Orientation="[0-9]"', b"", xmp)
        xmp = re.sub(rb"<tiff:Orientation>[0-9]</tiff:Orientation>", b"", xmp)
    text = {
        key: str(value)
        for key, value in getattr(image, "text", {}).items()
        if key != "XML:com.adobe.xmp" and not key.startswith("Raw profile type")
    }
    # Of a TIFF that says no resolution, Pillow says 1 pixel an inch.
    dpi = None if RESOLUTION not in getattr(image, "tag_v2", (RESOLUTION,)) else info.get("dpi")
    return Metadata(info.get("icc_profile"), _exif(image), xmp, _dpi(dpi), text)


def _exif(image: Image.Image) -> Image.Exif | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif()
            kept = Image.Exif()
            tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
            for tag, value in found.items():
                if tag in (EXIF_IFD, GPS_IFD):
                    kept[tag] = dict(found.get_ifd(tag))  # in the file it is an offset
                elif tag != ORIENTATION and (tag in KEPT or not tiff):
                    kept[tag] = value
    except Exception:  # damaged; Pillow raises almost anything for it
        return None
    return kept if len(kept) else None


def _dpi(dpi: Any) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < 1e6 and 0 < y < 1e6 else None
