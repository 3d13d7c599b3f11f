"""The oracle: each operator once more in plain, differentiable PyTorch, as its formula reads.

Nothing here is fast. Every backend is tested against these functions, outputs and gradients, so
they are kept short enough to check by eye.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from torch import Tensor

from gsr.ops.arguments import Gaussians, Grid, Packed, Weighting
from gsr.ops.resize import bicubic


def grid_points(
    h: int,
    w: int,
    size: tuple[int, int],
    *,
    rows: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """LR coordinates of the centres of the HR pixels, row by row.

    HR pixel i of H sits at (i + 0.5) h / H - 0.5 LR pixels, where LR pixel i has its centre at i.
    Float64, because float32 loses sub-pixel digits beyond a few thousand pixels. `rows` (start,
    stop) gives only those rows.

    Returns [(stop - start) W, 2], (y, x).
    """
    start, stop = rows or (0, size[0])
    y = (torch.arange(start, stop, device=device, dtype=torch.float64) + 0.5) * h / size[0] - 0.5
    x = (torch.arange(size[1], device=device, dtype=torch.float64) + 0.5) * w / size[1] - 0.5
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)


def splat_at(
    gaussians: Gaussians,
    points: Tensor,  # [B, Q, 2], (y, x), LR pixels, centre of pixel i at i
    weighting: Weighting,
    *,
    band: tuple[int, int] | None = None,
) -> Tensor:
    """Sum of the Gaussians of the (2 radius + 1)^2 LR pixels nearest to each point: [B, Q, C].

    With d = point - (pixel + offset), u = d / sigma (component by component) and
    q = (u_y^2 - 2 rho u_y u_x + u_x^2) / (1 - rho^2), a Gaussian weighs w = opacity exp(-q / 2) and
    the result is sum(w value), divided by sum(w) + eps if `normalize`. LR pixels outside the
    image do not take part. With `band` (top, height) the tensors hold only the rows from `top` on
    of an image that is `height` LR pixels high, and no point needs others. (GaussianSR, AAAI 2025,
    section 3: a 2D Gaussian by sigma and rho.)
    """
    values, sigma, rho, opacity, offset = gaussians
    radius, normalize, eps = weighting
    b, k, c, h, w = values.shape
    top, height = band or (0, h)
    offset = torch.zeros_like(sigma) if offset is None else offset
    stacked = torch.cat([values, sigma, offset, rho[:, :, None], opacity[:, :, None]], dim=2)

    nearest = torch.floor(points + 0.5)
    inside = torch.tensor([height - 1, w - 1], dtype=nearest.dtype, device=nearest.device)
    nearest = nearest.clamp(min=torch.zeros_like(inside), max=inside)
    steps = torch.arange(-radius, radius + 1, device=points.device)
    steps = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).reshape(-1, 2)
    pixel = nearest.long()[:, :, None] + steps  # [B, Q, n, 2]
    exists = ((pixel >= 0) & (pixel <= inside.long())).all(dim=-1)  # [B, Q, n]
    away = ((points - nearest)[:, :, None] - steps).to(sigma.dtype)  # [B, Q, n, 2]

    pixel = pixel.clamp(min=torch.zeros_like(inside).long(), max=inside.long())
    image = torch.arange(b, device=points.device)[:, None, None]
    row = (image * h + (pixel[..., 0] - top).clamp(0, h - 1)) * w + pixel[..., 1]
    table = rearrange(stacked, "b k p h w -> (b h w) (k p)")
    near = table.index_select(0, row.reshape(-1)).reshape(*row.shape, k, c + 6)
    value, s, o, r, alpha = torch.split(near, [c, 2, 2, 1, 1], dim=-1)
    r, alpha = r[..., 0], alpha[..., 0]  # [B, Q, n, K]

    u = (away[:, :, :, None] - o) / s
    q = (u[..., 0] ** 2 - 2 * r * u[..., 0] * u[..., 1] + u[..., 1] ** 2) / (1 - r**2)
    weight = alpha * torch.exp(-0.5 * q) * exists[..., None]
    out = einsum(weight, value, "b q n k, b q n k c -> b q c")
    return out / (weight.sum(dim=(2, 3))[..., None] + eps) if normalize else out


def splat(gaussians: Gaussians, grid: Grid, weighting: Weighting) -> Tensor:
    """`splat_at` at the pixel centres of the grid's HR rows: [B, C, stop - start, W]."""
    values, (size, rows, band) = gaussians.values, grid
    points = grid_points(band[1], values.shape[-1], size, rows=rows, device=values.device)
    points = points.expand(values.shape[0], -1, -1)
    out = splat_at(gaussians, points, weighting, band=band)
    return rearrange(out, "b (y x) c -> b c y x", x=size[1])


