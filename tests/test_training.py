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

from gsr.checkpoint import load_model
from gsr.config import load_config
from gsr.data import Batch, pixel_coords
from gsr.errors import InputError
from gsr.training import VAL_SCALES, Trainer, learning_rate, main, validate

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
    assert losses[-1] < losses[0] * (0.97 if mode == "direct" else 0.8)
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
    steps = ["train.steps=120", "train.save_every=1", "train.val_every=20", "train.log_every=5"]

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
        time.sleep(draw.uniform(0, 0.15))
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            kills += 1
        run.wait()
    done = subprocess.run(
        command(tmp_path / "killed", "--resume"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert not list((tmp_path / "killed" / "smoke").glob("**/.*gsr-tmp"))
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
    with pytest.raises(InputError, match="another model.encoder.n_feats, train.lr:"):
        Trainer(config(tmp_path, "model.encoder.n_feats=8", "train.lr=1", "train.steps=1"), True)
    with pytest.raises(InputError, match="is finished"):
        Trainer(config(tmp_path, "train.steps=1", "train.log_every=3"), resume=True).fit(False)
    (tmp_path / "smoke" / "state.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match="state.pt is damaged"):
        Trainer(config(tmp_path, "train.steps=1"), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        Trainer(config(tmp_path / "file"))
    with pytest.raises(InputError, match="device"):
        Trainer(config(tmp_path / "new", "train.device=gpu"))


def test_what_has_diverged_is_not_saved(tmp_path):
    c = config(
        tmp_path, "train.lr=1e30", "train.steps=20", "train.log_every=50", "train.save_every=1",
        "train.val_every=50",
    )  # fmt: skip
    with pytest.raises(InputError, match="are not finite by step"):
        Trainer(c).fit(progress=False)
    assert all(t.isfinite().all() for t in weights(tmp_path).values())


def one_batch():
    g = torch.Generator().manual_seed(0)
    index = torch.arange(24 * 24).expand(2, -1)
    return Batch(
        torch.rand(2, 3, 12, 12, generator=g), pixel_coords(index, (24, 24)),
        torch.rand(2, 24 * 24, 3, generator=g), (24, 24), 2.0,
    )  # fmt: skip


def test_one_step_is_adam_on_the_mean_absolute_error(tmp_path):
    trainer, batch = Trainer(config(tmp_path, "train.schedule=step", "train.lr=1e-2")), one_batch()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    model = trainer.model
    loss = (model(batch.lr, size=batch.size, coord=batch.coord) - batch.target).abs().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert abs(trainer._train_step(batch).item() - loss.item()) < 1e-6
    for (name, now), g in zip(model.named_parameters(), gradients, strict=True):
        # Adam's first step is lr in the direction of each gradient's sign.
        expected = before[name] - 1e-2 * g / (g.abs() + 1e-8)
        sure = g.abs() > 1e-6
        torch.testing.assert_close(now[sure], expected[sure], atol=1e-4, rtol=0)


def test_the_schedule_is_applied(tmp_path):
    c = config(tmp_path, "train.steps=10", "train.warmup=4", "train.log_every=1")
    Trainer(c).fit(progress=False)
    rows = [json.loads(line) for line in open(tmp_path / "smoke" / "log.jsonl")]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates == [learning_rate(c.train, s, 10, 1) for s in range(10)]
    assert rates[0] < rates[3] and rates[9] < rates[4] / 4


def test_clip_and_precision(tmp_path):
    def gradients(*overrides):
        trainer = Trainer(config(tmp_path / str(len(list(tmp_path.iterdir()))), *overrides))
        trainer._train_step(one_batch())
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    full = gradients()
    clipped = gradients("train.clip=1e-3")
    assert full.norm() > 2e-3
    assert abs(clipped.norm().item() - 1e-3) < 1e-6
    half = gradients("train.precision=bf16")
    assert 1e-5 < (half - full).norm() / full.norm() < 0.2


def test_best_is_kept_also_across_a_resume(tmp_path, monkeypatch):
    scores = iter([1.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr("gsr.training.validate", lambda *_: {"psnr": next(scores)})
    steps = ["train.val_every=1", "train.save_every=1", "train.schedule=step", "train.lr=1e-2"]
    Trainer(config(tmp_path, "train.steps=2", *steps)).fit(progress=False)
    best = {k: v.clone() for k, v in load_model(tmp_path / "smoke" / "best").state_dict().items()}
    assert same(best, weights(tmp_path))
    Trainer(config(tmp_path, "train.steps=4", *steps), resume=True).fit(progress=False)
    assert same(best, load_model(tmp_path / "smoke" / "best").state_dict())
    assert not same(best, weights(tmp_path))


def test_init_starts_from_weights(tmp_path):
    Trainer(config(tmp_path / "a", "train.steps=2", "train.lr=1e-2")).fit(progress=False)
    init = f"init={tmp_path / 'a' / 'smoke' / 'model'}"
    trainer = Trainer(config(tmp_path / "b", init))
    assert same(weights(tmp_path / "a"), trainer.model.state_dict())
    with pytest.raises(InputError, match="init"):
        Trainer(config(tmp_path / "c", init, "model.direct.gaussians=2"))


def test_a_users_own_files_stay(tmp_path):
    c = config(tmp_path, "train.steps=2", "train.schedule=step")
    Trainer(c).fit(progress=False)
    run = tmp_path / "smoke"
    (run / ".notes").write_text("mine")
    (run / ".ipynb_checkpoints").mkdir()
    (run / ".state.pt.x.gsr-tmp").write_text("left over")
    c.train.steps = 3
    Trainer(c, resume=True)
    assert (run / ".notes").exists() and (run / ".ipynb_checkpoints").exists()
    assert not (run / ".state.pt.x.gsr-tmp").exists()


def test_options_and_overrides_in_any_order(tmp_path, monkeypatch):
    seen = {}

    class Fake:
        folder = tmp_path

        def __init__(self, config, resume):
            seen.update(name=config.name, lr=config.train.lr, resume=resume)

        def fit(self):
            return {}

    monkeypatch.setattr("gsr.training.Trainer", Fake)
    smoke = str(ROOT / "configs" / "smoke.yaml")
    main(["train.lr=2", "--config", smoke, "name=x", "--resume"])
    assert seen == {"name": "x", "lr": 2.0, "resume": True}
