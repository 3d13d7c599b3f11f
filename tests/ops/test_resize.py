"""`imresize` against rational arithmetic, PyTorch's antialiased bicubic, and MATLAB's own files."""

import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gsr.errors import InputError
from gsr.io.image import read_image
from gsr.ops.resize import imresize


def keys(x: Fraction) -> Fraction:
    x, half = abs(x), Fraction(1, 2)
    if x <= 1:
        return 3 * half * x**3 - 5 * half * x**2 + 1
    if x < 2:
        return -half * x**3 + 5 * half * x**2 - 4 * x + 2
    return Fraction(0)


def resize_line(line: list, size: int, scale: Fraction) -> list:
    """One line of pixels in exact arithmetic: every input position within reach, edges repeated."""
    shrink, last, result = min(scale, Fraction(1)), len(line) - 1, []
    for i in range(size):
        centre = (i + Fraction(1, 2)) / scale - Fraction(1, 2)
        reach = range(math.floor(centre - 2 / shrink), math.ceil(centre + 2 / shrink) + 1)
        weights = {j: keys(shrink * (centre - j)) for j in reach}
        total = sum(weights.values())
        result.append(sum(w * line[min(max(j, 0), last)] for j, w in weights.items()) / total)
    return result


def exact(plane: np.ndarray, size: tuple[int, int], rows_first: bool) -> np.ndarray:
    """`imresize` of uint8 [H, W]: rounded, halves up, and clipped after each dimension."""
    grid = [[Fraction(int(v)) for v in row] for row in plane]
    for rows in (rows_first, not rows_first):
        if rows:
            grid = [list(column) for column in zip(*grid, strict=True)]
        n = size[0] if rows else size[1]
        grid = [resize_line(line, n, Fraction(n, len(line))) for line in grid]
        grid = [[min(max(math.floor(v + Fraction(1, 2)), 0), 255) for v in line] for line in grid]
        if rows:
            grid = [list(column) for column in zip(*grid, strict=True)]
    return np.array(grid, dtype=np.uint8)


@pytest.mark.parametrize(
    "size, rows_first",
    [
        ((6, 9), True),  # x 1/2
        ((4, 6), True),  # x 1/3
        ((3, 5), True),  # x 1/4, 3 / 11.3: the rows shrink more
        ((10, 4), False),  # the columns shrink more
        ((24, 36), True),  # x 2
        ((31, 50), True),
        ((5, 40), True),  # shrinks one way and grows the other
        ((1, 1), False),
    ],
)
def test_imresize_equals_exact_arithmetic(size, rows_first):
    image = np.random.default_rng(1).integers(0, 256, (12, 18), np.uint8)
    image[:4, :6] = 255  # an edge that over- and undershoots, so that clipping shows
    image[4:6] = 0
    assert np.array_equal(imresize(image, size=size), exact(image, size, rows_first))


def test_imresize_order_of_dimensions_matters_here():
    # Otherwise the test above could not tell them apart.
    image = np.random.default_rng(1).integers(0, 256, (12, 18), np.uint8)
    assert not np.array_equal(exact(image, (6, 9), True), exact(image, (6, 9), False))
    assert not np.array_equal(exact(image, (10, 4), True), exact(image, (10, 4), False))


def test_imresize_known_values():
    # Keys' cubic at 1/4, 3/4, 5/4 and 7/4 pixels is 111, 29, -9 and -3 parts of 128.
    line = np.zeros((1, 7))
    line[0, 3] = 128
    grown = imresize(line, size=(1, 14))
    np.testing.assert_allclose(grown, [[0, 0, 0, -3, -9, 29, 111, 111, 29, -9, -3, 0, 0, 0]])
    # Twice as wide and half as high where it shrinks; ceil(7 / 2) pixels remain.
    shrunk = imresize(line * 4, scale=(1, 0.5))
    np.testing.assert_allclose(shrunk, [[-18, 222, 58, -6]])


@pytest.mark.parametrize("size", [(20, 30), (17, 26), (80, 120), (95, 131)])
def test_imresize_equals_torch_away_from_the_edges(size):
    # PyTorch's antialiased bicubic has a = -0.5 too, but drops what lies beyond an edge.
    image = np.random.default_rng(2).random((40, 60, 3))
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
    margin = [math.ceil(2 * max(n / m, 1)) for n, m in zip(size, (40, 60), strict=True)]
    inside = tuple(slice(m, -m) for m in margin)
    ours = imresize(image, size=size)
    np.testing.assert_allclose(ours[inside], expected[0].permute(1, 2, 0)[inside], atol=1e-6)


def test_imresize_keeps_kind_and_channels():
    image = np.random.default_rng(3).integers(0, 256, (9, 8, 3), np.uint8)
    ours = imresize(image, 0.5)
    assert ours.shape == (5, 4, 3) and ours.dtype == np.uint8
    for c in range(3):
        assert np.array_equal(ours[..., c], imresize(image[..., c], 0.5))
    overshoot = imresize(np.float32([[0, 0, 1, 1]]), (1, 2))
    assert overshoot.dtype == np.float32 and overshoot.min() < 0 and overshoot.max() > 1
    assert np.array_equal(imresize(image, size=(9, 8)), image)


@pytest.mark.parametrize(
    "image, kwargs, part",
    [
        (np.zeros((4, 4), np.uint8), {}, "either scale or size"),
        (np.zeros((4, 4), np.uint8), {"scale": 2, "size": (8, 8)}, "either scale or size"),
        (np.zeros((4, 4), np.uint8), {"scale": 0}, "greater than 0"),
        (np.zeros((4, 4), np.uint8), {"scale": math.nan}, "finite"),
        (np.zeros((4, 4), np.uint8), {"scale": (1, 2, 3)}, "scale"),
        (np.zeros((4, 4), np.uint8), {"size": (0, 4)}, "size"),
        (np.zeros((4, 4), np.uint8), {"size": (2.5, 4)}, "size"),
        (np.zeros((4, 4), np.int32), {"scale": 2}, "int32"),
        (np.zeros(4), {"scale": 2}, "[4]"),
        (np.zeros((0, 4)), {"scale": 2}, "[0, 4]"),
    ],
)
def test_imresize_refuses(image, kwargs, part):
    with pytest.raises(InputError) as error:
        imresize(image, **kwargs)
    assert part in str(error.value)


@pytest.mark.skipif(
    "GSR_BENCHMARKS" not in os.environ, reason="set GSR_BENCHMARKS to Set5's parent"
)
@pytest.mark.parametrize("name", ["Set5", "Set14", "B100"])
def test_imresize_makes_the_benchmarks_files(name):
    folder = Path(os.environ["GSR_BENCHMARKS"]) / name
    paths = sorted((folder / "HR").iterdir())
    assert paths
    for path in paths:
        hr = read_image(path)
        for s in (2, 3, 4):
            lr = read_image(folder / f"LR_bicubic/X{s}/{path.stem}x{s}.png")
            h, w = lr.shape[:2]
            assert np.array_equal(imresize(hr[: h * s, : w * s], 1 / s), lr), (path.name, s)
