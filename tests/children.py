"""Processes that train, forked from one that has everything imported: they start at once."""

import functools
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRELOAD = [
    "train", "gsr.viz", "gsr.ops.cpu_loops", "torch._dynamo", "torch.utils.tensorboard",
    "torch.testing",
]  # fmt: skip
CODE = """
import os, sys
os.environ.update(env)
sys.stdout = sys.stderr = open(output, "w", buffering=1)
exec(before)
from gsr.cli import guard
from train import main
guard(main, argv)
"""


@functools.cache
def _context():
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def start(output, *argv, before="", **env):
    """A started process that runs `train.py` with these arguments, and code `before` that.

    What it prints goes to the file `output`; `env` is added to its environment.
    """
    argv = ["--config", str(ROOT / "configs" / "smoke.yaml"), *map(str, argv)]
    names = {"argv": argv, "before": before, "output": str(output), "env": env}
    child = _context().Process(target=exec, args=(CODE, names), daemon=True)
    child.start()
    return child


def finish(*children, seconds=60):
    """Wait for processes; their exit codes. None of them is left behind."""
    end = time.monotonic() + seconds
    for child in children:
        child.join(max(0, end - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    return codes


def start_ranks(folder, count, *argv, before=()):
    """`count` processes that train together as torchrun would start them, and their outputs.

    before: code to run first in some of them, by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.makedirs(folder, exist_ok=True)
    outputs = [Path(folder) / f"rank{rank}.txt" for rank in range(count)]
    children = [
        start(
            outputs[rank], *argv, before=dict(before).get(rank, ""), RANK=str(rank),
            LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        for rank in range(count)
    ]  # fmt: skip
    return children, outputs
