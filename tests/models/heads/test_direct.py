"""The `direct` head: its start, its windows, and that it depends on nothing it should not."""

import pytest
import torch
import torch.nn.functional as F

from gsr.config import DirectConfig, EncoderConfig, ModelConfig
from gsr.data.patches import pixel_coords
from gsr.errors import InputError
from gsr.models import GaussianSR


def make(seed=0, spread=0.3, **direct):
    """A small model whose Gaussians have colours, unlike at the start of a training."""
    torch.manual_seed(seed)
    config = ModelConfig(
        encoder=EncoderConfig(n_feats=8, n_blocks=1), direct=DirectConfig(width=8, **direct)
    )
    model = GaussianSR(config).eval()
    torch.nn.init.normal_(model.head.out.weight, std=spread)
    return model


@pytest.fixture
def model():
    return make()


def image(h=9, w=11, b=1, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def test_starts_as_bicubic():
    model = GaussianSR(ModelConfig(encoder=EncoderConfig(n_feats=8, n_blocks=1)))
    lr = image()
    expected = F.interpolate(lr, (30, 41), mode="bicubic")
    torch.testing.assert_close(model(lr, size=(30, 41)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("k, radius", [(1, 1), (4, 1), (9, 2), (5, 3)])
@pytest.mark.parametrize("size", [(9, 11), (31, 25), (20, 60)])
def test_queries_are_pixels_of_the_image(k, radius, size):
    model = make(gaussians=k, radius=radius)
    lr = image(b=2)
    whole = model(lr, size=size)
    coord = pixel_coords(torch.arange(size[0] * size[1]), size).expand(2, -1, -1)
    at = model(lr, size=size, coord=coord)
    assert (whole - F.interpolate(lr, size, mode="bicubic")).abs().max() > 0.05
    torch.testing.assert_close(at.mT.reshape(whole.shape), whole, atol=1e-5, rtol=0)


def test_rows(model):
    encoded = model.encode(image())
    whole = model.render(encoded, (40, 33))
    torch.testing.assert_close(
        model.render(encoded, (40, 33), rows=(13, 22)), whole[:, :, 13:22], atol=1e-5, rtol=0
    )


def test_one_image_does_not_see_the_other(model):
    lr = image(b=3)
    both = model(lr, scale=2.5)
    torch.testing.assert_close(model(lr[1:2], scale=2.5), both[1:2], atol=1e-6, rtol=0)


def test_shift_by_one_pixel(model):
    """Moving the LR image by one pixel moves the result by `scale` pixels."""
    lr = image(24, 24)
    far = 3 * (model.halo + model.head.radius + 2)
    a, b = model(lr, scale=3)[..., 3:], model(lr[..., 1:], scale=3)
    inner = (..., slice(far, -far), slice(far, -far))
    assert a[inner].numel() > 100
    torch.testing.assert_close(a[inner], b[inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("radius", [1, 2])
def test_no_seams_where_windows_change(radius, normalize):
    """Across the line where the set of nearest pixels changes, the splat moves by little.

    Opaque Gaussians of the widest kind, pushed to that line as far as the head can.
    """
    head = make(radius=radius, normalize=normalize).head
    from gsr.ops import splat_at

    g = torch.Generator().manual_seed(0)
    shape = (1, 4, 9, 9)
    widest = torch.full((1, 4, 2, 9, 9), head.sigma_range[1])
    colour = torch.rand(1, 4, 3, 9, 9, generator=g) * 2 - 1
    offset = head.reach * (torch.rand(1, 4, 2, 9, 9, generator=g) * 2 - 1)
    y = torch.linspace(3, 5, 9)
    sides = [
        splat_at(
            colour, widest, torch.zeros(shape), torch.ones(shape),
            torch.stack([y, torch.full_like(y, 4.5 + side)], -1)[None], offset,
            radius, normalize, head.eps,
        )
        for side in (-1e-5, 1e-5)
    ]  # fmt: skip
    assert (sides[0] - sides[1]).abs().max() < 0.05
    assert sides[0].abs().max() > 0.1


def test_any_size_from_one_encoding(model):
    lr = image()
    encoded = model.encode(lr)
    for size in [(9, 11), (10, 50), (33, 12)]:
        torch.testing.assert_close(model.render(encoded, size), model(lr, size=size))


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), (2, 0), (1, 2, 3)])
def test_bad_scale(model, bad):
    with pytest.raises(InputError, match="scale"):
        model(image(), scale=bad)


def test_bad_size(model):
    with pytest.raises(InputError, match="size"):
        model(image(), size=(0, 5))
    with pytest.raises(InputError, match="size"):
        model(image())


def test_every_parameter_learns(model):
    lr = image(b=2)
    coord = pixel_coords(torch.arange(0, 400, 7), (20, 20)).expand(2, -1, -1)
    model(lr, size=(20, 20), coord=coord).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    # colour, sigma, offset, rho and opacity of every Gaussian are channels of one convolution
    channels = model.head.out.weight.grad.abs().amax(dim=(1, 2, 3))
    assert (channels > 0).all()


def test_each_property_of_a_gaussian_is_used(model):
    encoded = model.encode(image())
    whole = model.render(encoded, (20, 20))
    for name in encoded._fields:
        other = encoded._replace(**{name: getattr(encoded, name) * 0.9})
        assert (model.render(other, (20, 20)) - whole).abs().max() > 1e-4, name


@pytest.mark.parametrize("activation, alive", [("leaky_relu", True), ("relu", False)])
def test_hidden_channels_that_are_all_negative_can_recover(activation, alive):
    """With leaky ReLU a gradient still reaches the encoder, and the image depends on it."""
    model = make(activation=activation)
    torch.nn.init.constant_(model.head.hidden.bias, -100.0)
    (model(image(), scale=2) - 0.5).square().mean().backward()
    assert bool(model.encoder.head[0].weight.grad.any()) == alive
    assert bool(model.head.hidden.weight.grad.any()) == alive
