"""Block sizes and warps of the kernels: tables by architecture, pass, channels and size of a cell.

A cell is the HR pixels nearest to one LR pixel; its size along an axis falls into the bucket 1, 2,
4 (3 or 4) or 8 (5 and more). The tables were chosen from what the compiler says of each candidate
(`python -m bench static`, `python -m bench.autotune`): no spills with any Triton from 3.3 on, and
the least modelled time on sm_80 and sm_90 together. No GPU has measured them. Nothing is tuned when
a kernel is called: what `python -m bench.autotune` has found on a machine counts only with
GSR_AUTOTUNE=1, or with GSR_TUNED naming its file.
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gsr.errors import InputError

BUCKETS = (1, 2, 4, 8)

Config = dict[str, Any]  # keyword arguments of a kernel's launch


def bucket(n: int) -> int:
    """The bucket of a cell of n HR pixels along an axis."""
    return next((b for b in BUCKETS[:-1] if n <= b), BUCKETS[-1])


def channel_bucket(c: int) -> int:
    """4, 8, 16, ... channels: what a value takes in registers."""
    return max(4, 1 << (c - 1).bit_length())


def _grid(*rows: str) -> dict[tuple[int, int], tuple[int, int]]:
    """{(cy, cx): (PY, PX)} from one line for each bucket of cy, with one PYxPX for each of cx."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for cy, row in zip(BUCKETS, rows, strict=True):
        for cx, block in zip(BUCKETS, row.split(), strict=True):
            py, px = block.split("x")
            found[cy, cx] = int(py), int(px)
    return found


# PY x PX pixels of a cell for a thread, by the cell's buckets: rows cy, columns cx. More of them
# share each load, until they no longer fit. Tall blocks take fewer registers than wide ones.
PIXELS_16 = _grid("1x1 1x2 1x4 1x8", "2x1 2x2 2x4 2x8", "4x1 4x1 4x4 4x4", "8x1 8x2 8x2 8x2")
PIXELS_8 = _grid("1x1 1x2 1x4 1x8", "2x1 2x2 2x4 2x4", "4x1 4x2 4x2 4x2", "8x1 8x1 8x1 8x1")
PIXELS_4 = _grid("1x1 1x2 1x4 1x4", "2x1 2x2 2x2 2x2", "4x1 4x1 4x1 4x1", "4x1 4x1 4x1 4x1")

# By architecture and channels, of which a launch takes 8 at most.
FORWARD = {
    "default": {4: PIXELS_16, 8: PIXELS_8},
    # Shared memory, where results change layout before they are stored, is 64 KiB for all warps of
    # a compute unit and goes with the pixels: 8 a thread leave room for 8 warps, 16 for 4.
    "gfx942": {4: PIXELS_8},
    # 4x4, 8x2 and 2x8 spill there.
    "sm_80": {4: PIXELS_8},
}

# The same kernel as the first pass of backward holds the incoming gradient as well; 4x4 would spill
# with 16-bit storage, and 8x1 with 8 channels.
PIXELS_8_LOW = _grid("1x1 1x2 1x4 1x8", "2x1 2x2 2x4 2x4", "4x1 4x2 4x2 4x2", "4x1 4x1 4x1 4x1")
PREPARE = {"default": {4: PIXELS_8, 8: PIXELS_8_LOW}}
# Where positions take 64 bits, in images of more than about 30,000 pixels, both passes hold less.
WIDE = {"default": {4: PIXELS_4, 8: PIXELS_4}}

# Pixels of a window and columns (windows of a channel of an image) of a program of the products.
# Larger blocks of the backward kernels, which hold two operands and a sum, spill.
WINDOWS = {
    "forward": {"PIXELS": 64, "COLUMNS": 32, "num_warps": 4},
    "backward": {"PIXELS": 16, "COLUMNS": 32, "num_warps": 4},
}
# With Triton 3.3 the same blocks take more registers, and spill.
WINDOWS_OLD = {
    "forward": {"PIXELS": 32, "COLUMNS": 32, "num_warps": 4},
    "backward": {"PIXELS": 16, "COLUMNS": 16, "num_warps": 4},
}

# One warp a program: its warps would share nothing, and the last programs leave less of a GPU idle.
CELLS = {"default": 32, "gfx942": 64}


