"""Upscale images of any kind: Pillow images, arrays and tensors in, the same kind out.

`upscale` is the public function. The work is done strip by strip (`gsr.inference.strips`), so that
memory stays bounded; `upscale_to_png` does not even hold the result.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsr.errors import InputError
from gsr.inference.alpha import fill_hidden
from gsr.inference.strips import StripRenderer, inference, model_device, progress_bar

if TYPE_CHECKING:
    from gsr.models import GaussianSR

MAX_PIXELS = 400_000_000  # largest output, unless the caller raises it: 1.2 GB as bytes


def target_size(
    shape: tuple[int, int],
    scale: float | Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Size (H, W) and scale (s_y, s_x) of the enlargement of an image of `shape` (h, w).

    Exactly one of scale (a number, or (s_y, s_x), each from 1 to a million) and size ((H, W),
    each at least that of the image) is given. Size from scale is rounded to whole pixels.
    Raises InputError for anything else, or for more than `max_pixels` pixels.
    """
    from gsr.models.sizes import check_scale, resolve_size

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
            f"the size {out[1]} x {out[0]} (width x height) is below the image's {w} x {h}; "
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
    max_memory: int | None = None,
    precision: str = "auto",
) -> Any:
    """Enlarge an image to any size; the same kind of object comes back, values clamped.

    `image` is one of
      * a Pillow image. L, LA, RGB and RGBA stay what they are; a palette image comes back as RGB
        or RGBA, 1-bit and 16-bit ones as L, all others as RGB. Alpha goes through the model as well, and colours
        hidden under an alpha of 0 count for nothing. An ICC profile is kept and an EXIF
        orientation carried out (size then means upright).
      * a NumPy array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] (alpha last), uint8 or in [0, 1]
      * a tensor [3, h, w] or [B, 3, h, w], uint8 or float in [0, 1], on any device.
    Give exactly one of `scale`, a number or (s_y, s_x), each at least 1, and `size`, whole numbers
    (H, W), at least the image's. `model` is the bundled one (`gsr.load()`) if left out, and
    computes on its own device. `progress` shows a bar on stderr; `max_pixels` bounds H * W;
    `max_memory` is how many bytes the process may hold at a time, image and result included.

    `precision` is "fp32", "bf16" or "auto". Auto takes bf16 where the processor is fast in it and
    the model folder says that it costs at most 0.01 dB.

    Raises InputError for another kind, shape or dtype of image, values that are not finite or
    outside [0, 1], and sizes or scales that are not as above.
    """
    model = _usable_model(model)
    with progress_bar(progress) as bar:
        fill = functools.partial(_fill, model, max_memory, precision, bar)
        if isinstance(image, torch.Tensor):
            return _upscale_tensor(image, scale, size, max_pixels, fill)
        if isinstance(image, np.ndarray):
            return _upscale_array(image, scale, size, max_pixels, fill)
        from PIL import Image

        if isinstance(image, Image.Image):
            return _upscale_pil(image, scale, size, max_pixels, fill)
    raise InputError(
        "image must be a Pillow image, a NumPy array or a torch tensor, "
        f"not {type(image).__name__}; gsr.io.image.read_image reads files"
    )


def _usable_model(model) -> GaussianSR:
    """The model, or the bundled one for None."""
    if model is None:
        return _bundled()
    if not (hasattr(model, "encode") and hasattr(model, "render")):
        raise InputError(
            f"model must be a GaussianSR, as gsr.load(path) returns, not {type(model).__name__}"
        )
    return model


@functools.lru_cache(maxsize=1)
def _bundled() -> GaussianSR:
    from gsr.models.checkpoint import load

    return load()


def _upscale_tensor(image, scale, size, max_pixels, fill) -> torch.Tensor:
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
    for lr, hr in zip(batch, result, strict=True):  # one by one: memory stays that of one image
        fill(lr, None, out, scales, hr)
    return result if image.ndim == 4 else result[0]


def _fill(
    model,
    max_memory,
    precision,
    bar,
    lr: torch.Tensor,
    alpha,
    out,
    scales,
    hr: torch.Tensor,
    later=0,
):
    """Render lr and alpha, as `_render` takes them, into hr of as many planes.

    `later` is the bytes that the caller will take besides hr.
    """

    def put(start: int, stop: int, strip: torch.Tensor) -> None:
        hr[:, start:stop] = strip

    _render(model, max_memory, precision, bar, lr, alpha, out, scales, put, hr.nbytes + later)


def _render(model, max_memory, precision, bar, lr, alpha, out, scales, put, result: int) -> None:
    """put(start, stop, HR rows) for the upscaled lr [3, h, w] or [1, h, w], from the top.

    With alpha [h, w] they have one plane more than lr, otherwise as many. They are uint8 if lr is;
    `result` is the bytes that the caller takes.
    """
    device = model_device(model)
    # An opaque image stays opaque to the last bit, and costs no second pass.
    constant = None if alpha is None or alpha.min() != alpha.max() else alpha[0, 0]
    planes = [lr] if alpha is None or constant is not None else [lr, alpha[None]]

    def source(start: int, stop: int) -> torch.Tensor:
        rows = [p[:, start:stop].to(device).float().expand(3, -1, -1) for p in planes]
        batch = torch.stack(rows)
        return batch / 255 if lr.dtype == torch.uint8 else batch

    def finish(strip: torch.Tensor) -> torch.Tensor:
        strip = strip.clamp_(0, 1)
        parts = [strip[0] if lr.shape[0] == 3 else _grey(strip[0])]
        parts += [_grey(one) for one in strip[1:]]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        joined = joined.mul_(255).round_().to(torch.uint8) if lr.dtype == torch.uint8 else joined
        if constant is not None:
            joined = torch.cat([joined, constant.to(joined).expand_as(joined[:1])])
        return joined

    shape = (len(planes), 3, *lr.shape[-2:])
    with inference(model):
        renderer = StripRenderer(
            model, source, shape, out, scales, precision, finish=finish, bar=bar
        )
        renderer.fit(max_memory, result)
        # One strip is copied or compressed while the next ones are computed.
        with ThreadPoolExecutor(1) as writer:
            writing: Future | None = None
            for rows in renderer.strips():
                if writing is not None:
                    writing.result()
                writing = writer.submit(put, *rows)
            if writing is not None:
                writing.result()


