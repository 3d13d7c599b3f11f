"""The operators: what other code should call. Differentiable, compilable, exportable.

`splat` and `splat_at` render Gaussians on a grid of LR pixels, `splat_windows` is the splat
of the published code. Each computes what the function of the same name in `gsr.ops.reference`
computes, in the form that suits the tensors: Triton kernels on CUDA, compiled loops on the CPU
(`gsr.ops.cpu`), the reference piece by piece everywhere else.

In PyTorch's registry they are `gsr::splat`, `gsr::splat_at`, `gsr::splat_windows`; their backward
passes have `_backward` added to the name. They can be differentiated once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from einops import rearrange
from torch import Tensor

from gsr.ops import reference


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
        normalize: divide by the total weight plus `eps`.
        rows: (first, last): only these rows, [B, C, last - first, W].
        band: (top, height): the tensors hold only the rows from `top` on, h of them, of an image
            that is `height` LR pixels high; those within `radius` of the HR rows must be among them
            (`rows_needed` says which).

    All tensors have one floating type and device. Sums and geometry are at least float32.

    Raises:
        ValueError: a shape, type or device does not fit, `rows` are not rows of the image, or the
            band lacks LR rows.

    Source: GaussianSR (AAAI 2025), section 3; the formula is in `gsr.ops.reference.splat_at`.
    """
    _check(values, sigma, rho, opacity, offset, radius)
    rows = (0, size[0]) if rows is None else rows
    if not (0 <= rows[0] < rows[1] <= size[0]) or size[1] < 1:
        raise ValueError(f"rows {tuple(rows)} are not rows of an image of size {tuple(size)}")
    h = values.shape[-2]
    top, height = band = (0, h) if band is None else band
    first, last = rows_needed(rows, height, size[0], radius)
    if not (0 <= top <= first and last <= top + h <= height):
        raise ValueError(
            f"HR rows {tuple(rows)} need LR rows {first} to {last - 1} of {height}, but the "
            f"tensors hold rows {top} to {top + h - 1}"
        )
    return _call(
        _splat, _splat_now, values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps,
        band,
    )  # fmt: skip


