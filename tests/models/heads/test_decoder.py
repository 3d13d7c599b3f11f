"""The Fourier decoder: its fast paths against the plain formula in float64."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from gsr.config import DecoderConfig
from gsr.models.heads import decoder, fourier
from gsr.models.heads.bicubic import BicubicEncoded
from gsr.models.heads.decoder import FourierDecoder, affine, bicubic_neighbours, neighbourhoods
from gsr.models.heads.fourier import FourierHead

LOOPS = decoder._loops()
needs_loops = pytest.mark.skipif(LOOPS is None, reason="Numba does not run")


def make(channels=12, width=64, layers=(64, 64)):
    torch.manual_seed(0)
    made = FourierDecoder(channels, DecoderConfig(hidden_dim=width, hidden_list=list(layers)))
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.mul_(3 if "phase" in name else 1.5 if "weight" in name else 1)
    return made


def plain(dec, features, lr_size):
    """The published formula for a whole image, in float64: no strips, nothing merged."""
    p = {name: t.double() for name, t in dec.state_dict(keep_vars=True).items()}
    splatted, tall = (part.double() for part in features)
    rest = F.interpolate(tall, splatted.shape[-2:], mode="bicubic", align_corners=False)
    x = torch.cat([splatted, rest], dim=1)
    size = x.shape[-2:]
    coef, freq = (
        F.conv2d(x, p[f"{n}.weight"], p[f"{n}.bias"], padding=1) for n in ("coef", "freq")
    )
    away = []
    for n, n_hr in zip(lr_size, size, strict=True):
        hr = (2 * torch.arange(n_hr, dtype=torch.float64) + 1) / n_hr - 1
        lr = (2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1
        nearest = decoder.nearest(decoder.pixel_centres(n_hr), n)  # float32 decides ties
        away.append((hr - lr[nearest]) * n)
    cell = torch.tensor([2 / n_hr * n for n, n_hr in zip(lr_size, size, strict=True)]).double()
    phase = freq[:, 0::2] * away[0][:, None] + freq[:, 1::2] * away[1]
    phase = math.pi * (phase + (p["phase.weight"] @ cell)[:, None, None])
    y = (coef * torch.cat([phase.cos(), phase.sin()], dim=1)).permute(0, 2, 3, 1)
    for i in range(0, len(dec.layers) - 1, 2):
        y = F.gelu(F.linear(y, p[f"layers.{i}.weight"], p[f"layers.{i}.bias"]))
    last = len(dec.layers) - 1
    y = F.linear(y, p[f"layers.{last}.weight"], p[f"layers.{last}.bias"])
    return y.permute(0, 3, 1, 2) * 0.5 + 0.5


def drawn(b, lr_size, size, grad=False):
    """Splatted channels, and others that are still to be resized along the rows."""
    widths = (4, size[1]), (8, lr_size[1])
    return [torch.randn(b, c, size[0], w, requires_grad=grad) for c, w in widths]


class Given(FourierHead):
    """A head whose features at HR are given."""

    def __init__(self, dec, features):
        super().__init__()
        self.decoder, self.features, self.channels = dec, features, features[0].shape[1]

    def strip_features(self, encoded, splat, rows, *, size, band):
        return [part[:, :, slice(*rows)] for part in self.features]


def render(dec, features, lr_size, dtype=torch.float32, head=Given):
    size, lr = features[0].shape[-2:], torch.empty(len(features[0]), 12, *lr_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return head(dec, features).render(BicubicEncoded(lr, lr[:, :0]), tuple(size))


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


SIZES = [
    ((3, 4), (9, 12)),
    ((5, 7), (5, 7)),
    ((6, 5), (13, 31)),
    ((9, 9), (4, 6)),
    ((1, 1), (1, 3)),
]


@pytest.mark.parametrize("lr_size, size", SIZES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("loops", [False, True])
def test_render_is_the_formula(lr_size, size, grad, loops, monkeypatch):
    if not loops:
        monkeypatch.setattr(decoder, "_loops", lambda: None)
    monkeypatch.setattr(fourier, "STRIP", 3 * 2 * size[1])
    dec, features = make(), drawn(2, lr_size, size)
    want = plain(dec, features, lr_size)
    assert want.std() > 0.02
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(
            render(dec, features, lr_size), want.float(), atol=2e-6, rtol=1e-5
        )


@pytest.mark.parametrize("loops", [False, True])
def test_gradients_are_those_of_the_formula(loops, monkeypatch):
    if not loops:
        monkeypatch.setattr(decoder, "_loops", lambda: None)
    dec, features = make(), drawn(2, (6, 5), (13, 31), grad=True)
    weight, grads = torch.randn(2, 3, 13, 31), []
    for out in (render(dec, features, (6, 5)), plain(dec, features, (6, 5))):
        dec.zero_grad()
        for part in features:
            part.grad = None
        (out * weight).sum().backward()
        grads.append([p.grad.clone() for p in (*features, *dec.parameters())])
    assert all(want.abs().max() > 0 for want in grads[1])
    for got, want in zip(*grads, strict=True):
        assert distance(got, want) < 1e-5


def test_bfloat16_is_as_near_as_its_numbers_allow():
    """Eight layers whose every number is rounded by at most 2^-9 of it."""
    dec, features = make(width=256, layers=[256] * 4), drawn(1, (6, 10), (24, 30))
    want = plain(dec, features, (6, 10)) - 0.5
    outs = []
    for loops in (True, False):
        for grad in (False, True):
            with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(grad):
                if not loops:
                    patch.setattr(decoder, "_loops", lambda: None)
                out = render(dec, features, (6, 10), torch.bfloat16)
            assert out.dtype == torch.float32
            assert 1e-4 < distance(out - 0.5, want) < 2**-6
            outs.append(out.detach())
    assert all(distance(out, outs[0]) < 2**-7 for out in outs)
    assert distance(render(dec, features, (6, 10)) - 0.5, want) < 1e-5


def test_render_is_repeatable_and_leaves_its_input_alone():
    dec, features = make(), drawn(1, (10, 20), (40, 50))
    before = [part.clone() for part in features]
    with torch.inference_mode():
        first = render(dec, features, (10, 20))
        assert torch.equal(render(dec, features, (10, 20)), first)
    assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))


@pytest.mark.parametrize("channels", [3, 64, 200])
def test_affine_is_a_linear_layer(channels):
    x, w, b = torch.randn(2, 5, 7, channels), torch.randn(9, channels), torch.randn(9)
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    g = torch.randn(2, 5, 7, 9)
    got, want = affine(x, w, b), F.linear(x.double(), w.double(), b.double())
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-5)
    for a, c in zip(
        torch.autograd.grad(got, (x, w, b), g),
        torch.autograd.grad(want, (x, w, b), g.double()),
        strict=True,
    ):
        assert distance(a, c) < 1e-6


@pytest.mark.parametrize("inference", [True, False])
def test_an_image_on_two_threads(monkeypatch, inference):
    """Equal to one thread's; how many there are and who records gradients is as before."""
    monkeypatch.setattr(fourier, "STRIP", 40)
    monkeypatch.setattr(fourier, "AT_ONCE", 2)
    dec, before = FourierDecoder(12, DecoderConfig(16, (8,))), torch.get_num_threads()
    features, out, seen = drawn(1, (7, 5), (21, 20)), {}, set()
    rgb = FourierDecoder.rgb

    both = threading.Barrier(2, timeout=10)

    def note(*args, **options):
        if threading.get_ident() not in seen and threading.current_thread().name != "MainThread":
            seen.add(threading.get_ident())
            both.wait()  # neither may do all of it
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == inference
        return rgb(*args, **options)

    monkeypatch.setattr(FourierDecoder, "rgb", note)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode(inference), torch.no_grad():
                out[threads] = render(dec, features, (7, 5))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out[2], out[1], atol=1e-6, rtol=0)
    assert len(seen) == 2


