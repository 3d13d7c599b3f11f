"""The benchmark of the network at its smallest sizes, and the baselines it compares with."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from bench import network, plot, published, schema
from bench.__main__ import main
from gsr.config import ModelConfig
from gsr.errors import InputError
from gsr.models import GaussianSR

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def official():
    """A model in which every part of the published algorithm shows in the result."""
    torch.manual_seed(0)
    model = GaussianSR(ModelConfig(mode="official")).eval()
    with torch.no_grad():
        model.encoder.head[0].weight.mul_(3)
        model.head.bank.rho.uniform_(-0.6, 0.6)
        model.head.bank.opacity.uniform_(0, 2)
        for layer in (model.head.decoder.coef, *model.head.decoder.layers[::2]):
            layer.weight.mul_(2)
        model.head.decoder.phase.weight.normal_(0, 0.3)
    return model


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(
        network, "in_process", lambda what, **arguments: network.MEASURES[what](**arguments)
    )


# ---- baselines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 2.5, 3.3, 7])
def test_published_gives_the_image_of_official(official, scale):
    lr = torch.rand(2, 3, 15, 9, generator=torch.Generator().manual_seed(1))
    size = tuple(round(n * scale) for n in lr.shape[-2:])
    with torch.inference_mode():
        want = official.render(official.encode(lr), size, scale=scale)
    assert want.std() > 0.05
    assert (published.Published(official, None)(lr, size, scale) - want).abs().max() < 1e-5
    chunk = size[0] * size[1] // 2 - 1  # three calls, the last of them short
    assert (published.Published(official, chunk)(lr, size, scale) - want).abs().max() < 1e-5


def test_published_wants_the_published_model(official):
    with pytest.raises(InputError, match="mode official"):
        published.Published(network.make_model("direct"))
    with pytest.raises(InputError, match="chunk"):
        published.Published(official, 0)


def test_the_pass_is_the_encoder(official):
    lr = torch.rand(1, 3, 8, 9)
    with torch.inference_mode():
        got = published.edsr(official.encoder.state_dict(), lr)
        assert torch.allclose(got, official.encoder(lr), atol=1e-5)


def test_liif_interpolates_between_pixels():
    """With a decoder that hands on the middle of what it is given, LIIF is bilinear."""
    features = torch.rand(2, 3, 6, 7)
    middle = slice(4, 27, 9)
    got = published.liif_render(features, lambda x: x[..., middle], (24, 28), chunk=100)
    want = F.interpolate(features, (24, 28), mode="bilinear", align_corners=False)
    assert torch.allclose(got, want, atol=1e-5)


def test_liif_sees_neighbourhood_coordinate_and_cell():
    seen = []

    def mlp(x):
        seen.append(x)
        return x[..., :3]

    published.liif_query(torch.rand(1, 2, 4, 5), mlp, torch.zeros(1, 1, 2), (8, 20))
    assert [x.shape[-1] for x in seen] == [9 * 2 + 4] * 4
    for x in seen:
        assert torch.allclose(x[0, 0, -2:], torch.tensor([1.0, 0.5]))  # 2 h / H and 2 w / W
    # The middle of the image: between two rows of pixels, on a column of them.
    away = torch.stack([x[0, 0, -4:-2] for x in seen])
    assert torch.allclose(away[:, 0].abs(), torch.ones(4), atol=1e-4)
    assert published.liif_mlp()[0].in_features == 580


# ---- figures ------------------------------------------------------------------------------------


def test_multiply_adds_by_formula(official):
    assert network.macs(official) == (1_218_240 + 57_600, 557_824)
    direct = network.make_model("direct")
    assert network.macs(direct) == (1_218_240 + 64 * 64 * 9 + 64 * 36, 0)


def test_unit_is_timed_around_every_run(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(network.time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        def run():
            clock[0] += seconds() if callable(seconds) else seconds

        return run

    drift = iter([1, 1, 1, 3])  # warm twice, then before and after
    times = network.interleave({"a": takes(6.0)}, takes(lambda: next(drift)), 1, 0)
    assert times == {"a": ([6.0], [3.0])}


def test_memory_is_that_of_the_peak():
    """In a process of its own: others may have left freed memory, which is used first."""
    code = (
        "import torch; from bench import network\n"
        "before = network.resident('VmRSS')\n"
        "exact = network.forget_peak()\n"
        "torch.ones(40 << 18)\n"  # 40 MB, gone again
        "print(exact, network.resident('VmHWM') - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=network.ROOT, capture_output=True, text=True, check=True
    )
    exact, peak = done.stdout.split()
    if exact == "False":
        pytest.skip("this kernel does not forget the peak")
    assert 35e6 < int(peak) < 70e6


def test_a_process_of_its_own():
    found = network.in_process("memory", provider="direct", side=14, scale=2, chunk=1000)
    assert 0 <= found["memory"] < 100e6


# ---- the command --------------------------------------------------------------------------------


def test_report_tables_and_image(tmp_path, in_this_process, capsys):
    path, page = tmp_path / "network.json", tmp_path / "page.md"
    page.write_text("before\n<!-- network -->\nold\n<!-- /network -->\nafter\n")
    main(["network", "--quick", "--output", str(path), "--document", str(page)])
    report = schema.load(path)
    assert {r["part"] for r in report["rows"]} == set(network.TABLES)
    ran = [r for r in report["rows"] if r["part"] == "time" and r["seconds"]]
    assert {r["provider"] for r in ran} == {*network.MODES, *network.PUBLISHED, "LIIF"}
    assert all(r["passes"] > 0 and r["share"]["arithmetic"] > 0 for r in ran)
    sizes = [r for r in report["rows"] if r["part"] == "size"]
    assert len(sizes) == 6 and all(r["rss"] > 5e7 and r["per_pixel"] > 0 for r in sizes)
    assert all(r["ratio"] > 0 for r in report["rows"] if r["part"] == "training")
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "published, as shipped" in text and "LIIF" in capsys.readouterr().out

    page.write_text("<!-- network --><!-- /network -->")
    main(["network", "--from", str(path), "--document", str(page)])
    assert text.split("\n", 2)[2].startswith(page.read_text().split("\n", 2)[1])

    pytest.importorskip("matplotlib")
    plot.main([str(path), "-o", str(tmp_path / "network.png")])
    assert (tmp_path / "network.png").read_bytes().startswith(PNG)
    report["rows"] = ran
    schema.save(report, path)
    plot.main([str(path), "-o", str(tmp_path / "time.png")])
    assert (tmp_path / "time.png").read_bytes().startswith(PNG)


def test_goals_name_rows_of_the_full_plan():
    plan = network.Plan()
    cases = {("time", f"{side}x{side} x{scale}") for side, scale, _ in plan.time}
    cases |= {("size", f"{side}x{side} x4") for side in plan.size}
    cases |= {("training", f"{plan.patch}x{plan.patch} x{scale}") for scale in (2, 4)}
    cases |= {("memory", f"{plan.memory}x{plan.memory} x4")}
    assert {key[:2] for key in network.GOALS} == cases

    row = {"part": "time", "case": "96x96 x4", "provider": "direct", "passes": 1.4}
    row["sizes"] = {"dtype": "float32"}
    assert network.goal(row, "passes") == "1.5, met"
    assert network.goal({**row, "passes": 1.6}, "passes") == "1.5, missed"
    assert network.goal({**row, "case": "14x14 x4"}, "passes") == ""


def test_only_some_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "memory_rows", lambda *_: pytest.fail("not asked for"))
    monkeypatch.setattr(network, "training_rows", lambda *_: [])
    path = tmp_path / "network.json"
    main(["network", "--quick", "--part", "training", "--output", str(path)])
    assert json.loads(path.read_text())["rows"] == []
    main(["network", "--quick", "--part", "time", "--method", "direct", "--output", str(path)])
    assert {r["provider"] for r in schema.load(path)["rows"]} == {"direct"}


def test_wrong_use(tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(InputError, match="must be a page"):
        main(["network", "--quick", "--document", str(page)])
    page.write_text("nothing")
    with pytest.raises(InputError, match="once each"):
        main(["network", "--quick", "--document", str(page)])
    with pytest.raises(InputError, match="rounds"):
        main(["network", "--rounds", "0"])
    other = tmp_path / "other.json"
    schema.save(schema.report("splat", torch.device("cpu"), {}, []), other)
    with pytest.raises(InputError, match="report of splat"):
        main(["network", "--from", str(other)])
