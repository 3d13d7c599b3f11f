"""`gsr data prepare`: images that are refused, tiles that are complete, damaged or foreign."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gsr import cli
from gsr.config import DataConfig, load_config
from gsr.data import commands, tiles
from gsr.data.patches import PatchDataset, split_images, steps_per_epoch
from gsr.data.tiles import Tiling, check, prepare, starts, tile_boxes
from gsr.errors import InputError
from gsr.io.image import list_images, read_image, write_image

ROOT = Path(__file__).parents[2]
SMALL = Tiling(crop=24, step=16, min_side=12)
SIZES = ["--crop", "24", "--step", "16", "--min-side", "12", "--workers", "1"]
KEPT = ["a.png", "alpha.png", "grey.png", "sub/a.png", "wide.png"]


@pytest.fixture
def photos(tmp_path):
    """Images of every kind: of use, too small, damaged, duplicate."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)
    sizes = {"a": (60, 50), "sub/a": (24, 24), "wide": (70, 15), "small": (11, 40)}
    for name, size in sizes.items():
        array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{name}.png")
    Image.open(folder / "a.png").save(folder / "copy.bmp")  # same pixels, another file
    Image.open(folder / "a.png").convert("L").save(folder / "grey.png")
    Image.open(folder / "a.png").convert("RGBA").rotate(180).save(folder / "alpha.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:3000])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("ignored")
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "length,expected",
    [(480, [0]), (300, [0]), (481, [0, 1]), (960, [0, 240, 480]), (1000, [0, 240, 480, 520])],
)
def test_starts(length, expected):
    assert starts(length, 480, 240) == expected


def test_tiles_cover_every_pixel_and_nothing_else():
    rng = np.random.default_rng(0)
    for _ in range(20):
        height, width, crop = (int(n) for n in rng.integers(1, 60, 3))
        covered = np.zeros((height, width), int)
        boxes = tile_boxes(Path("x"), height, width, Tiling(crop, int(rng.integers(crop)) + 1, 1))
        for top, left, h, w in boxes.values():
            assert (h, w) == (min(crop, height), min(crop, width))
            assert 0 <= top <= height - h and 0 <= left <= width - w
            covered[top : top + h, left : left + w] += 1
        assert covered.min() >= 1 and len(set(boxes.values())) == len(boxes)


def test_check(photos):
    report = check(photos, SMALL)
    assert list(report["images"]) == KEPT
    assert report["images"]["wide.png"] == {"height": 15, "width": 70}
    assert report["duplicates"] == [{"file": "copy.bmp", "same_as": "a.png"}]
    reasons = {entry["file"]: entry["reason"] for entry in report["refused"]}
    assert list(reasons) == ["cut.png", "small.png", "text.jpg"]
    assert "damaged or truncated" in reasons["cut.png"] and "not an image" in reasons["text.jpg"]
    assert "11 x 40 pixels, below the least side 12" in reasons["small.png"]
    assert report["counts"] == {"found": 9, "kept": 5, "refused": 3, "duplicates": 1}


@pytest.mark.parametrize("format", ["png", "tiff", "bmp"])
def test_prepare(photos, tmp_path, format):
    output = tmp_path / "tiles"
    report = prepare(photos, output, Tiling(24, 16, 12, format))
    expected = {}
    for name in KEPT:
        image = read_image(photos / name)
        boxes = tile_boxes(output / name.removesuffix(".png"), *image.shape[:2], SMALL)
        for path, (top, left, height, width) in boxes.items():
            tile = image[top : top + height, left : left + width]
            expected[path.with_suffix(f".{format}")] = tile
    assert output / f"sub/a_s001.{format}" in expected
    assert list_images(output) == sorted(expected)
    for path, tile in expected.items():
        assert Image.open(path).format == format.upper()
        np.testing.assert_array_equal(read_image(path), tile)
    assert report["tiles"] == {
        "count": len(expected), "written": len(expected), "skipped": 0,
        "bytes": sum(path.stat().st_size for path in expected),
    }  # fmt: skip
    assert json.loads((output / "prepare.json").read_text()) == report


