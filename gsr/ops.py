"""The operators, with their argument checks: what other code should call.

Every form of an operator computes what `gsr.reference` computes.
"""

from __future__ import annotations

from torch import Tensor

from gsr import reference


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
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
    if radius < 0:
        raise ValueError(f"radius must be at least 0, not {radius}")


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

    Raises:
        ValueError: a shape does not fit.

    Source: GaussianSR (AAAI 2025), section 3; the formula is in `gsr.reference.splat_at`.
    """
    _check(values, sigma, rho, opacity, offset, radius)
    return reference.splat(
        values, sigma, rho, opacity, size, offset, radius, normalize, eps, rows
    )


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
    """`splat` at `points` [B, Q, 2], (y, x) in LR pixels with the centre of pixel i at i: [B, Q, C]."""
    _check(values, sigma, rho, opacity, offset, radius)
    if points.dim() != 3 or points.shape[0] != values.shape[0] or points.shape[2] != 2:
        raise ValueError(f"points must be [{values.shape[0]}, Q, 2], not {list(points.shape)}")
    return reference.splat_at(
        values, sigma, rho, opacity, points, offset, radius, normalize, eps
    )
