"""Train several configs alike, each with several seeds, and measure them side by side:

    python -m bench.compare --configs a.yaml b.yaml --seeds 3 --data PHOTOS --eval Set5 Set14 -o OUT

A run is a folder OUT/NAME-seedN, trained by train.py and measured by evaluate.py. After every run
the table is written anew: OUT/comparison.md, .csv, .json and, where matplotlib is installed, .png.
The same command goes on after an interruption: what is trained is not trained again, and measured
again only if what is asked for has changed. A run that fails is named in the table and stops no
other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.comparison import csv_text, plot, tables, text_rows
from bench.cost import COST_SCALE, model_cost
from bench.plot import pyplot
from gsr import distributed
from gsr.cli import guard
from gsr.config import Config, load_config
from gsr.data.benchmarks import DataSet, check_scales, check_sizes, open_sets
from gsr.data.patches import split_images, steps_per_epoch
from gsr.device import select_device, set_threads
from gsr.errors import InputError
from gsr.evaluation import Degradation, Method, add_protocol, make_methods, notes
from gsr.io.image import write_atomic
from gsr.io.paths import as_json, as_text, check_path, make_folder
from gsr.models.checkpoint import load_model
from gsr.models.registry import own_parts
from gsr.parts import import_own
from gsr.runs import MAY_CHANGE, different_keys

ROOT = Path(__file__).resolve().parents[1]
OWN = {"name", "output", "train.seed"}  # what a run has for itself
TIMES = {"train.device", "train.threads", "data.workers"}  # which decide how long it takes
# What may change when a run goes on: not the micro-batches, over which `official` takes means.
FREE = MAY_CHANGE - {"train.accumulate"}
TIMED = (128, 4)  # side of the LR image, and scale, at which upscaling is timed
RESULT = "comparison.json"  # in a run's folder, and in that of all


@dataclass(frozen=True)
class Run:
    """One config with one seed."""

    method: str
    seed: int
    file: str
    overrides: list[str]  # of the config in `file`
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output, self.config.name)


# ---- what is compared ---------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> list[Run]:
    """Plan all runs, seed by seed: what there is after an interruption can be compared.

    Raises InputError for a bad config, two of one name, or folders of images that do not serve.
    """
    given = {f"train.{key}": getattr(args, key) for key in ("steps", "device", "threads")}
    shared = _overrides({**given, "data.train": args.data, "data.val": args.val})
    if args.data is not None and args.val is None:
        shared.append("data.val=null")  # some of the training images are set aside
    files: dict[str, str] = {}
    for file in args.configs:
        config = load_config(file, shared)
        if config.name == "bicubic":
            raise InputError(f"{file}: bicubic is a row of the table already; change the key name")
        if config.name in files:
            raise InputError(
                f"{files[config.name]} and {file} both have the name {config.name}, which names "
                "their runs; change the key name in one of them"
            )
        split_images(config.data)
        files[config.name] = file
    runs = []
    for seed in range(args.seeds):
        for name, file in files.items():
            own = {"name": f"{name}-seed{seed}", "train.seed": seed, "output": args.output}
            overrides = [*shared, *_overrides(own)]
            runs.append(Run(name, seed, file, overrides, load_config(file, overrides)))
    return runs


def _overrides(values: dict[str, Any]) -> list[str]:
    """key=value for those that are not None; JSON is YAML, and keeps 123 a name."""
    return [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
        if value is not None
    ]


def differences(runs: Sequence[Run]) -> list[str]:
    """Keys in which trainings differ, the model apart, as "data.batch (b.yaml)"."""
    first, train = runs[0], runs[0].config.train
    free = (FREE - TIMES) | OWN
    if train.steps:
        free |= {"train.epochs"}
    if train.schedule.name == "cosine":
        free |= {"train.step_epochs", "train.gamma"}
    return [
        f"{key} ({run.file})"
        for run in runs
        if run.seed == first.seed
        for key in different_keys(first.config, run.config)
        if key not in free and not key.startswith("model.")
    ]


def check_same_runs(runs: Sequence[Run]) -> None:
    """Raise InputError if a run that is there was started with another config."""
    for run in runs:
        if not check_path(run.folder / "state.pt").exists():
            continue
        keys = different_keys(load_config(run.folder / "config.yaml"), run.config)
        if keys := [key for key in keys if key not in FREE]:
            raise InputError(
                f"{run.folder} was started with another {', '.join(keys)}; give the same values, "
                "or another folder (-o)"
            )


def fingerprint(data: DataSet) -> str:
    """A hash of all that is measured of a set: names, and every byte of its HR and LR files."""
    digest = hashlib.sha256()
    for image in data.images:
        for scale, path in {0: image.hr, **image.lr}.items():
            content = path.read_bytes()
            digest.update(os.fsencode(image.name) + f" x{scale:g} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()


# ---- one run ------------------------------------------------------------------------------------


def complete(run: Run, asked: dict[str, Any]) -> dict[str, Any]:
    """Train and measure a run as far as that is still to be done; return its result."""
    if not is_trained(run):
        resume = ["--resume"] if (run.folder / "state.pt").exists() else []
        run_script("train.py", "--config", run.file, *resume, *run.overrides)
    device, threads = run.config.train.device, run.config.train.threads
    options = {
        "output": run.folder / "evaluation.json", "device": device, "threads": threads,
        **{key: asked[key] for key in ("protocol", "limit", "noise", "jpeg")},
    }  # fmt: skip
    own = [name.rpartition(".")[0] for name in own_parts(run.config.model)]
    run_script(
        "evaluate.py", "--checkpoint", run.folder / "model", "--data", *asked["sets"], "--scale",
        *asked["scales"], *(f"--{key}={v}" for key, v in options.items() if v is not None),
        *(f"--import={module}" for module in own),
    )  # fmt: skip
    for module in own:
        import_own(module, "model")
    set_threads(threads)
    model = load_model(run.folder / "model").to(select_device(device))
    result = {
        "asked": asked,
        "evaluation": read_json(run.folder / "evaluation.json"),
        "training_seconds": training_seconds(run.folder),
        "upscaling_seconds": upscaling_seconds(make_methods({"model": model})["model"]),
    }
    write_atomic(run.folder / RESULT, as_json(result))
    return result


def is_trained(run: Run) -> bool:
    """Whether the run's state is that of its last step."""
    if not (run.folder / "state.pt").exists():
        return False
    data, train = run.config.data, run.config.train
    visits = list(split_images(data)[0].values())
    total = train.steps or train.epochs * steps_per_epoch(visits, data)
    return torch.load(run.folder / "state.pt", weights_only=True, mmap=True)["step"] >= total


