"""The `official` head: the published code's golden values, and what the goldens do not cover."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gsr.config import BankConfig, DecoderConfig, EncoderConfig, ModelConfig
from gsr.data.patches import pixel_coords
from gsr.errors import InputError
from gsr.models import GaussianSR
from gsr.models.heads import fourier
from gsr.models.heads.official import shared_splat, window_kernels, window_side
from gsr.models.published import load_published

GOLDENS = Path(__file__).parents[2] / "data" / "goldens"
with safe_open(GOLDENS / "cases.safetensors", "pt") as _file:
    CASES = json.loads(_file.metadata()["cases"])
    TENSORS = {name: _file.get_tensor(name) for name in _file.keys()}


@pytest.fixture
def published():
    return load_published(GOLDENS / "official.pth")


def make(seed=0, **bank):
    """A small model whose Gaussians and decoder all matter."""
    torch.manual_seed(seed)
    config = ModelConfig(
        mode="official",
        encoder=EncoderConfig(n_feats=12, n_blocks=1),
        bank=BankConfig(points=9, channels=4, **bank),
        decoder=DecoderConfig(hidden_dim=16, hidden_list=[16, 16]),
    )
    model = GaussianSR(config).eval()
    with torch.no_grad():
        model.encoder.body[-1].weight.mul_(3)
        model.head.classifier.weight.mul_(20)
        model.head.bank.rho.uniform_(-0.8, 0.8)
        model.head.bank.opacity.uniform_(0.2, 1)
        for name, p in model.head.decoder.named_parameters():
            p.mul_(1.5 if "weight" in name else 1)
    return model


def image(h=9, w=11, b=1, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("case", [c for c in CASES if c != "train"])
def test_golden_images(published, case):
    scale, golden = (
        CASES[case]["scale"],
        {k.removeprefix(f"{case}."): v for k, v in TENSORS.items() if k.startswith(f"{case}.")},
    )
    published.head.config.assignment = CASES[case]["assignment"]
    size = golden["output"].shape[-2:]
    with torch.no_grad():
        encoded = published.encode(golden["input"] / 2 + 0.5)
        splat = published.head.prepare(encoded, (scale, scale))
        splatted = published.head.splat_rows(splat, (0, size[0]), size=size)
        output = published.render(encoded, size, scale)
    close(encoded.features, golden["features"])
    close(splatted, golden["splatted"])
    close(output * 2 - 1, golden["output"])


def test_golden_training_step(published):
    golden = {k.removeprefix("train."): v for k, v in TENSORS.items() if k.startswith("train.")}
    published.train().head.config.train_assignment = "softmax"
    side = round(CASES["train"]["height"] * CASES["train"]["scale"])
    optimizer = torch.optim.Adam(published.parameters(), lr=1e-4)
    output = published(
        golden["input"] / 2 + 0.5, (side, side), CASES["train"]["scale"], golden["coord"]
    )
    close(output * 2 - 1, golden["output"])
    loss = (output * 2 - 1 - golden["target"]).abs().mean()
    close(loss.reshape(1), golden["loss"])
    loss.backward()

    bank, dec = published.head.bank, published.head.decoder
    ours = {
        "coef.bias": dec.coef.bias,
        "coef.weight": dec.coef.weight,
        "freq.bias": dec.freq.bias,
        "freq.weight": dec.freq.weight,
        "phase.weight": dec.phase.weight,
        "dec.layers.0.bias": dec.layers[0].bias,
        "dec.layers.0.weight": dec.layers[0].weight,
        "dec.layers.8.bias": dec.layers[8].bias,
        "dec.layers.8.weight": dec.layers[8].weight,
        "encoder.edsr.head.0.bias": published.encoder.head[0].bias,
        "encoder.edsr.head.0.weight": published.encoder.head[0].weight,
        "encoder.segmentation_head.0.bias": published.head.classifier.bias,
        "encoder.segmentation_head.0.weight": published.head.classifier.weight,
        "opacity": bank.opacity,
        "rho": bank.rho,
        "sigma_x": bank.sigma_x,
        "sigma_y": bank.sigma_y,
    }
    assert {f"grad.{k}" for k in ours} == {k for k in golden if k.startswith("grad.")}
    for name, parameter in ours.items():
        want = golden[f"grad.{name}"]
        error = (parameter.grad - want).norm() / want.norm()
        assert error < 1e-4, f"{name}: {error}"
    optimizer.step()
    close(bank.sigma_x.detach(), golden["after_adam.sigma_x"], atol=1e-6)


def splat_by_loops(features, gaussians, scale, window, taps):
    """Section 4 of the published code's description, tap by tap, without the final resize."""
    b, c, h, w = features.shape
    ky, kx = round(window * scale[0]), round(window * scale[1])
    cut = gaussians.view(b, 4, h // window, window, w // window, window).mean(dim=(0, 2, 4))
    out = torch.zeros(b, c, h // window * ky, w // window * kx, dtype=features.dtype)

    def hat(t):
        return max(0.0, 1 - abs(t))

    for y in range(window):
        for x in range(window):
            sx, sy, opacity, rho = cut[:, y, x].tolist()
            cov = torch.tensor(
                [[sx**2 + 1e-5, rho * sx * sy], [rho * sx * sy, sy**2 + 1e-5]], dtype=torch.float64
            )
            inverse = torch.linalg.inv(cov)
            u = [-5 + 10 / (taps - 1) * a for a in range(taps)]
            g = torch.zeros(taps, taps, dtype=torch.float64)
            for i in range(taps):
                for j in range(taps):
                    d = torch.tensor([u[i], u[j]], dtype=torch.float64)
                    g[i, j] = math.exp(-0.5 * (d @ inverse @ d).item())
            g /= g.max()
            for row in range(ky):
                for col in range(kx):
                    p = row + (1 - 2 * y / window) * (ky - 1) / 2 - (ky - taps) // 2
                    q = col + (1 - 2 * x / window) * (kx - 1) / 2 - (kx - taps) // 2
                    weight = opacity * sum(
                        g[i, j].item() * hat(p - i) * hat(q - j)
                        for i in range(taps)
                        for j in range(taps)
                    )
                    out[:, :, row::ky, col::kx] += weight * features[:, :, y::window, x::window]
    return out.clamp(0, 1)


@pytest.mark.parametrize(
    "window, taps, scale", [(7, 5, (1.2, 2.1)), (3, 3, (4.0, 1.6)), (4, 4, (1.0, 3.0))]
)
def test_splat_of_other_windows_and_unequal_scales(window, taps, scale):
    g = torch.Generator().manual_seed(1)
    features = torch.rand(2, 3, 2 * window, 3 * window, generator=g, dtype=torch.float64)
    gaussians = torch.rand(2, 4, 2 * window, 3 * window, generator=g, dtype=torch.float64)
    gaussians[:, :2] = gaussians[:, :2] * 3 + 0.5
    gaussians[:, 0] += 2  # so that rows and columns differ
    gaussians[:, 3] += 0.3
    want = splat_by_loops(features, gaussians, scale, window, taps)
    assert (want > 0).any() and (want < 1).any()
    kernels, side = window_kernels(gaussians, window, taps), window_side(scale, window, taps)
    close(shared_splat(features, kernels, side, want.shape[-2:]), want, atol=1e-9)


def test_weights_stay_finite_where_rho_exceeds_one():
    gaussians = torch.ones(1, 4, 7, 7)
    gaussians[:, 0], gaussians[:, 3] = 0.3, 1.5
    kernels = window_kernels(gaussians)
    assert kernels.isfinite().all() and kernels.max() <= 1


@pytest.mark.parametrize("rows", [(0, 1), (0, 20), (13, 14), (17, 40), (39, 40), (0, 40)])
def test_rows_are_rows_of_the_image(rows):
    model, size = make(), (40, 33)
    encoded = model.encode(image(b=2))
    whole = model.render(encoded, size, (4.4, 3))
    assert whole.std() > 0.02
    close(model.render(encoded, size, (4.4, 3), rows=rows), whole[:, :, slice(*rows)])


@pytest.mark.parametrize("size", [(7, 9), (31, 25), (36, 44)])
def test_splat_by_rows(size):
    g = torch.Generator().manual_seed(1)
    features, kernels = torch.rand(1, 2, 14, 21, generator=g), torch.rand(49, 5, 5, generator=g)
    kernels, side = kernels / 25, (12, 15)
    whole = shared_splat(features, kernels, side, size)
    want = torch.nn.functional.interpolate(
        shared_splat(features, kernels, side, (24, 45)), size, mode="bicubic"
    )
    close(whole, want)
    for first in range(size[0]):
        last = min(size[0], first + 1 + first % 3)
        part = shared_splat(features, kernels, side, size, rows=(first, last))
        close(part, whole[:, :, first:last])


def test_strips_of_any_height_agree(monkeypatch):
    model, size = make(), (25, 30)
    encoded = model.encode(image())
    whole = model.render(encoded, size)
    for pixels in (1, 70, 300):
        monkeypatch.setattr(fourier, "STRIP", pixels)
        close(model.render(encoded, size), whole)


# x1.5 and x2.5 put HR pixels midway between LR pixels.
@pytest.mark.parametrize("size", [(8, 9), (9, 11), (14, 17), (22, 28), (36, 44), (20, 60)])
def test_queries_are_pixels_of_the_image(size, monkeypatch):
    model, lr = make(), image(b=2)
    with torch.no_grad():
        whole = model(lr, size=size)
        coord = pixel_coords(torch.arange(size[0] * size[1]), size).expand(2, -1, -1)
        at = model(lr, size=size, coord=coord)
        close(at.mT.reshape(whole.shape), whole)
        few = torch.randperm(size[0] * size[1])[:7]
        close(model(lr, size=size, coord=coord[:, few]), at[:, few])
        monkeypatch.setattr(fourier, "QUERIES", 5)  # an image at a time
        close(model(lr, size=size, coord=coord[:, few]), at[:, few])


def test_queries_do_not_depend_on_how_their_coordinates_are_rounded():
    model, lr, size = make(), image(10, 10), (15, 25)
    coord = pixel_coords(torch.arange(15 * 25), size)[None]
    y, x = ((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in size)
    other = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(1, -1, 2)
    assert not torch.equal(other.float(), coord)
    close(model(lr, size=size, coord=other), model(lr, size=size, coord=coord))
    nudged = model(lr, size=size, coord=coord + 2e-7)
    close(nudged, model(lr, size=size, coord=coord))


def test_between_pixels_the_waves_go_on():
    """coef and freq are the nearest HR pixel's, the relative coordinate is the query's own."""
    model, lr, size = make(), image(), (27, 33)
    pixel = pixel_coords(torch.tensor([200]), size)[None]
    here, near, next_pixel = (model(lr, size=size, coord=pixel + step / 33) for step in (0, 0.5, 2))
    assert 1e-4 < (near - here).abs().max() < (next_pixel - here).abs().max()


def test_evaluation_is_deterministic_unless_gumbel():
    model, lr = make(), image()
    assert torch.equal(model(lr, scale=2), model(lr, scale=2))
    model.head.config.assignment = "gumbel"
    model.head.classifier.weight.data.zero_()
    torch.manual_seed(1)
    first = model(lr, scale=2)
    assert not torch.equal(model(lr, scale=2), first)
    torch.manual_seed(1)
    assert torch.equal(model(lr, scale=2), first)


def test_the_batch_matters_as_published():
    model, lr = make(), image(b=2)
    alone = torch.cat([model(lr[i : i + 1], scale=2) for i in (0, 1)])
    assert (model(lr, scale=2) - alone).abs().max() > 1e-3


def test_gradients_reach_every_parameter():
    model = make().train()
    coord = pixel_coords(torch.arange(0, 600, 7), (27, 33)).expand(2, -1, -1)
    model(image(b=2), size=(27, 33), coord=coord).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_encoded_tensors_can_be_cut_and_joined():
    model, lr = make(), image(16, 20)
    parts = [model.encode(lr[..., :14]), model.encode(lr[..., 4:])]  # halo 5
    joined = type(parts[0])(
        *(torch.cat([a[..., :9], b[..., 5:]], dim=-1) for a, b in zip(*parts, strict=True))
    )
    close(model.render(joined, (40, 50)), model(lr, size=(40, 50)))


@pytest.mark.parametrize("scale", [0.64, (2.0, 0.5), (0.5, 2.0)])
def test_scales_too_small_for_the_kernel_are_refused(scale):
    with pytest.raises(InputError, match="scale above 0.643"):
        make()(image(20, 20), scale=scale)


def test_least_scale():
    assert make()(image(20, 20), scale=0.65).isfinite().all()


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("bank", "points", 99),
        ("bank", "points", 0),
        ("bank", "points", -4),
        ("bank", "channels", 0),
        ("bank", "channels", 12),
        ("bank", "window", 0),
        ("bank", "window", 8),
        ("bank", "kernel_size", 1),
        ("encoder", "n_feats", 10**7),
        ("decoder", "hidden_dim", 15),
        ("decoder", "hidden_dim", 0),
        ("decoder", "hidden_list", [16, 0]),
    ],
)
def test_impossible_configurations_are_refused(section, key, value):
    config = ModelConfig(mode="official", encoder=EncoderConfig(n_feats=12, n_blocks=1))
    setattr(getattr(config, section), key, value)
    with pytest.raises(InputError, match=f"{section}.{key}"):
        GaussianSR(config)
