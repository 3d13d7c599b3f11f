"""Time and memory of the whole network, encoder and render, with the goal of every figure.

    python -m bench network                                    # everything: under 15 minutes
    python -m bench network --part time training --output network.json
    python -m bench network --from network.json --document FILE  # tables between its marks
    python -m bench.plot network.json -o network.png

Parts, all on the CPU, with random weights (EDSR-baseline), in float32 unless said otherwise:
  time      encode and render one image, in passes, beside the published algorithm and LIIF
  memory    peak memory above the loaded and warmed model, each in a process of its own
  size      gsr.upscale to ever larger images: time a pixel, memory of the whole process
  training  a step of the published recipe, in steps of the encoder alone

A pass is one eager float32 EDSR-baseline over the same LR image with the same threads, timed
directly before and after each run. Times count when nothing else runs on the machine: its load
before the start is kept in the report, and a warning printed where there is one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsr
from bench import document, schema
from bench.published import CHUNK, Published, edsr, liif_mlp, liif_query, liif_render, queries
from bench.splat import quantiles
from gsr.config import EncoderConfig, ModelConfig
from gsr.device import keep_memory, set_threads
from gsr.errors import InputError
from gsr.inference import strips as infer
from gsr.models import GaussianSR
from gsr.models.encoders.edsr import EDSR

ROOT = Path(__file__).resolve().parents[1]
MODES = ("official", "field", "direct")
PUBLISHED = {"published, as shipped": True, "published, one call": False}  # by chunks of queries
METHODS = (*MODES, *PUBLISHED, "LIIF")

# What is aimed at: (part, case, provider, type) to the field of the row and its largest value.
GOALS = {
    ("time", "96x96 x4", "official", "float32"): ("passes", 9),
    ("time", "96x96 x4", "official", "bfloat16"): ("passes", 6),
    ("time", "96x96 x4", "direct", "float32"): ("passes", 1.5),
    ("time", "48x48 x8", "direct", "float32"): ("passes", 2.5),
    ("memory", "128x128 x4", "official", "float32"): ("memory", 100e6),
    ("memory", "128x128 x4", "direct", "float32"): ("memory", 40e6),
    **{("size", f"{n}x{n} x4", m, "uint8"): ("rss", 1.2e9) for m in MODES for n in (256, 512)},
    **{("size", "1024x1024 x4", m, "uint8"): ("rss", 1.2e9) for m in MODES},
    ("training", "48x48 x2", "official", "float32"): ("ratio", 1.6),
    ("training", "48x48 x4", "official", "float32"): ("ratio", 1.75),
    ("training", "48x48 x2", "direct", "float32"): ("ratio", 1.3),
    ("training", "48x48 x4", "direct", "float32"): ("ratio", 1.3),
}
BUSY = 0.3  # load average from which the machine is not quiet
LARGEST_DRIFT = 0.1  # that the time a pixel may grow from the smallest image to the largest


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; images are square, sides in LR pixels."""

    time: tuple = ((96, 4, MODES), (48, 8, ("direct",)))  # side, scale, modes; baselines in the 1st
    memory: int = 128
    size: tuple = (256, 512, 1024)
    batch: int = 16
    patch: int = 48
    queries: int = 2304
    chunk: int = CHUNK
    product: int = 2048  # side of the matrices, and 256 channels of so many / 16 pixels
    least: float = 0.3  # seconds of a sample


QUICK = Plan(((7, 2, MODES), (5, 3, ("direct",))), 8, (7, 14), 2, 7, 32, 100, 64, 0.0)


# ---- what is measured ---------------------------------------------------------------------------


def make_model(mode: str) -> GaussianSR:
    """EDSR-baseline with a head of `mode`, default sizes, random weights; always the same."""
    torch.manual_seed(0)
    return GaussianSR(ModelConfig(mode=mode)).eval()


def macs(model: GaussianSR) -> tuple[int, int]:
    """Multiply-adds of what is learnt, per LR and per HR pixel. The splat is not among them."""
    weights = {n: t.numel() for n, t in model.state_dict().items() if n.endswith("weight")}
    weights = {n: count for n, count in weights.items() if "phase" not in n}  # once an image
    hr = sum(count for n, count in weights.items() if n.startswith("head.decoder."))
    return sum(weights.values()) - hr, hr


