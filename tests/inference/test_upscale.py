"""Upscaling: tiles and strips change nothing, every kind of image comes back as itself."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import gsr
from gsr.config import BankConfig, DecoderConfig, DirectConfig, EncoderConfig, ModelConfig
from gsr.errors import InputError
from gsr.inference import strips as infer
from gsr.inference import upscale as upscaling
from gsr.io.image import to_tensor
from gsr.models.stream import Layer

BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    """Strips and bands of a few rows, so that even these small images take several."""
    monkeypatch.setattr(infer, "STRIP_PIXELS", 200)
    monkeypatch.setattr(infer, "BAND_PIXELS", 300)


class Bicubic(torch.nn.Module):
    """Stands for a model, so that results can be compared with Pillow's; notes how it is used."""

    halo = 0

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Conv2d(1, 1, 1)
        self.head = torch.nn.Dropout()
        self.config = ModelConfig()
        self.calls = []

    def encode(self, lr):
        from gsr.models.heads.direct import DirectEncoded

        self.calls.append((self.training, self.head.training, torch.is_inference_mode_enabled()))
        return DirectEncoded(*[lr] * 6)

    def stream(self):
        return Layer(self.encode, 0)

    def rows_needed(self, rows, lr_size, size, scale=None):
        return 0, lr_size[0]

    def render(self, encoded, size, scale=None, rows=None, band=None, shared=None):
        # As Pillow: a = -0.5 and no overshoot handled; antialias selects that kernel.
        whole = torch.nn.functional.interpolate(encoded.lr, size, mode="bicubic", antialias=True)
        return whole[:, :, rows[0] : rows[1]]


def drawn_model(mode, seed):
    torch.manual_seed(seed)
    model = gsr.GaussianSR(
        ModelConfig(
            mode,
            EncoderConfig(n_feats=8, n_blocks=1),
            DirectConfig(gaussians=2, width=8, radius=1 + seed % 2),
            BankConfig(points=16, channels=4),
            DecoderConfig(hidden_dim=8, hidden_list=[8]),
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("encoder", "head.out", "head.hidden")):
                parameter.normal_(0, 0.15)
    return model.eval()


# ---- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
@pytest.mark.parametrize("size, scale", [((75, 60), None), ((52, 98), (1.52, 3.51))])
def test_run_equals_the_model(mode, size, scale, monkeypatch):
    monkeypatch.setattr(infer, "STRIP_PIXELS", 1200)
    model = drawn_model(mode, 1)
    lr = torch.rand(2, 3, 34, 28)
    with torch.no_grad():
        expected = model.eval()(lr, size=size, scale=scale)
    for pixels in (1, 300, 1200, 10000):
        monkeypatch.setattr(infer, "BAND_PIXELS", pixels)
        result = infer.run(model, lr, size, scale)
        assert result.shape == (2, 3, *size) and result.dtype == torch.float32
        assert (result - expected).abs().max() < 1e-5
    # The test would see a halo that is too small: this image does differ from bicubic.
    enlarged = torch.nn.functional.interpolate(lr, size, mode="bicubic")
    assert (expected - enlarged).abs().max() > 0.01


def test_results_can_be_trained_on(tiny_model):
    result = infer.run(tiny_model, torch.rand(1, 3, 8, 8), (16, 16))
    weight = torch.ones(1, requires_grad=True)
    (result * weight).sum().backward()  # an inference tensor would raise here
    assert weight.grad is not None and not result.requires_grad


def test_training_flags_are_restored(picture):
    model = Bicubic()
    model.train()
    model.encoder.eval()
    gsr.upscale(picture, 2, model=model)
    assert model.calls == [(False, False, True)]
    assert model.training and model.head.training and not model.encoder.training
    model.render = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        gsr.upscale(picture, 2, model=model)
    assert model.training and not model.encoder.training


def test_progress_ends_at_its_total(tiny_model, monkeypatch):
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)
            self.steps = []

        def update(self, n=1):
            self.steps.append(n)
            return super().update(n)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    infer.run(tiny_model, torch.rand(1, 3, 34, 28), (75, 60), progress=True)
    upscaling.upscale(torch.rand(2, 3, 34, 28), 2, model=tiny_model, progress=True)
    assert len(bars) == 2
    for bar in bars:
        assert bar.n == pytest.approx(bar.total) and len(bar.steps) > 10 and min(bar.steps) > 0
    infer.run(tiny_model, torch.rand(1, 3, 8, 8), (8, 8))
    assert len(bars) == 2


