"""A training step on a GPU: nothing waits, and a graph of its gradients changes no weight."""

import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from gsr import graphs
from gsr.config import OptimizerConfig, TrainConfig, load_config
from gsr.data.patches import Batch
from gsr.errors import InputError
from gsr.models import GaussianSR
from gsr.models.heads import bank
from gsr.optim import make_optimizer

ROOT = Path(__file__).parents[1]
TINY = [
    f"data.train={ROOT / 'tests' / 'data' / 'photos'}", "data.patch=12", "data.queries=64",
    "data.batch=2", "data.val_count=1", "model.encoder.n_feats=4", "model.encoder.n_blocks=1",
    "model.direct.width=4", "train.threads=1", "train.steps=7", "train.save_every=5",
]  # fmt: skip


def config(folder, *overrides):
    return load_config(ROOT / "configs" / "smoke.yaml", [f"output={folder}", *TINY, *overrides])


def batch(b=2, q=64, patch=12):
    return Batch(torch.rand(b, 3, patch, patch), torch.rand(b, q, 2) * 2 - 1, torch.rand(b, q, 3),
                 (30, 30), 2.5, list(range(b)))  # fmt: skip


def weights(folder):
    return load_file(Path(folder) / "smoke" / "model" / "model.safetensors")


# ---- the graph ----------------------------------------------------------------------------------


@pytest.fixture
def captures(monkeypatch):
    """Stands for CUDA's graphs: a call of the same into the same tensors; returns the inputs."""
    made, seen, init = [], [], graphs.GraphedLoss.__init__

    def noted(self, loss):
        made.append(self)
        init(self, loss)

    def capture(device, function):
        parameters = list(made[-1].parameters())
        assert all(p.grad is None for p in parameters)
        out = function().clone()
        gradients = [p.grad for p in parameters]

        def replay():
            for p in parameters:
                p.grad = None
            out.copy_(function())
            for p, own in zip(parameters, gradients, strict=True):
                own.copy_(p.grad)
                p.grad = None  # a graph knows addresses, and nothing of Python's attributes
            seen.append(made[-1].inputs.lr.clone())

        return out, replay

    monkeypatch.setattr(graphs.GraphedLoss, "__init__", noted)
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "aside", lambda device, function: function())
    monkeypatch.setattr(train, "check_static", lambda *_: None)
    return seen


@pytest.mark.parametrize("more", [[], ["train.muon_lr=0.01", "train.clip=null"]])
def test_a_graph_changes_no_weight(more, tmp_path, captures):
    for name, graph in (("plain", "false"), ("graph", "true")):
        train.train(config(tmp_path / name, f"train.cuda_graph={graph}", *more), progress=False)
    plain, ours = (weights(tmp_path / name) for name in ("plain", "graph"))
    assert len(captures) == 7 - graphs.WARM and not torch.equal(*captures[:2])
    assert all(torch.equal(plain[k], ours[k]) for k in plain)


def test_a_run_goes_on_with_a_graph(tmp_path, captures):
    step = "train.schedule=step"  # which may go on for longer
    train.train(config(tmp_path / "plain", "train.steps=9", step), progress=False)
    train.train(config(tmp_path / "graph", "train.steps=4", step), progress=False)
    more = ["train.steps=9", "train.cuda_graph=true", step]
    train.train(config(tmp_path / "graph", *more), resume=True, progress=False)
    plain, ours = (weights(tmp_path / name) for name in ("plain", "graph"))
    assert captures and all(torch.equal(plain[k], ours[k]) for k in plain)


@pytest.mark.parametrize("overrides, dense, words", [
    ([], False, "a GPU, not cpu: set train.cuda_graph=false"),
    (["model.mode=field", "model.bank.channels=3"], False, "not cpu and mode direct, not field"),
    (["train.accumulate=2"], True, "losses of single pixels and train.accumulate=1: set"),
])  # fmt: skip
def test_steps_that_are_not_alike(overrides, dense, words, tmp_path):
    with pytest.raises(InputError, match="train.cuda_graph needs .*" + words):
        graphs.check_static(config(tmp_path, *overrides), dense, torch.device("cpu"))


