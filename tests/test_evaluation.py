"""evaluate.py on a tiny data set, with stand-ins for what a model makes and with real ones."""

import csv
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from bench import tables
from gsr import cli, describe, distributed, evaluation
from gsr.config import EncoderConfig, ModelConfig
from gsr.data.benchmarks import open_set, read_pair
from gsr.errors import InputError
from gsr.evaluation import Degradation, label_checkpoints, self_ensemble, summarize
from gsr.io.image import read_image, to_tensor, write_image
from gsr.metrics import PROTOCOLS, psnr, psnr_y, ssim
from gsr.models import GaussianSR
from gsr.models.checkpoint import save_model
from gsr.ops.resize import imresize

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data/eval"
NAMES = ["otter", "skyline", "spices"]


def tiny_model() -> GaussianSR:
    torch.manual_seed(0)
    return GaussianSR(ModelConfig(encoder=EncoderConfig(n_feats=8, n_blocks=1))).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, tiny_model())
    return str(folder)


@pytest.fixture
def measured(checkpoint, tmp_path, monkeypatch):
    """Run evaluate.py in an empty folder, as its own process would; its report."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, data=DATA, output="evaluation.json"):
        options = ["--checkpoint", checkpoint, "--data", str(data), "--device", "cpu"]
        evaluate.main([*options, "--output", output, *map(str, argv)])
        return json.loads(Path(output).read_text())

    return run


@pytest.fixture
def stub(monkeypatch):
    """Replace what models make by a function of LR and size."""

    def install(upsample):
        monkeypatch.setattr(evaluation, "run", lambda model, lr, size, scale: upsample(lr, size))

    return install


def never(*_, **__):
    pytest.fail("went on after what was to be refused")


def methods_of(report, row=0):
    return report["sets"][0]["scales"][row]["methods"]


def without_seconds(report):
    if isinstance(report, dict):
        return {key: without_seconds(v) for key, v in report.items() if key != "seconds"}
    return [without_seconds(v) for v in report] if isinstance(report, list) else report


def nearest(lr, size):
    return torch.nn.functional.interpolate(lr, size, mode="nearest")


def spices():
    """What bicubic makes of spices at x2, and HR."""
    lr = read_image(DATA / "LR_bicubic/X2/spicesx2.png").astype(np.float32) / 255
    sr = torch.from_numpy(imresize(lr, size=(52, 66))).permute(2, 0, 1)[None].clamp(0, 1)
    return sr, to_tensor(read_image(DATA / "HR/spices.png")[:52, :66])


def files_below(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- measuring ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol, metric, shave", [("benchmark", psnr_y, 2), ("div2k", psnr, 8)])
def test_bicubic_row_and_protocols(measured, protocol, metric, shave):
    sr, hr = spices()
    (data,) = measured("--scale", 2, "--protocol", protocol)["sets"]
    assert data["name"] == "eval" and data["images"] == 3
    (row,) = data["scales"]
    assert row["scale"] == 2 and row["shave"] == shave and row["lr"] == "paired"
    bicubic = row["methods"]["bicubic"]
    assert list(bicubic["images"]) == NAMES
    figures = bicubic["images"]["spices"]
    assert figures["psnr"] == pytest.approx(metric(sr, hr, shave), abs=1e-6)
    assert figures["ssim"] == pytest.approx(ssim(sr, hr, shave), abs=1e-9)
    assert figures["psnr_rgb"] == pytest.approx(psnr(sr, hr, shave), abs=1e-6)
    assert figures["psnr_y"] == pytest.approx(psnr_y(sr, hr, shave), abs=1e-6)
    for key in ("psnr", "ssim"):
        mean = sum(image[key] for image in bicubic["images"].values()) / 3
        assert bicubic[key] == pytest.approx(mean, abs=1e-12)


def test_grey_images_are_measured_as_rgb(measured):
    lr = imresize(read_image(DATA / "LR_bicubic/X2/skylinex2.png") / 255, size=(52, 66))
    hr = read_image(DATA / "HR/skyline.png")[:52, :66] / 255
    mse = np.square((lr.clip(0, 1) - hr)[2:-2, 2:-2, 0]).mean()
    expected = -10 * math.log10(mse * (219.859 / 256) ** 2)
    found = methods_of(measured("--scale", 2))["bicubic"]["images"]["skyline"]["psnr"]
    assert found == pytest.approx(expected, abs=1e-4)


def test_results_are_clamped_not_rounded_and_compared_with_hr(measured, stub):
    pairs = [read_pair(image, s) for s in (2, 3.7) for image in open_set(DATA, [s]).images]
    original = {float(to_tensor(lr).sum()): to_tensor(hr) for lr, hr in pairs}

    def all_but(error):
        def upsample(lr, size):
            hr = original.get(float(lr.sum()), torch.zeros(1, 3, *size))  # or it is the warm-up
            assert hr.shape[-2:] == size
            return torch.where(hr > 0.5, hr - error, hr + error)

        stub(upsample)

    all_but(1 / 765)  # a third of a level: rounding would hide it
    report = measured("--scale", 2, 3.7, "--protocol", "div2k")
    for row, shave, lr in zip(
        report["sets"][0]["scales"], (8, 10), ("paired", "imresize"), strict=True
    ):
        assert row["shave"] == shave and row["lr"] == lr
        assert row["methods"]["tiny"]["psnr"] == pytest.approx(20 * math.log10(765), abs=1e-3)

    all_but(0)
    equal = methods_of(measured("--scale", 2))["tiny"]
    assert equal["psnr"] is None and equal["ssim"] == pytest.approx(1)

    # Far outside [0, 1] counts like the nearest edge of it.
    stub(lambda lr, size: torch.full((1, 3, *size), 9.0))
    outside = methods_of(measured("--scale", 2))["tiny"]
    stub(lambda lr, size: torch.full((1, 3, *size), 1.0))
    assert without_seconds(outside) == without_seconds(methods_of(measured("--scale", 2))["tiny"])


def test_models_get_lr_and_scale_after_a_warm_up(measured, monkeypatch):
    seen = []

    def run(model, lr, size, scale=None):
        seen.append((lr, size, scale))
        return torch.zeros(1, 3, *size)

    monkeypatch.setattr(evaluation, "run", run)
    measured("--scale", 2.0, 3.7, 2, "--limit", 1)
    # What is compiled at first counts for no image.
    assert [(size, scale) for _, size, scale in seen] == [
        ((32, 32), 2), ((52, 66), 2), ((52, 67), 3.7),
    ]  # fmt: skip
    assert torch.equal(seen[1][0], to_tensor(read_image(DATA / "LR_bicubic/X2/otterx2.png")))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_refused(measured, stub, value):
    stub(lambda lr, size: torch.full((1, 3, *size), value))
    with pytest.raises(InputError, match="not finite for .*otter.png at x2"):
        measured("--scale", 2)


def test_saved_results(measured, stub, tmp_path):
    stub(lambda lr, size: torch.full((1, 3, *size), 0.3))
    measured("--scale", 2, 3.7, "--save", "out")
    saved = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png"))
    assert saved == sorted(f"out/eval/x{s}/{name}.png" for s in ("2", "3.7") for name in NAMES)
    image = read_image(tmp_path / "out/eval/x2/spices.png")
    assert image.shape == (52, 66, 3) and (image == round(0.3 * 255)).all()


def test_progress_is_on_stderr_only(measured, capsys):
    measured("--scale", 2)
    out, err = capsys.readouterr()
    assert "image/s" not in out and "3/3" in err


@pytest.mark.parametrize("protocol, shaves", [("benchmark", [3, 12, 30]), ("div2k", [9, 18, 36])])
def test_fractional_and_very_large_scales(measured, tmp_path, protocol, shaves):
    (tmp_path / "set").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (97, 105, 3), dtype=np.uint8)
    write_image(tmp_path / "set/a.png", noise)
    report = measured("--scale", 2.5, 11.3, 30, "--protocol", protocol, data="set")
    rows = report["sets"][0]["scales"]
    assert [row["scale"] for row in rows] == [2.5, 11.3, 30]
    assert [row["shave"] for row in rows] == shaves
    for row in rows:
        for method in row["methods"].values():
            assert 0 < method["psnr"] < 20 and -1 <= method["ssim"] <= 1


def test_perceptual_metrics_get_the_same_images(measured, monkeypatch, capsys):
    seen = []

    def brightness(sr, hr, shave):
        seen.append((tuple(sr.shape), tuple(hr.shape), shave))
        return float(sr.mean())

    monkeypatch.setattr(evaluate, "perceptual", lambda name, device: brightness)
    report = measured("--scale", 2, "--limit", 2, "--perceptual", "lpips")
    assert seen == [((1, 3, 52, 66), (1, 3, 52, 66), 2)] * 4
    bicubic = methods_of(report)["bicubic"]
    each = [image["lpips"] for image in bicubic["images"].values()]
    assert bicubic["lpips"] == pytest.approx(sum(each) / 2)
    assert "VGG16" in report["protocol"]["perceptual"]["lpips"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("eval (2 images), PSNR Y / SSIM / LPIPS")
    assert lines[1].endswith(f" / {bicubic['lpips']:.4f}")


def test_means_do_not_depend_on_who_measured_what():
    """Numbers whose sum depends on its order, from processes that finished in another one."""
    data = open_set(DATA, [2])
    found = {"spices": 0.1, "otter": 1e16, "skyline": -1e16}
    summaries = [
        summarize(
            data,
            [2],
            PROTOCOLS["benchmark"],
            measured={(2, "m", name): ({"psnr": found[name]}, 1.0) for name in order},
        )
        for order in (list(found), NAMES)
    ]
    assert json.dumps(summaries[0]) == json.dumps(summaries[1])
    method = summaries[0]["scales"][0]["methods"]["m"]
    assert method["psnr"] == 0.1 / 3 and list(method["images"]) == NAMES and method["seconds"] == 3


# ---- degraded LR --------------------------------------------------------------------------------


def bicubic_psnr(lr, hr):
    sr = imresize(lr.astype(np.float32) / 255, size=hr.shape[:2])
    sr = torch.from_numpy(sr).permute(2, 0, 1)[None].clamp(0, 1)
    return psnr_y(sr, to_tensor(hr), 2)


def test_every_method_gets_the_jpeg_that_pillow_saves(measured, monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluation, "run", lambda model, lr, size, scale: (seen.append(lr), nearest(lr, size))[1]
    )
    report = measured("--scale", 2, "--jpeg", 40)
    for i, name in enumerate(NAMES):
        lr, hr = read_pair(open_set(DATA, [2]).images[i], 2)
        file = io.BytesIO()
        Image.fromarray(lr).save(file, "JPEG", quality=40, subsampling="4:2:0")
        degraded = np.array(Image.open(file).convert("RGB"))
        found = methods_of(report)["bicubic"]["images"][name]["psnr"]
        assert found == pytest.approx(bicubic_psnr(degraded, hr), abs=1e-4)
        assert torch.equal(seen[1 + i], to_tensor(degraded))
        assert found < bicubic_psnr(lr, hr) - 0.1


def test_noise_is_added_before_the_jpeg():
    lr = np.full((200, 200, 3), 128, np.uint8)
    noisy = Degradation(noise=10)(lr, "a", 2)
    assert (noisy.astype(float) - lr).std() == pytest.approx(10, rel=0.02)
    assert abs(noisy.mean() - 128) < 0.2
    both = Degradation(noise=10, jpeg=30)(lr, "a", 2)
    assert np.array_equal(both, Degradation(jpeg=30)(noisy, "a", 2)) and not (both == noisy).all()
    assert np.array_equal(Degradation()(lr, "a", 2), lr)


def test_noise_depends_on_name_and_scale_only():
    lr = np.full((20, 30, 3), 128, np.uint8)
    degrade = Degradation(noise=10)
    first = degrade(lr, "baby", 2)
    np.random.rand(3)
    assert np.array_equal(degrade(lr, "baby", 2), first)
    # The numbers themselves: the same on every machine.
    assert first[0, :2].tolist() == [[127, 129, 129], [116, 147, 110]]
    for other in (("bird", 2), ("baby", 2.5), (os.fsdecode(b"B\xe4r"), 2)):
        assert not np.array_equal(degrade(lr, *other), first)


def test_the_same_figures_twice_in_any_set_and_order(measured, tmp_path):
    """Of all images or of one, in a set of another name."""
    options = ["--scale", 2, 3, "--noise", 7.5, "--jpeg", 60]
    first = measured(*options)
    assert without_seconds(measured(*options)) == without_seconds(first)
    for folder in ("HR", "LR_bicubic/X2"):
        (tmp_path / "other" / folder).mkdir(parents=True)
        for path in (DATA / folder).glob("spices*"):
            shutil.copy(path, tmp_path / "other" / folder)
    alone = measured(*options, data="other")
    for row in (0, 1):
        for name in ("bicubic", "tiny"):
            expected = methods_of(first, row)[name]["images"]["spices"]
            assert methods_of(alone, row)[name]["images"]["spices"] == expected


def test_report_and_tables_say_how_lr_was_degraded(measured, capsys):
    protocol = measured("--scale", 2, "--noise", 5, "--jpeg", 30)["protocol"]
    text = "Gaussian noise of sigma 5 (levels of 255), then JPEG of quality 30 at 4:2:0"
    assert protocol["degradation"]["noise"] == 5 and protocol["degradation"]["jpeg"] == 30
    assert protocol["degradation"]["lr"] == text
    assert f"\nLR degraded: {text}\n" in capsys.readouterr().out
    tables.main(["evaluation.json"])
    assert f"LR degraded: {text}." in capsys.readouterr().out
    measured("--scale", 2, "--jpeg", 30)
    assert "\nLR degraded: JPEG of quality 30 at 4:2:0\n" in capsys.readouterr().out
    assert "degradation" not in measured("--scale", 2)["protocol"]


@pytest.mark.parametrize(
    "option, value, sentence",
    [
        ("--jpeg", 0, "JPEG quality (--jpeg) must be from 1 to 100, not 0"),
        ("--jpeg", 101, "JPEG quality (--jpeg) must be from 1 to 100, not 101"),
        ("--noise", -1, "noise (--noise) must be from 0 to 255, not -1.0"),
        ("--noise", 256, "noise (--noise) must be from 0 to 255, not 256.0"),
        ("--noise", "nan", "noise (--noise) must be from 0 to 255, not nan"),
    ],
)
def test_bad_degradations_are_refused(measured, monkeypatch, option, value, sentence):
    monkeypatch.setattr(evaluate, "load", never)
    with pytest.raises(InputError) as error:
        measured(option, value)
    assert str(error.value) == sentence


# ---- self-ensemble ------------------------------------------------------------------------------


def test_ensemble_of_an_equivariant_model_is_the_model():
    lr, seen = torch.rand(1, 3, 5, 7), []

    def method(x, size, scale):
        seen.append((tuple(x.shape[-2:]), size, scale))
        return nearest(x, size)

    assert torch.equal(self_ensemble(method, lr, (10, 21), scale=(2, 3)), nearest(lr, (10, 21)))
    assert seen == [((5, 7), (10, 21), (2, 3))] * 4 + [((7, 5), (21, 10), (3, 2))] * 4
    assert self_ensemble(method, lr, (15, 21), scale=3).dtype == torch.float32
    assert seen[-1][2] == 3


def test_ensemble_is_the_mean_over_the_dihedral_group():
    """Against NumPy's turns by quarters, of a model that looks at where a pixel is."""
    lr = torch.rand(1, 3, 4, 6, dtype=torch.float64)

    def method(x, size, scale=None):
        y, x_ = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
        return nearest(x, size) * (1 + y**2 + 0.1 * x_ * y)

    results = []
    for quarters in range(4):
        for mirrored in (False, True):
            turned = np.rot90(lr.numpy(), quarters, (2, 3))
            turned = turned[..., ::-1] if mirrored else turned
            size = (8, 18) if quarters % 2 == 0 else (18, 8)
            out = method(torch.from_numpy(turned.copy()), size).numpy()
            out = out[..., ::-1] if mirrored else out
            results.append(np.rot90(out, -quarters, (2, 3)))
    assert len({r.tobytes() for r in results}) == 8  # all of them different
    ours = self_ensemble(method, lr, (8, 18), scale=(2, 3))
    assert np.allclose(ours.numpy(), np.mean(results, 0), rtol=1e-12)


