"""The encoders: what their papers count and compute, and that bands of rows change nothing."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gsr
from gsr.config import DirectConfig, EncoderConfig, ModelConfig, from_dict
from gsr.errors import InputError
from gsr.inference import strips as infer
from gsr.models import GaussianSR
from gsr.models.checkpoint import save_model
from gsr.models.encoders.swinir import reflected
from gsr.models.registry import ENCODERS, make_encoder
from gsr.models.stream import Band, Chain, Convolution, Residual, StreamedDenseBlock

SMALL = {
    "edsr": EncoderConfig("edsr", n_feats=6, n_blocks=2),
    "span": EncoderConfig("span", n_feats=6, n_blocks=3),
    "rdn": EncoderConfig("rdn", n_feats=6, n_blocks=3, layers=2, growth=4),
    "swinir": EncoderConfig("swinir", n_feats=6, dim=8, depths=[2, 1, 3], heads=2, window=4),
}
STREAMED = "gsr.models.stream", "gsr.models.encoders.swinir"


def make(name, seed=0):
    """A small encoder in float64 in which everything matters."""
    torch.manual_seed(seed)
    encoder = make_encoder(SMALL[name]).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def picture(h, w, b=1, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed)).double()


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-10)


# ---- what the papers say ------------------------------------------------------------------------


def conv(i, o, k=3):
    return i * o * k * k + o


def linear(i, o):
    return i * o + o


def edsr_count(c, n):
    return conv(3, c) + 2 * n * conv(c, c) + conv(c, c)


def rdn_count(g0, d, c, g):
    """Section 3: two shallow layers; blocks of c convolutions and a fusion; global fusion."""
    block = sum(conv(g0 + i * g, g) for i in range(c)) + conv(g0 + c * g, g0, 1)
    return conv(3, g0) + conv(g0, g0) + d * block + conv(d * g0, g0, 1) + conv(g0, g0)


def swinir_count(dim, depths, heads, window, out):
    """Section 3 and Swin's table of relative positions; LayerNorms also around the body."""
    norm, hidden = 2 * dim, 2 * dim
    attention = linear(dim, 3 * dim) + linear(dim, dim) + (2 * window - 1) ** 2 * heads
    block = norm + attention + norm + linear(dim, hidden) + linear(hidden, dim)
    groups = sum(depth * block + conv(dim, dim) for depth in depths)
    return conv(3, dim) + norm + groups + norm + conv(dim, dim) + conv(dim, out)


@pytest.mark.parametrize(
    "config, formula, millions",
    [
        (EncoderConfig(), edsr_count(64, 16), 1.2),
        (EncoderConfig(n_feats=256, n_blocks=32, res_scale=0.1), edsr_count(256, 32), 38.4),
        (EncoderConfig("rdn"), rdn_count(64, 16, 8, 64), 22.0),
        (EncoderConfig("rdn", n_blocks=20, layers=6, growth=32), rdn_count(64, 20, 6, 32), None),
        (EncoderConfig("swinir"), swinir_count(180, [6] * 6, 6, 8, 64), 11.6),
    ],
    ids=["EDSR-baseline", "EDSR", "RDN-B", "RDN-A", "SwinIR"],
)
def test_parameters(config, formula, millions):
    with torch.device("meta"):
        encoder = make_encoder(config)
    count = sum(p.numel() for p in encoder.parameters())
    assert count == formula
    assert millions is None or round(count / 1e6, 1) == millions


@torch.no_grad()
def test_rdn_is_what_the_paper_draws():
    """Equations 1 to 6, layer by layer from the weights alone."""
    encoder, lr = make("rdn"), picture(7, 9, 2)
    p = dict(encoder.named_parameters())

    def conv2d(name, x):
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight, p[f"{name}.bias"], padding=weight.shape[-1] // 2)

    shallow = conv2d("first", 2 * lr - 1)
    x, results = conv2d("second", shallow), []
    for d in range(3):
        inputs = [x]
        for c in range(2):
            inputs.append(conv2d(f"blocks.{d}.convs.{c}", torch.cat(inputs, 1)).relu())
        x = x + conv2d(f"blocks.{d}.fuse", torch.cat(inputs, 1))
        results.append(x)
    want = shallow + conv2d("last", conv2d("fuse", torch.cat(results, 1)))
    close(encoder(lr), want)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (12, 16), (7, 10), (2, 5)])
