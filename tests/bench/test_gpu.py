"""`make gpu` without a GPU: rehearsed on the CPU; launches with tensors of no device."""

import argparse
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu, schema
from gsr.errors import InputError


@pytest.fixture
def args():
    return argparse.Namespace(device="cpu", quick=True)


def rows_of(name, tmp_path):
    job = gpu.Job(torch.device("cpu"), True, tmp_path)
    return list(gpu.PARTS[name][0](job))


def part(monkeypatch, function, name="rates", seconds=60):
    monkeypatch.setitem(gpu.PARTS, name, (function, seconds))


# ---- the parts ----------------------------------------------------------------------------------


def test_environment(tmp_path, monkeypatch, capsys):
    assert rows_of("environment", tmp_path) == []
    assert json.loads(capsys.readouterr().out.splitlines()[0])["numpy"]
    real = gpu.version
    monkeypatch.setattr(gpu, "version", lambda n: "2.6.1" if n == "torch" else real(n))
    with pytest.raises(InputError, match="gsr needs torch 2.7 or newer, not 2.6.1"):
        rows_of("environment", tmp_path)


def test_rates(tmp_path):
    rows = [{**row, "part": "rates"} for row in rows_of("rates", tmp_path)]
    assert {"copy", "bf16 product", "tf32 product", "fp32 product"} <= gpu.rates_of(rows).keys()
    assert torch.backends.cudnn.allow_tf32  # as it was


@pytest.mark.parametrize("name", ["cases", "tests", "autotune", "sanitizer"])
def test_parts_that_need_a_gpu_say_so(name, tmp_path):
    with pytest.raises(gpu.Skip, match="needs a GPU"):
        rows_of(name, tmp_path)


def test_models_agree_and_disagreement_fails(tmp_path, monkeypatch):
    assert rows_of("models", tmp_path) == []
    from gsr.models import GaussianSR

    moved = []
    to = GaussianSR.to
    monkeypatch.setattr(GaussianSR, "to", lambda self, *a: moved.append(self) or to(self, *a))
    forward = GaussianSR.forward
    monkeypatch.setattr(
        GaussianSR, "forward",
        lambda self, *a, **k: forward(self, *a, **k) + 0.1 * any(m is self for m in moved),
    )  # fmt: skip
    with pytest.raises(InputError, match="too far from the CPU: direct 1.0e-01"):
        rows_of("models", tmp_path)


def test_pipeline_and_training(tmp_path):
    rows = rows_of("pipeline", tmp_path) + rows_of("training", tmp_path)
    cases = {(r["case"], r["provider"]) for r in rows}
    for precision in ("fp32", "bf16"):
        assert {(f"720p x4: {n}", precision) for n in (*gpu.STEPS, "gsr.upscale")} <= cases
        assert ("training step", precision) in cases


def test_a_group_of_one(tmp_path, capsys, monkeypatch):
    assert rows_of("devices", tmp_path) == []
    assert "there is no second device" in capsys.readouterr().out
    import torch.distributed as dist

    wrapped = torch.nn.parallel.DistributedDataParallel

    def false(loss):
        loss.model.head.out.weight.data += 1
        return wrapped(loss)

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", false)
    with pytest.raises(InputError, match="a step in a group of one is .* from one without"):
        rows_of("devices", tmp_path)
    assert not dist.is_initialized()


TILES = """
import torch
from bench import tile
from gsr.ops import reference
from gsr.ops.arguments import Gaussians, Grid, Weighting
g = torch.Generator().manual_seed(0)
rand = lambda *shape: torch.rand(2, 3, *shape, 7, 5, generator=g)
values, sigma, rho = rand(3), rand(2) / 2 + 0.2, rand() - 0.5
opacity, offset = rand(), rand(2) - 0.5
for size, radius, normalize in (((28, 20), 1, True), ((23, 37), 2, False)):
    out = tile.splat(values, sigma, rho, opacity, size, offset, radius, normalize, 0.01)
    true = reference.splat(
        Gaussians(values, sigma, rho, opacity, offset), Grid(size, (0, size[0]), (0, 7)),
        Weighting(radius, normalize, 0.01),
    )
    assert (out - true).abs().max() < 1e-5, (out - true).abs().max()
"""


