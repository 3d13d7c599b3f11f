"""Where a model computes: the device and the number of CPU threads that a user asks for."""

from __future__ import annotations

import re

import torch

from gsr.config import DEVICES, MAX_THREADS
from gsr.errors import InputError


def pick_device(name: str) -> torch.device:
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
