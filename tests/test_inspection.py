"""Drawings of Gaussians lie where the splat puts them, and maps show what the model chose."""

import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from gsr import cli
from gsr import viz as look
from gsr.config import BankConfig, DecoderConfig, DirectConfig, EncoderConfig, ModelConfig
from gsr.errors import InputError
from gsr.io.image import read_image, to_tensor, write_image
from gsr.models import GaussianSR
from gsr.models.checkpoint import save_model
from gsr.models.heads.official import shared_splat, window_kernels
from gsr.ops import splat_at
from gsr.ops.resize import bicubic


def random_model(mode, **bank):
    torch.manual_seed(0)
    config = ModelConfig(
        mode=mode,
        encoder=EncoderConfig(n_feats=12, n_blocks=1),
        direct=DirectConfig(gaussians=3, width=8),
        bank=BankConfig(points=9, **bank),
        decoder=DecoderConfig(hidden_dim=8, hidden_list=[8]),
    )
    model = GaussianSR(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


class Levels(nn.Module):
    """Stands in for encoder and classifier: class n where the red channel is 20 n."""

    halo = 0

    def __init__(self, points):
        super().__init__()
        self.points = points

    def forward(self, x):
        if x.shape[1] == 3:  # the encoder's place
            return x.repeat(1, 4, 1, 1)
        levels = torch.arange(self.points)[:, None, None] * 20 / 255
        return -(x[:, :1] - levels).abs()


def levels_model(mode, classes):
    """A model that selects these classes [h, w], and the picture to give it."""
    model = random_model(mode)
    model.encoder, model.head.classifier = Levels(9), Levels(9)
    picture = np.repeat((20 * classes)[..., None], 3, axis=2).astype(np.uint8)
    return model, picture


def covariance(sigma, rho):
    y, x = sigma
    return np.array([[y * y, rho * y * x], [rho * y * x, x * x]])


# ---- geometry -----------------------------------------------------------------------------------


def test_contours_are_those_of_the_covariance():
    """Any square root of the covariance takes the unit circle to the one-sigma contour."""
    sigma, rho = np.array([[3.0, 1.0], [0.5, 2.0]]), np.array([0.0, -0.8])
    for points, s, r in zip(look.contours(sigma, rho), sigma, rho, strict=True):
        circle = np.linalg.solve(np.linalg.cholesky(covariance(s, r)), points.T)
        np.testing.assert_allclose(np.hypot(*circle), 1, rtol=1e-12)
        np.testing.assert_allclose(np.abs(points).max(0), s, rtol=0.02)  # y, then x


@pytest.mark.parametrize("rho", [0.0, 0.7, -0.7])
def test_an_ellipse_is_drawn_where_the_formula_says(rho):
    zoom, picture = 8, np.full((14, 16, 3), 40, np.uint8)
    centre, sigma = np.array([6.25, 7.5]), np.array([4.0, 2.0])
    one = look.Gaussians(centre[None], sigma[None], np.array([rho]), np.array([1.0]), np.array([3]))
    drawn = look.draw_ellipses(one, picture, zoom).astype(int)
    empty = look.draw_ellipses(one._replace(opacity=np.zeros(1)), picture, zoom).astype(int)
    assert drawn.shape == (14 * 8, 16 * 8, 3)
    changed = np.abs(drawn - empty).max(2)
    # A fine polygon of the true contour, in pixels of the drawing: LR pixel i is centred in its 8.
    t = np.linspace(0, 2 * np.pi, 2000)
    circle = np.stack([np.cos(t), np.sin(t)])
    edge = centre[:, None] + np.linalg.cholesky(covariance(sigma, rho)) @ circle
    edge = (edge + 0.5) * zoom - 0.5
    pixels = np.argwhere(changed > 0)
    away = np.linalg.norm(pixels[:, None] - edge.T[None], axis=2).min(1)
    assert away.max() < look.LINE / 2 + 1
    y, x = np.rint(edge).astype(int)
    assert changed[y, x].min() > 0.3 * changed.max()


def test_opacity_is_how_visible_a_contour_is():
    picture = np.zeros((9, 9, 3), np.uint8)
    one = look.Gaussians(
        np.full((1, 2), 4.0), np.full((1, 2), 2.0), np.zeros(1), np.ones(1), np.zeros(1, int)
    )
    peak = [
        look.draw_ellipses(one._replace(opacity=np.array([o])), picture).max() for o in (1, 0.5, 0)
    ]
    assert abs(peak[0] - 233) <= 1 and abs(peak[1] - 116) <= 3 and peak[2] == 0
    saddle = one._replace(rho=np.array([1.5]))  # has no contour
    assert look.draw_ellipses(saddle, picture).max() == 0


def test_all_are_drawn_and_the_strongest_last():
    two = look.Gaussians(
        np.array([[4.0, 4.0], [4.0, 4.0], [4.0, 12.0]]), np.full((3, 2), 2.0), np.zeros(3),
        np.array([1.0, 0.5, 1.0]), np.array([0, 1, 2]),
    )  # fmt: skip
    drawn = look.draw_ellipses(two, np.zeros((9, 17, 3), np.uint8))
    for left, label in ((0, 0), (72, 2)):  # the first is on top of the second
        part = drawn[:, left : left + 64].reshape(-1, 3)
        colour = part[part.sum(1).argmax()].astype(int)
        assert np.abs(colour - look.palette(3)[label]).max() < 40


@pytest.mark.parametrize(
    "mode, bank", [("direct", {}), ("field", {}), ("field", {"assignment": "softmax"})]
)
def test_listed_gaussians_are_those_that_are_splatted(mode, bank, picture):
    """At the contour of each, its own splat has fallen to exp(-1/2) of its peak."""
    model = random_model(mode, **bank)
    g = look.gaussians(model, picture)
    with torch.no_grad():
        e = model.encode(to_tensor(picture))
    if mode == "direct":
        sigma, rho, opacity, offset = e.sigma, e.rho, e.opacity, e.offset
    else:
        sigma, opacity, rho = e.gaussians.split([2, 1, 1], 1)
        sigma, offset = sigma[:, None], torch.zeros_like(sigma[:, None])
    k, (h, w) = rho.shape[1], picture.shape[:2]
    assert len(g.centre) == k * h * w
    for n in (0, 5, k * h * w // 2, k * h * w - 1):
        values = torch.zeros(1, k, 1, h, w)
        values.view(-1)[n] = 1  # this Gaussian alone
        edge = look.contours(g.sigma[n : n + 1], g.rho[n : n + 1])[0]
        points = torch.from_numpy(np.concatenate([g.centre[n : n + 1], g.centre[n] + edge]))[None]
        out = splat_at(
            values, sigma, rho, opacity, points, offset, radius=3, normalize=False
        )  # fmt: skip
        peak, *others = out.flatten().tolist()
        assert abs(peak - g.opacity[n]) < 1e-5
        np.testing.assert_allclose(others, peak * math.exp(-0.5), rtol=1e-4)


@pytest.mark.parametrize("lr_size", [(14, 21), (12, 17)])
def test_official_is_drawn_as_it_is_splatted(lr_size):
    """Mean and covariance of the splat of one Gaussian, with taps enough to show its shape."""
    model, scale, window = random_model("official", kernel_size=41), 8.0, 7
    table = model.head.bank
    with torch.no_grad():
        table.sigma_x.copy_(torch.linspace(0.7, 1.3, 9))
        table.sigma_y.copy_(torch.linspace(1.4, 0.6, 9))
        table.rho.copy_(torch.linspace(-0.5, 0.6, 9)[:, None])
        table.opacity.fill_(0.8)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*lr_size, 3), dtype=np.uint8)
    g = look.gaussians(model, picture, scale)
    with torch.no_grad():
        fields = model.encode(to_tensor(picture)).gaussians
    whole = look.whole_windows(fields, window)
    kernels = window_kernels(whole, window, 41)
    size = tuple(round(scale * n) for n in lr_size)
    y, x = 3, 10  # in the middle of its window, where it ends
    features = torch.zeros(1, 1, *whole.shape[-2:])
    features[0, 0, y, x] = 1
    out = shared_splat(features, kernels, (56, 56), size)[0, 0].double().numpy()
    places = [(np.arange(n) + 0.5) / scale - 0.5 for n in size]  # LR pixels
    grid = np.stack(np.meshgrid(*places, indexing="ij"))
    mean = (out * grid).sum((1, 2)) / out.sum()
    away = grid - mean[:, None, None]
    moments = np.einsum("iyx,jyx,yx->ij", away, away, out) / out.sum()

    rows, columns = (math.ceil(n / window) for n in lr_size)
    assert len(g.centre) <= window**2 * rows * columns
    n = np.linalg.norm(g.centre - mean, axis=1).argmin()
    np.testing.assert_allclose(g.centre[n], mean, atol=0.02)
    np.testing.assert_allclose(covariance(g.sigma[n], g.rho[n]), moments, rtol=0.05, atol=2e-3)
    assert abs(g.opacity[n] - 0.8) < 1e-6 and g.label[n] == 3 * 7 + 3
    own = look.gaussians(model, picture, scale, selected=True)
    assert len(own.centre) == math.prod(lr_size)
    unit = 7 / 56 * 40 / 10  # LR pixels
    expected = fields[0, :2].flatten(1).T.numpy()
    np.testing.assert_allclose(own.sigma, expected * unit, rtol=1e-4)


