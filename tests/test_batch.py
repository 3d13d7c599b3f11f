"""`gsr upscale` as people use it: folders, sizes, pipes, files that are bad or there already."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gsr
import gsr.batch
from gsr import cli
from gsr.io.image import TEMPORARY, read_image, write_image
from gsr.models.checkpoint import save_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_model, image):
    """A folder to work in: photo.png of 17 x 12, a model, and in/ with images in subfolders."""
    monkeypatch.chdir(tmp_path)
    save_model("model", tiny_model)
    write_image("photo.png", image)
    for name in ("in/a.png", "in/sub/b.jpg", "in/sub/deep/c.tif"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_image(name, image)
    return tmp_path


def upscale(*argv):
    """Run the command; returns its exit code."""
    try:
        cli.main(["upscale", "--model", "model", *argv])
    except SystemExit as error:
        return error.code
    return 0


def files(folder):
    found = Path(folder).rglob("*")
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def size(path):
    with Image.open(path) as image:
        return image.size


# ---- folders ------------------------------------------------------------------------------------


def test_a_folder_with_its_subfolders(here, capsys):
    assert upscale("in", "-o", "out", "--scale", "2") == 0
    assert files("out") == ["a.png", "sub/b.jpg", "sub/deep/c.tif"]
    assert all(size(Path("out", name)) == (34, 24) for name in files("out"))
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "3 of 3 images upscaled" and len(out) == 4
    assert upscale("in/", "photo.png", "-o", "out/", "--scale", "2", "--overwrite", "-q") == 0
    assert files("out") == ["a.png", "photo.png", "sub/b.jpg", "sub/deep/c.tif"]
    assert capsys.readouterr() == ("", "")


def test_results_within_the_folder_are_no_sources(here):
    for _ in range(2):
        assert upscale("in", "-o", "in/large", "--scale", "2", "--overwrite") == 0
    assert files("in/large") == ["a.png", "sub/b.jpg", "sub/deep/c.tif"]


def test_one_bad_file_stops_no_other(here, capsys):
    Path("in/a.png").write_bytes(Path("in/a.png").read_bytes()[:80])
    Path("in/empty.jpg").touch()
    assert upscale("in", "-o", "out", "--scale", "2") == 1
    assert files("out") == ["sub/b.jpg", "sub/deep/c.tif"]
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "2 of 4 images upscaled" and "Traceback" not in err
    lines = err.splitlines()
    # What headers say comes first.
    assert lines[0].startswith("gsr: error: in/empty.jpg is empty")
    assert lines[1].startswith("gsr: error: in/a.png is a damaged or truncated image")
    assert lines[2] == "gsr: 2 of 4 images failed:"
    assert lines[3].startswith("  in/empty.jpg is empty") and lines[4].startswith("  in/a.png")


def test_a_model_that_is_missing_is_said_once(here, capsys):
    assert upscale("in", "-o", "out", "--scale", "2", "--model", "none") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not Path("out").exists()


def test_skip_existing(here, capsys):
    assert upscale("in/a.png", "-o", "out/", "--scale", "2") == 0
    before = Path("out/a.png").stat().st_mtime_ns
    assert upscale("in", "-o", "out", "--scale", "2", "--skip-existing") == 0
    assert Path("out/a.png").stat().st_mtime_ns == before and len(files("out")) == 3
    assert "2 of 2 images upscaled, 1 there already" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--no-clobber"]])
def test_nothing_is_overwritten_unasked(here, capsys, more):
    Path("out.png").write_bytes(b"mine")
    Path("out").mkdir()
    Path("out/a.png").write_bytes(b"mine")
    for sources, output in ((["photo.png"], "out.png"), (["in"], "out")):
        assert upscale(*sources, "-o", output, "--scale", "2", *more) == 2
        assert "exists; give --overwrite to replace it" in capsys.readouterr().err
    assert upscale("photo.png", "-o", "b.png", "--scale", "2", "--compare", "out.png", *more) == 2
    assert Path("out.png").read_bytes() == b"mine" and files("out") == ["a.png"]
    assert not more or upscale("photo.png", "-o", "out.png", "--scale", "2", "--overwrite") == 0


def test_dry_run(here, capsys):
    assert upscale("in", "-o", "out", "--long-edge", "34", "--format", "webp", "--dry-run") == 0
    assert not Path("out").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"in/a.png -> {Path('out/a.webp')}: 34 x 24"
    assert lines[-1] == "3 of 3 images would be upscaled"


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--size", "200x150"], (200, 141)),
        (["--size", "100x150"], (100, 71)),
        (["--size", "200x50"], (71, 50)),
        (["--size", "200x150", "--fit", "cover"], (200, 150)),
        (["--size", "100x150", "--fit", "cover"], (100, 150)),
        (["--size", "200x150", "--fit", "stretch"], (200, 150)),
        (["--size", "68x"], (68, 48)),
        (["--size", "x48"], (68, 48)),
        (["--long-edge", "170"], (170, 120)),
        (["--megapixels", "0.02"], (168, 119)),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_sizes_keep_proportions(here, image, argv, expected, turned):
    """The other way round for a portrait; also where it is one by its EXIF orientation only."""
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    Image.fromarray(np.rot90(image) if turned else image).save("photo.png", exif=exif)
    assert upscale("photo.png", "-o", "out.png", *argv) == 0
    assert size("out.png") == expected


def test_cover_cuts_from_the_middle(here, image, tiny_model):
    assert upscale("photo.png", "-o", "out.png", "--size", "34x30", "--fit", "cover") == 0
    whole = gsr.upscale(image, size=(30, 42), model=tiny_model)
    assert np.array_equal(read_image("out.png"), whole[:, 4:38])
    assert upscale("photo.png", "-o", "b.png", "--size", "34x20", "--fit", "cover") == 0
    whole = gsr.upscale(image, size=(24, 34), model=tiny_model)
    assert np.array_equal(read_image("b.png"), whole[2:22])


@pytest.mark.parametrize("text", ["x", "0x10", "-5x", "1920", "4.5x4", "1x2x3"])
def test_what_is_no_size(here, capsys, text):
    assert upscale("photo.png", "-o", "out.png", f"--size={text}") == 2
    assert "--size" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--long-edge", "--megapixels"])
@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "many"])
def test_what_is_no_length(here, capsys, option, text):
    assert upscale("photo.png", "-o", "out.png", f"{option}={text}") == 2
    assert "is not a number above 0" in capsys.readouterr().err


# ---- files --------------------------------------------------------------------------------------


def test_quality_and_chroma(here):
    argv = ["photo.png", "--scale", "8", "-q", "-o"]
    assert upscale(*argv, "a.jpg") == 0
    assert upscale(*argv, "b.jpg", "--quality", "40", "--chroma", "4:2:0") == 0
    assert Path("b.jpg").stat().st_size < 0.6 * Path("a.jpg").stat().st_size
    with Image.open("b.jpg") as image:
        assert image.layer[0][1:3] == (2, 2)
    assert upscale(*argv, "c.jpg", "--quality", "0") == 2


@pytest.mark.parametrize("name, bits, code", [
    ("a.png", 16, 0), ("a.tiff", 16, 0), ("a.jpg", 16, 2), ("a.png", 8, 0),
])  # fmt: skip
def test_bits(here, capsys, name, bits, code):
    Image.fromarray(np.arange(0, 60000, 500, dtype=np.uint16).reshape(10, 12)).save("photo.png")
    assert upscale("photo.png", "-o", name, "--scale", "2", "--bits", str(bits)) == code
    if code:
        assert "has no 16 bits" in capsys.readouterr().err and not Path(name).exists()
    else:
        with Image.open(name) as image:
            assert image.mode == ("I;16" if bits == 16 else "L")


def test_strip_metadata(here, image):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    Image.fromarray(image).save("a.jpg", exif=exif, dpi=(300, 300), icc_profile=b"a profile")
    for more in ([], ["--strip-metadata"]):
        assert upscale("a.jpg", "-o", "b.png", "--scale", "2", "--overwrite", *more) == 0
        with Image.open("b.png") as large:
            assert bool(large.getexif()) == ("dpi" in large.info) == (not more)
            assert large.info["icc_profile"] == b"a profile"


def test_format_of_a_folder(here, capsys):
    assert upscale("in", "-o", "out", "--scale", "2", "--format", "webp") == 0
    assert files("out") == ["a.webp", "sub/b.webp", "sub/deep/c.webp"]
    assert upscale("photo.png", "-o", "out.jpg", "--scale", "2", "--format", "webp") == 2
    assert "do not agree" in capsys.readouterr().err


def test_more_pixels_than_pillow_decodes_by_itself(here, monkeypatch):
    """Pillow's limit guards against bombs; --max-pixels does that here, for the result."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert upscale("photo.png", "-o", "out.png", "--scale", "2") == 0
    assert Image.MAX_IMAGE_PIXELS == 50
    assert upscale("photo.png", "-o", "b.png", "--scale", "2", "--max-pixels", "150") == 2


