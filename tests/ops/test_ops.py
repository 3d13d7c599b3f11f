"""The operators as PyTorch sees them: schema, fake, autograd, compile, export. On the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gsr import ops
from gsr.ops import reference, splat, splat_at, splat_windows
from gsr.ops.arguments import Gaussians, Grid, Weighting


def inputs(b=2, k=2, c=3, h=5, w=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(b, k, *shape, h, w, generator=g, dtype=dtype)

    tensors = [rand(c) * 2 - 1, rand(2) * 0.8 + 0.2, rand() * 1.6 - 0.8, rand() + 0.1]
    points = torch.rand(b, 7, 2, generator=g, dtype=dtype) * 6 - 1
    return [t.requires_grad_() for t in tensors], (rand(2) - 0.5).requires_grad_(), points


@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_opcheck(with_offset, normalize):
    tensors, offset, points = inputs()
    offset = offset if with_offset else None
    grid = ((9, 7), (2, 8), 1, normalize, 0.01, (0, 5))
    torch.library.opcheck(torch.ops.gsr.splat.default, (*tensors, offset, *grid))
    torch.library.opcheck(
        torch.ops.gsr.splat_at.default, (*tensors, offset, points, 1, normalize, 0.01)
    )
    plain = [t.detach() for t in tensors]
    plain_offset = offset.detach() if with_offset else None
    torch.library.opcheck(
        torch.ops.gsr.splat_backward.default,
        (torch.randn(2, 3, 6, 7, dtype=torch.float64), *plain, plain_offset, *grid),
    )
    torch.library.opcheck(
        torch.ops.gsr.splat_at_backward.default,
        (torch.randn(2, 7, 3, dtype=torch.float64), *plain, plain_offset, points, 1, True, 0.01),
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    tensors, offset, points = inputs(b=1, h=3, w=3)

    def grid(*t):
        return splat(*t[:4], (4, 5), t[4], radius=1, normalize=normalize, eps=0.01)

    def at(*t):
        return splat_at(*t[:4], points, t[4], radius=1, normalize=normalize, eps=0.01)

    assert torch.autograd.gradcheck(grid, (*tensors, offset))
    assert torch.autograd.gradcheck(at, (*tensors, offset))


def windows_inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    features = torch.rand(2, 3, 6, 4, generator=g, dtype=dtype) * 3 - 1  # some beyond the clamp
    kernels = torch.rand(4, 3, 3, generator=g, dtype=dtype)
    return features.requires_grad_(), kernels.requires_grad_()


def test_windows_compile_whatever_the_layout():
    """The gradients' strides are those that the fake promises, also of views."""
    torch._dynamo.reset()
    features, kernels = (t.detach() for t in windows_inputs(torch.float32))
    compiled = torch.compile(
        lambda f, k: (splat_windows(f * 1.0, k, (4, 3)) ** 2).sum(),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for layout in (torch.channels_last, torch.contiguous_format):
        f = features.to(memory_format=layout).requires_grad_()
        k = kernels.mT.requires_grad_()
        torch.library.opcheck(torch.ops.gsr.splat_windows.default, (f, k, (4, 3)))
        grad = torch.randn(2, 3, 12, 6)
        torch.library.opcheck(
            torch.ops.gsr.splat_windows_backward.default, (grad, f.detach(), k.detach(), (4, 3))
        )
        compiled(f, k).backward()
        want = torch.autograd.grad((splat_windows(f, k, (4, 3)) ** 2).sum(), (f, k))
        torch.testing.assert_close(f.grad, want[0])
        torch.testing.assert_close(k.grad, want[1])
        k.requires_grad_(False)


def test_windows_opcheck_and_gradcheck():
    features, kernels = windows_inputs()
    side = (4, 3)
    out = splat_windows(features, kernels, side)
    assert out.shape == (2, 3, 12, 6)
    assert (out == 0).any() and (out == 1).any() and ((out > 0) & (out < 1)).any()
    torch.testing.assert_close(out, reference.splat_windows(features, kernels, side))
    torch.library.opcheck(torch.ops.gsr.splat_windows.default, (features, kernels, side))
    torch.library.opcheck(
        torch.ops.gsr.splat_windows_backward.default,
        (torch.randn_like(out), features.detach(), kernels.detach(), side),
    )
    assert torch.autograd.gradcheck(
        lambda f, k: splat_windows(f, k, side), (features, kernels), eps=1e-7
    )


def test_windows_refuse():
    features, kernels = windows_inputs()
    with pytest.raises(ValueError, match="multiples of 2"):
        splat_windows(features[..., :3], kernels, (4, 4))
    with pytest.raises(ValueError, match="side must be at least 3"):
        splat_windows(features, kernels, (2, 4))
    with pytest.raises(ValueError, match="kernels must be"):
        splat_windows(features, kernels[:3], (4, 4))


def test_expanded_gradients():
    """`.sum()` sends back a gradient whose strides are zero."""
    tensors, offset, points = inputs(dtype=torch.float32)
    gaussians, weighting = Gaussians(*tensors, offset), Weighting(1, True, 1e-6)
    grid = Grid((9, 7), (0, 9), (0, 5))
    for out, true in (
        (splat(*tensors, (9, 7), offset, 1), reference.splat(gaussians, grid, weighting)),
        (splat_at(*tensors, points, offset, 1), reference.splat_at(gaussians, points, weighting)),
    ):
        ours = torch.autograd.grad(out.sum(), tensors)
        theirs = torch.autograd.grad(true.sum(), tensors)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=0)


