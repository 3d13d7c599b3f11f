"""Several configs trained alike, with several seeds each, and measured side by side.

    gsr compare --configs a.yaml b.yaml --seeds 3 --data PHOTOS --eval Set5 Set14 -o folder/

One run a config and seed, in folder/NAME-seedN as `gsr.training` writes it, then one table:
comparison.md, .csv and .json, and comparison.png where matplotlib is installed. The table is
written after every run, once all runs of an older one are in it. What is there already is not done
again: a finished run is recognised by its config and by what it was measured on, an interrupted one
goes on. A run that fails is named in the table and stops no other.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import io
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsr import distributed
from gsr.config import Config, ModelConfig, check, load_config, to_dict
from gsr.data.benchmarks import DataSet, check_sizes, open_sets
from gsr.data.patches import split_pictures
from gsr.describe import describe_model, describe_run
from gsr.device import pick_device, set_threads
from gsr.errors import InputError
from gsr.evaluation import SCALES, add_protocol, describe_protocol, enlarge_bicubic, evaluate
from gsr.inference.strips import run
from gsr.io.image import write_atomic
from gsr.io.paths import as_json, as_text, make_folder, usable
from gsr.models import GaussianSR
from gsr.models.checkpoint import load_model
from gsr.report import MADE, table_row
from gsr.training import MAY_CHANGE, Trainer, begun_with, different_keys, flat

COUNTED = (48, 4)  # side of the LR picture, and scale, at which multiply-adds are counted
TIMED = (128, 4)  # and at which enlarging is timed
REPEATS = 3
OWN = {"name", "output", "train.seed"}  # what a run has for itself
# What may change when a run goes on: not the micro-batches, over which `official` takes means.
FREE = MAY_CHANGE - {"train.accumulate"}
TIMES = {"train.device", "train.threads", "data.workers"}  # which decide how long it takes
RESULT = "comparison.json"  # in a run's folder, and in that of all


# ---- what is compared ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One config, with what is the same in all runs put in."""

    file: str
    config: Config

    @property
    def name(self) -> str:
        return self.config.name

    def run(self, folder: Path, seed: int) -> Config:
        """The config of one run."""
        train = self.config.train.model_copy(update={"seed": seed})
        own = {"name": f"{self.name}-seed{seed}", "output": str(folder), "train": train}
        return check(self.config.model_copy(update=own))


