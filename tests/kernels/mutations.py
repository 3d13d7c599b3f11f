"""Puts faults into the kernels, one at a time, and asks which of the cases notices.

    TRITON_INTERPRET=1 python tests/kernels/mutations.py    # a table; exit status 1 if one survives

A fault is a piece of text of a file in kernels/ and what replaces it. Text that is not found as
often as stated is an error: the source has changed, and the fault has to be stated again. Every
fault runs in a process forked for it, since some of them write where they should not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "kernels"
sys.path[:0] = [str(ROOT), str(HERE)]

import decode_cases  # noqa: E402
import far_addresses  # noqa: E402
import kernel_cases  # noqa: E402
import packed_cases  # noqa: E402
import torch  # noqa: E402
import window_cases  # noqa: E402

FAR = "far addresses"
# Quick ones; a fault is first tried on those that it names itself.
QUICK = {
    "splat.py": ["x2", "C5 R2", "C2", "rows within a cell", "at outside", "at ties",
                 "at R2, no offset", FAR],
    "windows.py": ["odd and unequal", "more columns than a block", "bfloat16",
                   "more blocks than parts", FAR],
    "decode.py": ["one pixel", "skip", "band", "rows", "odd, more blocks than programs"],
    "packed.py": ["x2", "rows within a cell", "band", "one pixel", FAR],
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    name: str
    old: str
    new: str
    cases: tuple[str, ...] = ()
    times: int = 1  # how often the text occurs; all are replaced
    file: str = "splat.py"


FAULTS = [
    # ---- formulas
    Fault("sigma_x for sigma_y", "sy = tl.load(sigma + two + j,",
          "sy = tl.load(sigma + two + plane + j,"),
    Fault("sign of a term of d_rho", "- (1.0 + r * r) * u * v * myx",
          "+ (1.0 + r * r) * u * v * myx"),
    Fault("cross term missing from d_sigma_x", "-(2.0 * c * mxx + b * myx) * v",
          "-(2.0 * c * mxx) * v"),
    Fault("cross term missing from q", "dx * (b * dy + c * dx)", "dx * (c * dx)"),
    Fault("planes of d_offset swapped",
          "tl.store(d_offset + two + j, -(2.0 * a * my + b * mx), mask)",
          "tl.store(d_offset + two + j, -(2.0 * c * mx + b * my), mask)"),
    Fault("opacity's gradient never stored", "tl.store(d_opacity + one + j, d_alpha, mask)",
          "pass"),
    Fault("eps dropped", "(total[p] + eps)", "total[p]"),
    Fault("at: eps dropped", "(total + eps)", "total", ("at outside",)),
    # ---- the grid
    Fault("one HR pixel late", "+ pid % blocks_x * PX\n", "+ pid % blocks_x * PX + 1\n"),
    Fault("cells left too early", "if (y_start >= y_stop) |", "if (y_start + 1 >= y_stop) |"),
    Fault("rows above the wanted left too early", "(y_start + PY <= row0)",
          "(y_start + PY <= row0 + 1)", ("rows within a cell", "rows, the first")),
    Fault("rows and columns of a block swapped", "fy[p // PX] - (oy + di), fx[p % PX]",
          "fy[p % PY] - (oy + di), fx[p // PY]"),
    Fault("position of the pixel's corner", "((2 * y + 1) * n - (2 * i + 1) * n_hr)",
          "(2 * y * n - 2 * i * n_hr)"),
    Fault("ties to the upper pixel", "(tl.maximum(2 * n_hr * i - n, 0) + 2 * n - 1) // (2 * n)",
          "(tl.maximum(2 * n_hr * i - n, 0) + 2 * n) // (2 * n)", ("ties x1.5",)),
    Fault("last row of cells not gathered", "tl.minimum(i + R + 1, h)", "tl.minimum(i + R, h)"),
    Fault("first column of cells not gathered", "tl.maximum(wide - R, 0)",
          "tl.maximum(wide - R + 1, 0)"),
    Fault("last column not gathered", "range(tl.max(x_stop - x_start, axis=0))",
          "range(tl.max(x_stop - x_start, axis=0) - 1)"),
    Fault("columns of the next cells gathered", "inside = x < x_stop\n", "inside = x < big_w\n"),
    Fault("pixels of the next cell stored as well", "inside = (x < x_stop) & (j < w)",
          "inside = (j < w)", ("odd", "exactly one block")),
    Fault("rows of the next cells stored as well", " & (y < y_stop)\n", "\n",
          ("odd", "rows within a cell")),
    Fault("cells right of the image stored", "inside = (x < x_stop) & (j < w)",
          "inside = (x < x_stop)", ("one pixel to one",)),
    Fault("Gaussians left of the image not masked",
          "exists = (ii >= 0) & (ii < h) & (jj >= 0) & (jj < w)\n        row",
          "exists = (ii >= 0) & (ii < h) & (jj < w)\n        row"),
    Fault("rows before the first wanted stored", " & (y >= row0)", "", ("rows across cells",)),
    Fault("rows counted from the image's top", "at = (y - row0).to(tl.int64) * big_w",
          "at = y.to(tl.int64) * big_w",
          ("rows within a cell",)),
    Fault("normaliser's term missing",
          "d_weight -= tl.load(grad + line + C * size + x, inside, other=0.0)", "pass"),
    Fault("gradient of the wrong image", "line = g // K * planes", "line = g % K * planes",
          ("batch 3",)),
    Fault("Gaussians of the wrong image", "            g = b * K + k\n", "            g = k\n",
          ("batch 3", "at odd"), times=2),
    Fault("values taken for a tensor of their own", "(g - b * K) * values_k + c",
          "(g - b * K) * C * plane + c",
          ("values of a larger tensor", "at values of a larger tensor"), times=2),
    Fault("values of image 0", "g // K * values_b + g % K", "g % K",
          ("values of a larger tensor", "at values of a larger tensor"), times=2),
    Fault("last channel lost", "for c in tl.static_range(C):\n                value",
          "for c in tl.static_range(C - 1):\n                value", ("C2",)),
    Fault("at: last channel lost", "for c in tl.static_range(C):\n            value",
          "for c in tl.static_range(C - 1):\n            value", ("at outside",)),
    Fault("opacity left out of the values", "(alpha * tl.load(", "(tl.load("),
    # ---- points
    Fault("at: y and x transposed",
          "y = tl.load(points + 2 * (b * queries + q), real, other=0.0)\n"
          "    x = tl.load(points + 2 * (b * queries + q) + 1,",
          "x = tl.load(points + 2 * (b * queries + q), real, other=0.0)\n"
          "    y = tl.load(points + 2 * (b * queries + q) + 1,", ("at outside",)),
    Fault("at: ties to the upper pixel", "tl.floor(p + 0.5)", "tl.ceil(p - 0.5)", ("at ties",)),
    Fault("at: a cell's last point lost", "range(tl.max(stop - start, axis=0))",
          "range(tl.max(stop - start, axis=0) - 1)", ("at ties",)),
    Fault("at: points of the next cell as well", "real = start + t < stop",
          "real = start + t <= stop", ("at outside",)),
    Fault("at: normaliser's term missing",
          "d_weight -= tl.load(grad + q * planes + C, real, other=0.0)", "pass", ("at outside",)),
    Fault("at: window stops short", "exists = (i + di >= 0) & (i + di < h) ",
          "exists = (i + di >= 0) & (i + di < h - 1) ", ("at ties",)),
    Fault("at: points behind the last stored", "real = q < queries\n", "real = q >= 0\n",
          ("at outside",)),
    # ---- widths
    Fault("rho left in 16 bits", "r = tl.load(rho + one + j, exists, other=0.0).to(tl.float32)",
          "r = tl.load(rho + one + j, exists, other=0.0)", ("float16",)),
    Fault("planes of 32 bits", "plane, size = w.to(tl.int64) * held, big_w.to(tl.int64) * rows",
          "plane, size = w.to(tl.int32) * held, big_w.to(tl.int32) * rows", (FAR,)),
    Fault("gradient's planes of 32 bits", "    size = big_w.to(tl.int64) * rows",
          "    size = big_w.to(tl.int32) * rows", (FAR,)),
    Fault("rows of a band counted from the image's top", "row = (i + di - top).to(tl.int64) * w",
          "row = (i + di).to(tl.int64) * w", ("band",)),
    Fault("64 bits wanted too late", " >= 2**31", " >= 2**34", (FAR,)),
    Fault("Gaussian's plane of 32 bits", "one = g * plane + row\n    two = one + g * plane  #",
          "one = (g * plane).to(tl.int32) + row\n    two = one + g * plane  #", (FAR,)),
    Fault("at: output offsets of 32 bits", "place = b * queries + q\n",
          "place = (b * queries + q).to(tl.int32)\n", (FAR,)),
    Fault("at: gradient's offsets of 32 bits", "grad + q * planes + c",
          "grad + q.to(tl.int32) * planes + c", (FAR,)),
    # ---- packed
    *(
        Fault(f"packed: {name}", old, new, tuple(cases), file="packed.py")
        for name, old, new, *cases in [
            ("sigma_y twice", "low + (high - low) * tl.sigmoid(n[4])",
             "low + (high - low) * tl.sigmoid(n[3])"),
            ("offset's planes swapped", "reach * _tanh(n[5]), reach * _tanh(n[6])",
             "reach * _tanh(n[6]), reach * _tanh(n[5])"),
            ("parameters of another Gaussian", "(9 * k + p) * step", "(K * p + k) * step"),
            ("raw of image 0", "(b * raw_b + row", "(row"),
            ("four numbers in another order", "tl.join(tl.join(one, three), tl.join(two, four))",
             "tl.join(tl.join(one, two), tl.join(three, four))"),
            ("sign of the opacity's logit", "tl.exp(-n[8])", "tl.exp(n[8])"),
            ("last pixels not packed", "real = x < w\n", "real = x < w - 1\n"),
            ("pixels behind the last packed", "real = x < w\n", "real = x >= 0\n"),
            ("Gaussians off the image seen", "opacity += hidden", "pass"),
            ("Gaussians right of the image seen", " & (jj <= last)\n", "\n"),
            ("Gaussians below the image seen", " & (zeros + ii < h)", ""),
            ("rows of a band counted from the image's top",
             "h - 1) - top, tl.minimum", "h - 1), tl.minimum"),
            ("LR rows of a band counted from the image's top", "h - 1) - top\n", "h - 1)\n"),
            ("Gaussians of image 0", "at = b * image + ", "at = "),
            ("LR of image 0", "lr + (b * lr_b + ", "lr + ("),
            ("next Gaussian's blue", "            blue_at += plane\n", ""),
            ("cross term missing", "(b2 * dy + c2 * dx)", "(c2 * dx)"),
            ("opacity missing", "(a2 * dy * dy + opacity)", "(a2 * dy * dy)"),
            ("eps dropped", "(total[p] + eps)", "total[p]", "nearly transparent"),
            ("taps one late", "(fx[px] - (t - 2))", "(fx[px] - (t - 1))"),
            ("cubic too wide", "t < 2.0", "t < 3.0"),
            ("edge columns not repeated", "tl.minimum(tl.maximum(j + (t - 2), 0), last)",
             "tl.maximum(j + (t - 2), 0)"),
            ("edge rows not repeated", "tl.minimum(tl.maximum(i + di, 0), h - 1)",
             "tl.maximum(i + di, 0)"),
            ("last row of bicubic taps", "range(-2, 3)", "range(-2, 2)"),
            ("a row less than there is", "y_start + PY > y_end", "y_start + PY >= y_end", "x2.5"),
            ("not clamped", "tl.minimum(tl.maximum(value, 0.0), 1.0)", "value",
             "not normalized"),
            ("levels cut off", "+ 8388608.0", "+ 8388607.5"),
            ("rows counted from the image's top", "(y_start - row0)", "y_start",
             "rows across cells"),
            ("rows before the first wanted stored", " & (y >= row0)", ""),
            ("rows of the next cells stored", " & (y < y_stop)", "", "x3.7"),
            ("pixels of the next cells stored", " & (x_start + px < x_stop)", "", "x3.7"),
            ("cells right of the image stored", "(j <= last) & (y", "(y", "x1"),
            ("cells left too early", "if (y_start >= y_stop) |", "if (y_start + 1 >= y_stop) |",
             "x1"),
            ("plane of 32 bits", "plane = plane.to(tl.int64)", "plane = plane.to(tl.int32)", FAR),
            ("packed to 32 bits", "to = b * K * plane + row",
             "to = (b * K * plane).to(tl.int32) + row", FAR),
            ("image of 32 bits", "size = big_w.to(tl.int64) * rows",
             "size = big_w.to(tl.int32) * rows", FAR),
            ("LR channel of 32 bits", "c * lr_c.to(tl.int64)", "(c * lr_c).to(tl.int32)", FAR),
        ]
    ),
    # ---- windows
    *(
        Fault(f"windows: {name}", old, new, file="windows.py", times=times)
        for name, old, new, times in [
            ("columns of 32 bits", "wide = m.to(tl.int64)", "wide = m", 1),
            ("blocks of a part overlap", "range(part * blocks, part * blocks + blocks)",
             "range(part, part + blocks)", 1),
            ("one block of a part", "range(part * blocks, part * blocks + blocks)",
             "range(part * blocks, part * blocks + 1)", 1),
            ("window's rows and columns swapped", "(n // WINDOW * WINDOW * columns + n % WINDOW)",
             "(n % WINDOW * WINDOW * columns + n // WINDOW)", 1),
            ("kernel's taps transposed", "(n * TAPS + ta) * TAPS + tb",
             "(n * TAPS + tb) * TAPS + ta", 1),
            ("window's edge", "(WINDOW - 2 * y) * (k - 1)", "(WINDOW - 2 * y) * k", 1),
            ("one tap late", "return position // parts - k,",
             "return position // parts - k + 1,", 1),
            ("not clamped above", "product = tl.minimum(tl.maximum(product, 0.0), 1.0)",
             "product = tl.maximum(product, 0.0)", 1),
            ("gradient through the clamp", "tl.where((product >= 0.0) & (product <= 1.0), g, 0.0)",
             "tl.where(product <= 1.0, g, 0.0)", 1),
            ("last windows lost", "(m < count)[None, :]", "(m < count - 1)[None, :]", 3),
            ("last pixels lost", "pixel < ky * kx", "pixel < ky * kx - 1", 4),
            ("last block of pixels not gathered", "range(0, ky * kx, PIXELS)",
             "range(0, ky * kx - PIXELS, PIXELS)", 1),
            ("last block of a part not gathered", "part * blocks + blocks)",
             "part * blocks + blocks - 1)", 1),
            ("windows of the next row", "wide // columns % rows", "wide // rows % columns", 1),
        ]
    ),
    # ---- the decoder
    *(
        Fault(f"decode: {name}", old, new, file="decode.py", cases=cases)
        for name, old, new, *cases in [
            ("cosine for sine", "(a_sin * sin)", "(a_sin * cos)"),
            ("phase of the cell dropped", " + tl.load(phase + low + n)[None, :]", ""),
            ("y and x swapped", "f_y * py + f_x * px", "f_y * px + f_x * py"),
            ("odd half turns", "sign = 1.0 - 2.0 * odd", "sign = 1.0"),
            ("kernel transposed", "dy, dx = tap // 3 - 1, tap % 3 - 1",
             "dy, dx = tap % 3 - 1, tap // 3 - 1"),
            ("rows above the image", "inside = (y + dy >= 0) & ", "inside = "),
            ("rows below the image", " & (y + dy < big_h)", ""),
            ("columns left of the image", " & (x + dx >= 0)", ""),
            ("columns right of the image", " & (x + dx < big_w)", ""),
            ("first block of a program only", "blocks, tl.num_programs(0)", "blocks, blocks"),
            ("rows around those of an image before", " + (b - b0) * (q_rows - rows)", "",
             "narrow rows"),
            ("rows of q from the image's top", " + start - q_start) * big_w", ") * big_w"),
            ("pixels behind the last", "line % rows, line < lines", "line % rows, line >= 0",
             "one pixel"),
            ("halves of the scratch not in turn", "(1 - layer % 2)", "(layer % 2)"),
            ("parts of the scratch too large", "tl.program_id(0).to(tl.int64) * (2 * ",
             "tl.program_id(0).to(tl.int64) * (4 * "),
            ("bias of another layer", "biases + layer * WIDTH", "biases"),
            ("matrix of another layer", "(layer * WIDTH + low) * WIDTH", "low * WIDTH"),
            ("last block of units lost", "range(0, WIDTH, UNITS)",
             "range(0, WIDTH - UNITS, UNITS)"),
            ("last block of k lost", "tl.range(0, WIDTH, DEPTH,",
             "tl.range(0, WIDTH - DEPTH, DEPTH,"),
            ("last block of phases lost", "range(0, HALF, WAVES)", "range(WAVES, HALF, WAVES)",
             "blocks of phases, units, channels"),
            ("channels of a block", "k % (CP // DEPTH) * DEPTH + depth", "depth",
             "blocks of phases, units, channels"),
            ("green for blue", "colour + 2 * WIDTH", "colour + WIDTH"),
            ("LR not centred", "red += tl.load(at, real, other=0.0) - 0.5",
             "red += tl.load(at, real, other=0.0)"),
            ("GELU cut off", "tl.minimum(tl.maximum(x, -3.95), 3.95)",
             "tl.minimum(tl.maximum(x, -1.95), 1.95)", "bfloat16"),
            ("rows of features from the image's top", "_position(row + q_start, h, big_h)",
             "_position(row, h, big_h)"),
            ("rows of a band from the image's top", "0), h - 1) - top", "0), h - 1)"),
            ("first channels resized", "(c >= narrow)", "(c >= 0)"),
            ("channels behind the last", "mine = real & (c < channels)", "mine = real & (c < CP)",
             "13 channels, none splatted"),
            ("LR at the rows around", "(row + q_start - start)", "row"),
            ("weights of bicubic", "(1.25 * d - 2.25)", "(1.5 * d - 2.5)"),
            ("far weights of bicubic", "d = t + 1.0 if TAP == 0 else 2.0 - t",
             "d = 2.0 - t if TAP == 0 else t + 1.0"),
        ]
    ),
]  # fmt: skip


def mutated(fault: Fault, source: str) -> str:
    found = source.count(fault.old)
    if found != fault.times:
        raise SystemExit(
            f"{fault.name}: the text to replace occurs {found} times in {fault.file}, "
            f"not {fault.times}:\n{fault.old}"
        )
    return source.replace(fault.old, fault.new)


def load(path: Path):
    # As a module of `gsr.kernels`: it imports others from there.
    spec = importlib.util.spec_from_file_location("gsr.kernels.mutated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hunt(path: Path, names: list[str], pipe) -> None:
    """Sends the first of the cases that fails, and why; None if all pass."""
    # Python's complaints about arithmetic on what should not have been read.
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        kernels = load(path)
        torch.use_deterministic_algorithms(True)  # new memory holds NaN: a lost store shows
        by_name = {case.name: case for case in kernel_cases.CASES}
        for name in names:
            pipe.send(("running", name))
            try:
                if name == FAR:
                    run = {"windows.py": "run_windows", "packed.py": "run_packed"}
                    errors = getattr(far_addresses, run.get(path.name, "run"))(kernels)
                    limit = far_addresses.TOLERANCE
                    wrong = [f"{k} {v:.2g}" for k, v in errors.items() if not v <= limit]
                elif path.name == "windows.py":
                    wrong = window_cases.failures(window_cases.run_case(name, windows=kernels))
                elif path.name == "decode.py":
                    case = decode_cases.CASES[name]
                    wrong = decode_cases.failures(decode_cases.run_case(case, kernels=kernels))
                elif path.name == "packed.py":
                    wrong = packed_cases.failures(packed_cases.run_case(name, kernels=kernels))
                else:
                    case = by_name[name]
                    wrong = kernel_cases.failures(case, kernel_cases.run_case(case, "cpu", kernels))
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
            if wrong:
                pipe.send(("caught", (name, wrong[0])))
                return
        pipe.send(("survived", None))


def verdict(
    file: str, text: str, folder: Path, cases: tuple[str, ...] = ()
) -> tuple[str, str] | None:
    """(case, what it saw) for `file` with that text, or None if no case failed."""
    path = folder / file
    path.write_text(text)
    names = [*cases, *QUICK[file]]
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hunt, args=(path, names, theirs))
    process.start()
    theirs.close()
    running = names[0]
    try:
        while True:
            kind, what = ours.recv()
            if kind == "running":
                running = what
            else:
                return what
    except EOFError:
        process.join()
        return running, f"the process died with {process.exitcode}"
    finally:
        process.join()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Which case notices which fault.")
    parser.add_argument("select", nargs="*", help="parts of the faults' names; none: all")
    arguments = parser.parse_args(argv)
    if not kernel_cases.interpreted():
        parser.error("set TRITON_INTERPRET=1: the faults are run on the interpreter")
    torch.set_num_threads(1)  # a forked process has no other threads
    importlib.import_module("triton")
    sources = {file: (KERNELS / file).read_text() for file in QUICK}
    texts = [(fault, mutated(fault, sources[fault.file])) for fault in FAULTS]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        for file, source in sources.items():
            if (found := verdict(file, source, Path(name))) is not None:
                print(f"{file} as it is fails already: {found}")
                return 1
        for fault, text in texts:
            if arguments.select and not any(part in fault.name for part in arguments.select):
                continue
            found = verdict(fault.file, text, Path(name), fault.cases)
            survivors += found is None
            where, what = found or ("NOT CAUGHT", "")
            print(f"{fault.name:42} {where:26} {what.splitlines()[0] if what else ''}", flush=True)
    print(f"{survivors} not caught")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
