"""Optimisers: Adam, and Muon for the hidden convolutions of the encoder with Adam for the rest.

Muon (Jordan et al., 2024) moves a weight matrix along its momentum with all singular values set to
about one, so that no direction of the features is learnt late. It is meant for hidden layers: what
reads the image, what makes the output, and biases stay with Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gsr.config import TrainConfig
from gsr.errors import InputError


class MuonWithAdam(torch.optim.Optimizer):
    """torch.optim.Muon for the matrices given, torch.optim.Adam for the other parameters.

    Args:
        matrices: weights [out, in, ...], each taken as a matrix [out, the rest].
        others: all other parameters.
        muon_lr: of Muon; an update has singular values of about this, or a little more where a
            matrix is taller than wide.
        lr: of Adam.
    """

    def __init__(self, matrices: list[Tensor], others: list[Tensor], muon_lr: float, lr: float):
        # Muon takes matrices alone: views of the weights, in the same memory.
        self.matrices = [(weight, _as_matrix(weight)) for weight in matrices]
        views = [view for _, view in self.matrices]
        self.muon = torch.optim.Muon(views, lr=muon_lr, weight_decay=0.0)
        self.adam = torch.optim.Adam(others, lr=lr)
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


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that `train.lr` and `train.muon_lr` describe, for a model on its device.

    Every group has its rate as "initial_lr", which the schedule scales.
    """
    optimizer = _make(model, config)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _make(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    if config.muon_lr is None:
        return torch.optim.Adam(model.parameters(), lr=config.lr)
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
    return MuonWithAdam(matrices, others, muon_lr=config.muon_lr, lr=config.lr)