def test_a_gpu_takes_direct(tmp_path):
    graphs.check_static(config(tmp_path), False, torch.device("cuda"))


def test_the_cpu_refuses_a_graph(tmp_path):
    with pytest.raises(InputError, match="train.cuda_graph needs a GPU, not cpu"):
        train.train(config(tmp_path, "train.cuda_graph=true"), progress=False)


# ---- waiting ------------------------------------------------------------------------------------


# Numbers that heads still make tensors of, on the device: each waits for a copy.
WAITS = {"direct": 0, "field": 2, "official": 3}


@pytest.mark.parametrize("mode", WAITS)
def test_a_step_waits_for_nothing(mode, tmp_path, monkeypatch):
    """A tensor of no device has no value: whatever would wait for one raises."""
    waits, tensor = [], torch.tensor

    def noted(data, device=None, **keys):
        waits.extend([data] if torch.device(device or "cpu").type == "meta" else [])
        return tensor(data, device=device, **keys)

    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())
    monkeypatch.setattr(bank, "_uniform", lambda like, seeds: torch.empty_like(like).float())
    monkeypatch.setattr(torch, "tensor", noted)
    monkeypatch.setattr(
        torch.Tensor, "new_tensor",
        lambda like, data, **_: waits.append(data) or like.new_empty(len(data)),
    )  # fmt: skip
    c = config(tmp_path, f"model.mode={mode}", "model.bank.channels=3", "train.precision=fp32")
    model = GaussianSR(c.model).to("meta").train()
    loss_of, optimizer = train.Loss(model, "fp32"), make_optimizer(model, c.train)
    waits.clear()
    loss = train.training_step(loss_of, optimizer, [batch()], config=c.train, step=1)
    assert loss.is_meta and not loss.requires_grad
    assert len(waits) == WAITS[mode], waits


# ---- the optimiser ------------------------------------------------------------------------------


def tiny(device="cpu"):
    return torch.nn.Linear(3, 2, device=device)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_cpu_keeps_its_adam(name):
    groups = make_optimizer(tiny(), TrainConfig(optimizer=OptimizerConfig(name))).param_groups
    assert all(not group["fused"] for group in groups)


@pytest.mark.parametrize("ours, theirs", [({"foreach": True}, {}), ({}, {"fused": True})])
def test_a_state_of_another_device_leaves_how_it_computes(ours, theirs):
    def made(keys):
        torch.manual_seed(0)
        model = tiny()
        optimizer = make_optimizer(model, TrainConfig(optimizer=OptimizerConfig("adam", **keys)))
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        return optimizer

    now, before = made(ours), made(theirs)
    how = [{k: g[k] for k in ("fused", "foreach")} for g in now.param_groups]
    state = before.state_dict()
    state["param_groups"][0]["lr"] = 0.5
    now.load_state_dict(state)
    assert [{k: g[k] for k in ("fused", "foreach")} for g in now.param_groups] == how
    assert now.param_groups[0]["lr"] == 0.5 and len(now.state) == 2
    now.step()


# ---- on a GPU -----------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@needs_gpu
def test_a_graph_on_a_gpu(tmp_path):
    for name, graph in (("plain", "false"), ("graph", "true")):
        more = "train.device=cuda", f"train.cuda_graph={graph}"
        train.train(config(tmp_path / name, *more), progress=False)
    plain, ours = (weights(tmp_path / name) for name in ("plain", "graph"))
    for key in plain:
        torch.testing.assert_close(ours[key], plain[key], atol=1e-5, rtol=1e-4)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_a_step_on_a_gpu_waits_for_nothing(mode, tmp_path):
    c = config(tmp_path, f"model.mode={mode}", "model.bank.channels=3")
    model = GaussianSR(c.model).to("cuda").train()
    loss_of, optimizer = train.Loss(model, "fp32"), make_optimizer(model, c.train)
    assert optimizer.param_groups[0]["fused"]
    b = batch()
    b = b._replace(**{name: getattr(b, name).pin_memory() for name in graphs.TENSORS})

    def take(step):
        train.training_step(loss_of, optimizer, [b], config=c.train, step=step)

    take(1)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            take(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= WAITS[mode], [str(w.message) for w in waits]
