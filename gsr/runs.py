"""Run folders: what a training writes and a resumed one reads, and the validation within it.

    runs/NAME/config.yaml     the experiment as it was asked for
              state.pt        all that a resumed run needs; with `train.keep`, state-STEP.pt are
                              earlier ones: copied over state.pt, one of them is resumed
              model/, best/   the newest weights and those of the highest validation PSNR, as model
                              folders; with `train.ema`, both are of the running mean
              log.jsonl       a JSON object a line, and tensorboard/ with the same scalars

Files are replaced once their successor is complete, so that a run that is killed at any moment
resumes from its last state. Rank 0 alone writes; to resume, all ranks need to see the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from gsr import distributed
from gsr.config import Config, ModelConfig, load_config, to_dict
from gsr.data.degradations import degrade
from gsr.data.patches import Item, read_item
from gsr.device import has_fast_bf16
from gsr.errors import InputError
from gsr.io.image import remove_left_over, to_tensor, to_uint8, write_atomic
from gsr.io.paths import check_path, lock_folder, make_folder
from gsr.metrics import psnr
from gsr.models import GaussianSR
from gsr.models.checkpoint import save_model
from gsr.ops.resize import bicubic

VAL_SCALES = (2, 3, 4, 6, 8)
VAL_SIDE = 240  # HR pixels at most; sides are multiples of 24, and so of every scale
SHOWN_SCALE = 4  # of the crop that TensorBoard shows
# What may differ when a run is resumed: nothing that decides its weights, but for their rounding.
MAY_CHANGE = {
    "data.workers", "data.cache", "data.cache_budget", "data.cache_dir", "train.accumulate",
    "train.device", "train.cuda_graph", "train.threads", "train.log_every", "train.val_every",
    "train.save_every", "train.keep", "output",
}  # fmt: skip


class Run:
    """The folder of one training, locked against others while the context lasts.

    Args:
        config: the experiment; the folder is config.output / config.name.
        images: the training and validation images, which a resumed run must find again.
        resume: continue the folder's state; without it an existing run is refused.

    Raises:
        InputError: the folder holds another run, there is none to resume, it began with other keys
            or images, or another training is at work in it (this one on entering the context).
    """

    def __init__(
        self, config: Config, images: dict[str, Iterable[Path | Item]], resume: bool = False
    ):
        self.config, self.resume, self.leads = config, resume, distributed.rank() == 0
        self.folder = check_path(Path(config.output) / config.name)
        self.state, self.log_file = self.folder / "state.pt", self.folder / "log.jsonl"
        train = config.data.train
        folders = [train] if isinstance(train, str) else list(train)
        self.images = {
            "train": describe_images(images["train"], folders),
            "val": describe_images(
                images["val"], folders if config.data.val is None else [config.data.val]
            ),
        }
        self.start, self.best, self.board, self.stack = 0, -math.inf, None, ExitStack()
        self.bf16_loss: float | None = None  # of the last validation
        if resume:
            self._check_same_run()
        else:
            self._check_free()

    def __enter__(self) -> Run:
        if not self.leads:
            return self
        with ExitStack() as stack:  # whatever fails here releases the lock
            make_folder(self.folder)
            refusal = f"another training is at work in {self.folder}; wait until it has ended"
            stack.enter_context(lock_folder(self.folder, refusal))
            if not self.resume:
                self._check_free()  # another training may have ended since
                text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
                write_atomic(self.folder / "config.yaml", text.encode())
                self.log_file.unlink(missing_ok=True)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self.stack.close()

    def _check_free(self) -> None:
        """Refuse to write over another run, whatever is left of it."""
        if self.state.exists():
            raise InputError(
                f"{self.folder} holds a run already: continue it with --resume or choose another "
                "name"
            )
        left = [*self._earlier().values(), self.folder / "best", self.folder / "model"]
        for path in left:
            if path.exists():
                raise InputError(
                    f"{self.folder} holds {path.name} of another run: move it away or choose "
                    "another name"
                )

    def _check_same_run(self) -> None:
        """A run goes on with the config that started it, but for how fast it goes and reports."""
        if not self.state.exists():
            raise InputError(f"{self.state} does not exist: start the run without --resume")
        # A cosine depends on the number of steps; the step schedule may go on for longer.
        steps = self.config.train.schedule.name == "step"
        longer = {"train.steps", "train.epochs"} if steps else set()
        changed = different_keys(load_config(self.folder / "config.yaml"), self.config)
        if changed := [key for key in changed if key not in MAY_CHANGE | longer]:
            raise InputError(
                f"{self.folder / 'config.yaml'} started this run with another "
                f"{', '.join(changed)}: resume with the same values, or start a new run under "
                "another name"
            )

    # ---- state ----------------------------------------------------------------------------------

    def load(self, **parts: Any) -> int:
        """Load the state into the parts (model, optimizer, ema or None); return its step.

        What a killed run logged, or half wrote, after that step is removed.
        """
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                if part is not None:
                    part.load_state_dict(state[name])
            self.start, self.best, before = (
                int(state["step"]),
                float(state["best"]),
                state["images"],
            )
            self.bf16_loss = state.get("bf16_loss")
        except Exception as error:
            raise InputError(
                f"{self.state} is damaged ({type(error).__name__}): start again under another "
                f"name, with init={self.folder / 'model'} if that still loads"
            ) from None
        for key, now in self.images.items():
            if before.get(key) != now:
                raise InputError(
                    f"data.{key}: this run was started with {before.get(key)} and there are {now} "
                    "now: put back what was there, or start a new run under another name"
                )
        if self.leads:
            for folder in (self.folder, self.folder / "model", self.folder / "best"):
                remove_left_over(folder)
            for number, path in self._earlier().items():
                if number > self.start:
                    path.unlink()
            rows = self.log_file.read_text().splitlines() if self.log_file.exists() else []
            rows = [r for r in rows if r.endswith("}") and json.loads(r)["step"] <= self.start]
            write_atomic(self.log_file, "".join(f"{row}\n" for row in rows).encode())
        return self.start

    def save(self, step: int, eval_model: GaussianSR, **parts: Any) -> None:
        """Write the state of the parts (model, optimizer, ema or None), and model/."""
        states = {name: part and part.state_dict() for name, part in parts.items()}
        run = {"best": self.best, "bf16_loss": self.bf16_loss, "images": self.images}
        state = {**states, **run, "step": step}
        eval_model.bf16_loss = self.bf16_loss
        save_model(self.folder / "model", eval_model)
        packed = io.BytesIO()
        torch.save(state, packed)
        keep = self.config.train.keep
        if keep and self.state.exists():
            before = torch.load(self.state, weights_only=True, mmap=True)["step"]
            write_atomic(self.folder / f"state-{before}.pt", self.state.read_bytes())
        write_atomic(self.state, packed.getbuffer())
        earlier = list(self._earlier().values())
        for old in earlier[: max(0, len(earlier) - keep)]:
            old.unlink()

    def _earlier(self) -> dict[int, Path]:
        """The earlier states that are kept, by their steps, in order."""
        found = (re.fullmatch(r"state-([0-9]+)\.pt", p.name) for p in self.folder.glob("state-*"))
        return {n: self.folder / f"state-{n}.pt" for n in sorted(int(m[1]) for m in found if m)}

    # ---- log ------------------------------------------------------------------------------------

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Append a row to log.jsonl, and its values to TensorBoard."""
        if not self.leads:
            return
        with open(self.log_file, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.board is None:
            self.board = open_board(self.folder / "tensorboard", self.start + 1)
            self.stack.callback(self.board.close)
        for key, value in values.items():
            self.board.add_scalar(f"{kind}/{key}", value, step)

    def validate(
        self, step: int, model: GaussianSR, pairs: Sequence[tuple[int, Tensor, Tensor]]
    ) -> dict[str, float]:
        """Log the metrics of `validate` and a crop; write `best` if they are the best so far."""
        metrics = validate(model, pairs)
        self.log("val", step, **metrics)
        model.bf16_loss = self.bf16_loss = bf16_loss(model, pairs, metrics)
        pair = next((pair for pair in pairs if pair[0] == SHOWN_SCALE), pairs[0])
        show(self.board, model, pair, step)
        if metrics["psnr"] > self.best:
            self.best = metrics["psnr"]
            save_model(self.folder / "best", model)
        return metrics


class _NoBoard:
    """What stands for TensorBoard's writer where it is missing."""

    def __getattr__(self, name: str):
        return lambda *_, **__: None


def open_board(folder: Path, step: int) -> Any:
    """TensorBoard's writer; what an earlier process wrote of `step` and after it is purged."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            "tensorboard is not installed (pip install 'gaussiansr[train]'): scalars go to "
            "log.jsonl only",
            file=sys.stderr,
        )
        return _NoBoard()
    return SummaryWriter(str(folder), purge_step=step)


def describe_images(images: Iterable[Path | Item], folders: Sequence[str]) -> str:
    """How many images, and which: by a hash of their paths below the folders, of any place."""
    names = [
        next(image.relative_to(f) for f in folders if image.is_relative_to(f)).as_posix()
        if isinstance(image, Path)
        else str(image)
        for image in images
    ]
    digest = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()
    return f"{len(names)} images ({digest[:16]} by their names)"


def different_keys(a: Config | ModelConfig, b: Config | ModelConfig) -> list[str]:
    """Full names of the keys in which two configs differ."""
    before, now = (_flat(to_dict(c)) for c in (a, b))
    return [key for key in {**now, **before} if now.get(key) != before.get(key)]


def _flat(section: dict, where: str = "") -> dict[str, Any]:
    """{"train.lr": 1e-4, ...} of nested sections."""
    keys = {}
    for key, value in section.items():
        full = f"{where}.{key}" if where else key
        keys.update(_flat(value, full) if isinstance(value, dict) else {full: value})
    return keys


# ---- guards -------------------------------------------------------------------------------------


def check_finite(losses: Sequence[Tensor], model: GaussianSR, step: int) -> float:
    """The mean of the losses over all ranks; InputError unless they and the weights are finite."""
    mean = distributed.mean(torch.stack(list(losses)))
    # A loss is that of the weights before its step: those after it are looked at themselves.
    sums = torch.stack([p.detach().sum() for p in model.parameters()])
    if not torch.cat([mean, sums]).isfinite().all():
        raise InputError(
            f"loss or weights are not finite by step {step}: lower train.lr or set train.clip, "
            "under another name"
        )
    return mean.mean().item()


def check_alive(model: GaussianSR, step: int, before: bool) -> bool:
    """Whether a gradient reached the encoder in the last step; InputError if twice none did.

    Once is no failure: in the first step of `direct` the colours are zero, and pass nothing on.
    """
    gradients = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    now = not gradients or any(g.any() for g in gradients)
    if not now and not before:
        raise InputError(
            f"the output no longer depends on the encoder by step {step}: all its activations "
            "have died; lower train.lr, or set train.warmup and train.clip, under another name"
        )
    return now


# ---- validation ---------------------------------------------------------------------------------


def validation_pairs(images: Iterable[Path | Item]) -> list[tuple[int, Tensor, Tensor]]:
    """(scale, LR [1, 3, h, w], HR [1, 3, H, W]) of the centre of every image at every scale.

    Of one that comes with its own LR, at the scale of that.
    """
    pairs = []
    for name in images:
        image = read_item(name)
        own, image = image if isinstance(image, tuple) else (None, image)
        step = 24 if own is None else len(image) // len(own)
        side = min(*image.shape[:2], VAL_SIDE) // step * step
        if side < 48:
            raise InputError(f"{name} is smaller than the 48 x 48 pixels that validation needs")
        if own is not None:
            lr, hr = _centre(own, side // step), _centre(image, side, step)
            pairs.append((step, to_tensor(lr), to_tensor(hr)))
            continue
        hr = _centre(image, side)
        for scale in VAL_SCALES:
            lr = degrade(Image.fromarray(hr), side // scale, (0, 0, side, side))
            pairs.append((scale, to_tensor(np.asarray(lr)), to_tensor(hr)))
    return pairs


def _centre(image: np.ndarray, side: int, step: int = 1) -> np.ndarray:
    """The square in the middle of an image [H, W, 3], from a multiple of `step` on."""
    y, x = ((n - side) // (2 * step) * step for n in image.shape[:2])
    return np.ascontiguousarray(image[y : y + side, x : x + side])


@torch.inference_mode()
def validate(model: GaussianSR, pairs: Iterable[tuple[int, Tensor, Tensor]]) -> dict[str, float]:
    """Mean RGB PSNR per scale, 6 pixels shaved, and the mean over scales as "psnr"."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    values: dict[int, list[float]] = {}
    for scale, lr, hr in pairs:
        out = model(lr.to(device), size=hr.shape[-2:], scale=scale).clamp(0, 1).cpu()
        values.setdefault(scale, []).append(psnr(out, hr, shave=6))
    model.train()
    means = {f"x{scale}": sum(v) / len(v) for scale, v in values.items()}
    return {"psnr": sum(means.values()) / len(means), **means}


def bf16_loss(
    model: GaussianSR,
    pairs: Iterable[tuple[int, Tensor, Tensor]],
    metrics: dict[str, float],
) -> float | None:
    """How many dB below `metrics` bf16 is, at the scale where it costs most.

    None where the device is slow in bf16: measuring would be slow too, and serve nobody there.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not has_fast_bf16(device):
        return None
    with torch.autocast(device.type, torch.bfloat16):
        lossy = validate(model, pairs)
    loss = max(metrics[key] - lossy[key] for key in metrics)
    return round(loss, 5) if math.isfinite(loss) else None  # of exact images the PSNR is infinite


@torch.inference_mode()
def show(board: Any, model: GaussianSR, pair: tuple[int, Tensor, Tensor], step: int) -> None:
    """Put on TensorBoard's `board` what a model makes of one of the `validation_pairs`.

    The bicubic upsampling, the model's result and HR side by side; the Gaussians of `direct` and
    `field`, drawn; of modes with a bank, how many LR pixels have each as their likeliest class.
    """
    scale, lr, hr = pair
    model.eval()
    x = lr.to(next(model.parameters()).device)
    ours = model(x, size=hr.shape[-2:], scale=scale).cpu()
    row = torch.cat([bicubic(lr, (hr.shape[-2], hr.shape[-1])), ours, hr], dim=-1)
    board.add_image("val/bicubic_ours_hr", to_uint8(row), step, dataformats="HWC")
    if hasattr(model.head, "bank"):
        classes = model.head.classifier(model.encoder(x)).argmax(1).flatten().cpu().numpy()
        edges = np.arange(model.config.bank.points + 1)
        board.add_histogram("val/classes", classes, step, bins=edges)
    if model.config.mode in ("direct", "field"):
        from gsr.viz import draw_gaussians

        drawn = draw_gaussians(model, to_uint8(lr))
        board.add_image("val/gaussians", drawn, step, dataformats="HWC")
    model.train()