def test_the_kernel_by_tiles():
    pytest.importorskip("triton", reason="triton is not installed: there are no kernels")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TILES], env=environment, cwd=gpu.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


# ---- the command --------------------------------------------------------------------------------


def test_a_rehearsal(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path), "--part", "environment",
              "kernels", "sanitizer"])  # fmt: skip
    report = schema.load(tmp_path / "gpu.json")
    states = {n: p["state"] for n, p in report["protocol"]["parts"].items()}
    assert states == {"environment": "done", "kernels": "done", "sanitizer": "skipped"}
    assert {r["case"] for r in report["rows"]} == {c.name for c in gpu.kernel_cases(True)}
    text, out = (tmp_path / "gpu.md").read_text(), capsys.readouterr().out
    assert "| kernels | lite x4 | splat | forward and backward |" in text
    assert "splat lite x4: " in out and "failed: nothing" in out and "| sanitizer | skipped" in text
    assert not list(tmp_path.glob("*.part.json"))


def test_a_part_that_fails_or_hangs_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    found = {
        "environment": {"state": "done", "note": None, "rows": []},
        "cases": {"state": "failed", "note": "InputError: 2 cases\nfail", "rows": []},
        "rates": {"state": "done", "note": None, "rows": [
            schema.row("copy", "torch", {}, part="rates", bytes=2 * 10**12,
                       seconds=dict.fromkeys(("p20", "p50", "p80"), 1.0))]},
    }  # fmt: skip
    monkeypatch.setattr(
        gpu, "start_part", lambda name, *_: {**found[name], "seconds": 1.0, "output": "why"}
    )
    with pytest.raises(InputError, match="cases failed: see .*gpu.md"):
        gpu.main(["--device", "cpu", "--output", str(tmp_path), "--part", *found])
    out, text = capsys.readouterr().out, (tmp_path / "gpu.md").read_text()
    assert "failed: cases" in out and "copy 2000 GB/s" in out
    assert "| cases | failed | 1 | InputError: 2 cases fail |" in text
    assert "## cases\n\n```\nwhy" in text and "| 100.0% |" in text
    gpu.main(["--device", "cpu", "--output", str(tmp_path), "--part", "rates", "--seconds", "0"])
    assert "no time was left" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        gpu, "start_part",
        lambda *_: {"state": "failed", "note": None, "rows": [], "seconds": 0.0, "output": ""},
    )  # fmt: skip
    with pytest.raises(InputError, match="no GPU here; --device cpu --quick rehearses"):
        gpu.main(["--output", str(tmp_path)])


def test_what_a_part_leaves_behind(tmp_path, monkeypatch):
    job, result = gpu.Job(torch.device("cpu"), True, tmp_path), tmp_path / "rates.part.json"
    one = schema.row("copy", "torch", {}, note="none")

    def fails(job):
        yield one
        raise RuntimeError("out of luck")

    part(monkeypatch, fails)
    gpu.run_part("rates", job, result)
    found = json.loads(result.read_text())
    assert found == {
        "state": "failed", "note": "RuntimeError: out of luck", "rows": [{**one, "part": "rates"}],
    }  # fmt: skip


