"""Several processes on the CPU: they train as one does, and end together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from gsr import distributed
from gsr.config import load_config
from gsr.errors import InputError
from gsr.models import GaussianSR
from tests.children import finish, start_ranks

ROOT = Path(__file__).parents[1]
TINY = [
    f"data.train={ROOT / 'tests' / 'data' / 'photos'}", "data.patch=12", "data.queries=64",
    "data.batch=4", "data.val_count=1", "model.encoder.n_feats=12", "model.encoder.n_blocks=1",
    "model.direct.width=4", "model.bank.points=9", "model.decoder.hidden_dim=16",
    "model.decoder.hidden_list=[16]", "train.threads=1", "train.steps=6", "train.lr=1e-3",
    "train.device=cpu", "train.warmup=0",
]  # fmt: skip


def alone(folder, *overrides):
    config = load_config(ROOT / "configs" / "smoke.yaml", [*TINY, f"output={folder}", *overrides])
    torch.manual_seed(config.train.seed)
    before = GaussianSR(config.model).state_dict()
    train.train(config, progress=False)
    return before


def weights(folder):
    return load_file(folder / "smoke" / "model" / "model.safetensors")


def apart(a, b):
    """Distance of two sets of weights."""
    return sum((a[k] - b[k]).double().square().sum() for k in a).sqrt().item()


@pytest.mark.parametrize(
    "mode, overrides",
    [
        ("direct", []),
        ("field", []),
        ("direct", ["train.accumulate=2", "train.ema=0.9", "train.clip=0.1", "data.cache=mmap"]),
    ],
)
def test_two_processes_train_as_one(tmp_path, mode, overrides):
    overrides = [f"model.mode={mode}", f"data.cache_dir={tmp_path / 'cache'}", *overrides]
    start = alone(tmp_path / "one", *overrides, "train.accumulate=1")
    output = f"output={tmp_path / 'two'}"
    children, outputs = start_ranks(tmp_path, 2, *TINY, output, *overrides)
    assert finish(*children) == [0, 0], outputs[0].read_text() + outputs[1].read_text()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = apart(one, start)
    assert moved > 1e-3
    assert apart(one, two) < 1e-3 * moved
    # Process 0 alone speaks, and logs the loss of the whole batch.
    assert "smoke: psnr" in outputs[0].read_text() and not outputs[1].read_text()
    losses = [
        json.loads((tmp_path / run / "smoke" / "log.jsonl").read_text().splitlines()[0])["loss"]
        for run in ("one", "two")
    ]
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0]
    assert len(list((tmp_path / "two" / "smoke" / "tensorboard").iterdir())) == 1


def test_a_run_goes_on_with_more_processes(tmp_path):
    alone(tmp_path / "one", "train.schedule=step")
    half = ["train.schedule=step", "train.steps=3"]
    start = alone(tmp_path / "two", *half)
    argv = [*TINY, f"output={tmp_path / 'two'}", "train.schedule=step", "--resume"]
    children, outputs = start_ranks(tmp_path, 2, *argv)
    assert finish(*children) == [0, 0], outputs[0].read_text()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert apart(one, two) < 1e-3 * apart(one, start)


def refused(tmp_path, *argv, before=()):
    """The one sentence that two processes end with, both with exit code 2."""
    output = f"output={tmp_path / 'run'}"
    children, outputs = start_ranks(tmp_path, 2, *TINY, output, *argv, before=before)
    text = "".join(path.read_text() for path in outputs if path.exists())
    assert finish(*children) == [2, 2], text
    lines = "".join(path.read_text() for path in outputs).splitlines()
    (said,) = [line for line in lines if line.strip() and ("step" not in line or "error" in line)]
    return said


def test_a_batch_that_cannot_be_shared(tmp_path):
    assert "data.batch 5 cannot be cut into equal parts for 2 processes" in refused(
        tmp_path, "data.batch=5"
    )


def test_one_device_for_all(tmp_path):
    assert "train.device cuda:1 does not serve 2 processes" in refused(
        tmp_path, "train.device=cuda:1"
    )


def test_an_image_that_one_process_cannot_read(tmp_path):
    """Each process looks at half of the images; the second is in the shard of the other one."""
    (tmp_path / "data").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / f"{i}.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "1.png")
    said = refused(
        tmp_path, f"data.train={tmp_path / 'data'}", f"data.val={ROOT / 'tests' / 'data'}",
        "data.cache=none",
    )  # fmt: skip
    assert said.startswith("gsr: error: ") and "1.png is 20 x 20 pixels" in said


KILLED = """
import os, signal
import train
real = train.training_step
def killed(*given, step, **more):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, step=step, **more)
train.training_step = killed
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed(tmp_path, rank):
    output = f"output={tmp_path / 'run'}"
    children, outputs = start_ranks(tmp_path, 2, *TINY, output, before=[(rank, KILLED)])
    text = outputs[1 - rank].read_text
    codes = finish(*children)
    assert codes[1 - rank] == 2, text()
    said = [line for line in text().splitlines() if line.startswith("gsr")]
    assert said == [
        f"gsr: error: process {1 - rank} has lost another one: see what that printed, and run "
        "again, a training with --resume"
    ]
    assert "Traceback" not in text()


def test_other_failures_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "agree", lambda error=None: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    with pytest.raises(RuntimeError, match="size mismatch"), distributed.process_group():
        raise RuntimeError("size mismatch")


def test_alone_there_is_nobody_to_ask():
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (
        0,
        1,
        (0, 1),
    )
    distributed.agree(InputError("mine"))
    values, module = torch.ones(3), torch.nn.Linear(1, 1)
    assert distributed.mean(values) is values and distributed.parallel(module) is module
    with pytest.raises(InputError, match="mine"), distributed.process_group():
        raise InputError("mine")


@pytest.mark.slow
def test_torchrun(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "train.py", "--config", "configs/smoke.yaml", *TINY, f"output={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("psnr") == 1
    wrong = subprocess.run([*command, "data.batch=5"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode != 0 and wrong.stderr.count("data.batch 5 cannot be cut") == 1
    # torchrun ends with 1 and its own report; a process that was slower to leave it ends itself.
    assert "exitcode  : 2" in wrong.stderr
