"""Comparisons of tiny trainings: the table is what was measured, and nothing is done twice."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from gsr import cli, compare
from gsr.checkpoint import load_model
from gsr.config import BankConfig, DecoderConfig, DirectConfig, EncoderConfig, ModelConfig
from gsr.errors import InputError
from gsr.evaluation import evaluate
from gsr.models import GaussianSR
from gsr.training import Trainer

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "tests" / "data" / "photos"
EVAL = ROOT / "tests" / "data" / "eval"


def hurry(patch):
    """Leave out what takes long and plays no part here: TensorBoard's pictures, large ones."""
    patch.setattr(compare, "TIMED", (16, 4))
    patch.setattr("gsr.training.open_board", lambda *_: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    hurry(monkeypatch)


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
        "train": {"steps": 3, "lr": 1e-2, "schedule": "cosine", "save_every": 1, "threads": 1,
                  "log_every": 1, "val_every": 3},
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


def compared(configs, output, **options):
    options = {"sets": [EVAL], "scales": [2, 4], "seeds": 2, "limit": 2, **options}
    return compare.compare(compare.read_methods(configs), output, **options)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison: its folder, configs and report."""
    folder = tmp_path_factory.mktemp("compare")
    configs = both(folder)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        report = compared(configs, folder / "out")
    return folder / "out", configs, report


def test_the_table_is_what_was_measured(done):
    out, _, report = done
    assert [row["name"] for row in report["methods"]] == ["bicubic", "a", "b"]
    for row in report["methods"][1:]:
        values = {2: [], 4: []}
        for seed in (0, 1):
            model = load_model(out / f"{row['name']}-seed{seed}" / "model")
            for scale in evaluate(model, EVAL, [2, 4], limit=2)["scales"]:
                values[scale["scale"]].append(scale["methods"]["model"]["psnr"])
        for cell in row["sets"]:
            v = values[cell["scale"]]
            expected = [np.mean(v), np.std(v, ddof=1), min(v), max(v)]
            assert cell["set"] == "eval" and v[0] != v[1]
            np.testing.assert_allclose(list(cell["psnr"].values()), expected, rtol=1e-7)
        assert row["finished"] == row["seeds"] == 2
        assert row["training_seconds"] > 0 and row["upscaling_seconds"] > 0
    bicubic = evaluate(None, EVAL, [2, 4], limit=2)["scales"]
    for cell, scale in zip(report["methods"][0]["sets"], bicubic, strict=True):
        assert cell["psnr"]["mean"] == scale["methods"]["bicubic"]["psnr"]
        assert cell["psnr"]["std"] is None
    assert weights(out / "a-seed0").keys() == weights(out / "a-seed1").keys()


def test_the_three_forms_agree(done):
    out, _, report = done
    assert json.loads((out / "comparison.json").read_text()) == report
    rows = list(csv.DictReader(open(out / "comparison.csv", newline="")))
    text = (out / "comparison.md").read_text()
    for row, line in zip(report["methods"], rows, strict=True):
        assert line["method"] == row["name"]
        for cell in row["sets"]:
            where = f"{cell['set']} x{cell['scale']}"
            assert float(line[f"{where} psnr mean"]) == cell["psnr"]["mean"]
            assert float(line[f"{where} ssim mean"]) == cell["ssim"]["mean"]
            assert f"{cell['psnr']['mean']:.2f}" in text
    assert rows[0]["parameters"] == "" and rows[0]["eval x2 psnr std"] == ""
    assert f"{report['methods'][1]['parameters']:,}" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 5
    assert "Failed" not in text and "differ" not in text


def test_a_run_is_an_ordinary_training(done, tmp_path):
    out, configs, _ = done
    (config, _) = (method.run(tmp_path, 1) for method in compare.read_methods(configs))
    Trainer(config).fit(progress=False)
    ours, theirs = weights(out / "a-seed1"), weights(tmp_path / "a-seed1")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_nothing_is_done_twice(done, monkeypatch):
    out, configs, report = done
    trained = []

    def train(config, *_):
        trained.append(config.name)
        raise InputError("no")

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    again = compared(configs, out)
    assert trained == []
    assert [e["result"] for e in again["runs"]] == [e["result"] for e in report["runs"]]
    # Another question is measured, but not trained, again.
    calls = []
    monkeypatch.setattr(compare, "evaluate", lambda *a, **_: calls.append(a) or {
        "name": "x", "scales": []})  # fmt: skip
    before = {p: p.read_bytes() for p in out.glob("*/comparison.json")}
    compared(configs, out, scales=[3])
    assert trained == [] and len(calls) == 4
    for path, content in before.items():
        path.write_bytes(content)
    compared(configs, out, seeds=3)  # only what is new
    assert trained == ["a-seed2", "b-seed2"]
    compared(configs, out)


def test_an_interrupted_comparison_goes_on(done, tmp_path, monkeypatch):
    out, _, _ = done
    configs, step, steps = both(tmp_path), Trainer._train_step, []

    def interrupted(self, *parts):
        if len(steps) == 5:  # in b-seed0, after two of its steps
            raise KeyboardInterrupt
        steps.append((self.folder.name, self.step))
        return step(self, *parts)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(configs, tmp_path / "out")
    assert [row["name"] for row in json.loads((tmp_path / "out/comparison.json").read_text())[
        "methods"]] == ["bicubic", "a", "b"]  # fmt: skip
    steps.clear()
    monkeypatch.setattr(Trainer, "_train_step", lambda self, *parts: (
        steps.append((self.folder.name, self.step)), step(self, *parts))[1])  # fmt: skip
    compared(configs, tmp_path / "out")
    assert steps[0] == ("b-seed0", 2) and len(steps) == 1 + 3 + 3
    for run in ("a-seed0", "b-seed0", "b-seed1"):
        ours, theirs = weights(tmp_path / "out" / run), weights(out / run)
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_failed_run_is_reported_and_costs_no_other(tmp_path, capsys):
    configs = [*both(tmp_path), write_config(tmp_path / "c.yaml", "c", train__clip=1e30)]
    fields = yaml.safe_load(configs[1].read_text())
    fields["train"]["lr"] = 1e30
    configs[1].write_text(yaml.safe_dump(fields))
    out = tmp_path / "out"
    argv = ["compare", "--configs", *map(str, configs), "--eval", str(EVAL), "--scale", "2"]
    argv += ["--seeds", "1", "--limit", "1", "-o", str(out)]
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and not out.exists()
    err = capsys.readouterr().err
    assert "train.lr (0.01 in" in err and "1e+30 in" in err and "--allow-differences" in err
    with pytest.raises(SystemExit) as caught:
        cli.main([*argv, "--allow-differences"])
    printed, err = capsys.readouterr()
    assert caught.value.code == 2 and err.splitlines()[-1].startswith(
        "gsr: error: 1 of 3 runs failed (b-seed0)"
    )
    text = (out / "comparison.md").read_text()
    assert text in printed and "The trainings differ in train.lr" in text
    assert "* b-seed0: loss or weights are not finite by step" in text
    rows = {row["method"]: row for row in csv.DictReader(open(out / "comparison.csv"))}
    assert rows["b"]["finished"] == "0" and rows["b"]["eval x2 psnr mean"] == ""
    assert float(rows["a"]["eval x2 psnr mean"]) > 10 and rows["c"]["finished"] == "1"


def test_a_bug_in_one_run_costs_no_other(tmp_path, monkeypatch, capsys):
    def train(config, *_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(compare, "train", train)
    report = compared(both(tmp_path), tmp_path / "out")
    assert [e["error"] for e in report["runs"]] == ["ZeroDivisionError: oh"] * 4
    assert "Traceback" in capsys.readouterr().err
    assert "| a | 0 of 2 |" in (tmp_path / "out/comparison.md").read_text()


def test_another_config_does_not_go_on_with_a_run(done, tmp_path):
    out, configs, _ = done
    changed = yaml.safe_load(configs[0].read_text())
    changed["model"]["direct"]["width"] = 6
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(changed))
    before = weights(out / "a-seed0")
    report = compared([tmp_path / "a.yaml"], out, seeds=1)
    assert "another model.direct.width" in report["runs"][0]["error"]
    assert all(torch.equal(before[k], v) for k, v in weights(out / "a-seed0").items())
    compared(configs, out)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [("data__patch", 13), ("data__scale_max", 3.0), ("train__steps", 4), ("train__clip", 1.0),
     ("train__schedule", "step")],
)  # fmt: skip
def test_differences_are_named(key, value, tmp_path):
    configs = both(tmp_path, **{key: value})
    with pytest.raises(InputError, match=key.replace("__", ".")) as error:
        compared(configs, tmp_path / "out")
    assert "--allow-differences" in str(error.value) and not (tmp_path / "out").exists()


def test_what_may_differ(tmp_path):
    same = {"data__workers": 1, "data__cache": False, "train__log_every": 7, "train__seed": 9,
            "train__gamma": 0.1, "train__epochs": 3}  # fmt: skip
    methods = compare.read_methods(both(tmp_path, **same))
    assert compare.differences(methods) == []
    # What the arguments name is the same everywhere.
    configs = both(tmp_path, train__steps=9, data__train="nowhere", data__val="nowhere")
    methods = compare.read_methods(configs, steps=2, data=PHOTOS, threads=1)
    assert compare.differences(methods) == []
    assert {m.config.data.train for m in methods} == {str(PHOTOS)}
    assert {m.config.train.steps for m in methods} == {2}


def test_refusals(tmp_path):
    configs = both(tmp_path)
    for options, sentence in [
        ({"seeds": 0}, "seeds"),
        ({"scales": [0.5]}, "scale"),
        ({"sets": [tmp_path / "none"]}, "no such folder"),
        ({"sets": [EVAL, EVAL]}, "are called eval"),
        ({"protocol": "x"}, "protocol 'x'"),
    ]:
        with pytest.raises(InputError, match=sentence):
            compared(configs, tmp_path / "out", **options)
    with pytest.raises(InputError, match="both have the name a"):
        compare.read_methods([configs[0], configs[0]])
    with pytest.raises(InputError, match="no such folder"):
        compare.read_methods(configs, data=tmp_path / "none")
    assert not (tmp_path / "out").exists()


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
    found = compare.cost(config)
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


def test_training_seconds_are_those_of_the_steps(tmp_path):
    rows = [
        {"kind": "train", "step": 10, "steps_per_second": 5.0},
        {"kind": "val", "step": 10, "psnr": 20.0},
        {"kind": "train", "step": 30, "steps_per_second": 2.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.training_seconds(tmp_path) == 2 + 10
    assert compare.training_seconds(tmp_path / "none") is None


def test_durations():
    assert compare._duration(0.1234) == "0.123 s"
    assert compare._duration(6180) == "1 h 43 min"
    assert compare._duration(125) == "2 min" and compare._duration(None) == ""


# ---- plot ---------------------------------------------------------------------------------------


def test_plot(done):
    pytest.importorskip("matplotlib")
    out, _, _ = done
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_are_tables(done, tmp_path, monkeypatch, capsys):
    out, configs, _ = done
    (out / "comparison.png").unlink(missing_ok=True)
    (out / "comparison.md").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cli.main(
        ["compare", "--configs", *map(str, configs), "--eval", str(EVAL), "--scale", "2", "4",
         "--seeds", "2", "--limit", "2", "-o", str(out)]
    )  # fmt: skip
    printed, err = capsys.readouterr()
    assert "gaussiansr[bench]" in err and f"table: {out / 'comparison.md'}" in printed
    assert (out / "comparison.md").exists() and not (out / "comparison.png").exists()
