"""Training end to end: it learns, it repeats itself, and SIGKILL costs nothing but time."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gsr.config import load_config
from gsr.errors import InputError
from gsr.training import VAL_SCALES, Trainer, learning_rate, validate

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "tests" / "data" / "photos"

TINY = [
    f"data.train={PHOTOS}", "data.patch=12", "data.queries=64", "data.batch=2",
    "data.val_count=1", "model.encoder.n_feats=4", "model.encoder.n_blocks=1",
    "model.direct.width=4", "train.threads=1",
]  # fmt: skip


def config(folder, *overrides):
    return load_config(ROOT / "configs" / "smoke.yaml", [f"output={folder}", *TINY, *overrides])


def weights(folder):
    return load_file(Path(folder) / "smoke" / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_learns_in_every_mode(tmp_path, mode):
    c = config(
        tmp_path, f"model.mode={mode}", "train.steps=60", "train.lr=3e-3", "train.log_every=10",
        "model.bank.points=9", "model.encoder.n_feats=12", "model.decoder.hidden_dim=16",
        "model.decoder.hidden_list=[16, 16]",
    )  # fmt: skip
    Trainer(c).fit(progress=False)
    rows = [json.loads(line) for line in open(tmp_path / "smoke" / "log.jsonl")]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    # `direct` starts from the bicubic enlargement, so that there is less for it to learn
    assert losses[-1] < losses[0] * (0.999 if mode == "direct" else 0.8)
    assert any(row["kind"] == "val" and row["psnr"] > 10 for row in rows)


def test_same_seed_same_weights(tmp_path):
    def run(name, *overrides):
        Trainer(config(tmp_path / name, "train.steps=6", *overrides)).fit(progress=False)
        return weights(tmp_path / name)

    first = run("a")
    assert same(first, run("b", "data.workers=1"))
    assert not same(first, run("c", "train.seed=1"))


@pytest.mark.parametrize("mode", ["direct", "official"])
def test_resume_is_exact(tmp_path, mode):
    """Stopped by the end of its steps and resumed; `official` draws Gumbel noise as it trains."""
    small = [
        f"model.mode={mode}", "train.save_every=3", "model.bank.points=9",
        "model.encoder.n_feats=12", "model.decoder.hidden_dim=16",
        "model.decoder.hidden_list=[16]", "train.schedule=step",
    ]  # fmt: skip
    Trainer(config(tmp_path / "whole", "train.steps=9", *small)).fit(progress=False)
    Trainer(config(tmp_path / "parts", "train.steps=6", *small)).fit(progress=False)
    Trainer(config(tmp_path / "parts", "train.steps=9", *small), resume=True).fit(progress=False)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_killed_and_resumed_is_never_killed(tmp_path):
    """SIGKILL at random moments, some of them inside a checkpoint's writing."""
    steps = ["train.steps=60", "train.save_every=1", "train.val_every=20", "train.log_every=5"]

    def command(folder, *extra):
        return [
            sys.executable, "train.py", "--config", "configs/smoke.yaml", *extra,
            f"output={folder}", *TINY, *steps,
        ]  # fmt: skip

    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    draw, kills = random.Random(0), 0
    state = tmp_path / "killed" / "smoke" / "state.pt"
    while kills < 3:
        extra = ["--resume"] if state.exists() else []
        run = subprocess.Popen(
            command(tmp_path / "killed", *extra),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before = state.stat().st_mtime_ns if state.exists() else 0
        while run.poll() is None and (
            not state.exists() or state.stat().st_mtime_ns == before
        ):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            kills += 1
        run.wait()
    done = subprocess.run(
        command(tmp_path / "killed", "--resume"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert not list((tmp_path / "killed" / "smoke").glob("**/.*"))
    log = [
        [json.loads(line) for line in open(tmp_path / run / "smoke" / "log.jsonl")]
        for run in ("whole", "killed")
    ]
    steps = [[(row["kind"], row["step"]) for row in rows] for rows in log]
    assert steps[0] == steps[1]


def test_schedules():
    c = config("unused").train
    c.schedule, c.lr, c.gamma, c.step_epochs, c.warmup = "step", 1.0, 0.5, 2, 0
    assert [learning_rate(c, s, 100, 3) for s in (0, 5, 6, 11, 12)] == [1, 1, 0.5, 0.5, 0.25]
    c.schedule = "cosine"
    assert learning_rate(c, 0, 100, 3) == 1
    assert abs(learning_rate(c, 50, 100, 3) - 0.5) < 1e-12
    assert learning_rate(c, 99, 100, 3) < 1e-3
    c.warmup = 10
    assert abs(learning_rate(c, 0, 10**9, 3) - 0.1) < 1e-6


def test_validation_measures(tmp_path):
    """A model that answers with the HR picture's own values, off by 0.1, has 20 dB."""

    class Off(torch.nn.Module):
        def forward(self, lr, size, scale):
            return torch.full((1, 3, *size), 0.6)

    hr = torch.full((1, 3, 48, 48), 0.5)
    pairs = [(s, hr[..., ::s, ::s], hr) for s in VAL_SCALES]
    for value in validate(Off(), pairs, torch.device("cpu")).values():
        assert abs(value - 20) < 1e-4


def test_refusals(tmp_path):
    Trainer(config(tmp_path, "train.steps=1")).fit(progress=False)
    with pytest.raises(InputError, match="--resume"):
        Trainer(config(tmp_path, "train.steps=1"))
    with pytest.raises(InputError, match="without --resume"):
        Trainer(config(tmp_path / "new"), resume=True)
    with pytest.raises(InputError, match="config that started it"):
        Trainer(config(tmp_path, "model.encoder.n_feats=8"), resume=True)
    with pytest.raises(InputError, match="device"):
        Trainer(config(tmp_path / "new", "train.device=gpu"))
    with pytest.raises(InputError, match="loss is"):
        Trainer(config(tmp_path / "nan", "train.lr=1e30", "train.steps=20")).fit(progress=False)