def test_workers_make_the_same(photos, tmp_path):
    one = prepare(photos, tmp_path / "tiles", SMALL)
    before = contents(tmp_path / "tiles")
    shutil.rmtree(tmp_path / "tiles")
    assert prepare(photos, tmp_path / "tiles", SMALL, workers=2) == one
    assert contents(tmp_path / "tiles") == before


def test_an_interrupted_run_resumes(photos, tmp_path, monkeypatch):
    output, calls = tmp_path / "tiles", []

    def failing(path, array):
        calls.append(path)
        if len(calls) == 9:
            raise InputError(f"{path} cannot be written: No space left on device")
        write_image(path, array)

    with monkeypatch.context() as patch:
        patch.setattr("gsr.io.image.write_image", failing)
        with pytest.raises(InputError, match="No space left"):
            prepare(photos, output, SMALL)
    before = {path: path.stat().st_mtime_ns for path in list_images(output)}
    assert len(before) == 8 and not (output / "prepare.json").exists()
    empty, cut, other = damaged = sorted(before)[-3:]
    empty.write_bytes(b"")  # as a disk may leave it
    cut.write_bytes(cut.read_bytes()[:-100])
    shutil.copy(photos / "sub/a.png", other)
    (output / ".a_s009.png.x.gsr-tmp").write_bytes(b"left over")

    report = prepare(photos, output, SMALL)
    assert report["tiles"]["skipped"] == 5 and not list(output.glob(".*"))
    for path, then in before.items():
        assert (path.stat().st_mtime_ns == then) == (path not in damaged)
    again = prepare(photos, output, SMALL)
    assert again["tiles"] == {**report["tiles"], "written": 0, "skipped": report["tiles"]["count"]}
    prepare(photos, tmp_path / "anew", SMALL)
    for path in list_images(output):
        anew = tmp_path / "anew" / path.relative_to(output)
        assert path.read_bytes() == anew.read_bytes()


def test_new_images_are_added(photos, tmp_path):
    prepare(photos, tmp_path / "tiles", SMALL)
    same_bytes = read_image(photos / "wide.png").reshape(70, 15, 3)
    write_image(photos / "new.png", same_bytes)
    report = prepare(photos, tmp_path / "tiles", SMALL)
    assert "new.png" in report["images"] and report["tiles"]["written"] == 4


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_two_at_once(photos, tmp_path, monkeypatch):
    """The second would remove the file that the first is about to give its name."""
    output, replace, met = tmp_path / "tiles", os.replace, []

    def with_another(temporary, path):
        if not met:
            met.append(path)
            with pytest.raises(InputError, match="another gsr data prepare is .*tiles; wait"):
                prepare(photos, output, SMALL)
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", with_another)
    prepare(photos, output, SMALL)
    assert met and not list(output.rglob(".*"))


@pytest.mark.parametrize("other", ["settings", "source", "output"])
def test_output_with_other_images(photos, tmp_path, other):
    output, tiling = tmp_path / "tiles", SMALL
    prepare(photos, output, SMALL)
    if other == "settings":
        tiling = Tiling(24, 24, 12)
    elif other == "source":
        (photos / "wide.png").unlink()
    else:
        write_image(output / "sub/other.png", np.zeros((30, 30, 3), np.uint8))
    before = contents(output)
    with pytest.raises(InputError, match="tiles holds .*, which is no tile of this source with"):
        prepare(photos, output, tiling)
    assert contents(output) == before