def renderer(provider: str, scale: int, chunk: int, bf16: bool = False):
    """A function of lr that gives the HR image, and its MACs (per LR pixel, per HR pixel)."""
    if provider == "LIIF":
        encoder = make_model("direct").encoder.eval()
        weights, mlp = encoder.state_dict(), liif_mlp().eval()

        def liif(lr):
            with torch.inference_mode():
                return liif_render(edsr(weights, lr), mlp, _hr_size(lr, scale), chunk)

        hr = 4 * sum(p.numel() for p in mlp.parameters() if p.dim() == 2)
        return liif, (sum(p.numel() for p in encoder.parameters() if p.dim() == 4), hr)
    if provider in PUBLISHED:
        model = make_model("official")
        published = Published(model, chunk if PUBLISHED[provider] else None)
        return lambda lr: published(lr, _hr_size(lr, scale), scale), macs(model)
    model, precision = make_model(provider), "bf16" if bf16 else "fp32"
    return (
        lambda lr: infer.run(model, lr, _hr_size(lr, scale), scale=scale, precision=precision),
        macs(model),
    )


def _hr_size(lr: Tensor, scale: int) -> tuple[int, int]:
    return lr.shape[-2] * scale, lr.shape[-1] * scale


def interleave(
    runs: dict[Any, Callable], unit: Callable, rounds: int, least: float
) -> dict[Any, tuple[list[float], list[float]]]:
    """Every run in turn, `rounds` times: its times in seconds, and in units.

    The unit is timed directly before and after each of them, and their mean counts. A sample is as
    many calls as fill `least` seconds; each run was called before anything counts.
    """

    def once(run, calls=1):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def warm(run):
        first = once(run)
        second = once(run) if first < 2 else first
        return max(1, min(100, round(least / second)))

    calls = {name: warm(run) for name, run in runs.items()}
    units = warm(unit)
    times = {name: ([], []) for name in runs}
    before = once(unit, units)
    for _ in range(rounds):
        for name, run in runs.items():
            seconds = once(run, calls[name])
            after = once(unit, units)
            times[name][0].append(seconds)
            times[name][1].append(2 * seconds / (before + after))
            before = after
    return times


