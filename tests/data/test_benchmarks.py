"""Data folders to measure on: layouts, pairs of LR and HR, and what is refused before the work."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gsr.data import benchmarks
from gsr.data.benchmarks import check_sizes, check_spared, open_set, open_sets, read_pair
from gsr.errors import InputError
from gsr.io.image import read_image, write_image
from gsr.ops.resize import imresize

DATA = Path(__file__).parent / "eval"
NAMES = ["otter", "skyline", "spices"]


def noise(path, size, seed=0):
    """Write an image of (H, W) in which every pixel is random."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    write_image(path, generator.integers(0, 256, (*size, 3), dtype=np.uint8))


# ---- layouts ------------------------------------------------------------------------------------


def test_open_set_finds_pairs():
    data = open_set(DATA, [2, 3])
    assert data.name == "eval" and [image.name for image in data.images] == NAMES
    assert [list(image.lr) for image in data.images] == [[2]] * 3
    assert data.images[2].lr[2] == DATA / "LR_bicubic/X2/spicesx2.png"
    assert [image.name for image in open_set(DATA, [2], limit=2).images] == NAMES[:2]


def test_open_set_knows_the_other_layouts(tmp_path):
    shutil.copytree(DATA / "HR", tmp_path / "tiny_HR")
    shutil.copytree(DATA / "LR_bicubic", tmp_path / "tiny_LR_bicubic")
    div2k = open_set(tmp_path / "tiny_HR", [2])
    assert div2k.name == "tiny"
    assert div2k.images[0].lr[2] == tmp_path / "tiny_LR_bicubic/X2/otterx2.png"

    shutil.copytree(DATA / "HR", tmp_path / "plain")
    assert [image.lr for image in open_set(tmp_path / "plain", [2]).images] == [{}] * 3
    shutil.copytree(DATA / "LR_bicubic", tmp_path / "plain/LR_bicubic")
    beside = open_set(tmp_path / "plain", [2])
    assert [image.name for image in beside.images] == NAMES
    assert beside.images[0].lr[2].name == "otterx2.png"