def run_script(name: str, *argv: object) -> None:
    """Run a script of this checkout, its output on stderr; InputError says why it failed."""
    command, tail = [sys.executable, str(ROOT / name), *map(str, argv)], ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 4096):  # progress bars have no line ends
            text = chunk.decode(errors="replace")
            print(text, end="", file=sys.stderr, flush=True)
            tail = (tail + text)[-4096:]
    if process.returncode in (1, 2) and tail.strip():
        raise InputError(tail.rpartition("gsr: error: ")[2].strip().splitlines()[-1])
    if process.returncode:
        raise InputError(f"{name} ended with exit code {process.returncode}")


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is not there, or is not JSON."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def training_seconds(folder: Path) -> float:
    """Seconds from the first step to the last, over all starts, by the rates in log.jsonl."""
    total, before = 0.0, 0
    for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        if row["kind"] == "train":
            total += (row["step"] - before) / row["steps_per_second"]
            before = row["step"]
    return total


def upscaling_seconds(method: Method) -> float:
    """Median of three times of upscaling 128 x 128 pixels by 4, after one that does not count."""
    (side, scale), times = TIMED, []
    lr = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        start = time.perf_counter()
        method(lr, (side * scale, side * scale), scale=scale)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# ---- the table ----------------------------------------------------------------------------------


