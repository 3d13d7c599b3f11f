"""Transparent images: no outline of hidden colours, and an alpha as sharp as the image."""

import numpy as np
import pytest
from PIL import Image

import gsr
from gsr.inference.alpha import fill_hidden
from gsr.inference.upscale import upscale_to_file


def disc(colour=(255, 255, 255), hidden=(0, 0, 0), size=48):
    """A disc of one colour, its edge antialiased, over pixels of alpha 0 that hide another."""
    y, x = np.mgrid[0:size, 0:size] - (size - 1) / 2
    alpha = (np.clip(size / 3 + 0.5 - np.hypot(y, x), 0, 1) * 255).round().astype(np.uint8)
    rgb = np.where(alpha[..., None] > 0, colour, hidden).astype(np.uint8)
    return np.dstack([rgb, alpha])


@pytest.mark.parametrize("hidden", [(0, 0, 0), (0, 255, 0)])
def test_a_white_disc_on_white_is_white(hidden):
    """The bundled model: laid on white, nothing of the hidden colour is seen."""
    image = Image.fromarray(disc(hidden=hidden))
    large = gsr.upscale(image, 2)
    white = Image.new("RGBA", large.size, "white")
    white.alpha_composite(large)
    assert np.asarray(white)[..., :3].min() >= 252


def test_a_file_by_strips_has_no_outline_either(tmp_path):
    upscale_to_file(tmp_path / "a.png", Image.fromarray(disc()), 2)
    with Image.open(tmp_path / "a.png") as large:
        assert np.array_equal(large, gsr.upscale(disc(), 2))


def test_alpha_is_nearer_to_the_truth_than_bicubic():
    truth = disc(size=96)[..., 3].astype(float)
    small = Image.fromarray(disc(size=96)[..., 3]).resize((48, 48), Image.Resampling.BICUBIC)
    rgba = np.dstack([np.full((48, 48, 3), 200, np.uint8), small])
    bicubic = np.asarray(small.resize((96, 96), Image.Resampling.BICUBIC))
    result = gsr.upscale(rgba, 2)[..., 3]
    assert ((result - truth) ** 2).mean() < 0.7 * ((bicubic - truth) ** 2).mean()


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_constant_alpha_stays_and_changes_no_colour(tiny_model, image, level):
    rgba = np.dstack([image, np.full(image.shape[:2], level, np.uint8)])
    result = gsr.upscale(rgba, 2, model=tiny_model)
    assert (result[..., 3] == level).all()
    np.testing.assert_array_equal(result[..., :3], gsr.upscale(image, 2, model=tiny_model))


@pytest.mark.parametrize("size", [(1, 2), (5, 7), (40, 33)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_fill_hidden(size, kind):
    rng = np.random.default_rng(0)
    top = 1 if kind == np.float32 else np.iinfo(kind).max
    colour = (rng.random((*size, 3)) * top).astype(kind)
    alpha = (rng.random(size) * top).astype(kind) * (rng.random(size) > 0.9)
    alpha = alpha.astype(kind)
    alpha[0, 0] = top
    alpha[-1, -1] = 0
    filled = fill_hidden(colour, alpha)
    assert filled.dtype == kind and filled is not colour
    visible = alpha > 0
    assert np.array_equal(filled[visible], colour[visible])
    low, high = colour[visible].min(0), colour[visible].max(0)
    near = 1e-6 if kind == np.float32 else 1  # a mean is rounded
    assert (filled >= low - near * (low > 0)).all() and (filled <= high.astype(float) + near).all()
    # The colours of hidden pixels play no part.
    other = np.where(visible[..., None], colour, 0).astype(kind)
    assert np.array_equal(fill_hidden(other, alpha), filled)


def test_where_nothing_or_everything_is_visible_colours_stay():
    colour = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    for level in (0, 255):
        assert fill_hidden(colour, np.full((2, 2), level, np.uint8)) is colour
