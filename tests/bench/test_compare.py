"""Comparisons of tiny trainings: the table is what was measured, and nothing is done twice."""

import csv
import json
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import evaluate
import train
from bench import compare, comparison, cost
from gsr import runs
from gsr.config import (
    BankConfig,
    DecoderConfig,
    DirectConfig,
    EncoderConfig,
    LIIFConfig,
    LTEConfig,
    ModelConfig,
    load_config,
)
from gsr.errors import InputError
from gsr.io.image import read_image, write_image
from gsr.models import GaussianSR

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "tests" / "data" / "photos"
EVAL = ROOT / "tests" / "data" / "eval"
RESULT = "comparison.json"
SCRIPTS = {"train.py": train, "evaluate.py": evaluate}
called = []  # (script, run) in this process


def in_process(name, *argv):
    """`run_script` without the seconds that a process takes to start."""
    text = " ".join(map(str, argv))
    called.append((name, next(run for run in text.replace('"', "/").split("/") if "-seed" in run)))
    SCRIPTS[name].main([*map(str, argv)])


def hurry(patch):
    patch.setattr(compare, "run_script", in_process)
    patch.setattr(compare, "TIMED", (16, 4))
    patch.setattr(train, "keep_memory", lambda: None)
    patch.setattr(runs, "open_board", lambda *_: runs._NoBoard())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    hurry(monkeypatch)
    called.clear()