def test_swinir_is_what_the_paper_draws(size):
    """Attention of all pixels with all, masked to those of the same window."""
    encoder, lr = make("swinir"), picture(*size, 2)
    p = dict(encoder.named_parameters())
    window, heads = 4, 2
    h, w = (-(-n // window) * window for n in size)

    def conv2d(name, x):
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=1)

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def full(name, x):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def tokens(x):
        return x.flatten(2).mT

    def image(x):
        return x.mT.unflatten(2, (h, w))

    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))

    def attention(name, t, shift):
        which = torch.stack([(y - shift).div(window, rounding_mode="floor"),
                             (x - shift).div(window, rounding_mode="floor")])  # fmt: skip
        together = (which[:, :, None] == which[:, None]).all(0)
        dy, dx = (c[:, None] - c for c in (y, x))
        table = p[f"{name}.bias"].view(2 * window - 1, 2 * window - 1, heads)
        bias = table[(dy + window - 1).clamp(0, 6), (dx + window - 1).clamp(0, 6)]
        q, k, v = full(f"{name}.qkv", t).chunk(3, dim=-1)
        out = []
        for head in range(heads):
            part = slice(4 * head, 4 * head + 4)  # 8 channels, 2 heads
            logits = q[..., part] @ k[..., part].mT / 2 + bias[..., head]
            out.append(logits.masked_fill(~together, -torch.inf).softmax(-1) @ v[..., part])
        return full(f"{name}.out", torch.cat(out, -1))

    padded = 2 * lr - 1
    for axis, n in ((2, h), (3, w)):
        while padded.shape[axis] < n:  # one pixel at a time, from the other side of the last
            last = padded.shape[axis] - 1
            m = size[axis - 2]
            mirror = (last + 1) % (2 * m - 2)
            mirror = min(mirror, 2 * m - 2 - mirror)
            padded = torch.cat([padded, padded.narrow(axis, mirror, 1)], axis)
    first = conv2d("first", padded)
    t = norm("norm", tokens(first))
    for g, depth in enumerate((2, 1, 3)):
        before = t
        for i in range(depth):
            name = f"groups.{g}.blocks.{i}"
            shift = window // 2 if i % 2 else 0
            t = t + attention(f"{name}.attention", norm(f"{name}.norm", t), shift)
            hidden = F.gelu(full(f"{name}.mlp.1", norm(f"{name}.mlp.0", t)))
            t = t + full(f"{name}.mlp.3", hidden)
        t = before + tokens(conv2d(f"groups.{g}.conv", image(t)))
    deep = first + conv2d("last", image(norm("last_norm", t)))
    want = F.leaky_relu(conv2d("out", deep), 0.01)[..., : size[0], : size[1]]
    close(encoder(lr), want)


@pytest.mark.parametrize("n, window", [(1, 8), (2, 8), (5, 8), (8, 8), (9, 8), (13, 4)])
def test_reflection(n, window):
    index = reflected(n, window).tolist()
    assert len(index) % window == 0 and 0 <= len(index) - n < window
    if n > 1:
        more = np.pad(np.arange(n), (0, len(index) - n), mode="reflect")
        assert index == more.tolist()
    else:
        assert index == [0] * window


# ---- what all of them keep to -------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [(1, 1), (3, 10), (12, 8)])
def test_features(name, size):
    encoder = make(name)
    features = encoder(picture(*size, 2))
    assert features.shape == (2, encoder.out_channels, *size) and encoder.out_channels == 6
    close(encoder(picture(*size, 2)[1:]), features[1:])
    assert features.isfinite().all() and features.std() > 0


@pytest.mark.parametrize("name", ENCODERS)
def test_halo(name):
    """Rows of the image that a row of features depends on: as far as the halo, and no further."""
    encoder = make(name)
    n = 2 * encoder.halo + 13
    lr, reach = picture(n, 4).requires_grad_(), {-1: 0, 1: 0}
    features = encoder(lr).square().sum(dim=(0, 1, 3))
    for row in range(encoder.halo, encoder.halo + 4):
        (grad,) = torch.autograd.grad(features[row], lr, retain_graph=True)
        seen = grad.abs().amax(dim=(0, 1, 3)).nonzero()[:, 0]
        for side in reach:
            reach[side] = max(reach[side], (side * (seen - row)).max().item())
    assert reach == {-1: encoder.halo, 1: encoder.halo}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_learns(name):
    encoder = make(name)
    encoder(picture(9, 10, 2)).square().sum().backward()
    for parameter, p in encoder.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, parameter