# ---- kinds of image ---------------------------------------------------------------------------


def test_uint8_array_equals_the_model(tiny_model, picture):
    with torch.no_grad():
        expected = tiny_model(to_tensor(picture), scale=(3.5, 2))[0].clamp(0, 1) * 255
    result = gsr.upscale(picture, (3.5, 2), model=tiny_model)
    assert result.dtype == np.uint8 and result.shape == (42, 34, 3)
    error = np.abs(result - expected.permute(1, 2, 0).numpy())
    assert error.max() < 0.501
    # Unclamped, this model leaves the range, and so the clamp is seen.
    with torch.no_grad():
        assert tiny_model(to_tensor(picture), scale=(3.5, 2)).abs().max() > 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_arrays(tiny_model, picture, dtype):
    values = (picture / 255).astype(dtype)
    result = gsr.upscale(values, size=(30, 40), model=tiny_model)
    assert result.dtype == np.dtype(dtype) and result.shape == (30, 40, 3)
    expected = infer.run(tiny_model, torch.tensor(values.astype(np.float32)).permute(2, 0, 1)[None],
                         (30, 40)).clamp(0, 1)  # fmt: skip
    tolerance = 1e-3 if dtype == np.float16 else 1e-6
    np.testing.assert_allclose(result, expected[0].permute(1, 2, 0), atol=tolerance)


def test_grey_arrays(tiny_model, picture):
    grey = picture[..., 0]
    flat = gsr.upscale(grey, 2, model=tiny_model)
    deep = gsr.upscale(grey[..., None], 2, model=tiny_model)
    colour = gsr.upscale(np.stack([grey / 255] * 3, -1), 2, model=tiny_model)
    assert flat.shape == (24, 34) and deep.shape == (24, 34, 1) and flat.dtype == np.uint8
    np.testing.assert_array_equal(flat, deep[..., 0])
    np.testing.assert_allclose(flat, 255 * colour @ [0.299, 0.587, 0.114], atol=0.502)
    real = gsr.upscale(grey / 255, 2, model=tiny_model)
    np.testing.assert_allclose(real, colour @ [0.299, 0.587, 0.114], atol=1e-6)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_alpha_of_arrays_goes_through_the_model(tiny_model, picture, kind):
    rgba = np.dstack([picture, picture[..., 0]])
    rgba = rgba if kind == np.uint8 else (rgba / 255).astype(kind)
    result = gsr.upscale(rgba, 2, model=tiny_model)
    assert result.shape == (24, 34, 4) and result.dtype == kind
    tolerance = 1 if kind == np.uint8 else 1e-5
    for part in (slice(3), 3):  # all of it is visible
        want = gsr.upscale(rgba[..., part].copy(), 2, model=tiny_model)
        np.testing.assert_allclose(result[..., part].astype(float), want, atol=tolerance)


class Subclass(np.ndarray):
    """Like np.matrix, whose views with a third axis have broken shapes."""

    def __getitem__(self, key):
        raise AssertionError("asked for what only plain arrays answer well")


def test_subclasses_are_taken_as_plain_arrays(tiny_model, picture):
    expected = gsr.upscale(picture[..., 0], 2, model=tiny_model)
    result = gsr.upscale(picture[..., 0].view(Subclass), 2, model=tiny_model)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, expected)


