"""Draw what a model makes of an image: its Gaussians as ellipses, their opacity, their classes.

`gsr inspect` draws those of one crop of an image, all drawings at one zoom, and prints statistics.
Lengths are LR pixels, pairs are (y, x): the first sigma acts down the rows in every mode,
`official`'s `sigma_x` included. (Hu et al., AAAI 2025, section 3.)
"""

from __future__ import annotations

import argparse
import colorsys
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gsr.describe import called_after, describe_model
from gsr.device import select_device, set_threads
from gsr.errors import InputError
from gsr.inference.strips import inference
from gsr.io.image import read_image, to_tensor, write_atomic, write_image
from gsr.io.paths import as_json, check_path, check_takes_files, make_folder
from gsr.models.checkpoint import load
from gsr.models.heads.bank import BankHead, assign
from gsr.models.heads.direct import DirectHead, DirectPacked
from gsr.models.heads.official import OfficialHead, whole_windows, window_side
from gsr.models.sizes import check_scale
from gsr.models.stream import Band

if TYPE_CHECKING:
    from gsr.models import GaussianSR

CROP = 48  # LR pixels a side that are drawn, unless the user chooses
MAX_CROP = 2**18  # LR pixels
MAX_DRAWING = 2**24  # pixels
BAND_PIXELS = 2**14  # LR pixels encoded at once
SUPERSAMPLING = 4  # of the ellipses, along each side
LINE = 1.2  # width of a contour, pixels of the drawing
CORNERS = 32  # of a contour
CHUNK = 4096  # contours computed at once
EXTENT = 5.0  # `official` samples its kernels on [-5, 5]^2
FILES = ("ellipses.png", "opacity.png", "classes.png", "inspection.json")
# Okabe and Ito's colours, which the colour-blind can tell apart.
OKABE_ITO = [(86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66),
             (0, 114, 178), (213, 94, 0), (204, 121, 167), (255, 255, 255)]  # fmt: skip


class Crop(NamedTuple):
    """A part of an image: rows and columns, each start to stop, LR pixels."""

    rows: slice
    columns: slice

    @property
    def start(self) -> tuple[int, int]:
        return self.rows.start, self.columns.start

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


class Gaussians(NamedTuple):
    """n Gaussians to draw over a crop."""

    centre: np.ndarray  # [n, 2], (y, x), LR pixels; the centre of the crop's first pixel is at 0
    sigma: np.ndarray  # [n, 2], (y, x), LR pixels
    rho: np.ndarray  # [n]
    opacity: np.ndarray  # [n]
    label: np.ndarray  # [n] int, below `labels`: which colour
    labels: int


class Survey(NamedTuple):
    """What a model makes of a crop of h x w LR pixels."""

    gaussians: Gaussians  # those that are splatted
    opacity: np.ndarray  # [h, w], mean over the K Gaussians of a pixel
    classes: np.ndarray | None  # [h, w] int, the likeliest class of the bank; None without a bank
    statistics: dict[str, dict[str, float]]  # of each pixel's own sigma_y, sigma_x, rho, opacity


# ---- the Gaussians of an image ------------------------------------------------------------------


