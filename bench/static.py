"""What the compiler says of every kernel as shipped, on four architectures, without a GPU.

    python -m bench static                                    # everything; minutes, then cached
    python -m bench static --arch sm_90 --output static.json
    python -m bench static --triton 3.4.0 3.6.0 3.7.1         # each from build/triton: make tritons

Registers, spills, shared memory and the instructions of a loop are facts about the machine code.
The times are a model, not a measurement: warp instructions counted in that code, times how often
each of them runs, over the published peak rates of the chip. Nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import cost, document, schema
from bench.cost import Shape
from gsr.errors import InputError
from gsr.kernels import (
    configs,  # pyright: ignore[reportAttributeAccessIssue]
    decode,  # pyright: ignore[reportAttributeAccessIssue]
    packed,  # pyright: ignore[reportAttributeAccessIssue]
    splat,  # pyright: ignore[reportAttributeAccessIssue]
    windows,  # pyright: ignore[reportAttributeAccessIssue]
)

ROOT = Path(__file__).resolve().parents[1]
TRITONS = ROOT / "build" / "triton"  # a folder a version
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


# ---- what is shipped ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One way in which the models call the operator."""

    name: str
    K: int
    C: int
    R: int
    offset: bool

    def constants(self) -> dict:
        return {
            "K": self.K, "C": self.C, "R": self.R,
            "NORMALIZE": True, "HAS_OFFSET": self.offset,
        }  # fmt: skip


USES = [
    Use("direct", K=4, C=3, R=1, offset=True),
    Use("lite", K=9, C=3, R=1, offset=True),  # the bundled model
    Use("field", K=1, C=8, R=3, offset=False),
]
WINDOWS = {"WINDOW": 7, "NP": 64}  # of `official`: 49 Gaussians, and the power of 2 that holds them
TAPS = 5
DECODER = {"CP": 64, "HALF": 128}  # channels, and half the width of the MLP, as published
LAYERS = 4
# HR pixels per LR pixel along an axis: whole numbers, a little more, and halves.
SCALES = [n + part for n in range(1, 10) for part in (0, 0.1, 0.5)]


def shipped(
    arch: str | None = None, uses: Sequence[Use] = USES, scales: Sequence[float] = SCALES
) -> list[tuple[str, dict, int]]:
    """(kernel, constants, num_warps) of every configuration that the models' uses are given.

    `arch` names one of `TARGETS`; None is what any architecture gets.
    """
    found = []
    for a in TARGETS if arch is None else [arch]:
        found += [one for use in uses for one in configurations(a, use, scales)]
        # num_warps is Triton's own choice there.
        found.append(("windows_weights", {**WINDOWS, "TAPS": TAPS}, 4))
        for name in ("windows_forward", "windows_backward_features", "windows_backward_weights"):
            config = configs.choose_windows(name.split("_")[1], a)
            warps = config.pop("num_warps")
            found.append((name, {**WINDOWS, **config}, warps))
        found += decoders(a)
    return _distinct(found)