def test_a_part_is_drawn_as_in_the_whole(picture):
    model = random_model("direct")
    box = look.Box(3, 4, 9, 12)
    found = look.survey(model, picture, box)
    part = look.listed(model, found, picture.shape[:2], box)
    part = part._replace(centre=part.centre - np.array(box[:2]))
    g = look.gaussians(model, picture)
    crop = picture[3:9, 4:12]
    inner = look.draw_ellipses(part, crop, 8)[16:-16, 16:-16]  # ellipses of others reach in
    moved = g._replace(centre=g.centre - np.array(box[:2]))
    np.testing.assert_array_equal(inner, look.draw_ellipses(moved, crop, 8)[16:-16, 16:-16])


# ---- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["field", "official"])
def test_class_map_of_a_known_assignment(mode, monkeypatch):
    classes = np.random.default_rng(1).integers(0, 9, (15, 11))
    model, picture = levels_model(mode, classes)
    np.testing.assert_array_equal(look.class_map(model, picture), classes)
    table = model.head.bank.table().detach().numpy()
    np.testing.assert_allclose(look.opacity_map(model, picture), table[classes, 2], rtol=1e-6)
    own = look.gaussians(model, picture, selected=True)
    np.testing.assert_array_equal(own.label, classes.ravel())
    monkeypatch.setattr(look, "BAND_PIXELS", 30)
    np.testing.assert_array_equal(look.class_map(model, picture), classes)
    model.head.config.assignment = "gumbel"  # its mode is the largest logit
    np.testing.assert_array_equal(look.class_map(model, picture), classes)


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_bands_change_nothing(mode, picture, monkeypatch):
    model, box = random_model(mode), look.Box(5, 3, 8, 9)
    whole = look.survey(model, picture, box)
    monkeypatch.setattr(look, "BAND_PIXELS", 40)
    banded = look.survey(model, picture, box)
    np.testing.assert_allclose(banded.opacity, whole.opacity, atol=1e-5)
    assert banded.band.first == whole.band.first and banded.opacity.shape == picture.shape[:2]
    for a, b in zip(banded.band.tensors, whole.band.tensors, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for name, row in whole.statistics.items():
        np.testing.assert_allclose(
            list(banded.statistics[name].values()), list(row.values()), atol=1e-5
        )


def test_statistics(picture):
    model = random_model("direct")
    with torch.no_grad():
        e = model.encode(to_tensor(picture))
    found = look.survey(model, picture).statistics
    for name, values in [
        ("opacity", e.opacity), ("sigma_y", e.sigma[:, :, 0]), ("sigma_x", e.sigma[:, :, 1]),
        ("rho", e.rho),
    ]:  # fmt: skip
        v = values.double().numpy()
        expected = [v.mean(), v.std(), v.min(), v.max()]
        np.testing.assert_allclose(list(found[name].values()), expected, rtol=1e-5)
    np.testing.assert_allclose(
        look.opacity_map(model, picture), e.opacity[0].mean(0).numpy(), rtol=1e-5
    )


def test_usage_and_entropy():
    shares = look.usage(np.array([[0, 0], [2, 3]]), 5)
    assert shares.tolist() == [0.5, 0, 0.25, 0.25, 0]
    assert look.entropy(shares) == 1.5
    assert look.entropy(np.array([0.0, 1.0])) == 0
    assert abs(look.entropy(np.full(7, 1 / 7)) - math.log2(7)) < 1e-12


@pytest.mark.parametrize("box", [(0, 0, 12, 17), (4, 5, 9, 11), (0, 13, 3, 17)])
def test_share_is_the_picture_less_its_bicubic_base(box, picture):
    model, box = random_model("direct"), look.Box(*box)
    found = look.survey(model, picture, box)
    added = look.share(model.head, found.band.tensors, box, 3, found.band.first)
    lr = to_tensor(picture)
    with torch.no_grad():
        difference = model(lr, size=(36, 51)) - bicubic(lr, (36, 51))
    expected = difference[0].permute(1, 2, 0).numpy()
    expected = expected[3 * box.top : 3 * box.bottom, 3 * box.left : 3 * box.right]
    np.testing.assert_allclose(added, expected, atol=2e-6)


def test_dominant_is_the_heaviest_gaussian(picture):
    model, zoom = random_model("direct"), 3
    picture, box = picture[:6, :7], look.Box(0, 1, 6, 7)
    found = look.survey(model, picture, box)
    f = found.band.tensors
    label, odd = look.dominant(f, box, zoom, 1, found.band.first)
    assert label.shape == odd.shape == (18, 18)
    g = look.gaussians(model, picture)
    k, h, w = 3, 6, 7
    pixel = np.stack(np.unravel_index(np.arange(k * h * w) % (h * w), (h, w)), 1)
    for y in range(18):
        for x in range(18):
            point = np.array([(y + 0.5) / zoom - 0.5, (x + 3 + 0.5) / zoom - 0.5])
            near = (np.abs(pixel - np.floor(point + 0.5)) <= 1).all(1)
            d = (point - g.centre)[near]
            q = [
                v @ np.linalg.solve(covariance(s, r), v)
                for v, s, r in zip(d, g.sigma[near], g.rho[near], strict=True)
            ]
            best = np.flatnonzero(near)[np.argmax(g.opacity[near] * np.exp(-np.array(q) / 2))]
            assert label[y, x] == g.label[best]
            assert odd[y, x] == pixel[best].sum() % 2


def test_bank_is_drawn_as_it_is_splatted():
    field = random_model("field")
    kernels = look.bank_kernels(field, 15)
    sigma, opacity, rho = field.head.bank.table().detach().double().split([2, 1, 1], 1)
    u = torch.linspace(-3.5, 3.5, 15, dtype=torch.float64)
    points = torch.cartesian_prod(u, u)[None]
    for n in range(9):
        shape = sigma[n][None, None, :, None, None], rho[n].view(1, 1, 1, 1)
        one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
        out = splat_at(
            one, *shape, opacity[n].view(1, 1, 1, 1), points, radius=4, normalize=False
        )  # fmt: skip
        np.testing.assert_allclose(kernels[n], out.view(15, 15).numpy(), atol=1e-12)
    official = random_model("official")
    kernels = look.bank_kernels(official, 5)
    table = official.head.bank.table().detach()
    np.testing.assert_allclose(kernels.max((1, 2)), table[:, 2].numpy(), rtol=1e-6)
    shares = np.array([0.5, 0.5, *[0] * 7])
    sheet = look.draw_bank(field, shares)
    colours = {tuple(c) for c in sheet.reshape(-1, 3)}
    assert all(tuple(c) in colours for c in look.palette(9))


def test_shares_are_written_as_plain_numbers(monkeypatch):
    texts = []
    write = lambda self, at, text, *_, **__: texts.append(text)  # noqa: E731
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)
    look.draw_bank(random_model("field"), [1, 0.996, 0.123, 0.004, 1e-7, *[0] * 4])
    assert texts == ["100", "99.6", "12.3", "0.4", "<0.01", *"----"]


