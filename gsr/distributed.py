"""Process groups: several processes train one model, each on a shard of every batch, or measure it.

`torchrun` starts the processes, on one machine or more, and tells each its rank by environment
variables. Without it every function here is that of a single process and does next to nothing.

A process that fails must not leave the others waiting for it: what is done in common is preceded
by `agree`, where a failure of one becomes the end of all.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gsr import device as devices
from gsr.errors import InputError

# What PyTorch says where another process is gone.
GONE = re.compile("connection (closed|reset|refused)|broken pipe|ncclRemoteError", re.IGNORECASE)
PATIENCE = timedelta(hours=2)  # for a process that validates and writes alone, or measures longer
# Groups end with the interpreter: DistributedDataParallel, were the last reference its own, would
# hold the interpreter's lock as it waits for threads that may be waiting for that lock.
_groups: list[dist.ProcessGroup | None] = []
# One tensor for all calls: a thread of gloo that releases the last reference to one needs that
# lock too, and at the interpreter's end the process would be aborted for it.
_first = torch.zeros((), dtype=torch.int64)


class Lost(InputError):
    """Raised where another process is gone, so that `agree` cannot end them all."""


def started() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def world_size() -> int:
    """Return the size of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; only rank 0 writes and prints."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> tuple[int, int]:
    """Return the rank of this process on its machine, and how many are there."""
    if world_size() == 1:
        return 0, 1
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started, for as long as the context lasts.

    An InputError of one of them ends them all: the first prints its sentence, and every process
    raises SystemExit(2). A single process keeps its InputError. Where a process has been ended from
    outside, each of the others raises `Lost`.
    """
    if started() > 1:
        # nccl comes to life with the first tensor of a GPU; `agree` is about tensors of the CPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"WORLD_SIZE is {started()}, but the processes cannot meet ({reason}): start them "
                "with torchrun, or unset WORLD_SIZE"
            ) from None
        _groups.append(dist.group.WORLD)
    try:
        try:
            try:
                yield
            except Lost:
                raise
            except InputError as error:
                agree(error)
                raise
            agree()
        except RuntimeError as error:
            if world_size() == 1 or not GONE.search(str(error)):
                raise
            raise Lost(
                f"process {rank()} has lost another one: see what that printed, and run again, a "
                "training with --resume"
            ) from None
    finally:
        if world_size() > 1:
            time.sleep(0.2)  # for gloo's threads to release what they have sent, see above
            dist.destroy_process_group()


def agree(error: InputError | None = None) -> None:
    """Wait for the others; raise SystemExit(2) in all if one of them came here with an error.

    The sentence of the first of those is printed by then, and no other. Returns at once in a single
    process, whatever the error.
    """
    if world_size() == 1:
        return
    _first.fill_(world_size() if error is None else rank())
    dist.all_reduce(_first, dist.ReduceOp.MIN)
    if _first == world_size():
        return
    if _first == rank():
        print(f"gsr: error: {error}", file=sys.stderr, flush=True)
    dist.all_reduce(_first)  # torchrun ends all once one has ended: it must have been printed
    raise SystemExit(2)


def mean(values: Tensor) -> Tensor:
    """Return the mean of a float tensor over all processes."""
    if world_size() == 1:
        return values
    dist.all_reduce(values)
    return values / world_size()


def shard(items: Sequence[Any]) -> Sequence[Any]:
    """Return this rank's items: every world_size-th, which divides a sorted list evenly."""
    return items[rank() :: world_size()]


def gather(value: Any) -> list[Any]:
    """Return `value` of every process, by rank; each of them must call."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def select_device(name: str, option: str = "train.device") -> torch.device:
    """Return the device that `option`'s value means for this process: a GPU each, or the CPU.

    Raises:
        InputError: it names one device for several processes, or there are more than GPUs.
    """
    if world_size() == 1:
        return devices.select_device(name)
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"{option} {name} does not serve {world_size()} processes: use auto or cpu"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return devices.select_device(name)
    (local, here), gpus = local_rank(), torch.cuda.device_count()
    if local >= gpus:
        raise InputError(
            f"torchrun started {here} processes on a machine of {gpus} GPUs: give "
            f"--nproc_per_node {gpus}, or cpu as {option}"
        )
    device = devices.select_device(f"cuda:{local}")
    torch.cuda.set_device(device)
    return device


def parallel(module: nn.Module) -> nn.Module:
    """Average a module's gradients over all processes; a single one returns it as it is.

    All start from the weights of process 0.
    """
    if world_size() == 1:
        return module
    agree()
    return nn.parallel.DistributedDataParallel(module)