def decoders(arch: str) -> list[tuple[str, dict, int]]:
    """(kernel, constants, num_warps) of the decoder; "TYPE" is that of its matrices."""
    found = []
    for kind in ("fp32", "bf16"):
        config = configs.choose_decode(kind, arch)
        warps = config.pop("num_warps")
        more = {"PIXELS": decode.FEATURES // DECODER["CP"], "CP": DECODER["CP"]}
        for skip in (False, True):
            found.append(("decode_features", {"TYPE": kind, "SKIP": skip, **more}, 4))
        constants = {"TYPE": kind, **DECODER, **config, "WIDEN": False}
        found.append(("decode_colours", constants, warps))
    return found


def configurations(
    arch: str, use: Use, scales: Sequence[float] = SCALES
) -> list[tuple[str, dict, int]]:
    """(kernel, constants, num_warps) of what kernels/configs.py gives one use at any scale."""
    found = []

    def add(name, config, **more):
        constants = {**use.constants(), **config, **more}
        found.append((name, constants, constants.pop("num_warps")))

    pairs = [(sy, sx, False) for sy in scales for sx in scales]
    huge = ((1, 1), (2, 2), (4, 4), (5, 5), (1, 8), (8, 1))
    pairs += [(sy, sx, True) for sy, sx in huge if {sy, sx} <= {*scales}]
    for sy, sx, wide in pairs:
        more = {"WIDE": True} if wide else {}
        for prepare, kind in enumerate(("forward", "prepare")):
            config = configs.choose_splat(kind, arch, (sy, sx), channels=use.C, wide=wide)
            add("splat_forward", config, PREPARE=bool(prepare), **more)
        config = configs.choose_splat("backward", arch, (sy, sx), channels=use.C)
        add("splat_backward", config, **more)
    if use.C == 3:
        found += packed_configurations(arch, use, scales)
    for prepare in (False, True):
        add("points_forward", configs.choose_points("forward", arch), PREPARE=prepare)
    add("points_backward", configs.choose_points("backward", arch))
    return _distinct(found)


def packed_configurations(
    arch: str, use: Use, scales: Sequence[float] = SCALES
) -> list[tuple[str, dict, int]]:
    """What `direct` is given at inference; for other models than the bundled one, and for images
    of bytes and huge ones, at some scales.
    """
    gaussians = configs.choose_points("backward", arch)
    found = [
        ("packed_gaussians", {"K": use.K, "CELLS": gaussians["CELLS"]}, gaussians["num_warps"])
    ]
    some = [(n, n) for n in (2, 4, 4.1) if n in scales]
    pairs = [(n, n) for n in scales] + [(1, 4), (4, 1), (2, 5), (5, 2)]
    pairs = [pair for pair in pairs if {*pair} <= {*scales}] if use.name == "lite" else some
    more = [{}] * len(pairs) + [{"LEVELS": True}] * len(some) + [{"WIDE": True}] * len(some)
    for scale, flags in zip([*pairs, *some, *some], more, strict=True):
        config = configs.choose_packed(arch, scale, cells=(10_000, 10_000))
        constants = {"K": use.K, "R": use.R, "NORMALIZE": True, "LEVELS": False, **config, **flags}
        found.append(("packed_splat", constants, constants.pop("num_warps")))
    return found


def _distinct(found: list) -> list:
    return list({(n, w, tuple(sorted(c.items()))): (n, c, w) for n, c, w in found}.values())


# ---- compiling ----------------------------------------------------------------------------------

# Pointers of all kernels by the type of what they point to. Gradients are float32 whatever the
# storage type, as are the weights that all windows share.
STORED = "values sigma rho opacity offset features grad out raw".split()
FLOAT = "d_values d_sigma d_rho d_opacity d_offset d_features kernels weights d_weights".split()
FLOAT += "conic centre blue lr".split()
SCALARS = ("eps", "low", "high", "reach")
POINTERS = {**dict.fromkeys(FLOAT, "*fp32"), "points": "*fp64", "order": "*i64", "starts": "*i64"}


# Of the decoder, whose matrices alone may be of 16 bits.
MATRICES = ("q", "conv", "weights", "scratch")
DECODED = "features splatted lr out conv_bias phase biases last last_bias ry rx".split()
PSEUDO = ("maxnreg", "TYPE")  # among the constants, and no arguments of the kernel


def kernel_of(name: str):
    modules = {"windows": windows, "packed": packed, "decode": decode}
    return getattr(modules.get(name.split("_")[0], splat), name)


def compile_kernel(name: str, constants: dict, target, num_warps: int, values: str = "fp32"):
    """Triton's compiled kernel `name` of kernels/splat.py, windows.py or decode.py.

    Args:
        constants: its constexpr arguments, and "maxnreg" where it has a limit of registers.
        target: a GPUTarget or a name from `TARGETS`.
        values: storage type of the Gaussians and the result, "fp32", "bf16" or "fp16"; the
            decoder's is among the constants, as "TYPE".
    """
    kernel = kernel_of(name)
    options = {"num_warps": num_warps}
    options |= {n: constants[n] for n in ("maxnreg",) if n in constants}
    pointers = POINTERS | dict.fromkeys(STORED, f"*{values}")
    if "TYPE" in constants:
        pointers = dict.fromkeys(DECODED, "*fp32")
        pointers |= dict.fromkeys(MATRICES, f"*{constants['TYPE']}")
    constants = {n: value for n, value in constants.items() if n not in PSEUDO}
    if "WIDE" in kernel.arg_names:
        constants = {"WIDE": False, **constants}
    if constants.get("PREPARE") or name in ("windows_weights", "packed_splat"):
        pointers["out"] = "*u8" if constants.get("LEVELS") else "*fp32"
    if name in ("splat_backward", "points_backward"):  # of NORMALIZE: the first pass wrote it
        pointers["grad"] = "*fp32"
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers:
            signature[argument] = pointers[argument]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument in SCALARS else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    target = TARGETS[target] if isinstance(target, str) else target
    return triton.compile(source, target=target, options=options)


def _tool(name: str, *arguments: str) -> str:
    """One of the NVIDIA tools that come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _on_cubin(compiled, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        return _tool("cuobjdump", *options, str(path))


def resources(compiled) -> dict:
    """What a compiled kernel takes: registers (a thread), stack, spills and shared memory (bytes).

    NVIDIA's compiler shows spills as stack, so `spills` repeats it there; on AMD `spills` counts
    registers and `stack` is the private segment.
    """
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        text = _on_cubin(compiled, "--dump-resource-usage")
        usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        stack = usage["STACK"] + usage["LOCAL"]
        return {"registers": usage["REG"], "stack": stack, "spills": stack, "shared": shared}
    text = compiled.asm["amdgcn"]

    def count(key):
        return int(re.findall(rf"\.{key}:\s*(\d+)", text)[0])

    return {
        "registers": count("vgpr_count"),
        "stack": count("private_segment_fixed_size"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "shared": shared,
        "scalar_registers": count("sgpr_count"),
        "accumulation_registers": count("agpr_count"),
    }


# ---- machine code -------------------------------------------------------------------------------


@dataclass
class Loop:
    """A loop of the SASS: its own instructions by opcode, and the loops directly inside it."""

    mix: Counter
    inner: list[Loop]


def disassemble(compiled) -> Loop:
    """A CUDA kernel as a nest of loops, the outermost "loop" being the kernel itself.

    A call counts as the subroutine's instructions (64-bit division, as a rule). Where a branch
    decides between such a call and something shorter, as it does for divisions of small numbers,
    the call is left out.
    """
    lines = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);",
        _on_cubin(compiled, "--dump-sass"),
    )
    code = [(int(at, 16), bool(predicate), op, rest) for at, predicate, op, rest in lines]
    index = {at: i for i, (at, *_) in enumerate(code)}

    def goal(i):
        found = re.search(r"(0x[0-9a-f]+)\s*$", code[i][3])
        return index.get(int(found[1], 16)) if found else None

    def subroutine(i):
        """What a call at i runs; None if it never returns, which is how some jumps are spelt."""
        body = Counter()
        for _, predicate, op, _ in code[goal(i) :]:
            body[_short(op)] += 1
            if op == "EXIT":
                return None
            if op.startswith("RET") and not predicate:
                return body

    called = {i: subroutine(i) for i, (_, _, op, _) in enumerate(code) if op.startswith("CALL")}
    follow = {}
    for i, (_, predicate, op, rest) in enumerate(code):
        predicate = predicate or "P" in rest.split("0x")[0]  # BRA.U UP0, 0x120
        jump = op.startswith("BRA") or i in called and called[i] is None
        after = [goal(i)] if jump and goal(i) is not None else []
        if i + 1 < len(code) and (predicate or not (jump or op == "EXIT" or op.startswith("RET"))):
            after.append(i + 1)
        follow[i] = after
    starts = {0} | {j for i, a in follow.items() for j in a if a != [i + 1]}
    starts |= {i + 1 for i, a in follow.items() if a != [i + 1] and i + 1 < len(code)}
    starts = sorted(starts)
    blocks = {s: range(s, e) for s, e in zip(starts, [*starts[1:], len(code)], strict=True)}
    after = {s: follow[b[-1]] for s, b in blocks.items()}
    before = {s: [p for p in blocks if s in after[p]] for s in blocks}

    seen, todo = {0}, [0]
    while todo:
        for s in after[todo.pop()]:
            if s not in seen:
                seen.add(s)
                todo.append(s)
    dominators = {s: set(seen) for s in seen}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for s in sorted(seen - {0}):
            new = {s} | set.intersection(*(dominators[p] for p in before[s] if p in seen))
            changed |= new != dominators[s]
            dominators[s] = new

    bodies = {}  # natural loops by header
    for s in seen:
        for head in after[s]:
            if head in dominators[s]:
                body, todo = {head, s}, [s]
                while todo:
                    b = todo.pop()
                    if b != head:
                        todo += [p for p in before[b] if p in seen and p not in body]
                        body |= {p for p in before[b] if p in seen}
                bodies[head] = bodies.get(head, set()) | body

    def shortcut(s):
        """Whether a branch chooses between block s, which calls, and one that does not."""
        if not any(called.get(i) for i in blocks[s]) or len(before[s]) != 1 or len(after[s]) != 1:
            return False
        other = [t for t in after[before[s][0]] if t != s]
        return len(other) == 1 and after[s] in (other, after[other[0]])

    def mix(parts):
        total = Counter()
        for s in parts:
            if not shortcut(s):
                for i in blocks[s]:
                    total[_short(code[i][2])] += 1
                    total += called.get(i) or Counter()
        return total

    def nest(parts, loops):
        outer = {h: b for h, b in loops.items() if not any(b < c for c in loops.values())}
        inner = [nest(b, {h: c for h, c in loops.items() if c < b}) for b in outer.values()]
        return Loop(mix(parts - set().union(*outer.values())), inner)

    return nest(seen, bodies)


def _short(op: str) -> str:
    return op if op.startswith("MUFU") else op.split(".")[0]


# ---- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor (NVIDIA) or compute unit (AMD) can hold."""

    warps: int
    blocks: int
    registers: int  # of 32 bits, for all lanes of all warps
    shared: int
    warp: int = 32
    step: int = 8  # registers of a thread are given out in steps of


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 ISA
# guide: 4 SIMDs of 512 registers x 64 lanes and at most 8 waves, 64 KiB of shared memory.
LIMITS = {
    "sm_80": Limits(64, 32, 65536, 164 << 10),
    "sm_90": Limits(64, 32, 65536, 228 << 10),
    "sm_100": Limits(64, 32, 65536, 228 << 10),
    "gfx942": Limits(32, 32, 4 * 512 * 64, 64 << 10, warp=64),
}


def occupancy(usage: dict, num_warps: int, arch: str) -> int:
    """Warps that one multiprocessor holds at a time, from registers and shared memory."""
    limit = LIMITS[arch]
    registers = -(-usage["registers"] // limit.step) * limit.step * limit.warp * num_warps
    blocks = [limit.blocks, limit.warps // num_warps, limit.registers // registers]
    system = 1024 if arch in ("sm_90", "sm_100", "sm_80") else 0  # bytes of each block
    if usage["shared"] + system:
        blocks.append(limit.shared // (usage["shared"] + system))
    return min(blocks) * num_warps


@dataclass(frozen=True)
class Chip:
    """Published peak rates of a GPU."""

    name: str
    arch: str
    sms: int
    clock: float  # Hz
    bandwidth: float  # bytes / s
    fp32: float  # warp instructions (32 lanes) a clock and multiprocessor


CHIPS = [
    # NVIDIA A100 80GB SXM data sheet: 108 SMs, 1.41 GHz (19.5 TFLOPS fp32), 2039 GB/s.
    Chip("A100", "sm_80", 108, 1.41e9, 2.039e12, 2.0),
    # NVIDIA H100 SXM data sheet: 132 SMs, 67 TFLOPS fp32 (hence 1.98 GHz), 3.35 TB/s.
    Chip("H100", "sm_90", 132, 1.98e9, 3.35e12, 4.0),
]
# Others of both, CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": 16
# lanes of special functions; four schedulers with one instruction a clock each.
MUFU, ISSUE = 0.5, 4.0
ARITHMETIC = ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "IMAD")


def count(name: str, constants: dict, code: Loop, s: Shape) -> dict[str, float]:
    """Warp instructions of a grid kernel for the image `s`, one warp a program, by pipe."""
    window, cy, cx = 2 * s.R + 1, -(-s.H // s.h), -(-s.W // s.w)
    programs, trips = s.b * s.h * -(-s.w // constants["CELLS"]), [window * window, s.K]
    pixels = constants.get("PY", 1) * constants.get("PX", 1)
    if name == "splat_backward":
        programs, trips = programs * s.K, [window * s.H / s.h, window * cx]
    else:
        programs *= -(-cy // constants["PY"]) * -(-cx // constants["PX"])
    total = Counter()

    def run(loop: Loop, left: Sequence[float], times: float) -> None:
        # A loop of one step, or two made into one, is gone from the code.
        n = left[0] if loop.inner else math.prod(left)
        if not loop.inner:
            n /= max(1, loop.mix["MUFU.EX2"] / pixels)  # unrolled
        for op, m in loop.mix.items():
            total[op] += m * n * times  # pyright: ignore[reportArgumentType]
        for inner in loop.inner:
            run(inner, left[1:], times * n)

    run(Loop(code.mix, []), [1], 1)
    for loop in code.inner:
        run(loop, trips if _hot(loop) else [5], 1)  # the rows that a bicubic filter takes
    mufu = sum(n for op, n in total.items() if op.startswith("MUFU"))
    found = {
        "issue": total.total(), "mufu": mufu, "arithmetic": sum(total[op] for op in ARITHMETIC)
    }  # fmt: skip
    return {pipe: n * programs for pipe, n in found.items()}


def decoder_counts(constants: dict, num_warps: int, code: Loop) -> dict[str, float]:
    """Instructions of warps that a pixel of `decode_colours` takes, and MMA, those of matrices.

    For sm_80 and sm_90. Both sides of a branch are counted.
    """
    c, total = constants, Counter()
    width, deep, products = 2 * c["HALF"], *{"bf16": (16, 1), "fp32": (8, 3)}[c["TYPE"]]

    def needed(columns: int, blocks: int) -> float:
        """MMA of a warp: of 16 pixels, 8 columns (sm_80) or all (sm_90), and `deep` numbers."""
        across = 8 if matrices(tile)["HMMA"] else columns
        block = c["PIXELS"] * columns * c["DEPTH"] / (16 * across * deep)
        return products * blocks * block / num_warps

    def matrices(loop: Loop) -> Counter:
        own = Counter({op: n for op, n in loop.mix.items() if "MMA" in op})
        return sum((matrices(one) for one in loop.inner), own)

    def add(loop: Loop, trips: list[int], times: float, mma: float) -> None:
        # How far the innermost loop is unrolled, its matrix instructions tell.
        own = sum(n for op, n in loop.mix.items() if "MMA" in op)
        times = mma / own if own else times * trips[0]
        total.update({op: n * times for op, n in loop.mix.items()})
        for one in loop.inner:
            if matrices(one):
                add(one, trips[1:], times, mma)

    (tile,) = (loop for loop in code.inner if matrices(loop))
    total.update(tile.mix)
    waves, units = c["HALF"] // c["WAVES"], width // c["UNITS"]
    of_waves = needed(c["WAVES"], 4 * waves * 9 * c["CP"] // c["DEPTH"])
    of_layers = needed(c["UNITS"], LAYERS * units * width // c["DEPTH"])
    convolution, layers = sorted(
        (loop for loop in tile.inner if matrices(loop)),
        # Only a layer has a loop within a loop, or the sums of the colours.
        key=lambda loop: any("SHFL" in one.mix for one in (loop, *loop.inner)),
    )
    add(convolution, [waves], 1, of_waves)
    add(layers, [LAYERS, units], 1, of_layers)
    mma = sum(n for op, n in total.items() if "MMA" in op)
    per_pixel = num_warps / c["PIXELS"]
    return {"instructions": total.total() * per_pixel, "MMA": mma * per_pixel}


def model(chip: Chip, counted: dict[str, float], moved: int) -> dict[str, float]:
    """Seconds that each limit of `chip` asks for; the kernel takes the longest of them, or more.

    Args:
        counted: from `count`.
        moved: bytes to and from memory.
    """
    rates = {"arithmetic": chip.fp32, "mufu": MUFU, "issue": ISSUE}
    times = {n: counted[n] / rate / chip.sms / chip.clock for n, rate in rates.items()}
    return {"memory": moved / chip.bandwidth, **times}


# ---- report -------------------------------------------------------------------------------------


def _hot(loop: Loop) -> Counter:
    """The innermost loop that holds an exponential or a matrix instruction; empty if none does."""
    for inner in loop.inner:
        if found := _hot(inner):
            return found
    return loop.mix if any(op == "MUFU.EX2" or "MMA" in op for op in loop.mix) else Counter()


def _summary(mix: Counter) -> dict[str, int]:
    """Instructions of a loop by what they do."""
    fp32 = sum(mix[op] for op in ARITHMETIC if op != "IMAD")
    mufu = sum(n for op, n in mix.items() if op.startswith("MUFU"))
    # HMMA of a warp, HGMMA of four (sm_90), UTCHMMA of a block (sm_100).
    mma = sum(n for op, n in mix.items() if "MMA" in op)
    others = {"LDG": mix["LDG"], "MMA": mma, "SHFL": mix["SHFL"], "BAR": mix["BAR"]}
    return {"all": mix.total(), "FP32": fp32, "MUFU": mufu, **others}


def _names(kernel: str, constants: dict) -> tuple[str, dict]:
    """A row's case and sizes."""
    family, kind = kernel.split("_", 1)
    kind = "prepare" if constants.get("PREPARE") else kind.replace("_", " ")
    kind += " wide" if constants.get("WIDE") else ""
    if family == "windows":
        return f"official {kind}", {"WINDOW": constants["WINDOW"]}
    if family == "decode":
        kind = f"decoder {kind} {constants['TYPE']}" + " skip" * constants.get("SKIP", False)
        return kind, {n: constants[n] for n in DECODER if n in constants}
    if family == "packed":
        use = next(u for u in USES if u.C == 3 and u.K == constants["K"])
        kind += " levels" if constants.get("LEVELS") else ""
        return f"{use.name} packed {kind}", {"K": use.K, "C": 3, "R": use.R}
    use = next(u for u in USES if (u.K, u.C, u.R) == tuple(constants[x] for x in "KCR"))
    points = "points " if family == "points" else ""
    return f"{use.name} {points}{kind}", {"K": use.K, "C": use.C, "R": use.R}


BLOCKS = (
    "PY", "PX", "SPLIT", "CELLS", "BLOCK", "PIXELS", "COLUMNS", "UNITS", "WAVES", "DEPTH", "STAGES",
    "maxnreg",
)  # fmt: skip


def compiled_rows(arch: str, uses: Sequence[Use], scales: Sequence[float]) -> list[dict]:
    """A row for every shipped configuration of one architecture."""
    rows = []
    for kernel, constants, warps in shipped(arch, uses, scales):
        case, sizes = _names(kernel, constants)
        compiled = compile_kernel(kernel, constants, arch, warps)
        usage = resources(compiled)
        cuda = "cubin" in compiled.asm
        loop: dict[str, Any] = _summary(_hot(disassemble(compiled))) if cuda else {}
        config = {n: constants[n] for n in BLOCKS if n in constants}
        if kernel == "decode_colours" and arch in ("sm_80", "sm_90"):
            loop["pixel"] = decoder_counts(constants, warps, disassemble(compiled))
        rows.append(
            schema.row(
                case,
                arch,
                sizes,
                config={**config, "num_warps": warps},
                resources=usage,
                loop=loop,
                occupancy=occupancy(usage, warps, arch),
            )  # fmt: skip
        )
    return rows


IMAGE = (1356, 2040)
SCALE = 4


KINDS = ("packed splat", "forward", "prepare", "backward")


def model_rows(uses: Sequence[Use]) -> list[dict]:
    """A row for each kernel of the grid, use and chip: the model's seconds for the x4 image."""
    rows = []
    for chip, use, kind in product(CHIPS, uses, KINDS):
        if use.C == 3 or kind != "packed splat":
            lr = IMAGE[0] // SCALE, IMAGE[1] // SCALE
            s = Shape(use.K, use.C, use.R, *lr, *IMAGE, offset=use.offset)
            r = {"provider": chip.arch, "sizes": {"K": use.K, "C": use.C}}
            rows.append(model_row(chip, use, s, kind, _at_scale(kind, r)))
    return rows


def model_row(chip: Chip, use: Use, s: Shape, kind: str, config: dict) -> dict:
    """The model's row for one grid kernel in one configuration."""
    kernel = {"packed splat": "packed_splat", "backward": "splat_backward"}.get(
        kind, "splat_forward"
    )
    constants = {**use.constants(), **config}
    warps = constants.pop("num_warps")
    constants |= {"LEVELS": False} if kernel == "packed_splat" else {}
    constants |= {"PREPARE": kind == "prepare"} if kernel == "splat_forward" else {}
    names = {*kernel_of(kernel).arg_names, "maxnreg"}
    constants = {n: v for n, v in constants.items() if n in names}
    compiled = compile_kernel(kernel, constants, chip.arch, warps)
    usage = resources(compiled)
    moved, operations = {
        "packed splat": (cost.forward_bytes(s), cost.forward_operations(s)),
        "forward": (cost.forward_bytes(s), cost.forward_operations(s)),
        # The incoming gradient in, g' and s out instead of the image.
        "prepare": (cost.forward_bytes(s) + 4 * s.pixels * (s.C + 1), cost.forward_operations(s)),
        "backward": (
            cost.backward_bytes(s) + 4 * s.pixels,
            cost.backward_operations(s) - cost.forward_operations(s),
        ),
    }[kind]
    counted = count(kernel, constants, disassemble(compiled), s)
    return schema.row(
        f"{use.name} {kind}", f"model {chip.name}",
        {"K": use.K, "C": use.C, "R": use.R, "LR": [s.h, s.w], "HR": [s.H, s.W]},
        bytes=moved, operations=operations, config=config, resources=usage,
        occupancy=occupancy(usage, warps, chip.arch), model=model(chip, counted, moved),
    )  # fmt: skip


NOTE = (
    "Registers, spills, shared memory and instructions are the compiler's. The times are a model "
    "from published peak rates, not a measurement: no GPU was used."
)


def compiled_table(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table of what was compiled."""
    parts = ("all", "FP32", "MUFU", "LDG", "MMA", "SHFL")
    lines = [
        "| kernel | target | block | registers | spills | shared | warps | loop: "
        + " | ".join(parts)
        + " |",
        "|---" * (7 + len(parts)) + "|",
    ]
    for r in rows:
        used = [str(r["resources"][n]) for n in ("registers", "spills", "shared")]
        loop = [str(r["loop"].get(n, "")) for n in parts]
        cells = [r["case"], r["provider"], block_text(r["config"]), *used, str(r["occupancy"])]
        lines.append("| " + " | ".join([*cells, *loop]) + " |")
    return lines


def model_table(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table of the model, in milliseconds."""
    names = list(dict.fromkeys(n for r in rows for n in r["model"]))
    lines = [
        "| kernel | model | block | " + " | ".join(names) + " | longest |",
        "|---" * (len(names) + 4) + "|",
    ]
    for r in rows:
        longest = max(r["model"].values())
        times = [r["model"].get(n) for n in names]
        texts = ["" if t is None else f"{t * 1e3:.3f}" for t in [*times, longest]]
        cells = [r["case"], r["provider"].removeprefix("model "), block_text(r["config"])]
        lines.append("| " + " | ".join([*cells, *texts]) + " |")
    return lines


def block_text(config: dict) -> str:
    """4x2 pixels of 32 cells, 1 warp: "4x2 / 32 / 1"."""
    pixels = f"{config.get('PY', 1)}x{config['PX']}" if "PX" in config else config.get("PIXELS")
    lanes = next((config[n] for n in ("CELLS", "BLOCK", "COLUMNS", "UNITS") if n in config), None)
    return " / ".join(str(n) for n in (pixels, lanes, config["num_warps"]) if n is not None)


def summary(rows: list[dict]) -> str:
    """Tables of what the models use at x4: all targets in a row, and the model."""
    kinds = ("forward", "prepare", "backward")
    order = [f"{u} packed {k}" for u in ("lite", "direct") for k in ("splat", "gaussians")]
    order += [
        f"{u} {p}{k}" for u in ("lite", "direct", "field") for p in ("", "points ") for k in kinds
    ]
    products = ("forward", "backward features", "backward weights")
    order += [f"official {kind}" for kind in ("weights", *products)]
    order += [f"decoder {k} {t}" for k in ("features", "colours") for t in ("fp32", "bf16")]
    chosen = [
        r
        for case in order
        for r in rows
        if r["case"] == case and r["config"] == _at_scale(case.split(" ", 1)[1], r)
    ]
    compiled = [r for r in chosen if "model" not in r]
    spilled = len(spilling(rows))
    parts = ("all", "FP32", "MUFU", "LDG", "MMA", "SHFL")
    lines = [
        f"{len([r for r in rows if 'model' not in r])} configurations compiled, {spilled} spill.",
        "",
        "| kernel | " + " | ".join(TARGETS) + " | loop: " + " | ".join(parts) + " |",
        "|---" * (1 + len(TARGETS) + len(parts)) + "|",
    ]
    for case in dict.fromkeys(r["case"] for r in compiled):
        here = {r["provider"]: r for r in compiled if r["case"] == case}
        cells = [case]
        for target in TARGETS:
            r = here.get(target)
            cells.append("" if r is None else f"{block_text(r['config'])}: {_fit(r)}")
        loop = here["sm_90"]["loop"] if "sm_90" in here else {}
        lines.append("| " + " | ".join([*cells, *(str(loop.get(n, "")) for n in parts)]) + " |")
    modelled = [r for r in chosen if "model" in r]
    return "\n".join([*lines, "", *model_table(modelled)] if modelled else lines)


def _at_scale(kind: str, r: dict) -> dict:
    """The shipped configuration of a row's kernel at x4."""
    arch = next((c.arch for c in CHIPS if r["provider"] == f"model {c.name}"), r["provider"])
    if "K" not in r["sizes"]:
        return r["config"]  # the same at any scale
    if kind == "packed splat":
        return configs.choose_packed(arch, (SCALE, SCALE), cells=(10_000, 10_000))
    if kind.startswith(("points", "packed")):
        kind = "forward" if kind.endswith(("forward", "prepare")) else "backward"
        return configs.choose_points(kind, arch)
    return configs.choose_splat(kind, arch, (SCALE, SCALE), channels=r["sizes"]["C"])


def _fit(r: dict) -> str:
    return f"{r['resources']['registers']} ({r['occupancy']})"


# ---- other versions of Triton -------------------------------------------------------------------


def triton_environment(version: str) -> dict[str, str]:
    """What a process needs in its environment to import this version of Triton.

    Raises:
        InputError: it is not installed in `TRITONS`.
    """
    home = TRITONS / version
    if not (home / "triton").is_dir():
        raise InputError(
            f"there is no Triton {version} in {home}: make tritons TRITONS={version} installs it"
        )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(home), str(ROOT)])}


def triton_rows(version: str, arches: list[str], options: Sequence[str] = ()) -> list[dict]:
    """`compiled_rows` of a process of its own with this version of Triton.

    `options` are further ones of its command line.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, linker = Path(folder) / "static.json", Path(folder) / "ld.lld"
        # Up to 3.4 Triton calls ROCm's linker when the machine code is there. Nothing will run it,
        # so that without ROCm a copy is enough.
        # It is asked for its --version too, and has nothing to say.
        linker.write_text(
            '#!/bin/sh\nwhile [ $# -gt 3 ] && [ "$2" != -o ]; do shift; done\n'
            '[ "$2" != -o ] || cp "$1" "$3"\n'
        )
        linker.chmod(0o755)
        environment = {"TRITON_HIP_LLD_PATH": str(linker), **triton_environment(version)}
        command = [sys.executable, "-m", "bench", "static", "--no-model", "--output", str(report)]
        subprocess.run(
            [*command, "--arch", *arches, *options], cwd=ROOT, env=environment, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        found = schema.load(report)
    if found["versions"]["triton"].partition("+")[0] != version:
        raise InputError(f"{TRITONS / version} holds Triton {found['versions']['triton']}")
    return found["rows"]


def spilling(rows: list[dict]) -> list[dict]:
    """Those of `compiled_rows` that keep anything on the stack, or more than `LANES` elsewhere."""
    return [r for r in rows if spills(r["case"], r["resources"])]


# Scalar registers of the decoder that AMD's compiler may keep in lanes of vector registers: the
# addresses of its tensors, read once a block of pixels. No memory is touched.
LANES = 20


def spills(case: str, usage: dict) -> bool:
    """Whether a kernel spills, from its name or case and `resources`."""
    lanes = LANES if case.startswith("decode") and "scalar_registers" in usage else 0
    return usage["stack"] > 0 or usage["spills"] > lanes


def version_table(rows: dict[str, list[dict]]) -> list[str]:
    """Lines of a Markdown table from rows by version: spills, and what `lite` takes at x4."""
    kinds = KINDS
    lines = [
        "| triton | target | configurations | spill | "
        + " | ".join(f"{kind}: loop, registers" for kind in kinds)
        + " |",
        "|---" * (4 + len(kinds)) + "|",
    ]
    for version, found in rows.items():
        for arch in TARGETS:
            here = [r for r in found if r["provider"] == arch]
            if not here:
                continue
            cells = [version, arch, str(len(here)), str(len(spilling(here)))]
            for kind in kinds:
                r = next(
                    r
                    for r in here
                    if r["case"] == f"lite {kind}" and r["config"] == _at_scale(kind, r)
                )
                cells.append(f"{r['loop'].get('all', '')}, {r['resources']['registers']}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def compare_versions(
    versions: list[str], arches: list[str], options: list[str], page: Path | None
) -> None:
    """Print, and with `page` write there, what each version makes of what is shipped.

    Raises:
        InputError: a configuration spills.
    """
    for version in versions:
        triton_environment(version)  # before minutes are spent
    rows = {version: triton_rows(version, arches, options) for version in versions}
    table = version_table(rows)
    print(*table, sep="\n")
    if page:
        document.put(page, "tritons", "\n".join(table))
    for version, found in rows.items():
        for r in spilling(found):
            print(version, r["provider"], r["case"], r["config"], r["resources"])
    if count := sum(len(spilling(found)) for found in rows.values()):
        raise InputError(f"{count} configurations spill")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench static", description=NOTE)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    names = [use.name for use in USES]
    parser.add_argument("--use", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument(
        "--scale", nargs="+", type=float, default=SCALES, metavar="S",
        help="only what these scales are given (default: any scale)",
    )  # fmt: skip
    parser.add_argument("--no-model", action="store_true", help="only what the compiler says")
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--document", metavar="FILE", type=Path, help="Markdown file whose tables to make anew"
    )
    parser.add_argument(
        "--triton", nargs="+", metavar="VERSION",
        help="compile with each of these, from build/triton/VERSION, and print a table of them",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not hasattr(splat.splat_forward, "cache_key"):
        raise InputError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    if args.document:  # before minutes are spent
        document.read(args.document, "tritons" if args.triton else "static")
    if args.triton:
        options = ["--use", *args.use, "--scale", *map(str, args.scale)]
        return compare_versions(args.triton, args.arch, options, args.document)
    uses = [use for use in USES if use.name in args.use]
    rows = [r for arch in args.arch for r in compiled_rows(arch, uses, args.scale)]
    rows += [] if args.no_model else model_rows(uses)
    print(NOTE, "", *compiled_table([r for r in rows if "model" not in r]), sep="\n")
    for r in rows:
        if pixel := r.get("loop", {}).get("pixel"):
            count = ", ".join(f"{n:.0f} {name}" for name, n in pixel.items())
            print(f"{r['case']}, {r['provider']}: {count} of warps a pixel")
    if not args.no_model:
        print("", *model_table([r for r in rows if "model" in r]), sep="\n")
    if args.output:
        import torch

        protocol = {"note": NOTE, "image": list(IMAGE), "scale": SCALE}
        schema.save(schema.report("static", torch.device("cpu"), protocol, rows), args.output)
    if args.document:
        document.put(args.document, "static", summary(rows))
