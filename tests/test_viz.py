"""Ellipses lie where the splat puts the Gaussians; maps and statistics show what the model says."""

import argparse
import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from gsr import cli, viz
from gsr.config import BankConfig, DecoderConfig, DirectConfig, EncoderConfig, ModelConfig
from gsr.errors import InputError
from gsr.io.image import read_image, to_tensor, write_image
from gsr.models import GaussianSR
from gsr.models.checkpoint import save_model
from gsr.models.heads.official import shared_splat, whole_windows, window_kernels
from gsr.ops import splat_at
from gsr.viz import Crop, Gaussians

CROP = Crop(slice(3, 9), slice(4, 12))


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)


def random_model(mode, encoder=None, **bank):
    torch.manual_seed(0)
    config = ModelConfig(
        mode=mode,
        encoder=encoder or EncoderConfig(n_feats=12, n_blocks=1),
        direct=DirectConfig(gaussians=3, width=8),
        bank=BankConfig(points=9, **bank),
        decoder=DecoderConfig(hidden_dim=8, hidden_list=[8]),
    )
    model = GaussianSR(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def one_gaussian(centre, sigma, rho=0.0, opacity=1.0, label=0):
    pair = np.array([centre], float), np.array([sigma], float)
    return Gaussians(*pair, np.array([rho]), np.array([opacity]), np.array([label]), 4)


def covariance(sigma, rho):
    y, x = sigma
    return np.array([[y * y, rho * y * x], [rho * y * x, x * x]])


# ---- ellipses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.7, -0.7])
def test_an_ellipse_is_drawn_where_the_formula_says(rho):
    zoom, image = 8, np.full((14, 16, 3), 40, np.uint8)
    centre, sigma = np.array([6.25, 7.5]), np.array([4.0, 2.0])
    drawn = viz.draw_ellipses(one_gaussian(centre, sigma, rho), image, zoom).astype(int)
    assert drawn.shape == (14 * 8, 16 * 8, 3)
    changed = np.abs(drawn - drawn[0, 0]).max(2)
    # Points close together on the contour, in pixels of the drawing, 8 for each LR pixel.
    t = np.linspace(0, 2 * np.pi, 2000)
    circle = np.stack([np.cos(t), np.sin(t)])
    edge = centre[:, None] + np.linalg.cholesky(covariance(sigma, rho)) @ circle
    edge = (edge + 0.5) * zoom - 0.5
    pixels = np.argwhere(changed > 0)
    away = np.linalg.norm(pixels[:, None] - edge.T[None], axis=2).min(1)
    assert away.max() < viz.LINE / 2 + 1
    y, x = np.rint(edge).astype(int)
    assert changed[y, x].min() > 0.3 * changed.max()


def test_the_opacity_is_how_visible_a_contour_is(monkeypatch):
    black = np.zeros((9, 17, 3), np.uint8)
    peaks = [
        viz.draw_ellipses(one_gaussian((4, 4), (2, 2), opacity=o), black, 8).max()
        for o in (1, 0.5, 0)
    ]
    assert abs(peaks[0] - 233) <= 1 and abs(peaks[1] - 116) <= 3 and peaks[2] == 0
    saddle = one_gaussian((4, 4), (2, 2), rho=1.5)  # has no contour
    assert viz.draw_ellipses(saddle, black, 8).max() == 0
    monkeypatch.setattr(viz, "CHUNK", 1)
    three = Gaussians(
        np.array([[4.0, 4.0], [4.0, 4.0], [4.0, 12.0]]), np.full((3, 2), 2.0), np.zeros(3),
        np.array([1.0, 0.5, 1.0]), np.array([0, 1, 2]), 3,
    )  # fmt: skip
    drawn = viz.draw_ellipses(three, black, 8)
    for left, label in ((0, 0), (72, 2)):  # the first is on top of the second
        part = drawn[:, left : left + 64].reshape(-1, 3)
        colour = part[part.sum(1).argmax()].astype(int)
        assert np.abs(colour - viz.palette(3)[label]).max() < 40


@pytest.mark.parametrize(
    "mode, bank", [("direct", {}), ("field", {}), ("field", {"assignment": "softmax"})]
)
def test_the_gaussians_are_those_that_are_splatted(mode, bank, image):
    """At the contour of each, its own splat has fallen to exp(-1/2) of its peak."""
    model = random_model(mode, **bank)
    g = viz.survey(model, image, CROP).gaussians
    with torch.no_grad():
        e = model.encode(to_tensor(image))
    if mode == "direct":
        sigma, rho, opacity, offset = e.sigma, e.rho, e.opacity, e.offset
    else:
        sigma, opacity, rho = e.gaussians.split([2, 1, 1], 1)
        sigma, offset = sigma[:, None], torch.zeros_like(sigma[:, None])
    shape = (rho.shape[1], *CROP.size)
    assert len(g.centre) == math.prod(shape)
    for n in (0, 5, math.prod(shape) // 2, math.prod(shape) - 1):
        k, y, x = np.unravel_index(n, shape)
        values = torch.zeros(1, *rho.shape[1:])[:, :, None]
        values[0, k, 0, y + CROP.rows.start, x + CROP.columns.start] = 1  # this Gaussian alone
        edge = viz.contours(g.sigma[n : n + 1], g.rho[n : n + 1])[0]
        points = g.centre[n] + CROP.start + np.concatenate([np.zeros((1, 2)), edge])
        out = splat_at(
            values, sigma, rho, opacity, torch.from_numpy(points)[None], offset, radius=3,
            normalize=False,
        )  # fmt: skip
        peak, *others = out.flatten().tolist()
        assert abs(peak - g.opacity[n]) < 1e-5
        np.testing.assert_allclose(others, peak * math.exp(-0.5), rtol=1e-4)
        assert g.label[n] == k or mode == "field"


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
    image = np.random.default_rng(0).integers(0, 256, (*lr_size, 3), dtype=np.uint8)
    crop = Crop(slice(1, 8), slice(5, lr_size[1]))
    g = viz.survey(model, image, crop, scale=scale).gaussians
    with torch.no_grad():
        whole = whole_windows(model.encode(to_tensor(image)).gaussians, window)
    size = tuple(round(scale * n) for n in lr_size)
    features = torch.zeros(1, 1, *whole.shape[-2:])
    features[0, 0, 3, 10] = 1  # in the middle of a window
    kernels = window_kernels(whole, window, 41)
    out = shared_splat(features, kernels, (56, 56), size)[0, 0].double().numpy()
    grid = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / scale - 0.5 for n in size), indexing="ij"))
    mean = (out * grid).sum((1, 2)) / out.sum()
    away = grid - mean[:, None, None]
    moments = np.einsum("iyx,jyx,yx->ij", away, away, out) / out.sum()

    n = np.linalg.norm(g.centre + crop.start - mean, axis=1).argmin()
    np.testing.assert_allclose(g.centre[n] + crop.start, mean, atol=0.02)
    np.testing.assert_allclose(covariance(g.sigma[n], g.rho[n]), moments, rtol=0.02, atol=2e-3)
    assert abs(g.opacity[n] - 0.8) < 1e-6 and g.label[n] == 3 * 7 + 3
    assert (g.centre >= -0.5).all() and (g.centre < np.array(crop.size) - 0.5).all()


