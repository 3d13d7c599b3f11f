"""Evaluation on a tiny data set, with stand-ins for the model and, at the end, a real one."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gsr import evaluation
from gsr.config import EncoderConfig, ModelConfig
from gsr.errors import InputError
from gsr.evaluation import evaluate, main, open_set, read_pair, table
from gsr.image import read_image, to_tensor, write_image
from gsr.metrics import psnr, psnr_y, ssim
from gsr.models import GaussianSR
from gsr.resize import imresize

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data/eval"
NAMES = ["otter", "skyline", "spices"]


def tiny_model() -> GaussianSR:
    torch.manual_seed(0)
    return GaussianSR(ModelConfig(encoder=EncoderConfig(n_feats=8, n_blocks=1))).eval()


@pytest.fixture
def stub(monkeypatch):
    """Replaces `run`: the "model" is a function of LR and size."""

    def install(enlarge):
        monkeypatch.setattr(
            evaluation, "run", lambda model, lr, size, scale=None, **_: enlarge(lr, size)
        )
        return object()

    return install


def without_seconds(report):
    if isinstance(report, dict):
        return {key: without_seconds(v) for key, v in report.items() if key != "seconds"}
    return [without_seconds(v) for v in report] if isinstance(report, list) else report


# ---- data ---------------------------------------------------------------------------------------


def test_open_set_finds_pairs():
    data = open_set(DATA, [2, 3])
    assert data.name == "eval"
    assert [picture.name for picture in data.pictures] == NAMES
    assert [list(picture.lr) for picture in data.pictures] == [[2]] * 3
    assert data.pictures[2].lr[2] == DATA / "LR_bicubic/X2/spicesx2.png"
    assert [picture.name for picture in open_set(DATA, [2], limit=2).pictures] == NAMES[:2]


def test_open_set_knows_the_other_layouts(tmp_path):
    shutil.copytree(DATA / "HR", tmp_path / "tiny_HR")
    shutil.copytree(DATA / "LR_bicubic", tmp_path / "tiny_LR_bicubic")
    div2k = open_set(tmp_path / "tiny_HR", [2])
    assert div2k.name == "tiny"
    assert div2k.pictures[0].lr[2] == tmp_path / "tiny_LR_bicubic/X2/otterx2.png"

    shutil.copytree(DATA / "HR", tmp_path / "plain")
    assert [picture.lr for picture in open_set(tmp_path / "plain", [2]).pictures] == [{}] * 3
    shutil.copytree(DATA / "LR_bicubic", tmp_path / "plain/LR_bicubic")
    beside = open_set(tmp_path / "plain", [2])
    assert [picture.name for picture in beside.pictures] == NAMES
    assert beside.pictures[0].lr[2].name == "otterx2.png"


def test_open_set_refuses(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_set(tmp_path / "nowhere", [2])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        open_set(tmp_path / "empty", [2])
    with pytest.raises(InputError, match="limit"):
        open_set(DATA, [2], limit=0)
    for scale in (0, -2, 0.5, math.nan, math.inf, 1e300):
        with pytest.raises(InputError, match="from 1 to 1000"):
            open_set(DATA, [2, scale])
    with pytest.raises(InputError, match="at least one"):
        open_set(DATA, [])

    copy = tmp_path / "copy"
    shutil.copytree(DATA, copy)
    shutil.copy(copy / "HR/otter.png", copy / "HR/otter.bmp")
    with pytest.raises(InputError, match="same name"):
        open_set(copy, [2])
    (copy / "HR/otter.bmp").unlink()
    (copy / "LR_bicubic/X2/skylinex2.png").unlink()
    with pytest.raises(InputError, match="lacks 1 of the 3 LR pictures, first skylinex2.png"):
        open_set(copy, [2])


def test_read_pair_takes_the_file_and_crops_hr(tmp_path):
    shutil.copytree(DATA, tmp_path / "copy")
    changed = 255 - read_image(DATA / "LR_bicubic/X2/spicesx2.png")
    write_image(tmp_path / "copy/LR_bicubic/X2/spicesx2.png", changed)
    lr, hr = read_pair(open_set(tmp_path / "copy", [2]).pictures[2], 2)
    assert lr.shape == (26, 33, 3) and np.array_equal(lr, changed)
    assert np.array_equal(hr, read_image(DATA / "HR/spices.png")[:52, :66])


@pytest.mark.parametrize(
    "scale, lr_size, hr_size",
    [(3, (17, 22), (51, 66)), (3.7, (14, 18), (52, 67)), (1.1, (48, 60), (53, 66))],
)
def test_read_pair_makes_lr(scale, lr_size, hr_size):
    spices = open_set(DATA, [scale]).pictures[2]
    lr, hr = read_pair(spices, scale)
    assert lr.shape[:2] == lr_size and hr.shape[:2] == hr_size
    full = read_image(DATA / "HR/spices.png")
    assert np.array_equal(hr, full[: hr_size[0], : hr_size[1]])
    assert np.array_equal(lr, imresize(hr, size=lr_size))


def test_read_pair_refuses(tmp_path):
    shutil.copytree(DATA, tmp_path / "copy")
    otter = tmp_path / "copy/LR_bicubic/X2/otterx2.png"
    for size in ((27, 33), (26, 32)):  # one row too many, one column too few
        write_image(otter, np.zeros((*size, 3), np.uint8))
        with pytest.raises(InputError, match="rounded down") as error:
            read_pair(open_set(tmp_path / "copy", [2]).pictures[0], 2)
        assert str(otter) in str(error.value)
    with pytest.raises(InputError, match="too few"):
        read_pair(open_set(DATA, [60]).pictures[0], 60)
    (tmp_path / "copy/HR/otter.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="otter.png"):
        evaluate(None, tmp_path / "copy", [3])


# ---- measuring ----------------------------------------------------------------------------------


def test_bicubic_row_and_protocols():
    lr = read_image(DATA / "LR_bicubic/X2/spicesx2.png").astype(np.float32) / 255
    sr = torch.from_numpy(imresize(lr, size=(52, 66))).permute(2, 0, 1)[None].clamp(0, 1)
    hr = to_tensor(read_image(DATA / "HR/spices.png")[:52, :66])
    for protocol, metric, shave in (("benchmark", psnr_y, 2), ("div2k", psnr, 8)):
        report = evaluate(None, DATA, [2], protocol)
        assert report["name"] == "eval" and report["pictures"] == 3
        (row,) = report["scales"]
        assert row["scale"] == 2 and row["shave"] == shave and row["lr"] == "paired"
        bicubic = row["methods"]["bicubic"]
        assert list(bicubic["images"]) == NAMES
        spices = bicubic["images"]["spices"]
        assert spices["psnr"] == pytest.approx(metric(sr, hr, shave), abs=1e-6)
        assert spices["ssim"] == pytest.approx(ssim(sr, hr, shave), abs=1e-9)
        for key in ("psnr", "ssim"):
            mean = sum(image[key] for image in bicubic["images"].values()) / 3
            assert bicubic[key] == pytest.approx(mean, abs=1e-12)
    with pytest.raises(InputError, match="benchmark, div2k"):
        evaluate(None, DATA, [2], "set5")


def test_grey_pictures_are_measured_as_rgb():
    report = evaluate(None, DATA, [2])
    lr = imresize(read_image(DATA / "LR_bicubic/X2/skylinex2.png") / 255, size=(52, 66))
    hr = read_image(DATA / "HR/skyline.png")[:52, :66] / 255
    mse = np.square((lr.clip(0, 1) - hr)[2:-2, 2:-2, 0]).mean()
    expected = -10 * math.log10(mse * (219.859 / 256) ** 2)
    measured = report["scales"][0]["methods"]["bicubic"]["images"]["skyline"]["psnr"]
    assert measured == pytest.approx(expected, abs=1e-4)


def test_model_is_clamped_not_rounded_and_compared_with_hr(stub):
    pairs = [read_pair(p, s) for s in (2, 3.7) for p in open_set(DATA, [s]).pictures]
    original = {float(to_tensor(lr).sum()): to_tensor(hr) for lr, hr in pairs}

    def perfect_but(error):
        def enlarge(lr, size):
            hr = original[float(lr.sum())]
            assert hr.shape[-2:] == size
            return torch.where(hr > 0.5, hr - error, hr + error)

        return stub(enlarge)

    # A third of an 8-bit level: rounding would hide it.
    report = evaluate(perfect_but(1 / 765), DATA, [2, 3.7], "div2k")
    for row, shave in zip(report["scales"], (8, 10), strict=True):
        assert row["shave"] == shave
        assert row["methods"]["model"]["psnr"] == pytest.approx(20 * math.log10(765), abs=1e-3)
    assert [row["lr"] for row in report["scales"]] == ["paired", "imresize"]

    equal = evaluate(perfect_but(0), DATA, [2])["scales"][0]["methods"]["model"]
    assert equal["psnr"] is None and equal["ssim"] == pytest.approx(1)
    json.dumps(equal, allow_nan=False)

    # Far outside [0, 1] counts like the nearest edge of it.
    values = []
    for v in (9.0, 1.0):
        model = stub(lambda lr, size, v=v: torch.full((1, 3, *size), v))
        values.append(without_seconds(evaluate(model, DATA, [2])))
    assert values[0] == values[1]


def test_model_gets_lr_and_scale(monkeypatch):
    seen = []

    def run(model, lr, size, scale=None, progress=False):
        seen.append((model, lr, size, scale))
        return torch.zeros(1, 3, *size)

    monkeypatch.setattr(evaluation, "run", run)
    evaluate("the model", DATA, [2.0, 3.7, 2], limit=1)
    assert [(model, size, scale) for model, _, size, scale in seen] == [
        ("the model", (52, 66), 2),
        ("the model", (52, 67), 3.7),
    ]
    assert torch.equal(seen[0][1], to_tensor(read_image(DATA / "LR_bicubic/X2/otterx2.png")))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_refused(stub, value):
    model = stub(lambda lr, size: torch.full((1, 3, *size), value))
    with pytest.raises(InputError, match="not finite"):
        evaluate(model, DATA, [2])


def test_a_picture_too_small_to_measure_is_named():
    with pytest.raises(InputError, match="otter.png at x21: .* after shaving 21"):
        evaluate(None, DATA, [21])


def test_save(stub, tmp_path):
    model = stub(lambda lr, size: torch.full((1, 3, *size), 0.3))
    evaluate(model, DATA, [2, 3.7], save=tmp_path / "out")
    saved = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*g"))
    assert saved == sorted(f"out/eval/x{s}/{name}.png" for s in ("2", "3.7") for name in NAMES)
    picture = read_image(tmp_path / "out/eval/x2/spices.png")
    assert picture.shape == (52, 66, 3) and (picture == round(0.3 * 255)).all()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        evaluate(model, DATA, [2], save=tmp_path / "file")


def test_progress_is_on_stderr_only(stub, capsys):
    evaluate(None, DATA, [2], progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "3/3" in err
    evaluate(None, DATA, [2])
    assert capsys.readouterr() == ("", "")


# ---- command line, with a real model ------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from gsr.checkpoint import save_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, tiny_model())
    return folder


def arguments(checkpoint, *more):
    return ["--checkpoint", str(checkpoint), "--data", str(DATA), "--device", "cpu", *more]


def test_main(checkpoint, tmp_path, capsys):
    threads = torch.get_num_threads()
    output = tmp_path / "new/report.json"
    try:
        main(
            arguments(checkpoint, "--scale", "2", "3.7", "--threads", "1", "--output", str(output))
        )
        first = json.loads(output.read_text())
        text = capsys.readouterr().out
        main(
            arguments(checkpoint, "--scale", "2", "3.7", "--threads", "1", "--output", str(output))
        )
    finally:
        torch.set_num_threads(threads)
    assert without_seconds(first) == without_seconds(json.loads(output.read_text()))
    assert [p.name for p in output.parent.iterdir()] == ["report.json"]

    assert first["protocol"]["name"] == "benchmark" and first["protocol"]["quantised"] is False
    assert first["model"]["checkpoint"] == "tiny" and first["model"]["mode"] == "direct"
    assert first["model"]["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert len(first["model"]["sha256"]) == 64
    assert first["versions"]["torch"] == torch.__version__ and first["threads"] == 1
    assert first["seconds"] > 0 and "commit" in first and "platform" in first
    (data,) = first["sets"]
    assert [row["lr"] for row in data["scales"]] == ["paired", "imresize"]

    # The whole path, against the model itself on one picture.
    lr = to_tensor(read_image(DATA / "LR_bicubic/X2/spicesx2.png"))
    hr = to_tensor(read_image(DATA / "HR/spices.png")[:52, :66])
    with torch.inference_mode():
        expected = psnr_y(tiny_model()(lr, scale=2).clamp(0, 1), hr, 2)
    measured = data["scales"][0]["methods"]["model"]["images"]["spices"]["psnr"]
    assert measured == pytest.approx(expected, abs=1e-3)

    lines = text.rstrip().splitlines()
    assert lines.pop() == f"report: {output}" and lines.pop() == ""
    assert lines == table(first).splitlines()
    assert [line.split()[0] for line in lines] == ["eval", "bicubic", "model"]
    bicubic = data["scales"][1]["methods"]["bicubic"]
    assert lines[1].endswith(f"{bicubic['psnr']:.2f} / {bicubic['ssim']:.4f}")


def test_the_hash_tells_weights_apart():
    model = tiny_model()
    before = evaluation.describe_model(model, "a")
    assert before == evaluation.describe_model(tiny_model(), "a")
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3
    assert before["sha256"] != evaluation.describe_model(model, "a")["sha256"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *who, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "gsr"
    package.mkdir()
    module = package / "evaluation.py"
    module.write_text("1")
    monkeypatch.setattr(evaluation, "__file__", str(module))
    assert evaluation._commit() is None
    git("init")
    assert evaluation._commit() is None  # no commit yet
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "v1")
    assert evaluation._commit() == git("rev-parse", "HEAD")
    module.write_text("2")
    assert evaluation._commit() == git("rev-parse", "HEAD") + "-dirty"
    # A package installed below somebody's repository is not of its commit.
    (tmp_path / "lib/gsr").mkdir(parents=True)
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "lib/gsr/evaluation.py"))
    assert evaluation._commit() is None


def test_the_report_is_written_without_being_asked_for(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(arguments(checkpoint, "--scale", "2", "--limit", "1"))
    assert capsys.readouterr().out.endswith("\n\nreport: evaluation.json\n")
    assert json.loads((tmp_path / "evaluation.json").read_text())["sets"][0]["pictures"] == 1
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "default: evaluation.json in this folder" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["--output", "--save"])
def test_folders_are_tried_before_the_work(checkpoint, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed").mkdir()
    make = tempfile.TemporaryFile

    def refuse(dir):  # by mode bits, root would still pass
        if Path(dir).name == "closed":
            raise PermissionError(13, "Permission denied")
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr("gsr.checkpoint.load", lambda *_: pytest.fail("loaded the model first"))
    path = "closed/report.json" if option == "--output" else "closed"
    with pytest.raises(InputError, match="closed may not be written to"):
        main(arguments(checkpoint, option, path))
    with pytest.raises(InputError, match="File name too long"):
        main(arguments(checkpoint, option, "x" * 300))


def test_main_refuses(checkpoint, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for more, part in [
        (["--scale", "0"], "from 1"),
        (["--scale", "nan"], "from 1"),
        (["--threads", "0"], "--threads must be from 1 to 1024, not 0"),
        (["--threads", "1025"], "--threads must be from 1 to 1024, not 1025"),
        (["--device", "meta"], "device meta is none of"),
        (["--data", "x" * 300], "File name too long"),
        (["--limit", "0"], "--limit"),
        (["--output", str(tmp_path)], "is a folder"),
        (["--save", str(checkpoint / "config.json")], "cannot be made"),
        (["--data", str(DATA), str(DATA)], "two data folders"),
        (["--data", str(tmp_path)], "holds no picture"),
        (["--checkpoint", str(tmp_path / "none")], "none"),
    ]:
        with pytest.raises(InputError) as error:
            main(arguments(checkpoint, *more))
        assert part in str(error.value)
    with pytest.raises(SystemExit) as stop:
        main(arguments(checkpoint, "--protocol", "set5"))
    assert stop.value.code == 2


def test_script(checkpoint, tmp_path):
    def script(*more):
        return subprocess.run(
            [sys.executable, ROOT / "evaluate.py", *arguments(checkpoint, *more)],
            capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    good = script("--scale", "2", "--limit", "1")
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith("eval (1 picture), PSNR Y / SSIM")
    bad = script("--scale", "0")
    assert bad.returncode == 2 and "Traceback" not in bad.stderr and "from 1 to 1000" in bad.stderr


# ---- the benchmark sets, where they are at hand -------------------------------------------------


@pytest.mark.skipif(
    "GSR_BENCHMARKS" not in os.environ, reason="set GSR_BENCHMARKS to Set5's parent"
)
def test_bicubic_figures_of_set5():
    # The literature's 33.66, 30.39 and 28.42 resize luma instead of RGB and round the result.
    report = evaluate(None, Path(os.environ["GSR_BENCHMARKS"]) / "Set5", [2, 3, 4])
    figures = [row["methods"]["bicubic"]["psnr"] for row in report["scales"]]
    assert figures == pytest.approx([33.68, 30.41, 28.43], abs=0.006)
    assert figures == pytest.approx([33.66, 30.39, 28.42], abs=0.03)
