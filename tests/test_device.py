"""Devices and threads by name."""

import ctypes
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gsr.device import keep_memory, select_device, set_threads, threaded_map
from gsr.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def test_devices():
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["meta", "gpu", "", "cpu:", "cuda:", "cuda:-1", "vulkan", "cpu\n"])
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match="is none of auto, cpu, cuda, cuda:1, mps and xpu"):
        select_device(name)


def test_devices_that_are_not_there():
    for name in ("cuda:99", "cuda:99999999999999999999"):
        with pytest.raises(InputError, match=f"device {name} is not available here"):
            select_device(name)


def test_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for count in (None, 1, 1024):
        set_threads(count)
    assert asked == [1, 1024]
    for count in (0, -1, 1025, 10**30):
        with pytest.raises(InputError, match=f"--threads must be from 1 to 1024, not {count}"):
            set_threads(count)
    assert asked == [1, 1024]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("call, megabytes", [("keep_pieces", 19), ("keep_memory", 100)])
def test_freed_memory_is_used_again(call, megabytes):
    """Pages that the system gives anew, in a process of its own, with and without.

    Large pieces were never kept without; smaller ones are once what Python has imported happens to
    have freed one of 32 MB.
    """
    code = f"""
import resource, torch
from gsr.device import {call}
if CALLED:
    {call}()
for n in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.ones({megabytes} << 18) for _ in range(3)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    pages = {}
    for called in (True, False):
        order = [sys.executable, "-c", code.replace("CALLED", str(called))]
        done = subprocess.run(order, cwd=ROOT, capture_output=True, text=True, check=True)
        pages[called] = int(done.stdout) * resource.getpagesize() / (3 * megabytes << 20)
    assert pages[True] < 0.1
    assert pages[False] > 0.3 or call == "keep_pieces"


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_memory()


def test_each_with_one_thread_keeps_gradients():
    found = []
    threaded_map(lambda i: found.append((i, torch.is_grad_enabled())), range(3), 1)
    assert found == [(0, True), (1, True), (2, True)]
