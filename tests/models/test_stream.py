"""Networks by bands of rows: equal to the whole image, wherever it is cut or entered."""

import random

import pytest
import torch
from torch import nn

import gsr
from gsr.config import EncoderConfig, ModelConfig
from gsr.models.stream import Band, Chain, Convolution, Layer, Residual, Skip


def network(seed=0):
    """(stream, the same as a plain function), with reaches of 0 to 2 and nested residuals."""
    torch.manual_seed(seed)
    first, second, third = (
        nn.Conv2d(2, 2, n, padding=n // 2).double() for n in (3, 5, 1)
    )  # fmt: skip

    def add(x, y):
        return (x[0] + y[0],)

    def stream():
        inner = Residual(Chain(Layer(second, 2), Convolution(first)), add)
        return Chain(
            Layer(first, 1),
            Skip(Chain(inner, Convolution(third, torch.tanh)), 0.5),
            Convolution(second),
        )

    def plain(x):
        x = first(x)
        y = x + first(second(x))
        return second(x + third(y).tanh() / 2)

    return stream, plain


def feed(stream, picture, edges, start=0):
    """What comes out, as {row: its numbers}."""
    rows = {}
    for first, end in zip(edges, edges[1:], strict=False):
        last = end == picture.shape[-2]
        given = picture[..., first:end, :].clone()
        band = stream.feed(Band(first, (given,)), last)
        assert torch.equal(given, picture[..., first:end, :])  # what was lent is as it was
        if band is not None:
            assert not rows or band.start == max(rows) + 1
            rows |= {
                band.start + i: band.tensors[0][..., i, :] for i in range(band.stop - band.start)
            }
    return rows


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_any_bands_give_the_whole_image(seed):
    rng = random.Random(seed)
    h = rng.randint(1, 40)
    cuts = sorted(rng.sample(range(1, h), min(h - 1, rng.choice([0, 1, 3, h]))))
    stream, plain = network(seed)
    picture = torch.randn(1, 2, h, 5, dtype=torch.float64)
    rows = feed(stream(), picture, [0, *cuts, h])
    assert sorted(rows) == list(range(h))
    torch.testing.assert_close(torch.stack([rows[i] for i in range(h)], -2), plain(picture))


@torch.no_grad()
def test_a_stream_may_start_below_the_top():
    stream, plain = network()
    picture = torch.randn(1, 2, 30, 5, dtype=torch.float64)
    rows, true = feed(stream(), picture, [9, 12, 13, 20, 30]), plain(picture)
    assert sorted(rows) == list(range(9 + 6, 30))  # 6 rows: all reaches together
    for i, row in rows.items():
        torch.testing.assert_close(row, true[..., i, :])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["direct", "field", "official"])
@pytest.mark.parametrize("own", [True, False])
def test_models(mode, own, monkeypatch):
    """With the encoder's own stream, and with its halo around each band where it has none."""
    model = gsr.GaussianSR(ModelConfig(mode, EncoderConfig(n_feats=16, n_blocks=2))).eval()
    if not own:
        monkeypatch.delattr(type(model.encoder), "stream")
    lr = torch.rand(2, 3, 25, 9)
    whole, stream = model.encode(lr), model.stream()
    parts = [
        stream.feed(Band(a, (lr[..., a:b, :],)), b == 25) for a, b in ((0, 3), (3, 19), (19, 25))
    ]
    parts = [part for part in parts if part is not None]
    assert type(parts[0].tensors) is type(whole) and len(parts) > 1
    for i, field in enumerate(whole):
        ours = torch.cat([part.tensors[i] for part in parts], -2)
        torch.testing.assert_close(ours, field, atol=1e-6, rtol=0)


@torch.no_grad()
def test_rows_are_computed_once(monkeypatch):
    """By the convolutions of EDSR; those of the head compute one above and below each band, of
    which the rows that have waited for the last one make one more."""
    model = gsr.GaussianSR(ModelConfig("direct", EncoderConfig(n_feats=4, n_blocks=3)))
    seen = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            seen[id(module.weight)] = 0
    conv2d = nn.functional.conv2d

    def note(x, weight, *args, **more):
        out = conv2d(x, weight, *args, **more)
        if id(weight) in seen:
            seen[id(weight)] += out.shape[-2]
        return out

    monkeypatch.setattr(nn.functional, "conv2d", note)
    lr, stream = torch.rand(1, 3, 60, 6), model.stream()
    for first in range(0, 60, 20):
        stream.feed(Band(first, (lr[..., first : first + 20, :],)), first == 40)
    *encoder, head = seen.values()
    assert encoder == [60] * (2 * 3 + 2) and head == 60 + 3 * 2