def test_views_are_welcome():
    """Transposed, expanded and sliced inputs give what their copies give."""
    g = torch.Generator().manual_seed(0)
    values = torch.rand(2, 4, 6, 3, 2, generator=g).permute(0, 4, 3, 1, 2)  # [2, 2, 3, 4, 6]
    sigma = torch.rand(1, 2, 2, 4, 12, generator=g)[..., ::2].expand(2, -1, -1, -1, -1) + 0.2
    rho = torch.zeros(1).expand(2, 2, 4, 6)
    opacity = torch.rand(2, 2, 6, 4, generator=g).mT
    views = [values, sigma, rho, opacity]
    copies = [t.clone(memory_format=torch.contiguous_format) for t in views]
    torch.testing.assert_close(
        splat(*views, (9, 7), radius=1), splat(*copies, (9, 7), radius=1), atol=0, rtol=0
    )


@pytest.mark.slow
def test_compile_whole_graph_with_dynamic_sizes():
    tensors, offset, _ = inputs(dtype=torch.float32)
    compiled = torch.compile(
        lambda *t, size: splat(*t[:4], size, t[4], radius=1) * 2, fullgraph=True, dynamic=True
    )
    for size in [(9, 7), (20, 33), (11, 12)]:
        ours = compiled(*tensors, offset, size=size)
        grid = Grid(size, (0, size[0]), (0, 5))
        theirs = reference.splat(Gaussians(*tensors, offset), grid, Weighting(1, True, 1e-6)) * 2
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        a = torch.autograd.grad(ours.square().sum(), [*tensors, offset])
        b = torch.autograd.grad(theirs.square().sum(), [*tensors, offset])
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4 * y.abs().max().item(), rtol=0)


@pytest.mark.slow
def test_export():
    tensors, offset, _ = inputs(dtype=torch.float32)

    class Net(torch.nn.Module):
        def forward(self, *t):
            return splat(*t[:4], (9, 7), t[4], radius=1)

    program = torch.export.export(Net(), (*tensors, offset))
    assert any("gsr.splat" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(
        program.module()(*tensors, offset), splat(*tensors, (9, 7), offset, radius=1)
    )


def test_types_and_devices_must_agree():
    tensors, offset, points = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="rho must be torch.float32"):
        splat(tensors[0], tensors[1], tensors[2].double(), tensors[3], (9, 7))
    with pytest.raises(ValueError, match="rows"):
        splat(*tensors, (9, 7), rows=(4, 10))
    with pytest.raises(ValueError, match="points must be float32 or float64"):
        splat_at(*tensors, points.long())
    with pytest.raises(ValueError, match="floating"):
        splat(*[t.detach().long() for t in tensors], (9, 7))


def test_the_example_fits_a_photograph(tmp_path):
    """docs/fit_photograph.py in small: the image it writes is close to the photograph."""
    root = Path(__file__).parents[2]
    with Image.open(root / "assets" / "demo.png") as photo:
        small = photo.convert("RGB").crop((60, 60, 120, 108))
    small.save(tmp_path / "photo.png")
    done = subprocess.run(
        [sys.executable, "docs/fit_photograph.py", tmp_path / "photo.png", tmp_path / "out.png",
         "100"],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fitted = np.asarray(Image.open(tmp_path / "out.png"), dtype=float)
    error = np.square(fitted - np.asarray(small, dtype=float)).mean()
    print(done.stdout, 10 * np.log10(255**2 / error))
    assert 10 * np.log10(255**2 / error) > 25


@pytest.mark.parametrize("rows, band", [((9, 14), (2, 9)), ((0, 3), (0, 9)), ((20, 25), (5, 9))])
@pytest.mark.parametrize("backend", ["operator", "reference", "without Numba"])
def test_a_band_of_the_image_is_enough(backend, rows, band, monkeypatch):
    """Rows, and gradients, from the LR rows around them alone are those of the whole image."""
    (*tensors, offset), _, _ = whole = inputs(h=9)[0] + [inputs(h=9)[1]], None, None
    if backend == "without Numba":
        monkeypatch.setattr("gsr.ops.cpu._loops", lambda: None)
    start, stop = ops.rows_needed(rows, 9, 25, 1)
    assert band[0] <= start and stop - start < 9
    held = [t.detach()[..., band[0] : stop, :].clone().requires_grad_() for t in whole[0]]
    grad = torch.randn(2, 3, rows[1] - rows[0], 7, dtype=torch.float64)
    out = splat(*tensors, (25, 7), offset, 1, True, 1e-2, rows)
    if backend == "reference":
        grid = Grid((25, 7), rows, band)
        part = reference.splat(Gaussians(*held), grid, Weighting(1, True, 1e-2))
    else:
        part = splat(*held[:4], (25, 7), held[4], 1, True, 1e-2, rows, band)
    torch.testing.assert_close(part, out)
    for ours, true in zip(
        torch.autograd.grad(part, held, grad),
        torch.autograd.grad(out, [*tensors, offset], grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, true[..., band[0] : stop, :])


def test_a_band_without_the_rows_it_needs(monkeypatch):
    tensors, offset, _ = inputs(h=3)
    for band in ((3, 9), (1, 9), (7, 9), (-1, 9)):
        with pytest.raises(ValueError, match="need LR rows 2 to 5 of 9, but the tensors hold"):
            splat(*tensors, (27, 7), offset, 1, True, 1e-2, (9, 15), band)