def survey(
    model: GaussianSR, image: np.ndarray, crop: Crop | None = None, *, zoom: int = 1, scale=4.0
) -> Survey:
    """Encode a crop of an image, uint8 [h, w, 3], as it is encoded within the whole image.

    A random assignment is replaced by its mode, the largest logit. `scale` matters to `official`
    only. Runs on the model's device, and leaves its training flags and the random state alone.

    Raises:
        InputError: another kind of image, a crop outside it or too large for `zoom`, a mode without
            Gaussians, or a model that gives NaN or infinity.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        raise InputError("the image to inspect must be a uint8 array [h, w, 3]")
    crop = crop or middle_crop(image)
    check_crop(crop, image.shape, zoom)
    head, (h, w) = model.head, crop.size
    if isinstance(head, OfficialHead):
        around = middle_crop(image)  # all of it: windows share the mean of their Gaussians
    elif isinstance(head, (DirectHead, BankHead)):
        # The crop's halo. SwinIR counts its attention windows from the image's corner.
        halo, step = model.halo, getattr(model.encoder, "alignment", 1)
        around = Crop(*(slice(max(0, part.start - halo) // step * step, part.stop + halo)
                        for part in crop))  # fmt: skip
    else:
        raise InputError(
            f"mode {model.config.mode} has no Gaussians to draw: inspect a model of mode direct, "
            "field or official"
        )
    encoded = _encode(model, head, image[around])
    y, x = (inner - outer for inner, outer in zip(crop.start, around.start, strict=True))
    own = encoded[..., y : y + h, x : x + w].swapaxes(0, 1).astype(np.float64)  # [7, K, h, w]
    sigma_y, sigma_x, _, _, rho, opacity, label = own
    if isinstance(head, OfficialHead):
        gaussians = _shared(head, encoded, crop, scale=scale)
    else:
        centre = own[2:4] + np.indices((h, w))[:, None]
        sigma, centre = (pairs.reshape(2, -1).T for pairs in (own[:2], centre))
        labels = head.config.points if isinstance(head, BankHead) else head.gaussians
        gaussians = Gaussians(
            centre, sigma, rho.ravel(), opacity.ravel(), label.ravel().astype(int), labels
        )
    functions = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    named = {"sigma_y": sigma_y, "sigma_x": sigma_x, "rho": rho, "opacity": opacity}
    return Survey(
        gaussians,
        opacity.mean(0),
        label[0].astype(int) if isinstance(head, BankHead) else None,
        {name: {f: float(of(v)) for f, of in functions.items()} for name, v in named.items()},
    )


def _encode(model: GaussianSR, head: DirectHead | BankHead, image: np.ndarray) -> np.ndarray:
    """Return `_fields` of an image, [K, 7, h, w], in the memory of a band of its rows."""
    (h, w), device = image.shape[:2], next(model.parameters()).device
    rows, parts = max(1, BAND_PIXELS // w), []
    with inference(model):
        stream = model.stream(partial(_fields, head))
        for start in range(0, h, rows):
            lr = to_tensor(np.ascontiguousarray(image[start : start + rows])).to(device)
            band = stream.feed(Band(start, (lr,)), start + rows >= h)
            if band is not None:
                parts.append(band.tensors[0][0].cpu().numpy())
    return np.concatenate(parts, axis=-2)


def _fields(head: DirectHead | BankHead, features: Tensor, lr: Tensor) -> Tensor:
    """Turn features [1, C, h, w] into K Gaussians a pixel: [1, K, 7, h, w].

    The seven are sigma_y, sigma_x, offset_y, offset_x, rho, opacity and the label: which of the K,
    or which of the bank.
    """
    if isinstance(head, DirectHead):
        e = head.encode(features, lr)
        made = e = e.unpack() if isinstance(e, DirectPacked) else e
        label = torch.arange(head.gaussians, device=lr.device)[:, None, None].expand_as(e.rho)
        sigma, offset, rho, opacity = e.sigma, e.offset, e.rho, e.opacity
    else:
        logits = head.classifier(features).float()
        kind = "softmax" if head.config.assignment == "softmax" else "argmax"
        sigma, opacity, rho = head.bank(assign(logits, kind)).split([2, 1, 1], dim=1)
        label, sigma = logits.argmax(1, keepdim=True), sigma[:, None]
        offset, made = torch.zeros_like(sigma), [logits]
    # Logits and colours, since argmax and sigmoid hide that their argument has overflowed.
    if not all(t.isfinite().all() for t in made):
        raise InputError(
            "the model gives values that are not finite for this image; its weights are damaged or "
            "its training diverged, choose another checkpoint"
        )
    return torch.cat([sigma, offset, torch.stack([rho, opacity, label.to(rho)], 2)], 2)


def _shared(head: OfficialHead, encoded: np.ndarray, crop: Crop, *, scale: float) -> Gaussians:
    """Place the Gaussians that `official` splats: those of a mean window, in every window.

    The label is the position in the window.
    """
    window, taps, lr_size = head.config.window, head.config.kernel_size, encoded.shape[-2:]
    whole = whole_windows(torch.from_numpy(encoded[:, [0, 1, 4, 5]]), window)
    count = [n // window for n in whole.shape[-2:]]
    *sigma, rho, opacity = whole.view(4, count[0], window, count[1], window).mean((1, 3)).numpy()
    # Sigma and rho of its covariance, which knows no bounds and no signs.
    mixed, sigma = rho * sigma[0] * sigma[1], np.sqrt(np.square(sigma) + 1e-5)
    rho = mixed / (sigma[0] * sigma[1])

    places, i = [], np.arange(window)
    for axis, k in enumerate(window_side((scale, scale), window, taps)):  # HR pixels of a window
        # The middle tap, as `gsr.ops.reference.window_placement` shifts it.
        shift = (1 - 2 * i / window) * (k - 1) / 2 - (k - taps) // 2
        hr = np.arange(count[axis])[:, None] * k + (taps - 1) / 2 - shift  # [count, window]
        pixel = lr_size[axis] / (count[axis] * k)  # an HR pixel, resized from whole windows
        places.append((hr.ravel() + 0.5) * pixel - 0.5)
        sigma[axis] *= pixel * (taps - 1) / (2 * EXTENT)  # taps are one HR pixel apart
    label = np.arange(window**2).reshape(window, window)
    centre = np.stack(np.meshgrid(*places, indexing="ij"), -1) - crop.start
    inside = ((centre >= -0.5) & (centre < np.array(crop.size) - 0.5)).all(-1)
    y, x, r, o, c = (np.tile(v, count)[inside] for v in (*sigma, rho, opacity, label))
    return Gaussians(centre[inside], np.stack([y, x], 1), r, o, c, window**2)


# ---- drawings -----------------------------------------------------------------------------------


def draw_gaussians(
    model: GaussianSR, image: np.ndarray, zoom: int = 8, *, scale: float = 4.0
) -> np.ndarray:
    """Draw the one-sigma ellipses of a model's Gaussians over an image, uint8 [h, w, 3].

    Returns uint8 [h * zoom, w * zoom, 3]. Raises InputError, see `survey`.
    """
    return draw_ellipses(survey(model, image, zoom=zoom, scale=scale).gaussians, image, zoom)


def draw_ellipses(g: Gaussians, image: np.ndarray, zoom: int) -> np.ndarray:
    """Draw one-sigma contours over an image [h, w, 3]: uint8 [h * zoom, w * zoom, 3].

    The colour is the label's, and the more opaque a Gaussian, the more visible its contour.
    """
    fine = zoom * SUPERSAMPLING
    grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    pale = (0.3 * image + 0.3 * grey).round().astype(np.uint8)  # lines must stand out
    canvas = Image.fromarray(upscale_nearest(pale, fine))
    draw, colours = ImageDraw.Draw(canvas, "RGBA"), palette(g.labels)
    order = np.argsort(g.opacity, kind="stable")  # the most opaque on top
    # `official` allows |rho| of 1 and more: a saddle, which has no contour.
    order = order[(np.abs(g.rho[order]) < 1) & (g.opacity[order] > 0)]
    for some in np.array_split(order, len(order) // CHUNK + 1):
        sigma, half = g.sigma[some] * fine, LINE * SUPERSAMPLING / 2
        outer, inner = (contours(sigma, g.rho[some], grow) for grow in (half, -half))
        # Each line is one polygon, there and back: no corner is painted twice.
        ring = np.concatenate([outer, outer[:, :1], inner[:, :1], inner[:, ::-1]], 1)
        ring = np.rint(ring + ((g.centre[some] + 0.5) * fine - 0.5)[:, None])
        alpha = np.rint(255 * np.minimum(g.opacity[some], 1)).astype(int)
        for yx, label, a in zip(ring, g.label[some], alpha, strict=True):
            draw.polygon(yx[:, ::-1].ravel().tolist(), (*colours[label].tolist(), int(a)))
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def contours(sigma: np.ndarray, rho: np.ndarray, grow: float = 0.0) -> np.ndarray:
    """Return points (y, x) of one-sigma contours: sigma [n, 2], rho [n] to [n, CORNERS, 2].

    There q of `gsr.ops.reference.splat_at` is 1, and a Gaussian has fallen to exp(-1/2) of its
    peak. Points are relative to the centre; `grow` is added to both semi-axes.
    """
    mixed = rho * sigma[:, 0] * sigma[:, 1]
    covariance = np.array([[sigma[:, 0] ** 2, mixed], [mixed, sigma[:, 1] ** 2]])
    squares, axes = np.linalg.eigh(covariance.transpose(2, 0, 1))  # axes are columns
    radii = np.maximum(np.sqrt(np.maximum(squares, 0)) + grow, 0)
    t = 2 * np.pi * np.arange(CORNERS) / CORNERS
    return np.stack([np.cos(t), np.sin(t)], 1) * radii[:, None] @ axes.swapaxes(1, 2)


def palette(count: int) -> np.ndarray:
    """Return the colours of classes 0 to count - 1, the same every time: uint8 [count, 3]."""
    if count <= len(OKABE_ITO):
        return np.array(OKABE_ITO[:count], np.uint8)
    golden = (5**0.5 - 1) / 2  # steps of this ratio keep the hues of neighbours apart
    tones = [(0.85, 1.0), (0.55, 0.95), (0.9, 0.7)]  # saturation, value
    colours = [colorsys.hsv_to_rgb(i * golden % 1, *tones[i % 3]) for i in range(count)]
    return np.rint(255 * np.array(colours)).astype(np.uint8)


def upscale_nearest(image: np.ndarray, zoom: int) -> np.ndarray:
    return image.repeat(zoom, 0).repeat(zoom, 1)


# ---- the command --------------------------------------------------------------------------------


def inspect(
    model: GaussianSR, image: np.ndarray, crop: Crop, *, zoom: int = 16, scale: float = 4.0
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the drawings of `gsr inspect`, uint8 by file name, and its report, for JSON."""
    found, head = survey(model, image, crop, zoom=zoom, scale=scale), model.head
    low, high = float(found.opacity.min()), float(found.opacity.max())
    grey = np.rint(255 * (found.opacity - low) / max(high - low, 1e-12)).astype(np.uint8)
    drawings = {
        "ellipses.png": draw_ellipses(found.gaussians, image[crop], zoom),
        "opacity.png": upscale_nearest(grey, zoom),
    }
    captions = {
        "ellipses.png": "one-sigma contours, the more visible the more opaque",
        "opacity.png": f"opacity of every LR pixel, black {low:.4g}, white {high:.4g}",
    }
    unit = "LR pixels"
    if found.classes is not None:
        points, used = model.config.bank.points, len(np.unique(found.classes))
        drawings["classes.png"] = upscale_nearest(palette(points)[found.classes], zoom)
        captions["classes.png"] = f"class of every LR pixel, {used} of the bank's {points} used"
    if isinstance(head, OfficialHead):
        captions["ellipses.png"] += f"; the mean Gaussians of all windows, splatted at x{scale:g}"
        hr = 2 * EXTENT / (head.config.kernel_size - 1)
        unit = f"units of the kernels' [-5, 5]^2, {hr:.4g} an HR pixel"
    (y, x), (h, w) = crop.start, crop.size
    return drawings, {
        "mode": model.config.mode,
        "crop": {"x": x, "y": y, "width": w, "height": h},
        "zoom": zoom,
        "scale": scale,
        "drawings": captions,
        "statistics": found.statistics,
        "sigma_unit": unit,
    }


