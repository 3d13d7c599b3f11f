"""Comparisons of tiny trainings: the table is what was measured, and nothing is done twice."""

import csv
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from gsr.training import Loss, Trainer
from safetensors.torch import load_file

from gsr import cli, compare
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
from gsr.evaluation import evaluate
from gsr.io.image import read_image, write_image
from gsr.models import GaussianSR
from gsr.models.checkpoint import load_model

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
            assert cell["lr"] == ("paired" if cell["scale"] == 2 else "imresize")
            assert float(line[f"{where} psnr mean"]) == cell["psnr"]["mean"]
            assert float(line[f"{where} ssim mean"]) == cell["ssim"]["mean"]
            assert f"{cell['psnr']['mean']:.2f}" in text
    assert rows[0]["parameters"] == "" and rows[0]["eval x2 psnr std"] == ""
    assert f"{report['methods'][1]['parameters']:,}" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 5
    assert "Failed" not in text and "differ" not in text
    assert "| eval x2 | eval x4* |" in table[0] and "*: LR made from HR" in text


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
    assert "* b-seed0: the output no longer depends on the encoder by step" in text
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
    table = (out / "comparison.json").read_bytes()
    with pytest.raises(InputError, match="a-seed0 was started with another model.direct.width"):
        compared([tmp_path / "a.yaml", configs[1]], out)
    for key, value in (("steps", 5), ("accumulate", 2)):  # `official` feels micro-batches
        others = both(tmp_path / key, **{f"train__{key}": value})
        with pytest.raises(InputError, match=f"b-seed0 was started with another train.{key}:"):
            compared(others, out, allow_differences=True)
    assert all(torch.equal(before[k], v) for k, v in weights(out / "a-seed0").items())
    assert (out / "comparison.json").read_bytes() == table


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.glob("comparison.*")}


def test_a_table_is_not_replaced_by_a_poorer_one(done, tmp_path, monkeypatch, capsys):
    out, configs, _ = done
    shutil.copytree(out, tmp_path / "out")
    out, whole = tmp_path / "out", files_of(tmp_path / "out")
    # Runs are bound to their folder by name only: `output` may change.
    with pytest.raises(InputError, match=r"not asked for now \(b-seed0, b-seed1\).*--seeds.*-o"):
        compared(configs[:1], out)
    with pytest.raises(InputError, match=r"not asked for now \(a-seed1, b-seed1\)"):
        compared(configs, out, seeds=1)
    assert files_of(out) == whole

    def train(config, *_):
        raise InputError("no")

    # Another config may join; the first table that is written has all that the old one had.
    monkeypatch.setattr(compare, "train", train)
    written, write = [], compare.write
    monkeypatch.setattr(compare, "write", lambda report, folder: (
        written.append([e["folder"] for e in report["runs"] if "result" in e]),
        write(report, folder)))  # fmt: skip
    c = write_config(tmp_path / "c.yaml", "c", gaussians=3)
    compared([c, *configs], out)
    assert all(runs == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"] for runs in written)
    # Measured anew, the old one stands until all that it lists is measured.
    written.clear()
    measured, measure = [], evaluate

    def interrupted(*args, **options):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(args)
        return measure(*args, **options)

    before = files_of(out)
    monkeypatch.setattr(compare, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared([c, *configs], out, scales=[3])
    assert written == [] and files_of(out) == before

    def unreadable(*args, **options):
        raise InputError("no")

    monkeypatch.setattr(compare, "evaluate", unreadable)
    compared([c, *configs], out, scales=[4])
    assert written == [] and files_of(out) == before
    argv = ["compare", "--configs", *map(str, configs), "--eval", str(EVAL), "--scale", "4"]
    argv += ["--seeds", "2", "--limit", "1", "-o", str(out)]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(argv)
    printed, err = capsys.readouterr()
    assert "* a-seed0: no" in printed and "table:" not in printed
    assert "runs failed" in err and "the table above says why" in err and files_of(out) == before


def test_other_pictures_are_measured_again_but_not_trained_for(done, tmp_path, monkeypatch):
    _, configs, _ = done
    data = tmp_path / "eval"
    shutil.copytree(EVAL, data)
    options = {"sets": [data], "scales": [2], "seeds": 1, "limit": None}
    first = compared(configs, tmp_path / "out", **options)
    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("trained again"))
    measured = []
    monkeypatch.setattr(compare, "evaluate", lambda *args, **more: (
        measured.append(args), evaluate(*args, **more))[1])  # fmt: skip
    assert compared(configs, tmp_path / "out", **options)["runs"] == first["runs"]
    assert measured == []
    lr = data / "LR_bicubic/X2/otterx2.png"
    write_image(lr, 255 - read_image(lr))
    other = compared(configs, tmp_path / "out", **options)
    assert len(measured) == 2
    assert other["methods"][0]["sets"] != first["methods"][0]["sets"]
    shutil.copy(data / "HR/otter.png", data / "HR/zebra.png")
    shutil.copy(lr, data / "LR_bicubic/X2/zebrax2.png")
    more = compared(configs, tmp_path / "out", **options)
    assert len(measured) == 4
    assert {e["result"]["sets"][0]["pictures"] for e in more["runs"]} == {4}
    seconds = {r["runs"][0]["result"]["training_seconds"] for r in (first, more)}
    assert len(seconds) == 1


def test_bad_pictures_are_found_before_the_training(done, tmp_path, monkeypatch):
    _, configs, _ = done
    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("trained first"))
    shutil.copytree(EVAL, tmp_path / "eval")
    write_image(tmp_path / "eval/LR_bicubic/X2/skylinex2.png", np.zeros((27, 33, 3), np.uint8))
    options = {"sets": [tmp_path / "eval"], "scales": [2], "limit": None}
    with pytest.raises(InputError, match="skylinex2.png has 33 x 27 pixels, which is not"):
        compared(configs, tmp_path / "out", **options)
    with pytest.raises(InputError, match="otter.png at x21"):
        compared(configs, tmp_path / "out", scales=[2, 21])
    assert not (tmp_path / "out").exists()