# ---- maps and statistics ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["field", "official"])
@pytest.mark.parametrize("assignment", ["argmax", "gumbel"])
def test_classes_are_the_argmax(mode, assignment, image):
    model = random_model(mode, assignment=assignment)  # the mode of gumbel is the largest logit
    with torch.no_grad():
        logits = model.head.classifier(model.encoder(to_tensor(image)))
        table = model.head.bank.table().numpy()
    classes = logits[0].argmax(0).numpy()[CROP]
    assert len(np.unique(classes)) > 2
    found = viz.survey(model, image, CROP)
    np.testing.assert_array_equal(found.classes, classes)
    np.testing.assert_allclose(found.opacity, table[classes, 2], rtol=1e-6)
    drawn = viz.inspect(model, image, CROP, zoom=4)[0]["classes.png"]
    np.testing.assert_array_equal(drawn[::4, 3::4], viz.palette(9)[classes])
    if mode == "field":  # an ellipse has the colour of its class
        np.testing.assert_array_equal(found.gaussians.label, classes.ravel())
        assert found.gaussians.labels == 9


def test_statistics(image):
    model = random_model("direct")
    with torch.no_grad():
        e = model.encode(to_tensor(image))
    found = viz.survey(model, image, CROP)
    named = {
        "opacity": e.opacity, "sigma_y": e.sigma[:, :, 0], "sigma_x": e.sigma[:, :, 1], "rho": e.rho
    }  # fmt: skip
    for name, values in named.items():
        v = values[(..., *CROP)].double().numpy()
        expected = {"mean": v.mean(), "std": v.std(), "min": v.min(), "max": v.max()}
        assert found.statistics[name] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(found.opacity, e.opacity[0].mean(0).numpy()[CROP], rtol=1e-5)
    assert found.classes is None


