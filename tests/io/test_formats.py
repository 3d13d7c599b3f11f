"""The table of docs/upscale.md, made by trying what it says."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from gsr.errors import InputError
from gsr.inference.upscale import upscale_to_file
from gsr.io.image import WRITE_FORMATS, file_format, open_file
from gsr.io.source import ANIMATED, Metadata, Source, read_source
from gsr.io.writer import depth_in, image_writer, pages_writer

PAGE = Path(__file__).parents[2] / "docs" / "upscale.md"
HEAD = ["written as", "bits a channel", "alpha", "profile", "EXIF", "XMP", "by strips", "several"]
SIZE = (1200, 400)


def source(channels, kind):
    values = np.random.default_rng(0).random((*SIZE, channels))
    top = 1 if kind == "f4" else np.iinfo(kind).max
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    return (values * top).astype(kind), Metadata(profile, exif, b"<x:xmpmeta/>")


def write(path, values, meta):
    """Write in two halves; returns the bytes on disk before the second."""
    with image_writer(path, SIZE, values.shape[2], values.dtype, meta) as rows:
        rows(values[:1100])
        (temporary,) = path.parent.glob(f".{path.name}.*")
        before = temporary.stat().st_size
        rows(values[1100:])
    return before


def read(path) -> Source:
    with open_file(path) as file:
        return read_source(file)


def row(folder, suffix):
    """Try a format: one row of the table."""
    path = folder / f"a{suffix}"
    kind, bits = file_format(path), []
    for name, text in (("u1", "8"), ("u2", "16"), ("f4", "float")):
        if depth_in(kind, np.dtype(name)) == np.dtype(name):
            values, meta = source(1, name)
            write(path, values, meta)
            back = read(path)
            assert back.colour.dtype == np.dtype(name)
            if kind not in ("JPEG", "WEBP", "AVIF"):
                assert np.array_equal(back.colour[..., :1], values)
            bits.append(text)
    values, meta = source(4, "u1")
    before = write(path, values, meta)
    back = read(path)
    yes = [
        back.alpha is not None,
        back.meta.icc == meta.icc,
        back.meta.exif is not None and back.meta.exif[0x010F] == "Maker",
        back.meta.xmp is not None and back.meta.xmp.rstrip(b"\0") == meta.xmp,
        before > 100_000,
    ]
    several = "pages" if kind == "TIFF" else "frames"
    try:
        with pages_writer(path, values.nbytes, animated=kind in ANIMATED) as next_page:
            for flipped in (values, values[::-1]):
                next_page(SIZE, 4)(flipped)
        with Image.open(path) as image:
            assert image.n_frames == 2
    except InputError:
        several = "no"
    suffixes = ", ".join(s for s, (name, _) in WRITE_FORMATS.items() if name == kind)
    return [suffixes, ", ".join(bits), *("yes" if x else "no" for x in yes), several]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
def test_the_table_of_formats(tmp_path):
    names = dict.fromkeys(file_format(f"a{suffix}") for suffix in WRITE_FORMATS)
    first = {name: next(s for s in WRITE_FORMATS if file_format(f"a{s}") == name) for name in names}
    rows = [HEAD, ["---"] * len(HEAD), *(row(tmp_path, first[name]) for name in names)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    assert table in PAGE.read_text(encoding="utf-8"), f"docs/upscale.md lacks\n{table}"


NAMES = ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif", "a.gif", "a.bmp"]


def held(path):
    """What a file holds: bits a channel, and whether alpha, profile, EXIF, XMP, resolution."""
    found = read(path)
    meta, alpha = found.meta, found.alpha
    return {
        "bits": 8 * found.colour.itemsize,
        "alpha": alpha is not None and not (alpha == alpha.max()).all(),
        "profile": meta.icc,
        "maker": meta.exif and meta.exif.get(0x010F),
        "xmp": meta.xmp and meta.xmp.rstrip(b"\0"),
    }


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A file of each format with all that it can hold, and what that is."""
    if not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    folder, found = tmp_path_factory.mktemp("everything"), {}
    values = np.random.default_rng(1).integers(0, 2**16, (14, 18, 4), np.uint16)
    values[..., 3] = 65535
    values[2:9, 3:11, 3] = 0
    _, meta = source(4, "u1")
    for name in NAMES:
        dtype = depth_in(file_format(name), np.dtype(np.uint16))
        with image_writer(folder / name, (14, 18), 4, dtype, meta) as write_rows:
            write_rows(values if dtype == np.uint16 else (values >> 8).astype(np.uint8))
        found[name] = held(folder / name)
    assert found["a.png"] == found["a.tif"]
    assert found["a.png"] == {
        "bits": 16, "alpha": True, "profile": meta.icc, "maker": "Maker", "xmp": meta.xmp,
    }  # fmt: skip
    return folder, found


@pytest.mark.parametrize("result", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_what_both_formats_hold_survives(everything, tmp_path, tiny_model, name, result):
    folder, found = everything
    upscale_to_file(tmp_path / result, read(folder / name), 2, model=tiny_model)
    after = held(tmp_path / result)
    for key, value in after.items():
        both = found[name][key], found[result][key]
        assert value == (min(both) if key == "bits" else both[0] and both[1]), key