def _of(table: dict[str, Any], arch: str, *keys: object) -> Any:
    """The entry of `arch` if it has one for `keys`, or else of "default"; None without either."""
    for name in (arch, "default"):
        entry = table.get(name)
        for key in keys:
            entry = None if entry is None else entry.get(key)
        if entry is not None:
            return entry
    return None


def choose_splat(
    kind: str, arch: str, cell: tuple[int, int], *, channels: int, wide: bool = False
) -> Config:
    """The shipped configuration of a grid kernel.

    Args:
        kind: "forward", "prepare" (the first pass of backward) or "backward".
        arch: "sm_90", "gfx942", ...; unknown ones get the default.
        cell: most HR pixels of a cell along each axis, (y, x).
        wide: whether positions take 64 bits, and more registers.
    """
    config = {"CELLS": _of(CELLS, arch), "num_warps": 1}
    channels = channel_bucket(channels)
    if kind == "backward":
        return config  # one pixel of a thread's at a time
    table = WIDE if wide else {"forward": FORWARD, "prepare": PREPARE}[kind]
    py, px = _of(table, arch, channels, (bucket(cell[0]), bucket(cell[1]))) or (1, 1)
    return {"PY": py, "PX": px, **config}


def choose_points(kind: str, arch: str) -> Config:
    """The shipped configuration of a kernel for points."""
    # Of more warps, some Tritons make code that fits 32 registers, and spills.
    name = {"forward": "BLOCK", "backward": "CELLS"}[kind]
    return {name: _of(CELLS, arch), "num_warps": 1}


def choose_windows(kind: str, arch: str) -> Config:
    """The shipped configuration of the products of `official`, kind "forward" or "backward".

    A float32 product is three of tf32 on NVIDIA's tensor cores; AMD's multiply float32 as it is.
    """
    table = WINDOWS if triton_version() >= (3, 4) else WINDOWS_OLD
    return {**table[kind], "PRECISION": "ieee" if arch.startswith("gfx") else "tf32x3"}


def triton_version() -> tuple[int, ...]:
    """(major, minor) of the Triton that compiles."""
    import triton

    return tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:2])


# ---- for the launchers --------------------------------------------------------------------------


def splat_config(
    kind: str,
    device: torch.device,
    cell: tuple[int, int],
    *,
    channels: int,
    wide: bool = False,
) -> Config:
    """Keyword arguments of the launch of `splat_forward` or `splat_backward`."""
    arch = architecture(device)
    tuned = {} if wide else tuned_configs()
    found = tuned.get(splat_key(kind, arch, cell, channels=channels))
    return dict(found or choose_splat(kind, arch, cell, channels=channels, wide=wide))


def points_config(kind: str, device: torch.device) -> Config:
    """Keyword arguments of the launch of `points_forward` or `points_backward`."""
    return choose_points(kind, architecture(device))


def windows_config(kind: str, device: torch.device) -> Config:
    """Keyword arguments of the launch of the products of `official`."""
    return choose_windows(kind, architecture(device))


@lru_cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ... of a GPU; "default" of anything else (Triton's interpreter)."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        name = str(torch.cuda.get_device_properties(device).gcnArchName)  # pyright: ignore
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# ---- what a tuning run has found ----------------------------------------------------------------


def splat_key(kind: str, arch: str, cell: tuple[int, int], *, channels: int) -> str:
    """A configuration's name in a file of tuned ones."""
    return f"{arch}/{kind}/{channel_bucket(channels)}/{bucket(cell[0])}x{bucket(cell[1])}"


def tuned_file() -> Path:
    """Where tuned configurations are kept: GSR_TUNED, or a file in the user's cache folder."""
    if os.environ.get("GSR_TUNED"):
        return Path(os.environ["GSR_TUNED"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gaussiansr" / "tuned.json"


def tuned_configs() -> dict[str, Config]:
    """Tuned configurations by `splat_key`; none unless the environment asks for them."""
    if os.environ.get("GSR_TUNED") or os.environ.get("GSR_AUTOTUNE") == "1":
        return _read(tuned_file())
    return {}


@lru_cache
def _read(path: Path) -> dict[str, Config]:
    try:
        configs = json.loads(path.read_text())["configs"]
        return {
            key: {name: int(n) for name, n in config.items()} for key, config in configs.items()
        }
    except FileNotFoundError:
        raise InputError(
            f"there is no file of tuned configurations {path}; make it with "
            "python -m bench.autotune, or unset GSR_AUTOTUNE and GSR_TUNED"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise InputError(f"{path} is no file of tuned configurations: {error}") from None