def table_rows(
    runs: Sequence[Run], results: dict[str, dict[str, Any]], costs: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of comparison.csv, bicubic first; `results` by run, `costs` by method."""
    # In every run LR, HR and protocol are the same, and so is bicubic.
    first = list(results.values())[:1]
    rows = [{"method": "bicubic", **costs["bicubic"], **_figures(first, bicubic=True)}]
    for method in dict.fromkeys(run.method for run in runs):
        own = [run.config.name for run in runs if run.method == method]
        done = [results[name] for name in own if name in results]
        row = {"method": method, "finished": len(done), "seeds": len(own), **costs[method]}
        for key in ("training_seconds", "upscaling_seconds"):
            if done:
                row[key] = statistics.fmean(result[key] for result in done)
        rows.append(row | _figures(done))
    return rows


def _figures(results: Sequence[dict[str, Any]], bicubic: bool = False) -> dict[str, float | None]:
    """{"Set5 x2 psnr mean", ... "std", "min", "max"} over the results, likewise of ssim."""
    values: dict[str, list] = {}
    for evaluation in (result["evaluation"] for result in results):
        label = "bicubic" if bicubic else next(iter(evaluation["models"]))
        for data in evaluation["sets"]:
            for row in data["scales"]:
                for metric in ("psnr", "ssim"):
                    where = f"{data['name']} x{row['scale']:g} {metric}"
                    values.setdefault(where, []).append(row["methods"][label][metric])
    return {f"{where} {k}": v for where, found in values.items() for k, v in spread(found).items()}


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, sample standard deviation (of two or more) and range; None for an infinite PSNR."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return dict.fromkeys(("mean", "std", "min", "max"))
    std = statistics.stdev(finite) if len(finite) > 1 else None
    return {"mean": statistics.fmean(finite), "std": std, "min": min(finite), "max": max(finite)}


def markdown(report: dict[str, Any]) -> str:
    """The tables, what they mean, and the runs that failed."""
    evaluations = [result["evaluation"] for result in report["results"].values()]
    machines = sorted({f"{e['device']} (threads: {e['threads']})" for e in evaluations})
    protocol, (side, scale) = evaluations[0]["protocol"], TIMED
    colour, name = protocol["psnr"]["colour"], protocol["name"]
    text = [
        f"PSNR {colour} in dB by the protocol {name}: mean over the seeds ± sample standard "
        "deviation; ranges, SSIM and all digits are in comparison.csv. Multiply-adds: of "
        f"convolutions and matrix products, an HR pixel at x{COST_SCALE}; the weights of a splat "
        "come on top. Training: first step to last, with what it compiles. Upscaling: "
        f"{side} x {side} by {scale}, median of 3. Times are of {' and '.join(machines)}.",
        "Times of different machines do not compare." if len(machines) > 1 else "",
        *(f"{note}." for note in notes(evaluations[0])),
        *(f"The trainings differ in {key}." for key in report["differences"]),
    ]
    blocks = ["# Comparison", tables(text_rows(report["methods"])), " ".join(filter(None, text))]
    if report["errors"]:
        lines = (f"* {name}: {error}" for name, error in report["errors"].items())
        blocks += ["Failed:", "\n".join(lines)]
    return "\n\n".join(blocks) + "\n"


def write(report: dict[str, Any], folder: Path) -> None:
    """Write comparison.json, .md, .csv and, with matplotlib, .png."""
    write_atomic(folder / RESULT, as_json(report))
    write_atomic(folder / "comparison.md", as_text(markdown(report)))
    write_atomic(folder / "comparison.csv", as_text(csv_text(report["methods"])))
    with suppress(InputError):  # matplotlib is not installed
        write_atomic(folder / "comparison.png", plot(text_rows(report["methods"]), pyplot()))


# ---- all runs -----------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> dict[str, str]:
    """Train and measure all runs, and write the table after each; return why runs failed, by name.

    Raises:
        InputError: a bad argument, trainings that differ, or a folder with other runs; before
            anything is trained.
    """
    if distributed.started() > 1:
        raise InputError("bench.compare trains in one process; start it without torchrun")
    if args.seeds < 1:
        raise InputError(f"--seeds must be at least 1, not {args.seeds}")
    Degradation(args.noise, args.jpeg)
    scales = check_scales(args.scale)
    sets = open_sets(args.eval, scales, args.limit, option="eval")
    for data in sets:
        check_sizes(data, scales, args.protocol)
    runs = plan(args)
    different = differences(runs)
    if different and not args.allow_differences:
        raise InputError(
            f"the trainings differ in {', '.join(different)}; give these keys one value, or allow "
            "it with --allow-differences"
        )
    check_same_runs(runs)
    asked = {
        "sets": args.eval,
        "images": {data.name: fingerprint(data) for data in sets},
        **{key: getattr(args, key) for key in ("protocol", "limit", "noise", "jpeg")},
        "scales": scales,
    }
    folder = make_folder(args.output)

    set_threads(runs[0].config.train.threads)
    costs = {run.method: model_cost(run.config.model) for run in runs}
    costs["bicubic"] = {"upscaling_seconds": upscaling_seconds(make_methods({})["bicubic"])}
    found = {run.config.name: read_json(run.folder / RESULT) for run in runs}
    results = {name: result for name, result in found.items() if result.get("asked") == asked}
    errors: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        name = run.config.name
        if name not in results:
            print(f"{name} ({number} of {len(runs)})", file=sys.stderr, flush=True)
            try:
                results[name] = complete(run, asked)
            except Exception as error:  # the other runs are worth their hours all the same
                if not isinstance(error, InputError):
                    traceback.print_exc()
                errors[name] = str(error) or type(error).__name__
                print(f"{name} failed: {errors[name]}", file=sys.stderr, flush=True)
        if results:
            rows = table_rows(runs, results, costs)
            report = {"asked": asked, "differences": different, "methods": rows}
            write({**report, "results": results, "errors": errors}, folder)
    return errors


def main(argv: Sequence[str] | None = None) -> None:
    """Compare and print the table; InputError if a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description="Train several configs alike, each with several seeds, and measure them side "
        "by side. Run it again to go on after an interruption.",
    )
    add = parser.add_argument
    # fmt: off
    add("--configs", nargs="+", required=True, metavar="FILE", help="YAML files, see configs/")
    add("--eval", nargs="+", required=True, metavar="FOLDER",
        help="data folders to measure on: HR images, or HR/ with LR_bicubic/X2/NAMEx2.png")
    add("-o", "--output", required=True, metavar="FOLDER", help="for the runs and the table")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each config (default: 3)")
    add("--steps", type=int, metavar="N", help="instead of the configs' own")
    add("--data", metavar="FOLDER", help="training images, instead of the configs' own")
    add("--val", metavar="FOLDER",
        help="validation images (default with --data: some of it, set aside)")
    add_protocol(parser)
    add("--allow-differences", action="store_true",
        help="compare although data, sampling or schedule differ, and say so in the table")
    add("--device", help="instead of the configs' own: auto, cpu, cuda, ...")
    add("--threads", type=int, metavar="N", help="CPU threads, likewise")
    # fmt: on
    args = parser.parse_args(argv)
    errors, table = compare(args), Path(args.output, "comparison.md")
    if table.exists():
        print(f"{table.read_text(encoding='utf-8')}\ntable: {table}")
    if errors:
        failed = "; ".join(f"{name}: {error}" for name, error in errors.items())
        raise InputError(
            f"{len(errors)} runs failed ({failed}); fix the cause and run the same command again"
        )


if __name__ == "__main__":
    guard(main)