def test_read_only_and_reversed_arrays(tiny_model, picture):
    expected = gsr.upscale(picture[::-1, ::-1].copy(), 2, model=tiny_model)
    view = picture[::-1, ::-1]
    view.flags.writeable = False
    np.testing.assert_array_equal(gsr.upscale(view, 2, model=tiny_model), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_tensors(tiny_model, picture, dtype):
    tensor = to_tensor(picture)[0]
    tensor = (tensor * 255).to(dtype) if dtype == torch.uint8 else tensor.to(dtype)
    result = gsr.upscale(tensor, 2.5, model=tiny_model)
    assert result.shape == (3, 30, 42) and result.dtype == dtype
    expected = infer.run(tiny_model, to_tensor(picture), (30, 42), 2.5)[0].clamp(0, 1)
    if dtype == torch.uint8:
        assert (result - expected * 255).abs().max() < 0.501
    else:
        tolerance = 5e-3 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=0)
    batch = torch.stack([tensor, tensor.flip(2)])
    both = gsr.upscale(batch, 2.5, model=tiny_model)
    assert both.shape == (2, 3, 30, 42) and torch.equal(both[0], result)
    assert torch.equal(both[1], gsr.upscale(tensor.flip(2), 2.5, model=tiny_model))


def test_tensors_that_need_gradients(tiny_model):
    result = gsr.upscale(torch.rand(3, 8, 8, requires_grad=True), 2, model=tiny_model)
    assert not result.requires_grad and not result.is_inference()


def convert(picture, mode):
    if mode == "I;16":
        return Image.fromarray(picture[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(picture).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(picture[..., 1]))
    return image


@pytest.mark.parametrize(
    "mode, back",
    [
        ("RGB", "RGB"),
        ("L", "L"),
        ("RGBA", "RGBA"),
        ("LA", "LA"),
        ("P", "RGB"),
        ("1", "L"),
        ("I;16", "I;16"),
        ("CMYK", "RGB"),
    ],
)
def test_pillow_modes(picture, mode, back):
    image = convert(picture, mode)
    result = gsr.upscale(image, (2, 3), model=Bicubic())
    assert result.mode == back and result.size == (51, 24)
    deep = mode == "I;16"
    simple = Image.fromarray(picture[..., 0]) if deep else image.convert(back)
    bands = [np.asarray(band.resize((51, 24), BICUBIC)) for band in simple.split()]
    levels = np.asarray(result).reshape(24, 51, -1) / (257 if deep else 1)
    error = np.abs(levels - np.stack(bands, -1).astype(int))
    # Of pure black and white, Pillow clamps the overshoot between its two passes.
    assert error.max() <= (30 if mode == "1" else 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "I;16", "CMYK"])
def test_a_file_by_strips_is_the_same_image(picture, mode, tiny_model, tmp_path):
    image, path = convert(picture, mode), tmp_path / "a.png"
    image.info["icc_profile"] = b"a profile"
    want = gsr.upscale(image, (2, 3.3), model=tiny_model)
    size = upscaling.upscale_to_file(path, image, (2, 3.3), model=tiny_model)
    with Image.open(path) as got:
        assert got.size == want.size == size[::-1] and got.mode == want.mode
        assert got.info.get("icc_profile") == want.info.get("icc_profile")
        assert np.array_equal(np.asarray(got), np.asarray(want))


def test_a_file_by_strips_of_a_turned_image(picture, tiny_model, tmp_path):
    image = Image.fromarray(picture)
    image.getexif()[0x0112] = 6
    size = upscaling.upscale_to_file(tmp_path / "a.png", image, size=(34, 24), model=tiny_model)
    assert size == (34, 24)


def test_a_failure_in_the_middle_leaves_no_file(picture, tiny_model, tmp_path, monkeypatch):
    done = []

    def render(*args, **kwargs):
        if done:
            raise ValueError("in the middle")
        done.append(1)
        return inner(*args, **kwargs)

    inner = tiny_model.render
    monkeypatch.setattr(tiny_model, "render", render)
    with pytest.raises(ValueError, match="in the middle"):
        upscaling.upscale_to_file(tmp_path / "a.png", Image.fromarray(picture), 4, model=tiny_model)
    assert not list(tmp_path.iterdir()) and not torch.is_inference_mode_enabled()


def test_palette_with_transparency(picture):
    image = Image.fromarray(picture).quantize(4)
    image.info["transparency"] = 2
    result = gsr.upscale(image, 2, model=Bicubic())
    alpha = image.convert("RGBA").getchannel("A").resize((34, 24), BICUBIC)
    assert result.mode == "RGBA" and alpha.getextrema() == (0, 255)
    error = np.asarray(result.getchannel("A")).astype(int) - np.asarray(alpha)
    assert np.abs(error).max() <= 30  # Pillow clamps the overshoot between its two passes


