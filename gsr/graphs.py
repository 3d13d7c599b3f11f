"""The gradients of a training step as one CUDA graph.

A small network's step is hundreds of operations that take a GPU less time than it takes the CPU to
start them. A graph starts them all at once; it is made of shapes, addresses and numbers that are
the same in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gsr import distributed
from gsr.config import Config, CustomEncoder
from gsr.data.patches import Batch
from gsr.errors import InputError

WARM = 3  # steps before, in which libraries start and kernels are compiled
TENSORS = "lr", "coord", "target"


class GraphedLoss(nn.Module):
    """A loss of batches whose gradients are a CUDA graph from the fourth step on.

    Args:
        loss: a module that computes the same for any batch of the same shapes, and waits for
            nothing.
    """

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss, self.steps, self.replay = loss, 0, None
        self.inputs: Any = None
        self.gradient: list[tuple[nn.Parameter, Tensor | None]] = []

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(batch)

    def gradients(self, batch: Batch) -> Tensor:
        """Set the parameters' gradients to those of a batch; return its loss, detached."""
        device = next(self.parameters()).device
        self.steps += 1
        if self.steps <= WARM:
            return aside(device, lambda: self._backward(batch.to(device)))
        if self.replay is None:
            self.inputs = batch.to(device)
            for parameter in self.parameters():
                parameter.grad = None  # the graph makes them, in memory of its own
            self.out, self.replay = capture(device, lambda: self._backward(self.inputs))
            self.gradient = [(p, p.grad) for p in self.parameters()]
        else:
            for name in TENSORS:
                getattr(self.inputs, name).copy_(getattr(batch, name), non_blocking=True)
        self.replay()
        for parameter, gradient in self.gradient:  # an optimiser's zero_grad has taken them away
            parameter.grad = gradient
        return self.out.clone()

    def _backward(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()


def check_static(config: Config, dense: bool, device: torch.device) -> None:
    """Raise InputError, which names `train.cuda_graph`, unless steps differ in nothing but numbers.

    The scale varies from step to step. In `direct` only the points depend on it, of which there are
    always as many; `field` and `official` compute with the scale itself, and draw random numbers.

    Args:
        config: the experiment.
        dense: a term of the loss needs whole patches, whose size depends on the scale.
        device: where the model is.
    """
    own = isinstance(config.model.encoder, CustomEncoder)
    reasons = {
        f"a GPU, not {device.type}": device.type != "cuda",
        f"mode direct, not {config.model.mode}": config.model.mode != "direct",
        "one of gsr's encoders": own,
        "losses of single pixels": dense,
        "train.accumulate=1": config.train.accumulate != 1,
        "one process": distributed.world_size() != 1,
    }
    if missing := [name for name, lacks in reasons.items() if lacks]:
        raise InputError(
            f"train.cuda_graph needs {' and '.join(missing)}: set train.cuda_graph=false"
        )


def aside(device: torch.device, function: Callable[[], Tensor]) -> Tensor:
    """function() on a stream of its own, as a graph will be captured; others wait for it."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = function()
    current.wait_stream(stream)
    return result


def capture(
    device: torch.device, function: Callable[[], Tensor]
) -> tuple[Tensor, Callable[[], None]]:
    """The tensor that function() returns, and what computes it and all else in it anew."""
    graph = torch.cuda.CUDAGraph()
    # The threads of the loader may page-lock memory meanwhile, which is no part of the graph.
    with torch.cuda.graph(
        graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"
    ):
        result = function()
    return result, graph.replay
