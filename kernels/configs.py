"""Block sizes and warps of the kernels: what their launches are given.

The splat's blocks follow from how many HR pixels an LR pixel becomes, by counts of instructions;
no more of them than fit the registers with any Triton from 3.3 on (`python -m bench static`). No
GPU has measured them. Nothing is tuned when a kernel is called: what `python -m bench.autotune` has
found on a machine counts only with GSR_AUTOTUNE=1, or with GSR_TUNED naming its file.
"""

from __future__ import annotations

import json
import math
import os
import re
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from gsr.errors import InputError

Config = dict[str, Any]  # keyword arguments of a kernel's launch

# Numbers that a thread of forward sums up: of each of its pixels one a channel, and the weight.
SUMS = 100
SIDE = 5  # most pixels of a block along an axis
# What a Gaussian costs a thread, loads and conic, in what it costs for each pixel.
SETUP = 14


def channel_bucket(c: int) -> int:
    """4, 8, 16, ... channels: what shares tuned configurations."""
    return max(4, 1 << (c - 1).bit_length())


def choose_block(scale: tuple[float, float], channels: int) -> tuple[int, int]:
    """PY x PX pixels of a cell for a thread: those of the fewest instructions a cell.

    A cell is the HR pixels nearest to one LR pixel, `scale` of them on average: at x4.1 nine of ten
    have 4 rows, the others 5. All cells of a row are equally high, so that a block without any row
    is left at once; columns differ, and all cells take as many steps as the widest.
    """
    low, part = math.floor(scale[0]), scale[0] % 1
    high, width = math.ceil(scale[0]), math.ceil(scale[1])

    def cost(block: tuple[int, int]) -> tuple[float, int]:
        py, px = block
        rows = (1 - part) * math.ceil(low / py) + part * math.ceil(high / py)
        return rows * math.ceil(width / px) * (SETUP + py * px), px

    sides = (range(1, min(max(n, 1), SIDE) + 1) for n in (high, width))
    return min(((py, px) for py, px in product(*sides) if fits(py, px, channels)), key=cost)


def fits(py: int, px: int, channels: int) -> bool:
    """Whether a thread has registers for a block; a launch takes 8 channels at most."""
    return py * px * (min(channels, 8) + 1) <= SUMS


# Instructions of a packed splat for a Gaussian: once, for a row, a column and a pixel of a block.
ONCE, ROW, COLUMN, PIXEL = 17, 3, 2, 7
# Programs, a warp each, that make an H100 busy: eight for each of its 132 multiprocessors.
BUSY = 8 * 132


def choose_packed_block(
    scale: tuple[float, float], cells: tuple[int, int], lanes: int
) -> tuple[int, int]:
    """PY x PX pixels of a cell for a thread of the packed splat; as `choose_block`.

    A block that has one row less runs as fast as such a block. Where `cells`, (rows, columns) of
    them, are few, blocks are small, so that there are enough programs.
    """
    low, part = math.floor(scale[0]), scale[0] % 1
    high, width = math.ceil(scale[0]), math.ceil(scale[1])
    lines = cells[0] * math.ceil(cells[1] / lanes)

    def block_cost(py: int, px: int) -> int:
        return ONCE + ROW * py + COLUMN * px + PIXEL * py * px if py else 0

    def cost(block: tuple[int, int]) -> tuple[int, float, int]:
        py, px = block

        def column(rows: int) -> int:
            whole, rest = divmod(rows, py)
            ends = block_cost(rest if rest == py - 1 else py, px) if rest else 0
            return whole * block_cost(py, px) + ends

        across = math.ceil(width / px)
        programs = lines * across * math.ceil(high / py)
        whole = across * ((1 - part) * column(low) + part * column(high))
        return max(BUSY - programs, 0), whole, px

    tall, broad = (range(1, min(max(n, 1), SIDE) + 1) for n in (high, width))
    return min(product(tall, broad), key=cost)


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


def choose_splat(
    kind: str, arch: str, scale: tuple[float, float], *, channels: int, wide: bool = False
) -> Config:
    """The shipped configuration of a grid kernel.

    Args:
        kind: "forward", "prepare" (the first pass of backward) or "backward".
        arch: "sm_90", "gfx942", ...; unknown ones get the default.
        scale: HR pixels per LR pixel along each axis, (y, x).
        wide: whether positions take 64 bits.
    """
    config = {"CELLS": CELLS.get(arch, CELLS["default"]), "num_warps": 1}
    if kind == "backward":
        return config  # one pixel of a thread's at a time
    py, px = choose_block(scale, channels)
    if arch.startswith("sm_"):
        config["maxnreg"] = _registers(kind, py * px, min(channels, 8), wide)
    return {"PY": py, "PX": px, **config}


def _registers(kind: str, pixels: int, channels: int, wide: bool) -> int:
    """Most registers of a thread of forward: what lets 16, 12 or 8 warps share a multiprocessor.

    Left alone, the compiler aims at fewer than it needs, and spills a number or two.
    """
    sums = pixels * (channels + 1)
    if sums + 8 * channels + 24 * (kind == "prepare") + 24 * wide <= 88:
        return 128
    return 168 if sums + 16 * wide <= 90 else 255