def test_ensemble_is_measured_beside_the_model(measured, stub):
    sizes = []
    stub(lambda lr, size: (sizes.append(size), nearest(lr, size))[1])
    report = measured("--scale", 2, "--limit", 1, "--ensemble")
    assert sizes == [(32, 32)] + [(52, 66)] * 5 + [(66, 52)] * 4
    methods = methods_of(report)
    assert list(methods) == ["bicubic", "tiny", "tiny+"] and "8 flips" in str(report["protocol"])
    assert methods["tiny+"]["psnr"] == methods["tiny"]["psnr"] != methods["bicubic"]["psnr"]


# ---- several models -----------------------------------------------------------------------------


def test_several_models_side_by_side(measured, checkpoint, monkeypatch, tmp_path):
    paths = [str(tmp_path / "runs" / name / "best") for name in ("dark", "light")]
    for path, value in zip(paths, (0.2, 0.8), strict=True):
        model = tiny_model()
        with torch.no_grad():
            next(model.parameters()).fill_(value)
        save_model(path, model)

    def run(model, lr, size, scale):
        return torch.full((1, 3, *size), next(model.parameters()).mean().item())

    monkeypatch.setattr(evaluation, "run", run)
    report = measured("--checkpoint", *paths, "--scale", 2, 3, "--save", "out")
    assert list(report["models"]) == ["dark/best", "light/best"]
    alone = measured("--checkpoint", paths[1], "--scale", 2, 3)
    for row in (0, 1):
        methods, expected = methods_of(report, row), methods_of(alone, row)
        assert list(methods) == ["bicubic", "dark/best", "light/best"]
        for name in ("bicubic", "light/best"):
            assert without_seconds(methods[name]) == without_seconds(expected[name])
    assert (read_image("out/light/best/eval/x3/otter.png") == 204).all()
    assert (read_image("out/dark/best/eval/x2/spices.png") == 51).all()
    for folders in (["bicubic"], ["a", "a+"]):
        with pytest.raises(InputError, match="two methods are called"):
            measured("--checkpoint", *folders, "--ensemble")