def test_colours():
    for count in (1, 4, 8, 100, 400):
        colours = look.palette(count)
        assert colours.shape == (count, 3) and len({tuple(c) for c in colours}) == count
        np.testing.assert_array_equal(colours, look.palette(count))
    classes = np.array([[1, 0]])
    np.testing.assert_array_equal(look.draw_classes(classes, 9)[0], look.palette(9)[[1, 0]])
    grey, white = look.draw_signed(np.array([[-2.0, 0.0, 2.0]] * 300))
    assert white == 2 and grey[0].tolist() == [0, 128, 255]


# ---- use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_a_model_in_training_stays_as_it_is(mode, picture):
    model = random_model(mode).train()
    model.encoder.eval()
    before = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    drawn = look.draw_gaussians(model, picture, zoom=4)
    assert drawn.shape == (48, 68, 3) and drawn.dtype == np.uint8
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(drawn, look.draw_gaussians(model.eval(), picture, zoom=4))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_arrays_that_run_backwards(picture):
    model = random_model("direct")
    turned = look.opacity_map(model, picture[..., ::-1])
    np.testing.assert_array_equal(turned, look.opacity_map(model, picture[..., ::-1].copy()))


def test_refusals_of_functions(picture):
    model = random_model("direct")
    with pytest.raises(InputError, match="has no bank"):
        look.class_map(model, picture)
    for wrong in (picture / 255.0, picture[..., 0], picture[:0], None):
        with pytest.raises(InputError, match=r"uint8 array \[h, w, 3\]"):
            look.draw_gaussians(model, wrong)
    for zoom in (0, 65):
        with pytest.raises(InputError, match="zoom"):
            look.draw_gaussians(model, picture, zoom)
    with pytest.raises(InputError, match="larger than 16,777,216 pixels"):
        look.draw_gaussians(model, np.zeros((600, 600, 3), np.uint8))
    with pytest.raises(InputError, match="Identity has no Gaussians to draw"):
        look.draw_gaussians(nn.Identity(), picture)