def choose_packed(arch: str, scale: tuple[float, float], cells: tuple[int, int]) -> Config:
    """The shipped configuration of the packed splat.

    Args:
        scale: HR pixels per LR pixel, (y, x).
        cells: (rows, columns) of LR pixels that are splatted onto, of all images.
    """
    config: Config = {"CELLS": CELLS.get(arch, CELLS["default"]), "num_warps": 1}
    py, px = choose_packed_block(scale, cells, config["CELLS"])
    if arch.startswith("sm_"):
        # Loops of few pixels are unrolled until they need as many registers as large blocks, and
        # Blackwell's compiler takes a few more; what is not given is spilled.
        few = 6 <= py * px <= (12 if int(arch[3:]) >= 100 else 16)
        config["maxnreg"] = 128 if few else 168 if py * px <= 16 else 255
    return {"PY": py, "PX": px, "SPLIT": py > 1 and scale[0] % 1 > 0, **config}


def choose_points(kind: str, arch: str) -> Config:
    """The shipped configuration of a kernel for points."""
    # Of more warps, some Tritons make code that fits 32 registers, and spills.
    name = {"forward": "BLOCK", "backward": "CELLS"}[kind]
    return {name: CELLS.get(arch, CELLS["default"]), "num_warps": 1}


def choose_windows(kind: str, arch: str) -> Config:
    """The shipped configuration of the products of `official`, kind "forward" or "backward".

    A float32 product is three of tf32 on NVIDIA's tensor cores; AMD's multiply float32 as it is.
    """
    table = WINDOWS if triton_version() >= (3, 4) else WINDOWS_OLD
    return {**table[kind], "PRECISION": "ieee" if arch.startswith("gfx") else "tf32x3"}


def triton_version() -> tuple[int, ...]:
    """(major, minor) of the Triton that compiles."""
    import triton  # pyright: ignore[reportMissingTypeStubs]

    return tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:2])


# ---- for the launchers --------------------------------------------------------------------------


def splat_config(
    kind: str,
    device: torch.device,
    scale: tuple[float, float],
    *,
    channels: int,
    wide: bool = False,
) -> Config:
    """Keyword arguments of the launch of `splat_forward` or `splat_backward`."""
    arch = architecture(device)
    found = tuned_configs().get(splat_key(kind, arch, scale, channels=channels))
    return dict(found or choose_splat(kind, arch, scale, channels=channels, wide=wide))


def packed_config(
    device: torch.device, scale: tuple[float, float], *, cells: tuple[int, int]
) -> Config:
    """Keyword arguments of the launch of `packed_splat`."""
    return choose_packed(architecture(device), scale, cells)


def pack_config(device: torch.device) -> Config:
    """Keyword arguments of the launch of `packed_gaussians`."""
    return choose_points("backward", architecture(device))


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


def splat_key(kind: str, arch: str, scale: tuple[float, float], *, channels: int) -> str:
    """A configuration's name in a file of tuned ones."""
    return f"{arch}/{kind}/{channel_bucket(channels)}/{scale[0]:g}x{scale[1]:g}"


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


# ---- the Fourier decoder ------------------------------------------------------------------------

# Pixels of a program, and phases and units of the MLP that it makes at a time, from blocks of DEPTH
# numbers of which STAGES are on their way. The more pixels, the fewer times weights are read from
# L2: at 128 of them a pixel takes 9 KB. What is larger spills with some Triton from 3.3 on.
DECODE = {
    "bf16": {"PIXELS": 128, "WAVES": 64, "UNITS": 128, "DEPTH": 32, "STAGES": 4, "num_warps": 8},
    "fp32": {"PIXELS": 64, "WAVES": 16, "UNITS": 64, "DEPTH": 32, "STAGES": 2, "num_warps": 4},
}
DECODE_ARCH = {
    ("bf16", "sm_8"): {"WAVES": 32, "UNITS": 64, "STAGES": 3},
    ("fp32", "sm_8"): {"DEPTH": 16, "num_warps": 8},
    ("bf16", "sm_1"): {"WAVES": 32, "STAGES": 3},
    # Left alone, the compiler aims at 80 registers of a thread there, and spills.
    ("fp32", "sm_1"): {"UNITS": 32, "DEPTH": 16, "num_warps": 8, "maxnreg": 168},
    ("bf16", "gfx9"): {"WAVES": 32, "STAGES": 2, "num_warps": 4},
    ("fp32", "gfx9"): {"UNITS": 32, "STAGES": 1},
}


def choose_decode(kind: str, arch: str, *, half: int = 128, channels: int = 64) -> Config:
    """The shipped configuration of `decode_colours`.

    Args:
        kind: "bf16" or "fp32", the type that matrices are multiplied in.
        half: phases, half the width of the MLP.
        channels: of the features.
    """
    config = {**DECODE[kind], **DECODE_ARCH.get((kind, arch[:4]), {})}
    blocks = {"WAVES": half, "UNITS": 2 * half, "DEPTH": math.gcd(channels, 2 * half)}
    config |= {name: math.gcd(config[name], n) for name, n in blocks.items()}
    exact = "ieee" if arch.startswith("gfx") else "tf32x3"
    return {**config, "PRECISION": exact if kind == "fp32" else "tf32"}


def decode_config(dtype: torch.dtype, device: torch.device, *, half: int, channels: int) -> Config:
    """Keyword arguments of the launch of `decode_colours`."""
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    return choose_decode(kind, architecture(device), half=half, channels=channels)


@lru_cache
def decode_programs(device: torch.device) -> int:
    """Programs of `decode_colours`: two a multiprocessor of a GPU, of which one may wait.

    On Triton's interpreter 2.
    """
    if device.type != "cuda":
        return 2
    properties: Any = torch.cuda.get_device_properties(device)  # pyright: ignore
    return 2 * properties.multi_processor_count  # pyright: ignore
