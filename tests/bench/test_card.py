"""Figures in documents: those of a report, and only of a report on the bundled weights."""

import json

import pytest

from bench import card
from gsr.describe import describe_model
from gsr.errors import InputError
from gsr.models import checkpoint
from gsr.models.checkpoint import save_model

TEXT = "# Model\n<!-- figures -->\nold\n<!-- /figures -->\nthe end\n"


def cell(psnr, ssim):
    return {"psnr": psnr, "ssim": ssim}


@pytest.fixture
def report(tiny_model):
    scales = [
        {"scale": 2, "methods": {"bicubic": cell(33.681, 0.93), "lite": cell(37.2, 0.9561)}},
        {"scale": 3, "methods": {"bicubic": cell(30.4, 0.86), "lite": cell(33.999, 0.92)}},
    ]
    return {
        "protocol": {"name": "benchmark"},
        "models": {"lite": describe_model(tiny_model, "lite")},
        "sets": [{"name": "Set5", "images": 5, "scales": scales}],
    }


@pytest.fixture
def documents(tmp_path, monkeypatch, tiny_model, report):
    """Two documents and a report in a folder, and the tiny model as the bundled one."""
    save_model(tmp_path / "bundled", tiny_model)
    monkeypatch.setitem(checkpoint.BUNDLED, "lite", tmp_path / "bundled")
    paths = [tmp_path / "one.md", tmp_path / "two.md"]
    for path in paths:
        path.write_text(TEXT)
    monkeypatch.setattr(card, "DOCUMENTS", paths)
    monkeypatch.setattr(card, "REPORT", tmp_path / "report.json")
    card.REPORT.write_text(json.dumps(report))
    return paths


def test_main(documents):
    card.main()
    filled, other = (path.read_text() for path in documents)
    assert filled.startswith("# Model\n<!-- figures -->\n| Set5 | x2 | x3 |\n|---|---|---|\n")
    assert filled.endswith("\n<!-- /figures -->\nthe end\n") and "old" not in filled
    assert "| bicubic | 33.68 / 0.9300 | 30.40 / 0.8600 |" in filled
    assert "| **gsr-lite** | 37.20 / 0.9561 | 34.00 / 0.9200 |" in filled
    assert "| VDSR (Kim et al., CVPR 2016), published | 37.53 | 33.66 |" in filled
    card.main()
    assert filled == other == documents[0].read_text()


def test_refusals(documents, report):
    lite = report["models"]["lite"]
    for section, value, sentence in [
        ("protocol", {"name": "div2k"}, "its protocol is div2k"),
        ("protocol", {"name": "benchmark", "degradation": {}}, "benchmark, of degraded LR"),
        ("models", {"lite": lite, "mine": lite}, "its models are lite, mine; measure lite alone"),
        ("models", {"lite": {**lite, "sha256": "0" * 64}},
         f"000000000000. are not the bundled ones .{lite['sha256'][:12]}"),
    ]:  # fmt: skip
        card.REPORT.write_text(json.dumps({**report, section: value}))
        with pytest.raises(InputError, match=sentence):
            card.main()
    card.REPORT.write_text(json.dumps(report))
    documents[1].write_text("no marks")
    with pytest.raises(InputError, match="two.md must hold <!-- figures -->"):
        card.main()
    card.REPORT.unlink()
    with pytest.raises(InputError, match="No such file"):
        card.main()
    assert documents[0].read_text() == TEXT  # all or nothing
