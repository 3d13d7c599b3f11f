"""Camera, date, place, resolution, XMP, profile and texts stay; only the orientation goes."""

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import gsr
from gsr.inference.upscale import upscale_to_file
from gsr.io.image import open_file
from gsr.io.source import EXIF_IFD, GPS_IFD, ORIENTATION, Metadata, read_source, upright_size
from gsr.io.writer import image_writer

XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6" dc:title="A tree"/></x:xmpmeta>'
KEPT_XMP = XMP.replace(b'tiff:Orientation="6"', b"")
MAKE, MODEL, TAKEN, WIDTH, HEIGHT = 0x010F, 0x0110, 0x9003, 0xA002, 0xA003


def exif():
    made = Image.Exif()
    made[MAKE], made[MODEL], made[ORIENTATION] = "Maker", "Model 1", 6
    made[EXIF_IFD] = {TAKEN: "2024:05:01 12:00:00", WIDTH: 17, HEIGHT: 12}
    made[GPS_IFD] = {1: "N", 2: (48.0, 12.0, 30.5)}
    return made


@pytest.fixture
def everything():
    """What `Image.save` takes of all of it, with a profile that is one."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {"exif": exif().tobytes(), "xmp": XMP, "icc_profile": profile, "dpi": (300, 300)}


def read(path):
    with open_file(path) as file:
        return read_source(file)


@pytest.mark.parametrize("source", ["a.jpg", "a.tif", "a.webp", "a.png", "a.avif"])
@pytest.mark.parametrize("result", ["b.png", "b.tif", "b.jpg", "b.webp"])
def test_what_a_file_says_is_kept(tmp_path, tiny_model, image, everything, source, result):
    if source == "a.png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", XMP.decode())
        Image.fromarray(image).save(tmp_path / source, pnginfo=text, **everything)
    elif source == "a.tif":  # Pillow writes EXIF and XMP one at a time; XMP says what is up
        meta = Metadata(everything["icc_profile"], exif(), XMP, (300, 300))
        with image_writer(tmp_path / source, (12, 17), 3, meta=meta) as write:
            write(image)
    else:
        Image.fromarray(image).save(tmp_path / source, **everything)
    with Image.open(tmp_path / source) as small:
        assert upright_size(small) == (17, 12)
    upscale_to_file(tmp_path / result, read(tmp_path / source), 2, model=tiny_model)
    with Image.open(tmp_path / result) as large:
        assert large.size == (24, 34)  # turned
        found = large.getexif()
        assert found.get(ORIENTATION, 1) == 1
        assert found[MAKE].strip("\0") == "Maker" and found[MODEL].strip("\0") == "Model 1"
        details = found.get_ifd(EXIF_IFD)
        assert details[TAKEN].startswith("2024:05:01")
        assert (details[WIDTH], details[HEIGHT]) == (24, 34)
        assert [float(x) for x in found.get_ifd(GPS_IFD)[2]] == [48, 12, 30.5]
        assert large.info["icc_profile"] == everything["icc_profile"]
        assert large.info["xmp"].rstrip(b"\0") == KEPT_XMP
        if source[2:] not in ("webp", "avif") and result != "b.webp":  # these have no resolution
            assert large.info["dpi"] == pytest.approx((300, 300), abs=0.02)


def test_texts_of_a_png_are_kept(tmp_path, tiny_model, image):
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "Bäcker")
    text.add_itxt("Title", "\N{GRINNING FACE}")
    text.add_text("Comment", "long " * 100, zip=True)
    Image.fromarray(image).save(tmp_path / "a.png", pnginfo=text)
    upscale_to_file(tmp_path / "b.png", read(tmp_path / "a.png"), 2, model=tiny_model)
    with Image.open(tmp_path / "b.png") as large:
        large.load()
        want = {"Author": "Bäcker", "Title": "\N{GRINNING FACE}", "Comment": "long " * 100}
        assert large.text == want


def test_pillow_images_keep_it_in_info(tmp_path, tiny_model, image, everything):
    Image.fromarray(image).save(tmp_path / "a.jpg", **everything)
    with Image.open(tmp_path / "a.jpg") as small:
        large = gsr.upscale(small, 2, model=tiny_model)
    assert large.size == (24, 34) and large.getexif()[MAKE] == "Maker"
    assert ORIENTATION not in large.getexif() and large.info["dpi"] == (300, 300)
    assert large.info["xmp"] == KEPT_XMP


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged tags
@pytest.mark.parametrize("name", ["b.png", "b.tif", "b.jpg"])
def test_damaged_exif_does_not_matter(tmp_path, tiny_model, image, name):
    whole = exif().tobytes()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        for place in rng.integers(6, len(data), 6):
            data[place] = rng.integers(256)
        Image.fromarray(image).save(tmp_path / "a.jpg", exif=bytes(data))
        upscale_to_file(tmp_path / name, read(tmp_path / "a.jpg"), 2, model=tiny_model)
        with Image.open(tmp_path / name) as large:
            large.load()
            assert sorted(large.size) == [24, 34]


def test_exif_of_an_extreme_length(tmp_path, tiny_model, image, everything):
    """More than a JPEG segment holds: the image is written without it, rather than not at all."""
    big = exif()
    big[EXIF_IFD][0x9286] = b"x" * 70000
    Image.fromarray(image).save(tmp_path / "a.png", exif=big)
    upscale_to_file(tmp_path / "b.jpg", read(tmp_path / "a.png"), 2, model=tiny_model)
    upscale_to_file(tmp_path / "b.tif", read(tmp_path / "a.png"), 2, model=tiny_model)
    with Image.open(tmp_path / "b.tif") as large:
        assert len(large.getexif().get_ifd(EXIF_IFD)[0x9286]) == 70000
