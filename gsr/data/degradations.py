"""Degradations: how the LR images that people have differ from a clean bicubic reduction.

`data.degrade` says, for a share of the training patches, how LR is made of HR: the resampling
kernel, then blur, noise and JPEG, in the order of the classical degradation model (Zhang et al.,
"Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", ICCV 2021), or in
that of `stages`, which may name functions of one's own: (LR image, generator, **keys) to an image
of that size. Every function takes its random numbers from a generator that the caller seeds, so
that a patch is a function of (seed, step, place in the batch).

LR images are Pillow images in RGB: their filters and their JPEG encoder are those of the files that
people have.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from gsr import parts
from gsr.errors import InputError

if TYPE_CHECKING:
    from gsr.config import BlurConfig, DegradeConfig, JpegConfig, NoiseConfig

KERNELS = {
    "bicubic": Image.Resampling.BICUBIC,  # a = -0.5, antialiased
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
}
SUBSAMPLING = {"444": 0, "420": 2}  # Pillow's numbers
BLOCK = 16  # side of the pixels that JPEG at 4:2:0 treats as one; 8 of them at 4:4:4
MARGIN = BLOCK  # LR pixels that a degraded patch is cut out of on each side, beyond the patch


def blur(image: Image.Image, config: BlurConfig, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur; sigma drawn uniformly from `config.sigma`, LR pixels."""
    low, high = config.sigma
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(low, high)))


def noise(image: Image.Image, config: NoiseConfig, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise plus Poisson (shot) noise, each of a strength drawn uniformly.

    `config.sigma` is the standard deviation of the Gaussian part and `config.shot` that of the
    Poisson part where the image is white, both in levels of 255. One in `config.grey` has the same
    noise in all channels.
    """
    sigma, shot = (rng.uniform(low, high) for low, high in (config.sigma, config.shot))
    return add_noise(image, sigma, shot, rng, grey=rng.random() < config.grey)


def add_noise(
    image: Image.Image,
    sigma: float,
    shot: float,
    rng: np.random.Generator,
    grey: bool = False,
) -> Image.Image:
    """An image with Gaussian noise of `sigma` and Poisson noise of `shot` (at white), 0 to 255."""
    x = np.asarray(image, np.float32)
    shape = (*x.shape[:2], 1) if grey else x.shape
    level = x.mean(axis=2, keepdims=True) if grey else x
    noisy = x + sigma * rng.standard_normal(shape, np.float32)
    if shot > 0:
        # White is `peak` photons, of which the standard deviation is sqrt(peak).
        peak = (255 / shot) ** 2
        noisy += rng.poisson(level / 255 * peak) * (255 / peak) - level
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, config: JpegConfig, rng: np.random.Generator) -> Image.Image:
    """JPEG of a drawn quality, 4:2:0 or 4:4:4; some are saved again, on another grid of blocks."""
    times = 2 if rng.random() < config.twice else 1
    for _ in range(times):
        quality = int(rng.integers(config.quality[0], config.quality[1] + 1))
        subsampling = "420" if rng.random() < config.chroma_420 else "444"
        y, x = (int(n) for n in rng.integers(0, BLOCK, 2))
        image = shifted_jpeg(image, quality, subsampling, (y, x))
    return image


def shifted_jpeg(
    image: Image.Image, quality: int, subsampling: str, shift: tuple[int, int]
) -> Image.Image:
    """`save_jpeg` with the grid of blocks moved by `shift` (y, x) pixels, 0 to 15.

    What the rows and columns above and left of the image would be is made up (edge pixels
    repeated): the caller cuts a margin off.
    """
    y, x = shift
    padded = np.pad(np.asarray(image), ((y, 0), (x, 0), (0, 0)), mode="edge")
    saved = save_jpeg(Image.fromarray(padded), quality, subsampling)
    return saved.crop((x, y, saved.width, saved.height))


def save_jpeg(image: Image.Image, quality: int, subsampling: str = "420") -> Image.Image:
    """An RGB image as it comes back from a JPEG file of Pillow; quality 1 to 100."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=SUBSAMPLING[subsampling])
    return Image.open(file).convert("RGB")


# Each has its keys in a section of that name in `gsr.config.DegradeConfig`.
STAGES: dict[str, Callable] = {"blur": blur, "noise": noise, "jpeg": jpeg}


OWN = "data.degrade.stages"  # where functions of the user's own are named


def check_stages(config: DegradeConfig | None) -> None:
    """Raise InputError unless the functions that a config names are there and take their keys."""
    for stage in config.stages if config else ():
        if stage.name not in STAGES:
            function = parts.find(stage.name, {}, OWN)
            parts.check_keys(function, (None, None), stage.keys, f"{OWN}: {stage.name}")


def degrade(
    hr: Image.Image,
    size: int,
    box: tuple[float, float, float, float],
    config: DegradeConfig | None = None,
    rng: np.random.Generator | None = None,
) -> Image.Image:
    """LR patch of `size` x `size` pixels from the square `box` (left, top, right, bottom) of `hr`.

    Without a config, and for the share `config.clean` of patches, it is Pillow's antialiased
    bicubic and nothing else, which needs no generator. The resampling filters read what `hr` holds
    around the box, and so do the degradations, up to `MARGIN` LR pixels.

    Raises:
        InputError: a function of the user's own returns an image of another size or mode.
    """
    if config is None or rng is None or rng.random() < config.clean:
        return hr.resize((size, size), Image.Resampling.BICUBIC, box)
    kernel = KERNELS[config.kernels[rng.integers(len(config.kernels))]]
    # Whole LR pixels on each side, as many as `hr` has around the box.
    pitch = (box[2] - box[0]) / size
    left, top = (min(MARGIN, int(n / pitch + 1e-9)) for n in box[:2])
    right, bottom = (
        min(MARGIN, int((n - edge) / pitch + 1e-9))
        for n, edge in zip(hr.size, box[2:], strict=True)
    )
    wide = (
        box[0] - left * pitch, box[1] - top * pitch,
        min(box[2] + right * pitch, hr.width), min(box[3] + bottom * pitch, hr.height),
    )  # fmt: skip
    lr = hr.resize((left + size + right, top + size + bottom), kernel, wide)
    for stage in config.stages:
        built_in = stage.name in STAGES
        section = getattr(config, stage.name) if built_in else stage
        if rng.random() >= section.share:
            continue
        if built_in:
            lr = STAGES[stage.name](lr, section, rng)
            continue
        before, lr = lr, parts.find(stage.name, {}, OWN)(lr, rng, **stage.keys)
        if not isinstance(lr, Image.Image):
            raise InputError(
                f"{OWN}: {stage.name} returns {type(lr).__name__}; it must be a Pillow image"
            )
        if (lr.size, lr.mode) != (before.size, "RGB"):
            raise InputError(
                f"{OWN}: {stage.name} makes an image of {lr.size} in {lr.mode} of one of "
                f"{before.size} in RGB; it must keep both"
            )
    return lr.crop((left, top, left + size, top + size))
