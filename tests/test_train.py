"""Training end to end: it learns, it repeats itself, and SIGKILL costs nothing but time."""

import errno
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from gsr import runs
from gsr import viz as inspection
from gsr.config import ScheduleConfig, load_config
from gsr.data.patches import Batch, pixel_coords, split_images
from gsr.errors import InputError
from gsr.io.image import list_images, to_uint8
from gsr.io.paths import lock_folder
from gsr.models import GaussianSR
from gsr.models.checkpoint import load_model, save_model
from gsr.models.heads.bank import assign
from gsr.ops.resize import bicubic
from gsr.optim import make_schedule
from gsr.runs import VAL_SCALES, bf16_loss, validate, validation_pairs
from gsr.viz import draw_gaussians
from tests.children import finish, start

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "tests" / "data" / "photos"

TINY = [
    f"data.train={PHOTOS}", "data.patch=12", "data.queries=64", "data.batch=2",
    "data.val_count=1", "model.encoder.n_feats=4", "model.encoder.n_blocks=1",
    "model.direct.width=4", "train.threads=1",
]  # fmt: skip


def config(folder, *overrides):
    return load_config(ROOT / "configs" / "smoke.yaml", [f"output={folder}", *TINY, *overrides])


def go(config, resume=False):
    return train.train(config, resume, progress=False)


def fresh(config):
    """The model as a training of this config begins."""
    torch.manual_seed(config.train.seed)
    return GaussianSR(config.model)