def test_pillow_keeps_profile_and_carries_out_orientation(tiny_model, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path, exif=exif, icc_profile=b"a profile")
    result = gsr.upscale(Image.open(path), size=(34, 24), model=tiny_model)
    expected = gsr.upscale(np.rot90(picture, -1), size=(34, 24), model=tiny_model)
    np.testing.assert_array_equal(np.asarray(result), expected)
    assert result.info["icc_profile"] == b"a profile"
    cmyk = Image.fromarray(picture).convert("CMYK")
    cmyk.info["icc_profile"] = b"of inks"
    assert "icc_profile" not in gsr.upscale(cmyk, 1, model=tiny_model).info


def test_one_pixel(tiny_model):
    for image in (np.full((1, 1, 3), 7, np.uint8), torch.rand(3, 1, 1)):
        result = gsr.upscale(image, size=(5, 3), model=tiny_model)
        assert sorted(result.shape) == [3, 3, 5]


def test_bundled_model_is_the_default(monkeypatch, tiny_model, picture):
    from gsr.models import checkpoint

    upscaling._bundled.cache_clear()
    monkeypatch.setattr(checkpoint, "load", lambda: tiny_model)
    try:
        result = gsr.upscale(picture, 2)
    finally:
        upscaling._bundled.cache_clear()
    np.testing.assert_array_equal(result, gsr.upscale(picture, 2, model=tiny_model))


# ---- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_bf16_by_bands_is_that_of_the_whole(mode, monkeypatch):
    """As near as numbers of 8 bits allow, and not float32; `official` in one pass and in two."""
    model, lr, size = drawn_model(mode, 3), torch.rand(1, 3, 30, 20), (70, 50)
    exact = infer.run(model, lr, size)
    for keep in (infer.KEEP, 0):
        monkeypatch.setattr(infer, "KEEP", keep)
        parts = infer.run(model, lr, size, precision="bf16")
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            whole = model.eval().render(model.encode(lr), size)
        assert parts.dtype == torch.float32
        assert 1e-6 < (parts - exact).abs().max() < 0.1
        assert (parts - whole).abs().max() < 0.05 and (parts - whole).abs().mean() < 5e-3


def test_autocast_of_others_does_not_matter():
    model, lr = drawn_model("field", 1), torch.rand(1, 3, 9, 8)
    want = infer.run(model, lr, (20, 20))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(infer.run(model, lr, (20, 20)), want)


@pytest.mark.parametrize(
    "loss, has, dtype",
    [(0.01, True, "bf16"), (0.011, True, "fp32"), (None, True, "fp32"), (0.01, False, "fp32")],
)
def test_auto_takes_bf16_where_it_is_fast_and_costs_little(loss, has, dtype, monkeypatch):
    monkeypatch.setattr(infer, "has_fast_bf16", lambda device: has)
    model, picture = drawn_model("direct", 2), np.random.default_rng(0).random((40, 40, 3))
    model.bf16_loss = loss
    asked = {p: gsr.upscale(picture, 2, model=model, precision=p) for p in ("auto", "bf16", "fp32")}
    assert np.array_equal(asked["auto"], asked[dtype])
    assert not np.array_equal(asked["bf16"], asked["fp32"])


@pytest.mark.parametrize("memory", ["2GB", True, float("nan")])
def test_a_memory_that_is_no_number_is_refused(memory, tiny_model):
    with pytest.raises(InputError, match=f"max_memory must be a number of bytes, not {memory!r}"):
        gsr.upscale(torch.rand(3, 4, 4), 2, model=tiny_model, max_memory=memory)


@pytest.mark.parametrize("memory", [np.int64(10**10), 1e10, math.inf])
def test_a_memory_is_any_number(memory, tiny_model):
    assert gsr.upscale(torch.rand(3, 4, 4), 2, model=tiny_model, max_memory=memory).shape[-1] == 8


