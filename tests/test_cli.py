"""The command line: results as the library's, refusals in one sentence with exit code 2."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gsr
from gsr import cli
from gsr.errors import InputError
from gsr.inference import upscale as infer
from gsr.io.image import read_image, write_image
from gsr.models.checkpoint import save_model

ROOT = Path(__file__).parent.parent
WIDE = ["--fit", "stretch", "--size"]


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_model, image):
    """A folder to work in, with photo.png and a model folder."""
    monkeypatch.chdir(tmp_path)
    write_image("photo.png", image)
    save_model("model", tiny_model)
    return tmp_path


def upscale(*argv, model="model"):
    cli.main(["upscale", "photo.png", "--model", model, *argv])


def refused(capsys, *argv, **kwargs):
    with pytest.raises(SystemExit) as caught:
        upscale(*argv, **kwargs)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and out == ""
    return err


def test_scale(here, tiny_model, image, capsys):
    upscale("-o", "out.png", "--scale", "3.7")
    expected = gsr.upscale(image, 3.7, model=tiny_model)
    np.testing.assert_array_equal(read_image("out.png"), expected)
    out, err = capsys.readouterr()
    assert out.startswith("out.png: 63 x 44 in ") and err == ""


def test_two_scales_and_size_are_width_first(here):
    upscale("-o", "out.png", "--scale", "2x3.5")
    assert Image.open("out.png").size == (34, 42)
    upscale("-o", "out.png", "--size", "20x50", "--fit", "stretch", "--quiet", "--overwrite")
    assert Image.open("out.png").size == (20, 50)


def test_quiet(here, capsys):
    upscale("-o", "out.png", "--scale", "2", "-q", "--threads", "1", "--device", "cpu")
    assert capsys.readouterr() == ("", "")


def test_compare(here, image):
    upscale("-o", "out.png", "--scale", "4", "--compare", "both.png")
    both, large = read_image("both.png"), read_image("out.png")
    height, width = large.shape[:2]
    bicubic = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(both[-height:, -width:], large)
    np.testing.assert_array_equal(both[-height:, :width], bicubic)
    # A label above each half, and the halves do not touch.
    band = both[:-height]
    assert band[:, :width].min() < 128 and band[:, -width:].min() < 128
    assert (both[:, width : both.shape[1] - width] == 255).all() and both.shape[1] > 2 * width


def test_transparency_survives(here, image):
    Image.fromarray(np.dstack([image, image[..., 0]])).save("photo.png")
    upscale("-o", "out.png", "--scale", "2", "--compare", "both.jpg")
    assert Image.open("out.png").mode == "RGBA" and Image.open("both.jpg").mode == "RGB"


def test_several_images_into_a_folder(here, image, capsys):
    write_image("second.jpg", image)
    Image.fromarray(image).save("third.gif")
    argv = ["upscale", "photo.png", "second.jpg", "third.gif", "--model", "model"]
    cli.main([*argv, "-o", "large", "--scale", "2"])
    assert sorted(os.listdir("large")) == ["photo.png", "second.jpg", "third.png"]
    assert {Image.open(Path("large", name)).size for name in os.listdir("large")} == {(34, 24)}
    upscale("-o", "folder/", "--scale", "2")
    assert os.listdir("folder") == ["photo.png"]
    capsys.readouterr()
    for more, sentence in [
        (["-o", "out.png/x", "--compare", "c.png"], "--compare takes one IMAGE"),
        (["-o", "."], "would overwrite the input"),
    ]:
        with pytest.raises(SystemExit):
            cli.main([*argv, "--scale", "2", *more])
        assert sentence in capsys.readouterr().err
    os.mkdir("sub")
    write_image("sub/photo.png", image)
    with pytest.raises(SystemExit):
        cli.main(["upscale", "photo.png", "sub/photo.png", "-o", "large", "--scale", "2"])
    assert "two images would be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["-o", "out.png", "--scale", "0.5"], "photo.png: scale 0.5 is below 1"),
        (["-o", "out.png", "--scale", "nan"], "at most 1,000,000, not nan"),
        (["-o", "out.png", "--size", "16x50"], "is below the image's 17 x 12"),
        (["-o", "out.png", "--scale", "9999"], "--max-pixels"),
        (["-o", "out.png", "--scale", "2", "--max-pixels", "815"], "= 816 pixels"),
        (["-o", "out.jp2", "--scale", "2"], "out.jp2: the suffix '.jp2' is none of .png"),
        (["-o", "none/out.png", "--scale", "2"], "there is no folder none"),
        (["-o", "photo.png", "--scale", "2"], "photo.png would overwrite the input"),
        (["-o", "a.png", "--scale", "2", "--compare", "photo.png"], "would overwrite the input"),
        (["-o", "a.png", "--scale", "2", "--compare", "./a.png"], "both name a.png"),
        (["-o", "a.png", "--scale", "2", "--compare", "x/a.png"], "there is no folder x"),
        (["-o", "out.png", "--scale", "2", "--threads", "0"], "--threads must be from 1 to 1024"),
        (["-o", "out.png", "--scale", "2", "--threads", "1025"], "not 1025"),
        (["-o", "out.png", "--scale", "2", "--device", "abacus"], "abacus"),
        (["-o", "out.png", "--scale", "2", "--device", "meta"], "device meta is none of auto, cpu"),
        (["-o", "out.png", "--scale", "2", "--max-pixels", "0"], "--max-pixels must be at least 1"),
        (["-o", "out.png", "--scale", "1e308"], "photo.png: scale must be positive and at most"),
        (["-o", "out.png", "--scale", "1e6"], "photo.png: the result would have"),
        (["-o", "x" * 300 + ".png", "--scale", "2"], "cannot be used (File name too long)"),
        (["-o", "x" * 300 + "/", "--scale", "2"], "cannot be used (File name too long)"),
        (["-o", "a.png", "--scale", "2", "--compare", "x" * 300 + ".png"], "File name too long"),
        (
            [*WIDE, "16384x12", "-o", "out.webp"],
            "out.webp: WEBP takes at most 16383 pixels",
        ),
        (
            [*WIDE, "16384x12", "-o", "new/", "--compare", "c.webp"],
            "c.webp: WEBP takes at most",
        ),
        (
            [*WIDE, "40000x12", "-o", "a.png", "--compare", "c.jpg"],
            "c.jpg: JPEG takes at most",
        ),
    ],
)
def test_refusals(here, capsys, argv, sentence):
    err = refused(capsys, *argv)
    assert err.startswith("gsr: error: ") and err.count("\n") == 1 and sentence in err
    assert sorted(os.listdir()) == ["model", "photo.png"]


def test_refusals_of_image_and_model(here, capsys):
    argv = ["-o", "out.png", "--scale", "2"]
    assert "none: there is no such model" in refused(capsys, *argv, model="none")
    Path("photo.png").write_bytes(Path("photo.png").read_bytes()[:100])
    assert "photo.png is a damaged or truncated image" in refused(capsys, *argv)
    Path("photo.png").unlink()
    assert "photo.png: there is no such file" in refused(capsys, *argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["-o", "out.png"],
        ["--scale", "2"],
        ["-o", "out.png", "--scale", "2", "--size", "40x40"],
        ["-o", "out.png", "--scale", "2x3x4"],
        ["-o", "out.png", "--scale", "big"],
        ["-o", "out.png", "--size", "40"],
        ["-o", "out.png", "--size", "4.5x4"],
    ],
)
def test_wrong_options(here, capsys, argv):
    err = refused(capsys, *argv)
    assert "gsr upscale: error: " in err and "usage:" in err


def test_everything_is_checked_before_the_work(here, capsys, monkeypatch):
    monkeypatch.setattr(infer, "upscale", lambda *_: pytest.fail("computed first"))
    monkeypatch.setattr("gsr.models.checkpoint.load", lambda *_: pytest.fail("loaded first"))
    refused(capsys, "-o", "none/out.png", "--scale", "2")
    refused(capsys, "-o", "out.png", "--scale", "2", "--compare", "none/c.png")
    refused(capsys, "-o", "out.png", "--scale", "0.5")
    refused(capsys, "-o", "out.png", "--scale", "2", "--max-pixels", "815")
    refused(capsys, "-o", "out.jpg", "--fit", "stretch", "--size", "65501x12")
    with pytest.raises(SystemExit):
        cli.main(["upscale", "photo.png", "missing.png", "-o", "folder", "--scale", "2"])
    assert "missing.png: there is no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["upscale", "photo.png", "x" * 300, "-o", "folder", "--scale", "2"])
    assert "cannot be used (File name too long)" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["model", "photo.png"]  # not even the folder is made


def test_folder_without_permission(here, capsys, monkeypatch):
    def refuse(dir):  # by mode bits, root would still pass
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert "may not be written to" in refused(capsys, "-o", "a.png", "--scale", "2")


def test_guard(capsys):
    def raising(error):
        def main(argv):
            assert argv == ["x"]
            raise error

        return main

    converted = ImportError("numpy makes this of it")
    converted.__cause__ = KeyboardInterrupt()
    for error, code, text in [
        (InputError("fix it."), 2, "gsr: error: fix it.\n"),
        (KeyboardInterrupt(), 130, "gsr: interrupted\n"),
        (converted, 130, "gsr: interrupted\n"),
        (SystemExit(5), 5, ""),
    ]:
        with pytest.raises(SystemExit) as caught:
            cli.guard(raising(error), ["x"])
        assert caught.value.code == code and capsys.readouterr() == ("", text)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        cli.guard(lambda argv: 1 / 0)
    assert cli.guard(lambda argv: None) is None


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_names_that_are_no_utf8(here):
    """As a process: in this one, stdout is pytest's."""
    name = os.fsdecode(b"B\xe4ume.png")
    os.rename("photo.png", name)
    argv = ["upscale", name, "-o", "out/", "--scale", "2", "--model", "model"]
    done = subprocess.run(
        [sys.executable, "-m", "gsr", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert b"B\\udce4ume" in done.stdout and os.listdir(b"out") == [b"B\xe4ume.png"]


@pytest.mark.parametrize("name", ["train", "evaluate", "compare"])
def test_scripts_of_the_checkout_are_no_commands(capsys, name):
    with pytest.raises(SystemExit) as caught:
        cli.main([name])
    assert caught.value.code == 2 and "invalid choice" in capsys.readouterr().err


def test_version_and_help(capsys):
    for argv, text in [
        (["--version"], f"gsr {gsr.__version__}"),
        (["--help"], "upscale"),
        (["upscale", "--help"], "2 times as wide and 3.5 times"),
        (["data", "--help"], "usage: gsr data "),
        (["data", "prepare", "--help"], "usage: gsr data prepare "),
        (["inspect", "--help"], "usage: gsr inspect "),
    ]:
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 0 and text in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2


def test_as_a_process(here):
    command = [sys.executable, "-m", "gsr", "upscale", "photo.png", "--model", "model"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-o", "out.png", "--scale", "0.5"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("gsr: error: photo.png: scale 0.5")
        and len(done.stderr.splitlines()) == 1
    )


@pytest.mark.parametrize(
    "text, number",
    [("2GB", 2 * 10**9), ("1.5 gib", 3 * 2**29), ("800m", 8 * 10**8), ("1234", 1234)],
)
def test_amounts_of_memory(text, number):
    from gsr.cli import _bytes

    assert _bytes(text) == number


@pytest.mark.parametrize("text", ["", "lots", "2XB", "-1GB", "1e9"])
def test_what_is_no_amount_of_memory(text):
    import argparse

    from gsr.cli import _bytes

    with pytest.raises(argparse.ArgumentTypeError, match="not an amount of memory such as 2GB"):
        _bytes(text)


def test_the_model_fits_the_file(here, capsys, monkeypatch, tiny_model):
    """gsr-photo for lossy files, gsr-lite for others, each loaded once; --model decides instead."""
    loaded = []
    monkeypatch.setattr(
        "gsr.models.checkpoint.load", lambda name: (loaded.append(name), tiny_model)[1]
    )
    image = Image.open("photo.png")
    image.save("b.jpg")
    image.save("c.jpg")
    cli.dispatch(["upscale", "photo.png", "b.jpg", "c.jpg", "-o", "out/", "--scale", "2"])
    assert loaded == ["lite", "photo"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("by gsr-lite (no lossy compression)")
    assert all(line.endswith("by gsr-photo (JPEG)") for line in lines[1:3])
    assert lines[3:] == ["3 of 3 images upscaled"]
    for choice in ("lite", "photo"):
        loaded.clear()
        cli.dispatch(["upscale", "b.jpg", "-o", f"{choice}/", "--scale", "2", "--model", choice])
        assert loaded == [choice] and "by gsr" not in capsys.readouterr().out