FILES = {
    "direct": {"ellipses.png", "opacity.png", "share.png", "dominant.png"},
    "field": {"ellipses.png", "opacity.png", "classes.png", "bank.png"},
    "official": {"ellipses.png", "ellipses_selected.png", "opacity.png", "classes.png",
                 "bank.png"},
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    write_image("photo.png", picture)
    save_model("model", random_model("direct"))
    return tmp_path


@pytest.mark.parametrize("mode", list(FILES))
def test_command(mode, here, picture, capsys):
    model = random_model(mode)
    save_model("model", model)
    argv = ["inspect", "photo.png", "--model", "model", "-o", "a/b"]
    cli.main([*argv, "--crop", "2,1,9,7", "--zoom", "4"])
    assert set(os.listdir("a/b")) == FILES[mode] | {"inspection.json"}
    assert Image.open("a/b/ellipses.png").size == (36, 28)
    out = capsys.readouterr().out
    assert all(f"a/b/{name}: " in out for name in FILES[mode])
    report = json.loads(open("a/b/inspection.json").read())
    assert set(report["pictures"]) == FILES[mode]
    assert report["crop"] == {"x": 2, "y": 1, "width": 9, "height": 7}
    assert report["photo"] == {"width": 17, "height": 12, "name": "photo.png"}
    assert report["model"]["mode"] == report["mode"] == mode
    assert abs(sum(report["usage"]["shares"]) - 1) < 1e-9
    if mode == "direct":
        assert Image.open("a/b/dominant.png").size == Image.open("a/b/share.png").size == (36, 28)
    else:
        classes = look.class_map(model, picture)
        shares = np.bincount(classes.ravel(), minlength=9) / classes.size
        np.testing.assert_allclose(report["usage"]["shares"], shares)
        assert report["usage"]["used"] == len(np.unique(classes))
        times = 960 // 17
        drawn = read_image("a/b/classes.png")
        assert drawn.shape == (12 * times, 17 * times, 3)
        np.testing.assert_array_equal(drawn[::times, ::times], look.palette(9)[classes])
    cli.main([*argv, "-q"])  # the same folder again; a small photo is drawn whole
    assert Image.open("a/b/ellipses.png").size == (272, 192) and capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", list(FILES))
@pytest.mark.parametrize("where", ["encoder", "head"])
def test_a_model_that_is_not_finite_is_refused(mode, where, here, picture, capsys):
    """All weights are finite, but what they make overflows."""
    model = random_model(mode)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = "encoder" if where == "encoder" else "head."
            if name.startswith(last) and parameter.ndim == 4:
                parameter.copy_(torch.randn_like(parameter) * 3e37)
    save_model("model", model)
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", "photo.png", "-o", "out", "--model", "model"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "not finite for this photo; its weights are damaged" in err
    assert not os.path.exists("out")
    with pytest.raises(InputError, match="not finite"):
        look.draw_gaussians(model, picture)


def test_what_overflows_only_as_it_is_summed_is_refused(picture, monkeypatch):
    monkeypatch.setattr(look, "share", lambda *_: np.full((2, 2, 3), np.inf, np.float32))
    with pytest.raises(InputError, match="not finite"):
        look.inspect(random_model("direct"), picture)


def test_a_run_is_named_with_what_it_wrote(here):
    save_model("mine/best", random_model("direct"))
    cli.main(["inspect", "photo.png", "-o", "out", "--model", "mine/best", "-q"])
    assert json.loads(open("out/inspection.json").read())["model"]["checkpoint"] == "mine/best"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--crop", "10,0,8,4"], "--crop 10,0,8,4 is no part of the photo's 17 x 12 pixels"),
        (["--crop=-1,0,4,4"], "is no part of the photo's"),
        (["--crop", "1,1,0,4"], "is no part of the photo's"),
        (["--zoom", "0"], "zoom (--zoom) must be from 1 to 64, not 0"),
        (["--model", "none"], "none: there is no such model"),
        (["-o", "photo.png"], "--output photo.png is a file"),
        (["-o", "photo.png/a/b"], "the folder photo.png may not be written to (Not a directory)"),
        (["--scale", "0"], "scale must be positive"),
        (["--threads", "0"], "--threads must be"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_refusals_of_the_command(argv, sentence, here, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", "photo.png", "-o", "out", "--model", "model", *argv])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("gsr: error: ") and err.count("\n") == 1 and sentence in err
    assert sorted(os.listdir()) == ["model", "photo.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_a_name_that_is_no_utf8(here):
    name = os.fsdecode(b"B\xe4ume.png")
    os.rename("photo.png", name)
    cli.main(["inspect", name, "-o", "out", "--model", "model", "-q"])
    assert json.loads(open("out/inspection.json").read())["photo"]["name"] == name


def test_the_photo_is_not_overwritten(here, capsys):
    os.mkdir("out")
    os.rename("photo.png", "out/opacity.png")
    with pytest.raises(SystemExit):
        cli.main(["inspect", "out/opacity.png", "-o", "out", "--model", "model"])
    assert "would overwrite the photo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["inspect", "out/opacity.png", "-o", "x", "--crop", "1,2,3"])
    assert "is not left,top,width,height" in capsys.readouterr().err


def test_official_needs_a_scale_that_fits(here, capsys):
    save_model("model", random_model("official"))
    with pytest.raises(SystemExit):
        cli.main(["inspect", "photo.png", "-o", "out", "--model", "model", "--scale", "0.5"])
    err = capsys.readouterr().err
    assert "official mode cannot render at scale 0.5" in err and not os.path.exists("out")