def write_config(path, name, gaussians=1, **changes):
    content = {
        "name": name,
        "model": {
            "mode": "direct",
            "encoder": {"n_feats": 4, "n_blocks": 1},
            "direct": {"gaussians": gaussians, "width": 4},
        },
        "data": {"train": str(PHOTOS), "val_count": 1, "patch": 12, "queries": 64, "batch": 2,
                 "workers": 0},
        "train": {"steps": 3, "lr": 1e-2, "schedule": "cosine", "warmup": 0, "save_every": 1,
                  "threads": 1, "log_every": 1, "val_every": 3},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, key = key.partition("__")
        content[section][key] = value
    path.write_text(yaml.safe_dump(content))
    return path


def both(folder, **changes):
    """Two configs in a folder, the second with changes."""
    folder.mkdir(exist_ok=True)
    return [
        write_config(folder / "a.yaml", "a"),
        write_config(folder / "b.yaml", "b", gaussians=2, **changes),
    ]


def compared(configs, output, *more):
    """Run bench.compare; what comparison.json holds then."""
    options = ["--eval", EVAL, "--scale", 2, 4, "--seeds", 2, "--limit", 2, "-o", output]
    compare.main([str(part) for part in ("--configs", *configs, *options, *more)])
    return json.loads((output / "comparison.json").read_text())


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison: its folder, configs and report."""
    folder = tmp_path_factory.mktemp("compare")
    configs = both(folder)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        report = compared(configs, folder / "out")
    return folder / "out", configs, report


@pytest.fixture
def copied(done, tmp_path):
    out, configs, _ = done
    shutil.copytree(out, tmp_path / "out")
    for path in tmp_path.rglob("config.yaml"):  # the folder has another name
        path.write_text(path.read_text().replace(str(out), str(tmp_path / "out")))
    return tmp_path / "out", configs


def test_the_table_is_what_was_measured(done):
    out, _, report = done
    assert [row["method"] for row in report["methods"]] == ["bicubic", "a", "b"]
    text = (out / "comparison.md").read_text()
    lines = list(csv.DictReader(open(out / "comparison.csv", newline="")))
    for row, line in zip(report["methods"], lines, strict=True):
        name = row["method"]
        values = {2: [], 4: []}
        for seed in (0, 1):
            folder = out / f"{'a' if name == 'bicubic' else name}-seed{seed}"
            (data,) = json.loads((folder / "evaluation.json").read_text())["sets"]
            for scale in data["scales"]:
                label = name if name == "bicubic" else f"{folder.name}/model"
                values[scale["scale"]].append(scale["methods"][label]["psnr"])
        for scale, found in values.items():
            if name == "bicubic":
                assert line[f"eval x{scale} psnr std"] == "" and found[0] == found[1]
                found = found[:1]
            else:
                std = float(line[f"eval x{scale} psnr std"])
                assert std == pytest.approx(statistics.stdev(found)) and std > 0
            for key, expected in (("mean", np.mean(found)), ("min", min(found))):
                assert float(line[f"eval x{scale} psnr {key}"]) == pytest.approx(expected)
            assert f"{np.mean(found):.2f}" in text
        if name != "bicubic":
            assert row["finished"] == row["seeds"] == 2 and line["parameters"] != ""
            assert row["training_seconds"] > 0 and f"| {row['parameters']:,} |" in text
        assert float(line["upscaling_seconds"]) > 0
    assert "*: LR made from HR" in text and "Failed" not in text and "differ" not in text
    assert set(report["results"]) == {"a-seed0", "b-seed0", "a-seed1", "b-seed1"}


def test_a_run_is_an_ordinary_training(done, tmp_path):
    out, configs, _ = done
    train.main(
        ["--config", str(configs[0]), "name=plain", "train.seed=1", f"output={tmp_path}"]
    )  # fmt: skip
    assert same(weights(out / "a-seed1"), weights(tmp_path / "plain"))


def test_nothing_is_done_twice(copied):
    out, configs = copied
    files = {p: p.read_bytes() for p in out.glob("*-seed*/**/*") if p.is_file()}
    compared(configs, out)
    assert called == [] and all(p.read_bytes() == content for p, content in files.items())
    compared(configs, out, "--scale", 3, "--jpeg", 50)  # measured, not trained, again
    assert [name for name, _ in called] == ["evaluate.py"] * 4
    called.clear()
    compared(configs, out, "--scale", 3, "--jpeg", 50, "--seeds", 3)  # only what is new
    assert called == [(n, r) for r in ("a-seed2", "b-seed2") for n in ("train.py", "evaluate.py")]
    called.clear()
    (out / "a-seed0" / RESULT).unlink()  # trained to its last step, then interrupted
    report = compared(configs[:1], out, "--scale", 3, "--jpeg", 50)
    assert called == [("evaluate.py", "a-seed0")] and set(report["results"]) == {
        "a-seed0", "a-seed1",
    }  # fmt: skip


def test_other_images_are_measured_again_but_not_trained_for(copied, tmp_path):
    out, configs = copied
    data = tmp_path / "eval"
    shutil.copytree(EVAL, data)
    options = ["--eval", data, "--scale", 2]
    first = compared(configs, out, *options)
    called.clear()
    assert compared(configs, out, *options)["results"] == first["results"] and called == []
    lr = data / "LR_bicubic/X2/otterx2.png"
    write_image(lr, 255 - read_image(lr))
    other = compared(configs, out, *options)
    assert [name for name, _ in called] == ["evaluate.py"] * 4
    assert other["methods"][0] != first["methods"][0]


def test_an_interrupted_comparison_goes_on(done, tmp_path, monkeypatch):
    out, _, _ = done
    configs, step, steps = both(tmp_path), train.training_step, []

    def interrupted(*args, **more):
        if len(steps) == 5:  # in b-seed0, after two of its steps
            raise KeyboardInterrupt
        steps.append(more["step"])
        return step(*args, **more)

    monkeypatch.setattr(train, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(configs, tmp_path / "out")
    report = json.loads((tmp_path / "out" / RESULT).read_text())
    assert [row.get("finished") for row in report["methods"]] == [None, 1, 0]
    assert "| b (0 of 2 seeds) |" in (tmp_path / "out/comparison.md").read_text()
    steps.clear()
    monkeypatch.setattr(train, "training_step", lambda *args, **more: (
        steps.append(more["step"]), step(*args, **more))[1])  # fmt: skip
    compared(configs, tmp_path / "out")
    assert steps == [3, 1, 2, 3, 1, 2, 3]
    for run in ("a-seed0", "b-seed0", "b-seed1"):
        assert same(weights(tmp_path / "out" / run), weights(out / run))


def test_a_failed_run_is_named_and_costs_no_other(tmp_path, capsys):
    configs = both(tmp_path, train__lr=1e30)
    out, options = tmp_path / "out", ["--seeds", 1, "--scale", 2]
    with pytest.raises(InputError, match=r"differ in train.lr \(.*b.yaml\); .*--allow-differences"):
        compared(configs, out, *options)
    assert not out.exists()
    with pytest.raises(InputError, match="1 runs failed .b-seed0: .* by step"):
        compared(configs, out, *options, "--allow-differences")
    text = (out / "comparison.md").read_text()
    assert text in capsys.readouterr().out and "The trainings differ in train.lr" in text
    assert "\n* b-seed0: " in text and "| b (0 of 1 seeds) |  |" in text
    rows = {row["method"]: row for row in csv.DictReader(open(out / "comparison.csv"))}
    assert rows["b"]["finished"] == "0" and rows["b"]["eval x2 psnr mean"] == ""
    assert float(rows["a"]["eval x2 psnr mean"]) > 10


def test_a_bug_in_one_run_costs_no_other(tmp_path, monkeypatch, capsys):
    def buggy(name, *argv):
        if "a-seed0" in str(argv):
            raise ZeroDivisionError
        in_process(name, *argv)

    monkeypatch.setattr(compare, "run_script", buggy)
    with pytest.raises(InputError, match="1 runs failed .a-seed0: ZeroDivisionError"):
        compared(both(tmp_path), tmp_path / "out", "--seeds", 1)
    assert "Traceback" in capsys.readouterr().err
    assert "| a (0 of 1 seeds) |" in (tmp_path / "out/comparison.md").read_text()


# ---- scripts ------------------------------------------------------------------------------------


def test_run_script_says_why_a_script_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    for code, sentence in [
        ("sys.stderr.write('50%\\r'); sys.exit('gsr: error: no space left')", "no space left"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("sys.exit(3)", "s.py ended with exit code 3"),
    ]:
        (tmp_path / "s.py").write_text(f"import sys; print(*sys.argv[1:])\n{code}\n")
        with pytest.raises(InputError) as error:
            compare.run_script("s.py", "a b", 2)
        assert str(error.value) == sentence and "a b 2\n" in capsys.readouterr().err
    (tmp_path / "s.py").write_text("")
    compare.run_script("s.py")


@pytest.mark.slow
def test_as_processes(done, tmp_path, monkeypatch):
    monkeypatch.undo()
    out, configs, _ = done
    compared(configs[:1], tmp_path / "out", "--seeds", 1)
    assert same(weights(out / "a-seed0"), weights(tmp_path / "out/a-seed0"))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [("data__patch", 13), ("data__scale_max", 3.0), ("train__steps", 4), ("train__clip", 1.0),
     ("train__schedule", "step"), ("train__accumulate", 2), ("train__threads", 2),
     ("train__device", "cpu"), ("data__workers", 1)],
)  # fmt: skip
def test_differences_are_named(key, value, tmp_path):
    with pytest.raises(InputError, match=rf"{key.replace('__', '.')}(\.name)? \(.*b.yaml\)"):
        compared(both(tmp_path, **{key: value}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def plan(configs, *more):
    """The runs of a comparison that is not begun."""
    found = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(compare, "check_same_runs", lambda runs: found.extend(runs) or 1 / 0)
        compared(configs, Path("nowhere"), "--allow-differences", *more)
    return found


def test_what_may_differ(tmp_path):
    same = {"data__cache": "none", "train__log_every": 7, "train__seed": 9,
            "train__gamma": 0.1, "train__epochs": 3}  # fmt: skip
    assert compare.differences(plan(both(tmp_path, **same))) == []
    # What the arguments name is the same everywhere.
    configs = both(tmp_path, train__steps=9, data__train="nowhere", data__val="nowhere",
                   train__threads=2, train__device="cuda")  # fmt: skip
    found = plan(configs, "--steps", 2, "--data", PHOTOS, "--threads", 1, "--device", "cpu")
    assert compare.differences(found) == []
    for run in found:
        c = run.config
        assert (c.data.train, c.data.val, c.train.steps) == (str(PHOTOS), None, 2)
    assert [run.config.name for run in found] == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]


def test_another_config_does_not_go_on_with_a_run(copied, tmp_path):
    out, configs = copied
    table = (out / RESULT).read_bytes()
    for key, value in (("train__steps", 5), ("train__accumulate", 2)):
        others = both(tmp_path / key, **{key: value})
        with pytest.raises(InputError, match=f"seed0 was started with another {key[:5]}.{key[7:]}"):
            compared(others, out, "--allow-differences")
    changed = write_config(tmp_path / "a.yaml", "a", gaussians=3)
    with pytest.raises(InputError, match="a-seed0 was started with another model.direct.gaussians"):
        compared([changed, configs[1]], out)
    assert (out / RESULT).read_bytes() == table and called == []


def test_refusals(tmp_path, monkeypatch):
    configs = both(tmp_path)
    shutil.copytree(EVAL, tmp_path / "eval")
    write_image(tmp_path / "eval/LR_bicubic/X2/otterx2.png", np.zeros((27, 33, 3), np.uint8))
    for options, sentence in [
        (["--seeds", 0], "--seeds must be at least 1"),
        (["--scale", 0.5], "scale"),
        (["--scale", 21], "otter.png at x21"),
        (["--jpeg", 0], "JPEG quality"),
        (["--eval", tmp_path / "none"], "no such folder"),
        (["--eval", EVAL, EVAL], "two data folders .--eval."),
        (["--eval", tmp_path / "eval"], "otterx2.png has 33 x 27 pixels, which is not"),
        (["--data", tmp_path / "none"], "no such folder"),
        (["--configs", configs[0], configs[0]], "both have the name a"),
        (["--configs", write_config(tmp_path / "c.yaml", "bicubic")], "c.yaml: bicubic is a row"),
    ]:
        with pytest.raises(InputError, match=sentence):
            compared(configs, tmp_path / "out", *options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        compared(configs, tmp_path / "out")
    assert not (tmp_path / "out").exists() and called == []


# ---- costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_cost_by_hand(mode):
    """A convolution at LR has as many multiply-adds a pixel as weights."""
    c, d, widths = 12, 8, [6, 10]
    config = ModelConfig(
        mode=mode,
        encoder=EncoderConfig(n_feats=c, n_blocks=2),
        direct=DirectConfig(gaussians=3, radius=2, width=7),
        bank=BankConfig(points=16),
        decoder=DecoderConfig(hidden_dim=d, hidden_list=widths),
    )
    state = torch.random.get_rng_state()
    found = cost.model_cost(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found["parameters"] == sum(p.numel() for p in GaussianSR(config).parameters())
    encoder = 9 * (3 * c + 5 * c * c)
    if mode == "direct":
        assert found["lr_macs"] == encoder + 9 * c * 7 + 7 * 3 * 9
        assert found["hr_macs"] == 0 and found["splat_weights"] == 3 * 25
        return
    decoder = 9 * c * 2 * d + d * 6 + 6 * 10 + 10 * 3
    # Choosing a Gaussian is a product with the bank, too: 16 by 4 numbers.
    assert found["lr_macs"] in (encoder + 9 * c * 16, encoder + 9 * c * 16 + 16 * 4)
    assert abs(found["hr_macs"] - decoder) < 0.01 * decoder and found["splat_weights"] == 49


@pytest.mark.parametrize(
    "mode, lr_macs, hr_macs",
    [
        # LIIF's first layer is a convolution at LR; four codes go through the others.
        ("liif", 9 * 32 * 64, 4 * (64 * 64 + 64 * 3)),
        ("lte", 9 * 32 * 2 * 64, 4 * (64 * 64 + 64 * 64 + 64 * 3)),
        # Without a splat coef and freq are convolutions at HR.
        ("bicubic", 0, 9 * 32 * 2 * 64 + 64 * 64 + 64 * 64 + 64 * 3),
    ],
)
def test_cost_of_heads_without_gaussians_by_hand(mode, lr_macs, hr_macs):
    """With the widths of configs/compare."""
    widths = {"hidden_dim": 64, "hidden_list": [64, 64]}
    config = ModelConfig(
        mode=mode,
        encoder=EncoderConfig(n_feats=32, n_blocks=4),
        liif=LIIFConfig(hidden_list=[64, 64]),
        lte=LTEConfig(**widths),
        decoder=DecoderConfig(**widths),
    )
    found, encoder = cost.model_cost(config), 9 * (3 * 32 + 9 * 32 * 32)
    assert found["lr_macs"] == encoder + lr_macs and found["splat_weights"] is None
    assert abs(found["hr_macs"] - hr_macs) < 0.002 * hr_macs


def test_heads_that_are_compared_are_those_of_the_configs():
    for name, mode in (("liif", "liif"), ("lte", "lte"), ("no-splat", "bicubic")):
        model = load_config(ROOT / "configs/compare" / f"{name}.yaml").model
        section = model.decoder if mode == "bicubic" else getattr(model, mode)
        assert model.mode == mode and section.hidden_list == [64, 64]
        assert getattr(section, "hidden_dim", 64) == 64
        assert (model.encoder.n_feats, model.encoder.n_blocks) == (32, 4)


def test_training_seconds_are_those_of_the_steps(tmp_path):
    rows = [
        {"kind": "train", "step": 10, "steps_per_second": 5.0},
        {"kind": "val", "step": 10, "psnr": 20.0},
        {"kind": "train", "step": 30, "steps_per_second": 2.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.training_seconds(tmp_path) == 2 + 10


# ---- spread and plot ----------------------------------------------------------------------------


def test_spread():
    assert compare.spread([1.0, 2.0, 4.5]) == {
        "mean": 2.5, "std": pytest.approx(1.8027756), "min": 1, "max": 4.5,
    }  # fmt: skip
    assert compare.spread([3.0])["std"] is None
    assert set(compare.spread([3.0, None]).values()) == {None}


def test_gains_are_over_bicubic_scale_by_scale():
    def row(**means):
        return {f"S {scale} psnr mean": mean for scale, mean in means.items()}

    bicubic = row(x2="30", x3="29", x4="28", x6="")
    method = row(x2="31", x3="", x4="28.5", x6="27")
    method |= {f"S {scale} psnr std": "" for scale in ("x2", "x4")} | {"S x4 psnr std": "0.25"}
    scales = ["x4", "x2", "x3", "x6"]
    assert comparison.gains(method, bicubic, "S", scales=scales) == [(2, 1, 0), (4, 0.5, 0.25)]


def test_with_and_without_matplotlib(copied, monkeypatch):
    pytest.importorskip("matplotlib")
    out, configs = copied
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for name in ("comparison.png", "comparison.md"):
        (out / name).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (out / "a-seed0" / RESULT).unlink()
    compared(configs, out)
    assert (out / "comparison.md").exists() and not (out / "comparison.png").exists()


def test_models_with_an_encoder_of_ones_own(tmp_path, monkeypatch):
    """Each script is told to import what the config names, and so is the comparison itself."""
    own = "tests.own_parts"
    config = write_config(tmp_path / "a.yaml", "a", model__encoder={"name": f"{own}.Plain"})

    def forgetful(name, *argv):
        in_process(name, *argv)
        sys.modules.pop(own, None)

    sys.modules.pop(own, None)
    monkeypatch.setattr(compare, "run_script", forgetful)
    report = compared([config], tmp_path / "out", "--seeds", 1)
    assert not report["errors"] and [*report["results"]] == ["a-seed0"]