SWINIR = EncoderConfig(name="swinir", dim=12, depths=[2], heads=2, window=4)


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
@pytest.mark.parametrize("encoder", [None, SWINIR], ids=["edsr", "swinir"])
def test_a_crop_is_encoded_as_in_the_whole_image(mode, encoder, monkeypatch):
    model = random_model(mode, encoder)
    image = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    crop = Crop(slice(27, 31), slice(22, 25))
    whole = viz.survey(model, image)
    monkeypatch.setattr(viz, "BAND_PIXELS", 150)
    part = viz.survey(model, image, crop)
    np.testing.assert_allclose(part.opacity, whole.opacity[crop], atol=1e-5)
    of_whole, of_part = (
        np.column_stack([g.centre, g.sigma, g.rho, g.opacity, g.label])
        for g in (whole.gaussians, part.gaussians)
    )
    of_part[:, :2] += crop.start
    assert len(of_part) > 0
    for one in of_part:
        assert np.abs(of_whole - one).max(1).min() < 1e-4


def test_colours_differ():
    for count in (1, 4, 8, 100, 400):
        colours = viz.palette(count)
        assert colours.shape == (count, 3) and len({tuple(c) for c in colours}) == count


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_a_model_in_training_stays_as_it_is(mode, image):
    model = random_model(mode).train()
    model.encoder.eval()
    before, state = [m.training for m in model.modules()], torch.random.get_rng_state()
    drawn = viz.draw_gaussians(model, image, zoom=4)
    assert drawn.shape == (48, 68, 3) and drawn.dtype == np.uint8
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(drawn, viz.draw_gaussians(model.eval(), image, zoom=4))
    turned = viz.draw_gaussians(model, image[::-1], zoom=4)  # a view, as flips give it
    np.testing.assert_array_equal(turned, viz.draw_gaussians(model, image[::-1].copy(), zoom=4))


def test_functions_refuse_what_cannot_be_drawn(image):
    model = random_model("direct")
    for wrong in (image / 255.0, image[..., 0], image[..., None], None):
        with pytest.raises(InputError, match=r"uint8 array \[h, w, 3\]"):
            viz.draw_gaussians(model, wrong)
    with pytest.raises(InputError, match="no part of the image's 17 x 0 pixels"):
        viz.draw_gaussians(model, image[:0])
    with pytest.raises(InputError, match="zoom"):
        viz.draw_gaussians(model, image, 0)
    for side, zoom in ((600, 1), (500, 9)):
        with pytest.raises(InputError, match="too many to draw"):
            viz.draw_gaussians(model, np.zeros((side, side, 3), np.uint8), zoom)
    with pytest.raises(InputError, match="mode liif has no Gaussians to draw"):
        viz.draw_gaussians(random_model("liif"), image)


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch, image):
    monkeypatch.chdir(tmp_path)
    write_image("photo.png", image)
    save_model("model", random_model("direct"))