def weights(folder):
    return load_file(Path(folder) / "smoke" / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_learns_in_every_mode(tmp_path, mode):
    c = config(
        tmp_path, f"model.mode={mode}", "train.steps=60", "train.lr=3e-3", "train.log_every=10",
        "model.bank.points=9", "model.encoder.n_feats=12", "model.decoder.hidden_dim=16",
        "model.decoder.hidden_list=[16, 16]", "train.warmup=0", "train.clip=null",
    )  # fmt: skip
    go(c)
    rows = [json.loads(line) for line in open(tmp_path / "smoke" / "log.jsonl")]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    # `direct` starts from the bicubic enlargement, so that there is less for it to learn
    assert losses[-1] < losses[0] * (0.97 if mode == "direct" else 0.8)
    assert any(row["kind"] == "val" and row["psnr"] > 10 for row in rows)


def test_same_seed_same_weights(tmp_path):
    def run(name, *overrides):
        go(config(tmp_path / name, "train.steps=6", *overrides))
        return weights(tmp_path / name)

    first = run("a")
    assert same(first, run("b", "data.workers=1"))
    assert not same(first, run("c", "train.seed=1"))


@pytest.mark.parametrize(
    "mode, muon", [("direct", "null"), ("direct", "0.01"), ("official", "null")]
)
def test_resume_is_exact(tmp_path, mode, muon):
    """Stopped by the end of its steps and resumed; `official` draws Gumbel noise as it trains."""
    small = [
        f"model.mode={mode}", f"train.muon_lr={muon}", "train.save_every=3", "model.bank.points=9",
        "model.encoder.n_feats=12", "model.decoder.hidden_dim=16",
        "model.decoder.hidden_list=[16]", "train.schedule=step", "train.ema=0.9",
        "train.accumulate=2",
    ]  # fmt: skip
    go(config(tmp_path / "whole", "train.steps=9", *small))
    go(config(tmp_path / "parts", "train.steps=6", *small))
    go(config(tmp_path / "parts", "train.steps=9", *small), resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


# The n-th file is half written when its process stops for ever.
HALF_WRITTEN = """
import os, time
real, calls = os.fsync, iter(range({n}))
def fsync(handle):
    if next(calls, None) is None:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        open({mark!r}, "w").close()
        time.sleep(600)
    real(handle)
os.fsync = fsync
"""


def flat(state, where=""):
    """Everything in a state, as tensors, by its place."""
    if isinstance(state, str):
        state = list(state.encode())
    if not isinstance(state, (dict, list, tuple)):
        return {where: torch.as_tensor(-1.0 if state is None else state)}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {k: v for key, value in items for k, v in flat(value, f"{where}/{key}").items()}


def interrupted_at(monkeypatch, last):
    """Ctrl-C ends the training before that step."""
    real = train.training_step

    def interrupted(*given, step, **more):
        if step == last:
            raise KeyboardInterrupt
        return real(*given, step=step, **more)

    monkeypatch.setattr(train, "training_step", interrupted)


def wait_until(true, child, seconds=60):
    end = time.monotonic() + seconds
    while not true() and child.is_alive() and time.monotonic() < end:
        time.sleep(0.002)


def test_killed_ten_times_and_resumed_is_never_killed(tmp_path):
    """SIGKILL at random moments, five of them inside the writing of a file that has been chosen."""
    steps = ["train.steps=80", "train.save_every=1", "train.val_every=20", "train.log_every=5"]
    options = [*TINY, *steps, "train.ema=0.9", "train.keep=2"]
    quick = "import gsr.runs; gsr.runs.show = lambda *given: None\n"
    first = start(tmp_path / "out", f"output={tmp_path / 'whole'}", *options, before=quick)
    assert finish(first) == [0]
    run, draw = tmp_path / "killed" / "smoke", random.Random(0)
    state, mark = run / "state.pt", tmp_path / "mark"
    for kill in range(10):
        resume = ["--resume"] if state.exists() else []
        n = draw.randrange(4, 24)  # a state is three files, the first one and a best one four
        inside = HALF_WRITTEN.format(n=n, mark=str(mark)) if kill % 2 else ""
        before = state.stat().st_mtime_ns if state.exists() else 0
        child = start(
            tmp_path / "out", f"output={tmp_path / 'killed'}", *options, *resume,
            before=quick + inside,
        )  # fmt: skip
        if inside:
            wait_until(mark.exists, child)
            assert list(run.rglob("*.gsr-tmp"))
        else:
            wait_until(lambda: state.exists() and state.stat().st_mtime_ns != before, child)  # noqa: B023
            time.sleep(draw.uniform(0, 0.03))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, (tmp_path / "out").read_text()
        mark.unlink(missing_ok=True)
    argv = [f"output={tmp_path / 'killed'}", *options, "--resume"]
    last = start(tmp_path / "out", *argv, before=quick)
    assert finish(last) == [0], (tmp_path / "out").read_text()
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert not list(run.rglob("*.gsr-tmp"))
    whole = tmp_path / "whole" / "smoke"
    for name in ("state.pt", "state-78.pt", "state-79.pt"):
        states = [flat(torch.load(f / name, weights_only=True)) for f in (whole, run)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert same(*(load_file(f / "best" / "model.safetensors") for f in (whole, run)))
    log = [[json.loads(line) for line in open(f / "log.jsonl")] for f in (whole, run)]
    rows = [[(row["kind"], row["step"]) for row in rows] for rows in log]
    assert rows[0] == rows[1]


def full_disk(monkeypatch, after):
    """From the n-th file on, the disk is full."""
    calls, real = iter(range(after)), os.fsync

    def fsync(handle):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)


def test_a_full_disk_costs_nothing_that_is_written(tmp_path, monkeypatch):
    steps = ["train.steps=4", "train.save_every=1", "train.val_every=9", "train.log_every=9"]
    go(config(tmp_path / "whole", *steps))
    run = tmp_path / "full" / "smoke"
    for after in (5, 6, 7):  # the first state is four files, the others three
        with monkeypatch.context() as patch:
            full_disk(patch, after)
            with pytest.raises((OSError, InputError), match="No space left on device"):
                go(config(tmp_path / "full", *steps), resume=(run / "state.pt").exists())
        assert not list(run.rglob("*.gsr-tmp"))
        load_model(run / "model")
    go(config(tmp_path / "full", *steps), resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "full"))


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_two_trainings_of_one_name(tmp_path):
    steps = ["train.steps=3", "train.schedule=step"]
    held = tmp_path / "smoke"
    held.mkdir()
    with (
        lock_folder(held, "held"),
        pytest.raises(InputError, match="another training is at work in .*"),
    ):
        go(config(tmp_path, "train.steps=5"))
    assert not list(held.iterdir())
    go(config(tmp_path, *steps))
    again = [*steps[1:], "train.steps=4"]
    with lock_folder(held, "held"), pytest.raises(InputError, match="another training is at work"):
        go(config(tmp_path, *again), resume=True)
    go(config(tmp_path, *again), resume=True)
    with pytest.raises(InputError, match="is finished"):
        go(config(tmp_path, *again), resume=True)


def outlive(ready):
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_a_loader_process_does_not_hold_the_folder(tmp_path):
    """One that outlives a killed training by some seconds would keep it from being resumed."""
    with lock_folder(tmp_path, "held"):
        fork = multiprocessing.get_context("fork")
        ready = fork.Event()
        child = fork.Process(target=outlive, args=(ready,))
        child.start()
        assert ready.wait(20)
        with pytest.raises(InputError, match="held"), lock_folder(tmp_path, "held"):
            pass
    try:
        with lock_folder(tmp_path, "held"):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("left", ["state-2.pt", "best", "model"])
def test_what_is_left_of_a_run_is_not_written_over(tmp_path, left):
    steps = ["train.steps=3", "train.save_every=1", "train.keep=1"]
    go(config(tmp_path, *steps))
    run = tmp_path / "smoke"
    for path in run.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=f"smoke holds {left} of another run: move it away or"):
        go(config(tmp_path, *steps))
    assert [path.name for path in run.iterdir()] == [left]


