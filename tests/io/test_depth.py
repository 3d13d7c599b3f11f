"""16 bits, 12 in 16 and floats: read, upscaled and written as deep as they are."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import gsr
from gsr.errors import InputError
from gsr.inference.upscale import upscale_to_file
from gsr.io.image import open_file
from gsr.io.source import Metadata, Source, read_source, upright_size
from gsr.io.writer import image_writer


def deep(channels, size=(13, 18), top=65535):
    """uint16 [h, w, channels], smooth, hardly a value of it a multiple of 257; alpha above 0."""
    y, x, c = np.mgrid[0 : size[0], 0 : size[1], 0:channels]
    return ((0.5 + 0.4 * np.sin(x / 7 + c) * np.cos(y / 5)) * top).astype(np.uint16)


def write(path, values, meta=None, **options):
    with image_writer(path, values.shape[:2], values.shape[2], values.dtype, meta, **options) as w:
        w(values[:5])
        w(values[5:])


def read(path):
    with open_file(path) as file:
        return read_source(file)


def joined(source):
    alpha = [] if source.alpha is None else [source.alpha[..., None]]
    return np.concatenate([source.colour, *alpha], axis=2)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_read_and_written(tmp_path, channels, suffix):
    if (channels, suffix) == (2, "tif"):
        pytest.skip("Pillow reads no TIFF of grey and alpha in 16 bits")
    values, path = deep(channels), tmp_path / f"a.{suffix}"
    write(path, values)
    with Image.open(path) as image:  # what Pillow makes of the file by itself: the high bytes
        image.load()
        assert image.size == (18, 13)
        if channels > 2:
            assert np.array_equal(image, values >> 8)
    back = read(path)
    assert back.colour.dtype == np.uint16 and back.white == back.shown == 65535
    assert np.array_equal(joined(back), values)


def plain_tiff(values, order="<", orientation=1):
    """A TIFF without compression, field by field: no code of gsr's has a part in it."""
    channels, data = values.shape[2], values.astype(values.dtype.newbyteorder(order)).tobytes()
    fields = [(256, 18), (257, 13), (258, 8 * values.itemsize), (259, 1)]
    fields += [(262, 2 if channels > 2 else 1), (273, 8), (274, orientation), (277, channels)]
    fields += [(278, 13), (279, len(data))] + ([(338, 2)] if channels == 4 else [])
    e = "little" if order == "<" else "big"
    head = (b"II*\0" if order == "<" else b"MM\0*") + (8 + len(data)).to_bytes(4, e)
    table = len(fields).to_bytes(2, e)
    for tag, value in fields:
        table += tag.to_bytes(2, e) + (4).to_bytes(2, e) + (1).to_bytes(4, e) + value.to_bytes(4, e)
    return head + data + table + bytes(4)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_without_compression_in_both_byte_orders(tmp_path, channels, order):
    values = deep(channels)
    (tmp_path / "a.tif").write_bytes(plain_tiff(values, order))
    assert np.array_equal(joined(read(tmp_path / "a.tif")), values)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_end_to_end(tmp_path, tiny_model, channels, suffix):
    values = deep(channels)
    write(tmp_path / f"a.{suffix}", values)
    size = upscale_to_file(
        tmp_path / f"b.{suffix}", read(tmp_path / f"a.{suffix}"), 2, model=tiny_model
    )
    back = joined(read(tmp_path / f"b.{suffix}"))
    real = gsr.upscale(values / 65535, 2, model=tiny_model)
    assert size == (26, 36) and back.dtype == np.uint16
    assert np.abs(back / 65535 - real).max() < 1e-5  # 8 bits are 2e-3 away


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp"])
def test_16_bits_become_8_where_the_format_has_no_more(tmp_path, tiny_model, suffix):
    source = Source(deep(3), white=65535, shown=65535)
    upscale_to_file(tmp_path / f"a.{suffix}", source, 2, model=tiny_model)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        want = gsr.upscale(deep(3) / 65535, 2, model=tiny_model)
        assert np.abs(np.asarray(image) / 255 - want).mean() < 0.05


@pytest.mark.parametrize("kind", [np.uint16, ">u2", torch.uint16])
def test_16_bit_arrays_and_tensors(tiny_model, kind):
    values = deep(3)
    want = gsr.upscale(values / 65535, 2, model=tiny_model) * 65535
    if kind == torch.uint16:
        result = gsr.upscale(torch.from_numpy(values).permute(2, 0, 1), 2, model=tiny_model)
        assert result.dtype == kind
        result = result.permute(1, 2, 0).numpy()
    else:
        result = gsr.upscale(values.astype(kind), 2, model=tiny_model)
        assert result.dtype == np.dtype(kind)
    assert np.abs(result - want).max() < 1
    four = gsr.upscale(deep(4), 2, model=tiny_model)
    assert four.dtype == np.uint16 and len(np.unique(four[..., 3])) > 260