def feed(stream, lr, edges):
    """What comes out, as {row: its numbers}."""
    rows, h = {}, lr.shape[-2]
    for first, end in zip(edges, edges[1:], strict=False):
        given = lr[..., first:end, :].clone()
        parts = [stream.feed(Band(first, (given,)), False)]
        parts += [stream.feed(None, True)] if end == h else []
        assert torch.equal(given, lr[..., first:end, :])  # what was lent is as it was
        for band in (part for part in parts if part is not None):
            assert not rows or band.start == max(rows) + 1
            rows |= {
                i: band.tensors[0][..., i - band.start, :] for i in range(band.start, band.stop)
            }
    return rows


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("seed", range(10))
def test_any_bands_give_the_whole_image(name, seed):
    draw = random.Random(seed)
    h, w = draw.randint(1, 40), draw.randint(1, 11)
    cuts = sorted(draw.sample(range(1, h), min(h - 1, draw.choice([0, 1, 3, h]))))
    encoder, lr = make(name, seed), picture(h, w, 2)
    rows, want = feed(encoder.stream(), lr, [0, *cuts, h]), encoder(lr)
    assert sorted(rows) == list(range(h))
    close(torch.stack([rows[i] for i in range(h)], -2), want)


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("start", [1, 2, 3, 4, 9])
def test_a_stream_may_start_below_the_top(name, start):
    encoder = make(name)
    h = start + encoder.halo + 11
    lr = picture(h, 5)
    rows, want = feed(encoder.stream(), lr, [start, start + 1, start + 12, h]), encoder(lr)
    assert sorted(rows) == list(range(min(rows), h)) and min(rows) <= start + encoder.halo
    for i, row in rows.items():
        close(row, want[..., i, :])


def tensors(thing, seen=None):
    """All tensors that a stream's nodes hold, by their memory."""
    seen = {} if seen is None else seen
    if isinstance(thing, torch.Tensor):
        seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            tensors(item, seen)
    elif type(thing).__module__ in STREAMED and not isinstance(thing, nn.Module):
        tensors(list(vars(thing).values()), seen)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", ["rdn", "swinir"])
def test_what_a_stream_holds_does_not_grow_with_the_image(name):
    encoder, w = make(name), 8
    lr, stream, held = picture(40 * 16, w), encoder.stream(), []
    for first in range(0, 38 * 16, 16):
        stream.feed(Band(first, (lr[..., first : first + 16, :],)), False)
        held.append(sum(tensors(stream).values()))
    assert held[20] == held[-1] > 0
    # As much as infer reckons with, rows that are lent being those of a band.
    pixel, column = encoder.floats
    assert held[-1] <= 8 * w * (column + 16 * pixel)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_dense_convolutions(seed):
    """As so many residual connections that put their results beside their inputs."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    sizes = [draw.choice([1, 3, 5]) for _ in range(draw.randint(1, 4))]
    convs = [nn.Conv2d(2 + 3 * i, 3, k, padding=k // 2).double() for i, k in enumerate(sizes)]
    lr = torch.randn(2, 2, draw.randint(1, 30), 5, dtype=torch.float64)
    h, start = lr.shape[-2], draw.choice([0, 0, 2])
    start = 0 if start + sum(sizes) > h else start
    cuts = sorted(draw.sample(range(start + 1, h), draw.randint(0, max(0, h - start - 1))))

    def residual(conv):
        return Residual(Convolution(conv, torch.tanh), lambda x, y: (torch.cat((*x, *y), 1),))

    rows = feed(StreamedDenseBlock(convs, torch.tanh), lr, [start, *cuts, h])
    want = feed(Chain(*map(residual, convs)), lr, [start, *cuts, h])
    assert rows.keys() == want.keys() and len(rows) > 0
    for i, row in rows.items():
        close(row, want[i])


@torch.no_grad()
def test_rows_of_rdn_are_computed_once(monkeypatch):
    encoder, rows = make("rdn"), {}
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            rows[id(module.weight)] = 0
    conv2d = F.conv2d

    def note(x, weight, *args, **more):
        out = conv2d(x, weight, *args, **more)
        if id(weight) in rows:
            rows[id(weight)] += out.shape[-2]
        return out

    monkeypatch.setattr(F, "conv2d", note)
    feed(encoder.stream(), picture(50, 4), [0, 7, 20, 21, 43, 50])
    del rows[id(encoder.fuse.weight)]  # the parts of which are applied block by block
    assert set(rows.values()) == {50}


@torch.no_grad()
def test_the_rows_that_waited_come_by_bands(monkeypatch):
    """At the end the last blocks have the halo's rows to do, which must not be done at once."""
    encoder, most, conv2d = make("rdn"), [0], F.conv2d

    def note(x, weight, *args, **more):
        out = conv2d(x, weight, *args, **more)
        most.append(out.shape[-2] if weight.shape[-1] == 3 else 0)
        return out

    monkeypatch.setattr(F, "conv2d", note)
    feed(encoder.stream(), picture(40, 4), list(range(0, 41, 4)))
    assert max(most) <= 4 + 2 < encoder.halo  # a band, and what waits in a block of two layers


