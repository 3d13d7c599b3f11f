"""How near an image is to the original: PSNR and SSIM as super-resolution is measured.

Every function takes two images as floats in [0, 1], clamped but not rounded to 8 bits, and leaves
out `shave` pixels on each side. Two published protocols choose metric and shave for a scale:
`benchmark` (Set5, Set14, B100, Urban100: luma) and `div2k` (RGB); `PROTOCOLS` finds them by name.
Computed in float64. `perceptual` makes LPIPS and DISTS of the package piq, which are networks.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gsr.errors import InputError

# ITU-R BT.601 luma of RGB in [0, 1]: Y = 16 + 255 (LUMA / 256 . RGB), within 16 .. 235 of 255.
LUMA = (65.738, 129.057, 25.064)
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5

# What piq calls them, and where it has the weights from: torch.hub keeps them under these names.
PIQ = "https://github.com/photosynthesis-team"
PERCEPTUAL = {
    "lpips": ("LPIPS", f"{PIQ}/photosynthesis.metrics/releases/download/v0.4.0/lpips_weights.pt"),
    "dists": ("DISTS", f"{PIQ}/piq/releases/download/v0.4.1/dists_weights.pt"),
}
VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_LEAST = 32  # pixels a side: piq runs all of its five halvings


def psnr(sr: Tensor, hr: Tensor, shave: int = 0) -> float:
    """Return the peak signal-to-noise ratio over all channels, in dB; inf for equal images.

    Args:
        sr, hr: [..., C, H, W], the same shape, in [0, 1].
        shave: pixels left out on each side.

    Raises:
        InputError: other shapes or dtypes, or nothing left after shaving.
    """
    sr, hr = _checked(sr, hr, shave)
    return _decibel(sr - hr)


def psnr_y(sr: Tensor, hr: Tensor, shave: int = 0) -> float:
    """Return the PSNR of the luma difference, LUMA / 256 . (sr - hr), peak 1, in dB.

    With one channel (C = 1) that channel is the luma and is measured as it is. A grey image that
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


def luma(image: Tensor) -> Tensor:
    """Convert RGB [..., 3, H, W] in [0, 1] to Y of YCbCr [..., 1, H, W] in 16 .. 235.

    One channel counts as luma already and is only scaled, to 0 .. 255.
    """
    if image.shape[-3] == 1:
        return image * 255
    return 16 + 255 * _weighted(image)


