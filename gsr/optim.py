"""Optimisers and learning rates; Muon for the hidden convolutions of the encoder, Adam beside it.

Muon (Jordan et al., 2024) moves a weight matrix along its momentum with all singular values set to
about one, so that no direction of the features is learnt late. It is meant for hidden layers: what
reads the image, what makes the output, and biases stay with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from gsr import parts
from gsr.config import TrainConfig
from gsr.errors import InputError


class MuonWithAdam(torch.optim.Optimizer):
    """torch.optim.Muon for the matrices given, torch.optim.Adam for the other parameters.

    Args:
        matrices: weights [out, in, ...], each taken as a matrix [out, the rest].
        others: all other parameters.
        muon_lr: of Muon; an update has singular values of about this, or a little more where a
            matrix is taller than wide.
        lr, keys: of Adam.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[Tensor],
        *,
        muon_lr: float,
        lr: float,
        **keys: Any,
    ):
        # Muon takes matrices alone: views of the weights, in the same memory.
        self.matrices = [(weight, _as_matrix(weight)) for weight in matrices]
        views = [view for _, view in self.matrices]
        self.muon = torch.optim.Muon(views, lr=muon_lr, weight_decay=0.0)
        self.adam = torch.optim.Adam(others, lr=lr, **keys)
        super().__init__([*matrices, *others], {})
        self.param_groups = [*self.adam.param_groups, *self.muon.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.adam.zero_grad(set_to_none)
        for weight, _ in self.matrices:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for weight, view in self.matrices:
            if view.data_ptr() != weight.data_ptr():
                raise RuntimeError("a weight was moved after its optimiser was made")
            view.grad = None if weight.grad is None else _flat(weight.grad, like=weight)
        self.muon.step()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adam.load_state_dict(state_dict["adam"])
        self.param_groups = [*self.adam.param_groups, *self.muon.param_groups]


def _flat(weight: Tensor, like: Tensor) -> Tensor:
    """[out, in, ...] as [out, the rest] in the order in which `like` lies in memory."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)  # another order of columns, which Muon does not mind
    return weight.reshape(len(weight), -1)


def _as_matrix(weight: Tensor) -> Tensor:
    return nn.Parameter(_flat(weight.detach(), like=weight), requires_grad=True)


OPTIMIZERS = {"adam": "gsr.optim.adam", "adamw": "torch.optim.AdamW"}
HOW = {"fused", "foreach", "differentiable"}  # keys of how it computes, of which one is chosen
SCHEDULES = {"step": "gsr.optim.step_schedule", "cosine": "gsr.optim.cosine_schedule"}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that `train.optimizer` names, for a model on its device.

    A class of torch.optim.Optimizer is called with the model's parameters, a function with the
    model; both with `train.lr` as lr, and the keys that the config has for it. Every group has its
    rate as "initial_lr", which the schedule scales.

    Raises:
        InputError: a name that cannot be found, or a key that the optimiser does not take.
    """
    part, keys = config.optimizer, config.optimizer.keys
    if "lr" in keys:
        raise InputError("train.optimizer.lr is not a key; set train.lr")
    keys["lr"] = config.lr
    maker = parts.find(part.name, OPTIMIZERS, "train.optimizer")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if part.name in OPTIMIZERS and device.type == "cuda" and not keys.keys() & HOW:
        keys["fused"] = True  # one kernel for all parameters
    if part.name == "adam" and config.muon_lr is not None:
        keys["muon_lr"] = config.muon_lr
    own_class = isinstance(maker, type) and issubclass(maker, torch.optim.Optimizer)
    given = model.parameters() if own_class else model
    optimizer = parts.make(maker, (given,), keys, f"train.optimizer: {part.name}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"train.optimizer: {part.name} gives {type(optimizer).__name__}; it must return a "
            "torch.optim.Optimizer"
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    getattr(optimizer, "adam", optimizer).register_load_state_dict_pre_hook(_keep_how)
    return optimizer


def _keep_how(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state with this optimiser's own ways to compute: it may come from another device."""
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=False)
    own = [saved | {k: now[k] for k in HOW & now.keys()} for saved, now in pairs]
    same = len(state["param_groups"]) == len(optimizer.param_groups)
    return {**state, "param_groups": own} if same else state


def adam(model: Any, lr: float, muon_lr: float | None = None, **keys: Any) -> torch.optim.Optimizer:
    """torch.optim.Adam with these keys; with `muon_lr`, Muon for the encoder's convolutions."""
    if muon_lr is None:
        return torch.optim.Adam(model.parameters(), lr=lr, **keys)
    if not hasattr(torch.optim, "Muon"):
        raise InputError(
            f"train.muon_lr needs torch 2.9 or newer, not {torch.__version__}: update it, or set "
            "train.muon_lr=null"
        )
    matrices = [
        weight
        for weight in model.encoder.parameters()
        if weight.ndim >= 2 and weight.shape[1] != 3  # not what reads the image
    ]
    taken = {id(weight) for weight in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return MuonWithAdam(matrices, others, muon_lr=muon_lr, lr=lr, **keys)


# ---- learning rate ------------------------------------------------------------------------------


def make_schedule(config: TrainConfig, total: int, per_epoch: int) -> Callable[[int, float], float]:
    """The learning rate as a function of (step, rate at first), so that nothing is to be resumed.

    `train.schedule` names a function of (step, total), steps from 0 and their number, and of the
    keys that the config has for it, to a factor on the rate; the warm-up is a factor of its own.

    Raises:
        InputError: a name that cannot be found, or a key that the schedule does not take.
    """
    part, keys = config.schedule, config.schedule.keys
    schedule = parts.find(part.name, SCHEDULES, "train.schedule")
    if part.name == "step":
        if keys:
            raise InputError(
                f"train.schedule: step cannot take its keys: {', '.join(keys)}; set "
                "train.step_epochs and train.gamma"
            )
        keys |= {"every": per_epoch * config.step_epochs, "gamma": config.gamma}
    parts.check_keys(schedule, (0, total), keys, f"train.schedule: {part.name}")
    if not isinstance(factor := schedule(0, total, **keys), Real):
        raise InputError(
            f"train.schedule: {part.name} gives {type(factor).__name__}; it must give a number"
        )

    def learning_rate(step: int, lr: float) -> float:
        warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        return lr * warm * schedule(step, total, **keys)

    return learning_rate


def step_schedule(step: int, total: int, every: int, gamma: float) -> float:
    """Multiplied by gamma after every so many steps."""
    return gamma ** (step // every)


def cosine_schedule(step: int, total: int) -> float:
    """Half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / total))
