"""`python -m bench training`: its report, and that it counts what it says."""

from pathlib import Path

import pytest
import torch

from bench import schema, training
from gsr.config import EncoderConfig, ModelConfig
from gsr.models import GaussianSR

ROOT = Path(__file__).parents[2]


def test_report(tmp_path, capsys):
    argv = [
        "--config", str(ROOT / "configs" / "smoke.yaml"), "--rounds", "2", "--seconds", "0.05",
        f"data.train={ROOT / 'tests' / 'data' / 'photos'}", "data.patch=12", "data.queries=64",
        "data.batch=2", "train.threads=1", "--output", str(tmp_path / "r.json"),
    ]  # fmt: skip
    training.main(argv)
    said = capsys.readouterr().out
    assert said.startswith("smoke: convolutions ") and "waiting for data" in said
    (row,) = schema.load(tmp_path / "r.json")["rows"]
    # EDSR of 16 channels and two blocks, the head of 16; 2 patches of 12 x 12, both ways.
    weights = 3 * 16 * 9 + 5 * 16 * 16 * 9 + 16 * 16 * 9 + 16 * 4 * 9
    assert row["operations"] == 6 * 2 * 12 * 12 * weights
    rates = row["rates"]
    assert rates["share"] == pytest.approx(rates["step"] / rates["convolutions"])
    assert rates["step"] == pytest.approx(row["operations"] / row["seconds"]["p50"])
    assert 0 <= rates["waiting"] <= 1


def test_the_convolutions_are_those_of_the_encoder(monkeypatch):
    torch.manual_seed(0)
    model = GaussianSR(ModelConfig(encoder=EncoderConfig("span", n_feats=4, n_blocks=2)))
    seen, real = [], torch.nn.Conv2d.forward

    def forward(self, x):
        seen.append(self.weight.shape)
        return real(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    run = training.convolutions(model, 2, 8, torch.float32)
    seen.clear()
    run()
    want = [p.shape for p in model.encoder.parameters() if p.ndim == 4 and p.shape[1] != 3]
    assert sorted(seen) == sorted(want)