def rows_needed(rows: tuple[int, int], h: int, h_hr: int, radius: int) -> tuple[int, int]:
    """First and end of the LR rows, of h, within `radius` of those nearest to HR rows, of h_hr."""
    first, last = ((2 * y + 1) * h // (2 * h_hr) for y in (rows[0], rows[1] - 1))
    return max(first - radius, 0), min(last + radius + 1, h)


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
    _check(values, sigma, rho, opacity, offset, radius)
    if points.dim() != 3 or points.shape[0] != values.shape[0] or points.shape[2] != 2:
        raise ValueError(f"points must be [{values.shape[0]}, Q, 2], not {list(points.shape)}")
    if points.dtype not in (torch.float32, torch.float64) or points.device != values.device:
        raise ValueError(
            f"points must be float32 or float64 on {values.device}, not {points.dtype} on "
            f"{points.device}"
        )
    return _call(
        _splat_at, _splat_at_now, values, sigma, rho, opacity, offset, points.detach(), radius,
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
    return _call(_splat_windows, _splat_windows_now, features, kernels, side)


def _check(values, sigma, rho, opacity, offset, radius):
    if values.dim() != 5:
        raise ValueError(f"values must be [B, K, C, h, w], not {list(values.shape)}")
    b, k, _, h, w = values.shape
    want = {
        "sigma": (sigma, (b, k, 2, h, w)),
        "rho": (rho, (b, k, h, w)),
        "opacity": (opacity, (b, k, h, w)),
        "offset": (offset, (b, k, 2, h, w)),
    }
    for name, (tensor, shape) in want.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
        if tensor.dtype != values.dtype or tensor.device != values.device:
            raise ValueError(
                f"{name} must be {values.dtype} on {values.device} as values are, not "
                f"{tensor.dtype} on {tensor.device}"
            )
    if not values.dtype.is_floating_point:
        raise ValueError(f"values must be of a floating type, not {values.dtype}")
    if radius < 0:
        raise ValueError(f"radius must be at least 0, not {radius}")


# ---- forms --------------------------------------------------------------------------------------


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64 and _has_triton()


def _form(values: Tensor):
    """The module whose forward, backward, forward_at and backward_at serve these tensors."""
    if _runs_triton(values):
        from gsr.kernels import splat as form
    else:
        from gsr.ops import cpu as form
    return form


def _call(op, now: Callable[..., Tensor], tensor: Tensor, *others) -> Tensor:
    """op(tensor, ...), or now(tensor, ...), the same without PyTorch's registry.

    The first call of any operator written in Python imports torch._dynamo, 1.5 s and 150 MB that
    nobody needs who enlarges an image.
    """
    watched = torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    return (op if watched or type(tensor) is not Tensor else now)(tensor, *others)


def _fill(gradients, like) -> tuple[Tensor, ...]:
    """Gradients in the types of what they belong to; an operator returns no None."""
    return tuple(
        torch.empty(0) if g is None else g.to(t.dtype) for g, t in zip(gradients, like, strict=True)
    )


def _like(values, sigma, rho, opacity, offset) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (values, sigma, rho, opacity, offset)
    )


Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _splat_now(
    values: Tensor, sigma: Tensor, rho: Tensor, opacity: Tensor, offset: Tensor | None,
    size: Sequence[int], rows: Sequence[int], radius: int, normalize: bool, eps: float,
    band: Sequence[int],
) -> Tensor:  # fmt: skip
    return _form(values).forward(
        values, sigma, rho, opacity, offset, tuple(size), tuple(rows), radius, normalize, eps,
        tuple(band),
    )  # fmt: skip


_splat = torch.library.custom_op("gsr::splat", _splat_now, mutates_args=())


@_splat.register_fake
def _(values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band):
    return values.new_empty(values.shape[0], values.shape[2], rows[1] - rows[0], size[1])


@torch.library.custom_op("gsr::splat_backward", mutates_args=())
def _splat_backward(
    grad: Tensor, values: Tensor, sigma: Tensor, rho: Tensor, opacity: Tensor,
    offset: Tensor | None, size: Sequence[int], rows: Sequence[int], radius: int,
    normalize: bool, eps: float, band: Sequence[int],
) -> Five:  # fmt: skip
    tensors = (values, sigma, rho, opacity, offset)
    gradients = _form(values).backward(
        grad.contiguous(), *tensors, tuple(size), tuple(rows), radius, normalize, eps, tuple(band)
    )
    return _fill(gradients, tensors)


@_splat_backward.register_fake
def _(grad, values, sigma, rho, opacity, offset, size, rows, radius, normalize, eps, band):
    return _like(values, sigma, rho, opacity, offset)


def _splat_at_now(
    values: Tensor, sigma: Tensor, rho: Tensor, opacity: Tensor, offset: Tensor | None,
    points: Tensor, radius: int, normalize: bool, eps: float,
) -> Tensor:  # fmt: skip
    return _form(values).forward_at(
        values, sigma, rho, opacity, offset, points, radius, normalize, eps
    )


_splat_at = torch.library.custom_op("gsr::splat_at", _splat_at_now, mutates_args=())


@_splat_at.register_fake
def _(values, sigma, rho, opacity, offset, points, radius, normalize, eps):
    return values.new_empty(points.shape[0], points.shape[1], values.shape[2])


@torch.library.custom_op("gsr::splat_at_backward", mutates_args=())
def _splat_at_backward(
    grad: Tensor, values: Tensor, sigma: Tensor, rho: Tensor, opacity: Tensor,
    offset: Tensor | None, points: Tensor, radius: int, normalize: bool, eps: float,
) -> Five:  # fmt: skip
    tensors = (values, sigma, rho, opacity, offset)
    gradients = _form(values).backward_at(
        grad.contiguous(), *tensors, points, radius, normalize, eps
    )
    return _fill(gradients, tensors)


@_splat_at_backward.register_fake
def _(grad, values, sigma, rho, opacity, offset, points, radius, normalize, eps):
    return _like(values, sigma, rho, opacity, offset)


def _splat_windows_now(features: Tensor, kernels: Tensor, side: Sequence[int]) -> Tensor:
    if _runs_triton(features):
        from gsr.kernels import windows

        return windows.forward(features, kernels, tuple(side))
    # One matrix product: the reference is as fast as the CPU can be.
    return reference.splat_windows(features, kernels, tuple(side))


_splat_windows = torch.library.custom_op("gsr::splat_windows", _splat_windows_now, mutates_args=())


@_splat_windows.register_fake
def _(features, kernels, side):
    b, c, h, w = features.shape
    window = math.isqrt(kernels.shape[0])
    return features.new_empty(b, c, h // window * side[0], w // window * side[1])


@torch.library.custom_op("gsr::splat_windows_backward", mutates_args=())
def _splat_windows_backward(
    grad: Tensor, features: Tensor, kernels: Tensor, side: Sequence[int]
) -> tuple[Tensor, Tensor]:
    backward = _windows_backward
    if _runs_triton(features):
        from gsr.kernels.windows import backward
    d_features, d_weights = backward(grad, features, kernels, tuple(side))
    n, taps, _ = kernels.shape
    window = math.isqrt(n)
    down, along = (reference.window_placement(k, window, taps, d_weights) for k in side)
    d_weights = d_weights.reshape(*side, window, window)
    d_kernels = torch.einsum("ijyx,yai,xbj->yxab", d_weights, down, along)
    d_kernels = d_kernels.reshape(kernels.shape).contiguous()
    return d_features.to(features.dtype), d_kernels.to(kernels.dtype)


def _windows_backward(grad, features, kernels, side) -> tuple[Tensor, Tensor]:
    """Gradients of features and of `reference.window_weights` by three matrix products."""
    window, (ky, kx) = math.isqrt(len(kernels)), side
    weights = reference.window_weights(kernels, side).flatten(0, 1)  # [k_y k_x, n]
    cut = rearrange(features, "b c (r y) (s x) -> (y x) (b c r s)", y=window, x=window)
    grad = rearrange(grad, "b c (r i) (s j) -> (i j) (b c r s)", i=ky, j=kx)
    product = weights @ cut
    grad = grad * ((product >= 0) & (product <= 1))
    b, c, h, _ = features.shape
    d_features = rearrange(
        weights.mT @ grad, "(y x) (b c r s) -> b c (r y) (s x)",
        y=window, b=b, c=c, r=h // window,
    )  # fmt: skip
    return d_features.contiguous(), (grad @ cut.mT).view(ky, kx, -1)


@_splat_windows_backward.register_fake
def _(grad, features, kernels, side):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (features, kernels)
    )


# ---- autograd -----------------------------------------------------------------------------------


def _keep(ctx, inputs, output):
    ctx.tensors = [isinstance(t, Tensor) for t in inputs]
    ctx.save_for_backward(*[t for t in inputs if isinstance(t, Tensor)])
    ctx.others = [t for t in inputs if not isinstance(t, Tensor)]


def _inputs(ctx) -> list:
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    return [next(tensors) if is_tensor else next(others) for is_tensor in ctx.tensors]


def _gradients(ctx, op, grad):
    inputs = _inputs(ctx)
    *four, d_offset = op(grad, *inputs)
    return (*four, None if inputs[4] is None else d_offset, *[None] * (len(inputs) - 5))


_splat.register_autograd(
    lambda ctx, grad: _gradients(ctx, _splat_backward, grad), setup_context=_keep
)
_splat_at.register_autograd(
    lambda ctx, grad: _gradients(ctx, _splat_at_backward, grad), setup_context=_keep
)
_splat_windows.register_autograd(
    lambda ctx, grad: (*_splat_windows_backward(grad, *_inputs(ctx)), None), setup_context=_keep
)
