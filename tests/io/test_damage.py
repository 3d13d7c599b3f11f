"""Damaged files of all formats: a result or one clear sentence, never a traceback."""

import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from gsr.errors import InputError
from gsr.io.image import decoding, lossy_compression, open_file
from gsr.io.source import Metadata, read_source, upright_size
from gsr.io.writer import image_writer

FORMATS = ["png", "png16", "jpg", "webp", "tif", "tif16", "bmp", "gif", "avif", "dds", "ico", "ppm"]
MUTATIONS = 40  # of each format


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The bytes of a whole file of each format."""
    y, x, c = np.mgrid[0:24, 0:32, 0:3]
    deep = ((0.5 + 0.4 * np.sin(x / 7 + c) * np.cos(y / 5)) * 65535).astype(np.uint16)
    image = Image.fromarray((deep >> 8).astype(np.uint8))
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    found, path = {}, tmp_path_factory.mktemp("originals")
    for name in FORMATS:
        if name == "avif" and not features.check("avif"):
            continue
        file = path / f"a.{name.removesuffix('16')}"
        if name.endswith("16"):
            meta = Metadata(b"profile", exif, b"<x/>", (300, 300))
            with image_writer(file, (24, 32), 3, np.uint16, meta) as write:
                write(deep)
        elif name in ("jpg", "png", "webp", "avif"):
            image.save(file, exif=exif.tobytes())
        else:
            image.save(file)
        found[name] = file.read_bytes()
    return found


def damaged(data, seed):
    """Cut, with bytes changed, a block repeated or zeros in it."""
    rng = random.Random(seed)
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        kind, place = rng.randrange(5), rng.randrange(len(data))
        if kind == 0:
            del data[place:]
        elif kind == 1:
            data[place : place + 8] = bytes(8)
        elif kind == 2:
            data[place : place + 4] = rng.randbytes(4)
        elif kind == 3:  # headers are where it hurts
            data[rng.randrange(min(len(data), 120))] = rng.randrange(256)
        else:
            data[place:place] = data[place : place + rng.randrange(1, 60)]
        if not data:
            return b"\0"
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's, where the results' tags are read
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(originals, name, tmp_path):
    if name not in originals:
        pytest.skip("this Pillow writes no AVIF")
    refused = 0
    for seed in range(MUTATIONS):
        path = tmp_path / f"{seed}.{name}"
        path.write_bytes(damaged(originals[name], f"{name} {seed}"))
        try:
            with open_file(path) as file, decoding(path, 10**6):
                shape = upright_size(Image.open(file))
                lossy_compression(file)
                source = read_source(file)
            assert source.shape[0] * source.shape[1] <= 10**6 and min(shape) > 0
            for suffix in ("png", "tif", "jpg"):  # what it says besides can be written
                result = tmp_path / f"result.{suffix}"
                with image_writer(result, (9, 8), 3, meta=source.meta) as write:
                    write(np.zeros((9, 8, 3), np.uint8))
                with Image.open(result) as image:
                    image.load()
                    assert image.size == (8, 9)
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > MUTATIONS / 10 or name in ("jpg", "ppm", "bmp")


@pytest.mark.parametrize("name", ["tif", "tif16"])
def test_libtiff_prints_nothing(originals, name, tmp_path):
    """As a process: libtiff writes into the file behind stderr, past Python."""
    data = bytearray(originals[name])
    for seed in range(3):
        (tmp_path / f"{seed}.tif").write_bytes(damaged(data, seed))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (tmp_path / "a.tif").write_bytes(bytes(data))
    argv = ["upscale", str(tmp_path), "-o", str(tmp_path / "out"), "--scale", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "gsr", *argv],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1, 2), done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith(("gsr: ", "  ")) for line in lines), done.stderr


def test_the_harness_sees_what_is_no_image():
    with pytest.raises(InputError, match="not an image"), decoding("a.png"):
        Image.open(io.BytesIO(b"text"))