def test_torchrun_is_refused(done, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        compared(done[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [("data__patch", 13), ("data__scale_max", 3.0), ("train__steps", 4), ("train__clip", 1.0),
     ("train__schedule", "step"), ("train__accumulate", 2), ("train__threads", 2),
     ("train__device", "cpu"), ("data__workers", 1)],
)  # fmt: skip
def test_differences_are_named(key, value, tmp_path):
    configs = both(tmp_path, **{key: value})
    with pytest.raises(InputError, match=key.replace("__", ".")) as error:
        compared(configs, tmp_path / "out")
    assert "--allow-differences" in str(error.value) and not (tmp_path / "out").exists()


def test_what_may_differ(tmp_path):
    same = {"data__cache": False, "train__log_every": 7, "train__seed": 9,
            "train__gamma": 0.1, "train__epochs": 3}  # fmt: skip
    methods = compare.read_methods(both(tmp_path, **same))
    assert compare.differences(methods) == []
    # What the arguments name is the same everywhere.
    configs = both(tmp_path, train__steps=9, data__train="nowhere", data__val="nowhere",
                   train__threads=2, train__device="cuda")  # fmt: skip
    methods = compare.read_methods(configs, steps=2, data=PHOTOS, threads=1, device="cpu")
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
    with pytest.raises(InputError, match="c.yaml has the name bicubic"):
        compared([*configs, write_config(tmp_path / "c.yaml", "bicubic")], tmp_path / "out")
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
    found, encoder = compare.cost(config), 9 * (3 * 32 + 9 * 32 * 32)
    assert found["lr_macs"] == encoder + lr_macs and found["splat_weights"] is None
    assert abs(found["hr_macs"] - hr_macs) < 0.002 * hr_macs


def test_heads_that_are_compared_are_those_of_the_configs():
    for name, mode in (("liif", "liif"), ("lte", "lte"), ("no-splat", "bicubic")):
        model = load_config(ROOT / "configs/compare" / f"{name}.yaml").model
        section = model.decoder if mode == "bicubic" else getattr(model, mode)
        assert model.mode == mode and section.hidden_list == [64, 64]
        assert getattr(section, "hidden_dim", 64) == 64
        assert (model.encoder.n_feats, model.encoder.n_blocks) == (32, 4)


def test_training_time_is_that_of_the_steps(tmp_path):
    rows = [
        {"kind": "start", "step": 0, "place": "cpu, 1 thread"},
        {"kind": "train", "step": 10, "steps_per_second": 5.0},
        {"kind": "val", "step": 10, "psnr": 20.0},
        {"kind": "train", "step": 30, "steps_per_second": 2.0},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.training_time(tmp_path) == (2 + 10, "cpu, 1 thread")
    assert compare.training_time(tmp_path / "none") == (None, None)
    for other in ("cpu, 2 threads", "cpu, 1 thread"):
        rows.append({"kind": "start", "step": 30, "place": other})
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert compare.training_time(tmp_path) == (None, None)


def test_what_is_compiled_at_first_is_not_timed(tmp_path, monkeypatch):
    config = compare.read_methods(both(tmp_path)[:1])[0].run(tmp_path, 0)
    forward, calls = Loss.forward, []

    def slow_at_first(self, batch):
        time.sleep(0.0 if calls else 1.0)
        calls.append(batch)
        return forward(self, batch)

    monkeypatch.setattr(Loss, "forward", slow_at_first)
    compare.train(config, tmp_path / config.name, "here")
    seconds, place = compare.training_time(tmp_path / config.name)
    assert len(calls) == 3 + 1 and 0 < seconds < 1 and place == "here"
    assert torch.equal(calls[0].lr, calls[1].lr)  # the first step's, for its shapes


def test_times_are_those_of_one_place():
    def entry(method, seconds, where):
        times = {"training_seconds": seconds, "training_on": where}
        times |= {"upscaling_seconds": 2 * (seconds or 1), "upscaling_on": where}
        return {"method": method, "result": {**times, "sets": []}}

    runs = [entry("a", 4.0, "cpu, 1 thread"), entry("a", 8.0, "cpu, 1 thread"),
            entry("b", 4.0, "cpu, 1 thread"), entry("b", 4.0, "cpu, 2 threads"),
            entry("c", None, "cpu, 1 thread")]  # fmt: skip
    bicubic = {"upscaling_seconds": 1.0, "upscaling_on": "cpu, 1 thread"}
    costs = {name: {"parameters": 1} for name in "abc"}

    def table(runs):
        rows = compare._rows(runs, costs, bicubic, 2)
        report = {"methods": rows, "runs": [], "differences": [], "timed": "T",
                  "protocol": {"name": "p", "psnr": {"colour": "Y"}}}  # fmt: skip
        return rows, compare.markdown(report)

    rows, text = table(runs)
    assert rows[1]["training_seconds"] == 6 and rows[1]["upscaling_seconds"] == 12
    assert "training_seconds" not in rows[2] and "training_seconds" not in rows[3]
    assert "; both on cpu, 1 thread." in text and "| 6 s | 12 s |" in text
    _, text = table([*runs[:2], runs[3]])
    assert "| 6 s (cpu, 1 thread) | 12 s (cpu, 1 thread) |" in text
    assert "| 4 s (cpu, 2 threads) | 8 s (cpu, 2 threads) |" in text
    assert "on what, stands beside it" in text and "both on" not in text


def test_times_are_of_where_they_were_taken(done, tmp_path):
    out, configs, first = done
    trained = first["runs"][0]["result"]["training_on"]
    ended = tmp_path / "out" / "a-seed0"  # trained to its last step, then interrupted
    shutil.copytree(out / "a-seed0", ended)
    before = torch.get_num_threads()
    try:
        for threads, where in ((1, "cpu, 1 thread"), (2, "cpu, 2 threads")):
            (ended / "comparison.json").unlink()
            (tmp_path / "out" / "comparison.json").unlink(missing_ok=True)
            methods = compare.read_methods(configs[:1], threads=threads)
            report = compare.compare(methods, tmp_path / "out", [EVAL], [2], 1, limit=1)
            result = report["runs"][0]["result"]
            assert result["training_seconds"] > 0 and result["training_on"] == trained
            assert result["upscaling_on"] == report["methods"][1]["upscaling_on"] == where
    finally:
        torch.set_num_threads(before)


def test_durations():
    assert compare._duration(0.1234) == "0.123 s"
    assert compare._duration(6180) == "1 h 43 min"
    assert compare._duration(125) == "2 min" and compare._duration(None) == ""


# ---- plot ---------------------------------------------------------------------------------------


def test_plot(done):
    pytest.importorskip("matplotlib")
    out, _, _ = done
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_gains_are_over_bicubic_scale_by_scale():
    def cell(name, scale, mean, std=None):
        return {"set": name, "scale": scale, "psnr": {"mean": mean, "std": std}}

    row = {"sets": [cell("S", 4, 28.5, 0.25), cell("S", 2, 31), cell("T", 2, 9), cell("S", 3, None),
                    cell("S", 6, 27)]}  # fmt: skip
    below = {("S", 2): 30, ("S", 3): 29, ("S", 4): 28, ("S", 6): None, ("T", 2): 8}
    assert compare.gains(row, "S", below) == ([2, 4], [1, 0.5], [0.0, 0.25])
    assert compare.gains({"sets": []}, "S", below) == ([], [], [])


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
