"""Devices and threads by name."""

import pytest
import torch

from gsr.device import pick_device, set_threads
from gsr.errors import InputError


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["meta", "gpu", "", "cpu:", "cuda:", "cuda:-1", "vulkan", "cpu\n"])
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match="is none of auto, cpu, cuda, cuda:1, mps and xpu"):
        pick_device(name)


def test_devices_that_are_not_there():
    for name in ("cuda:99", "cuda:99999999999999999999"):
        with pytest.raises(InputError, match=f"device {name} is not available here"):
            pick_device(name)


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
