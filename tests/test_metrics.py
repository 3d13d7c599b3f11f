"""Metrics against values worked out by hand and by scikit-image."""

import math
import os
import sys
import types

import numpy as np
import pytest
import torch

from gsr.errors import InputError
from gsr.metrics import PROTOCOLS, benchmark, div2k, luma, perceptual, psnr, psnr_y, ssim


def images(channels=3, size=(20, 24)):
    generator = torch.Generator().manual_seed(0)
    hr = torch.rand(1, channels, *size, generator=generator)
    return (hr + 0.1 * torch.randn(hr.shape, generator=generator)).clamp(0, 1), hr


def test_psnr_of_a_constant_difference():
    hr = torch.full((1, 3, 8, 9), 0.5)
    assert psnr(hr + 0.1, hr) == pytest.approx(20, abs=1e-5)  # -20 log10(0.1)
    sr = hr.clone()
    sr[:, 0] += 0.1  # a third of the squared error
    assert psnr(sr, hr) == pytest.approx(20 + 10 * math.log10(3), abs=1e-5)
    assert psnr(hr, hr) == math.inf


@pytest.mark.parametrize("channel, weight", list(enumerate([65.738, 129.057, 25.064])))
def test_psnr_y_weighs_the_channels(channel, weight):
    hr = torch.full((1, 3, 8, 9), 0.5)
    sr = hr.clone()
    sr[:, channel] += 0.1
    assert psnr_y(sr, hr) == pytest.approx(-20 * math.log10(0.1 * weight / 256), abs=1e-5)


def test_grey_read_as_rgb_counts_more_than_one_channel():
    sr, hr = images(channels=1)
    assert psnr_y(sr, hr) == psnr(sr, hr)
    as_rgb = psnr_y(sr.expand(-1, 3, -1, -1), hr.expand(-1, 3, -1, -1))
    assert as_rgb - psnr_y(sr, hr) == pytest.approx(1.3219, abs=1e-4)  # -20 log10(219.859 / 256)


@pytest.mark.parametrize("metric", [psnr, psnr_y, ssim])
def test_shave_leaves_the_border_out(metric):
    sr, hr = images()
    inside = (..., slice(3, -3), slice(3, -3))
    assert metric(sr, hr, 3) == metric(sr[inside], hr[inside])
    assert metric(sr, hr, 3) != metric(sr, hr)
    sr[..., :3, :], sr[..., -1] = 0, 1
    assert metric(sr, hr, 3) == metric(sr[inside], hr[inside])


def test_luma_range():
    white = torch.ones(3, 1, 1, dtype=torch.float64)
    assert luma(white).item() == pytest.approx(16 + 219, abs=0.01)
    assert luma(white * 0).item() == 16


def test_ssim_equals_scikit_image():
    # structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=255) of scikit-image 0.26 gives 0.9621484049154313 for these. On four upscaled
    # benchmark images the two agreed to 1e-15.
    y, x = np.mgrid[0:20, 0:24]
    a = (y * 7 + x * 5) % 256.0
    b = (y * 7 + x * 5 + (y * x) % 13) % 256.0
    a, b = (torch.from_numpy(p)[None, None] / 255 for p in (a, b))
    assert ssim(a, b) == pytest.approx(0.9621484049154313, abs=1e-12)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_ssim_is_of_luma():
    sr, hr = (p.double() for p in images())
    assert ssim(sr, hr) == pytest.approx(ssim(luma(sr) / 255, luma(hr) / 255), abs=1e-12)
    assert ssim(sr, hr) != pytest.approx(ssim(sr[:, 1:2], hr[:, 1:2]), abs=1e-3)


def test_protocols():
    assert PROTOCOLS == {"benchmark": benchmark, "div2k": div2k}
    assert [benchmark.shave(s) for s in (2, 3.7, 4)] == [2, 4, 4]
    assert [div2k.shave(s) for s in (2, 3.7, 4)] == [8, 10, 10]
    sr, hr = images(size=(40, 42))
    assert benchmark(sr, hr, 3) == psnr_y(sr, hr, 3)
    assert div2k(sr, hr, 3) == psnr(sr, hr, 9)


