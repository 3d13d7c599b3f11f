"""The path of an image through a GPU: counted with tensors of no device, rehearsed on the CPU.

A fake CUDA tensor has a shape, a type and a device, but no values: what asks for one fails, as what
waits for a GPU should. What needs a GPU runs where there is one.
"""

import collections
import contextlib
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gsr
from gsr.config import ModelConfig
from gsr.errors import InputError
from gsr.inference import gpu
from gsr.inference import strips as infer
from gsr.inference import upscale as upscaling
from gsr.models import GaussianSR, fused
from gsr.models.checkpoint import load

LR, HR = (720, 1280), (2880, 5120)

# ---- counting -----------------------------------------------------------------------------------


def size_of(tensor):
    """Bytes of memory that it takes, where it is expanded those of what it is expanded from."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


class Counter(TorchDispatchMode):
    """Counts the operations of a device, the bytes they read and write, and synchronisations."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = collections.Counter(), collections.Counter()
        self.waits = []

    def count(self, name, *tensors):
        self.operations[name] += 1
        self.bytes[name] += sum(size_of(t) for t in tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::")
        result = function(*args, **kwargs)
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(t)]
        made = [t for t in torch.utils._pytree.tree_leaves(result) if is_tensor(t)]
        if not any(t.is_cuda for t in (*given, *made)):
            return result
        if any(not t.is_cuda and t.ndim for t in (*given, *made)):
            # A copy from or to the CPU; all others have their numbers on one device.
            free = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
            if not free:
                self.waits.append(f"{name} {[t.device.type for t in (*given, *made)]}")
        if name.startswith(("empty", "new_empty", "prim::", "sym_")):
            return result
        if function.is_view and made[0].untyped_storage() in [t.untyped_storage() for t in given]:
            return result  # `to` and `reshape` may copy, and may be views
        if name == "index_select":
            given = made  # it reads as much as it writes
        if name == "gsr::splat":  # a strip reads its own rows
            size, (start, stop) = args[5:7]
            self.bytes[name] -= sum(size_of(t) for t in given) * (1 - (stop - start) / size[0])
        if name.startswith("conv") and len(given) == 3 and given[2].ndim == 1:
            self.count("bias", made[0], made[0])  # in a pass of its own
        self.count(name, *given, *made)
        return result


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def getitem(tensor, index):
    """tensor[index]: PyTorch's own needs a build for CUDA, even of a fake tensor."""
    index = index if isinstance(index, tuple) else (index,)
    if ... in index:
        at, missing = index.index(...), tensor.ndim - sum(i not in (None, ...) for i in index)
        index = index[:at] + missing * (slice(None),) + index[at + 1 :]
    dim = 0
    for i in index:
        if i is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(i, slice):
            start, stop, step = i.indices(tensor.shape[dim])
            whole = (start, stop, step) == (0, tensor.shape[dim], 1)
            tensor = tensor if whole else torch.ops.aten.slice(tensor, dim, start, stop, step)
            dim += 1
        elif isinstance(i, int):
            tensor = tensor.select(dim, i)
        else:
            assert i.dtype == torch.int64, "a mask as an index waits for the device"
            assert dim == 0 and len(index) == 1
            tensor = torch.ops.aten.index(tensor, [i])
    return tensor


def setitem(tensor, index, value):
    part = getitem(tensor, index)
    torch.ops.aten.copy_(part, value) if is_tensor(value) else part.fill_(value)


def contiguous(tensor, memory_format=torch.contiguous_format):
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return tensor.clone(memory_format=memory_format)


class Stream:
    """Stands for CUDA's streams and events, of which a fake tensor has none."""

    def __init__(self, *_):
        pass

    wait_stream = record = synchronize = __init__


@pytest.fixture
def counter(monkeypatch):
    """Counts what a model of fake tensors does, which it must have moved to cuda."""
    monkeypatch.setattr(torch.amp.autocast_mode, "autocast", torch.autocast)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.Tensor, "__getitem__", getitem)
    monkeypatch.setattr(torch.Tensor, "__setitem__", setitem)
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    monkeypatch.setattr(torch.Tensor, "copy_", torch.ops.aten.copy_.default)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(gpu, "free_bytes", lambda _: 70 * 10**9)
    monkeypatch.setattr(gpu, "pinned_bytes", lambda n: torch.empty(n, dtype=torch.uint8))
    counter = Counter()

    def relu_convolution(x, weight, bias):
        out = uncounted(torch.nn.functional.conv2d, x, weight, padding=weight.shape[-1] // 2)
        counter.count("cudnn_convolution_relu", x, weight, bias, out)
        return out

    def add_residual(y, bias, x, scale=1):
        assert y.shape == x.shape and y.stride() == x.stride() and bias.dtype == x.dtype == y.dtype
        counter.count("residual", y, x, y)
        return y

    def uncounted(function, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes() as modes:
            fake = next(m for m in modes if isinstance(m, FakeTensorMode))
            with fake:
                return function(*args, **kwargs)

    def new_tensor(like, data, **_):
        counter.waits.append("new_tensor")
        return like.new_empty(np.shape(data))

    monkeypatch.setattr(fused, "relu_convolution", relu_convolution)
    monkeypatch.setattr(fused, "add_residual", add_residual)
    monkeypatch.setattr(torch.Tensor, "new_tensor", new_tensor)
    return counter


def to_fake(model):
    """Put fake parameters on cuda into a model; `to` needs the device itself."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, device="cuda"))


def upscale_720p(counter, config, precision="bf16"):
    """Upscale a fake uint8 image by 4 with a fake model."""
    model = GaussianSR(config).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake(model)
        lr = torch.empty(*LR, 3, dtype=torch.uint8).permute(2, 0, 1)
        planes = upscaling._plain(lr)
        with counter:
            upscaling._render(
                model, None, precision, None, planes, HR, (4, 4), lambda *_: None, 0,
                to=torch.device("cpu"), interleaved=True,
            )  # fmt: skip
    return model


if __name__ == "__main__":
    mp = pytest.MonkeyPatch()
    c = counter.__wrapped__(mp) if hasattr(counter, "__wrapped__") else None
