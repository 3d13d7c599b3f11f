"""Muon beside Adam: who takes what, and that its step is torch.optim.Muon's."""

import pytest
import torch

from gsr.config import DirectConfig, EncoderConfig, ModelConfig, TrainConfig
from gsr.errors import InputError
from gsr.models import GaussianSR
from gsr.optim import MuonWithAdam, make_optimizer


def model(layout=torch.contiguous_format):
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=EncoderConfig("span", n_feats=8, n_blocks=2), direct=DirectConfig(width=8)
    )
    return GaussianSR(config).to(memory_format=layout)


def step(net, optimizer):
    x = torch.rand(2, 3, 9, 10, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    net.encoder(x).square().mean().backward()
    optimizer.step()


def test_adam_takes_all_without_muon():
    net = model()
    assert type(make_optimizer(net, TrainConfig())) is torch.optim.Adam


def test_muon_takes_the_hidden_convolutions_of_the_encoder():
    net = model()
    optimizer = make_optimizer(net, TrainConfig(lr=1e-3, muon_lr=0.02))
    assert isinstance(optimizer, MuonWithAdam)
    taken = {id(weight) for weight, _ in optimizer.matrices}
    names = {name for name, p in net.named_parameters() if id(p) in taken}
    hidden = {n for n, p in net.encoder.named_parameters() if p.ndim == 4 and n != "head.weight"}
    assert names == {f"encoder.{name}" for name in hidden}
    rates = sorted(group["initial_lr"] for group in optimizer.param_groups)
    assert rates == [1e-3, 0.02]
    counted = len(optimizer.matrices) + sum(len(g["params"]) for g in optimizer.adam.param_groups)
    assert counted == len(list(net.parameters()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_that_of_torchs_muon(layout):
    net, twin = model(layout), model()
    optimizer = make_optimizer(net, TrainConfig(lr=1e-3, muon_lr=0.02))
    matrices = [p for n, p in twin.encoder.named_parameters() if p.ndim == 4 and n != "head.weight"]
    flat = [torch.nn.Parameter(p.detach().flatten(1).clone()) for p in matrices]
    muon = torch.optim.Muon(flat, lr=0.02, weight_decay=0.0)
    for _ in range(3):
        step(net, optimizer)
    for _ in range(3):
        # The other parameters take Adam's step in both.
        x = torch.rand(2, 3, 9, 10, generator=torch.Generator().manual_seed(1))
        twin.zero_grad()
        twin.encoder(x).square().mean().backward()
        for p, f in zip(matrices, flat, strict=True):
            f.grad = p.grad.flatten(1).clone()
        muon.step()
        others = [p for p in twin.parameters() if all(p is not m for m in matrices)]
        if _ == 0:
            adam = torch.optim.Adam(others, lr=1e-3)
        adam.step()
        with torch.no_grad():
            for p, f in zip(matrices, flat, strict=True):
                p.copy_(f.view_as(p))
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        # Muon multiplies in bfloat16, whose rounding depends on the order of the columns.
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0, msg=name)
    moved = [
        (a - b).abs().max() for a, b in zip(net.parameters(), model().parameters(), strict=True)
    ]
    assert max(moved) > 0.01


def test_a_weight_that_was_moved_is_noticed():
    net = model()
    optimizer = make_optimizer(net, TrainConfig(muon_lr=0.02))
    net.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="moved"):
        step(net, optimizer)


def test_an_older_torch_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError, match="train.muon_lr needs torch 2.9"):
        make_optimizer(model(), TrainConfig(muon_lr=0.02))
