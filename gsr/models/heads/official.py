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


def whole_windows(x: Tensor, window: int, *, rows=None, band=None) -> Tensor:
    """Resize [B, C, h, w] bicubically to the next multiples of `window`; identity if it is one.

    `rows` (start, stop) gives only those rows of windows; `band` is that of
    `gsr.ops.resize.bicubic`.
    """
    start, h = band or (0, x.shape[-2])
    w = x.shape[-1]
    size = math.ceil(h / window) * window, math.ceil(w / window) * window
    rows = None if rows is None else (rows[0] * window, rows[1] * window)
    if size != (h, w):
        return bicubic(x, size, rows, band)
    return x if rows is None else x[:, :, rows[0] - start : rows[1] - start]


def window_side(scale: tuple[float, float], window: int, taps: int) -> tuple[int, int]:
    """HR pixels (k_y, k_x) that a window covers at `scale` (s_y, s_x).

    Raises:
        InputError: a window would be smaller than the kernel.
    """
    side = round(window * scale[0]), round(window * scale[1])
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


def windows_touched(
    rows: tuple[int, int], count: int, *, side: int, height: int
) -> tuple[int, int]:
    """Rows of windows (start, stop) that HR rows (start, stop) are resized from.

    Args:
        rows: of an image of `height`.
        count: rows of windows there are.
        side: HR rows of a window, before the resize.
        height: H.
    """
    # From the first tap of the first row to the last tap of the last row.
    top, bottom = (
        math.floor((y + 0.5) * count * side / height - 0.5) for y in (rows[0], rows[1] - 1)
    )
    return max(0, top - 1) // side, min(count * side - 1, bottom + 2) // side + 1


def shared_splat(
    features: Tensor,
    kernels: Tensor,
    side: tuple[int, int],
    size: tuple[int, int],
    *,
    rows: tuple[int, int] | None = None,
    windows: tuple[int, int] | None = None,
) -> Tensor:
    """Splat windows of features with the kernels they share, and resize the result to `size`.

    Args:
        features: [B, c, h, w], h and w multiples of the window's side.
        kernels: [window^2, taps, taps], from `window_kernels`.
        side: (k_y, k_x), HR pixels of a window.
        size: (H, W).
        rows: (start, stop), only these rows of it, at the cost of the windows that they touch.
        windows: (start, count): features hold only the rows of windows from `start` on, of `count`.

    Returns:
        [B, c, H, W], or [B, c, stop - start, W].

    Source: the published code; window seams and holes between kernels at large scales belong to it.
    """
    window, rows = math.isqrt(len(kernels)), rows or (0, size[0])
    above, count = windows or (0, features.shape[2] // window)
    start, stop = windows_touched(rows, count, side=side[0], height=size[0])
    part = features[:, :, (start - above) * window : (stop - above) * window]
    splatted = splat_windows(part, kernels, side)
    return bicubic(splatted, size, rows, (start * side[0], count * side[0]))


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

    def prepare(self, encoded: BankEncoded, scale, *, band=None, shared=None):
        """The channels to splat, cut to whole windows if there is no band; `shared`; and HR pixels
        (k_y, k_x) of a window."""
        c = self.config
        kernels = self.shared(encoded.gaussians) if shared is None else shared
        features = encoded.features[:, : self.channels]
        if band is None:
            features = whole_windows(features, c.window)
        return features, kernels, window_side(scale, c.window, c.kernel_size)

    def splat_rows(self, splat, rows, *, size, band=None) -> Tensor:
        features, kernels, side = splat
        if band is None:
            return shared_splat(features, kernels, side, size, rows=rows)
        window = self.config.window
        count = math.ceil(band[1] / window)
        start, stop = windows_touched(rows, count, side=side[0], height=size[0])
        part = whole_windows(features, window, rows=(start, stop), band=band)
        return shared_splat(part, kernels, side, size, rows=rows, windows=(start, count))

    def splat_rows_needed(self, rows, *, lr_size, size, scale) -> tuple[int, int]:
        window, count = self.config.window, math.ceil(lr_size[0] / self.config.window)
        side = window_side(scale, window, self.config.kernel_size)
        start, stop = windows_touched(rows, count, side=side[0], height=size[0])
        return rows_needed((start * window, stop * window), lr_size[0], count * window, 2)

    def prepare_points(self, encoded: BankEncoded, size, scale, *, count: int):
        """The splat before it is resized: 392 multiply-adds an HR pixel, as much as the decoder at
        one pixel in 1400."""
        return (splat_windows(*self.prepare(encoded, scale)),)

    def splat_3x3(self, splat, y: Tensor, x: Tensor, *, size) -> Tensor:
        (splatted,) = splat
        return neighbourhoods(splatted, splatted.new_empty(*y.shape, 9, 0), y=y, x=x, size=size)
