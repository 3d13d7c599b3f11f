"""The operators within torch.func and torch.export, and what becomes of pixels without a weight."""

import pytest
import torch

from gsr.ops import splat, splat_at, splat_windows


def gaussians(h=3, w=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(1, 2, *shape, h, w, generator=g, dtype=dtype)

    return rand(3) * 2 - 1, rand(2) * 0.8 + 0.2, rand() * 1.6 - 0.8, rand() + 0.1


def calls():
    values, *others = gaussians()
    points = torch.rand(1, 5, 2, dtype=torch.float64) * 3
    kernels = torch.rand(4, 3, 3, dtype=torch.float64) / 4
    features = torch.rand(1, 2, 4, 2, dtype=torch.float64)
    return {
        "splat": (lambda v: splat(v, *others, (5, 6), radius=1), values),
        "splat, sigma": (lambda s: splat(values, s, *others[1:], (5, 6), radius=1), others[0]),
        "splat_at": (lambda v: splat_at(v, *others, points, radius=1), values),
        "splat_windows": (lambda f: splat_windows(f, kernels, (4, 3)), features),
    }


@pytest.mark.parametrize("name", calls())
def test_torch_func(name):
    function, x = calls()[name]

    def loss(x):
        return function(x).square().sum()

    leaf = x.clone().requires_grad_()
    (true,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), true)
    out, pull = torch.func.vjp(function, x)
    torch.testing.assert_close(pull(2 * out)[0], true)
    jacobian = torch.func.jacrev(function)(x)
    torch.testing.assert_close(
        torch.tensordot(2 * out, jacobian, dims=out.dim()), true, msg=lambda m: f"jacrev: {m}"
    )
    several = torch.stack([x, x / 2])
    torch.testing.assert_close(
        torch.func.vmap(function, in_dims=1, out_dims=1)(several.transpose(0, 1)),
        torch.stack([function(x), function(x / 2)], dim=1),
    )
    with pytest.raises(NotImplementedError, match="once, not twice"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)


def test_export_of_any_height_and_width():
    """No constraint is left on the sizes but that they are at least 2."""

    class Net(torch.nn.Module):
        def forward(self, values, sigma, rho, opacity):
            size = values.shape[-2] * 3, values.shape[-1] * 2
            return splat(values, sigma, rho, opacity, size, radius=1)

    h, w = (torch.export.Dim(name, min=2) for name in "hw")
    shapes = {3: h, 4: w}, {3: h, 4: w}, {2: h, 3: w}, {2: h, 3: w}
    names = "values", "sigma", "rho", "opacity"
    program = torch.export.export(
        Net(), gaussians(), dynamic_shapes=dict(zip(names, shapes, strict=True))
    )
    for height, width in ((3, 4), (2, 9), (11, 5)):
        inputs = gaussians(height, width)
        torch.testing.assert_close(program.module()(*inputs), Net()(*inputs), atol=0, rtol=0)


@pytest.mark.parametrize("backend", ["loops", "without Numba"])
def test_pixels_without_any_weight_are_0(backend, monkeypatch):
    if backend == "without Numba":
        monkeypatch.setattr("gsr.ops.cpu._loops", lambda: None)
    values, sigma, rho, opacity = gaussians(dtype=torch.float32)
    thin = (sigma * 1e-3).requires_grad_()
    out = splat(values, thin, rho, opacity, (12, 8), radius=1, eps=1e-6)
    assert (out == 0).any() and out.isfinite().all()
    (gradient,) = torch.autograd.grad(out.sum(), thin)
    assert gradient.isfinite().all()
    for eps in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="eps must be above 0"):
            splat(values, sigma, rho, opacity, (12, 8), eps=eps)
        with pytest.raises(ValueError, match="eps must be above 0"):
            splat_at(values, sigma, rho, opacity, torch.zeros(1, 2, 2), eps=eps)
    splat(values, sigma, rho, opacity, (12, 8), normalize=False, eps=0)


def test_gradients_are_on_the_device_of_the_gaussians():
    values, *others = (t.to("meta") for t in gaussians(dtype=torch.float32))
    arguments = (values, *others, None, (5, 6), (0, 5), 1, True, 0.01, (0, 3))
    grad = torch.empty(1, 3, 5, 6, device="meta")
    outputs = torch.ops.gsr.splat_backward(grad, *arguments)
    assert {t.device.type for t in outputs} == {"meta"}