def direct_gaussians(
    raw: Tensor, gaussians: int, sigma: tuple[float, float], reach: float
) -> Gaussians:
    """What the last convolution of a `direct` head gives, [B, 9 K, h, w], as K Gaussians.

    Channels of each: colour (3), sigma (2), offset (2), rho, opacity. Sigma lies between the two
    bounds, offsets within `reach`, |rho| below 0.95, opacity in (0, 1).
    """
    parts = raw.reshape(raw.shape[0], gaussians, 9, *raw.shape[2:])
    colour, width, offset, rho, opacity = torch.split(parts, [3, 2, 2, 1, 1], dim=2)
    low, high = sigma
    return Gaussians(
        values=colour,
        sigma=low + (high - low) * torch.sigmoid(width),
        rho=0.95 * torch.tanh(rho[:, :, 0]),
        opacity=torch.sigmoid(opacity[:, :, 0]),
        offset=reach * torch.tanh(offset),
    )


HALF_LOG2_E = 0.5 / math.log(2)  # exp(-q / 2) = 2^(-HALF_LOG2_E q)


def pack(gaussians: Gaussians) -> Packed:
    """Gaussians of three values, with offsets, float32, as `Packed` describes them."""
    values, sigma, rho, opacity, offset = gaussians
    (sy, sx), (red, green, blue) = sigma.unbind(2), values.unbind(2)
    oy, ox = (torch.zeros_like(sigma) if offset is None else offset).unbind(2)
    k = -HALF_LOG2_E / (1 - rho**2)
    conic = [k / sy**2, -2 * k * rho / (sy * sx), k / sx**2, opacity.log2()]
    conic, centre = (
        torch.stack(four, dim=-1).view(torch.complex128)[..., 0]
        for four in (conic, [oy, ox, red, green])
    )
    return Packed(conic, centre, blue.contiguous())


def unpack(packed: Packed) -> Gaussians:
    """What `pack` was given, but for rounding."""
    shape = *packed.blue.shape, 4
    conic = packed.conic.contiguous().view(torch.float32).view(shape)
    centre = packed.centre.contiguous().view(torch.float32).view(shape)
    a, b, c, opacity = conic.unbind(-1)
    oy, ox, red, green = centre.unbind(-1)
    rho = 0.5 * b / (a * c).sqrt()  # a and c are negative
    k = -HALF_LOG2_E / (1 - rho**2)
    return Gaussians(
        values=torch.stack([red, green, packed.blue], dim=2),
        sigma=torch.stack([(k / a).sqrt(), (k / c).sqrt()], dim=2),
        rho=rho,
        opacity=opacity.exp2(),
        offset=torch.stack([oy, ox], dim=2),
    )


def splat_packed(
    packed: Packed, lr: Tensor, grid: Grid, weighting: Weighting, levels: bool = False
) -> Tensor:
    """The image of a `direct` head: `lr` upsampled plus `splat`, [B, 3, stop - start, W].

    With `levels` what `to_levels` makes of it.
    """
    image = bicubic(lr, grid.size, grid.rows, grid.band) + splat(unpack(packed), grid, weighting)
    return to_levels(image) if levels else image


def to_levels(image: Tensor) -> Tensor:
    """[B, 3, H, W], clamped to [0, 1], as uint8 [B, H, W, 3]: of 255, halves to even."""
    image = image.clamp(0, 1).mul(255).round().to(torch.uint8)
    return rearrange(image, "b c h w -> b h w c").contiguous()


def window_placement(k: int, window: int, taps: int, like: Tensor) -> Tensor:
    """Share of tap a, of the Gaussian at a position, in HR pixel i: [window, taps, k].

    (1 - 2 y / window) (k - 1) / 2 - floor((k - taps) / 2) is how far the published code moves a
    kernel that stands at position y; a tap is interpolated linearly between two pixels.
    """
    i, a, y = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (k, taps, window))
    shift = (1 - 2 * y / window) * (k - 1) / 2 - (k - taps) // 2
    return (1 - (i + shift[:, None, None] - a[:, None]).abs()).clamp(min=0)


def window_weights(kernels: Tensor, side: tuple[int, int]) -> Tensor:
    """Weight of each of n shared Gaussians at the HR pixels of a window: [k_y, k_x, n].

    `kernels` is [n, taps, taps], n = window^2; `side` is (k_y, k_x).
    """
    n, taps, _ = kernels.shape
    window = math.isqrt(n)
    down, along = (window_placement(k, window, taps, kernels) for k in side)
    kernels = kernels.reshape(window, window, taps, taps)
    return einsum(kernels, down, along, "y x a b, y a i, x b j -> i j y x").flatten(2)


def splat_windows(features: Tensor, kernels: Tensor, side: tuple[int, int]) -> Tensor:
    """The splat of `official` before its last resize: [B, c, n_r k_y, n_c k_x] in [0, 1].

    `features` [B, c, h, w] is cut into windows of window x window LR pixels (n = window^2 kernels
    [n, taps, taps], shared by all windows); each becomes side = (k_y, k_x) HR pixels.
    """
    weights = window_weights(kernels, side)
    window = math.isqrt(len(kernels))
    cut = rearrange(features, "b c (r y) (s x) -> b c r s (y x)", y=window, x=window)
    out = einsum(weights, cut, "i j n, b c r s n -> b c r i s j")
    return rearrange(out, "b c r i s j -> b c (r i) (s j)").clamp(0, 1)
