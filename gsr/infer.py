"""Enlarging pictures of any size in bounded memory: encode LR tiles, render strips of HR rows.

`upscale` is the function for users: whatever kind of picture goes in comes out, larger. `run` is
the same for one float tensor. Both equal the model on the whole picture (to 1e-5), because each
tile is encoded with the encoder's receptive field around it and a HR row depends on no strip.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsr.errors import InputError

if TYPE_CHECKING:
    from gsr.models import GaussianSR

TILE = 192  # side of a tile, LR pixels, without the halo
STRIP_PIXELS = 2**16  # HR pixels rendered at once
MAX_PIXELS = 400_000_000  # largest output, unless the caller raises it: 1.2 GB as bytes


# ---- tensors ------------------------------------------------------------------------------------


def run(
    model: GaussianSR,
    lr: torch.Tensor,
    size: tuple[int, int],
    scale: float | tuple[float, float] | None = None,
    progress: bool = False,
    tile: int = TILE,
) -> torch.Tensor:
    """Enlarge lr [B, 3, h, w] in [0, 1] to float32 [B, 3, H, W], size = (H, W), not clamped.

    Equals `model(lr, size=size, scale=scale)` in evaluation mode to 1e-5, in memory that grows
    with the picture only by what `encode` returns and by the result. Works on the model's device
    and gives the result on that of lr. `scale` (s or (s_y, s_x)) is H / h and W / w if left out;
    `progress` shows a bar on stderr. The model's training flags are left as they were.
    """
    out = torch.empty(lr.shape[0], 3, *size, dtype=torch.float32, device=lr.device)
    with _bar(progress) as bar, _inference(model):
        for start, stop, strip in _strips(model, lr, size, scale, tile, bar):
            out[:, :, start:stop] = strip
    return out


def encode_tiled(
    model: GaussianSR,
    lr: torch.Tensor,
    tile: int = TILE,
    progress: Callable[[int], Any] | None = None,
) -> Any:
    """`model.encode(lr)`, computed tile by tile and stitched: every tensor is [B, ..., h, w].

    Each tile of about tile x tile LR pixels (at least 1) is encoded with `model.halo` more pixels
    on every side where the picture has them, so that its inside is what the whole picture gives.
    `progress` is called with the number of LR pixels encoded so far in each step, halo included.
    """
    height, width = lr.shape[-2:]
    stitched: list[torch.Tensor] | None = None
    for (top, bottom), (y0, y1) in _spans(height, tile, model.halo):
        for (left, right), (x0, x1) in _spans(width, tile, model.halo):
            part = model.encode(lr[..., y0:y1, x0:x1])
            if (y0, y1, x0, x1) == (0, height, 0, width):
                stitched = list(part)
            else:
                if stitched is None:
                    stitched = [field.new_empty(*field.shape[:-2], height, width) for field in part]
                inside = (..., slice(top - y0, bottom - y0), slice(left - x0, right - x0))
                for whole, field in zip(stitched, part, strict=True):
                    whole[..., top:bottom, left:right] = field[inside]
            if progress is not None:
                progress((y1 - y0) * (x1 - x0))
    return type(part)(*stitched)


def _spans(length: int, tile: int, halo: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Cut [0, length) into even tiles: (start, stop) of each, and the same with its halo."""
    # A length that one haloed tile of full size covers is not worth cutting.
    count = 1 if length <= tile + 2 * halo else math.ceil(length / tile)
    edges = [length * i // count for i in range(count + 1)]
    for start, stop in zip(edges, edges[1:], strict=False):
        yield (start, stop), (max(0, start - halo), min(length, stop + halo))


def _strips(
    model: GaussianSR,
    lr: torch.Tensor,
    size: tuple[int, int],
    scale: float | tuple[float, float] | None,
    tile: int,
    bar: Any = None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Encode, then yield (first row, end row, HR rows [B, 3, rows, W] float32) from the top."""
    height, width = size
    tensor = lr.detach().to(_device(model), torch.float32)
    encode_cost, render_cost = _costs(model)
    if bar is not None:
        h, w = lr.shape[-2:]
        tall = sum(b - a for _, (a, b) in _spans(h, tile, model.halo))
        wide = sum(b - a for _, (a, b) in _spans(w, tile, model.halo))
        bar.total = (bar.total or 0) + tall * wide * encode_cost + height * width * render_cost
        bar.refresh()

    def advance(pixels: int, cost: float) -> None:
        if bar is not None:
            bar.update(pixels * cost)

    encoded = encode_tiled(model, tensor, tile, lambda pixels: advance(pixels, encode_cost))
    rows = max(1, STRIP_PIXELS // width)
    for start in range(0, height, rows):
        stop = min(height, start + rows)
        strip = model.render(encoded, size, scale=scale, rows=(start, stop))
        yield start, stop, strip.float()
        advance((stop - start) * width, render_cost)


def _costs(model: GaussianSR) -> tuple[float, float]:
    """Rough work per LR pixel encoded and per HR pixel rendered, in one unit, for the bar."""
    # The encoder is convolutions at LR, whose multiply-adds per pixel are their weights.
    encode = sum(weight.numel() for weight in model.encoder.parameters())
    config = model.config
    if config.mode == "direct":
        # A weight of the compiled splat, with its share of the bicubic base, took as long as 70
        # multiply-adds of a convolution (measured on a CPU).
        return encode, 70.0 * config.direct.gaussians * (2 * config.direct.radius + 1) ** 2
    return encode, sum(weight.numel() for weight in model.head.parameters())


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within; every module's own training flag restored after."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _bar(progress: bool) -> Iterator[Any]:
    if not progress:
        yield None
        return
    from tqdm import tqdm

    shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(desc="gsr", total=0, bar_format=shape, leave=False) as bar:
        yield bar


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


# ---- any picture --------------------------------------------------------------------------------


def target_size(
    shape: tuple[int, int],
    scale: float | Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Size (H, W) and scale (s_y, s_x) of the enlargement of a picture of `shape` (h, w).

    Exactly one of scale (a number, or (s_y, s_x), each from 1 to a million) and size ((H, W),
    each at least that of the picture) is given. Size from scale is rounded to whole pixels.
    Raises InputError for anything else, or for more than `max_pixels` pixels.
    """
    from gsr.models import check_scale, resolve_size

    if (scale is None) == (size is None):
        raise InputError("give either scale or size, exactly one of them")
    h, w = shape
    if scale is not None and (least := min(check_scale(scale))) < 1:
        raise InputError(
            f"scale {least} is below 1; gsr only enlarges, Pillow's Image.resize shrinks"
        )
    out, scales = resolve_size(shape, size, scale)
    if min(scales) < 1:
        raise InputError(
            f"the size {out[1]} x {out[0]} (width x height) is below the picture's {w} x {h}; "
            "gsr only enlarges, Pillow's Image.resize shrinks"
        )
    if out[0] * out[1] > max_pixels:
        raise InputError(
            f"the result would have {out[1]} x {out[0]} = {out[0] * out[1]:,} pixels, more than "
            f"max_pixels (--max-pixels) = {max_pixels:,}; enlarge less, or raise that limit"
        )
    return out, scales


def upscale(
    image: Any,
    scale: float | Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    model: GaussianSR | None = None,
    progress: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """Enlarge a picture to any size; the same kind of object comes back, values clamped.

    `image` is one of
      * a Pillow image. L, LA, RGB and RGBA stay what they are; a palette picture comes back as RGB
        or RGBA, 1-bit and 16-bit ones as L, all others as RGB. Alpha is enlarged bicubically. An
        ICC profile is kept and an EXIF orientation carried out (size then means upright).
      * a NumPy array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] (alpha last), uint8 or in [0, 1]
      * a tensor [3, h, w] or [B, 3, h, w], uint8 or float in [0, 1], on any device.
    Give exactly one of `scale`, a number or (s_y, s_x), each at least 1, and `size`, whole numbers
    (H, W), at least the picture's. `model` is the bundled one (`gsr.load()`) if left out, and
    computes in float32 on its own device. `progress` shows a bar on stderr; `max_pixels` bounds
    H * W.

    Raises InputError for another kind, shape or dtype of picture, values that are not finite or
    outside [0, 1], and sizes or scales that are not as above.
    """
    if model is None:
        model = _bundled()
    elif not (hasattr(model, "encode") and hasattr(model, "render")):
        raise InputError(
            f"model must be a GaussianSR, as gsr.load(path) returns, not {type(model).__name__}"
        )
    with _bar(progress) as bar:
        if isinstance(image, torch.Tensor):
            return _upscale_tensor(image, scale, size, model, max_pixels, bar)
        if isinstance(image, np.ndarray):
            return _upscale_array(image, scale, size, model, max_pixels, bar)
        from PIL import Image

        if isinstance(image, Image.Image):
            return _upscale_pil(image, scale, size, model, max_pixels, bar)
    raise InputError(
        "image must be a Pillow image, a NumPy array or a torch tensor, "
        f"not {type(image).__name__}; gsr.image.read_image reads files"
    )


@functools.lru_cache(maxsize=1)
def _bundled() -> GaussianSR:
    from gsr.checkpoint import load

    return load()


def _upscale_tensor(image, scale, size, model, max_pixels, bar) -> torch.Tensor:
    shape = list(image.shape)
    if image.ndim not in (3, 4) or shape[-3] != 3:
        hint = "; permute(2, 0, 1) puts channels first" if shape[-1:] == [3] else ""
        raise InputError(f"a tensor must be [3, h, w] or [B, 3, h, w], not {shape}{hint}")
    if 0 in shape:
        raise InputError(f"a tensor must not be empty, as {shape} is")
    if image.dtype != torch.uint8 and not image.dtype.is_floating_point:
        raise InputError(f"a tensor must be uint8 or float in [0, 1], not {image.dtype}")
    out, scales = target_size(tuple(shape[-2:]), scale, size, max_pixels)
    image = image.detach()
    if image.dtype != torch.uint8:
        _check_range(float(image.min()), float(image.max()))
    batch = image if image.ndim == 4 else image[None]
    result = torch.empty(len(batch), 3, *out, dtype=image.dtype, device=image.device)
    for lr, hr in zip(batch, result, strict=True):  # one by one: memory stays that of one picture
        lr = lr.float().div(255) if image.dtype == torch.uint8 else lr.float()
        _fill(hr, model, lr[None], out, scales, bar)
    return result if image.ndim == 4 else result[0]


def _fill(hr: torch.Tensor, model, lr, out, scales, bar) -> None:
    """Render into hr [3, H, W], or [1, H, W] as grey: uint8 levels, or floats in [0, 1]."""
    with _inference(model):
        for start, stop, strip in _strips(model, lr, out, scales, TILE, bar):
            strip = strip[0].clamp_(0, 1)
            if hr.shape[0] == 1:
                weights = strip.new_tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's L
                strip = (strip * weights[:, None, None]).sum(0, keepdim=True).clamp_(0, 1)
            hr[:, start:stop] = strip.mul_(255).round_() if hr.dtype == torch.uint8 else strip


def _upscale_array(image, scale, size, model, max_pixels, bar) -> np.ndarray:
    shape = list(image.shape)
    if image.ndim not in (2, 3) or (image.ndim == 3 and shape[2] not in (1, 3, 4)):
        hint = "; transpose(1, 2, 0) puts channels last" if shape[:1] == [3] else ""
        raise InputError(
            f"an array must be [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], not {shape}{hint}"
        )
    if 0 in shape:
        raise InputError(f"an array must not be empty, as {shape} is")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise InputError(f"an array must be uint8 or float in [0, 1], not {image.dtype}")
    out, scales = target_size(tuple(shape[:2]), scale, size, max_pixels)
    if image.dtype != np.uint8:
        _check_range(float(image.min()), float(image.max()))
    planes = image if image.ndim == 3 else image[..., None]
    channels = planes.shape[2]
    colours = planes[..., :3] if channels > 1 else planes.repeat(3, axis=2)
    # A copy, because arrays may be read-only, reversed or in the other byte order.
    lr = torch.from_numpy(np.array(colours.transpose(2, 0, 1), np.float32, order="C"))[None]
    result = np.empty((*out, channels), np.uint8 if image.dtype == np.uint8 else np.float32)
    hr = torch.from_numpy(result).permute(2, 0, 1)[: min(channels, 3)]  # shares its memory
    _fill(hr, model, lr.div_(255) if image.dtype == np.uint8 else lr, out, scales, bar)
    if channels == 4:
        result[..., 3] = _bicubic(planes[..., 3], out)
    return (result if image.ndim == 3 else result[..., 0]).astype(image.dtype, copy=False)


def _upscale_pil(image, scale, size, model, max_pixels, bar):
    from PIL import Image

    from gsr.image import has_alpha, to_rgb, upright

    if 0 in image.size:
        raise InputError("the picture has no pixels")
    image = upright(image)
    grey = image.mode in ("L", "LA", "La", "1", "I", "F") or image.mode.startswith("I;16")
    target_size((image.height, image.width), scale, size, max_pixels)  # before any conversion
    array = np.asarray(to_rgb(image))
    if grey:
        array = array[..., :1]
    if has_alpha(image):
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    array = _upscale_array(array, scale, size, model, max_pixels, bar)
    result = Image.fromarray(array[..., 0] if grey else array)
    if has_alpha(image):
        result.putalpha(Image.fromarray(_bicubic(alpha, array.shape[:2])))
    # The profile of a CMYK or Lab file does not describe RGB.
    if "icc_profile" in image.info and (grey or image.mode in ("RGB", "RGBA", "RGBX", "P", "PA")):
        result.info["icc_profile"] = image.info["icc_profile"]
    return result


def _bicubic(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One plane [h, w], uint8 or float in [0, 1], enlarged to size (H, W) by Pillow, clamped."""
    from PIL import Image

    if plane.dtype == np.uint8:
        picture = Image.fromarray(np.ascontiguousarray(plane))
    else:
        picture = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    enlarged = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return enlarged if plane.dtype == np.uint8 else enlarged.clip(0, 1)


def _check_range(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("the picture holds values that are not finite numbers (NaN or infinity)")
    if low < 0 or high > 1:
        hint = "; divide by 255" if low >= 0 and high <= 255 else ""
        raise InputError(
            f"a float picture must lie in [0, 1], but this one spans [{low:.4g}, {high:.4g}]{hint}"
        )