def test_open_set_refuses(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_set(tmp_path / "nowhere", [2])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        open_set(tmp_path / "empty", [2])
    with pytest.raises(InputError, match="limit"):
        open_set(DATA, [2], limit=0)
    for scale in (0, -2, 0.5, math.nan, math.inf, 1e300):
        with pytest.raises(InputError, match="from 1 to 1000"):
            open_set(DATA, [2, scale])
    with pytest.raises(InputError, match="at least one"):
        open_set(DATA, [])
    with pytest.raises(InputError, match="two data folders .--eval. are called eval"):
        open_sets([DATA, DATA], [2], option="eval")

    copy = tmp_path / "copy"
    shutil.copytree(DATA, copy)
    shutil.copy(copy / "HR/otter.png", copy / "HR/otter.bmp")
    with pytest.raises(InputError, match="same name"):
        open_set(copy, [2])
    (copy / "HR/otter.bmp").unlink()
    (copy / "LR_bicubic/X2/skylinex2.png").unlink()
    with pytest.raises(InputError, match="lacks 1 of the 3 LR images, first skylinex2.png"):
        open_set(copy, [2])
    # Misspelt, LR would be made from HR without a word.
    os.rename(copy / "LR_bicubic/X2", copy / "LR_bicubic/two")
    for layout in (copy, tmp_path / "other_HR"):
        with pytest.raises(InputError, match="LR_bicubic holds no folder .* spelt X2, X3"):
            open_set(layout, [2])
        if layout == copy:
            shutil.move(copy / "HR", tmp_path / "other_HR")
            shutil.move(copy / "LR_bicubic", tmp_path / "other_LR_bicubic")


def test_check_spared(tmp_path):
    """A file that becomes an image of the set, or is one, by whatever path."""
    shutil.copytree(DATA, tmp_path / "set")
    shutil.move(tmp_path / "set/HR/otter.png", tmp_path / "otter.png")
    os.symlink(tmp_path / "otter.png", tmp_path / "set/HR/otter.png")
    sets = [open_set(tmp_path / "set", [2])]
    for path in ("otter.png", "set/HR/new/a.PNG", "x/../set/LR_bicubic/X2/skylinex2.png"):
        with pytest.raises(InputError, match="--csv would write .* among the images of set"):
            check_spared("csv", tmp_path / path, sets)
    for path in ("new.png", "set/evaluation.json", "set/HR/evaluation.json"):
        check_spared("csv", tmp_path / path, sets)


# ---- pairs --------------------------------------------------------------------------------------


def test_read_pair_takes_the_file_and_crops_hr(tmp_path):
    shutil.copytree(DATA, tmp_path / "copy")
    changed = 255 - read_image(DATA / "LR_bicubic/X2/spicesx2.png")
    write_image(tmp_path / "copy/LR_bicubic/X2/spicesx2.png", changed)
    lr, hr = read_pair(open_set(tmp_path / "copy", [2]).images[2], 2)
    assert lr.shape == (26, 33, 3) and np.array_equal(lr, changed)
    assert np.array_equal(hr, read_image(DATA / "HR/spices.png")[:52, :66])


@pytest.mark.parametrize(
    "scale, lr_size, hr_size",
    [(3, (17, 22), (51, 66)), (3.7, (14, 18), (52, 67)), (1.1, (48, 60), (53, 66))],
)
def test_read_pair_makes_lr(scale, lr_size, hr_size):
    lr, hr = read_pair(open_set(DATA, [scale]).images[2], scale)
    assert lr.shape[:2] == lr_size and hr.shape[:2] == hr_size
    assert np.array_equal(hr, read_image(DATA / "HR/spices.png")[: hr_size[0], : hr_size[1]])
    assert np.array_equal(lr, imresize(hr, size=lr_size))


def test_read_pair_refuses(tmp_path):
    shutil.copytree(DATA, tmp_path / "copy")
    otter = tmp_path / "copy/LR_bicubic/X2/otterx2.png"
    for size in ((27, 33), (26, 32)):  # one row too many, one column too few
        write_image(otter, np.zeros((*size, 3), np.uint8))
        with pytest.raises(InputError, match="rounded down") as error:
            read_pair(open_set(tmp_path / "copy", [2]).images[0], 2)
        assert str(otter) in str(error.value)
    with pytest.raises(InputError, match="too few"):
        read_pair(open_set(DATA, [60]).images[0], 60)
    (tmp_path / "copy/HR/otter.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="otter.png"):
        read_pair(open_set(tmp_path / "copy", [3]).images[0], 3)


# ---- sizes --------------------------------------------------------------------------------------


def test_an_image_that_is_too_small_is_found_by_its_header(tmp_path, monkeypatch):
    noise(tmp_path / "set/a.png", (97, 105))
    noise(tmp_path / "set/b.png", (60, 80))  # x30: LR 2 x 2, HR 60 x 60, nothing is left
    monkeypatch.setattr(benchmarks, "read_image", lambda *_: pytest.fail("decoded an image"))
    data = open_set(tmp_path / "set", [2, 30])
    with pytest.raises(InputError, match="b.png at x30: an image of 60 x 60 .* shaving 30"):
        check_sizes(data, [2, 30], "benchmark")
    (tmp_path / "set/a.png").unlink()
    with pytest.raises(InputError, match="b.png has 80 x 60 pixels, too few for scale 70"):
        check_sizes(open_set(tmp_path / "set", [70]), [70], "benchmark")


@pytest.mark.parametrize("scale, size", [(2, (27, 33)), (2, (26, 32)), (2.5, (21, 27))])
def test_lr_that_does_not_fit_is_found(tmp_path, scale, size):
    shutil.copytree(DATA / "HR", tmp_path / "HR")
    x = tmp_path / "LR_bicubic" / f"X{scale}"
    for name in NAMES:
        hr = read_image(DATA / f"HR/{name}.png")
        noise(x / f"{name}x{scale}.png", [int(n // scale) for n in hr.shape[:2]])
    data = open_set(tmp_path, [scale])
    check_sizes(data, [scale], "benchmark")
    noise(x / f"spicesx{scale}.png", size)
    with pytest.raises(InputError, match=f"spicesx{scale}.png has .* rounded down"):
        check_sizes(data, [scale], "benchmark")
    for path in (x / f"skylinex{scale}.png", tmp_path / "HR/skyline.png"):
        path.write_bytes(b"no image")
        with pytest.raises(InputError, match=f"{path.name} is not an image"):
            check_sizes(data, [scale], "benchmark")


def test_sizes_are_those_of_images_turned_upright(tmp_path):
    """A camera that was held upright writes lines that run down."""
    lying = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "HR").mkdir()
    Image.fromarray(lying).save(tmp_path / "HR/a.png", exif=exif)
    noise(tmp_path / "LR_bicubic/X2/ax2.png", (30, 20))
    check_sizes(open_set(tmp_path, [2]), [2], "benchmark")
    noise(tmp_path / "LR_bicubic/X2/ax2.png", (30, 21))
    with pytest.raises(InputError, match="rounded down"):
        check_sizes(open_set(tmp_path, [2]), [2], "benchmark")


@pytest.mark.parametrize(
    "size, protocol, least, fits",
    [
        ((15, 40), "benchmark", 11, False),  # 14 - 2 * 2
        ((40, 16), "benchmark", 11, True),
        ((40, 16), "benchmark", 16, False),
        ((40, 16), "div2k", 11, False),
        ((28, 40), "div2k", 11, True),  # 28 - 2 * 8
    ],
)
def test_how_small_an_image_may_be(tmp_path, size, protocol, least, fits):
    noise(tmp_path / "set/a.png", size)
    data = open_set(tmp_path / "set", [2])
    if fits:
        check_sizes(data, [2], protocol, least=least)
        return
    with pytest.raises(InputError, match=f"{least} x {least}"):
        check_sizes(data, [2], protocol, least=least)
