"""Upscale images of any kind: Pillow images, arrays and tensors in, the same kind out.

`upscale` is the public function. The work is done strip by strip (`gsr.inference.strips`), so that
memory stays bounded; `upscale_to_file` does not even hold the result.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from gsr.errors import InputError
from gsr.inference.alpha import fill_hidden
from gsr.inference.strips import inference, make_renderer, model_device, progress_bar

if TYPE_CHECKING:
    from gsr.io.source import Source
    from gsr.io.writer import NextPage
    from gsr.models import GaussianSR

LEVELS = {torch.uint8: 255, torch.uint16: 65535}  # types of whole numbers, and their white
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_PIXELS = 400_000_000  # largest output, unless the caller raises it: 1.2 GB as bytes


def target_size(
    shape: tuple[int, int],
    scale: float | Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    max_pixels: int | None = MAX_PIXELS,
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Size (H, W) and scale (s_y, s_x) of the result for an image of `shape` (h, w).

    Exactly one of scale (a number, or (s_y, s_x), each from 1 to a million) and size ((H, W),
    each at least that of the image) is given. Size from scale is rounded to whole pixels.
    Raises InputError for anything else, or for more than `max_pixels` pixels (None: no limit).
    """
    from gsr.models.sizes import check_scale, resolve_size

    if (scale is None) == (size is None):
        raise InputError("give either scale or size, exactly one of them")
    h, w = shape
    if scale is not None and (least := min(check_scale(scale))) < 1:
        raise InputError(
            f"scale {least} is below 1; gsr only upscales, Pillow's Image.resize downsamples"
        )
    out, scales = resolve_size(shape, size, scale)
    if min(scales) < 1:
        raise InputError(
            f"the size {out[1]} x {out[0]} (width x height) is below the image's {w} x {h}; "
            "gsr only upscales, Pillow's Image.resize downsamples"
        )
    if max_pixels is not None and out[0] * out[1] > max_pixels:
        raise InputError(
            f"the result would have {out[1]} x {out[0]} = {out[0] * out[1]:,} pixels, more than "
            f"max_pixels (--max-pixels) = {max_pixels:,}; upscale less, or raise that limit"
        )
    return out, scales