def test_a_failure_on_another_thread_is_raised():
    class Fails(Given):
        def strip_features(self, *args, **options):
            raise MemoryError("no more")

    dec = FourierDecoder(12, DecoderConfig(16, (8,)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), pytest.raises(MemoryError, match="no more"):
            render(dec, drawn(1, (4, 4), (8, 8)), (4, 4), head=Fails)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:  # PyTorch's number for threads that start from now on
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


@needs_loops
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_waves(scale):
    """Frequencies far beyond one turn, where taking turns off must not lose digits."""
    both = torch.randn(300, 512) * torch.cat([torch.ones(256), torch.full((256,), float(scale))])
    ry, rx, phase = torch.rand(300) * 2 - 1, torch.rand(300) * 2 - 1, torch.randn(128)
    got = LOOPS.modulate(both, ry, rx, phase=phase, dtype=torch.float32).double()
    coef, fy, fx = both.double().split([256, 128, 128], dim=1)
    t = math.pi * (fy * ry[:, None] + fx * rx[:, None] + phase)
    want = coef * torch.cat([t.cos(), t.sin()], dim=1)
    size = (fy * ry[:, None]).abs() + (fx * rx[:, None]).abs() + phase.abs() + 1  # half turns
    bound = 2**-22 * math.pi * coef.abs() * size.repeat(1, 2)
    assert ((got - want).abs() < bound).all()
    # Whole and half turns are exact.
    turns = torch.zeros(1, 8)
    turns[0, :4], turns[0, 4:6] = 1, torch.tensor([float(int(scale)), int(scale) + 1.0])
    one = torch.ones(1)
    half = LOOPS.modulate(turns, one, one, phase=torch.tensor([0.0, 0.5]), dtype=torch.float32)
    assert half[0, 0].abs() == 1 and half[0, 2].abs() == 0 and half[0, 3].abs() > 1 - 2e-7


@needs_loops
def test_waves_in_bfloat16_round_to_the_nearest():
    both = torch.randn(40, 64)
    ry, rx, phase = torch.rand(40), torch.rand(40), torch.randn(16)
    got = LOOPS.modulate(both, ry, rx, phase=phase, dtype=torch.bfloat16)
    want = LOOPS.modulate(both, ry, rx, phase=phase, dtype=torch.float32).bfloat16()
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


@needs_loops
def test_threads_do_not_matter():
    torch.manual_seed(0)
    n, before = 20_000, torch.get_num_threads()
    both = torch.randn(n, 8, requires_grad=True)
    phase, r = torch.randn(2, requires_grad=True), torch.rand(n)
    features = torch.randn(3, 7, 9, 11, requires_grad=True)
    splatted = torch.randn(3, 2000, 9, 2, requires_grad=True)
    row, column = torch.randint(20, (2, 3, 2000))
    leaves, results = (both, phase, features, splatted), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            waves = LOOPS.modulate(both, r, r.flip(0), phase=phase, dtype=torch.float32)
            near = LOOPS.neighbourhoods(features, splatted, y=row, x=column, size=(20, 20))
            for leaf in leaves:
                leaf.grad = None
            (waves.square().sum() + near.square().sum()).backward()
            results.append([waves, near, *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    coef, fy, fx = both.detach().double().split([4, 2, 2], dim=1)
    t = fy * r[:, None] + fx * r.flip(0)[:, None] + phase.detach()
    a, b = coef.split(2, dim=1)
    want = (math.pi * (b * b - a * a) * (2 * math.pi * t).sin()).sum(0)
    torch.testing.assert_close(phase.grad.double(), want, atol=1e-2, rtol=1e-5)


@needs_loops
@pytest.mark.parametrize("size", [(1, 1), (4, 30), (9, 11), (13, 17), (22, 28), (60, 35)])
def test_neighbourhoods(size):
    """Against the form without Numba, which test_field.py compares with resizing."""
    g = torch.Generator().manual_seed(0)
    index = torch.arange(size[0] * size[1])[torch.randint(size[0] * size[1], (2, 50), generator=g)]
    row, column = index // size[1], index % size[1]
    features = torch.randn(2, 7, 9, 11, generator=g, requires_grad=True)
    splatted = torch.randn(2, 50, 9, 3, generator=g, requires_grad=True)
    weight, results = torch.randn(2, 50, 9, 7, generator=g), []
    for loops in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not loops:
                patch.setattr(decoder, "_loops", lambda: None)
            out = neighbourhoods(features, splatted, y=row, x=column, size=size)
        results.append(
            [out.detach(), *torch.autograd.grad((out * weight).sum(), (features, splatted))]
        )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert bicubic_neighbours(features[:, 3:], row, column, size=size).shape == (2, 50, 9, 4)


@needs_loops
def test_gradient_of_neighbourhoods_by_differences():
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    splatted = torch.randn(2, 3, 9, 1, dtype=torch.float64, requires_grad=True)
    row, column = torch.tensor([[0, 3, 5], [2, 2, 4]]), torch.tensor([[0, 5, 6], [1, 1, 0]])
    assert torch.autograd.gradcheck(
        lambda f, s: neighbourhoods(f, s, y=row, x=column, size=(6, 7)), (x, splatted)
    )


def test_coordinates_may_take_gradients():
    dec = make()
    waves, r = torch.randn(5, 128), torch.zeros(5, 1, requires_grad=True)
    dec.rgb(waves, r, r, cell=torch.ones(2)).sum().backward()
    assert r.grad.abs().min() > 0
