"""The `official` head: what the published GaussianSR code computes, made deterministic.

LR is cut into windows of 7 x 7 pixels. The Gaussian at each of the 49 positions is the mean over
all windows (and all pictures of a batch), so that all windows share 49 kernels and the splat is a
matrix product. Use it to run published checkpoints; `field` does what the paper describes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsr.config import ModelConfig
from gsr.errors import InputError
from gsr.models.bank import BankEncoded, BankHead, GaussianBank, pick
from gsr.ops import splat_windows
from gsr.resize import bicubic, cubic


def whole_windows(x: Tensor, window: int) -> Tensor:
    """Resize [B, C, h, w] bicubically to the next multiples of `window`; identity if it is one."""
    size = tuple(math.ceil(n / window) * window for n in x.shape[-2:])
    return x if size == tuple(x.shape[-2:]) else bicubic(x, size)


def window_side(scale: tuple[float, float], window: int, taps: int) -> tuple[int, int]:
    """HR pixels (k_y, k_x) that a window covers at `scale` (s_y, s_x).

    Raises:
        InputError: a window would be smaller than the kernel.
    """
    side = tuple(round(window * s) for s in scale)
    if min(side) < taps:
        raise InputError(
            f"official mode cannot render at scale {min(scale):g}: a window of {window} LR pixels "
            f"must cover {taps} HR pixels or more, so use a scale above {(taps - 0.5) / window:.3g}"
        )
    return side


def window_kernels(gaussians: Tensor, window: int = 7, taps: int = 5) -> Tensor:
    """The Gaussians that all windows share, sampled: [window^2, taps, taps], opacity included.

    Each is sampled at taps x taps points of [-5, 5]^2 and divided by its largest sample; the
    samples stand one HR pixel apart.

    Args:
        gaussians: [B, 4, h, w] (sigma down the rows, sigma along the columns, opacity, rho), h and
            w multiples of `window`; averaged over images and windows here.
        window: side of a window, LR pixels.
        taps: side of a kernel, HR pixels.

    Source: the published code (not the paper), where these are 7 x 7 windows and `kernel_size` 5.
    """
    b, p, h, w = gaussians.shape
    cut = gaussians.reshape(b, p, h // window, window, w // window, window)
    mean = cut.mean(dim=(0, 2, 4)).flatten(1)
    sigma_x, sigma_y, opacity, rho = mean[:, :, None, None]  # [window^2, 1, 1] each

    u = torch.linspace(-5, 5, taps, device=gaussians.device, dtype=gaussians.dtype)
    v, u = u[None, :], u[:, None]  # columns, rows
    xx, yy, xy = sigma_x**2 + 1e-5, sigma_y**2 + 1e-5, rho * sigma_x * sigma_y
    power = -0.5 * (yy * u**2 - 2 * xy * u * v + xx * v**2) / (xx * yy - xy**2)
    # Largest tap 1. Subtracted before exp, nothing overflows where |rho| > 1 makes it a saddle.
    return opacity * torch.exp(power - power.amax(dim=(1, 2), keepdim=True))


def shared_splat(
    features: Tensor,
    kernels: Tensor,
    side: tuple[int, int],
    size: tuple[int, int],
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Splat windows of features with the kernels they share, and resize the result to `size`.

    Args:
        features: [B, c, h, w], h and w multiples of the window's side.
        kernels: [window^2, taps, taps], from `window_kernels`.
        side: (k_y, k_x), HR pixels of a window.
        size: (H, W).
        rows: only the rows rows[0] to rows[1], at the cost of the windows that they touch.

    Returns:
        [B, c, H, W], or [B, c, rows[1] - rows[0], W].

    Source: the published code; window seams and holes between kernels at large scales belong to it.
    """
    window = math.isqrt(len(kernels))
    first, last = rows or (0, size[0])
    tall = features.shape[2] // window * side[0]  # height of all windows, HR pixels
    # Source rows from the first tap of the first row to the last tap of the last row.
    low = max(0, math.floor((first + 0.5) * tall / size[0] - 0.5) - 1)
    high = min(tall, math.floor((last - 0.5) * tall / size[0] - 0.5) + 3)
    top, end = low // side[0], (high - 1) // side[0] + 1  # rows of windows
    band = splat_windows(features[:, :, top * window : end * window], kernels, side)

    # `bicubic` with rows, for a source of which only the rows of `band` exist.
    y = (torch.arange(first, last, device=features.device, dtype=torch.float64) + 0.5) * tall
    y = y / size[0] - 0.5
    tap = torch.floor(y)
    t = (y - tap).to(band.dtype)
    resized = 0
    for step in range(-1, 3):
        row = (tap.long() + step).clamp(0, tall - 1) - top * side[0]
        resized = resized + band.index_select(2, row) * cubic((t - step).abs())[:, None]
    return bicubic(resized, (last - first, size[1]))


class OfficialHead(BankHead):
    """Head of `official`. One image's result depends on the others of its batch.

    Args:
        config: `encoder.n_feats`, `bank` and `decoder` are used.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, GaussianBank(config.bank.points))

    def splat_rows(self, encoded: BankEncoded, size, scale):
        c = self.config
        features = whole_windows(encoded.features[:, : c.channels], c.window)
        gaussians = whole_windows(encoded.gaussians, c.window)
        kernels = window_kernels(gaussians, c.window, c.kernel_size)
        side = window_side(scale, c.window, c.kernel_size)
        return lambda first, last: shared_splat(features, kernels, side, size, (first, last))

    def splat_points(self, encoded: BankEncoded, size, scale, queries: int):
        # 392 multiply-adds an HR pixel, as much as the decoder at one pixel in 1400.
        splatted = self.splat_rows(encoded, size, scale)(0, size[0])
        return lambda y, x: pick(splatted, y, x)