# ---- as parts of a model ------------------------------------------------------------------------


def model(name):
    torch.manual_seed(1)
    config = ModelConfig(encoder=SMALL[name], direct=DirectConfig(gaussians=2, width=8))
    model = GaussianSR(config).eval()
    nn.init.normal_(model.head.out.weight, std=0.3)
    return model


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("pixels", [1, 60, 300, 10000])
def test_upscaling_equals_the_model(name, pixels, monkeypatch):
    ours, lr = model(name), torch.rand(1, 3, 45, 11)
    with torch.no_grad():
        want = ours(lr, scale=2)
    monkeypatch.setattr(infer, "BAND_PIXELS", pixels)
    monkeypatch.setattr(infer, "STRIP_PIXELS", 500)
    assert (infer.run(ours, lr, (90, 22)) - want).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["rdn", "swinir"])
def test_after_too_little_memory_it_goes_on(name, monkeypatch):
    ours, lr = model(name), torch.rand(1, 3, 60, 8)
    with torch.no_grad():
        want = ours(lr, scale=2)
    monkeypatch.setattr(infer, "BAND_PIXELS", 8 * 10)
    monkeypatch.setattr(infer, "STRIP_PIXELS", 16 * 30)
    plain = ours.render

    def render(*args, **kwargs):
        rows = args[3]
        if rows[0] > 50 and rows[1] - rows[0] > 8:
            raise MemoryError
        return plain(*args, **kwargs)

    ours.render = render
    assert (infer.run(ours, lr, (120, 16)) - want).abs().max() < 1e-5


def test_encoders_without_a_stream_get_bands_that_are_worth_their_halo(monkeypatch):
    ours = model("rdn")
    monkeypatch.delattr(type(ours.encoder), "stream")
    monkeypatch.setattr(infer, "BAND_PIXELS", 200)
    monkeypatch.setattr(infer, "STRIP_PIXELS", 400)
    seen, forward = [], ours.encoder.forward
    ours.encoder.forward = lambda lr: (seen.append(lr.shape[-2]), forward(lr))[1]
    lr = torch.rand(1, 3, 200, 50)
    with torch.no_grad():
        want = ours(lr, scale=2)
    seen.clear()
    assert (infer.run(ours, lr, (400, 100)) - want).abs().max() < 1e-5
    assert len(seen) > 1 and sum(seen) < 2 * 200


@pytest.mark.parametrize("name", ENCODERS)
def test_saved_and_loaded(name, tmp_path):
    ours, lr = model(name), torch.rand(3, 9, 10)
    save_model(tmp_path, ours)
    again = gsr.load(tmp_path)
    assert again.config == ours.config
    want = gsr.upscale(lr, 2.5, model=ours)
    assert torch.equal(gsr.upscale(lr, 2.5, model=again), want)
    assert want.shape == (3, 22, 25)


@pytest.mark.parametrize(
    "section, sentence",
    [
        ({"name": "rcan"}, "name must be one of edsr, span, rdn, swinir"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"growth": 0}, "growth must be at least 1"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"heads": 7}, "heads must be a divisor of dim"),
        ({"heads": 0}, "heads must be a divisor of dim"),
        ({"window": 7}, "window must be a multiple of 2"),
        ({"depths": []}, "depths must be at least 1 long"),
        ({"depths": [6, 0]}, r"depths\[1\] must be at least 1"),
    ],
)
def test_configs_that_are_refused(section, sentence):
    with pytest.raises(InputError, match=sentence):
        from_dict(EncoderConfig, section)