def test_labels_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    label = label_checkpoints
    assert label(["runs/a"]) == {"a": "runs/a"}
    assert label(["r/a/best"]) == {"a/best": "r/a/best"}
    assert label(["lite", "runs/a"]) == {"lite": "lite", "a": "runs/a"}
    assert label(["r/a/best", "r/b/best"]) == {"a/best": "r/a/best", "b/best": "r/b/best"}
    assert label(["r/a/best", "r/b"]) == {"a/best": "r/a/best", "b": "r/b"}
    with pytest.raises(InputError, match="names r/a twice"):
        label(["r/a", "./r/a"])


def test_names_of_checkpoints(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    for path, name in [
        ("best", "mine/best"), ("../mine/model", "mine/model"), ("step-4000", "mine/step-4000"),
        (tmp_path / "mine", "mine"), ("a/bestial", "bestial"), ("a/b.pth", "b.pth"),
        (None, "lite"), ("/", ""),
    ]:  # fmt: skip
        assert describe.called_after(path) == name


# ---- report -------------------------------------------------------------------------------------


def test_report_and_table(measured, capsys, tmp_path):
    threads = torch.get_num_threads()
    try:
        first = measured("--scale", 2, 3.7, "--threads", 1)
        text = capsys.readouterr().out
        again = measured("--scale", 2, 3.7, "--threads", 1)
    finally:
        torch.set_num_threads(threads)
    assert without_seconds(first) == without_seconds(again)
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]

    assert first["protocol"]["name"] == "benchmark" and first["protocol"]["quantised"] is False
    model = first["models"]["tiny"]
    assert model["mode"] == "direct" and len(model["sha256"]) == 64
    assert model["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert first["versions"]["torch"] == torch.__version__ and first["threads"] == 1
    assert first["seconds"] > 0 and "commit" in first and "platform" in first

    # The whole path, against the model itself on one image.
    lr = to_tensor(read_image(DATA / "LR_bicubic/X2/spicesx2.png"))
    with torch.inference_mode():
        expected = psnr_y(tiny_model()(lr, scale=2).clamp(0, 1), spices()[1], 2)
    assert methods_of(first)["tiny"]["images"]["spices"]["psnr"] == pytest.approx(
        expected, abs=1e-3
    )

    lines = text.rstrip().splitlines()
    assert lines.pop() == "report: evaluation.json" and lines.pop() == ""
    assert lines.pop() == "*: LR made from HR by imresize, not the data set's own"
    assert lines.pop() == "" and lines[0].startswith("eval (3 images), PSNR Y / SSIM")
    assert lines[0].split()[-2:] == ["x2", "x3.7*"]
    assert [line.split()[0] for line in lines] == ["eval", "bicubic", "tiny"]
    bicubic = methods_of(first, 1)["bicubic"]
    assert lines[1].endswith(f"{bicubic['psnr']:.2f} / {bicubic['ssim']:.4f}")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_names_that_are_no_utf8(checkpoint, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"B\xe4ume")
    (tmp_path / name).mkdir()
    write_image(tmp_path / name / f"{name}.png", np.zeros((26, 30, 3), np.uint8))
    options = ["--checkpoint", checkpoint, "--data", name, "--scale", "2", "--noise", "3"]
    cli.guard(evaluate.main, options)
    report = json.loads(Path("evaluation.json").read_text())
    assert "B\\udce4ume" in capsys.readouterr().out and report["sets"][0]["name"] == name
    assert list(methods_of(report)["tiny"]["images"]) == [name]
    for argv in (["evaluation.json"], ["evaluation.json", "--csv"]):
        cli.guard(tables.main, argv)
        assert "B\\udce4ume" in capsys.readouterr().out


def test_the_table_and_the_report_do_not_lose_each_other(measured, monkeypatch, capsys):
    def full(*_):
        raise InputError("no space left")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="no space left"):
        patch.setattr(evaluate, "table", full)
        measured("--scale", 2)
    assert json.loads(Path("evaluation.json").read_text())["sets"]
    monkeypatch.setattr(evaluate, "write_atomic", full)
    with pytest.raises(InputError, match="no space left"):
        measured("--scale", 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["eval", "bicubic", "tiny"]


def test_csv_and_markdown(measured, capsys):
    measured("--scale", 2, 3, output="new/r")
    assert capsys.readouterr().out.splitlines()[-1] == "report: new/r"
    tables.main(["new/r", "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 2 * 2 * len(NAMES) and rows[-1]["method"] == "tiny"
    tables.main(["new/r"])
    assert "| **tiny** | measured |" in capsys.readouterr().out
    with pytest.raises(InputError, match="none must be a report of evaluate.py, but: .*No such"):
        tables.main(["none"])


def test_the_hash_tells_weights_apart():
    model = tiny_model()
    before = describe.describe_model(model, "a")
    assert before == describe.describe_model(tiny_model(), "a")
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3
    assert before["sha256"] != describe.describe_model(model, "a")["sha256"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *who, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "gsr"
    package.mkdir()
    module = package / "describe.py"
    module.write_text("1")
    monkeypatch.setattr(describe, "__file__", str(module))
    assert describe._commit() is None
    git("init")
    assert describe._commit() is None  # no commit yet
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "v1")
    assert describe._commit() == git("rev-parse", "HEAD")
    module.write_text("2")
    assert describe._commit() == git("rev-parse", "HEAD") + "-dirty"
    # A package installed below somebody's repository is not of its commit.
    (tmp_path / "lib/gsr").mkdir(parents=True)
    monkeypatch.setattr(describe, "__file__", str(tmp_path / "lib/gsr/describe.py"))
    assert describe._commit() is None


# ---- what is refused before the work ------------------------------------------------------------


def test_images_of_the_sets_are_not_overwritten(measured, tmp_path, monkeypatch):
    shutil.copytree(DATA, "deep")
    shutil.copytree(DATA / "HR", "flat")
    before = files_below(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load", never)
        for option, path in [
            ("--output", "deep/HR/otter.png"), ("--output", "flat/a/b.PNG"), ("--save", "."),
            ("--output", "flat/spices.png"), ("--save", "flat"), ("--save", "x/../flat"),
        ]:  # fmt: skip
            with pytest.raises(InputError, match=f"{option} would write .* among the images of"):
                options = ["--output", "r.json", option, path]
                measured("--data", "deep", "flat", "--scale", "2", *options)
    assert files_below(tmp_path) == before
    # A report may lie beside the images, and results beside HR and LR_bicubic.
    measured("--scale", 2, "--save", ".", data="deep", output="flat/r.json")
    assert len(open_set("deep", [2]).images) == len(NAMES) and Path("deep/x2").exists()


@pytest.mark.parametrize("option", ["--output", "--save"])
def test_folders_are_tried_before_the_work(measured, tmp_path, monkeypatch, option):
    (tmp_path / "closed").mkdir()
    make = tempfile.TemporaryFile

    def refuse(dir):  # by mode bits, root would still pass
        if Path(dir).name == "closed":
            raise PermissionError(13, "Permission denied")
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(evaluate, "load", never)
    with pytest.raises(InputError, match="closed may not be written to"):
        measured(option, "closed/report.json" if option == "--output" else "closed")
    with pytest.raises(InputError, match="File name too long"):
        measured(option, "x" * 300)


def test_refusals(measured, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no weights for perceptual metrics
    for more, part in [
        (["--scale", "0"], "from 1"),
        (["--scale", "nan"], "from 1"),
        (["--scale", "21"], "otter.png at x21: "),
        (["--threads", "0"], "--threads must be from 1 to 1024, not 0"),
        (["--device", "meta"], "device meta is none of"),
        (["--data", "x" * 300], "File name too long"),
        (["--data", str(DATA), str(DATA)], "two data folders"),
        (["--data", str(tmp_path)], "holds no image"),
        (["--limit", "0"], "--limit"),
        (["--output", str(tmp_path)], "is a folder; name the file to write"),
        (["--save", f"{checkpoint}/config.json"], "cannot be made"),
        (["--checkpoint", "none"], "none: there is no such model"),
        (["--perceptual", "lpips"], "lpips (--perceptual) needs"),
    ]:
        with pytest.raises(InputError) as error:
            measured(*more)
        assert part in str(error.value)
    for more in (["--protocol", "set5"], ["--jpeg", "good"]):
        with pytest.raises(SystemExit) as stop:
            measured(*more)
        assert stop.value.code == 2
    assert list(tmp_path.iterdir()) == []


# ---- processes ----------------------------------------------------------------------------------


def start(folder, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, ROOT / "evaluate.py", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def finish(*children):
    """(stdout, stderr, exit code) of each."""
    try:
        return [(*child.communicate(timeout=120), child.returncode) for child in children]
    finally:
        for child in children:
            child.kill()


def ranks(count, folder, *arguments):
    """What `evaluate.py` does as so many processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return finish(*(
        start(
            folder, *arguments, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            WORLD_SIZE=str(count), RANK=str(rank), LOCAL_WORLD_SIZE=str(count),
            LOCAL_RANK=str(rank),
        )
        for rank in range(count)
    ))  # fmt: skip


def test_script(checkpoint, tmp_path):
    options = ["--checkpoint", checkpoint, "--data", str(DATA), "--limit", "1", "--scale"]
    good, bad = finish(start(tmp_path, *options, "2"), start(tmp_path, *options, "0"))
    assert good[2] == 0, good[1]
    assert good[0].startswith("eval (1 image), PSNR Y / SSIM")
    assert bad[2] == 2 and "Traceback" not in bad[1] and "from 1 to 1000" in bad[1]


def test_every_image_belongs_to_one_process(monkeypatch):
    for count in (1, 2, 3, 8):
        monkeypatch.setattr(distributed, "world_size", lambda: count)  # noqa: B023
        shares = []
        for rank in range(count):
            monkeypatch.setattr(distributed, "rank", lambda: rank)  # noqa: B023
            shares += distributed.shard(NAMES)
        assert sorted(shares) == NAMES


def test_two_processes_give_the_report_of_one(measured, checkpoint, tmp_path, capsys):
    options = [
        "--scale",
        "2",
        "3.7",
        "--threads",
        "1",
        "--ensemble",
        "--noise",
        "4",
        "--jpeg",
        "50",
    ]
    threads = torch.get_num_threads()
    try:
        one = measured(*options)
    finally:
        torch.set_num_threads(threads)
    alone = capsys.readouterr().out
    os.rename("evaluation.json", "one.json")
    options += ["--checkpoint", checkpoint, "--data", str(DATA), "--device", "cpu"]
    done = ranks(2, tmp_path, *options, "--save", "images")
    assert [code for *_, code in done] == [0, 0], done
    assert done[0][0] == alone and done[1][0] == ""
    assert without_seconds(one) == without_seconds(json.loads(Path("evaluation.json").read_text()))
    assert len(list((tmp_path / "images").rglob("*.png"))) == 2 * 2 * len(NAMES)


@pytest.mark.slow
def test_a_process_that_fails_tells_the_others(checkpoint, tmp_path):
    shutil.copytree(DATA, tmp_path / "copy")
    path = tmp_path / "copy/HR/skyline.png"  # the second process's
    path.write_bytes(path.read_bytes()[:-500])  # found when it is decoded, not by its header
    options = ["--checkpoint", checkpoint, "--data", "copy", "--scale", "2"]
    done = ranks(2, tmp_path, *options)
    assert [code for *_, code in done] == [2, 2]
    (told,) = [stderr for _, stderr, _ in done if "skyline.png" in stderr]
    assert "Traceback" not in "".join(stderr for _, stderr, _ in done) and "gsr: error: " in told
    assert not (tmp_path / "evaluation.json").exists()


def test_world_size_without_torchrun(measured, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE is 2.*torchrun"):
        measured()


# ---- the benchmark sets, where they are at hand -------------------------------------------------


@pytest.mark.skipif(
    "GSR_BENCHMARKS" not in os.environ, reason="set GSR_BENCHMARKS to Set5's parent"
)
def test_bicubic_figures_of_set5(measured):
    # The literature's 33.66, 30.39 and 28.42 resize luma instead of RGB and round the result.
    report = measured(data=Path(os.environ["GSR_BENCHMARKS"]) / "Set5")
    figures = [methods_of(report, row)["bicubic"]["psnr"] for row in range(3)]
    assert figures == pytest.approx([33.68, 30.41, 28.43], abs=0.006)
    assert figures == pytest.approx([33.66, 30.39, 28.42], abs=0.03)
