"""Where and how a model computes: device, CPU threads and what is done with freed memory."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from gsr.config import DEVICES, MAX_THREADS
from gsr.errors import InputError


def select_device(name: str) -> torch.device:
    """The device that a name means; "auto" is CUDA where there is one.

    Raises:
        InputError: the name is none of auto, cpu, cuda, cuda:1, ..., mps and xpu, or there is no
            such device here.
    """
    if not re.fullmatch(DEVICES, name):
        raise InputError(f"device {name} is none of auto, cpu, cuda, cuda:1, mps and xpu: use auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # its type depends on the kind of device
        raise InputError(f"device {name} is not available here: use cpu or auto") from error
    return device


def set_threads(count: int | None) -> None:
    """Let PyTorch use so many CPU threads; None leaves its own choice.

    Raises:
        InputError: not from 1 to 1024; PyTorch itself crashes on very many.
    """
    if count is None:
        return
    if not 1 <= count <= MAX_THREADS:
        raise InputError(f"--threads must be from 1 to {MAX_THREADS}, not {count}")
    torch.set_num_threads(count)


def threaded_map(function: Callable[[Any], None], items: Iterable, threads: int) -> None:
    """function(item) for every item, each on one of so many threads.

    With more than one, there are no gradients, and PyTorch computes with one thread in each:
    nobody waits between small steps, where PyTorch's own threads meet after every step, and spin
    while other code runs.
    """
    if threads <= 1:
        for item in items:
            function(item)
        return
    mode, count = torch.is_inference_mode_enabled(), torch.get_num_threads()
    todo, ready = iter(list(items)), threading.Barrier(threads + 1)

    def work() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread's first question takes PyTorch's number over
        ready.wait()
        with torch.inference_mode(mode), torch.no_grad():
            try:
                for item in todo:  # shared, so that a thread that is done early takes more
                    function(item)
            except BaseException:
                list(todo)  # nothing for the others to begin
                raise

    with ThreadPoolExecutor(threads, "gsr") as pool:
        try:
            workers = [pool.submit(work) for _ in range(threads)]
            ready.wait()
        except BaseException:
            ready.abort()
            raise
        finally:
            # PyTorch took the 1 for all threads that are yet to come.
            torch.set_num_threads(count)
    for worker in workers:
        worker.result()


def at_once(pixels: int, like: torch.Tensor) -> int:
    """So many pixels, chosen for the caches of a CPU, or more where like's device has none such."""
    return pixels if like.device.type == "cpu" else 16 * pixels


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def autocast_dtype(device: str) -> torch.dtype | None:
    """bfloat16 within torch.autocast to that on this type of device, for matrices; else None."""
    inside = torch.is_autocast_enabled(device)
    return torch.bfloat16 if inside and torch.get_autocast_dtype(device) == torch.bfloat16 else None


@functools.cache
def keep_pieces() -> None:
    """Have glibc keep pieces of freed memory below 32 MB for the next time, 64 MB of them at most.

    It does that anyway once a piece of that size has come and gone (mallopt(3), M_MMAP_THRESHOLD).
    Until then most layers get new pages, whose page faults cost as much as the compute.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)  # never touched


def trim_malloc() -> None:
    """Have glibc return all freed memory to the system; nothing with another C library."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def keep_memory() -> None:
    """Have glibc keep all freed memory until the process ends; nothing with another C library.

    For a process that does the same again and again, as a training does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(parameter, 2**31 - 1)