@pytest.mark.parametrize(
    "shape, other, shave, part",
    [
        ((3, 20, 20), (3, 20, 21), 0, "one size"),
        ((2, 20, 20), (2, 20, 20), 0, "[2, 20, 20]"),
        ((20, 20), (20, 20), 0, "[20, 20]"),
        ((3, 20, 20), (3, 20, 20), 10, "after shaving 10"),
        ((3, 20, 20), (3, 20, 20), -1, "-1"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, psnr_y, ssim])
def test_refuses(metric, shape, other, shave, part):
    with pytest.raises(InputError) as error:
        metric(torch.rand(shape), torch.rand(other), shave)
    assert part in str(error.value)


def test_refuses_bytes_and_small_images():
    with pytest.raises(InputError, match="divide by 255"):
        psnr(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match="11 x 11"):
        ssim(torch.rand(3, 14, 20), torch.rand(3, 14, 20), 2)


# ---- perceptual, with a stand-in for piq --------------------------------------------------------


@pytest.fixture
def piq(monkeypatch, tmp_path):
    """A package piq of two networks that see what they are given, and files for their weights."""
    seen = []

    def network(factor):
        def distance(sr, hr):
            seen.append((sr, hr))
            return factor * (sr - hr).abs().mean()

        return lambda: distance

    module = types.SimpleNamespace(LPIPS=network(1), DISTS=network(2), seen=seen)
    monkeypatch.setitem(sys.modules, "piq", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    module.weights = tmp_path / "hub/checkpoints"
    module.weights.mkdir(parents=True)
    for name in ("lpips_weights.pt", "dists_weights.pt", "vgg16-397923af.pth"):
        (module.weights / name).touch()
    return module


@pytest.mark.parametrize("name, factor", [("lpips", 1), ("dists", 2)])
def test_perceptual_gives_shaved_rgb_to_the_network(piq, name, factor):
    sr, hr = images(size=(40, 44))
    measured = perceptual(name)(sr, hr, 3)
    (x, y), inside = piq.seen[0], (..., slice(3, -3), slice(3, -3))
    assert torch.equal(x, sr[inside]) and torch.equal(y, hr[inside])
    assert x.shape == (1, 3, 34, 38) and x.dtype == torch.float32
    expected = factor * (sr[inside] - hr[inside]).abs().mean().item()
    assert measured == pytest.approx(expected, rel=1e-6) and isinstance(measured, float)
    assert perceptual(name)(sr[0], hr[0], 3) == measured
    with pytest.raises(InputError, match="32 x 32"):
        perceptual(name)(sr, hr, 5)
    with pytest.raises(InputError, match="1 channel"):
        perceptual(name)(sr[:, :1], hr[:, :1], 0)


def test_perceptual_weights_are_only_tensors(piq, monkeypatch):
    """What is in a file of weights is never executed, though piq reads it by pickle."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    path = piq.weights / "lpips_weights.pt"

    class Harmful:
        def __reduce__(self):
            return (path.with_name("executed").touch, ())

    piq.LPIPS = lambda: torch.load(path, weights_only=False)
    torch.save(Harmful(), path)
    with pytest.raises(InputError, match="cannot be loaded"):
        perceptual("lpips")
    assert not path.with_name("executed").exists()
    piq.LPIPS()
    assert path.with_name("executed").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_perceptual_without_its_package_or_weights(piq, monkeypatch):
    piq.LPIPS = piq.DISTS = lambda: pytest.fail("would download")
    own = {"lpips": "lpips_weights.pt", "dists": "dists_weights.pt"}
    for name, file in [*own.items(), *((name, "vgg16-397923af.pth") for name in own)]:
        (piq.weights / file).unlink()
        with pytest.raises(InputError, match="not there") as error:
            perceptual(name)
        assert str(piq.weights / file) in str(error.value) and "https://" in str(error.value)
        (piq.weights / file).touch()

    def damaged():
        raise EOFError("Ran out of input")

    piq.DISTS = damaged
    with pytest.raises(InputError, match="cannot be loaded .EOFError: Ran out"):
        perceptual("dists")
    with pytest.raises(InputError, match="'ssim' is none of lpips, dists"):
        perceptual("ssim")
    monkeypatch.setitem(sys.modules, "piq", None)
    with pytest.raises(InputError, match="pip install 'gaussiansr.perceptual.'"):
        perceptual("lpips")
