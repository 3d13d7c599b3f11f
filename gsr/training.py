"""Training: a YAML file in, a run folder out, interrupted and resumed at will.

A run folder holds `config.yaml` (what was asked for), `state.pt` (everything that a resumed run
needs), `model/` (the latest weights as a model folder), `best/` (the weights with the highest
validation PSNR), `log.jsonl` and TensorBoard's files. With `train.ema` both model folders, and the
validation, are of the running mean of the weights; `state.pt` has that and the weights themselves.
With `train.keep`, `state-STEP.pt` are earlier states: copied over `state.pt`, one is resumed. An
empty `.unsaved` is there until the first state is: the run may be started again, in the same place.

Several processes, started by `torchrun`, share every batch; see `gsr.distributed`. A step of N
processes, or of N micro-batches (`train.accumulate`), has the gradient of a step of one, but for
the rounding of its sums: patches and Gumbel noise are functions of (seed, step, place in the
batch). Only in the mode `official` are they not the same: its Gaussians are means over the pictures
that are computed at once, which then are those of one micro-batch of one process. Process 0 alone
validates, writes and prints. To resume, all need to see the run folder.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import math
import os
import re
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from gsr import distributed
from gsr.config import Config, ModelConfig, TrainConfig, load_config, to_dict
from gsr.data.patches import (
    Batch,
    PatchDataset,
    downscale,
    make_loader,
    micro_batch,
    split_pictures,
    steps_per_epoch,
)
from gsr.device import keep_memory, set_threads
from gsr.errors import InputError
from gsr.io.image import read_image, remove_left_over, to_tensor, to_uint8, write_atomic
from gsr.io.paths import alone, make_folder, usable
from gsr.metrics import psnr
from gsr.models import GaussianSR
from gsr.models.checkpoint import load_model, read_config, save_model
from gsr.ops.resize import bicubic

VAL_SCALES = (2, 3, 4, 6, 8)
SHOWN_SCALE = 4  # of the crop that TensorBoard shows
# What may differ when a run is resumed: nothing that decides its weights, but for their rounding.
MAY_CHANGE = {
    "data.workers", "data.cache", "data.cache_budget", "data.cache_dir", "train.accumulate",
    "train.device", "train.threads", "train.log_every", "train.val_every", "train.save_every",
    "train.keep", "output",
}  # fmt: skip
# What PyTorch says of a loader process that was killed; an error raised in one it reports as that
# of "DataLoader worker process 0".
LOST = "DataLoader worker (pid", "Pin memory thread exited unexpectedly"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
VAL_SIDE = 240  # HR pixels at most; sides are multiples of 24, and so of every scale


def learning_rate(config: TrainConfig, step: int, total: int, per_epoch: int) -> float:
    """Learning rate of a step: a function of its number, so that there is no state to resume."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / total))
    return config.lr * warm * config.gamma ** (step // (per_epoch * config.step_epochs))


def validation_pairs(paths: list[Path]) -> list[tuple[int, Tensor, Tensor]]:
    """(scale, LR [1, 3, h, w], HR [1, 3, H, W]) of the centre of every picture at every scale."""
    pairs = []
    for path in paths:
        picture = read_image(path)
        side = min(*picture.shape[:2], VAL_SIDE) // 24 * 24
        if side < 48:
            raise InputError(f"{path} is smaller than the 48 x 48 pixels that validation needs")
        y, x = ((n - side) // 2 for n in picture.shape[:2])
        hr = picture[y : y + side, x : x + side]
        for scale in VAL_SCALES:
            lr = downscale(np.ascontiguousarray(hr), (side // scale, side // scale))
            pairs.append((scale, to_tensor(lr), to_tensor(hr)))
    return pairs


@torch.inference_mode()
def validate(model: GaussianSR, pairs, device: torch.device) -> dict[str, float]:
    """Mean RGB PSNR per scale, 6 pixels shaved, and the mean over scales as "psnr"."""
    model.eval()
    values = {scale: [] for scale in VAL_SCALES}
    for scale, lr, hr in pairs:
        out = model(lr.to(device), size=hr.shape[-2:], scale=scale).clamp(0, 1).cpu()
        values[scale].append(psnr(out, hr, shave=6))
    model.train()
    means = {f"x{scale}": sum(v) / len(v) for scale, v in values.items()}
    return {"psnr": sum(means.values()) / len(means), **means}


@torch.inference_mode()
def show(board, model: GaussianSR, pair: tuple[int, Tensor, Tensor], step: int) -> None:
    """Put on TensorBoard's `board` what a model makes of one of the `validation_pairs`.

    Pictures of the bicubic enlargement, the model's and the HR side by side; the Gaussians of
    `direct` and `field`, drawn; of modes with a bank, how many LR pixels have each as their
    likeliest class.
    """
    scale, lr, hr = pair
    model.eval()
    x = lr.to(next(model.parameters()).device)
    ours = model(x, size=hr.shape[-2:], scale=scale).cpu()
    row = torch.cat([bicubic(lr, hr.shape[-2:]), ours, hr], dim=-1)
    board.add_image("val/bicubic_ours_hr", to_uint8(row), step, dataformats="HWC")
    if hasattr(model.head, "bank"):
        classes = model.head.classifier(model.encoder(x)).argmax(1).flatten().cpu().numpy()
        edges = np.arange(model.config.bank.points + 1)
        board.add_histogram("val/classes", classes, step, bins=edges)
    if model.config.mode in ("direct", "field"):
        _show_gaussians(board, model, to_uint8(lr), step)
    model.train()


def _show_gaussians(board, model: GaussianSR, picture: np.ndarray, step: int) -> None:
    from gsr.viz import draw_gaussians

    drawn = draw_gaussians(model, picture)
    board.add_image("val/gaussians", drawn, step, dataformats="HWC")


def describe_pictures(paths: list[Path], folder: str) -> str:
    """How many pictures, and which: by a hash of their paths below the folder."""
    names = "\0".join(path.relative_to(folder).as_posix() for path in paths)
    digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
    return f"{len(paths)} pictures ({digest[:16]} by their names)"


def begun_with(folder: Path) -> Config:
    """The config that the run in a folder began with.

    Its model is told by that of the first weights that were saved: config.yaml lacks what was no
    key when it was written.
    """
    config, saved = load_config(folder / "config.yaml"), folder / "model" / "config.json"
    if saved.exists():
        config.model = read_config(saved)
    return config


def different_keys(a: Config | ModelConfig, b: Config | ModelConfig) -> list[str]:
    """Full names of the keys in which two configs differ."""
    before, now = (flat(to_dict(c)) for c in (a, b))
    return [key for key in now if now[key] != before[key]]


def flat(section: dict, where: str = "") -> dict[str, Any]:
    """{"train.lr": 1e-4, ...} of nested sections."""
    keys = {}
    for key, value in section.items():
        full = f"{where}.{key}" if where else key
        keys.update(flat(value, full) if isinstance(value, dict) else {full: value})
    return keys


class Loss(nn.Module):
    """Mean absolute error of a model on a micro-batch.

    A module, since `distributed.parallel` averages gradients of what is computed in its `forward`.
    """

    def __init__(self, model: GaussianSR, precision: str):
        super().__init__()
        self.model, self.bf16 = model, precision == "bf16"

    def forward(self, batch: Batch) -> Tensor:
        lr = batch.lr.contiguous(memory_format=torch.channels_last)
        self.model.head.seeds = batch.seeds
        with torch.autocast(lr.device.type, torch.bfloat16, enabled=self.bf16):
            encoded = self.model.encode(lr)
        out = self.model.query(encoded, batch.size, batch.coord, batch.scale)
        return (out - batch.target).abs().mean()


class Trainer:
    """One run: builds everything from the config, then `fit`, at whose end the folder is let go.

    Args:
        config: the experiment.
        resume: continue the run folder's state; without it an existing run is refused.

    Raises:
        InputError: the data, the run folder or the initial weights do not serve, another training
            is at work in that folder, or the batch cannot be shared.
    """

    def __init__(self, config: Config, resume: bool = False):
        c = config
        self.config, self.leads = c, distributed.rank() == 0
        micro_batch(c.data.batch, distributed.count(), c.train.accumulate)
        self.folder = usable(Path(c.output) / c.name)
        self.log = self.folder / "log.jsonl"
        state, self.unsaved = self.folder / "state.pt", self.folder / ".unsaved"
        if resume:
            self._check_same_run(state)
        else:
            self._check_free(state)
        set_threads(c.train.threads)
        self.device = distributed.pick(c.train.device)
        train_paths, val_paths = split_pictures(c.data)
        self.pictures = {
            "train": describe_pictures(train_paths, c.data.train),
            "val": describe_pictures(val_paths, c.data.val or c.data.train),
        }
        self.pairs = validation_pairs(val_paths) if self.leads else []
        self.dataset = PatchDataset(train_paths, c.data)
        self.per_epoch = steps_per_epoch(len(train_paths), c.data)
        self.total = c.train.steps or c.train.epochs * self.per_epoch

        torch.manual_seed(c.train.seed)
        self.model = GaussianSR(c.model)
        if c.init is not None and not resume:
            self._start_from(c.init)
        self.model.to(self.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=c.train.lr)
        self.ema = None
        if c.train.ema:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(c.train.ema))
            self.ema.update_parameters(self.model)  # the first time copies: the mean starts here
        self.step, self.best = 0, -math.inf
        with ExitStack() as stack:
            if self.leads:
                make_folder(self.folder)
                refusal = f"another training is at work in {self.folder}; wait until it has ended"
                stack.enter_context(alone(self.folder, refusal))
            if resume:
                self._load(state)
            if self.leads and resume:
                self._forget_after(self.step)
            elif self.leads:
                self._check_free(state)  # another training may have ended since
                self._begin()
            self.saved = self.step  # the step of state.pt
            self.loss = distributed.parallel(Loss(self.model, c.train.precision))
            self.held = stack.pop_all()

    def _check_free(self, state: Path):
        """A new run is not written over another, whatever is left of that."""
        if state.exists():
            raise InputError(
                f"{self.folder} holds a run already: continue it with --resume or choose "
                "another name"
            )
        left = [p for p in map(self.folder.joinpath, ("best", "model")) if p.exists()]
        left = [*self._numbered().values(), *left]
        if left and not self.unsaved.exists():
            raise InputError(
                f"{self.folder} holds {left[0].name} of another run: move it away or choose "
                "another name"
            )

    def _begin(self):
        write_atomic(self.unsaved, b"")
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        write_atomic(self.folder / "config.yaml", text.encode())
        self.log.unlink(missing_ok=True)

    def _check_same_run(self, state: Path):
        """A run goes on with the config that started it, but for how fast it goes and reports."""
        if not state.exists():
            raise InputError(f"{state} does not exist: start the run without --resume")
        # A cosine depends on the number of steps; the step schedule may go on for longer.
        longer = {"train.steps", "train.epochs"} if self.config.train.schedule == "step" else set()
        may = MAY_CHANGE | longer
        changed = different_keys(begun_with(self.folder), self.config)
        if changed := [key for key in changed if key not in may]:
            raise InputError(
                f"{self.folder / 'config.yaml'} started this run with another "
                f"{', '.join(changed)}: resume with the same values, or start a new run under "
                "another name"
            )

    def _start_from(self, path: str):
        model = load_model(path)
        if others := different_keys(model.config, self.config.model):
            raise InputError(
                f"init: {path} is not the model that the section model describes; it has another "
                f"{', '.join(others)}"
            )
        self.model.load_state_dict(model.state_dict())

    @property
    def shown(self) -> GaussianSR:
        """The weights that are validated and written as model folders."""
        return self.ema.module if self.ema else self.model

    def warm_up(self, place: str) -> None:
        """Have compiled what the next step compiles, and log that the steps are of `place` now.

        That step's gradients are thrown away; it will draw the same random numbers again.
        """
        loader = make_loader(
            self.dataset, self.config.train.seed, self.step, self.step + 1,
            self.config.train.accumulate, workers=0,
        )  # fmt: skip
        self.loss(self._moved(next(iter(loader)))).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self._log(None, {"step": self.step, "place": place}, "start")

    def fit(self, progress: bool = True) -> dict[str, float]:
        """Train to the last step; returns the last validation (in process 0).

        Raises:
            InputError: the run is finished already, or ends before its time: a picture cannot be
                read any more, weights are not finite, the disk is full, a process was ended.
        """
        bar = tqdm(
            total=self.total, initial=self.step, unit="step", file=sys.stderr,
            disable=not (progress and self.leads),
        )  # fmt: skip
        with self.held, self._writing(), self._loading(), quiet_threads(), bar:
            if self.step >= self.total:
                raise InputError(
                    f"{self.folder} is finished: it has done all its {self.total} steps"
                )
            board = open_board(self.folder / "tensorboard", self.step) if self.leads else None
            with closing(board) if board else nullcontext():
                return self._fit(bar, board)

    def _fit(self, bar: tqdm, board) -> dict[str, float]:
        c = self.config.train
        loader = make_loader(
            self.dataset, c.seed, self.step, self.total, c.accumulate, self.device.type == "cuda"
        )
        losses, waited, metrics, since, mark = [], 0.0, {}, time.perf_counter(), self.step
        batches = iter(loader)
        while self.step < self.total:
            start = time.perf_counter()
            parts = [self._next(batches) for _ in range(c.accumulate)]
            waited += time.perf_counter() - start
            distributed.agree()
            losses.append(self._train_step(*parts))
            self.step += 1
            bar.update()
            last = self.step == self.total
            log, check, save = (
                last or self.step % every == 0 for every in (c.log_every, c.val_every, c.save_every)
            )
            if log or check or save:  # what has diverged is neither measured nor saved
                loss = self._finite(losses)
            if log:
                seconds = time.perf_counter() - since
                row = {
                    "step": self.step,
                    "loss": loss,
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "steps_per_second": (self.step - mark) / seconds,
                    "waiting": waited / seconds,  # share of the time, of process 0
                }
                self._log(board, row, "train")
                wait = f"{row['waiting']:.0%}"
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{row['lr']:.1e}", waiting=wait)
                losses, waited, since, mark = [], 0.0, time.perf_counter(), self.step
            if check and self.leads:
                metrics = self._validate(board)
            if save and self.leads:
                self._save()
        return metrics

    @contextmanager
    def _writing(self):
        """A full disk ends the run in a sentence.

        All that was written before is whole: files are replaced once their successor is complete.
        """
        try:
            yield
        except (OSError, InputError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if getattr(cause, "errno", None) not in FULL:
                raise
            raise InputError(
                f"{self.folder} cannot be written at step {self.step} "
                f"({cause.strerror}): free some space and {self._go_on()}"
            ) from None

    def _go_on(self) -> str:
        state = self.folder / "state.pt"
        return f"resume from {state} (step {self.saved})" if state.exists() else "start again"

    @contextmanager
    def _loading(self):
        """A loader process that was ended from outside ends the run in a sentence.

        The news comes at any time, by a signal; or to `_next`, which reads from that process.
        """
        try:
            yield
        except RuntimeError as error:
            if not any(text in str(error) for text in LOST):
                raise
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> InputError:
        reason = " ".join(str(error).split())
        return distributed.Lost(
            f"a loader process was ended from outside at step {self.step}, perhaps for want of "
            f"memory ({reason}): lower data.workers and {self._go_on()}"
        )

    def _validate(self, board) -> dict[str, float]:
        metrics = validate(self.shown, self.pairs, self.device)
        self._log(board, {"step": self.step, **metrics}, "val")
        if board:
            crop = next(pair for pair in self.pairs if pair[0] == SHOWN_SCALE)
            show(board, self.shown, crop, self.step)
        tqdm.write(
            f"step {self.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()),
            file=sys.stderr,
        )
        if metrics["psnr"] > self.best:
            self.best = metrics["psnr"]
            save_model(self.folder / "best", self.shown)
        return metrics

    def _next(self, batches):
        try:
            return next(batches)
        except InputError as error:  # from a loader process it comes with that one's traceback
            raise InputError(str(error).strip().rpartition("InputError: ")[2]) from None
        except ConnectionError as error:
            raise self._lost(error) from None

    def _train_step(self, *parts: Batch) -> Tensor:
        """An optimiser step on this process's micro-batches; returns their mean loss, detached."""
        c = self.config.train
        # Were a model to draw from the global generator, it would have no state to resume either.
        seed = np.random.SeedSequence([c.seed, 3, self.step, distributed.rank()])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        lr_now = learning_rate(c, self.step, self.total, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_now
        self.optimizer.zero_grad(set_to_none=True)
        unshared, losses = getattr(self.loss, "no_sync", nullcontext), []
        for i, part in enumerate(parts, 1):
            with nullcontext() if i == len(parts) else unshared():
                loss = self.loss(self._moved(part)) / len(parts)
                loss.backward()
            losses.append(loss.detach())
        if c.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        if self.ema:
            self.ema.update_parameters(self.model)
        return sum(losses)

    def _moved(self, batch: Batch) -> Batch:
        names = "lr", "coord", "target"
        there = {n: getattr(batch, n).to(self.device, non_blocking=True) for n in names}
        return batch._replace(**there)

    def _finite(self, losses: list[Tensor]) -> float:
        """The mean of the steps' losses over all processes, if they and the weights are finite."""
        losses = distributed.mean(torch.stack(losses))
        # A loss is that of the weights before its step: those after it are looked at themselves.
        sums = torch.stack([p.detach().sum() for p in self.model.parameters()])
        if not torch.cat([losses, sums]).isfinite().all():
            state = self.folder / "state.pt"
            kept = f"; {state} is from before" if state.exists() else ""
            raise InputError(
                f"loss or weights are not finite by step {self.step}: lower train.lr or set "
                f"train.clip, under another name{kept}"
            )
        return losses.mean().item()

    def _log(self, board, row: dict, kind: str):
        if not self.leads:
            return
        with open(self.log, "a") as f:
            f.write(json.dumps({"kind": kind, **row}) + "\n")
        for key, value in row.items():
            if board and key != "step":
                board.add_scalar(f"{kind}/{key}", value, row["step"])

    def _numbered(self) -> dict[int, Path]:
        """The earlier states that are kept, by their steps, in order."""
        found = (re.fullmatch(r"state-([0-9]+)\.pt", p.name) for p in self.folder.glob("state-*"))
        return {n: self.folder / f"state-{n}.pt" for n in sorted(int(m[1]) for m in found if m)}

    def _forget_after(self, step: int):
        """Drop what a killed run logged, or half wrote, after the state that is resumed."""
        for folder in (self.folder, self.folder / "model", self.folder / "best"):
            remove_left_over(folder)
        for number, path in self._numbered().items():
            if number > step:
                path.unlink()
        rows = self.log.read_text().splitlines() if self.log.exists() else []
        kept = [r + "\n" for r in rows if r.endswith("}") and json.loads(r)["step"] <= step]
        write_atomic(self.log, "".join(kept).encode())

    def _save(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "step": self.step,
            "best": self.best,
            "pictures": self.pictures,
        }
        save_model(self.folder / "model", self.shown)
        packed = io.BytesIO()
        torch.save(state, packed)
        self._keep_before()
        write_atomic(self.folder / "state.pt", packed.getbuffer())
        self.unsaved.unlink(missing_ok=True)
        self.saved = self.step

    def _keep_before(self):
        """Give the state that is about to be replaced a name of its own, and drop the oldest."""
        path, keep = self.folder / "state.pt", self.config.train.keep
        if keep and path.exists():
            kept = self.folder / f"state-{self.saved}.pt"
            try:
                os.link(path, kept)
            except FileExistsError:  # killed just after
                pass
            except OSError:  # a file system without links
                write_atomic(kept, path.read_bytes())
        numbered = list(self._numbered().values())
        for old in numbered[: max(0, len(numbered) - keep)]:
            old.unlink()

    def _load(self, path: Path):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema:
                self.ema.load_state_dict(state["ema"])
            self.step, self.best = int(state["step"]), float(state["best"])
            before = dict(state.get("pictures", self.pictures))  # older states do not tell
        except Exception as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}): start again under another name, with "
                f"init={self.folder / 'model'} if that still loads"
            ) from None
        for key, now in self.pictures.items():
            if before.get(key) != now:
                raise InputError(
                    f"data.{key}: this run was started with {before.get(key)} and there are {now} "
                    "now: put back what was there, or start a new run under another name"
                )


@contextmanager
def quiet_threads():
    """TensorBoard's thread does not print that the disk is full: it is raised here as well."""
    before = threading.excepthook

    def hook(failed):
        if getattr(failed.exc_value, "errno", None) not in FULL:
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if getattr(thread, "exception", None):  # TensorBoard's tells it before it ends
                thread.join(1)
        threading.excepthook = before


def open_board(folder: Path, step: int):
    """TensorBoard's writer, its entries after `step` purged; None where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            "tensorboard is not installed (pip install 'gaussiansr[train]'): scalars go to "
            "log.jsonl only",
            file=sys.stderr,
        )
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def main(argv: list[str] | None = None) -> None:
    """`train.py --config FILE [--resume] [section.key=value ...]`, or `torchrun` with that."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a model from a YAML file on a folder of pictures."
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--resume", action="store_true", help="continue the run of that name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    with distributed.together():
        config = load_config(args.config, args.overrides)
        keep_memory()
        trainer = Trainer(config, args.resume)
        metrics = trainer.fit()
        if distributed.rank() == 0:
            print(f"{trainer.folder}: " + ", ".join(f"{k} {v:.2f} dB" for k, v in metrics.items()))