def test_official_encodes_twice_where_all_that_is_encoded_does_not_fit(monkeypatch):
    model, lr = drawn_model("official", 2), torch.rand(1, 3, 70, 30)
    with torch.no_grad():
        expected = model(lr, scale=2)
    monkeypatch.setattr(infer, "BAND_PIXELS", 30 * 32)
    monkeypatch.setattr(infer, "KEEP", 2**18)
    plain, passes = model.head.shared, []

    def shared(gaussians):
        passes.append(renderer._two_passes())
        if not passes[-1]:
            raise MemoryError
        return plain(gaussians)

    model.head.shared = shared
    size = (140, 60)
    with infer.inference(model):
        renderer = infer.StripRenderer(
            model, lambda a, b: lr[..., a:b, :], lr.shape, size, None, "fp32"
        )
        out = torch.cat([strip for *_, strip in renderer.strips()], dim=-2)
    assert passes[0] is False and passes[-1] is True
    assert (out - expected).abs().max() < 1e-5


def test_other_precisions_are_refused(tiny_model):
    with pytest.raises(InputError, match="precision must be one of auto, fp32, bf16, not 'fp16'"):
        gsr.upscale(torch.rand(3, 4, 4), 2, model=tiny_model, precision="fp16")


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({}, "exactly one"),
        ({"scale": 2, "size": (24, 34)}, "exactly one"),
        ({"scale": 0}, "positive and at most 1,000,000, not 0"),
        ({"scale": -2}, "positive and at most"),
        ({"scale": float("nan")}, "positive and at most"),
        ({"scale": (2, float("inf"))}, "positive and at most"),
        ({"scale": 1e308}, "positive and at most"),
        ({"scale": 10**400}, "a number or (s_y, s_x)"),
        ({"scale": 1e-9}, "below 1"),
        ({"scale": 0.5}, "Pillow's Image.resize"),
        ({"scale": (2, 0.9)}, "below 1"),
        ({"scale": (2, 2, 2)}, "a number or (s_y, s_x)"),
        ({"scale": "2"}, "a number or (s_y, s_x)"),
        ({"scale": True}, "a number or (s_y, s_x)"),
        ({"size": (11, 34)}, "34 x 11 (width x height) is below the image's 17 x 12"),
        ({"size": (24, 16)}, "Pillow's Image.resize"),
        ({"size": (0, 34)}, "positive"),
        ({"size": (24.5, 34)}, "two whole numbers"),
        ({"size": 24}, "two whole numbers"),
        ({"size": (24, 34, 3)}, "two whole numbers"),
        ({"size": (10**400, 34), "max_pixels": 10**500}, "below 2^31 a side"),
        ({"size": (20000, 20001)}, "20001 x 20000 = 400,020,000 pixels"),
        ({"scale": 1e5}, "max_pixels"),
        ({"scale": 2, "max_pixels": 815}, "34 x 24 = 816 pixels"),
    ],
)
def test_sizes_that_are_refused(tiny_model, picture, arguments, sentence):
    for image in (picture, to_tensor(picture), Image.fromarray(picture)):
        with pytest.raises(InputError) as caught:
            gsr.upscale(image, model=tiny_model, **arguments)
        assert sentence in str(caught.value)


def test_sizes_that_are_taken(picture):
    assert upscaling.target_size((12, 17), 1) == ((12, 17), (1, 1))
    assert upscaling.target_size((12, 17), np.float32(1.25)) == ((15, 21), (1.25, 1.25))
    assert upscaling.target_size((12, 17), torch.tensor(2.0)) == ((24, 34), (2, 2))
    assert upscaling.target_size((12, 17), [2, 3]) == ((24, 51), (2, 3))
    assert upscaling.target_size((12, 17), size=np.array([12, 34])) == ((12, 34), (1, 2))
    assert upscaling.target_size((12, 17), 2, max_pixels=816)[0] == (24, 34)


