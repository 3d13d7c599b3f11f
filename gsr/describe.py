"""How reports say what was measured: which model, by which code, on what machine."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsr.config import to_dict

if TYPE_CHECKING:
    from gsr.models import GaussianSR


def describe_model(model: GaussianSR, checkpoint: str) -> dict[str, Any]:
    """Return a model's name, mode, size, configuration and a hash of its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "checkpoint": checkpoint,
        "mode": model.config.mode,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": digest.hexdigest(),
        "config": to_dict(model.config),
    }


def describe_run(device: torch.device) -> dict[str, Any]:
    """Return versions, machine and commit: what else the numbers depend on."""
    import PIL

    import gsr

    cuda = device.type == "cuda"
    return {
        "versions": {
            "gsr": gsr.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return this checkout's commit, "-dirty" where files differ; None if it is no checkout."""
    root = Path(__file__).resolve().parents[1]
    # Installed into an environment inside somebody's own repository, git would name that one.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def called_after(path: str | os.PathLike | None) -> str:
    """Name a checkpoint by the end of its path, "run/best" for what a run wrote."""
    parts = Path(os.path.abspath("lite" if path is None else path)).parts[1:]
    return "/".join(parts[-telling(parts) :])


def telling(parts: Sequence[str]) -> int:
    """Return how many parts, from a path's end, name a model: every run has a best."""
    return 2 if re.fullmatch("best|model|step-.*", "".join(parts[-1:])) else 1
