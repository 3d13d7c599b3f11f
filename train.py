"""Train a model: `python train.py --config configs/NAME.yaml [--resume] [section.key=value ...]`.

This file is the whole training loop, to be read and changed: data, model, optimiser, step,
validation, save. What a run folder holds is in `gsr.runs`, how patches are made in
`gsr.data.patches`, every key of the config in `gsr.config`.

On N GPUs: `torchrun --nproc_per_node N train.py --config ...`. Patches and Gumbel noise are
functions of (seed, step, place in the batch), so a step of N ranks, or of N micro-batches
(`train.accumulate`), has the gradient of a step of one, but for the rounding of its sums. Only in
the mode `official` has it not: its Gaussians are means over the images that are computed at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from gsr import distributed
from gsr.cli import guard
from gsr.config import Config, TrainConfig, load_config
from gsr.data.patches import (
    Batch,
    PatchDataset,
    load_batches,
    micro_batch,
    split_images,
    steps_per_epoch,
)
from gsr.device import keep_memory, set_threads
from gsr.errors import InputError
from gsr.graphs import GraphedLoss, check_static
from gsr.losses import WeightedSum, l1
from gsr.models import GaussianSR
from gsr.models.checkpoint import load_model
from gsr.optim import make_optimizer, make_schedule
from gsr.runs import Run, check_alive, check_finite, different_keys, validation_pairs


class Loss(nn.Module):
    """The loss of a model on a micro-batch: by default the mean absolute error.

    A module, since `distributed.parallel` averages the gradients of what its `forward` computes.
    """

    def __init__(self, model: GaussianSR, precision: str, measure: Callable = l1):
        super().__init__()
        self.model, self.bf16, self.measure = model, precision == "bf16", measure

    def forward(self, batch: Batch) -> Tensor:
        lr = batch.lr.contiguous(memory_format=torch.channels_last)
        with torch.autocast(lr.device.type, torch.bfloat16, enabled=self.bf16):
            encoded = self.model.encode(lr, batch.seeds)
        if getattr(self.measure, "dense", False):  # the targets are whole patches, row by row
            out = self.model.render(encoded, batch.size, batch.scale)
            return self.measure(out, batch.target.mT.unflatten(2, batch.size))
        out = self.model.query(encoded, batch.size, batch.coord, batch.scale)
        return self.measure(out, batch.target)


def train(config: Config, resume: bool = False, progress: bool = True) -> dict[str, float]:
    """Train to the last step; return the metrics of the last validation (of rank 0)."""
    c = config.train
    micro_batch(config.data.batch, distributed.world_size(), c.accumulate)  # raises if it is uneven
    set_threads(c.threads)
    device = distributed.select_device(c.device)

    # Data. Every image is decoded once, so that a damaged one is found now and not in hours.
    train_images, val_images = split_images(config.data)
    run = Run(config, {"train": train_images, "val": val_images}, resume)
    pairs = validation_pairs(val_images) if run.leads else []
    measure = WeightedSum(c.loss).to(device)
    dataset = PatchDataset(train_images, config.data, measure.dense)
    per_epoch = steps_per_epoch(dataset.visits, config.data)
    total = c.steps or c.epochs * per_epoch

    # Model and optimiser; with `ema`, what is validated and written is the running mean.
    torch.manual_seed(c.seed)
    model = GaussianSR(config.model)
    if config.init is not None and not resume:
        start_from(config.init, model)
    model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model.train()
    optimizer, learning_rate = make_optimizer(model, c), make_schedule(c, total, per_epoch)
    ema = None
    if c.ema:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(c.ema))
        ema.update_parameters(model)  # the first call copies: the mean starts here
    eval_model: Any = ema.module if ema else model
    parts = {"model": model, "optimizer": optimizer, "ema": ema}

    silent = not (progress and run.leads)
    with run, tqdm(total=total, unit="step", file=sys.stderr, disable=silent) as bar:
        start = run.load(**parts) if resume else 0
        if start >= total:
            raise InputError(f"{run.folder} is finished: it has done all its {total} steps")
        loss_of = distributed.parallel(Loss(model, c.precision, measure))
        if c.cuda_graph:
            check_static(config, measure.dense, device)
            loss_of = GraphedLoss(loss_of)
        batches = load_batches(
            dataset, c.seed, start, total, accumulate=c.accumulate, pin=device.type == "cuda"
        )
        bar.initial = bar.n = start
        losses, waited, since, metrics, alive = [], 0.0, time.perf_counter(), {}, True
        for step in range(start + 1, total + 1):
            before = time.perf_counter()
            micro_batches = next(batches)
            waited += time.perf_counter() - before
            distributed.agree()  # a rank without data ends all of them

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, group["initial_lr"])
            losses.append(training_step(loss_of, optimizer, micro_batches, config=c, step=step))
            if ema:
                ema.update_parameters(model)

            bar.update()
            log, check, save = (
                step == total or step % every == 0
                for every in (c.log_every, c.val_every, c.save_every)
            )
            if log or check or save:  # what has diverged is neither measured nor saved
                loss = check_finite(losses, model, step)
            if log:
                alive = check_alive(model, step, alive)
                seconds = time.perf_counter() - since
                share = waited / seconds  # of the time, waiting for data
                rate = optimizer.param_groups[0]["lr"]
                run.log(
                    "train", step, loss=loss, lr=rate, waiting=share,
                    steps_per_second=len(losses) / seconds,
                )  # fmt: skip
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", waiting=f"{share:.0%}")
                losses, waited, since = [], 0.0, time.perf_counter()
            if check and run.leads:
                metrics = run.validate(step, eval_model, pairs)
                text = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items())
                tqdm.write(f"step {step}: {text}", file=sys.stderr)
            if save and run.leads:
                run.save(step, eval_model, **parts)
    return metrics


def training_step(
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    config: TrainConfig,
    step: int,
) -> Tensor:
    """One optimiser step on this rank's micro-batches; return their mean loss, detached."""
    # Were a model to draw from the global generator, it would have no state to resume either.
    seed = np.random.SeedSequence([config.seed, 3, step - 1, distributed.rank()])
    torch.manual_seed(int(seed.generate_state(1)[0]))
    optimizer.zero_grad(set_to_none=True)
    device, losses = next(loss_of.parameters()).device, []
    for i, batch in enumerate(micro_batches, 1):
        last = i == len(micro_batches)  # the ranks average their gradients after that one alone
        with nullcontext() if last else getattr(loss_of, "no_sync", nullcontext)():
            if isinstance(loss_of, GraphedLoss):
                losses.append(loss_of.gradients(batch))
                continue
            loss = loss_of(batch.to(device)) / len(micro_batches)
            loss.backward()
        losses.append(loss.detach())
    if config.clip:
        nn.utils.clip_grad_norm_(loss_of.parameters(), config.clip)
    optimizer.step()
    return torch.stack(losses).sum()


def start_from(path: str, model: GaussianSR) -> None:
    """Load the weights of another model of the same architecture."""
    other = load_model(path)
    if keys := different_keys(other.config, model.config):
        raise InputError(
            f"init: {path} is not the model that the section model describes; it has another "
            f"{', '.join(keys)}"
        )
    model.load_state_dict(other.state_dict())


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train, in the process group that torchrun started, if any."""
    parser = argparse.ArgumentParser(description="Train a model from a YAML file.")
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--resume", action="store_true", help="continue the run of that name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    with distributed.process_group():
        config = load_config(args.config, args.overrides)
        keep_memory()
        metrics = train(config, args.resume)
        if distributed.rank() == 0:
            print(f"{config.name}: " + ", ".join(f"{k} {v:.2f} dB" for k, v in metrics.items()))


if __name__ == "__main__":
    guard(main)
