"""The `official` head: what the published GaussianSR code computes, made deterministic.

LR is cut into windows of 7 x 7 pixels. The Gaussian at each of the 49 positions is the mean over
all windows (and all images of a batch), so that all windows share 49 kernels and the splat is a
matrix product. Use it to run published checkpoints; `field` does what the paper describes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsr.config import ModelConfig
from gsr.errors import InputError
from gsr.models.heads.bank import BankEncoded, BankHead, GaussianBank
from gsr.models.heads.decoder import neighbourhoods
from gsr.ops import rows_needed, splat_windows
from gsr.ops.resize import bicubic


def whole_windows(x: Tensor, window: int, rows=None, band=None) -> Tensor:
    """Resize [B, C, h, w] bicubically to the next multiples of `window`; identity if it is one.

    `rows` (top, end) gives only those rows of windows; `band` is that of `gsr.ops.resize.bicubic`.
    """
    top, h = band or (0, x.shape[-2])
    size = tuple(math.ceil(n / window) * window for n in (h, x.shape[-1]))
    rows = None if rows is None else (rows[0] * window, rows[1] * window)
    if size != (h, x.shape[-1]):
        return bicubic(x, size, rows, band)
    return x if rows is None else x[:, :, rows[0] - top : rows[1] - top]


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


def windows_touched(rows: tuple[int, int], count: int, side: int, h_hr: int) -> tuple[int, int]:
    """First and end of the rows of windows, of `count`, that HR rows, of h_hr, are resized from.

    `side` is the HR rows of a window, before the resize.
    """
    # From the first tap of the first row to the last tap of the last row.
    ends = rows[0], rows[1] - 1
    first, last = (math.floor((y + 0.5) * count * side / h_hr - 0.5) for y in ends)
    return max(0, first - 1) // side, min(count * side - 1, last + 2) // side + 1


def shared_splat(
    features: Tensor,
    kernels: Tensor,
    side: tuple[int, int],
    size: tuple[int, int],
    rows: tuple[int, int] | None = None,
    windows: tuple[int, int] | None = None,
) -> Tensor:
    """Splat windows of features with the kernels they share, and resize the result to `size`.

    Args:
        features: [B, c, h, w], h and w multiples of the window's side.
        kernels: [window^2, taps, taps], from `window_kernels`.
        side: (k_y, k_x), HR pixels of a window.
        size: (H, W).
        rows: only the rows rows[0] to rows[1], at the cost of the windows that they touch.
        windows: (top, count): features hold only the rows of windows from `top` on, of `count`.

    Returns:
        [B, c, H, W], or [B, c, rows[1] - rows[0], W].

    Source: the published code; window seams and holes between kernels at large scales belong to it.
    """
    window, rows = math.isqrt(len(kernels)), rows or (0, size[0])
    above, count = windows or (0, features.shape[2] // window)
    top, end = windows_touched(rows, count, side[0], size[0])
    part = features[:, :, (top - above) * window : (end - above) * window]
    splatted = splat_windows(part, kernels, side)
    return bicubic(splatted, size, rows, (top * side[0], count * side[0]))


class OfficialHead(BankHead):
    """Head of `official`. One image's result depends on the others of its batch.

    Args:
        config: `encoder.n_feats`, `bank` and `decoder` are used.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, GaussianBank(config.bank.points))

    def shared(self, gaussians: Tensor) -> Tensor:
        """The kernels that all windows of an image share, from all its Gaussians [B, 4, h, w]."""
        c = self.config
        return window_kernels(whole_windows(gaussians, c.window), c.window, c.kernel_size)

    def splat_rows(self, encoded: BankEncoded, size, scale, band=None, shared=None):
        window = self.config.window
        kernels = self.shared(encoded.gaussians) if shared is None else shared
        side = window_side(scale, window, self.config.kernel_size)
        features = encoded.features[:, : self.config.channels]
        if band is None:
            features = whole_windows(features, window)
            return lambda first, last: shared_splat(features, kernels, side, size, (first, last))

        def splat(first: int, last: int) -> Tensor:
            count = math.ceil(band[1] / window)
            touched = windows_touched((first, last), count, side[0], size[0])
            part = whole_windows(features, window, touched, band)
            return shared_splat(part, kernels, side, size, (first, last), (touched[0], count))

        return splat

    def splat_rows_needed(self, rows, lr_size, size, scale) -> tuple[int, int]:
        window, count = self.config.window, math.ceil(lr_size[0] / self.config.window)
        side = window_side(scale, window, self.config.kernel_size)
        top, end = windows_touched(rows, count, side[0], size[0])
        return rows_needed((top * window, end * window), lr_size[0], count * window, 2)

    def splat_around(self, encoded: BankEncoded, size, scale, queries: int):
        c = self.config
        side = window_side(scale, c.window, c.kernel_size)
        features = whole_windows(encoded.features[:, : c.channels], c.window)
        # 392 multiply-adds an HR pixel, as much as the decoder at one pixel in 1400.
        splatted = splat_windows(features, self.shared(encoded.gaussians), side)

        def resized(tensors, y: Tensor, x: Tensor) -> Tensor:
            return neighbourhoods(*tensors, splatted.new_empty(*y.shape, 9, 0), size, y, x)

        return (splatted,), resized