def _grey(rgb: torch.Tensor) -> torch.Tensor:
    """The luma [1, h, w] of rgb [3, h, w] in [0, 1]."""
    weights = rgb.new_tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's L
    return (rgb * weights[:, None, None]).sum(0, keepdim=True).clamp_(0, 1)


def _upscale_array(image, scale, size, max_pixels, fill) -> np.ndarray:
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
    if planes.dtype != np.uint8:
        planes = planes.astype(np.float32)
    if min(planes.strides) < 0 or not planes.flags.writeable:  # neither can be a tensor
        planes = planes.copy()
    result = np.empty((*out, channels), planes.dtype)
    colour, alpha = (planes, None) if channels < 4 else (planes[..., :3], planes[..., 3])
    fill(*_as_tensors(colour, alpha), out, scales, torch.from_numpy(result).permute(2, 0, 1))
    return (result if image.ndim == 3 else result[..., 0]).astype(image.dtype, copy=False)


def _upscale_pil(image, scale, size, max_pixels, fill):
    from PIL import Image

    image = _upright(image)
    out, scales = target_size((image.height, image.width), scale, size, max_pixels)
    array, alpha, profile = _planes(image)
    channels = array.shape[2] + (alpha is not None)
    result = np.empty((*out, channels), np.uint8)
    hr = torch.from_numpy(result).permute(2, 0, 1)
    # Pillow's own copy, 4 bytes a pixel, and the file as it is in memory before it is written.
    fill(*_as_tensors(array, alpha), out, scales, hr, 7 * math.prod(out))
    result = Image.fromarray(result[..., 0] if channels == 1 else result)
    if profile is not None:
        result.info["icc_profile"] = profile
    return result


def upscale_to_png(
    path: str | os.PathLike,
    image: Any,
    scale: float | Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    model: GaussianSR | None = None,
    progress: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_memory: int | None = None,
    precision: str = "auto",
) -> tuple[int, int]:
    """Write to a PNG file what `upscale` makes of a Pillow image; returns its size (H, W).

    Strip by strip: the result is never in memory as a whole. The file appears when it is complete.
    Arguments and errors are those of `upscale`, besides an InputError for a file that cannot be
    written.
    """
    from gsr.io.png import png_writer

    model = _usable_model(model)
    image = _upright(image)
    out, scales = target_size((image.height, image.width), scale, size, max_pixels)
    array, alpha, profile = _planes(image)
    channels = array.shape[2] + (alpha is not None)
    with progress_bar(progress) as bar, png_writer(path, out, channels, profile) as write:

        def put(start: int, stop: int, strip: torch.Tensor) -> None:
            write(strip.permute(1, 2, 0).cpu().numpy())

        lr = _as_tensors(array, alpha)
        _render(model, max_memory, precision, bar, *lr, out, scales, put, 0)
    return out


def _upright(image):
    from gsr.io.image import upright

    if 0 in image.size:
        raise InputError("the image has no pixels")
    return upright(image)


def _planes(image) -> tuple[np.ndarray, np.ndarray | None, bytes | None]:
    """An upright Pillow image: uint8 [h, w, 1] (grey) or [h, w, 3], alpha [h, w], ICC profile."""
    from gsr.io.image import has_alpha, to_rgb

    grey = image.mode in ("L", "LA", "La", "1", "I", "F") or image.mode.startswith("I;16")
    array = np.array(to_rgb(image))
    alpha = np.array(image.convert("RGBA"))[..., 3] if has_alpha(image) else None
    # The profile of a CMYK or Lab file does not describe RGB.
    keeps = grey or image.mode in ("RGB", "RGBA", "RGBX", "P", "PA")
    profile = image.info.get("icc_profile") if keeps else None
    return np.ascontiguousarray(array[..., :1]) if grey else array, alpha, profile


def _as_tensors(colour: np.ndarray, alpha: np.ndarray | None) -> tuple[torch.Tensor, Any]:
    """Colour [h, w, C] as [C, h, w], filled where alpha [h, w] hides it; and alpha."""
    if alpha is None:
        return torch.from_numpy(colour).permute(2, 0, 1), None
    alpha = np.ascontiguousarray(alpha)
    colour = fill_hidden(colour, alpha)
    return torch.from_numpy(colour).permute(2, 0, 1), torch.from_numpy(alpha)


def _check_range(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("the image holds values that are not finite numbers (NaN or infinity)")
    if low < 0 or high > 1:
        hint = "; divide by 255" if low >= 0 and high <= 255 else ""
        raise InputError(
            f"a float image must lie in [0, 1], but this one spans [{low:.4g}, {high:.4g}]{hint}"
        )
