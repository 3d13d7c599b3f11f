"""Training: a YAML file in, a run folder out, interrupted and resumed at will.

A run folder holds `config.yaml` (what was asked for), `state.pt` (everything that a resumed run
needs), `model/` (the latest weights as a model folder), `best/` (the weights with the highest
validation PSNR), `log.jsonl` and TensorBoard's files.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from gsr.checkpoint import load_model, save_model
from gsr.config import Config, TrainConfig, load_config, to_dict
from gsr.data import PatchDataset, downscale, make_loader, split_pictures, steps_per_epoch
from gsr.device import keep_memory, pick_device, set_threads
from gsr.errors import InputError
from gsr.image import read_image, remove_left_over, to_tensor, write_atomic
from gsr.metrics import psnr
from gsr.models import GaussianSR
from gsr.paths import make_folder, usable

VAL_SCALES = (2, 3, 4, 6, 8)
# What may differ when a run is resumed: nothing that decides its weights.
MAY_CHANGE = {
    "data.workers", "data.cache", "train.device", "train.threads", "train.log_every",
    "train.val_every", "train.save_every", "output",
}  # fmt: skip
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


def _flat(section: dict, where: str = "") -> dict:
    """{"train.lr": 1e-4, ...} of nested sections."""
    flat = {}
    for key, value in section.items():
        full = f"{where}.{key}" if where else key
        flat.update(_flat(value, full) if isinstance(value, dict) else {full: value})
    return flat


class Trainer:
    """One run: builds everything from the config, then `fit`.

    Args:
        config: the experiment.
        resume: continue the run folder's state; without it an existing run is refused.

    Raises:
        InputError: the data, the run folder or the initial weights do not serve.
    """

    def __init__(self, config: Config, resume: bool = False):
        c = config
        self.config = c
        self.folder = usable(Path(c.output) / c.name)
        self.log = self.folder / "log.jsonl"
        state = self.folder / "state.pt"
        if state.exists() and not resume:
            raise InputError(
                f"{self.folder} holds a run already: continue it with --resume or choose "
                "another name"
            )
        if resume:
            self._check_same_run(state)
        set_threads(c.train.threads)
        self.device = pick_device(c.train.device)
        train_paths, val_paths = split_pictures(c.data)
        self.pairs = validation_pairs(val_paths)
        self.dataset = PatchDataset(train_paths, c.data)
        self.per_epoch = steps_per_epoch(len(train_paths), c.data)
        self.total = c.train.steps or c.train.epochs * self.per_epoch

        torch.manual_seed(c.train.seed)
        self.model = GaussianSR(c.model)
        if c.init is not None and not resume:
            self._start_from(c.init)
        self.model.to(self.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=c.train.lr)
        self.step, self.best = 0, -math.inf
        if resume:
            self._load(state)
            self._forget_after(self.step)
        else:
            make_folder(self.folder)
            text = yaml.safe_dump(to_dict(c), sort_keys=False)
            write_atomic(self.folder / "config.yaml", text.encode())
            self.log.unlink(missing_ok=True)

    def _check_same_run(self, state: Path):
        """A run goes on with the config that started it, but for how fast it goes and reports."""
        if not state.exists():
            raise InputError(f"{state} does not exist: start the run without --resume")
        path = self.folder / "config.yaml"
        before, now = (_flat(to_dict(c)) for c in (load_config(path), self.config))
        # A cosine depends on the number of steps; the step schedule may go on for longer.
        longer = {"train.steps", "train.epochs"} if self.config.train.schedule == "step" else set()
        may = MAY_CHANGE | longer
        changed = [key for key in now if key not in may and now[key] != before[key]]
        if changed:
            raise InputError(
                f"{path} started this run with another {', '.join(changed)}: resume with the same "
                "values, or start a new run under another name"
            )

    def _start_from(self, path: str):
        model = load_model(path)
        if model.config != self.config.model:
            raise InputError(f"init: {path} is not the model that the section model describes")
        self.model.load_state_dict(model.state_dict())

    def fit(self, progress: bool = True) -> dict[str, float]:
        """Train to the last step; returns the last validation."""
        c = self.config.train
        if self.step >= self.total:
            raise InputError(f"{self.folder} is finished: it has done all its {self.total} steps")
        board = open_board(self.folder / "tensorboard", self.step)
        loader = make_loader(
            self.dataset, c.seed, self.step, self.total, pin=self.device.type == "cuda"
        )
        bar = tqdm(
            total=self.total, initial=self.step, unit="step", disable=not progress, file=sys.stderr
        )
        losses, waited, metrics, since, mark = [], 0.0, {}, time.perf_counter(), self.step
        batches = iter(loader)
        while self.step < self.total:
            start = time.perf_counter()
            batch = self._next(batches)
            waited += time.perf_counter() - start
            losses.append(self._train_step(batch))
            self.step += 1
            bar.update()
            last = self.step == self.total
            log, check, save = (
                last or self.step % every == 0 for every in (c.log_every, c.val_every, c.save_every)
            )
            if log or check or save:  # what has diverged is neither measured nor saved
                self._check_finite(losses)
            if log:
                seconds = time.perf_counter() - since
                row = {
                    "step": self.step,
                    "loss": torch.stack(losses).mean().item(),
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "steps_per_second": (self.step - mark) / seconds,
                    "waiting": waited / seconds,
                }
                self._log(board, row, "train")
                bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.1e}")
                losses, waited, since, mark = [], 0.0, time.perf_counter(), self.step
            if check:
                metrics = validate(self.model, self.pairs, self.device)
                self._log(board, {"step": self.step, **metrics}, "val")
                tqdm.write(
                    f"step {self.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()),
                    file=sys.stderr,
                )
                if metrics["psnr"] > self.best:
                    self.best = metrics["psnr"]
                    save_model(self.folder / "best", self.model)
            if save:
                self._save()
        bar.close()
        if board:
            board.close()
        return metrics

    def _next(self, batches):
        try:
            return next(batches)
        except InputError as error:  # from a loader process it comes with that one's traceback
            raise InputError(str(error).strip().rpartition("InputError: ")[2]) from None

    def _train_step(self, batch) -> Tensor:
        c = self.config.train
        # Noise, like the data, is a function of the step: there is no generator's state to resume.
        torch.manual_seed(int(np.random.SeedSequence([c.seed, 3, self.step]).generate_state(1)[0]))
        lr_now = learning_rate(c, self.step, self.total, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_now
        lr, coord, target = (
            t.to(self.device, non_blocking=True) for t in (batch.lr, batch.coord, batch.target)
        )
        bf16 = c.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            encoded = self.model.encode(lr.contiguous(memory_format=torch.channels_last))
        out = self.model.query(encoded, batch.size, coord, batch.scale)
        loss = (out - target).abs().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if c.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        return loss.detach()

    def _check_finite(self, losses: list[Tensor]):
        # A loss is that of the weights before its step: those after it are looked at themselves.
        values = [*losses, *(p.detach().sum() for p in self.model.parameters())]
        if not torch.stack(values).isfinite().all():
            state = self.folder / "state.pt"
            kept = f"; {state} is from before" if state.exists() else ""
            raise InputError(
                f"loss or weights are not finite by step {self.step}: lower train.lr or set "
                f"train.clip, under another name{kept}"
            )

    def _log(self, board, row: dict, kind: str):
        with open(self.log, "a") as f:
            f.write(json.dumps({"kind": kind, **row}) + "\n")
        for key, value in row.items():
            if board and key != "step":
                board.add_scalar(f"{kind}/{key}", value, row["step"])

    def _forget_after(self, step: int):
        """Drop what a killed run logged, or half wrote, after the state that is resumed."""
        for folder in (self.folder, self.folder / "model", self.folder / "best"):
            remove_left_over(folder)
        rows = self.log.read_text().splitlines() if self.log.exists() else []
        kept = [r + "\n" for r in rows if r.endswith("}") and json.loads(r)["step"] <= step]
        write_atomic(self.log, "".join(kept).encode())

    def _save(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
        }
        save_model(self.folder / "model", self.model)
        packed = io.BytesIO()
        torch.save(state, packed)
        write_atomic(self.folder / "state.pt", packed.getbuffer())

    def _load(self, path: Path):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}): start again under another name, with "
                f"init={self.folder / 'model'} if that still loads"
            ) from None
        self.step, self.best = state["step"], state["best"]


def open_board(folder: Path, step: int):
    """TensorBoard's writer, its later entries than `step` purged; None where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            "tensorboard is not installed (pip install 'gaussiansr[train]'): scalars go to "
            "log.jsonl only",
            file=sys.stderr,
        )
        return None
    return SummaryWriter(str(folder), purge_step=step)


def main(argv: list[str] | None = None) -> None:
    """`train.py --config FILE [--resume] [section.key=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a model from a YAML file on a folder of pictures."
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--resume", action="store_true", help="continue the run of that name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    keep_memory()
    trainer = Trainer(config, args.resume)
    metrics = trainer.fit()
    print(f"{trainer.folder}: " + ", ".join(f"{k} {v:.2f} dB" for k, v in metrics.items()))