def test_refusals(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, output, tiling, text in (
        ("none", "new/tiles", SMALL, "no such folder"),
        ("empty", "new/tiles", SMALL, "holds no image"),
        ("photos", "new/tiles", Tiling(), "no image that can be used: .*a.png is 60 x 50"),
        ("photos", "photos/tiles", SMALL, "must not lie in one another"),
        ("photos", "", SMALL, "must not lie in one another"),
        ("photos", "photos", SMALL, "must not lie in one another"),
    ):
        with pytest.raises(InputError, match=text):
            prepare(tmp_path / source, tmp_path / output, tiling)
    shutil.copy(photos / "wide.png", photos / "wide.bmp")  # a duplicate claims no name
    prepare(photos, tmp_path / "tiles", SMALL)
    Image.open(photos / "wide.png").rotate(180).save(photos / "alpha.bmp")
    with pytest.raises(InputError, match="alpha.bmp and alpha.png have the same name"):
        prepare(photos, tmp_path / "new", SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "photos", "tiles"]
    for bad in ({"step": 500}, {"step": 0}, {"crop": 0}, {"min_side": 0}, {"format": "jpg"}):
        with pytest.raises(InputError):
            Tiling(**bad)
    with pytest.raises(InputError, match="--workers"):
        check(photos, workers=0)


def test_a_worker_that_is_killed():
    with pytest.raises(InputError, match="fewer --workers"):
        list(tiles._map(os._exit, [(9,)] * 2, workers=2, progress=False, label=""))


def test_tiles_are_trained_on(photos, tmp_path):
    prepare(photos, tmp_path / "tiles", Tiling(24, 16, 24))
    config = DataConfig(train=str(tmp_path / "tiles"), patch=6, val_count=2)
    train, val = split_images(config)
    assert len(val) == 2 and len(PatchDataset(train, config)) == len(train) > 20


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "prepare", *map(str, argv), *SIZES])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    return out, err.splitlines()[-1]


def test_command(photos, tmp_path, capsys):
    report = tmp_path / "new" / "report.json"
    cli.main(["data", "prepare", str(photos), str(tmp_path / "tiles"), *SIZES])
    out, _ = capsys.readouterr()
    assert "9 images, 5 of use, 3 refused" in out and "duplicate: copy.bmp is a.png" in out
    assert "tiles (" in out and "written, 0 were there" in out
    out, error = refused(capsys, photos, "--check", "--report", report)
    assert "3 of the 9 images" in error and "5 of use" in out
    assert json.loads(report.read_text())["counts"]["kept"] == 5
    assert "OUTPUT is missing" in refused(capsys, photos)[1]
    for name in ("a.png", "report.txt", ""):  # which the report would replace
        text = f"--report {photos / name} must be a .json file"
        assert text in refused(capsys, photos, "--check", "--report", photos / name)[1]
    for name in ("cut.png", "small.png", "text.jpg"):
        (photos / name).unlink()
    cli.main(["data", "prepare", str(photos), "--check", "-q", *SIZES])
    assert capsys.readouterr() == ("", "")


def test_help(capsys):
    for argv, words in (
        (["data", "--help"], ["gsr data download benchmark", "gsr data prepare", "data.train="]),
        (["data", "download", "--help"], ["--url", "--only", "academic research"]),
        (["data", "prepare", "--help"], ["--crop", "--check", "data.val"]),
        (["--help"], ["gsr data --help"]),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        out = capsys.readouterr().out
        assert caught.value.code == 0 and all(word in out for word in words), out


def test_the_recipe_for_tiles():
    """What the help and the documentation say of 32,000 tiles are the published steps."""
    overrides = ["data.repeat=1", "train.epochs=1000", "train.step_epochs=100"]
    for text in (commands.EPILOG, (ROOT / "docs" / "research.md").read_text(encoding="utf-8")):
        assert all(f" {override}" in text for override in overrides)

    def recipe(images, overrides):
        c = load_config(ROOT / "configs" / "published.yaml", overrides)
        steps = steps_per_epoch([c.data.repeat] * images, c.data)
        return steps * c.train.epochs, steps * c.train.step_epochs

    assert recipe(800, []) == recipe(32_000, overrides) == (2_000_000, 200_000)
    assert recipe(32_000, [])[0] == 40 * 2_000_000