def test_earlier_states_are_kept_and_one_is_gone_back_to(tmp_path, monkeypatch):
    steps = ["train.steps=10", "train.save_every=2", "train.keep=3", "train.log_every=1"]
    go(config(tmp_path, *steps))
    run = tmp_path / "smoke"
    assert sorted(p.name for p in run.glob("state*")) == [
        "state-4.pt", "state-6.pt", "state-8.pt", "state.pt"
    ]  # fmt: skip
    final = weights(tmp_path)
    shutil.copy(run / "state-6.pt", run / "state.pt")
    with monkeypatch.context() as patch:
        interrupted_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            go(config(tmp_path, *steps, "train.keep=1"), resume=True)
    assert not (run / "state-8.pt").exists()
    go(config(tmp_path, *steps, "train.keep=1"), resume=True)
    assert same(final, weights(tmp_path))
    assert sorted(p.name for p in run.glob("state*")) == ["state-8.pt", "state.pt"]
    rows = [json.loads(line) for line in open(run / "log.jsonl")]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 11))


def test_the_running_mean_is_what_is_measured_and_written(tmp_path, monkeypatch):
    seen = []

    def score(model, *_):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"psnr": float(len(seen))}

    monkeypatch.setattr("gsr.runs.validate", score)
    monkeypatch.setattr("gsr.runs.bf16_loss", lambda *_: None)
    steps = ["train.steps=4", "train.save_every=1", "train.keep=9", "train.val_every=1"]
    c = config(tmp_path, *steps, "train.ema=0.75", "train.lr=1e-2")
    mean = fresh(c).state_dict()
    go(c)
    run = tmp_path / "smoke"
    for step, measured in enumerate(seen, 1):
        path = run / ("state.pt" if step == 4 else f"state-{step}.pt")
        raw = torch.load(path, weights_only=True)["model"]
        mean = {k: 0.75 * mean[k] + 0.25 * raw[k] for k in mean}
        for k in mean:
            torch.testing.assert_close(measured[k], mean[k], atol=1e-6, rtol=1e-5)
    assert not same(raw, seen[-1])
    assert same(seen[-1], load_model(run / "model").state_dict())
    assert same(seen[-1], load_model(run / "best").state_dict())


