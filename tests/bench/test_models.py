"""The page of the bundled models: its tables are the reports' figures, of these weights."""

import json

import pytest

from bench import models
from gsr.describe import describe_model
from gsr.errors import InputError
from gsr.models.checkpoint import load

PSNR = {"bicubic": 30.0, "lite": 32.5, "photo": 32.25}


def report(jpeg=None, **less):
    """A report in which every method loses `less` dB, the others as in PSNR."""
    methods = {
        name: {"psnr": value - less.get(name, 0), "ssim": 0.9, "seconds": 100.0}
        for name, value in PSNR.items()
    }
    rows = [{"scale": scale, "lr": "paired", "methods": methods} for scale in (2, 4)]
    protocol = {"name": "benchmark"}
    if jpeg is not None:
        protocol["degradation"] = {"jpeg": jpeg, "noise": None}
    return {
        "protocol": protocol,
        "models": {name: describe_model(load(name), name) for name in ("lite", "photo")},
        "sets": [{"name": "B100", "images": 100, "scales": rows}],
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "RESULTS", tmp_path)
    for name, content in {
        "clean": report(), "jpeg-30": report(30, lite=2.75, photo=2), "jpeg-90": report(90, lite=1),
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_tables(results):
    clean, jpeg = models.read_reports()
    assert list(jpeg) == [90, 30]
    lines = models.jpeg_table(clean, jpeg).splitlines()
    assert lines[0] == "| B100, gain over bicubic, dB | clean | quality 90 | quality 30 |"
    assert lines[2] == "| x2, gsr-lite | +2.50 | +1.50 | -0.25 |"
    assert lines[3] == "| x2, gsr-photo | +2.25 | +2.25 | +0.25 |"
    assert "| gsr-photo | 32.25 / 0.9000 | 32.25 / 0.9000 |" in models.clean_tables(clean)


def test_plots(results):
    pytest.importorskip("matplotlib")
    found = models.plots(*models.read_reports())
    assert len(found) == 3 and all(data.startswith(b"\x89PNG") for data in found.values())


def test_reports_of_other_weights_are_refused(results):
    other = report(50)
    other["models"]["photo"]["sha256"] = "0" * 64
    (results / "jpeg-50.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="jpeg-50.json: the weights measured as photo .*again"):
        models.read_reports()
    (results / "jpeg-50.json").write_text("{")
    with pytest.raises(InputError, match="must be a report of evaluate.py"):
        models.read_reports()
