"""PNG files written by rows: Pillow reads back what went in, and no half of one is ever there."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from gsr.errors import InputError
from gsr.io.png import COLOURS, _paeth
from gsr.io.source import Metadata
from gsr.io.writer import image_writer

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def pixels(h, w, channels, seed=0):
    """Noise above, a smooth half below: rows that want different filters."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (h, w, channels))
    y, x, c = np.ogrid[:h, :w, :channels]
    smooth = 128 + 60 * np.sin(x / 9 + c) + 60 * np.cos(y / 7)
    return np.where(np.arange(h)[:, None, None] < h // 3, noise, smooth).astype(np.uint8)


@pytest.mark.parametrize("channels", COLOURS)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (37, 53), (64, 300)])
@pytest.mark.parametrize("step", [1, 10, 1000])
def test_pillow_reads_the_same_pixels(tmp_path, channels, size, step):
    array = pixels(*size, channels)
    with image_writer(tmp_path / "a.png", size, channels) as write:
        for row in range(0, size[0], step):
            write(array[row : row + step])
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.mode == MODES[channels]
        assert np.array_equal(np.asarray(image).reshape(array.shape), array)


def test_smooth_images_are_packed_as_pillow_packs_them(tmp_path):
    array = pixels(300, 400, 3)[100:]
    with image_writer(tmp_path / "a.png", (200, 400), 3) as write:
        write(array)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    assert (tmp_path / "a.png").stat().st_size < 1.1 * len(buffer.getvalue())


def test_profile_is_kept(tmp_path):
    with image_writer(tmp_path / "a.png", (1, 2), 3, meta=Metadata(b"a profile")) as write:
        write(np.zeros((1, 2, 3), np.uint8))
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["icc_profile"] == b"a profile"


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), image_writer(path, (2, 2), 3) as write:
        write(np.zeros((1, 2, 3), np.uint8))
        raise RuntimeError
    with pytest.raises(ValueError, match="1 of 2 rows"), image_writer(path, (2, 2), 3) as write:
        write(np.zeros((1, 2, 3), np.uint8))
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(data, value=0):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gsr.io.png.zlib.crc32", full)  # as the write beside it would
    with pytest.raises(InputError, match=r"a.png cannot be written: No space left"):
        with image_writer(tmp_path / "a.png", (2, 2), 3) as write:
            write(np.zeros((2, 2, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_paeth_breaks_ties_as_the_specification_says():
    """Section 9.4: left before above before above left."""

    def one(a, b, c):
        p = a + b - c
        return min((a, b, c), key=lambda x: abs(p - x))  # the first of equals

    values = [0, 1, 2, 3, 7, 128, 253, 255]
    near = np.array(list(itertools.product(values, repeat=3)), np.int16).T
    want = [one(*(int(x) for x in column)) for column in near.T]
    assert _paeth(*near).tolist() == want