def middle_crop(image: np.ndarray, side: int | None = None) -> Crop:
    """Return the middle of an image [h, w, 3], at most `side` LR pixels a side, or all of it."""
    sizes = [(n, min(n, side or n)) for n in image.shape[:2]]
    return Crop(*(slice((n - m) // 2, (n - m) // 2 + m) for n, m in sizes))


def parse_crop(text: str) -> Crop:
    """Parse "120,80,64,48", which is x,y,width,height; ArgumentTypeError for anything else."""
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not x,y,width,height in pixels, such as 120,80,64,48"
        ) from None
    return Crop(slice(y, y + h), slice(x, x + w))


def check_crop(crop: Crop, size: Sequence[int], zoom: int = 1) -> None:
    """Raise InputError unless crop, of an image of `size` (h, w), can be drawn at that zoom."""
    (y, x), (h, w) = crop.start, crop.size
    if not (0 <= y < y + h <= size[0] and 0 <= x < x + w <= size[1]):
        raise InputError(
            f"--crop {x},{y},{w},{h} is no part of the image's {size[1]} x {size[0]} pixels; "
            "give x,y,width,height within it"
        )
    if zoom < 1:
        raise InputError(f"zoom (--zoom) must be at least 1, not {zoom}")
    if h * w > MAX_CROP or h * w * zoom**2 > MAX_DRAWING:
        raise InputError(
            f"{w} x {h} pixels at zoom {zoom} are too many to draw: at most {MAX_CROP:,}, and "
            f"{MAX_DRAWING:,} when upscaled; give a smaller part (--crop) or zoom (--zoom)"
        )


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `inspect` to argparse's subparsers; `args.run(args)` then carries it out."""
    parser = commands.add_parser(
        "inspect",
        help="draw a model's Gaussians",
        description="Draw the Gaussians that a model makes of an image, and print statistics.",
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", help="image file")
    add("-o", "--output", required=True, metavar="FOLDER", help="folder to write to")
    add("--model", metavar="PATH", help="model folder or published .pth file (default: bundled)")
    # fmt: off
    add("--crop", type=parse_crop, metavar="x,y,w,h",
        help=f"part to draw, in pixels (default: the {CROP} x {CROP} in the middle)")
    add("--zoom", type=int, default=16, metavar="N", help="how much to upscale it (default: 16)")
    add("--scale", type=float, default=4.0, metavar="S",
        help="official only: the scale at which it splats (default: 4)")
    # fmt: on
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("-q", "--quiet", action="store_true", help="print nothing")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the drawings and inspection.json, print statistics. Raises InputError."""
    # Everything that can be wrong with the arguments is found before the model is loaded.
    set_threads(args.threads)
    check_scale(args.scale)
    device, image = select_device(args.device), read_image(args.image)
    crop = args.crop or middle_crop(image, CROP)
    check_crop(crop, image.shape, args.zoom)
    folder = check_path(args.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; name a folder")
    for name in FILES:
        if (folder / name).exists() and os.path.samefile(folder / name, args.image):
            raise InputError(f"{folder / name} would overwrite the image; choose another folder")
    check_takes_files(next(p for p in (folder, *folder.parents) if p.exists()))
    model = load(args.model).to(device)
    drawings, report = inspect(model, image, crop, zoom=args.zoom, scale=args.scale)

    make_folder(folder)
    for name, drawing in drawings.items():
        write_image(folder / name, drawing)
    about = describe_model(model, called_after(args.model))
    report = {"model": about, "image": Path(args.image).name, **report}
    write_atomic(folder / "inspection.json", as_json(report))
    if not args.quiet:
        for name, caption in report["drawings"].items():
            print(f"{folder / name}: {caption}")
        print("              mean       std       min       max")
        for name, row in report["statistics"].items():
            print(f"{name:8}" + "".join(f"{value:10.4f}" for value in row.values()))
        print(f"sigma is in {report['sigma_unit']}")