def ssim(sr: Tensor, hr: Tensor, shave: int = 0) -> float:
    """Return the structural similarity of the luma, at most 1 (equal images).

    Gaussian window of 11 x 11 with sigma 1.5, only where it fits into the image, K1 = 0.01,
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


def perceptual(
    name: str, device: torch.device | str = "cpu"
) -> Callable[[Tensor, Tensor, int], float]:
    """Make LPIPS or DISTS: a function (sr, hr, shave) like `psnr`; 0 for equal images.

    Both compare features of VGG16 (RGB, float32). The figures of LPIPS are those of its VGG
    variant: of AlexNet's they are another quantity. DISTS downsamples images of more than 256
    pixels a side, as published.

    Args:
        name: "lpips" or "dists".
        device: where the network runs.

    Raises:
        InputError: an unknown name, no piq, or weights that are missing or damaged: nothing is
            ever downloaded. The function: as `psnr`, or less than 32 pixels a side to measure.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
    CVPR 2018; Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity",
    IEEE TPAMI 44 (5), 2022. Computed by piq.
    """
    if name not in PERCEPTUAL:
        raise InputError(f"perceptual metric {name!r} is none of {', '.join(PERCEPTUAL)}")
    kind, url = PERCEPTUAL[name]
    try:
        piq = importlib.import_module("piq")
    except Exception as error:  # a torchvision made for another torch raises RuntimeError
        raise InputError(
            f"{name} (--perceptual) needs piq and a torchvision made for this torch ({error}); "
            "install them with pip install 'gaussiansr[perceptual]'"
        ) from None
    # piq would download what is missing.
    folder = Path(torch.hub.get_dir(), "checkpoints")
    for weights in (url, VGG16):
        path = folder / weights.rpartition("/")[2]
        if not path.is_file():
            raise InputError(
                f"{name} (--perceptual) needs the weights {path}, which are not there; "
                f"put there what {weights} gives"
            )
    try:
        with _tensors_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of how piq calls torchvision
            network = getattr(piq, kind)()
    except Exception as error:  # its type depends on what is wrong with the file
        raise InputError(
            f"{name} (--perceptual): its weights in {folder} cannot be loaded "
            f"({type(error).__name__}: {error}); download them again"
        ) from None

    def measure(sr: Tensor, hr: Tensor, shave: int = 0) -> float:
        sr, hr = _checked(sr, hr, shave, least=VGG16_LEAST)
        if sr.shape[-3] != 3:
            raise InputError(f"{name} compares RGB images, not those of {sr.shape[-3]} channel")
        with torch.inference_mode():
            pair = (x.reshape(-1, *x.shape[-3:]).to(device, torch.float32) for x in (sr, hr))
            return float(network(*pair))

    return measure


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Have torch.load refuse everything but tensors: piq would execute what is in its files."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        del os.environ[key]
        if before is not None:
            os.environ[key] = before


@dataclass(frozen=True)
class Protocol:
    """A published way to measure: which PSNR, and how many pixels are shaved at a scale."""

    name: str
    colour: str  # "Y" or "RGB": what the PSNR compares
    metric: Callable[[Tensor, Tensor, int], float]
    extra: int  # pixels shaved besides the scale

    def shave(self, scale: float) -> int:
        """Return the pixels left out on each side: scale, rounded up, + extra.

        The published protocols only know whole scales; rounding up never measures more border
        than they would.
        """
        return math.ceil(scale) + self.extra

    def __call__(self, sr: Tensor, hr: Tensor, scale: float) -> float:
        """Return the PSNR in dB of sr against hr, [..., 3, H, W] in [0, 1], upscaled by scale."""
        return self.metric(sr, hr, self.shave(scale))


benchmark = Protocol("benchmark", "Y", psnr_y, 0)
div2k = Protocol("div2k", "RGB", psnr, 6)
PROTOCOLS = {protocol.name: protocol for protocol in (benchmark, div2k)}


def as_protocol(protocol: str | Protocol) -> Protocol:
    """Return the protocol of a name, or itself; InputError for an unknown name."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def _checked(sr: Tensor, hr: Tensor, shave: int, *, least: int = 1) -> tuple[Tensor, Tensor]:
    """Return both images shaved, in float64, or raise InputError."""
    if sr.shape != hr.shape:
        raise InputError(
            f"images of one size must be compared, not {list(sr.shape)} with {list(hr.shape)}"
        )
    if sr.ndim < 3 or sr.shape[-3] not in (1, 3) or 0 in sr.shape:
        raise InputError(f"an image to measure must be [..., 1 or 3, H, W], not {list(sr.shape)}")
    if not (sr.is_floating_point() and hr.is_floating_point()):
        raise InputError("images to measure must be floating point in [0, 1]; divide by 255")
    if shave < 0:
        raise InputError(f"shave must be 0 or more, not {shave}")
    check_size(sr.shape[-2:], shave, least)
    height, width = sr.shape[-2] - 2 * shave, sr.shape[-1] - 2 * shave
    window = (..., slice(shave, shave + height), slice(shave, shave + width))
    return sr[window].double(), hr[window].double()


def check_size(size: Sequence[int], shave: int, least: int = SSIM_WINDOW) -> None:
    """Raise InputError if shaving leaves less than `least` pixels a side of size (H, W)."""
    if min(size) - 2 * shave < least:
        raise InputError(
            f"an image of {size[0]} x {size[1]} pixels leaves less than {least} x "
            f"{least} to measure after shaving {shave} on each side; take a larger one"
        )


def _weighted(image: Tensor) -> Tensor:
    """Return LUMA / 256 . RGB: [..., 3, H, W] to [..., 1, H, W]; one channel stays."""
    if image.shape[-3] == 1:
        return image
    weights = image.new_tensor(LUMA)[:, None, None] / 256
    return (image * weights).sum(dim=-3, keepdim=True)


def _decibel(difference: Tensor) -> float:
    mse = difference.square().mean().item()
    return math.inf if mse == 0 else -10 * math.log10(mse)


def _blur(x: Tensor) -> Tensor:
    """Average over a Gaussian window: [N, 1, H, W] to [N, 1, H - 10, W - 10]."""
    t = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    window = torch.exp(-(t**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