def test_12_bits_in_16(tmp_path, tiny_model):
    """Black to white for the network, as in the file in a TIFF, and over all levels elsewhere."""
    values = deep(1, top=4095)
    write(tmp_path / "a.tif", values)
    source = read(tmp_path / "a.tif")
    assert source.white == 4095
    want = gsr.upscale(values[..., 0] / 4095, 2, model=tiny_model)
    for name, top in (("b.tif", 4095), ("b.png", 65535), ("b.bmp", 255)):
        upscale_to_file(tmp_path / name, source, 2, model=tiny_model)
        with Image.open(tmp_path / name) as image:
            assert np.abs(np.asarray(image) / top - want).max() < 0.6 / top
    assert read(tmp_path / "b.tif").white == 4095


def test_a_tiff_says_its_white(tmp_path):
    write(tmp_path / "a.tif", deep(3, top=16000), white=16383)
    assert read(tmp_path / "a.tif").white == 16383


@pytest.mark.parametrize("top", [1, 1.02, 255])
def test_floats(tmp_path, tiny_model, top):
    """Those above 1 are highlights: kept in a float TIFF, white elsewhere, and never black."""
    values = (deep(1) / 65535 / 0.9 * top).astype(np.float32)[..., 0].clip(0, top)
    values[0, 0] = top
    Image.fromarray(values).save(tmp_path / "a.tif")
    for name in ("b.tif", "b.png", "b.bmp"):
        upscale_to_file(tmp_path / name, read(tmp_path / "a.tif"), 2, model=tiny_model)
    want = gsr.upscale(values / top, 2, model=tiny_model) * top
    with Image.open(tmp_path / "b.tif") as image:
        assert image.mode == "F" and np.abs(np.asarray(image) - want).max() < 1e-5 * top
    white = 255 if top == 255 else 1
    for name, levels in (("b.png", 65535), ("b.bmp", 255)):
        with Image.open(tmp_path / name) as image:
            error = np.asarray(image) / levels - (want / white).clip(0, 1)
        assert np.abs(error).max() < 1 / levels


def test_floats_that_are_refused(tmp_path):
    for values in ([0.5, np.nan], [-1, 1], [0, 300]):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(InputError, match="must hold finite values in"):
            read(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pillow_images_keep_their_depth(tiny_model, mode):
    values = deep(1)[..., 0]
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = Image.fromarray((values / 65535 if mode == "F" else values).astype(kind))
    result = gsr.upscale(image, 2, model=tiny_model)
    want = gsr.upscale(values / 65535, 2, model=tiny_model)
    assert result.mode == mode
    assert np.abs(np.asarray(result) / (1 if mode == "F" else 65535) - want).max() < 1e-5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_turned_upright(tmp_path, orientation, suffix):
    """As Pillow turns 8 bits; the size is known before."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, values in (("a", deep(3)), ("b", (deep(3) >> 8).astype(np.uint8))):
        if suffix == "tif":
            (tmp_path / f"{name}.tif").write_bytes(plain_tiff(values, orientation=orientation))
        else:
            write(tmp_path / f"{name}.png", values, Metadata(exif=exif))
    turned = read(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"b.{suffix}") as image:
        assert upright_size(image) == turned.shape
        assert np.array_equal(turned.colour >> 8, ImageOps.exif_transpose(image))
    assert turned.shape == ((18, 13) if orientation > 4 else (13, 18))
    assert turned.meta.exif is None


def test_one_transparent_colour_of_16_bits(tmp_path):
    values = deep(3)
    write(tmp_path / "a.png", values)
    data = (tmp_path / "a.png").read_bytes()
    colour = values[4, 5].astype(">u2").tobytes()
    import zlib

    chunk = (6).to_bytes(4, "big") + b"tRNS" + colour
    chunk += zlib.crc32(b"tRNS" + colour).to_bytes(4, "big")
    source = read_source(io.BytesIO(data[:33] + chunk + data[33:]))
    assert source.alpha is not None and source.alpha[4, 5] == 0
    assert ((source.alpha == 0) == (values == values[4, 5]).all(-1)).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bigtiff(tmp_path, monkeypatch, kind, channels):
    monkeypatch.setattr("gsr.io.tiff.LARGE", 10)
    monkeypatch.setattr("gsr.io.tiff.ROWS_BYTES", 300)
    if kind == np.float32 and channels > 1:
        pytest.skip("Pillow reads no colours of floats")
    values = (deep(channels) / 65535 if kind == np.float32 else deep(channels) // 257).astype(kind)
    write(tmp_path / "a.tif", values)
    assert (tmp_path / "a.tif").read_bytes()[:4] == b"II+\0"
    assert np.array_equal(joined(read(tmp_path / "a.tif")), values)
