"""The splat oracle: against its formula, written as loops, and what follows from it."""

import math

import pytest
import torch

from gsr.ops import splat, splat_at
from gsr.ops.reference import grid_points


def gaussians(b=1, k=2, c=3, h=4, w=5, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(b, k, *shape, h, w, generator=g, dtype=dtype)

    return {
        "values": rand(c) * 2 - 1,
        "sigma": rand(2) * 0.8 + 0.2,
        "rho": rand() * 1.8 - 0.9,
        "opacity": rand(),
        "offset": rand(2) - 0.5,
    }


def by_loops(values, sigma, rho, opacity, offset, size, radius, normalize, eps):
    b, k, c, h, w = values.shape
    out = torch.zeros(b, c, *size, dtype=values.dtype)
    for n in range(b):
        for y in range(size[0]):
            for x in range(size[1]):
                py = (y + 0.5) * h / size[0] - 0.5
                px = (x + 0.5) * w / size[1] - 0.5
                ny, nx = math.floor(py + 0.5), math.floor(px + 0.5)
                total = 0.0
                for i in range(max(0, ny - radius), min(h, ny + radius + 1)):
                    for j in range(max(0, nx - radius), min(w, nx + radius + 1)):
                        for m in range(k):
                            s_y, s_x = sigma[n, m, :, i, j].tolist()
                            o_y, o_x = offset[n, m, :, i, j].tolist()
                            u, v = (py - i - o_y) / s_y, (px - j - o_x) / s_x
                            r = rho[n, m, i, j].item()
                            q = (u * u - 2 * r * u * v + v * v) / (1 - r * r)
                            weight = opacity[n, m, i, j].item() * math.exp(-q / 2)
                            total += weight
                            out[n, :, y, x] += weight * values[n, m, :, i, j]
                if normalize:
                    out[n, :, y, x] /= total + eps
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "size, radius", [((9, 11), 1), ((4, 5), 0), ((13, 6), 2), ((3, 20), 3), ((1, 1), 1)]
)
def test_splat_is_its_formula(size, radius, normalize):
    g = gaussians(b=2, dtype=torch.float64)
    out = splat(**g, size=size, radius=radius, normalize=normalize, eps=0.01)
    expected = by_loops(**g, size=size, radius=radius, normalize=normalize, eps=0.01)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


def test_one_pixel_image():
    g = gaussians(h=1, w=1, dtype=torch.float64)
    out = splat(**g, size=(5, 7), radius=3)
    expected = by_loops(**g, size=(5, 7), radius=3, normalize=True, eps=1e-6)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


def test_gradients():
    g = {k: v.requires_grad_() for k, v in gaussians(h=3, w=2, dtype=torch.float64).items()}

    def f(*tensors):
        return splat(**dict(zip(g, tensors, strict=True)), size=(4, 5), radius=1)

    torch.autograd.gradcheck(f, tuple(g.values()))


def test_no_offset_is_offset_zero():
    g = gaussians()
    g["offset"] = torch.zeros_like(g["offset"])
    with_zero = splat(**g, size=(9, 9))
    del g["offset"]
    torch.testing.assert_close(splat(**g, size=(9, 9)), with_zero, atol=0, rtol=0)


def test_rows_are_rows_of_the_whole():
    g = gaussians()
    whole = splat(**g, size=(11, 9), radius=1)
    torch.testing.assert_close(
        splat(**g, size=(11, 9), radius=1, rows=(3, 8)), whole[:, :, 3:8], atol=0, rtol=0
    )


def test_points_of_the_grid_give_the_grid():
    g = gaussians(b=2)
    points = grid_points(4, 5, (7, 6)).expand(2, -1, -1)
    at = splat_at(**g, points=points, radius=1)
    whole = splat(**g, size=(7, 6), radius=1)
    torch.testing.assert_close(at.mT.reshape(2, 3, 7, 6), whole, atol=0, rtol=0)


def test_constant_values_stay_constant():
    g = gaussians()
    g["values"] = torch.full_like(g["values"], 0.37)
    g["opacity"] = g["opacity"] + 0.1
    out = splat(**g, size=(13, 17), radius=3)
    torch.testing.assert_close(out, torch.full_like(out, 0.37), atol=1e-4, rtol=0)


def test_half_way_between_pixels_belongs_to_the_right_one():
    g = gaussians(k=1, h=1, w=2)
    g["offset"] = torch.zeros_like(g["offset"])
    out = splat_at(**g, points=torch.tensor([[[0.0, 0.5]]]), radius=0)
    torch.testing.assert_close(out[0, 0], g["values"][0, 0, :, 0, 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sigma", "rho", "opacity", "offset"])
def test_wrong_shape_names_the_argument(name):
    g = gaussians()
    g[name] = g[name][..., :-1]
    with pytest.raises(ValueError, match=name):
        splat(**g, size=(8, 8))


def test_wrong_points_and_radius():
    g = gaussians()
    with pytest.raises(ValueError, match="points"):
        splat_at(**g, points=torch.zeros(2, 5, 2))
    with pytest.raises(ValueError, match="radius"):
        splat(**g, size=(8, 8), radius=-1)
    g["values"] = g["values"][0]
    with pytest.raises(ValueError, match="values"):
        splat(**g, size=(8, 8))
