"""How near a picture is to the original: PSNR and SSIM as super-resolution is measured.

Every function takes two pictures as floats in [0, 1], clamped but not rounded to 8 bits, and leaves
out `shave` pixels on each side. Two published protocols choose metric and shave for a scale:
`benchmark` (Set5, Set14, B100, Urban100: luma) and `div2k` (RGB); `PROTOCOLS` finds them by name.
Computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gsr.errors import InputError

# ITU-R BT.601 luma of RGB in [0, 1]: Y = 16 + 256 (LUMA / 256 . RGB), within 16 .. 235 of 255.
LUMA = (65.738, 129.057, 25.064)
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def psnr(sr: Tensor, hr: Tensor, shave: int = 0) -> float:
    """Peak signal-to-noise ratio over all channels, in dB; inf for equal pictures.

    Args:
        sr, hr: [..., C, H, W], the same shape, in [0, 1].
        shave: pixels left out on each side.

    Raises:
        InputError: other shapes or dtypes, or nothing left after shaving.
    """
    sr, hr = _checked(sr, hr, shave)
    return _decibel(sr - hr)


def psnr_y(sr: Tensor, hr: Tensor, shave: int = 0) -> float:
    """PSNR of the luma difference, LUMA / 256 . (sr - hr), against a peak of 1, in dB.

    With one channel (C = 1) that channel is the luma and is measured as it is. A grey picture that
    was read as RGB, as the published protocol reads Set14's `bridge`, has its difference scaled
    by 0.8588 like any other, which counts 1.32 dB more than its one channel would.

    Args:
        sr, hr: [..., 3, H, W] or [..., 1, H, W], the same shape, in [0, 1].
        shave: pixels left out on each side.

    Raises:
        InputError: other shapes or dtypes, or nothing left after shaving.
    """
    sr, hr = _checked(sr, hr, shave)
    return _decibel(_weighted(sr - hr))


def luma(picture: Tensor) -> Tensor:
    """Y of YCbCr: [..., 3, H, W] in [0, 1] to [..., 1, H, W] in 16 .. 235.

    One channel counts as luma already and is only scaled, to 0 .. 255.
    """
    if picture.shape[-3] == 1:
        return picture * 255
    return 16 + 255 * _weighted(picture)


def ssim(sr: Tensor, hr: Tensor, shave: int = 0) -> float:
    """Structural similarity of the luma, at most 1 (equal pictures).

    Gaussian window of 11 x 11 with sigma 1.5, only where it fits into the picture, K1 = 0.01,
    K2 = 0.03, L = 255, on Y in 16 .. 235: as is usual in super-resolution. It agrees with
    scikit-image's structural_similarity (gaussian_weights, sigma 1.5, population covariance).

    Args:
        sr, hr: [..., 3, H, W] or [..., 1, H, W], the same shape, in [0, 1].
        shave: pixels left out on each side.

    Raises:
        InputError: other shapes or dtypes, or less than 11 pixels a side after shaving.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural
    Similarity", IEEE TIP 13 (4), 2004, equation 13.
    """
    sr, hr = _checked(sr, hr, shave, least=SSIM_WINDOW)
    x = luma(sr).flatten(0, -3)[:, None]  # [N, 1, H, W]
    y = luma(hr).flatten(0, -3)[:, None]
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    similarity *= (2 * cov + c2) / (var_x + var_y + c2)
    return similarity.mean().item()


@dataclass(frozen=True)
class Protocol:
    """A published way to measure: which PSNR, and how many pixels are shaved at a scale."""

    name: str
    colour: str  # "Y" or "RGB": what the PSNR compares
    metric: Callable[[Tensor, Tensor, int], float]
    extra: int  # pixels shaved besides the scale

    def shave(self, scale: float) -> int:
        """Pixels left out on each side: scale + extra, a fractional scale rounded up.

        The published protocols only know whole scales; rounding up never measures more border
        than they would.
        """
        return math.ceil(scale) + self.extra

    def __call__(self, sr: Tensor, hr: Tensor, scale: float) -> float:
        """PSNR in dB of sr against hr, [..., 3, H, W] in [0, 1], enlarged by scale."""
        return self.metric(sr, hr, self.shave(scale))


benchmark = Protocol("benchmark", "Y", psnr_y, 0)
div2k = Protocol("div2k", "RGB", psnr, 6)
PROTOCOLS = {protocol.name: protocol for protocol in (benchmark, div2k)}


def _checked(sr: Tensor, hr: Tensor, shave: int, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both pictures shaved, in float64, or InputError."""
    if sr.shape != hr.shape:
        raise InputError(
            f"pictures of one size must be compared, not {list(sr.shape)} with {list(hr.shape)}"
        )
    if sr.ndim < 3 or sr.shape[-3] not in (1, 3) or 0 in sr.shape:
        raise InputError(f"a picture to measure must be [..., 1 or 3, H, W], not {list(sr.shape)}")
    if not (sr.is_floating_point() and hr.is_floating_point()):
        raise InputError("pictures to measure must be floating point in [0, 1]; divide by 255")
    if shave < 0:
        raise InputError(f"shave must be 0 or more, not {shave}")
    height, width = sr.shape[-2] - 2 * shave, sr.shape[-1] - 2 * shave
    if min(height, width) < least:
        raise InputError(
            f"a picture of {sr.shape[-2]} x {sr.shape[-1]} pixels leaves less than {least} x "
            f"{least} to measure after shaving {shave} on each side; take a larger one"
        )
    window = (..., slice(shave, shave + height), slice(shave, shave + width))
    return sr[window].double(), hr[window].double()


def _weighted(picture: Tensor) -> Tensor:
    """LUMA / 256 . RGB: [..., 3, H, W] to [..., 1, H, W]; one channel stays as it is."""
    if picture.shape[-3] == 1:
        return picture
    weights = picture.new_tensor(LUMA)[:, None, None] / 256
    return (picture * weights).sum(dim=-3, keepdim=True)


def _decibel(difference: Tensor) -> float:
    mse = difference.square().mean().item()
    return math.inf if mse == 0 else -10 * math.log10(mse)


def _blur(x: Tensor) -> Tensor:
    """Gaussian window average: [N, 1, H, W] to [N, 1, H - 10, W - 10]."""
    t = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    window = torch.exp(-(t**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