@pytest.mark.parametrize("mode", ["direct", "field"])
def test_micro_batches_make_the_same_step(tmp_path, mode):
    def run(name, *overrides):
        c = config(
            tmp_path / name, f"model.mode={mode}", "data.batch=4", "train.steps=4",
            "model.encoder.n_feats=12", "model.bank.points=9", "model.decoder.hidden_dim=16",
            "model.decoder.hidden_list=[16]", "train.log_every=1", *overrides,
        )  # fmt: skip
        first = fresh(c).state_dict()
        go(c)
        rows = [json.loads(row) for row in open(tmp_path / name / "smoke" / "log.jsonl")]
        return first, weights(tmp_path / name), [r["loss"] for r in rows if r["kind"] == "train"]

    def apart(a, b):
        return sum((a[k] - b[k]).double().square().sum() for k in a).sqrt()

    first, whole, losses = run("whole")
    for parts in (2, 4):
        _, summed, same_losses = run(f"parts{parts}", f"train.accumulate={parts}")
        assert apart(whole, summed) < 1e-3 * apart(whole, first)
        assert np.allclose(losses, same_losses, rtol=1e-4)
    _, other, _ = run("other", "train.seed=1")
    assert apart(whole, other) > 0.1 * apart(whole, first)


def test_noise_of_a_picture_is_its_own():
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    together = assign(logits, "gumbel", seeds=[5, 6, 2**63 - 1])
    assert torch.equal(together[1:2], assign(logits[1:2], "gumbel", seeds=[6]))
    again = assign(logits.roll(1, 0), "gumbel", seeds=[2**63 - 1, 5, 6])
    assert torch.equal(together, again.roll(-1, 0))
    assert not torch.equal(together, assign(logits, "gumbel", seeds=[5, 6, 7]))
    batch = logits[:1].expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    a, b = assign(batch, "gumbel", seeds=[1, 2])
    assert not torch.equal(a, b)


