"""A training step as `train.py` takes it, against the rate of the encoder's own convolutions.

    python -m bench training --config configs/gsr-lite.yaml data.train=FOLDER
    python -m bench training --config configs/gsr-lite.yaml data.train=FOLDER --output training.json

Both in one run, in turn: every 3 x 3 convolution of the encoder for itself, forward and backward,
channels-last, in the type that the config trains in; and the whole step, from the loader's patches
to the optimiser. The share is by multiply-adds of everything that is learnt: three times the
forward ones. The machine must be quiet; its load average is in the report.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import train
from bench import schema
from bench.splat import quantiles
from gsr.config import load_config
from gsr.data.patches import PatchDataset, load_batches, split_images
from gsr.device import keep_memory, set_threads
from gsr.models import GaussianSR
from gsr.optim import make_optimizer


def convolutions(model: GaussianSR, batch: int, patch: int, dtype: torch.dtype) -> Callable:
    """Forward and backward of the encoder's convolutions alone, each on features of its own."""
    convs = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d) and m.in_channels != 3]
    parts = []
    for conv in convs:
        twin = copy.deepcopy(conv)
        twin.to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        x = torch.rand(batch, conv.in_channels, patch, patch, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.no_grad():
            grad = torch.ones_like(twin(x))
        parts.append((twin, x, grad))

    def run() -> None:
        for conv, x, grad in parts:
            conv(x).backward(grad)
            conv.zero_grad(set_to_none=True)
            x.grad = None

    return run


def measure(config, rounds: int, seconds: float) -> dict:
    """One row: seconds a step, rates in FLOP/s, and the share of time spent waiting for data."""
    c = config.train
    set_threads(c.threads)
    keep_memory()
    dataset = PatchDataset(split_images(config.data)[0], config.data)
    torch.manual_seed(c.seed)
    model = GaussianSR(config.model).train()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    loss_of, optimizer = train.Loss(model, c.precision), make_optimizer(model, c)
    dtype = torch.bfloat16 if c.precision == "bf16" else torch.float32
    alone = convolutions(model, config.data.batch, config.data.patch, dtype)

    pixels = config.data.batch * config.data.patch**2
    weights = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 4}
    hidden = sum(n for name, n in weights.items() if name.startswith("encoder."))
    hidden -= sum(p.numel() for p in model.encoder.parameters() if p.ndim == 4 and p.shape[1] == 3)
    batches = load_batches(dataset, c.seed, 0, 10**6, accumulate=1, pin=False)
    times: dict[str, list[float]] = {"convolutions": [], "step": [], "waiting": []}
    step = 0

    def one_step() -> float:
        nonlocal step
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        train.training_step(loss_of, optimizer, batch, config=c, step=(step := step + 1))
        return waited

    for _ in range(3):
        alone()
        one_step()
    for _ in range(rounds):
        for name, run in (("convolutions", alone), ("step", one_step)):
            start, count, waited = time.perf_counter(), 0, 0.0
            while time.perf_counter() - start < seconds:
                waited += run() or 0.0
                count += 1
            total = time.perf_counter() - start
            times[name].append(total / count)
            if name == "step":
                times["waiting"].append(waited / total)
    t = {name: quantiles(values) for name, values in times.items()}
    flops = {"convolutions": 6 * pixels * hidden, "step": 6 * pixels * sum(weights.values())}
    rate = {name: flops[name] / t[name]["p50"] for name in flops}
    return schema.row(
        "training step", config.name,
        {"batch": config.data.batch, "patch": config.data.patch, "dtype": c.precision},
        seconds=t["step"], operations=flops["step"],
        rates={
            "convolutions": rate["convolutions"], "step": rate["step"],
            "share": rate["step"] / rate["convolutions"], "waiting": t["waiting"]["p50"],
        },
    )  # fmt: skip


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--rounds", type=int, default=5, help="of each, in turn (5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round (4)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    load = os.getloadavg()[0]
    row = measure(load_config(args.config, args.overrides), args.rounds, args.seconds)
    r = row["rates"]
    print(
        f"{row['provider']}: convolutions {r['convolutions'] / 1e9:.0f} GFLOP/s, step "
        f"{r['step'] / 1e9:.0f} GFLOP/s ({r['share']:.0%}), "
        f"{1 / row['seconds']['p50']:.2f} steps/s, "
        f"{r['waiting']:.1%} waiting for data; load average before {load:.1f}"
    )
    if args.output:
        protocol = {"rounds": args.rounds, "seconds": args.seconds, "load": load}
        schema.save(schema.report("training", torch.device("cpu"), protocol, [row]), args.output)


if __name__ == "__main__":
    main()
