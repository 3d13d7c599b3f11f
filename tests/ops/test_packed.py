"""Packed Gaussians: the operators as PyTorch sees them, and a model that uses them. On the CPU."""

import functools

import pytest
import torch

from gsr import viz
from gsr.config import EncoderConfig, ModelConfig
from gsr.inference import strips
from gsr.models import GaussianSR
from gsr.models.heads.direct import DirectEncoded, DirectPacked
from gsr.ops import packed, reference
from gsr.ops.arguments import Grid, Weighting
from gsr.ops.resize import bicubic

SIGMA, REACH = (0.1, 0.4), 0.5


def draw(b=2, k=3, h=4, w=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(b, 9 * k, h, w, generator=g), torch.rand(b, 3, h, w, generator=g)


def test_unpacked_is_what_was_packed():
    raw, _ = draw(k=9)
    gaussians = reference.direct_gaussians(raw, 9, SIGMA, REACH)
    found = packed.pack(raw, 9, SIGMA, REACH)
    assert all(t.shape == (2, 9, 4, 5) for t in found)
    for ours, true in zip(reference.unpack(found), gaussians, strict=True):
        torch.testing.assert_close(ours, true, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows, band", [(None, None), ((5, 9), (0, 4)), ((15, 19), (3, 7))])
def test_image(rows, band):
    raw, lr = draw()
    found = packed.pack(raw, 3, SIGMA, REACH)
    size = (11 * (band or (0, 4))[1] // 4, 13)
    image = packed.splat_packed(found, lr, size, 1, True, 0.01, rows, band)
    grid = Grid(size, rows or (0, size[0]), band or (0, 4))
    gaussians = reference.direct_gaussians(raw, 3, SIGMA, REACH)
    true = bicubic(lr, *grid) + reference.splat(gaussians, grid, Weighting(1, True, 0.01))
    torch.testing.assert_close(image, true, atol=1e-5, rtol=0)
    levels = packed.splat_packed(found, lr, size, 1, True, 0.01, rows, band, levels=True)
    assert levels.dtype == torch.uint8 and levels.is_contiguous()
    assert torch.equal(levels, (image.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1))


def test_opcheck():
    raw, lr = draw()
    torch.library.opcheck(torch.ops.gsr.pack.default, (raw, 3, SIGMA, REACH))
    found = packed.pack(raw, 3, SIGMA, REACH)
    for levels in (False, True):
        torch.library.opcheck(
            torch.ops.gsr.splat_packed.default,
            (*found, lr, (9, 7), (2, 8), 1, True, 0.01, (0, 4), levels),
        )


def test_bad_arguments():
    raw, lr = draw()
    with pytest.raises(ValueError, match=r"raw must be \[B, 18, h, w\]"):
        packed.pack(raw, 2, SIGMA, REACH)
    found = packed.pack(raw, 3, SIGMA, REACH)
    splat = functools.partial(packed.splat_packed, found)
    with pytest.raises(ValueError, match="lr must be float32"):
        splat(lr.double(), (8, 8), 1, True, 0.01)
    with pytest.raises(ValueError, match="lr must be float32"):
        splat(lr[:, :, 1:], (8, 8), 1, True, 0.01)
    with pytest.raises(ValueError, match="eps must be above 0"):
        splat(lr, (8, 8), 1, True, 0)
    with pytest.raises(ValueError, match="need LR rows"):  # the bicubic filter's
        splat(lr, (16, 8), 1, True, 0.01, (0, 4), (1, 8))


# ---- a model ------------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GaussianSR(ModelConfig("direct", encoder=EncoderConfig(n_feats=8, n_blocks=1)))
    torch.nn.init.normal_(model.head.out.weight, std=0.5)
    return model.eval()


@pytest.fixture
def packing(monkeypatch):
    monkeypatch.setattr(packed, "serves", lambda raw: not torch.is_grad_enabled())


def test_not_packed_on_the_cpu(model):
    with torch.inference_mode():
        assert isinstance(model.encode(torch.rand(1, 3, 5, 6)), DirectEncoded)


def test_packed_without_gradients_only(model, packing):
    lr = torch.rand(1, 3, 5, 6)
    assert isinstance(model.encode(lr), DirectEncoded)
    with torch.inference_mode():
        assert isinstance(model.encode(lr), DirectPacked)
        assert isinstance(model.double().encode(lr.double()), DirectEncoded)


def test_a_model_gives_the_same_packed(model, monkeypatch):
    lr, coord = torch.rand(2, 3, 9, 8), torch.rand(2, 11, 2) * 2 - 1

    def run():
        with torch.inference_mode():
            encoded = model.encode(lr)
            image = model.render(encoded, (23, 29))
            levels = model.head.render(encoded, (23, 29), levels=True)
            some = model.render(encoded, (23, 29), rows=(4, 9))
            fields = viz._fields(model.head, model.encoder(lr[:1]), lr[:1])
            return image, some, model.query(encoded, (23, 29), coord), levels, fields

    true = run()
    monkeypatch.setattr(packed, "serves", lambda raw: True)
    *images, levels, fields = run()
    for ours, expected in zip(images, true, strict=False):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (levels.int() - true[3].int()).abs().max() <= 1 and levels.shape == (2, 23, 29, 3)
    torch.testing.assert_close(fields, true[4], atol=1e-5, rtol=0)


def test_strips_of_packed_bands(model, packing, monkeypatch):
    """Whatever cuts and joins rows takes packed tensors for any others."""
    monkeypatch.setattr(strips, "BAND_PIXELS", 60)
    monkeypatch.setattr(strips, "STRIP_PIXELS", 300)
    lr = torch.rand(1, 3, 31, 12)
    with torch.inference_mode():
        whole = model(lr, size=(77, 31))
    torch.testing.assert_close(strips.run(model, lr, (77, 31)), whole, atol=1e-5, rtol=0)


def test_compiled(model, packing):
    torch._dynamo.reset()
    compiled = torch.compile(model._encode, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((1, 3, 6, 7), (1, 3, 9, 8)):
            lr = torch.rand(shape)
            found, true = compiled(lr), model.encode(lr)
            assert isinstance(found, DirectPacked)
            for ours, expected in zip(found, true, strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