def watched(folder):
    """What TensorBoard finds in a run folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(
        str(folder / "smoke" / "tensorboard"), {"images": 0, "histograms": 0}
    )
    return events.Reload()


def shown(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_tensorboard_shows_a_crop(tmp_path, mode, monkeypatch):
    drawn = np.full((4, 5, 3), 7, np.uint8)
    monkeypatch.setattr(inspection, "draw_gaussians", lambda model, picture: drawn)
    c = config(
        tmp_path, f"model.mode={mode}", "train.steps=2", "train.val_every=1",
        "model.bank.points=9", "model.encoder.n_feats=12", "model.decoder.hidden_dim=16",
        "model.decoder.hidden_list=[16]",
    )  # fmt: skip
    go(c)
    events = watched(tmp_path)
    _, lr, hr = next(p for p in validation_pairs(split_images(c.data)[1]) if p[0] == 4)
    model = load_model(tmp_path / "smoke" / "model")
    first, second = events.Images("val/bicubic_ours_hr")
    assert (first.step, second.step) == (1, 2)
    left, ours, right = np.split(shown(second), 3, axis=1)
    assert np.array_equal(left, to_uint8(bicubic(lr, hr.shape[-2:])))
    assert np.array_equal(right, to_uint8(hr))
    with torch.inference_mode():
        now = model(lr, scale=4, size=hr.shape[-2:])
    assert np.array_equal(ours, to_uint8(now))
    tags = events.Tags()
    assert ("val/gaussians" in tags["images"]) == (mode != "official")
    if mode != "official":
        assert np.array_equal(shown(events.Images("val/gaussians")[0]), drawn)
    if mode != "direct":
        values = events.Histograms("val/classes")[1].histogram_value
        with torch.inference_mode():
            classes = model.head.classifier(model.encoder(lr)).argmax(1)
        assert values.num == lr.shape[-2] * lr.shape[-1]
        assert values.sum == classes.sum()
        at = {int(low): n for low, n in zip(values.bucket_limit, values.bucket, strict=True)}
        for k, n in enumerate(torch.bincount(classes.flatten(), minlength=9).tolist()):
            assert at.get(k + 1, 0) == n


def test_tensorboard_across_a_resume(tmp_path):
    """The steps after the state are done, and shown, again; that of the state is not lost."""
    steps = ["train.log_every=1", "train.save_every=3", "train.val_every=99"]
    steps += ["train.schedule=step"]

    def scalars():
        return [event.step for event in watched(tmp_path).Scalars("train/loss")]

    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            go(config(tmp_path, "train.steps=8", *steps))
    assert scalars() == [1, 2, 3, 4, 5]
    time.sleep(1.1)  # TensorBoard sorts its files by the second in their names
    go(config(tmp_path, "train.steps=8", *steps), resume=True)
    assert scalars() == list(range(1, 9))


def test_the_real_drawing_of_gaussians(tmp_path):
    c = config(tmp_path, "train.steps=1")
    go(c)
    _, lr, _ = next(p for p in validation_pairs(split_images(c.data)[1]) if p[0] == 4)
    (event,) = watched(tmp_path).Images("val/gaussians")
    model = load_model(tmp_path / "smoke" / "model")
    assert np.array_equal(shown(event), draw_gaussians(model, to_uint8(lr), zoom=8))


def test_schedules():
    c = config("unused").train
    c.schedule, c.gamma, c.step_epochs, c.warmup = ScheduleConfig("step"), 0.5, 2, 0
    rate = make_schedule(c, total=100, per_epoch=3)
    assert [rate(s, 1.0) for s in (0, 5, 6, 11, 12)] == [1, 1, 0.5, 0.5, 0.25]
    c.schedule = ScheduleConfig("cosine")
    rate = make_schedule(c, 100, 3)
    assert rate(0, 1.0) == 1
    assert abs(rate(50, 1.0) - 0.5) < 1e-12
    assert rate(99, 1.0) < 1e-3
    c.warmup = 10
    assert abs(make_schedule(c, 10**9, 3)(0, 1.0) - 0.1) < 1e-6


def test_validation_measures(tmp_path):
    """A model that answers with the HR picture's own values, off by 0.1, has 20 dB."""

    class Off(torch.nn.Module):
        def forward(self, lr, size, scale):
            return torch.full((1, 3, *size), 0.6)

    hr = torch.full((1, 3, 48, 48), 0.5)
    pairs = [(s, hr[..., ::s, ::s], hr) for s in VAL_SCALES]
    for value in validate(Off(), pairs).values():
        assert abs(value - 20) < 1e-4


def test_refusals(tmp_path):
    go(config(tmp_path, "train.steps=1"))
    with pytest.raises(InputError, match="--resume"):
        go(config(tmp_path, "train.steps=1"))
    with pytest.raises(InputError, match="without --resume"):
        go(config(tmp_path / "new"), resume=True)
    with pytest.raises(InputError, match="another model.encoder.n_feats, train.lr:"):
        go(config(tmp_path, "model.encoder.n_feats=8", "train.lr=1", "train.steps=1"), True)
    with pytest.raises(InputError, match="is finished"):
        go(config(tmp_path, "train.steps=1", "train.log_every=3"), resume=True)
    state = tmp_path / "smoke" / "state.pt"
    whole = torch.load(state, weights_only=True)
    del whole["best"]
    torch.save(whole, state)
    with pytest.raises(InputError, match="state.pt is damaged .KeyError"):
        go(config(tmp_path, "train.steps=1"), resume=True)
    state.write_bytes(b"PK")
    with pytest.raises(InputError, match="state.pt is damaged"):
        go(config(tmp_path, "train.steps=1"), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        go(config(tmp_path / "file"))
    with pytest.raises(InputError, match="device"):
        go(config(tmp_path / "new", "train.device=gpu"))
    with pytest.raises(InputError, match="data.batch 2 cannot be cut .* train.accumulate 3"):
        go(config(tmp_path / "new", "train.accumulate=3"))


def test_a_resumed_run_has_its_own_pictures(tmp_path):
    photos, steps = tmp_path / "photos", ["train.schedule=step", "data.val_count=2"]
    shutil.copytree(PHOTOS, photos)
    steps.append(f"data.train={photos}")
    go(config(tmp_path, "train.steps=1", *steps))
    more = [*steps, "train.steps=2"]
    first = list_images(photos)[0]
    renamed = first.rename(photos / f"0{first.suffix}")
    with pytest.raises(InputError, match="data.train: this run .* 4 images .* 4 images .*now"):
        go(config(tmp_path, *more), resume=True)
    renamed.rename(first)
    path = tmp_path / "smoke" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "images": {**state["images"], "val": "none"}}, path)
    with pytest.raises(InputError, match="data.val: this run was started with none"):
        go(config(tmp_path, *more), resume=True)
    torch.save(state, path)
    go(config(tmp_path, *more), resume=True)