def test_max_memory_is_checked_before_decoding(here, capsys, monkeypatch):
    monkeypatch.setattr("gsr.io.source.read_source", lambda *_: pytest.fail("decoded"))
    assert upscale("photo.png", "-o", "out.png", "--scale", "2", "--max-memory", "1000") == 2
    assert "to decode this image takes about" in capsys.readouterr().err


# ---- textures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(34, 24), (51, 30), (20, 13)])
def test_a_wrapped_texture_has_no_seams(here, image, size):
    """Upscaled from anywhere on the endless plane, the result is the same one, moved."""
    argv = ("-o", "b.png", "--overwrite", "--wrap", "--fit", "stretch")
    argv += ("--size", f"{size[0]}x{size[1]}", "--precision", "fp32", "--model", "lite")
    moves = [(0, 0), (12 // math.gcd(12, size[1]), 17 // math.gcd(17, size[0]))]
    results = []
    for dy, dx in moves:  # by so much that the result moves by whole pixels
        alpha = np.full((12, 17, 1), 200, np.uint8)
        alpha[3:7, 4:9] = 90
        moved = np.roll(np.dstack([image, alpha]), (dy, dx), (0, 1))
        Image.fromarray(moved).save("a.png")
        assert upscale("a.png", *argv) == 0
        back = -dy * size[1] // 12, -dx * size[0] // 17
        results.append(np.roll(np.array(Image.open("b.png")), back, (0, 1)).astype(int))
    assert results[0].shape == (size[1], size[0], 4)
    assert np.abs(results[0] - results[1]).max() <= 1
    assert upscale("a.png", *(a for a in argv if a != "--wrap")) == 0
    plain = np.array(Image.open("b.png")).astype(int)
    assert np.abs(np.roll(plain, back, (0, 1)) - results[0]).max() > 3  # which has seams


def test_a_wrapped_image_is_not_cut(here, capsys):
    assert upscale("photo.png", "-o", "b.png", "--wrap", "--size", "99x99", "--fit", "cover") == 2
    assert "--wrap keeps all of an image" in capsys.readouterr().err


# ---- frames and pages ---------------------------------------------------------------------------


def animation(name, image, **options):
    frames = [Image.fromarray(np.roll(image, 4 * i, 1)) for i in range(3)]
    options = {"duration": [100, 200, 300], "loop": 0, **options}
    frames[0].save(name, save_all=True, append_images=frames[1:], **options)
    return frames


@pytest.mark.parametrize("source", ["a.gif", "a.webp", "a.png"])
@pytest.mark.parametrize("result", ["b.gif", "b.webp", "b.png"])
def test_animations_stay_animations(here, capsys, image, tiny_model, source, result):
    animation(source, image, lossless=True)
    assert upscale(source, "-o", result, "--scale", "2", "--bits", "8") == 0
    assert "34 x 24, 3 frames in " in capsys.readouterr().out
    with Image.open(result) as after, Image.open(source) as before:
        assert after.n_frames == 3 and after.info["loop"] == 0
        for number, duration in enumerate([100, 200, 300]):
            after.seek(number)
            before.seek(number)
            want = gsr.upscale(np.array(before.convert("RGB")), 2, model=tiny_model)
            off = np.abs(np.array(after.convert("RGB")).astype(int) - want)
            assert after.info["duration"] == duration
            assert off.mean() < (0.01 if result == "b.png" else 8)


@pytest.mark.parametrize("loop", [None, 0, 1, 4])
def test_how_often_an_animation_plays(here, image, loop):
    animation("a.gif", image, loop=loop)
    assert upscale("a.gif", "-o", "b.gif", "--scale", "1") == 0
    assert upscale("a.gif", "-o", "b.png", "--scale", "1") == 0
    with Image.open("b.gif") as again:
        assert again.info.get("loop") == loop
    with Image.open("b.png") as once_more:  # which counts the first time, too
        assert once_more.info["loop"] == (1 if loop is None else loop and loop + 1)


def test_holes_of_an_animation_stay_holes(here, image):
    alpha = np.zeros((3, 12, 17, 1), np.uint8)
    for i in range(3):
        alpha[i, 4 * i : 4 * i + 4] = 255
    frames = [Image.fromarray(np.dstack([image, a])) for a in alpha]
    frames[0].save("a.png", save_all=True, append_images=frames[1:])
    for name in ("b.png", "b.webp", "b.gif"):
        assert upscale("a.png", "-o", name, "--scale", "2", "--model", "lite") == 0
        with Image.open(name) as result:
            for i in range(3):
                result.seek(i)
                shown = np.array(result.convert("RGBA"))[..., 3] > 127
                assert shown[8 * i + 1 : 8 * i + 7].all() and shown.mean() < 10 / 24


def test_pages_keep_their_sizes_and_depths(here, capsys, image, tiny_model):
    pages = [Image.fromarray(image), Image.fromarray(image[:9, :11])]
    pages += [Image.fromarray(np.arange(0, 60000, 500, dtype=np.uint16).reshape(10, 12))]
    preview = Image.fromarray(image[::4, ::4])
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    pages[0].save("a.tif", save_all=True, append_images=[preview, *pages[1:]])
    assert upscale("a.tif", "-o", "b.tif", "--scale", "2") == 0
    assert "34 x 24, 3 pages in " in capsys.readouterr().out
    with Image.open("b.tif") as result:
        assert result.n_frames == 3
        for number, page in enumerate(pages):
            result.seek(number)
            want = gsr.upscale(np.array(page), 2, model=tiny_model)
            np.testing.assert_array_equal(np.array(result), want)


@pytest.mark.parametrize("name, what", [("a.gif", "frames"), ("a.tif", "pages")])
def test_a_word_for_what_is_left_out(here, capsys, image, name, what):
    animation(name, image)
    output = "out.jpg" if what == "frames" else "out.png"
    assert upscale(name, "-o", output, "--scale", "2") == 0
    assert capsys.readouterr().out.strip().endswith(f"s, the first of 3 {what}")
    assert upscale("photo.png", "-o", "b.png", "--scale", "2") == 0
    assert "frames" not in capsys.readouterr().out


def test_frames_count_together(here, capsys, image):
    animation("a.gif", image)
    argv = ("a.gif", "-o", "b.webp", "--scale", "2", "--max-pixels")
    assert upscale(*argv, "2000") == 2
    assert "the results would have 2,448 pixels together" in capsys.readouterr().err
    assert upscale(*argv, "2448") == 0


def test_a_bad_frame_leaves_no_file(here, capsys, image):
    animation("a.gif", image)
    data = Path("a.gif").read_bytes()
    Path("a.gif").write_bytes(data[: int(len(data) * 0.8)])
    assert upscale("a.gif", "-o", "b.webp", "--scale", "2") == 2
    assert files(".") == ["a.gif", "in/a.png", "in/sub/b.jpg", "in/sub/deep/c.tif",
                          "model/README.md", "model/config.json", "model/model.safetensors",
                          "photo.png"]  # fmt: skip


# ---- two runs on one folder ---------------------------------------------------------------------


def test_another_run_on_the_same_folder(here, capsys, monkeypatch, image):
    """It has written one file since this run began, and is writing another."""
    plan = gsr.batch.Batch._plan

    def later(batch, job):
        planned = plan(batch, job)
        if job.source == "in/a.png":
            Path("out").mkdir(exist_ok=True)
            Path("out/a.png").write_bytes(b"theirs")
        return planned

    monkeypatch.setattr(gsr.batch.Batch, "_plan", later)
    argv = ("in", "-o", "out", "--scale", "2")
    with atomic_file_of_another_process(Path("out/sub/b.jpg").absolute()):
        assert upscale(*argv, "--skip-existing") == 0
    assert files("out") == ["a.png", "sub/deep/c.tif"]
    assert Path("out/a.png").read_bytes() == b"theirs"
    assert "1 of 1 images upscaled, 2 there already" in capsys.readouterr().out
    shutil.rmtree("out")
    assert upscale(*argv) == 1
    assert "out/a.png exists by now" in capsys.readouterr().err
    assert Path("out/a.png").read_bytes() == b"theirs"


class atomic_file_of_another_process:
    """Holds a temporary file as a process that writes `path` does."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        code = (
            "import pathlib, sys; from gsr.io.image import atomic_file\n"
            "path = pathlib.Path(sys.argv[1]); path.parent.mkdir(parents=True, exist_ok=True)\n"
            "with atomic_file(path): print('writing', flush=True); sys.stdin.read(); sys.exit(9)\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, self.path], env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout.readline() == "writing\n"

    def __exit__(self, *_):
        self.process.communicate()
        assert self.process.returncode == 9


# ---- processes ----------------------------------------------------------------------------------


def command(*argv):
    return [sys.executable, "-m", "gsr", "upscale", "--model", "model", *argv]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(sys.platform != "linux", reason="names of pipes")
@pytest.mark.parametrize("source", ["-", "/dev/stdin", "fifo"])
def test_pipes(here, image, tiny_model, source):
    data = Path("photo.png").read_bytes()
    if source == "fifo":
        os.mkfifo("fifo")
        subprocess.Popen(["sh", "-c", "cat photo.png > fifo"])
    argv = command(source, "-o", "-", "--scale", "2")
    with subprocess.Popen(
        argv, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        out, _ = process.communicate(data)
    assert process.returncode == 0
    Path("out.png").write_bytes(out)
    assert np.array_equal(read_image("out.png"), gsr.upscale(image, 2, model=tiny_model))


def test_the_callers_signal_handlers_come_back(here):
    before = signal.getsignal(signal.SIGTERM)
    assert upscale("photo.png", "-o", "out.png", "--scale", "2") == 0
    assert upscale("photo.png", "-o", "out.png", "--scale", "2") == 2
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_a_killed_run_leaves_nothing(here, image, number):
    """Or, killed for good, a hidden file that the next run removes."""
    write_image("photo.png", np.tile(image, (20, 20, 1)))
    process = subprocess.Popen(
        command("photo.png", "-o", "out.png", "--size", "15000x"),
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(here.glob(f".*{TEMPORARY}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    cli.main(["upscale", "in/a.png", "--model", "model", "-o", "other.png", "--scale", "2"])
    assert list(here.glob(f".*{TEMPORARY}"))  # what a running process writes stays
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)
    code = getattr(signal, number).value
    assert process.returncode == (-9 if number == "SIGKILL" else 128 + code)
    assert "Traceback" not in err and not Path("out.png").exists()
    if number == "SIGKILL":
        upscale("photo.png", "-o", "small.png", "--scale", "1")
    assert not list(here.glob(f".*{TEMPORARY}"))
