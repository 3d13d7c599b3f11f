"""The operators: what other code should call. Differentiable, compilable, exportable.

`splat` and `splat_at` render Gaussians on a grid of LR pixels, `splat_windows` is the splat
of the published code. Each computes what the function of the same name in `gsr.ops.reference`
computes, with the backend for its tensors: Triton kernels on CUDA, compiled loops on the CPU
(`gsr.ops.cpu`), the reference piece by piece everywhere else.

In PyTorch's registry they are `gsr::splat`, `gsr::splat_at`, `gsr::splat_windows`; their backward
passes have `_backward` added to the name. They can be differentiated once.
"""

# torch.library's decorators are not annotated:
# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from gsr.ops import reference
from gsr.ops.arguments import Gaussians, Grid, Weighting


def splat(
    values: Tensor,
    sigma: Tensor,
    rho: Tensor,
    opacity: Tensor,
    size: tuple[int, int],
    offset: Tensor | None = None,
    radius: int = 3,
    normalize: bool = True,
    eps: float = 1e-6,
    rows: tuple[int, int] | None = None,
    band: tuple[int, int] | None = None,
) -> Tensor:
    """Splat K Gaussians per LR pixel onto an HR grid of `size`: [B, C, H, W].

    Args:
        values: [B, K, C, h, w], what the Gaussians carry (colours, features).
        sigma: [B, K, 2, h, w], standard deviations (y, x) in LR pixels, > 0.
        rho: [B, K, h, w], correlation in (-1, 1).
        opacity: [B, K, h, w], peak weight, >= 0.
        size: (H, W).
        offset: [B, K, 2, h, w], centre (y, x) relative to the LR pixel's, LR pixels.
        radius: each HR pixel sums over the (2 radius + 1)^2 nearest LR pixels.
        normalize: divide by the total weight plus `eps`, > 0: where no weight is left the result
            is 0.
        rows: (start, stop): only these rows, [B, C, stop - start, W].
        band: (top, height): the tensors hold only the rows from `top` on, h of them, of an image
            that is `height` LR pixels high; those within `radius` of the HR rows must be among them
            (`rows_needed` says which).

    All tensors have one floating type and device. Sums and geometry are at least float32.

    Raises:
        ValueError: a shape, type or device does not fit, `eps` is not above 0, `rows` are not rows
            of the image, or the band lacks LR rows.

    Source: GaussianSR (AAAI 2025), section 3; the formula is in `gsr.ops.reference.splat_at`.
    """
    _check(Gaussians(values, sigma, rho, opacity, offset), radius)
    _check_weighting(normalize, eps)
    rows, band = check_rows(values.shape[-2], size, rows, band, radius)
    return _call(
        _splat, _run_splat, values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps,
        band,
    )  # fmt: skip