def machine(plan: Plan) -> dict[str, tuple[Callable, float]]:
    """The best that a machine can do: a product and a convolution, with their operations."""
    n = plan.product
    a, b = torch.rand(2, n, n)
    side = max(8, n // 16)
    x = torch.rand(1, 256, side, side).contiguous(memory_format=torch.channels_last)
    w = torch.rand(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    return {
        "product": (lambda: torch.mm(a, b), 2.0 * n**3),
        "convolution": (lambda: F.conv2d(x, w, padding=1), 2.0 * 9 * 256**2 * side**2),
    }


def time_rows(plan: Plan, rounds: int, methods: list[str]) -> tuple[list[dict], float]:
    """Rows of the part `time`, and the best rate of the machine meanwhile, operations a second."""
    rows, rates = [], []
    for i, (side, scale, modes) in enumerate(plan.time):
        torch.manual_seed(1)
        lr = torch.rand(1, 3, side, side)
        found = {}
        for mode in (m for m in modes if m in methods):
            found[mode, "float32"] = renderer(mode, scale, plan.chunk)
            found[mode, "bfloat16"] = renderer(mode, scale, plan.chunk, True)
        for name in methods if i == 0 else ():
            if name not in MODES:
                found[name, "float32"] = renderer(name, scale, plan.chunk)
        weights = make_model("direct").encoder.state_dict()
        peak = machine(plan)
        runs = {n: partial(f[0], lr) for n, f in found.items()}
        with torch.inference_mode():
            times = interleave(
                {**{n: f for n, (f, _) in peak.items()}, **runs},
                partial(edsr, weights, lr), rounds, plan.least,
            )  # fmt: skip
        rate = max(work / quantiles(times[n][0])["p50"] for n, (_, work) in peak.items())
        rates.append(rate)
        for (name, dtype), provider in found.items():
            seconds, passes = (quantiles(t) for t in times[name, dtype])
            at_lr, at_hr = provider[1]
            operations = 2 * side**2 * (at_lr + at_hr * scale**2)
            rows.append(
                _row(
                    "time", name, side, scale, dtype, seconds=seconds,
                    passes=passes["p50"], spread=passes, operations=operations,
                    share={"arithmetic": operations / seconds["p50"] / rate},
                )
            )  # fmt: skip
    return rows, quantiles(rates)["p50"]


def _row(
    part: str, provider: str, side: int, scale: int, dtype: str, more: dict | None = None, **fields
) -> dict:
    high = side * scale
    sizes = {"h": side, "w": side, "H": high, "W": high, "dtype": dtype, **(more or {})}
    return schema.row(f"{side}x{side} x{scale}", provider, sizes, part=part, **fields)


# ---- memory: in processes of their own ----------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of this process in memory now ("VmRSS"), or at most since the start ("VmHWM")."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))
    except (OSError, StopIteration):
        raise InputError(
            "memory can be measured on Linux only; elsewhere use --part time training"
        ) from None


def forget_peak() -> bool:
    """Let VmHWM begin again at VmRSS; False where the kernel does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return resident("VmHWM") < resident("VmRSS") + 2**20


def measure_memory(provider: str, side: int, scale: int, chunk: int) -> dict:
    """Bytes that upscaling an image takes at its peak, the result included, above the model."""
    run, _ = renderer(provider, scale, chunk)
    run(torch.rand(1, 3, 14, 14))
    lr = torch.rand(1, 3, side, side)
    gc.collect()
    exact = forget_peak()
    before = resident("VmRSS")
    run(lr)
    return {"memory": resident("VmHWM") - before, "exact": exact}


def measure_size(mode: str, side: int, scale: int) -> dict:
    """Seconds of each call of gsr.upscale on uint8 [side, side, 3], bytes of the whole process."""
    model = make_model(mode)
    # By itself it may take bf16 for the large images only: then the times would not compare.
    upscale = partial(gsr.upscale, scale=scale, model=model, precision="fp32")
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    upscale(image[:14, :14])
    seconds = []
    while len(seconds) < 5 and sum(seconds) < 3:
        start = time.perf_counter()
        upscale(image)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "rss": resident("VmHWM")}


MEASURES = {"memory": measure_memory, "size": measure_size}


def in_process(what: str, **arguments) -> dict:
    """`MEASURES[what](**arguments)` in a new process with as many threads."""
    order = json.dumps({"what": what, "threads": torch.get_num_threads(), **arguments})
    done = subprocess.run(
        [sys.executable, "-m", "bench", "network", "--child", order],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise InputError(f"measuring {order} failed, as it said above: leave out that part")
    return json.loads(done.stdout.splitlines()[-1])


def child(order: str) -> None:
    arguments = json.loads(order)
    set_threads(arguments.pop("threads"))
    print(json.dumps(MEASURES[arguments.pop("what")](**arguments)))


def memory_rows(plan: Plan, methods: list[str]) -> list[dict]:
    rows, scale = [], 4
    for provider in (m for m in methods if m != "LIIF"):
        found = in_process(
            "memory", provider=provider, side=plan.memory, scale=scale, chunk=plan.chunk
        )
        note = None if found["exact"] else "at most: the peak of the start may be in it"
        row = _row("memory", provider, plan.memory, scale, "float32", memory=found["memory"])
        rows.append({**row, "note": note})
    return rows


def size_rows(plan: Plan, methods: list[str]) -> list[dict]:
    """Smallest to largest image and the smallest again: a machine drifts within such a time."""
    rows, scale = [], 4
    for mode in (m for m in MODES if m in methods):
        found = {}
        for side in (*plan.size, plan.size[0]):
            found.setdefault(side, []).append(in_process("size", mode=mode, side=side, scale=scale))
        for side, visits in found.items():
            seconds = [t for visit in visits for t in visit["seconds"]]
            q = quantiles(seconds)
            per_pixel = q["p50"] / (side * scale) ** 2
            first = next((r["per_pixel"] for r in rows if r["provider"] == mode), per_pixel)
            rows.append(
                _row(
                    "size", mode, side, scale, "uint8", {"runs": len(seconds)}, seconds=q,
                    per_pixel=per_pixel, ratio=per_pixel / first,
                    rss=max(visit["rss"] for visit in visits),
                )
            )  # fmt: skip
    return rows


# ---- training -----------------------------------------------------------------------------------


def steps(plan: Plan, scale: int) -> dict[str, Callable[[], None]]:
    """A training step of everything: forward, L1, backward, Adam, as `train.py` does it."""
    torch.manual_seed(1)
    side, size = plan.patch, (plan.patch * scale, plan.patch * scale)
    lr = torch.rand(plan.batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    pixels = torch.stack([torch.randperm(size[0] * size[1]) for _ in range(plan.batch)])
    coord = queries(size)[pixels[:, : plan.queries]]  # [B, Q, 2]

    def step(model: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
        model.to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        with torch.no_grad():
            target = torch.rand_like(forward())

        def run():
            loss = (forward() - target).abs().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return run

    alone = nn.Sequential(EDSR(EncoderConfig()), nn.Conv2d(64, 3, 1))
    found = {"encoder": step(alone, lambda: alone(lr))}
    for mode in ("official", "direct"):
        model = make_model(mode)
        found[mode] = step(model, lambda m=model: m.query(m.encode(lr), size, coord, scale))
    liif = nn.ModuleList([EDSR(EncoderConfig()), liif_mlp()])
    found["LIIF"] = step(liif, lambda: liif_query(liif[0](lr), liif[1], coord, size))
    return found


def training_rows(plan: Plan, rounds: int, methods: list[str]) -> list[dict]:
    rows = []
    keep_memory()  # as train.py does
    for scale in (2, 4):
        runs = steps(plan, scale)
        unit = runs.pop("encoder")
        runs = {name: run for name, run in runs.items() if name in methods}
        for name, times in interleave(runs, unit, rounds, plan.least).items():
            seconds, ratio = (quantiles(t) for t in times)
            rows.append(
                _row(
                    "training", name, plan.patch, scale, "float32",
                    {"batch": plan.batch, "queries": plan.queries},
                    seconds=seconds, ratio=ratio["p50"], spread=ratio,
                )
            )  # fmt: skip
    return rows


# ---- tables -------------------------------------------------------------------------------------


def goal(row: dict, field: str, unit: float = 1) -> str:
    """The goal of a figure and whether it is met, for a cell of a table."""
    key = (row["part"], row["case"], row["provider"], row["sizes"]["dtype"])
    name, limit = GOALS.get(key, (None, None))
    if name != field or field not in row:
        return ""
    return f"{limit / unit:g}, {'met' if row[field] <= limit else 'missed'}"


def summary(report: dict) -> str:
    """Markdown tables, one a part."""
    rows = {p: [r for r in report["rows"] if r.get("part") == p] for p in TABLES}
    tables = [TABLES[p](rows[p]) for p in TABLES if rows[p]]
    rate = (report["limits"] or {}).get("arithmetic")
    best = f", best fp32 rate measured {rate / 1e9:.0f} GFLOP/s" if rate else ""
    head = f"{report['date'][:10]}, {report['threads']} threads{best}, commit {report['commit']}."
    if (load := report["protocol"]["load"]) > BUSY:
        head += f" The machine was not quiet: load average {load:g} before the start."
    return "\n\n".join([head, *tables])


def _table(head: str, lines: list[list[str]]) -> str:
    names = head.split(" | ")
    body = [f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *lines]]
    return "\n".join(body)


def _spread(q: dict, digits: int) -> str:
    return f"{q['p50']:.{digits}f} ({q['p20']:.{digits}f} to {q['p80']:.{digits}f})"


def _time_table(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        lines.append([
            r["case"], r["provider"], r["sizes"]["dtype"], _spread(r["seconds"], 3),
            _spread(r["spread"], 2), goal(r, "passes"), f"{r['share']['arithmetic']:.0%}",
        ])  # fmt: skip
    return _table("image | method | type | seconds | passes | goal | of best fp32 rate", lines)


def _memory_table(rows: list[dict]) -> str:
    return _table(
        "image | method | peak above the model, MB | goal",
        [
            [r["case"], r["provider"], f"{r['memory'] / 1e6:.0f}", goal(r, "memory", 1e6)]
            for r in rows
        ],
    )


def _size_table(rows: list[dict]) -> str:
    lines, largest = [], {r["provider"]: r["case"] for r in rows}
    several = len({r["case"] for r in rows}) > 1
    for r in rows:
        drift = ""
        if r["case"] == largest[r["provider"]] and several:
            met = r["ratio"] <= 1 + LARGEST_DRIFT
            drift = f"{1 + LARGEST_DRIFT:g}, {'met' if met else 'missed'}"
        lines.append([
            r["provider"], f"{r['sizes']['H']}x{r['sizes']['W']}", f"{r['seconds']['p50']:.2f}",
            f"{r['per_pixel'] * 1e9:.0f}", f"{r['ratio']:.2f}", drift,
            f"{r['rss'] / 1e6:.0f}", goal(r, "rss", 1e6),
        ])  # fmt: skip
    return _table(
        "mode | output | seconds | ns a pixel | to the smallest | goal | whole process, MB | goal",
        lines,
    )


def _training_table(rows: list[dict]) -> str:
    return _table(
        "patches | head | seconds a step | encoder steps | goal",
        [
            [
                r["case"], r["provider"], _spread(r["seconds"], 2), _spread(r["spread"], 2),
                goal(r, "ratio"),
            ]
            for r in rows
        ],
    )  # fmt: skip


TABLES = {
    "time": _time_table, "memory": _memory_table, "size": _size_table, "training": _training_table,
}  # fmt: skip


# ---- command ------------------------------------------------------------------------------------


def measure(parts: list[str], plan: Plan, rounds: int, methods: list[str]) -> dict:
    """The report of these parts and methods."""
    rows, limits, load = [], None, os.getloadavg()[0]
    if load > BUSY:
        print(f"load average {load:.1f}: other processes are in these times", file=sys.stderr)
    for name in parts:
        if name == "time":
            new, rate = time_rows(plan, rounds, methods)
            limits = {"arithmetic": rate}
        elif name == "training":
            new = training_rows(plan, rounds, methods)
        else:
            new = (memory_rows if name == "memory" else size_rows)(plan, methods)
        print(TABLES[name](new), end="\n\n", flush=True)
        rows += new
    protocol = {
        "rounds": rounds,
        "load": round(load, 2),
        "plan": asdict(plan),
        "passes": "a run over the mean of the passes directly before and after it; quantiles",
        "share": "multiply-adds of what is learnt, by formula, over the best of a matrix product "
        "and a 3 x 3 convolution of the same rounds",
        "memory": "VmHWM above VmRSS after a 14 x 14 image, result included",
        "size": "uint8 array in and out, computed in float32; rss is VmHWM of the whole process",
    }
    # The plan's tuples become lists as they would in a file.
    protocol = json.loads(json.dumps(protocol))
    return schema.report("network", torch.device("cpu"), protocol, rows, limits)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench network", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", nargs="+", choices=list(TABLES), default=list(TABLES))
    names = list(dict.fromkeys(m.partition(",")[0] for m in METHODS))
    parser.add_argument("--method", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of time and training (5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: only a test")
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--from", dest="source", metavar="FILE", help="measure nothing, read this")
    parser.add_argument("--document", type=Path, metavar="FILE", help="page with marks, for tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child)
    if args.rounds < 1:
        raise InputError(f"--rounds must be at least 1, not {args.rounds}")
    if args.document:
        document.read(args.document, "network")  # before minutes are spent
    if args.source:
        report = schema.load(args.source)
        if report["benchmark"] != "network":
            raise InputError(f"{args.source} is a report of {report['benchmark']}, not of network")
        print(summary(report))
    else:
        plan, rounds = (QUICK, 1) if args.quick else (Plan(), args.rounds)
        methods = [m for m in METHODS if m.partition(",")[0] in args.method]
        report = measure(list(dict.fromkeys(args.part)), plan, rounds, methods)
    if args.output:
        schema.save(report, args.output)
    if args.document:
        document.put(args.document, "network", summary(report))