def test_what_has_diverged_is_not_saved(tmp_path):
    c = config(
        tmp_path, "train.lr=1e30", "train.steps=20", "train.log_every=50", "train.save_every=1",
        "train.val_every=50", "train.clip=null",
    )  # fmt: skip
    with pytest.raises(InputError, match="are not finite by step"):
        go(c)
    assert all(t.isfinite().all() for t in weights(tmp_path).values())


def one_batch():
    g = torch.Generator().manual_seed(0)
    index = torch.arange(24 * 24).expand(2, -1)
    return Batch(
        torch.rand(2, 3, 12, 12, generator=g), pixel_coords(index, (24, 24)),
        torch.rand(2, 24 * 24, 3, generator=g), (24, 24), 2.0,
    )  # fmt: skip


def test_one_step_is_adam_on_the_mean_absolute_error(tmp_path):
    plain = ["train.schedule=step", "train.lr=1e-2", "train.warmup=0", "train.clip=null"]
    c, batch = config(tmp_path, *plain).train, one_batch()
    model = fresh(config(tmp_path)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss = (model(batch.lr, size=batch.size, coord=batch.coord) - batch.target).abs().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    loss_of, optimizer = train.Loss(model, "fp32"), torch.optim.Adam(model.parameters(), lr=1e-2)
    done = train.training_step(loss_of, optimizer, [batch], config=c, step=1)
    assert abs(done.item() - loss.item()) < 1e-6
    for (name, now), g in zip(model.named_parameters(), gradients, strict=True):
        # Adam's first step is lr in the direction of each gradient's sign.
        expected = before[name] - 1e-2 * g / (g.abs() + 1e-8)
        sure = g.abs() > 1e-6
        torch.testing.assert_close(now[sure], expected[sure], atol=1e-4, rtol=0)


def test_the_schedule_is_applied(tmp_path):
    c = config(tmp_path, "train.steps=10", "train.warmup=4", "train.log_every=1")
    go(c)
    rows = [json.loads(line) for line in open(tmp_path / "smoke" / "log.jsonl")]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates == [make_schedule(c.train, 10, 1)(s, c.train.lr) for s in range(10)]
    assert rates[0] < rates[3] and rates[9] < rates[4] / 4


def test_clip_and_precision(tmp_path):
    def gradients(*overrides):
        c = config(tmp_path, *overrides)
        model = fresh(c).train()
        loss_of = train.Loss(model, c.train.precision)
        optimizer = torch.optim.Adam(model.parameters())
        train.training_step(loss_of, optimizer, [one_batch()], config=c.train, step=1)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    full = gradients("train.clip=null")
    clipped = gradients("train.clip=1e-3")
    assert full.norm() > 2e-3
    assert abs(clipped.norm().item() - 1e-3) < 1e-6
    half = gradients("train.clip=null", "train.precision=bf16")
    assert 1e-5 < (half - full).norm() / full.norm() < 0.2


def test_best_is_kept_also_across_a_resume(tmp_path, monkeypatch):
    scores = iter([1.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr("gsr.runs.validate", lambda *_: {"psnr": next(scores)})
    monkeypatch.setattr("gsr.runs.bf16_loss", lambda *_: None)
    steps = ["train.val_every=1", "train.save_every=1", "train.schedule=step", "train.lr=1e-2"]
    go(config(tmp_path, "train.steps=2", *steps))
    best = {k: v.clone() for k, v in load_model(tmp_path / "smoke" / "best").state_dict().items()}
    assert same(best, weights(tmp_path))
    go(config(tmp_path, "train.steps=4", *steps), resume=True)
    assert same(best, load_model(tmp_path / "smoke" / "best").state_dict())
    assert not same(best, weights(tmp_path))


def test_init_starts_from_weights(tmp_path):
    go(config(tmp_path / "a", "train.steps=2", "train.lr=1e-2"))
    init = f"init={tmp_path / 'a' / 'smoke' / 'model'}"
    go(config(tmp_path / "b", init, "train.steps=1", "train.lr=1e-30"))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    with pytest.raises(InputError, match="init: .* it has another direct.gaussians$"):
        go(config(tmp_path / "c", init, "model.direct.gaussians=2"))


def test_a_users_own_files_stay(tmp_path):
    c = config(tmp_path, "train.steps=2", "train.schedule=step")
    go(c)
    run = tmp_path / "smoke"
    (run / ".notes").write_text("mine")
    (run / ".ipynb_checkpoints").mkdir()
    (run / ".state.pt.x.gsr-tmp").write_text("left over")
    c.train.steps = 3
    go(c, resume=True)
    assert (run / ".notes").exists() and (run / ".ipynb_checkpoints").exists()
    assert not (run / ".state.pt.x.gsr-tmp").exists()


def test_options_and_overrides_in_any_order(tmp_path, monkeypatch):
    seen = {}

    def fake(config, resume):
        seen.update(name=config.name, lr=config.train.lr, resume=resume)
        return {}

    monkeypatch.setattr(train, "train", fake)
    smoke = str(ROOT / "configs" / "smoke.yaml")
    train.main(["train.lr=2", "--config", smoke, "name=x", "--resume"])
    assert seen == {"name": "x", "lr": 2.0, "resume": True}


def test_a_model_that_ignores_its_input_ends_the_run(tmp_path):
    """All hidden channels of the head dead, as under ReLU with too high a rate."""
    steps = ["train.steps=6", "train.log_every=2", "train.save_every=100"]
    c = config(tmp_path, *steps, "model.direct.activation=relu", f"init={tmp_path / 'dead'}")
    model = fresh(c)
    torch.nn.init.constant_(model.head.hidden.bias, -1e6)
    save_model(tmp_path / "dead", model)
    with pytest.raises(InputError, match="no longer depends on the encoder by step 4: .*train.lr"):
        go(c)
    # The first step alone, whose colours are zero, does not count.
    go(config(tmp_path, "name=alive", "train.log_every=1", *steps[:1]))


@pytest.mark.parametrize(
    "exact, lossy, loss",
    [([30.0, 31.0], [30.0, 30.75], 0.25), ([math.inf] * 2, [math.inf, 40.0], None)],
)
def test_what_bf16_costs_is_a_number_or_unknown(exact, lossy, loss, tiny_model, monkeypatch):
    keys = "psnr", "x2"
    monkeypatch.setattr(runs, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(runs, "validate", lambda *_: dict(zip(keys, lossy, strict=True)))
    assert bf16_loss(tiny_model, [], dict(zip(keys, exact, strict=True))) == loss


def test_what_bf16_costs_is_known_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "has_fast_bf16", lambda device: True)
    steps = ["train.steps=8", "train.save_every=2", "train.val_every=4"]
    for step, resume in ((5, False), (7, True)):  # steps 4 and 6 are saved, 4 is validated
        with pytest.MonkeyPatch.context() as patch:
            interrupted_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                go(config(tmp_path, *steps), resume)
        written = json.loads((tmp_path / "smoke" / "model" / "config.json").read_text())
        assert written["bf16_loss"] is not None
