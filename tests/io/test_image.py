"""Image files: every mode is read as RGB, broken files are refused, writing is atomic."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from gsr.errors import InputError
from gsr.io import image as gi
from gsr.io.source import read_source, upright_size


def refused(path, read=gi.read_image):
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF", ".bmp"])
def test_lossless_round_trip(tmp_path, image, suffix):
    path = tmp_path / f"a{suffix}"
    gi.write_image(path, image)
    np.testing.assert_array_equal(gi.read_image(path), image)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_round_trip(tmp_path, image, suffix):
    path = tmp_path / f"a{suffix}"
    gi.write_image(path, image)
    assert Image.open(path).format == {".webp": "WEBP"}.get(suffix, "JPEG")
    error = np.abs(gi.read_image(path).astype(int) - image)
    # WebP halves the colour resolution; a colour offset or a swapped channel is far larger.
    assert error.mean() < (10 if suffix == ".webp" else 1.5)


def test_jpeg_is_quality_95_without_colour_subsampling(tmp_path, image):
    gi.write_image(tmp_path / "a.jpg", image)
    expected = tmp_path / "b.jpg"
    Image.fromarray(image).save(expected, quality=95, subsampling=0)
    assert (tmp_path / "a.jpg").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "CMYK", "P", "YCbCr", "HSV"])
def test_modes_become_rgb(tmp_path, image, mode):
    original = Image.fromarray(image)
    source = original.quantize(256) if mode == "P" else original.convert(mode)
    if mode in ("HSV", "YCbCr"):  # hardly any file keeps these
        array = np.array(gi.to_rgb(source))
    else:
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        source.save(path)
        array = gi.read_image(path)
    assert array.dtype == np.uint8 and array.shape == image.shape
    if mode in ("L", "LA"):
        grey = np.asarray(original.convert("L"))
        np.testing.assert_array_equal(array, np.stack([grey] * 3, -1))
    elif mode == "1":
        assert set(np.unique(array)) == {0, 255}
    else:
        tolerance = {"P": 4, "HSV": 8, "YCbCr": 4}.get(mode, 0)
        assert np.abs(array.astype(int) - image).max() <= tolerance


def test_palette_with_transparency(tmp_path):
    source = Image.new("P", (2, 1))
    source.putpalette([255, 0, 0, 0, 0, 255])
    source.putdata([0, 1])
    source.save(tmp_path / "a.png", transparency=0)
    array = gi.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(array, [[[255, 0, 0], [0, 0, 255]]])
    assert gi.has_alpha(gi.open_image(tmp_path / "a.png"))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257 * 77, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    expected = [0, 0, 1, 77, 255]  # v / 257, rounded: not the high byte, not clipped at 255
    np.testing.assert_array_equal(gi.read_image(tmp_path / f"a.{suffix}")[0, :, 1], expected)


def test_32_bit_integers_and_floats(tmp_path):
    def save(values):
        Image.fromarray(np.array([values])).save(tmp_path / "a.tif")
        return tmp_path / "a.tif"

    assert gi.read_image(save(np.array([0, 65535], np.int32)))[0, :, 0].tolist() == [0, 255]
    assert gi.read_image(save(np.array([0, 0.5, 1], np.float32)))[0, :, 0].tolist() == [0, 128, 255]
    assert gi.read_image(save(np.array([0, 77, 255], np.float32)))[0, :, 0].tolist() == [0, 77, 255]
    assert "0..65535" in refused(save(np.array([-1, 5], np.int32)))
    assert "finite" in refused(save(np.array([0, np.nan], np.float32)))
    assert "[0, 255]" in refused(save(np.array([0, 300], np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, image, orientation):
    # Where each orientation's stored pixels come from, written out: (transpose, flip y, flip x).
    stored = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.transpose(1, 0, 2),
        6: image.transpose(1, 0, 2)[::-1],
        7: image[::-1, ::-1].transpose(1, 0, 2),
        8: image.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(gi.read_image(tmp_path / "a.png"), image)
    assert gi.open_image(tmp_path / "a.png").getexif().get(0x0112, 1) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow, of the TIFF cut short
def test_broken_files_are_refused(tmp_path, image):
    good = tmp_path / "good.jpg"
    gi.write_image(good, image.repeat(20, 0).repeat(20, 1))
    data = good.read_bytes()
    cases = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"no image at all", "is not an image"),
        "truncated.jpg": (data[: len(data) // 2], "damaged or truncated"),
        "header.jpg": (data[:20], ""),
    }
    for suffix in (".png", ".webp", ".tif", ".bmp"):
        gi.write_image(tmp_path / f"x{suffix}", image.repeat(20, 0).repeat(20, 1))
        whole = (tmp_path / f"x{suffix}").read_bytes()
        cases[f"cut{suffix}"] = (whole[: len(whole) * 2 // 3], "")
    whole = bytearray((tmp_path / "x.png").read_bytes())
    whole[60:80] = bytes(20)
    cases["garbled.png"] = (bytes(whole), "damaged or truncated")
    for name, (content, sentence) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert sentence in refused(tmp_path / name)


def test_paths_that_hold_no_image(tmp_path):
    assert "no such file" in refused(tmp_path / "none.png")
    assert "is a folder" in refused(tmp_path)
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    assert "cannot be used" in refused(tmp_path / "\0.png")


@pytest.mark.parametrize("limit", [100, 150])  # Pillow raises beyond twice its limit, warns below
def test_decompression_bomb(tmp_path, image, monkeypatch, limit):
    gi.write_image(tmp_path / "a.png", image)  # 204 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"more than {limit} pixels" in refused(tmp_path / "a.png")


def test_list_images(tmp_path, image):
    for name in ("b.PNG", "sub/a.jpg", "sub/deep/c.webp", ".hidden.png", ".folder/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        gi.write_image(tmp_path / name, image)
    many = [f"many/{i * 7 % 20:02}.png" for i in range(20)]
    for name in many:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in gi.list_images(tmp_path)]
    assert found == ["b.PNG", *sorted(many), "sub/a.jpg", "sub/deep/c.webp"]
    assert "no such folder" in refused(tmp_path / "none", gi.list_images)
    assert "is a file" in refused(tmp_path / "notes.txt", gi.list_images)
    assert "File name too long" in refused(tmp_path / ("x" * 300), gi.list_images)
    assert "holds no image" in refused(tmp_path / "folder.png", gi.list_images)


def test_writing_is_refused(tmp_path, image):
    def refused_to_write(path, array=image):
        return refused(path, lambda path: gi.write_image(path, array))

    assert ".png, .jpg" in refused_to_write(tmp_path / "a.jp2")
    assert "suffix ''" in refused_to_write(tmp_path / "a")
    assert "create it" in refused_to_write(tmp_path / "none" / "a.png")
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refused_to_write(tmp_path / "folder.png")
    assert "float32" in refused_to_write(tmp_path / "a.png", image.astype(np.float32))
    assert "[2, 2, 2]" in refused_to_write(tmp_path / "a.png", np.zeros((2, 2, 2), np.uint8))
    # A JPEG cannot be wider than 65,500 pixels.
    assert "at most 65500 pixels a side, not 65501 x 1; choose another suffix" in refused_to_write(
        tmp_path / "a.jpg", np.zeros((1, 65501, 3), np.uint8)
    )
    assert "at most 16383 pixels a side" in refused_to_write(
        tmp_path / "a.webp", np.zeros((16384, 1, 3), np.uint8)
    )
    assert "File name too long" in refused_to_write(tmp_path / ("x" * 300 + ".png"))
    assert sorted(os.listdir(tmp_path)) == ["folder.png"]


def test_writing_is_atomic(tmp_path, image, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def fail(*_):
        assert path.read_bytes() == b"before"  # nothing touches the file until all is written
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        assert "No space left" in refused(path, lambda path: gi.write_image(path, image))
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a.png"]
    gi.write_image(path, image)
    np.testing.assert_array_equal(gi.read_image(path), image)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_limits_of_formats_are_the_encoders_own(tmp_path):
    for name, side in (("a.jpg", 65500), ("a.webp", 16383)):
        gi.write_image(tmp_path / name, np.zeros((1, side, 3), np.uint8))
        gi.write_image(tmp_path / name, np.zeros((side, 1, 3), np.uint8))
        for size in ((1, side + 1), (side + 1, 1)):
            with pytest.raises((OSError, ValueError)):
                Image.new("RGB", size).save(tmp_path / f"direct-{name}")


def test_names_as_long_as_they_may_be(tmp_path, image):
    for name in ("x" * 251 + ".png", "\N{GRINNING FACE}" * 62 + ".png"):
        gi.write_image(tmp_path / name, image)
        np.testing.assert_array_equal(gi.read_image(tmp_path / name), image)


def test_data_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    steps = []

    def fsync(handle):
        steps.append(os.fstat(handle).st_size)

    replace = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *a: (steps.append("replace"), replace(*a)))
    gi.write_atomic(tmp_path / "a", b"12345")
    assert steps == [5, "replace"]


def test_save_image_keeps_profile_and_lays_alpha_on_white(tmp_path, image):
    rgba = Image.fromarray(image).convert("RGBA")
    rgba.putalpha(0)
    rgba.info["icc_profile"] = b"a profile"
    for suffix in (".jpg", ".bmp"):
        gi.save_image(tmp_path / f"a{suffix}", rgba)
        assert gi.read_image(tmp_path / f"a{suffix}").min() == 255
    assert Image.open(tmp_path / "a.jpg").info["icc_profile"] == b"a profile"
    gi.save_image(tmp_path / "a.png", rgba)
    back = gi.open_image(tmp_path / "a.png")
    assert back.mode == "RGBA" and back.info["icc_profile"] == b"a profile"
    np.testing.assert_array_equal(np.asarray(back)[..., :3], image)


def test_tensors(image):
    tensor = gi.to_tensor(image)
    assert tensor.shape == (1, 3, 12, 17) and tensor.dtype == torch.float32
    assert tensor[0, 2, 3, 4] == image[3, 4, 2] / np.float32(255)
    np.testing.assert_array_equal(gi.to_uint8(tensor), image)
    np.testing.assert_array_equal(gi.to_uint8(tensor[0].double()), image)
    values = torch.tensor([-1.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 2.0])
    levels = gi.to_uint8(values.expand(1, 3, 1, 5))
    assert levels[0, :, 0].tolist() == [0, 0, 1, 255, 255] and levels.dtype == np.uint8


@pytest.mark.parametrize(
    "name, options, lossy",
    [
        ("a.jpg", {}, "JPEG"), ("a.png", {}, None), ("a.bmp", {}, None),
        ("a.webp", {"quality": 80}, "lossy WebP"), ("a.webp", {"lossless": True}, None),
        ("a.tif", {"compression": "tiff_lzw"}, None), ("a.tif", {"compression": "jpeg"}, "TIFF"),
        ("a.avif", {}, "AVIF"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_lossy_compression_is_told_from_the_file(tmp_path, name, options, lossy, mode):
    if mode == "RGBA" and (name == "a.jpg" or options.get("compression") == "jpeg"):
        pytest.skip("the format has no alpha")
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).convert(mode)
    if mode == "RGBA":
        image.putalpha(image.getchannel("R"))  # a WebP with alpha is of the extended format
    image.save(tmp_path / name, **options)
    said = gi.lossy_compression(tmp_path / name)
    assert said is None if lossy is None else said.startswith(lossy)


@pytest.mark.parametrize("lossless", [True, False])
def test_an_animated_webp_is_lossy_by_its_frames(tmp_path, lossless):
    frames = [Image.new("RGB", (16, 16), (i, 9, 200)) for i in range(3)]
    path = tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=lossless)
    assert gi.lossy_compression(path) == (None if lossless else "lossy WebP")


HEIC = Path(__file__).parents[1] / "data" / "turned.heic"  # 64 x 48, to be turned by a quarter


def test_heic():
    pytest.importorskip("pi_heif")
    image = gi.open_image(HEIC)
    assert image.size == (48, 64) and gi.lossy_compression(HEIC) == "HEIF"
    with gi.open_file(HEIC) as file:
        source = read_source(file)
        assert source.shape == (64, 48) == upright_size(Image.open(file))
        assert source.meta.exif[0x010F] == "Maker"
    assert np.array_equal(source.colour, np.array(image))


def test_heic_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(InputError, match=r"turned.heic is a HEIC file; .*gaussiansr\[heif\]"):
        gi.open_image(HEIC)
