"""The benchmarks at their smallest sizes: what they write fits the schema, and they count right."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from bench import autotune, cost, figures, plot, schema, splat
from gsr.errors import InputError

PNG = b"\x89PNG"


@pytest.fixture
def static():
    pytest.importorskip("triton")
    from bench import static

    if not hasattr(static.splat.splat_forward, "cache_key"):
        pytest.skip("kernels are interpreted in this process")
    return static


@pytest.fixture
def configs():
    pytest.importorskip("triton")
    from gsr.kernels import configs

    configs._read.cache_clear()
    return configs


# ---- splat --------------------------------------------------------------------------------------


def test_splat_writes_a_report_and_its_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # half a minute saved
    path = tmp_path / "splat.json"
    splat.main(
        ["--case", "direct-tiny", "--device", "cpu", "--rounds", "3", "--seconds", "0"]
        + ["--output", str(path)]
    )
    report = schema.load(path)
    assert {r["provider"] for r in report["rows"]} == {"reference", "compiled reference", "cpu"}
    assert {r["direction"] for r in report["rows"]} == set(splat.DIRECTIONS)
    for r in report["rows"]:
        assert r["passes"] > 0 and r["share"]["memory"] > 0
    assert report["limits"]["bandwidth"] > 0
    assert "direct-tiny" in capsys.readouterr().out

    pytest.importorskip("matplotlib")
    plot.main([str(path), "-o", str(tmp_path / "splat.png")])
    assert (tmp_path / "splat.png").read_bytes().startswith(PNG)


def test_what_is_too_large_for_the_reference_is_said():
    case = splat.CASES["direct-x4-2040x1356"]
    found = splat.providers(case, torch.device("cpu"), 2**30)
    assert "GiB" in found["reference"] and callable(found["cpu"])


def test_unknown_case():
    with pytest.raises(InputError, match="no case nonsense"):
        splat.main(["--case", "nonsense"])


@pytest.mark.parametrize("name", ["direct-tiny", "field-tiny", "direct-points"])
def test_bytes_are_those_of_the_tensors(name):
    case = splat.CASES[name]
    arguments = splat.inputs(case, torch.device("cpu"))
    s = case.shape
    out = s.b * s.C * (s.points or s.H * s.W) * 4
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    assert cost.forward_bytes(s) == sum(t.nbytes for t in tensors) + out


def test_operations_of_one_weight():
    one = cost.Shape(K=1, C=3, R=0, h=1, w=1, H=1, W=1, normalize=False)
    assert one.weights == 1
    assert cost.forward_operations(one) == 2 + 7 + 3 + 2 * 3
    assert cost.forward_operations(replace(one, R=1)) == 9 * cost.forward_operations(one)


# ---- static -------------------------------------------------------------------------------------


def test_static_report(static, tmp_path, monkeypatch, capsys):
    some = [x for x in static.shipped("sm_90") if x[0] == "splat_backward"][:1]
    monkeypatch.setattr(static, "shipped", lambda *_: some)
    path, page = tmp_path / "static.json", tmp_path / "page.md"
    page.write_text("before\n<!-- static -->\nold\n<!-- /static -->\nafter\n")
    static.main(["--arch", "sm_90", "--no-model", "--output", str(path), "--document", str(page)])
    (row,) = schema.load(path)["rows"]
    assert row["seconds"] is None and row["resources"]["registers"] > 0
    assert row["loop"]["MUFU"] >= 1 and row["loop"]["LDG"] >= 1 and row["occupancy"] >= 4
    assert "not a measurement" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text


def test_model_counts_every_weight(static):
    use, chip = static.USES[0], static.CHIPS[1]
    s = cost.Shape(use.K, use.C, use.R, h=8, w=64, H=16, W=128)
    config = {"PY": 2, "PX": 2, "CELLS": 32, "num_warps": 1}
    compiled = static.compile_kernel(
        "splat_forward",
        {**use.constants(), "PREPARE": False, "PY": 2, "PX": 2, "CELLS": 32}, chip.arch, 1,
    )  # fmt: skip
    code = static.disassemble(compiled)
    assert static._hot(code)["MUFU.EX2"] == 4  # one for each of 2 x 2 pixels
    counted = static.count("splat_forward", config, code, s)
    # An exponential a weight, and besides only the reciprocals of 1 - rho^2, sigma and the weight.
    assert s.weights <= 32 * counted["mufu"] < 2.5 * s.weights
    row = static.model_row(chip, use, s, "forward", config)
    assert 0 < row["model"]["memory"] < row["model"]["issue"]
    assert 4 <= row["occupancy"] <= 64
    packed = static.configs.choose_packed(chip.arch, (2, 2), cells=(8, 64))
    row = static.model_row(chip, use, s, "packed splat", packed)
    assert 0 < row["model"]["mufu"] < row["model"]["issue"]


def test_occupancy(static):
    usage = {"registers": 128, "shared": 0}
    assert static.occupancy(usage, 1, "sm_90") == 16
    assert static.occupancy({**usage, "shared": 57 << 10}, 4, "sm_90") == 12
    assert static.occupancy({"registers": 32, "shared": 0}, 1, "sm_80") == 32  # blocks
    assert static.occupancy(usage, 1, "gfx942") == 16


# ---- schema -------------------------------------------------------------------------------------


def report(**row):
    return schema.report("splat", torch.device("cpu"), {}, [schema.row("a", "b", {}, **row)])


def test_schema_accepts_and_refuses(tmp_path):
    good = report(seconds={"p20": 1.0, "p50": 2.0, "p80": 2.0})
    schema.save(good, tmp_path / "good.json")
    assert schema.load(tmp_path / "good.json") == good
    with pytest.raises(ValueError, match="no note"):
        report()
    with pytest.raises(ValueError, match="quantiles"):
        report(seconds={"p20": 3.0, "p50": 2.0, "p80": 2.0})
    with pytest.raises(ValueError, match="invented"):
        report(note="none", invented=1)
    with pytest.raises(ValueError, match="lacks commit"):
        schema.check({k: v for k, v in good.items() if k != "commit"})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="bad.json"):
        schema.load(tmp_path / "bad.json")


# ---- autotune -----------------------------------------------------------------------------------


def test_candidates_that_spill_or_leave_few_warps_are_never_timed():
    found = autotune.candidates("forward", 4)
    assert {"PY": 4, "PX": 4, "CELLS": 32, "num_warps": 1} in found
    assert len({tuple(c.items()) for c in found}) == len(found)

    def usage(config):
        return {"spills": 8 * (config["PY"] * config["PX"] > 8), "registers": 64, "shared": 0}

    left = autotune.prune(found, usage, lambda config, used: 8 // config["num_warps"])
    assert left and all(c["PY"] * c["PX"] <= 8 and c["num_warps"] <= 2 for c in left)


def test_the_fastest_candidate_is_selected(static):
    from triton.runtime.errors import OutOfResources

    times = {1: 3.0, 2: OutOfResources(300000, 232448, "shared memory"), 4: 1.0, 8: 2.0}

    def timer(config):
        if isinstance(times[config["PX"]], Exception):
            raise times[config["PX"]]
        return times[config["PX"]]

    assert autotune.select([{"PX": n} for n in times], timer) == ({"PX": 4}, 1.0)
    with pytest.raises(InputError, match="none of the candidates"):
        autotune.select([{"PX": 2}], timer)


def test_autotune_without_a_gpu_prints_what_survives(static, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = {"CELLS": 32, "num_warps": 1}
    monkeypatch.setattr(autotune, "candidates", lambda *_: [one])
    with pytest.raises(InputError, match="needs a CUDA device"):
        autotune.main(["--use", "direct", "--kind", "backward", "--scale", "2"])
    assert "32 / 1" in capsys.readouterr().out


def test_tuned_configurations_count_only_on_request(configs, tmp_path, monkeypatch):
    cpu, sizes = torch.device("cpu"), {"scale": (4.0, 4.0), "channels": 3}
    shipped = configs.splat_config("forward", cpu, **sizes)
    tuned = {**shipped, "CELLS": 128}
    path = tmp_path / "gaussiansr" / "tuned.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"configs": {"default/forward/4/4x4": tuned}}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GSR_AUTOTUNE", raising=False)
    monkeypatch.delenv("GSR_TUNED", raising=False)
    assert configs.splat_config("forward", cpu, **sizes) == shipped
    monkeypatch.setenv("GSR_AUTOTUNE", "1")
    assert configs.splat_config("forward", cpu, **sizes) == tuned
    assert configs.splat_config("backward", cpu, **sizes)["num_warps"] == 1  # not in the file
    monkeypatch.setenv("GSR_TUNED", str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="bench.autotune"):
        configs.splat_config("forward", cpu, **sizes)


def test_shipped_blocks_suit_their_cells(configs):
    scales = (0.4, 1, 1.5, 2, 2.1, 3, 3.9, 4, 4.1, 5, 6.5, 9, 30)
    for channels in (1, 3, 4, 8, 16, 33):
        for sy in scales:
            for sx in scales:
                py, px = configs.choose_block((sy, sx), channels)
                assert 1 <= py <= math.ceil(sy) and 1 <= px <= math.ceil(sx)
                assert configs.fits(py, px, channels)


@pytest.mark.parametrize("scale, least", [(4, 1), (5, 1), (4.1, 0.75), (2.5, 0.65), (3.3, 0.65)])
def test_few_pixels_of_a_block_are_spare(configs, scale, least):
    """Of the bundled model: whole numbers need all of them, others most."""
    py, px = configs.choose_block((scale, scale), 3)
    part = scale % 1
    rows = (1 - part) * math.ceil(scale // 1 / py) + part * math.ceil(math.ceil(scale) / py)
    slots = rows * py * math.ceil(math.ceil(scale) / px) * px
    assert scale**2 / slots >= least


# ---- plots --------------------------------------------------------------------------------------


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    figures.main(["-o", str(tmp_path / "cells.png")])
    assert (tmp_path / "cells.png").read_bytes().startswith(PNG)


def test_drawing_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"gaussiansr\[bench\]"):
        plot.pyplot()