def read_methods(
    files: Sequence[str | os.PathLike],
    steps: int | None = None,
    data: str | os.PathLike | None = None,
    val: str | os.PathLike | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> list[Method]:
    """The configs in `files`, with what the arguments name in place of their own.

    With `data` but no `val`, validation pictures are set aside from `data`. Raises InputError for a
    bad config, two of one name, or a folder of training pictures that does not serve.
    """
    methods = []
    for file in files:
        c = load_config(file)
        for key, value in {"steps": steps, "device": device, "threads": threads}.items():
            if value is not None:
                setattr(c.train, key, value)
        if data is not None:
            c.data.train, c.data.val = str(data), None
        if val is not None:
            c.data.val = str(val)
        methods.append(Method(str(file), check(c)))
    for i, method in enumerate(methods):
        if method.name == "bicubic":
            raise InputError(
                f"{method.file} has the name bicubic, which is the plain enlargement's in the "
                "table: change the key name"
            )
        for other in methods[:i]:
            if other.name == method.name:
                raise InputError(
                    f"{other.file} and {method.file} both have the name {method.name}, which names "
                    "their runs: change the key name in one of them"
                )
        split_pictures(method.config.data)
    return methods


def differences(methods: Sequence[Method]) -> list[str]:
    """Where the trainings differ, the model apart: "data.batch (16 in a.yaml, 8 in b.yaml)"."""
    first, *others = methods
    found = {}
    for other in others:
        a, b = (_decisive(m.config) for m in (first, other))
        for key in a:
            if a[key] != b[key] and key not in found:
                found[key] = f"{key} ({a[key]} in {first.file}, {b[key]} in {other.file})"
    return list(found.values())


def _decisive(config: Config) -> dict[str, Any]:
    """What decides a training and its time besides model and seed, as {"train.lr": 1e-4, ...}."""
    unused = {"train.epochs"} if config.train.steps else set()
    if config.train.schedule == "cosine":
        unused |= {"train.step_epochs", "train.gamma"}
    return {
        key: None if key in unused else value
        for key, value in flat(to_dict(config)).items()
        if key not in (FREE - TIMES) | OWN and not key.startswith("model.")
    }


# ---- what a model costs -------------------------------------------------------------------------


def cost(config: ModelConfig) -> dict[str, Any]:
    """Parameters and multiply-adds of a model.

    Returns:
        "parameters"; "lr_macs", multiply-adds of convolutions and matrix products for an LR pixel
        that is encoded, and "hr_macs" for an HR pixel that is rendered at x4: half the FLOPs of
        PyTorch's FlopCounterMode, with gradients on and plain attention, since the CPU's quicker
        ways leave products out or hide them; "splat_weights", the Gaussians that are weighed for an
        HR pixel (None in a mode without), which that does not count, any more than what is done to
        single numbers and the bicubic resizing.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    side, scale = COUNTED
    with torch.random.fork_rng(devices=[]):
        model = GaussianSR(config).eval()
    lr, size = torch.zeros(1, 3, side, side), (side * scale, side * scale)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what other threads do is not counted
    try:
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.enable_grad(), plain, FlopCounterMode(display=False) as counter:
            encoded = model.encode(lr)
            encode = counter.get_total_flops()
            model.render(encoded, size, scale)
            render = counter.get_total_flops() - encode
    finally:
        torch.set_num_threads(threads)
    near = config.direct.gaussians * (2 * config.direct.radius + 1) ** 2
    weights = {"direct": near, "field": config.bank.window**2, "official": config.bank.window**2}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "lr_macs": encode / 2 / side**2,
        "hr_macs": render / 2 / math.prod(size),
        "splat_weights": weights.get(config.mode),
    }


def seconds_to_enlarge(enlarge: Callable[[Tensor, tuple[int, int]], Tensor]) -> float:
    """Median time of enlarging 128 x 128 pixels 4 times, after one that does not count."""
    side, scale = TIMED
    lr = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        enlarge(lr, (side * scale, side * scale)).cpu()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def training_time(folder: Path) -> tuple[float | None, str | None]:
    """Seconds that a run took from first to last step, over all its starts, and the place of these,
    from its log.jsonl.

    Loading, and what is validated and saved in between are in it; what steps compile is not.
    Steps between the last row before an interruption and the state from which it went on count at
    the rate after it. None if there is no rate, or the starts were in different places.
    """
    try:
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return None, None
    total, before, places = 0.0, 0, {row["place"] for row in rows if row.get("kind") == "start"}
    for row in rows:
        if row.get("kind") == "train" and row.get("steps_per_second"):
            total += (row["step"] - before) / row["steps_per_second"]
            before = row["step"]
    return (total, places.pop()) if before and len(places) == 1 else (None, None)


# ---- one run ------------------------------------------------------------------------------------


def fingerprint(data: DataSet) -> str:
    """A hash of all that is measured of a set: the pictures' names, and every byte of their HR and
    LR files at the scales it was opened for."""
    digest = hashlib.sha256()
    for picture in data.pictures:
        for scale, path in {0: picture.hr, **picture.lr}.items():
            content = path.read_bytes()
            digest.update(os.fsencode(picture.name) + f" x{scale:g} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()


def finish(config: Config, asked: dict[str, Any], progress: bool = False) -> dict[str, Any]:
    """Train and measure one run as far as that is still to be done; its result.

    Args:
        config: its own.
        asked: "sets" (folders), "scales", "protocol" and "limit", as `evaluate` takes them, and
            whatever else must be the same if the run is not to be measured again.

    Raises:
        InputError: whatever `Trainer` and `evaluate` raise.
    """
    folder = Path(config.output) / config.name
    decided = {k: v for k, v in flat(to_dict(config)).items() if k not in FREE}
    known = {"config": decided, "asked": asked}
    result = _read(folder / RESULT)
    if all(result.get(key) == value for key, value in known.items()):
        return result
    set_threads(config.train.threads)
    device = pick_device(config.train.device)
    here = place(device)
    trained = {key: result.get(key) for key in ("training_seconds", "training_on")}
    if result.get("config") != decided:  # else only the measuring is asked for anew
        train(config, folder, here, progress)
        seconds, where = training_time(folder)
        trained = {"training_seconds": seconds, "training_on": where}
    model = load_model(folder / "model").to(device)
    result = {
        **known,
        "model": describe_model(model, f"{config.name}/model"),
        **trained,
        "upscaling_seconds": seconds_to_enlarge(lambda lr, size: run(model, lr, size)),
        "upscaling_on": here,
        "sets": [
            evaluate(
                model, one, asked["scales"], asked["protocol"], asked["limit"], progress=progress
            )
            for one in asked["sets"]
        ],
    }
    write_atomic(folder / RESULT, as_json(result))
    return result


def train(config: Config, folder: Path, here: str, progress: bool = False) -> None:
    """Train a run to its last step, from where it stands; the log tells that it was `here`."""
    trainer = Trainer(config, resume=(folder / "state.pt").exists())
    with trainer.held:
        if trainer.step < trainer.total:
            trainer.warm_up(here)
            trainer.fit(progress)


def place(device: torch.device) -> str:
    """What times are of: "cpu, 2 threads"."""
    here = describe_run(device)
    return f"{here['device']}, {here['threads']} thread{'s' if here['threads'] > 1 else ''}"


def _read(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is not there, or is not JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- all runs -----------------------------------------------------------------------------------


def compare(
    methods: Sequence[Method],
    folder: str | os.PathLike,
    sets: Sequence[str | os.PathLike],
    scales: Sequence[float] = SCALES,
    seeds: int = 3,
    protocol: str = "benchmark",
    limit: int | None = None,
    allow_differences: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Train every method with the seeds 0 ... seeds - 1, measure all, write the table.

    Args:
        methods: from `read_methods`.
        folder: for the runs and the table; made if need be.
        sets: data folders of `gsr.data.benchmarks`.
        scales, protocol, limit: as `gsr.evaluation.evaluate` takes them.
        allow_differences: trainings may differ in more than the model.
        progress: bars on stderr.

    Returns:
        What comparison.json holds: "methods", each a row of the table; "runs", each with its
        result or, if it failed, "error"; and how the numbers came about.

    Raises:
        InputError: an argument, trainings that differ in `differences`, a folder whose runs are
            others, or torchrun; not for a failed run.
    """
    if distributed.started() > 1:
        raise InputError("gsr compare trains in one process: start it without torchrun")
    if seeds < 1:
        raise InputError(f"seeds (--seeds) must be at least 1, not {seeds}")
    different = differences(methods)
    if different and not allow_differences:
        raise InputError(
            f"the trainings differ in {', '.join(different)}: give these keys one value, or allow "
            "it with --allow-differences"
        )
    opened = open_sets("eval", sets, scales, limit)
    for data in opened:
        check_sizes(data, scales, protocol)
    # Seed by seed, so that what there is after an interruption can be compared.
    order = [(m.name, seed, m.run(Path(folder), seed)) for seed in range(seeds) for m in methods]
    older = _read(usable(Path(folder, RESULT))).get("runs", [])
    before = {entry["folder"] for entry in older if "result" in entry}
    lost = before - {config.name for *_, config in order}
    if lost:
        raise InputError(
            f"the table in {folder} has runs that are not asked for now ({', '.join(sorted(lost))})"
            ": add their configs or --seeds, or choose another folder (-o)"
        )
    for *_, config in order:
        run = Path(folder, config.name)
        if not usable(run / "state.pt").exists():
            continue
        others = [key for key in different_keys(begun_with(run), config) if key not in FREE]
        if others:
            raise InputError(
                f"{run} was started with another {', '.join(others)}: give the same values, or "
                "another folder (-o)"
            )
    order.sort(key=lambda run: run[-1].name not in before)  # the older table stands until then
    asked = {
        "sets": [str(one) for one in sets],
        "pictures": {data.name: fingerprint(data) for data in opened},
        "scales": list(scales),
        "protocol": protocol,
        "limit": limit,
    }
    first = methods[0].config.train
    set_threads(first.threads)
    report = {
        "protocol": describe_protocol(protocol),
        **describe_run(pick_device(first.device)),
        "asked": asked,
        "seeds": seeds,
        "counted": "{0} x {0} at x{1}".format(*COUNTED),
        "timed": "{0} x {0} at x{1}".format(*TIMED),
        "differences": different,
    }
    folder = make_folder(folder)
    costs = {method.name: cost(method.config.model) for method in methods}
    bicubic = {
        "upscaling_seconds": seconds_to_enlarge(enlarge_bicubic),
        "upscaling_on": place(torch.device("cpu")),
    }
    runs: list[dict[str, Any]] = []
    for number, (name, seed, config) in enumerate(order, 1):
        entry = {"method": name, "seed": seed, "folder": config.name}
        if progress:
            print(f"{config.name} ({number} of {len(order)})", file=sys.stderr, flush=True)
        try:
            entry["result"] = finish(config, asked, progress)
        except InputError as error:
            entry["error"] = " ".join(str(error).split())
        except Exception as error:  # the others are worth their hours all the same
            traceback.print_exc()
            entry["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        if progress and "error" in entry:
            print(f"{config.name} failed: {entry['error']}", file=sys.stderr, flush=True)
        runs.append(entry)
        report["methods"] = _rows(runs, costs, bicubic, seeds)
        report["runs"] = runs
        if before <= {entry["folder"] for entry in runs if "result" in entry}:
            write(report, folder)
    return report


def _rows(
    runs: list[dict], costs: dict[str, dict], bicubic: dict, seeds: int
) -> list[dict[str, Any]]:
    """A row a method, bicubic first."""
    done = [entry for entry in runs if "result" in entry]
    rows = []
    if done:
        # The same in every run: LR, HR and protocol are, by `asked`.
        rows.append({"name": "bicubic", **bicubic, "sets": _spread(done[:1], "bicubic")})
    for name, numbers in costs.items():
        own = [entry for entry in done if entry["method"] == name]
        row = {"name": name, "finished": len(own), "seeds": seeds, **numbers}
        for key in ("training", "upscaling"):
            timed = [e["result"] for e in own if e["result"][f"{key}_seconds"] is not None]
            where = {result[f"{key}_on"] for result in timed}
            if len(where) == 1:  # a mean over two machines is of none
                seconds = statistics.fmean(result[f"{key}_seconds"] for result in timed)
                row |= {f"{key}_seconds": seconds, f"{key}_on": where.pop()}
        rows.append({**row, "sets": _spread(own, "model")})
    return rows


def _spread(entries: list[dict], method: str) -> list[dict[str, Any]]:
    """Mean and spread over runs: [{"set", "scale", "lr", "psnr": {...}, "ssim": {...}}, ...]."""
    values: dict[tuple, dict[str, list]] = {}  # by set, scale and where LR is from
    for entry in entries:
        for data in entry["result"]["sets"]:
            for row in data["scales"]:
                kept = values.setdefault(
                    (data["name"], row["scale"], row["lr"]), {"psnr": [], "ssim": []}
                )
                for key in kept:
                    kept[key].append(row["methods"][method][key])
    return [
        {"set": name, "scale": scale, "lr": lr, **{key: _summary(v) for key, v in kept.items()}}
        for (name, scale, lr), kept in values.items()
    ]


def _summary(values: list[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (of two or more) and range; None where a value is."""
    if None in values:  # an infinite PSNR
        return dict.fromkeys(("mean", "std", "min", "max"))
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


# ---- reports ------------------------------------------------------------------------------------


def write(report: dict[str, Any], folder: Path) -> None:
    """comparison.json, .md, .csv and, where matplotlib is installed, .png."""
    write_atomic(folder / RESULT, as_json(report))
    write_atomic(folder / "comparison.md", as_text(markdown(report)))
    write_atomic(folder / "comparison.csv", as_text(table_csv(report)))
    if (plt := pyplot()) is not None and any(row["sets"] for row in report["methods"]):
        write_atomic(folder / "comparison.png", plot(report, plt))


def _columns(report: dict[str, Any]) -> list[tuple[str, float]]:
    """(set, scale) of every column with figures."""
    cells = ((cell["set"], cell["scale"]) for row in report["methods"] for cell in row["sets"])
    return list(dict.fromkeys(cells))


def markdown(report: dict[str, Any]) -> str:
    """The table with what it means below."""
    columns = _columns(report)
    made = {(c["set"], c["scale"]) for row in report["methods"] for c in row["sets"]
            if c["lr"] == "imresize"}  # fmt: skip
    figures = (f"{name} x{scale:g}{'*' * ((name, scale) in made)}" for name, scale in columns)
    head = ["method", "seeds", *figures, "parameters", "MACs/LR px", "MACs/HR px", "weights/HR px",
            "training", "upscaling"]  # fmt: skip
    timed = [(row, key) for row in report["methods"] for key in ("training", "upscaling")]
    where = {row[f"{key}_on"] for row, key in timed if row.get(f"{key}_on")}
    lines = ["# Comparison", "", table_row(*head), "|" + "---|" * len(head)]
    for row in report["methods"]:
        cells = {(cell["set"], cell["scale"]): cell["psnr"] for cell in row["sets"]}
        seeds = f"{row['finished']} of {row['seeds']}" if "seeds" in row else ""
        numbers = [_whole(row.get(key)) for key in
                   ("parameters", "lr_macs", "hr_macs", "splat_weights")]  # fmt: skip
        times = [
            _duration(row.get(f"{key}_seconds"))
            + (f" ({row[f'{key}_on']})" if len(where) > 1 and row.get(f"{key}_on") else "")
            for key in ("training", "upscaling")
        ]
        figures = [_cell(cells.get(column)) for column in columns]
        lines.append(table_row(row["name"], seeds, *figures, *numbers, *times))
    protocol = report["protocol"]
    lines += [
        "",
        f"PSNR {protocol['psnr']['colour']} in dB by the protocol {protocol['name']}: mean over "
        "the seeds, sample standard deviation, and range. MACs: multiply-adds of convolutions and "
        "matrix products, an LR pixel encoded and an HR pixel rendered at "
        f"x{COUNTED[1]}; weights: Gaussians weighed for an HR pixel, which they do not include. "
        "Training: from the first step to the last, mean over the seeds; upscaling: "
        f"{report['timed']}, median of {REPEATS}, mean over the seeds"
        + (f"; both on {where.pop()}." if len(where) == 1 else "; on what, stands beside it.")
        + (f" {MADE}." if made else ""),
    ]
    if report["differences"]:
        lines += ["", f"The trainings differ in {', '.join(report['differences'])}."]
    failed = [entry for entry in report["runs"] if "error" in entry]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"* {entry['folder']}: {entry['error']}" for entry in failed]
    return "\n".join(lines) + "\n"


def _cell(psnr: dict[str, Any] | None) -> str:
    if psnr is None:
        return ""
    if psnr["mean"] is None:
        return "inf"
    if psnr["std"] is None:
        return f"{psnr['mean']:.2f}"
    return f"{psnr['mean']:.2f} ± {psnr['std']:.3f} ({psnr['min']:.2f}..{psnr['max']:.2f})"


def _whole(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table_csv(report: dict[str, Any]) -> str:
    """The table as CSV: a row a method, numbers in full, nothing where there is none."""
    numbers = ["parameters", "lr_macs", "hr_macs", "splat_weights", "training_seconds",
               "training_on", "upscaling_seconds", "upscaling_on"]  # fmt: skip
    columns = _columns(report)
    figures = [(metric, key) for metric in ("psnr", "ssim") for key in ("mean", "std", "min",
               "max")]  # fmt: skip
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(
        ["method", "finished", "seeds", *numbers]
        + [f"{name} x{scale:g} {m} {k}" for name, scale in columns for m, k in figures]
    )
    for row in report["methods"]:
        cells = {(cell["set"], cell["scale"]): cell for cell in row["sets"]}
        values = [cells[c][m][k] if c in cells else None for c in columns for m, k in figures]
        out.writerow([row["name"], *(row.get(k) for k in ("finished", "seeds", *numbers)), *values])
    return text.getvalue()


def pyplot():
    """matplotlib.pyplot, set up for files, or None where it is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def plot(report: dict[str, Any], plt) -> bytes:
    """PSNR above bicubic against scale, a panel a set, a line a method with its spread: PNG."""
    sets = list(dict.fromkeys(name for name, _ in _columns(report)))
    bicubic, *methods = report["methods"]
    below = {(c["set"], c["scale"]): c["psnr"]["mean"] for c in bicubic["sets"]}
    figure, panels = plt.subplots(
        1, len(sets), figsize=(1 + 4 * len(sets), 3.8), layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[0], sets, strict=True):
        for row in methods:
            axes.errorbar(
                *gains(row, name, below), fmt="o-", ms=4, lw=1.2, capsize=3, label=row["name"]
            )
        scales = sorted(scale for one, scale in _columns(report) if one == name)
        axes.set_xticks(scales, [f"x{scale:g}" for scale in scales])
        axes.set(title=name, xlabel="scale", ylabel="PSNR above bicubic, dB")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    plt.close(figure)
    return buffer.getvalue()


def gains(row: dict[str, Any], name: str, below: dict[tuple, float | None]) -> tuple[list, ...]:
    """Scales, means of a method above those `below`, and standard deviations on a set."""
    points = [
        (c["scale"], c["psnr"]["mean"] - under, c["psnr"]["std"] or 0.0)
        for c in row["sets"]
        if c["set"] == name
        and c["psnr"]["mean"] is not None
        and (under := below[name, c["scale"]]) is not None
    ]
    return tuple(map(list, zip(*sorted(points), strict=True))) if points else ([], [], [])


# ---- command line -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """`gsr compare --configs FILE ...`: train, measure, print the table. Raises InputError.

    Also if a run failed, after all others are done and the table is written.
    """
    parser = argparse.ArgumentParser(
        prog="gsr compare",
        description="Train several configs alike, each with several seeds, and measure them side "
        "by side. Run it again to go on after an interruption.",
    )
    parser.add_argument(
        "--configs", nargs="+", required=True, metavar="FILE", help="YAML files, see configs/"
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="data folders to measure on: HR pictures, or HR/ with LR_bicubic/X2/NAMEx2.png",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="for the runs and the table"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each config (default: 3)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="instead of the configs' own")
    parser.add_argument(
        "--data", metavar="FOLDER", help="training pictures, instead of the configs' own"
    )
    parser.add_argument(
        "--val",
        metavar="FOLDER",
        help="validation pictures (default with --data: some of it, set aside)",
    )
    add_protocol(parser)
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="compare although data, sampling or schedule differ, and say so in the table",
    )
    parser.add_argument("--device", help="instead of the configs' own: auto, cpu, cuda, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads, likewise")
    args = parser.parse_args(argv)

    from gsr.device import keep_memory

    if pyplot() is None:
        print(
            "matplotlib is not installed (pip install 'gaussiansr[bench]'): there will be tables "
            "but no plot",
            file=sys.stderr,
        )
    methods = read_methods(args.configs, args.steps, args.data, args.val, args.device, args.threads)
    keep_memory()
    report = compare(
        methods, args.output, args.eval, args.scale, args.seeds, args.protocol, args.limit,
        args.allow_differences, progress=True,
    )  # fmt: skip
    table = Path(args.output) / "comparison.md"
    text = markdown(report)
    print(text)
    if table.exists() and table.read_bytes() == as_text(text):  # else one of more runs stands
        print(f"table: {table}")
    failed = [entry["folder"] for entry in report["runs"] if "error" in entry]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(report['runs'])} runs failed ({', '.join(failed)}): the "
            "table above says why; mend it and run the same command again"
        )