def check_rows(
    held: int,
    size: tuple[int, int],
    rows: tuple[int, int] | None,
    band: tuple[int, int] | None,
    radius: int,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """`rows` and `band` of a splat with their defaults, for tensors of `held` rows."""
    rows = (0, size[0]) if rows is None else rows
    if not (0 <= rows[0] < rows[1] <= size[0]) or size[1] < 1:
        raise ValueError(f"rows {tuple(rows)} are not rows of an image of size {tuple(size)}")
    if band is None:  # nothing that an export would have to guard: a whole image has all rows
        return rows, (0, held)
    top, height = band
    start, stop = rows_needed(rows, height, size[0], radius)
    if not (0 <= top <= start and stop <= top + held <= height):
        raise ValueError(
            f"HR rows {tuple(rows)} need LR rows {start} to {stop - 1} of {height}, but the "
            f"tensors hold rows {top} to {top + held - 1}"
        )
    return rows, band


def rows_needed(rows: tuple[int, int], h: int, h_hr: int, radius: int) -> tuple[int, int]:
    """(start, stop) of the LR rows, of h, within `radius` of those nearest to HR rows, of h_hr."""
    start, stop = rows
    nearest = (2 * start + 1) * h // (2 * h_hr), (2 * stop - 1) * h // (2 * h_hr)
    return max(nearest[0] - radius, 0), min(nearest[1] + radius + 1, h)


def splat_at(
    values: Tensor,
    sigma: Tensor,
    rho: Tensor,
    opacity: Tensor,
    points: Tensor,
    offset: Tensor | None = None,
    radius: int = 3,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """`splat` at `points` [B, Q, 2], (y, x) in LR pixels, pixel i's centre at i: [B, Q, C].

    `points` is float32 or float64 and gets no gradient: which LR pixels are nearest is a step
    function of it.
    """
    _check(Gaussians(values, sigma, rho, opacity, offset), radius)
    _check_weighting(normalize, eps)
    if points.dim() != 3 or points.shape[0] != values.shape[0] or points.shape[2] != 2:
        raise ValueError(f"points must be [{values.shape[0]}, Q, 2], not {list(points.shape)}")
    if points.dtype not in (torch.float32, torch.float64) or points.device != values.device:
        raise ValueError(
            f"points must be float32 or float64 on {values.device}, not {points.dtype} on "
            f"{points.device}"
        )
    return _call(
        _splat_at, _run_splat_at, values, sigma, rho, opacity, offset, points.detach(), radius,
        normalize, eps,
    )  # fmt: skip


def splat_windows(features: Tensor, kernels: Tensor, side: tuple[int, int]) -> Tensor:
    """The splat of `official`: windows of LR pixels, all splatted with the same kernels, clamped.

    Args:
        features: [B, c, h, w], h and w multiples of window.
        kernels: [window^2, taps, taps], the sampled Gaussian of each position in a window.
        side: (k_y, k_x), HR pixels that a window becomes, each at least `taps`.

    Returns:
        [B, c, h / window k_y, w / window k_x] in [0, 1].

    Raises:
        ValueError: the shapes do not fit.

    Source: the published code; formula in `gsr.ops.reference.splat_windows`.
    """
    n = kernels.shape[0]
    window = math.isqrt(n)
    if kernels.dim() != 3 or kernels.shape[1] != kernels.shape[2] or window * window != n:
        raise ValueError(f"kernels must be [n^2, t, t], not {list(kernels.shape)}")
    if features.dim() != 4 or features.shape[2] % window or features.shape[3] % window:
        raise ValueError(
            f"features must be [B, c, h, w] with h and w multiples of {window}, not "
            f"{list(features.shape)}"
        )
    if min(side) < kernels.shape[1]:
        raise ValueError(f"side must be at least {kernels.shape[1]} pixels, not {tuple(side)}")
    return _call(_splat_windows, _run_splat_windows, features, kernels, side)


def _check(gaussians: Gaussians, radius: int) -> None:
    values = gaussians.values
    if values.dim() != 5:
        raise ValueError(f"values must be [B, K, C, h, w], not {list(values.shape)}")
    b, k, _, h, w = values.shape
    shapes = {
        "sigma": [b, k, 2, h, w],
        "rho": [b, k, h, w],
        "opacity": [b, k, h, w],
        "offset": [b, k, 2, h, w],
    }
    for name, shape in shapes.items():
        tensor: Tensor | None = getattr(gaussians, name)
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, not {list(tensor.shape)}")
        if tensor.dtype != values.dtype or tensor.device != values.device:
            raise ValueError(
                f"{name} must be {values.dtype} on {values.device} as values are, not "
                f"{tensor.dtype} on {tensor.device}"
            )
    if not values.dtype.is_floating_point:
        raise ValueError(f"values must be of a floating type, not {values.dtype}")
    if radius < 0:
        raise ValueError(f"radius must be at least 0, not {radius}")


def _check_weighting(normalize: bool, eps: float) -> None:
    if normalize and not eps > 0:
        raise ValueError(f"eps must be above 0, which pixels without any weight need, not {eps}")


# ---- backends -----------------------------------------------------------------------------------


class Backend(Protocol):
    """What computes a splat and its gradients: `gsr.kernels.splat` or `gsr.ops.cpu`."""

    def forward(self, gaussians: Gaussians, grid: Grid, weighting: Weighting) -> Tensor: ...

    def backward(
        self, grad: Tensor, gaussians: Gaussians, grid: Grid, weighting: Weighting
    ) -> Gaussians: ...

    def forward_at(self, gaussians: Gaussians, points: Tensor, weighting: Weighting) -> Tensor: ...

    def backward_at(
        self, grad: Tensor, gaussians: Gaussians, points: Tensor, weighting: Weighting
    ) -> Gaussians: ...


HAS_TRITON = find_spec("triton") is not None


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64 and HAS_TRITON


def _kernels(name: str) -> Any:
    """A module of `gsr.kernels`, of which no type checker finds the folder."""
    return import_module(f"gsr.kernels.{name}")


def _backend(values: Tensor) -> Backend:
    if _runs_triton(values):
        return _kernels("splat")
    from gsr.ops import cpu

    return cpu


def _call(op: Callable[..., Any], run: Callable[..., Any], *arguments: Any) -> Any:
    """op(...), or run(...), the same without PyTorch's registry.

    The first call of any operator written in Python imports torch._dynamo, 1.5 s and 150 MB that
    nobody needs who upscales an image.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    watched = not torch.is_inference_mode_enabled() or type(arguments[0]) is not Tensor
    return _functional(op, *arguments) if watched else run(*arguments)


# ---- splat --------------------------------------------------------------------------------------

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(gradients: Gaussians, gaussians: Gaussians) -> Five:
    """Gradients in the types of what they belong to; an operator returns no None."""
    values, sigma, rho, opacity, offset = (
        # On the same device: a CUDA graph has no place for a tensor of the CPU.
        gaussians.values.new_empty(0) if g is None or t is None else g.to(t.dtype)
        for g, t in zip(gradients, gaussians, strict=True)
    )
    return values, sigma, rho, opacity, offset


def _fake_outputs(gaussians: Gaussians) -> Five:
    contiguous = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    return _outputs(gaussians.map(contiguous), gaussians)


# PyTorch reads an operator's schema from the annotations, which therefore are flat.


def _run_splat(
    values: Tensor, sigma: Tensor, rho: Tensor, opacity: Tensor, offset: Tensor | None,
    size: Sequence[int], rows: Sequence[int], radius: int, normalize: bool, eps: float,
    band: Sequence[int],
) -> Tensor:  # fmt: skip
    gaussians = Gaussians(values, sigma, rho, opacity, offset)
    grid, weighting = _grid(size, rows, band), Weighting(radius, normalize, eps)
    return _backend(values).forward(gaussians, grid, weighting)


_splat = torch.library.custom_op("gsr::splat", _run_splat, mutates_args=())


@_splat.register_fake
def _(values: Tensor, *others: Any) -> Tensor:
    size, rows = others[4:6]
    return values.new_empty(values.shape[0], values.shape[2], rows[1] - rows[0], size[1])


@torch.library.custom_op("gsr::splat_backward", mutates_args=())
def _splat_backward(
    grad: Tensor, values: Tensor, sigma: Tensor, rho: Tensor, opacity: Tensor,
    offset: Tensor | None, size: Sequence[int], rows: Sequence[int], radius: int,
    normalize: bool, eps: float, band: Sequence[int],
) -> Five:  # fmt: skip
    gaussians = Gaussians(values, sigma, rho, opacity, offset)
    grid, weighting = _grid(size, rows, band), Weighting(radius, normalize, eps)
    gradients = _backend(values).backward(grad.contiguous(), gaussians, grid, weighting)
    return _outputs(gradients, gaussians)


@_splat_backward.register_fake
def _(grad: Tensor, *others: Any) -> Five:
    return _fake_outputs(Gaussians(*others[:5]))


def _grid(size: Sequence[int], rows: Sequence[int], band: Sequence[int]) -> Grid:
    (h_hr, w_hr), (start, stop), (top, height) = size, rows, band
    return Grid((h_hr, w_hr), (start, stop), (top, height))


def _run_splat_at(
    values: Tensor, sigma: Tensor, rho: Tensor, opacity: Tensor, offset: Tensor | None,
    points: Tensor, radius: int, normalize: bool, eps: float,
) -> Tensor:  # fmt: skip
    gaussians = Gaussians(values, sigma, rho, opacity, offset)
    return _backend(values).forward_at(gaussians, points, Weighting(radius, normalize, eps))


_splat_at = torch.library.custom_op("gsr::splat_at", _run_splat_at, mutates_args=())


@_splat_at.register_fake
def _(values: Tensor, *others: Any) -> Tensor:
    points = others[4]
    return values.new_empty(points.shape[0], points.shape[1], values.shape[2])


@torch.library.custom_op("gsr::splat_at_backward", mutates_args=())
def _splat_at_backward(
    grad: Tensor, values: Tensor, sigma: Tensor, rho: Tensor, opacity: Tensor,
    offset: Tensor | None, points: Tensor, radius: int, normalize: bool, eps: float,
) -> Five:  # fmt: skip
    gaussians = Gaussians(values, sigma, rho, opacity, offset)
    gradients = _backend(values).backward_at(
        grad.contiguous(), gaussians, points, Weighting(radius, normalize, eps)
    )
    return _outputs(gradients, gaussians)


@_splat_at_backward.register_fake
def _(grad: Tensor, *others: Any) -> Five:
    return _fake_outputs(Gaussians(*others[:5]))


# ---- splat_windows ------------------------------------------------------------------------------


def _run_splat_windows(features: Tensor, kernels: Tensor, side: Sequence[int]) -> Tensor:
    ky, kx = side
    if _runs_triton(features):
        return _kernels("windows").forward(features, kernels, (ky, kx))
    # One matrix product: the reference is as fast as the CPU can be.
    return reference.splat_windows(features, kernels, (ky, kx))


_splat_windows = torch.library.custom_op("gsr::splat_windows", _run_splat_windows, mutates_args=())


@_splat_windows.register_fake
def _(features: Tensor, kernels: Tensor, side: Sequence[int]) -> Tensor:
    b, c, h, w = features.shape
    window = math.isqrt(kernels.shape[0])
    return features.new_empty(b, c, h // window * side[0], w // window * side[1])


@torch.library.custom_op("gsr::splat_windows_backward", mutates_args=())
def _splat_windows_backward(
    grad: Tensor, features: Tensor, kernels: Tensor, side: Sequence[int]
) -> tuple[Tensor, Tensor]:
    ky, kx = side
    backward = _kernels("windows").backward if _runs_triton(features) else _windows_backward
    d_features, d_weights = backward(grad, features, kernels, (ky, kx))
    # From the weights to the kernels of which they are bilinear samples.
    n, taps, _ = kernels.shape
    window = math.isqrt(n)
    down, along = (reference.window_placement(k, window, taps, d_weights) for k in (ky, kx))
    d_weights = d_weights.reshape(ky, kx, window, window)
    d_kernels = torch.einsum("ijyx,yai,xbj->yxab", d_weights, down, along)
    d_kernels = d_kernels.reshape(kernels.shape).contiguous()
    return d_features.to(features.dtype), d_kernels.to(kernels.dtype)


def _windows_backward(
    grad: Tensor, features: Tensor, kernels: Tensor, side: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients of features and of `reference.window_weights` by three matrix products."""
    window, (ky, kx) = math.isqrt(len(kernels)), side
    weights = reference.window_weights(kernels, side).flatten(0, 1)  # [k_y k_x, n]
    cut = rearrange(features, "b c (r y) (s x) -> (y x) (b c r s)", y=window, x=window)
    grad = rearrange(grad, "b c (r i) (s j) -> (i j) (b c r s)", i=ky, j=kx)
    product = weights @ cut
    grad = grad * ((product >= 0) & (product <= 1))  # where the clamp let the value through
    b, c, h, _ = features.shape
    d_features = rearrange(
        weights.mT @ grad, "(y x) (b c r s) -> b c (r y) (s x)",
        y=window, b=b, c=c, r=h // window,
    )  # fmt: skip
    return d_features.contiguous(), (grad @ cut.mT).view(ky, kx, -1)


@_splat_windows_backward.register_fake
def _(
    grad: Tensor, features: Tensor, kernels: Tensor, side: Sequence[int]
) -> tuple[Tensor, Tensor]:
    d_features, d_kernels = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (features, kernels)
    )
    return d_features, d_kernels


# ---- autograd -----------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.tensors = [isinstance(t, Tensor) for t in inputs]
    ctx.save_for_backward(*[t for t in inputs if isinstance(t, Tensor)])
    ctx.others = [t for t in inputs if not isinstance(t, Tensor)]


def _inputs(ctx: Any) -> list[Any]:
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    return [next(tensors) if is_tensor else next(others) for is_tensor in ctx.tensors]


def _gradients(backward: Callable[..., Five], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = _inputs(ctx)
    *four, d_offset = _functional(backward, grad, *inputs)
    return (*four, None if inputs[4] is None else d_offset, *[None] * (len(inputs) - 5))


def _windows_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_functional(_splat_windows_backward, grad, *_inputs(ctx)), None)


def _refuse(ctx: Any, grad: Tensor, *_: Tensor) -> None:
    raise NotImplementedError("splats can be differentiated once, not twice")


_AUTOGRAD = {
    _splat: functools.partial(_gradients, _splat_backward),
    _splat_at: functools.partial(_gradients, _splat_at_backward),
    _splat_windows: _windows_gradients,
}


def _one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule of an operator: called for each index, and the results stacked."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            op(*(
                a if d is None or not isinstance(a, Tensor) else a.select(d, i)
                for a, d in zip(arguments, in_dims, strict=True)
            ))
            for i in range(info.batch_size)
        ]  # fmt: skip
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


_FUNCTIONS: dict[Any, Any] = {}


def _functional(op: Any, *arguments: Any) -> Any:
    """op(...), also within torch.func, which does not see the gradients of PyTorch's registry."""
    if not torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
        return op(*arguments)
    return _FUNCTIONS[op].apply(*arguments)


for _op, _backward in _AUTOGRAD.items():
    _op.register_autograd(_backward, setup_context=_keep)
for _op in (*_AUTOGRAD, _splat_backward, _splat_at_backward, _splat_windows_backward):
    torch.library.register_vmap(_op, _one_by_one(_op))
    _FUNCTIONS[_op] = type("Function", (torch.autograd.Function,), {
        "forward": staticmethod(_op),
        "setup_context": staticmethod(_keep),
        "backward": staticmethod(_AUTOGRAD.get(_op, _refuse)),
        "generate_vmap_rule": True,
    })  # fmt: skip