@pytest.mark.parametrize(
    "image, sentence",
    [
        (np.zeros((3, 8, 8), np.float32), "transpose(1, 2, 0)"),
        (np.zeros((8, 8, 2), np.uint8), "not [8, 8, 2]"),
        (np.zeros((1, 8, 8, 3), np.uint8), "not [1, 8, 8, 3]"),
        (np.zeros((0, 8, 3), np.uint8), "empty"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.zeros((8, 8, 3), np.uint32), "uint32"),
        (np.full((8, 8, 3), 200.0), "divide by 255"),
        (np.full((8, 8, 3), -0.1), "[-0.1, -0.1]"),
        (np.full((8, 8), np.nan), "NaN"),
        (np.full((8, 8), np.inf), "NaN or infinity"),
        (torch.zeros(8, 8, 3), "permute(2, 0, 1)"),
        (torch.zeros(8, 8), "not [8, 8]"),
        (torch.zeros(1, 4, 8, 8), "not [1, 4, 8, 8]"),
        (torch.zeros(0, 3, 8, 8), "empty"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        (torch.full((3, 8, 8), 1.5), "divide by 255"),
        (torch.full((3, 8, 8), float("nan")), "NaN"),
        ("photo.png", "gsr.io.image.read_image reads files"),
        ([[1]], "not list"),
    ],
)
def test_images_that_are_refused(tiny_model, image, sentence):
    with pytest.raises(InputError) as caught:
        gsr.upscale(image, 2, model=tiny_model)
    assert sentence in str(caught.value)


def test_kinds_of_tensors_and_weights_that_are_refused(tiny_model, picture):
    for tensor, sentence in [
        (torch.zeros(3, 8, 8).to_sparse(), "sparse"),
        (torch.zeros(3, 8, 8, device="meta"), "meta"),
        (torch.zeros(3, 8, 8).to(torch.float8_e4m3fn), "not torch.float8_e4m3fn"),
    ]:
        with pytest.raises(InputError, match=sentence):
            gsr.upscale(tensor, 2, model=tiny_model)
    with pytest.raises(InputError, match=r"must be float32, not torch.float16: call model.float"):
        gsr.upscale(picture, 2, model=tiny_model.half())


def test_no_limit_of_pixels(tiny_model, picture):
    assert gsr.upscale(picture, 2, model=tiny_model, max_pixels=None).shape == (24, 34, 3)


def test_premultiplied_grey(tiny_model, picture):
    image = Image.merge("La", [Image.fromarray(picture[..., i]) for i in (0, 1)])
    assert gsr.upscale(image, 2, model=tiny_model).mode == "LA"


def test_models_that_are_refused(picture):
    with pytest.raises(InputError, match="gsr.load"):
        gsr.upscale(picture, 2, model="gsr-lite")


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_bands_and_strips_change_nothing(mode, seed, monkeypatch):
    """Any image, scale, band and strip: what the model gives on the whole image."""
    rng = random.Random(seed)
    h, w = rng.randint(1, 45), rng.randint(1, 40)
    size = tuple(rng.randint(n, 5 * n) for n in (h, w))
    monkeypatch.setattr(infer, "BAND_PIXELS", w * rng.randint(1, h))
    monkeypatch.setattr(infer, "STRIP_PIXELS", size[1] * rng.randint(1, size[0]))
    monkeypatch.setattr(infer, "KEEP", rng.choice([0, infer.KEEP]))
    model, lr = drawn_model(mode, seed), torch.rand(1, 3, h, w)
    with torch.no_grad():
        expected = model(lr, size=size)
    assert (infer.run(model, lr, size) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tiles_and_threads_change_nothing(mode, threads, monkeypatch):
    """Columns cut into tiles, as many for each thread; halos between them."""
    monkeypatch.setattr(infer, "TILE", 30)
    monkeypatch.setattr(infer, "HALO_SHARE", 0.5)
    model, lr, size = drawn_model(mode, 5), torch.rand(2, 3, 25, 100), (60, 230)
    tiles = infer.make_tiles(model, 100, threads)
    assert len(tiles) > 1 and len(tiles) % threads == 0
    with torch.no_grad():
        want = model(lr, size=size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = infer.run(model, lr, size)
    finally:
        torch.set_num_threads(before)
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("name, settings", [("rdn", {"layers": 2}), ("swinir", {"dim": 6})])
def test_tiles_of_deep_encoders(name, settings, monkeypatch):
    """SwinIR counts its windows from the image's corner, and so must every tile."""
    monkeypatch.setattr(infer, "TILE", 40)
    monkeypatch.setattr(infer, "HALO_SHARE", 0.9)
    torch.manual_seed(0)
    encoder = EncoderConfig(name, n_feats=6, n_blocks=1, depths=[2], heads=2, window=4, **settings)
    model = gsr.GaussianSR(ModelConfig("direct", encoder, DirectConfig(gaussians=2, width=8)))
    with torch.no_grad():
        model.head.out.weight.normal_(0, 0.3)
    lr = torch.rand(1, 3, 30, 110)
    assert len(infer.make_tiles(model, 110, 2)) > 1
    with torch.no_grad():
        want = model.eval()(lr, scale=2)
    assert (infer.run(model, lr, (60, 220)) - want).abs().max() < 1e-5


def test_a_narrow_image_is_one_tile():
    model = drawn_model("direct", 1)  # halo 5, so that a tile is worth its halo from 100 columns on
    assert infer.make_tiles(model, 150, 2) == [infer.Tile(0, 150, 0, 150)]
    assert [tile[:2] for tile in infer.make_tiles(model, 210, 2)] == [(0, 105), (105, 210)]


@pytest.mark.parametrize("mode", ["direct", "official"])
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_and_goes_on(mode, error, monkeypatch):
    model, lr = drawn_model(mode, 3), torch.rand(1, 3, 40, 30)
    with torch.no_grad():
        expected = model(lr, scale=3)
    monkeypatch.setattr(infer, "BAND_PIXELS", 30 * 16)
    monkeypatch.setattr(infer, "STRIP_PIXELS", 90 * 20)
    plain, calls = model.render, []

    def render(*args, **kwargs):
        rows = args[3]
        calls.append(rows)
        if rows[1] - rows[0] > 5 and rows[0] > 30:
            raise error
        return plain(*args, **kwargs)

    model.render = render
    assert (infer.run(model, lr, (120, 90)) - expected).abs().max() < 1e-5
    assert max(b - a for a, b in calls) > 10 and calls[-1][1] - calls[-1][0] <= 5


def test_other_errors_and_hopeless_images(tiny_model):
    def fail(error):
        def render(*args, **kwargs):
            raise error

        return render

    tiny_model.render = fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        infer.run(tiny_model, torch.rand(1, 3, 8, 8), (16, 16))
    tiny_model.render = fail(MemoryError())
    with pytest.raises(InputError, match="not enough memory to encode and render even single rows"):
        infer.run(tiny_model, torch.rand(1, 3, 8, 8), (16, 16))


def test_max_memory_makes_bands_smaller_and_changes_nothing(tiny_model, monkeypatch):
    monkeypatch.setattr(infer, "BAND_PIXELS", 2**16)
    monkeypatch.setattr(infer, "STRIP_PIXELS", 2**16)
    monkeypatch.setattr(infer, "STRIP_BYTES", 1000)
    monkeypatch.setattr(infer, "_resident", lambda: 5_000_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # each takes memory of its own
    seen, plain = [], tiny_model.render

    def render(*args, **kwargs):
        seen.append((args[0].lr.shape[-2], args[3][1] - args[3][0]))
        return plain(*args, **kwargs)

    tiny_model.render = render
    lr = torch.rand(1, 3, 200, 40)
    free = infer.run(tiny_model, lr, (400, 80))
    assert {a for a, _ in seen} == {200}
    assert sum(b for _, b in seen) == 400
    seen.clear()
    tight = infer.run(tiny_model, lr, (400, 80), max_memory=6_000_000)
    assert max(b for _, b in seen) < 100 and max(a for a, _ in seen) < 100
    assert (tight - free).abs().max() < 1e-5
    with pytest.raises(InputError, match=r"about 5 MB, more than max_memory .* = 5 MB; allow more"):
        infer.run(tiny_model, lr, (400, 80), max_memory=5_000_001)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [700, 1000])
def test_the_process_stays_within_max_memory(limit):
    """The bundled model on a 1200 x 900 image: peak RSS of a process of its own."""
    script = f"""
import numpy as np, gsr, resource
picture = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
gsr.upscale(picture, 2, max_memory={limit}_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= limit