def refused(capsys, *argv):
    """The one line that `gsr inspect` prints before it exits with 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", *argv])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "Traceback" not in err
    return err


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
def test_command(mode, here, image, capsys):
    save_model("runs/best", random_model(mode))
    argv = ["inspect", "photo.png", "--model", "runs/best", "-o", "a/b"]
    cli.main([*argv, "--crop", "4,3,8,6", "--zoom", "4"])
    files = {"ellipses.png", "opacity.png"} | ({"classes.png"} if mode != "direct" else set())
    assert set(os.listdir("a/b")) == files | {"inspection.json"}
    assert {Image.open(f"a/b/{name}").size for name in files} == {(32, 24)}
    report = json.loads(open("a/b/inspection.json").read())
    assert report["crop"] == {"x": 4, "y": 3, "width": 8, "height": 6}
    assert report["model"]["mode"] == mode and report["model"]["checkpoint"] == "runs/best"
    assert set(report["drawings"]) == files and report["image"] == "photo.png"
    found = viz.survey(random_model(mode), image, CROP)
    for name, row in found.statistics.items():
        assert report["statistics"][name] == pytest.approx(row, rel=1e-5)
    out = capsys.readouterr().out
    assert all(f"a/b/{name}: " in out for name in files)
    (line,) = (line for line in out.splitlines() if line.startswith("sigma_y"))
    assert line.split()[1:] == [f"{v:.4f}" for v in found.statistics["sigma_y"].values()]
    grey = read_image("a/b/opacity.png")[::4, ::4, 0] / 255
    low, high = found.opacity.min(), found.opacity.max()
    np.testing.assert_allclose(grey, (found.opacity - low) / (high - low), atol=0.01)
    cli.main([*argv, "-q"])  # the same folder again; a small image is drawn whole
    assert Image.open("a/b/ellipses.png").size == (272, 192) and capsys.readouterr().out == ""


def test_the_parser_fits_into_another(here):
    parser = argparse.ArgumentParser(prog="any")
    viz.add_parser(parser.add_subparsers())
    args = parser.parse_args(["inspect", "photo.png", "-o", "out", "--model", "model", "-q"])
    args.run(args)
    assert sorted(os.listdir("out")) == ["ellipses.png", "inspection.json", "opacity.png"]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--crop", "10,0,8,4"], "--crop 10,0,8,4 is no part of the image's 17 x 12 pixels"),
        (["--crop=-1,0,4,4"], "is no part of the image's"),
        (["--crop", "1,1,0,4"], "is no part of the image's"),
        (["--zoom", "0"], "zoom (--zoom) must be at least 1, not 0"),
        (["--zoom", "300"], "17 x 12 pixels at zoom 300 are too many to draw"),
        (["--model", "none"], "none: there is no such model"),
        (["--model", "liif"], "mode liif has no Gaussians to draw"),
        (["--model", "official", "--scale", "0.5"], "official mode cannot render at scale 0.5"),
        (["-o", "photo.png"], "--output photo.png is a file"),
        (["-o", "photo.png/a/b"], "the folder photo.png may not be written to (Not a directory)"),
        (["--scale", "0"], "scale must be positive"),
        (["--threads", "0"], "--threads must be"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_arguments_give_one_sentence(argv, sentence, here, capsys):
    for mode in ("liif", "official"):
        save_model(mode, random_model(mode))
    before = sorted(os.listdir())
    err = refused(capsys, "photo.png", "-o", "out", "--model", "model", *argv)
    assert err.startswith("gsr: error: ") and err.count("\n") == 1 and sentence in err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("mode", ["direct", "field", "official"])
@pytest.mark.parametrize("where", ["encoder", "head"])
def test_a_model_that_is_not_finite_is_refused(mode, where, here, image, capsys):
    """All weights are finite, but what they make overflows."""
    model = random_model(mode)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(where) and parameter.ndim == 4:
                parameter.copy_(torch.randn_like(parameter) * 3e37)
    save_model("model", model)
    err = refused(capsys, "photo.png", "-o", "out", "--model", "model")
    assert "not finite for this image; its weights are damaged" in err
    assert not os.path.exists("out")


def test_files_are_whole_or_as_they_were(here, capsys, monkeypatch):
    argv = ["photo.png", "-o", "out", "--model", "model"]
    cli.main(["inspect", *argv, "-q"])
    before = {name: open(f"out/{name}", "rb").read() for name in os.listdir("out")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in refused(capsys, *argv, "--zoom", "4")
    assert {name: open(f"out/{name}", "rb").read() for name in os.listdir("out")} == before


def test_bad_names_and_numbers(here, capsys):
    os.mkdir("out")
    os.rename("photo.png", "out/opacity.png")
    err = refused(capsys, "out/opacity.png", "-o", "out", "--model", "model")
    assert "out/opacity.png would overwrite the image" in err
    err = refused(capsys, "out/opacity.png", "-o", "x", "--crop", "1,2,3")
    assert "'1,2,3' is not x,y,width,height in pixels" in err