@pytest.mark.parametrize("code, note", [
    ("import time; time.sleep(60)", "stopped after 1 s"),
    ("import os; os.abort()", "its process ended with -6"),
])  # fmt: skip
def test_a_process_that_hangs_or_dies(code, note, tmp_path, args, monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", str(tmp_path / "python"))
    script = tmp_path / "python"
    import shutil

    script.write_text(f"#!/bin/sh\nexec {shutil.which('python3')} -c '{code}'\n")
    script.chmod(0o755)
    start = time.monotonic()
    found = gpu.start_part("rates", args, tmp_path, 1.0 if "sleep" in code else 30.0)
    assert (found["state"], found["note"]) == ("failed", note)
    assert time.monotonic() - start < 20


# ---- what would be launched ---------------------------------------------------------------------


def test_launches(monkeypatch):
    """Every launch gives the kernel all its arguments, on the device of the first."""
    pytest.importorskip("triton", reason="triton is not installed: nothing is launched")
    from gsr.kernels import configs, decode, splat, windows
    from gsr.ops.arguments import Gaussians, Grid, Weighting
    from gsr.ops.decode import DecoderWeights, Strip

    seen = []

    def launch(kernel, grid, *arguments, **constants):
        assert all(0 < n < 2**31 for n in grid)
        own = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        assert own.keys() - {"num_warps", "maxnreg"} == set(kernel.arg_names)
        assert len(arguments) + len(constants) == len(own)  # none of them twice
        for p in kernel.params:
            value = own[p.name]
            assert not isinstance(value, torch.Tensor) or (value.is_meta and not p.is_constexpr)
        seen.append(kernel.__name__)

    for module in (decode, splat, windows):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")

    def full(*shape):
        return torch.empty(2, 9, *shape, 30, 40, device="meta")

    gaussians = Gaussians(full(3), full(2), full(), full(), full(2))
    for values in (full(3), full(9)[:, :, :3], full(11)):
        g = gaussians._replace(values=values)
        grid, weighting = Grid((100, 133), (7, 50), (0, 30)), Weighting(1, True, 0.01)
        out = splat.forward(g, grid, weighting)
        assert out.shape == (2, values.shape[2], 43, 133)
        splat.backward(out, g, grid, weighting)
        out = splat.forward_at(g, torch.empty(2, 70, 2, device="meta"), weighting)
        splat.backward_at(out, g, torch.empty(2, 70, 2, device="meta"), weighting)
    features, kernels = (torch.empty(s, device="meta") for s in ((1, 8, 14, 21), (49, 5, 5)))
    out = windows.forward(features, kernels, (28, 28))
    windows.backward(out, features, kernels, (28, 28))
    for dtype in (torch.float32, torch.bfloat16):
        shapes = (9, 4, 128, 16), (4, 256, 256)
        conv, layers = (torch.empty(s, device="meta", dtype=dtype) for s in shapes)
        shapes = (4, 128), 128, (4, 256), (3, 256), 3, 28, 42
        others = (torch.empty(s, device="meta") for s in shapes)
        bias, phase, biases, last, last_bias, ry, rx = others
        weights = DecoderWeights(conv, bias, phase, layers, biases, last, last_bias, ry, rx)
        strip = Strip((28, 42), (3, 9), (0, 14))
        splatted, lr = (torch.empty(s, device="meta") for s in ((1, 3, 8, 42), (1, 0, 14, 21)))
        assert decode.forward(features, splatted, lr, weights, strip).shape == (1, 3, 6, 42)
    assert set(seen) == {
        "splat_forward", "splat_backward", "points_forward", "points_backward", "windows_weights",
        "windows_forward", "windows_backward_features", "windows_backward_weights",
        "decode_features", "decode_colours",
    }  # fmt: skip


def test_nothing_is_copied_that_a_head_has_cut():
    """Its colours are channels of the output of its convolution; the kernels take strides."""
    pytest.importorskip("triton", reason="triton is not installed: there are no kernels")
    from gsr.kernels import splat
    from gsr.ops.arguments import Gaussians

    whole = torch.rand(1, 2, 9, 4, 5)
    values, sigma, _, rho, opacity = whole.split((3, 2, 2, 1, 1), dim=2)
    laid_out = splat._laid_out(Gaussians(values, sigma, rho[:, :, 0], opacity[:, :, 0]))
    assert laid_out.values.data_ptr() == whole.data_ptr() and laid_out.sigma.is_contiguous()
    turned = splat._laid_out(Gaussians(values.mT, sigma.mT, rho[:, :, 0].mT, opacity[:, :, 0].mT))
    assert turned.values.is_contiguous() and turned.offset is None