def upscale(
    image: Any,
    scale: float | Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    model: GaussianSR | None = None,
    progress: bool = False,
    max_pixels: int | None = MAX_PIXELS,
    max_memory: int | None = None,
    precision: str = "auto",
) -> Any:
    """Upscale an image to any size; the same kind of object comes back, values clamped.

    `image` is one of
      * a Pillow image. L, LA, RGB and RGBA stay what they are, and so do I;16, I and F (16-bit and
        floating-point grey); a palette image comes back as RGB or RGBA, a 1-bit one as L, all
        others as RGB. Alpha goes through the model as well, and colours hidden under an alpha of 0
        count for nothing. ICC profile, EXIF, XMP and resolution are kept in `info`; an EXIF
        orientation is carried out (size then means upright).
      * a NumPy array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] (alpha last), uint8, uint16 or in
        [0, 1]
      * a tensor [3, h, w] or [B, 3, h, w], uint8, uint16 or float in [0, 1], on any device.
    Give exactly one of `scale`, a number or (s_y, s_x), each at least 1, and `size`, whole numbers
    (H, W), at least the image's. `model` is the bundled one (`gsr.load()`) if left out, and
    computes on its own device. `progress` shows a bar on stderr; `max_pixels` bounds H * W;
    `max_memory` is how many bytes the process may hold at a time, image and result included.

    `precision` is "fp32", "bf16" or "auto". Auto takes bf16 where the processor is fast in it and
    the model folder says that it costs at most 0.01 dB. What is float32 has all its digits, on a
    GPU too: TF32 is off meanwhile, whatever PyTorch's settings are.

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
    kinds = {parameter.dtype for parameter in model.parameters()}
    if kinds != {torch.float32}:
        raise InputError(
            f"the model's weights must be float32, not {', '.join(sorted(map(str, kinds)))}: call "
            'model.float(), and choose by precision="bf16" what it computes in'
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
    if image.layout != torch.strided or image.device.type == "meta":
        raise InputError("a tensor must be dense and hold values, not sparse or on device meta")
    if image.dtype not in (*LEVELS, *FLOATS):
        raise InputError(f"a tensor must be uint8, uint16 or float in [0, 1], not {image.dtype}")
    out, scales = target_size(tuple(shape[-2:]), scale, size, max_pixels)
    image = image.detach()
    if image.dtype not in LEVELS:
        _check_range(*torch.stack([image.min(), image.max()]).tolist())  # waits for a GPU once
    batch = image if image.ndim == 4 else image[None]
    result = torch.empty(len(batch), 3, *out, dtype=image.dtype, device=image.device)
    for lr, hr in zip(batch, result, strict=True):  # one by one: memory stays that of one image
        fill(_plain(lr), out, scales, hr)
    return result if image.ndim == 4 else result[0]


class Planes(NamedTuple):
    """What is rendered: lr [1 or 3, h, w], alpha [h, w] of the same type or None.

    `white` is the level of lr that is 1 for the network, `top` the level that 1 is in the result,
    which has the type `kind`.
    """

    lr: torch.Tensor
    alpha: torch.Tensor | None
    white: float
    top: float
    kind: torch.dtype


def _plain(lr: torch.Tensor, alpha: torch.Tensor | None = None) -> Planes:
    """Planes of the full range of their type (floats: [0, 1]), for a result of that type."""
    top = LEVELS.get(lr.dtype, 1)
    return Planes(lr, alpha, top, top, lr.dtype)


def _fill(model, max_memory, precision, bar, planes, out, scales, hr: torch.Tensor, later=0):
    """Render planes into hr [C, H, W]; `later` is the bytes the caller will take besides it."""

    def put(start: int, stop: int, strip: torch.Tensor) -> None:
        hr[:, start:stop] = strip

    like = {"to": hr.device, "interleaved": hr.stride(0) == 1}
    _render(model, max_memory, precision, bar, planes, out, scales, put, hr.nbytes + later, **like)


def _render(
    model, max_memory, precision, bar, planes: Planes, out, scales, put, result: int,
    *, to: torch.device | str = "cpu", interleaved: bool = True,
):  # fmt: skip
    """put(start, stop, HR rows) for the upscaled planes, from the top: colours, then alpha if any.

    `result` is the bytes that the caller takes. The rows are wanted on the device `to`; with
    `interleaved` the channels of a pixel lie together where they are put.
    """
    lr, alpha, white, top, kind = planes
    device = model_device(model)
    # An opaque image stays opaque to the last bit, and costs no second pass.
    constant = alpha is not None and bool((alpha == alpha[0, 0]).all())
    sources = [lr] if alpha is None or constant else [lr, alpha[None]]
    whites = [white, LEVELS.get(lr.dtype, 1)]

    def source(start: int, stop: int) -> torch.Tensor:
        rows = [
            p[:, start:stop].to(device, non_blocking=True).float().expand(3, -1, -1)
            for p in sources
        ]
        rows = [r if w == 1 else r / w for r, w in zip(rows, whites, strict=False)]
        return torch.stack(rows)

    def finish(strip: torch.Tensor) -> torch.Tensor:
        strip = strip.clamp_(0, 1)
        colour = strip[0] if lr.shape[0] == 3 else _grey(strip[0])
        colour = _quantise(colour, top, kind)
        if alpha is None:
            return colour
        full = LEVELS.get(kind, 1)
        if constant:
            one = alpha[0, 0].to(device, non_blocking=True).float() / whites[1]
            return torch.cat([colour, _quantise(one.expand_as(strip[0, :1]).clone(), full, kind)])
        return torch.cat([colour, _quantise(_grey(strip[1]), full, kind)])

    shape = (len(sources), 3, *lr.shape[-2:])
    with inference(model):
        renderer = make_renderer(
            model, source, shape, out, scales, precision, finish=finish, bar=bar, to=to,
            interleaved=interleaved,
        )  # fmt: skip
        renderer.fit(max_memory, result)
        if torch.device(to).type != "cpu":  # in the order of the device's own stream
            for rows in renderer.strips():
                put(*rows)
            return
        # One strip is copied or compressed while the next ones are computed.
        with ThreadPoolExecutor(1) as writer:
            writing: Future | None = None
            for rows in renderer.strips():
                if writing is not None:
                    writing.result()
                writing = writer.submit(put, *rows)
            if writing is not None:
                writing.result()


def _quantise(values: torch.Tensor, top: float, kind: torch.dtype) -> torch.Tensor:
    """Values in [0, 1], which are overwritten, as levels up to `top`."""
    if kind not in LEVELS:
        return values if top == 1 else values.mul_(top)
    values = values.mul_(top).round_()
    if top > LEVELS[kind]:  # highlights of a floating-point image
        values = values.clamp_(max=LEVELS[kind])
    return values.to(kind)


def _grey(rgb: torch.Tensor) -> torch.Tensor:
    """The luma [1, h, w] of rgb [3, h, w] in [0, 1]."""
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's L
    weights = weights.to(rgb.device, non_blocking=True)
    return (rgb * weights[:, None, None]).sum(0, keepdim=True).clamp_(0, 1)


def _upscale_array(image, scale, size, max_pixels, fill) -> np.ndarray:
    image = np.asarray(image)  # a view of np.matrix with a third axis has a broken shape
    shape = list(image.shape)
    if image.ndim not in (2, 3) or (image.ndim == 3 and shape[2] not in (1, 3, 4)):
        hint = "; transpose(1, 2, 0) puts channels last" if shape[:1] == [3] else ""
        raise InputError(
            f"an array must be [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], not {shape}{hint}"
        )
    if 0 in shape:
        raise InputError(f"an array must not be empty, as {shape} is")
    whole = image.dtype.kind == "u" and image.dtype.itemsize <= 2
    if not whole and image.dtype.kind != "f":
        raise InputError(f"an array must be uint8, uint16 or float in [0, 1], not {image.dtype}")
    out, scales = target_size(tuple(shape[:2]), scale, size, max_pixels)
    if not whole:
        _check_range(float(image.min()), float(image.max()))
    planes = image if image.ndim == 3 else image[..., None]
    channels = planes.shape[2]
    # In the machine's byte order; a copy only where something changes.
    planes = planes.astype(image.dtype.newbyteorder("=") if whole else np.float32, copy=False)
    if min(planes.strides) < 0 or not planes.flags.writeable:  # neither can be a tensor
        planes = planes.copy()
    result = np.empty((*out, channels), planes.dtype)
    colour, alpha = (planes, None) if channels < 4 else (planes[..., :3], planes[..., 3])
    planes = _plain(*_as_tensors(colour, alpha))
    fill(planes, out, scales, torch.from_numpy(result).permute(2, 0, 1))
    return (result if image.ndim == 3 else result[..., 0]).astype(image.dtype, copy=False)


def _upscale_pil(image, scale, size, max_pixels, fill):
    from PIL import Image

    from gsr.io.source import from_image

    mode = image.mode
    source = from_image(image)
    out, scales = target_size(source.shape, scale, size, max_pixels)
    channels = source.channels
    result = np.empty((*out, channels), source.colour.dtype)
    hr = torch.from_numpy(result).permute(2, 0, 1)
    # Pillow's own copy, 4 bytes a pixel, and the file as it is in memory before it is written.
    fill(_planes(source, source.colour.dtype), out, scales, hr, 7 * math.prod(out))
    result = Image.fromarray(result[..., 0] if channels == 1 else result)
    result = result.convert("I") if mode == "I" else result
    result.info.update(source.meta.info(out))
    return result


def upscale_to_file(
    path: str | os.PathLike,
    image: Any,
    scale: float | Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    model: GaussianSR | None = None,
    progress: bool = False,
    max_pixels: int | None = MAX_PIXELS,
    max_memory: int | None = None,
    precision: str = "auto",
    *,
    bits: str = "same",
    options: dict[str, Any] | None = None,
) -> tuple[int, int]:
    """Write what `upscale` makes of a Pillow image or `Source` to a file; returns its size (H, W).

    A PNG or TIFF file is written strip by strip: the result is never in memory as a whole. The file
    appears when it is complete. Arguments are those of `upscale`, and besides

    Args:
        bits: "8", "16" or "same", the depth of the source or the nearest that the format has.
        options: Pillow's for formats other than PNG and TIFF: quality, subsampling.

    Raises:
        InputError: as `upscale`; the file cannot be written, or its format has no 16 bits.
    """
    from gsr.io.source import Source, from_image
    from gsr.io.writer import pages_writer

    source = image if isinstance(image, Source) else from_image(image)
    out, _ = target_size(source.shape, scale, size, max_pixels)
    total = out[0] * out[1] * source.channels * source.colour.itemsize
    with progress_bar(progress) as bar, pages_writer(path, total, options) as next_page:
        upscale_page(
            next_page, path, source, scale, size, model, max_memory, precision, bits=bits, bar=bar
        )
    return out


def upscale_page(
    next_page: NextPage,
    path: str | os.PathLike,
    source: Source,
    scale: float | Sequence[float] | None,
    size: Sequence[int] | None,
    model: GaussianSR | None,
    max_memory: int | None = None,
    precision: str = "auto",
    *,
    crop: tuple[int, int] | None = None,
    bits: str = "same",
    animated: bool = False,
    bar: Any = None,
) -> None:
    """Write the next page or frame of `gsr.io.writer.pages_writer`; others as `upscale_to_file`.

    Args:
        crop: size (H, W) that is cut from the middle of the result.
        animated: whether it is a frame of an animation, which has 8 bits.
    """
    from gsr.io.image import file_format
    from gsr.io.writer import depth_in

    model = _usable_model(model)
    out, scales = target_size(source.shape, scale, size, None)
    height, width = crop or out
    top, left = (out[0] - height) // 2, (out[1] - width) // 2
    kind = file_format(path)
    asked = {"8": np.dtype(np.uint8), "16": np.dtype(np.uint16)}.get(bits, source.colour.dtype)
    dtype = depth_in("an animation" if animated else kind, asked)
    if bits == "16" and dtype != asked:
        what = f"an animation in {kind}" if animated else kind
        raise InputError(f"{path}: {what} has no 16 bits a channel; choose .png or .tiff")
    planes = _planes(source, dtype, keep=kind == "TIFF")
    white = planes.top if dtype == np.uint16 and planes.top != 65535 else None
    write = next_page((height, width), source.channels, dtype, source.meta, white, source.duration)

    def put(start: int, stop: int, strip: torch.Tensor) -> None:
        first, last = max(start, top), min(stop, top + height)
        if first < last:
            rows = strip[:, first - start : last - start, left : left + width]
            write(rows.permute(1, 2, 0).cpu().numpy())

    # Of other formats the result is in memory, 4 bytes a pixel as Pillow has it, and the file.
    result = 0 if kind in ("PNG", "TIFF") else 8 * height * width
    _render(model, max_memory, precision, bar, planes, out, scales, put, result)


def _planes(source, dtype: np.dtype, keep: bool = True) -> Planes:
    """Planes of a `Source` for a result of this type.

    Levels stay what they are where the type does and `keep` is set; otherwise white becomes the
    largest level.
    """
    lr, alpha = _as_tensors(source.colour, source.alpha)
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    top = source.white
    if dtype != source.colour.dtype or not keep:
        top = LEVELS.get(kind, 1) * source.white / source.shown
    return Planes(lr, alpha, source.white, top, kind)


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
