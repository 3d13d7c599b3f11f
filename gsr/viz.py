"""What a model makes of a photograph, drawn: its Gaussians, their opacity, which of them is chosen.

The Gaussians of GaussianSR have a place, a shape and an opacity, so that they can be looked at.
`gsr inspect` writes pictures of them and their statistics; the functions here give the same as
arrays. Lengths are LR pixels and pairs (y, x): the first sigma acts down the rows in every mode,
`official`'s `sigma_x` included.

Gaussians of `official` live in HR pixels, whatever the scale, and all windows share theirs: they
are drawn as they stand at one scale. Each pixel's own, which the mean over all windows hides, are
drawn with `selected=True`. (Hu et al., AAAI 2025, section 3.)
"""

from __future__ import annotations

import argparse
import colorsys
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gsr.describe import called_after, describe_model
from gsr.errors import InputError
from gsr.evaluation import check_finite
from gsr.inference.strips import inference
from gsr.models.heads.bank import BankHead, assign
from gsr.models.heads.direct import DirectHead
from gsr.models.heads.official import OfficialHead, whole_windows, window_kernels, window_side
from gsr.models.stream import Band, join
from gsr.ops import splat
from gsr.ops.reference import grid_points
from gsr.report import parse_box

if TYPE_CHECKING:
    from gsr.models import GaussianSR

CROP = 48  # LR pixels a side that are drawn, unless the user chooses
BAND_PIXELS = 2**14  # LR pixels encoded at once
MAX_PIXELS = 2**24  # of a drawing
MAX_ZOOM = 64
SHARP = 4  # drawn so many times as large, and averaged
LINE = 1.2  # width of a contour, pixels of the drawing
CORNERS = 32  # of a contour
MAP_SIDE = 960  # small maps are enlarged by a whole number, at most to this
EXTENT = 5.0  # `official` samples a Gaussian on [-5, 5]^2
NAMES = (
    "ellipses.png", "ellipses_selected.png", "opacity.png", "classes.png", "bank.png", "share.png",
    "dominant.png", "inspection.json",
)  # fmt: skip


# ---- what the model says ------------------------------------------------------------------------


class Fields(NamedTuple):
    """K Gaussians per LR pixel, as `gsr.ops.splat` wants them."""

    sigma: Tensor  # [1, K, 2, h, w]
    rho: Tensor  # [1, K, h, w]
    opacity: Tensor  # [1, K, h, w]
    offset: Tensor  # [1, K, 2, h, w]
    colour: Tensor  # [1, K, 3, h, w]; with a bank [1, 1, 0, h, w]
    label: Tensor  # [1, K, h, w] int64: which of the K, or which of the bank's N


class Gaussians(NamedTuple):
    """A list of n Gaussians on a picture."""

    centre: np.ndarray  # [n, 2], (y, x), LR pixels; the centre of pixel i is at i
    sigma: np.ndarray  # [n, 2], (y, x), LR pixels
    rho: np.ndarray  # [n]
    opacity: np.ndarray  # [n]
    label: np.ndarray  # [n], which colour


class Box(NamedTuple):
    """A part of a picture: rows top ... bottom - 1, columns left ... right - 1, LR pixels."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass
class Survey:
    """What a model says of a whole picture, and all of it about one part."""

    opacity: np.ndarray  # [h, w], the mean of an LR pixel's K
    classes: np.ndarray | None  # [h, w], the Gaussian of the bank that is chosen
    statistics: dict[str, dict[str, float]]  # of opacity, sigma_y, sigma_x and rho, as the head has
    band: Band  # Fields: the rows that were asked for; of `official` all


def survey(
    model: GaussianSR, picture: np.ndarray, box: Box | None = None, progress: bool = False
) -> Survey:
    """Encode a picture, uint8 [h, w, 3], in the memory of a band of its rows.

    `band` has the rows of `box` and those that reach into it. Works on the model's device, leaves
    its training flags and random numbers alone, and takes for a random assignment its mode, the
    largest logit. Raises InputError for another kind of picture, a mode that is not known here, or
    a model that gives NaN or infinity.
    """
    from tqdm import tqdm

    _check_picture(picture)
    _check_mode(model)
    height, width = picture.shape[:2]
    box, head = box or Box(0, 0, height, width), model.head
    whole = isinstance(head, OfficialHead)  # the mean over all its windows
    reach = getattr(head, "radius", 0)
    first, end = (0, height) if whole else (max(0, box.top - reach), box.bottom + reach)
    sums = {name: _Sum() for name in ("opacity", "sigma_y", "sigma_x", "rho")}
    opacity, classes, kept, done = [], [], None, 0
    with inference(model), tqdm(total=height, unit="row", disable=not progress) as bar:
        for band in _bands(model, picture):
            f = band.tensors
            for t in f:
                check_finite(t, "this photo")
            sigma_y, sigma_x = f.sigma.unbind(2)
            values = (f.opacity, sigma_y, sigma_x, f.rho)
            for total, value in zip(sums.values(), values, strict=True):
                total.add(value)
            opacity.append(f.opacity.mean(1)[0].cpu().numpy())
            classes.append(f.label[0, 0].cpu().numpy().astype(np.int32))
            if first < band.end and band.first < end:
                part = band.rows(max(first, band.first), min(end, band.end))
                # A copy: views would hold on to the rest of their bands.
                cpu = Fields(*(t.clone(memory_format=torch.contiguous_format).cpu()
                               for t in part.tensors))  # fmt: skip
                kept = join(kept, Band(part.first, cpu))
            bar.update(band.end - done)
            done = band.end
    return Survey(
        np.concatenate(opacity),
        np.concatenate(classes) if isinstance(head, BankHead) else None,
        {name: total.summary() for name, total in sums.items()},
        kept,
    )


def _check_picture(picture: np.ndarray) -> None:
    good = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3
    if not good or picture.shape[2] != 3 or 0 in picture.shape:
        kind = f"{picture.dtype} {list(picture.shape)}" if hasattr(picture, "dtype") else "that"
        raise InputError(f"the picture to inspect must be a uint8 array [h, w, 3], not {kind}")


def _check_mode(model: torch.nn.Module) -> None:
    if not isinstance(getattr(model, "head", None), (DirectHead, BankHead)):
        config = getattr(model, "config", None)
        mode = f"mode {config.mode}" if config else type(model).__name__
        raise InputError(
            f"{mode} has no Gaussians to draw: inspect a model of mode direct, field or official"
        )


def _fields(head: torch.nn.Module, features: Tensor, lr: Tensor) -> Fields:
    """What a head makes of features [1, C, h, w]."""
    if isinstance(head, DirectHead):
        e = head.encode(features, lr)
        label = torch.arange(head.gaussians, device=lr.device)[None, :, None, None]
        return Fields(e.sigma, e.rho, e.opacity, e.offset, e.colour, label.expand_as(e.rho))
    logits = head.classifier(features).float()
    check_finite(logits, "this photo")
    kind = "softmax" if head.config.assignment == "softmax" else "argmax"
    sigma, opacity, rho = head.bank(assign(logits, kind)).split([2, 1, 1], dim=1)
    sigma, label = sigma[:, None], logits.argmax(1, keepdim=True)
    nothing = sigma[:, :, :0]
    return Fields(sigma, rho, opacity, torch.zeros_like(sigma), nothing, label)


def _bands(model: GaussianSR, picture: np.ndarray) -> Iterator[Band]:
    """The picture's Fields, from the top, by bands of rows."""
    encoder, (height, width) = model.encoder, picture.shape[:2]
    device = next(model.parameters()).device
    fields = partial(_fields, model.head)
    step = max(1, BAND_PIXELS // width)

    def source(first: int, end: int) -> Tensor:
        rows = torch.tensor(np.ascontiguousarray(picture[first:end]), device=device)
        return rows.permute(2, 0, 1)[None].contiguous().float() / 255

    if step >= height:
        lr = source(0, height)
        yield Band(0, fields(encoder(lr), lr))
        return
    stream = model.stream(fields)
    for first in range(0, height, step):
        end = min(first + step, height)
        band = stream.feed(Band(first, (source(first, end),)), end == height)
        if band is not None:
            yield band


class _Sum:
    """Mean, standard deviation and range of numbers that come piece by piece."""

    def __init__(self):
        self.n, self.total, self.squares = 0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        values = values.double()
        self.n += values.numel()
        self.total += values.sum().item()
        self.squares += values.square().sum().item()
        self.low = min(self.low, values.min().item())
        self.high = max(self.high, values.max().item())

    def summary(self) -> dict[str, float]:
        mean = self.total / self.n
        spread = math.sqrt(max(0.0, self.squares / self.n - mean**2))
        return {"mean": mean, "std": spread, "min": self.low, "max": self.high}


# ---- maps ---------------------------------------------------------------------------------------


def opacity_map(model: GaussianSR, picture: np.ndarray) -> np.ndarray:
    """Opacity at every LR pixel of a picture, uint8 [h, w, 3]: float32 [h, w].

    In `direct` the mean of the pixel's K Gaussians.
    """
    return survey(model, picture, Box(0, 0, 1, 1)).opacity


def class_map(model: GaussianSR, picture: np.ndarray) -> np.ndarray:
    """Which of the bank's N Gaussians every LR pixel selects: int32 [h, w] in 0 .. N - 1.

    Raises InputError in `direct`, which has no bank.
    """
    classes = survey(model, picture, Box(0, 0, 1, 1)).classes
    if classes is None:
        raise InputError("a model of mode direct has no bank: class_map is for field and official")
    return classes


def usage(classes: np.ndarray, count: int) -> np.ndarray:
    """Share of each of `count` classes in an array of their indices, summing to 1: [count]."""
    return np.bincount(classes.ravel(), minlength=count) / classes.size


def entropy(shares: np.ndarray) -> float:
    """Entropy in bits of shares that sum to 1: 0 if one has all, log2(n) if n have the same."""
    some = shares[shares > 0]
    return float(abs((some * np.log2(some)).sum()))


def region(
    f: Fields, box: Box, zoom: int, radius: int, first: int
) -> tuple[Fields, tuple[int, int], tuple[slice, slice]]:
    """What is needed to splat `box` enlarged: Fields with a margin, HR size, and the box in it.

    `first` is the number of the first row that f holds.
    """
    h, w = f.rho.shape[-2:]
    top, bottom = max(first, box.top - radius), min(first + h, box.bottom + radius)
    left, right = max(0, box.left - radius), min(w, box.right + radius)
    part = Fields(*(t[..., top - first : bottom - first, left:right].contiguous() for t in f))
    inner = (
        slice((box.top - top) * zoom, (box.bottom - top) * zoom),
        slice((box.left - left) * zoom, (box.right - left) * zoom),
    )
    return part, ((bottom - top) * zoom, (right - left) * zoom), inner


def share(head: DirectHead, f: Fields, box: Box, zoom: int, first: int = 0) -> np.ndarray:
    """What the Gaussians of `direct` add to the bicubic enlargement: float32 [H, W, 3], signed."""
    part, size, inner = region(f, box, zoom, head.radius, first)
    with torch.inference_mode():
        out = splat(
            part.colour, part.sigma, part.rho, part.opacity, size, part.offset, head.radius,
            head.normalize, head.eps,
        )  # fmt: skip
    return out[0].permute(1, 2, 0).numpy()[inner]


def dominant(
    f: Fields, box: Box, zoom: int, radius: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Of which Gaussian the weight, opacity exp(-q / 2), is largest at every HR pixel.

    Returns (label [H, W], and whether it belongs to an odd LR pixel as a checkerboard has them).
    """
    part, size, inner = region(f, box, zoom, radius, first)
    h, w = part.rho.shape[-2:]
    points = grid_points(h, w, size)
    nearest = torch.floor(points + 0.5).long()
    best = torch.full(points.shape[:1], -math.inf, dtype=torch.float64)
    label, odd = torch.zeros(len(best), dtype=torch.long), torch.zeros(len(best), dtype=torch.bool)
    for step in itertools.product(range(-radius, radius + 1), repeat=2):
        y, x = (nearest + torch.tensor(step)).unbind(1)
        inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
        at = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
        away = points - torch.stack([y, x], dim=1)
        for k in range(part.rho.shape[1]):
            near = (t[0, k].flatten(-2)[..., at].double() for t in part[:4])
            sigma, rho, opacity, offset = near
            u_y, u_x = (away.T - offset) / sigma
            q = (u_y**2 - 2 * rho * u_y * u_x + u_x**2) / (1 - rho**2)
            weight = torch.where(inside, opacity.log() - q / 2, -math.inf)
            more = weight > best
            best = torch.where(more, weight, best)
            label = torch.where(more, part.label[0, k].flatten()[at], label)
            odd = torch.where(more, (y + x) % 2 == 1, odd)
    return label.view(size).numpy()[inner], odd.view(size).numpy()[inner]


# ---- Gaussians as a list ------------------------------------------------------------------------


def gaussians(
    model: GaussianSR, picture: np.ndarray, scale: float = 4.0, selected: bool = False
) -> Gaussians:
    """The Gaussians that a model puts on a picture, uint8 [h, w, 3].

    Args:
        scale: matters to `official` only, see the module's text.
        selected: of `official`, each LR pixel's own instead of those that all windows share.
    """
    found = survey(model, picture)
    return listed(model, found, picture.shape[:2], Box(0, 0, *picture.shape[:2]), scale, selected)


def listed(
    model: GaussianSR,
    found: Survey,
    lr_size: tuple[int, int],
    box: Box,
    scale: float = 4.0,
    selected: bool = False,
) -> Gaussians:
    """Those of a survey that stand in `box`."""
    head, f = model.head, found.band.tensors
    if isinstance(head, OfficialHead) and not selected:
        return _inside(_shared(head, f, lr_size, scale), box)
    k, h, w = f.rho.shape[1:]
    y, x = np.mgrid[0:h, 0:w]
    pixel = np.stack([y + found.band.first, x])  # [2, h, w]
    centre = pixel + f.offset[0].double().numpy()  # [K, 2, h, w]
    sigma, rho = f.sigma[0].double().numpy(), f.rho[0].double().numpy()
    if isinstance(head, OfficialHead):
        sigma, rho = _covariance(*sigma.swapaxes(0, 1), rho)
        sigma = sigma.swapaxes(0, 1) * _tap(head, scale)[:, None, None]
    rows = slice(box.top - found.band.first, box.bottom - found.band.first)
    part = (slice(None), rows, slice(box.left, box.right))
    return Gaussians(
        *(v.swapaxes(0, 1)[(slice(None), *part)].reshape(2, -1).T for v in (centre, sigma)),
        *(v[part].ravel() for v in (rho, f.opacity[0].numpy(), f.label[0].numpy())),
    )


def _tap(head: OfficialHead, scale: float) -> np.ndarray:
    """LR pixels, (y, x), that a unit of `official`'s sigma is at a scale: [2].

    Its samples are 10 / (taps - 1) units apart, and stand one HR pixel apart.
    """
    c = head.config
    side = window_side((scale, scale), c.window, c.kernel_size)
    return np.array([c.window / k * (c.kernel_size - 1) / (2 * EXTENT) for k in side])


def _covariance(sigma_y, sigma_x, rho) -> tuple[np.ndarray, np.ndarray]:
    """sigma [2, ...] and rho of `official`'s covariance, which knows no bounds and no signs."""
    yy, xx = sigma_y**2 + 1e-5, sigma_x**2 + 1e-5
    return np.sqrt([yy, xx]), rho * sigma_y * sigma_x / np.sqrt(yy * xx)


def _shared(head: OfficialHead, f: Fields, lr_size: tuple[int, int], scale: float) -> Gaussians:
    """The Gaussians that `official` splats: those of a mean window, in every window.

    Where they stand is `gsr.ops.reference.window_placement`, whose taps lie about the middle one.
    """
    window, taps = head.config.window, head.config.kernel_size
    field = torch.cat([f.sigma[:, 0], f.opacity, f.rho], dim=1)
    whole = whole_windows(field, window)
    rows, columns = (n // window for n in whole.shape[-2:])
    mean = whole.reshape(4, rows, window, columns, window).double().mean(dim=(1, 3)).numpy()
    sigma, rho = _covariance(mean[0], mean[1], mean[3])  # [2, window, window], [window, window]

    places = []
    for n, k, h in zip((rows, columns), window_side((scale, scale), window, taps), lr_size,
                       strict=True):  # fmt: skip
        i = np.arange(window)
        shift = (1 - 2 * i / window) * (k - 1) / 2 - (k - taps) // 2
        hr = np.arange(n)[:, None] * k + (taps - 1) / 2 - shift  # [n, window]
        places.append((hr.ravel() + 0.5) * h / (n * k) - 0.5)
    shrunk = np.array([h / n for h, n in zip(lr_size, whole.shape[-2:], strict=True)])
    sigma = sigma * (_tap(head, scale) * shrunk)[:, None, None]
    every = [np.tile(v, (rows, columns)).ravel() for v in (*sigma, rho, mean[2])]
    label = np.tile(np.arange(window**2).reshape(window, window), (rows, columns)).ravel()
    centre = np.stack([p.ravel() for p in np.meshgrid(*places, indexing="ij")], axis=1)
    return Gaussians(centre, np.stack(every[:2], axis=1), every[2], every[3], label)


def _inside(g: Gaussians, box: Box) -> Gaussians:
    near = (g.centre >= np.array(box[:2]) - 0.5) & (g.centre < np.array(box[2:]) - 0.5)
    return Gaussians(*(v[near.all(axis=1)] for v in g))


# ---- drawings -----------------------------------------------------------------------------------


def draw_gaussians(
    model: GaussianSR,
    picture: np.ndarray,
    zoom: int = 8,
    scale: float = 4.0,
    selected: bool = False,
) -> np.ndarray:
    """One-sigma ellipses of a model's Gaussians over the photograph that they belong to.

    Args:
        picture: uint8 [h, w, 3]; `survey` and `listed` draw a part of a larger one.
        zoom: HR pixels a LR pixel, 1 to 64.
        scale, selected: see `gaussians`.

    Returns:
        uint8 [h * zoom, w * zoom, 3].

    Raises:
        InputError: another kind of picture, or a drawing of more than 2^24 pixels.
    """
    _check_picture(picture)
    check_drawing(picture.shape[:2], zoom)
    return draw_ellipses(gaussians(model, picture, scale, selected), picture, zoom)


def check_drawing(size: Sequence[int], zoom: int) -> None:
    """Raise InputError unless a part of `size` (h, w) can be drawn at that zoom."""
    if not 1 <= zoom <= MAX_ZOOM:
        raise InputError(f"zoom (--zoom) must be from 1 to {MAX_ZOOM}, not {zoom}")
    h, w = (n * zoom for n in size)
    if h * w > MAX_PIXELS:
        raise InputError(
            f"a drawing of {w} x {h} pixels is larger than {MAX_PIXELS:,} pixels; draw a smaller "
            "part (--crop) or zoom less (--zoom)"
        )


def contours(sigma: np.ndarray, rho: np.ndarray, corners: int = CORNERS) -> np.ndarray:
    """Points (y, x) about the centre where q = 1: sigma [n, 2], rho [n] in (-1, 1) to [n, c, 2].

    q is that of `gsr.ops.reference.splat_at`: a Gaussian has fallen to exp(-1/2) of its peak there.
    """
    t = 2 * np.pi * np.arange(corners) / corners
    rho = rho[:, None]
    u_y, u_x = np.cos(t) + 0 * rho, rho * np.cos(t) + np.sqrt(1 - rho**2) * np.sin(t)
    return np.stack([u_y, u_x], axis=-1) * sigma[:, None]


def draw_ellipses(g: Gaussians, picture: np.ndarray, zoom: int = 8) -> np.ndarray:
    """The one-sigma contours of g over a picture [h, w, 3]: uint8 [h * zoom, w * zoom, 3].

    The colour is the label's, the opacity that of the Gaussian; the strongest are drawn last.
    Those with |rho| of 1 or more, which `official` allows, have no contour and are left out.
    """
    fine = zoom * SHARP
    grey = np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))
    pale = (0.3 * picture + 0.3 * grey).round().astype(np.uint8)  # lines must stand out
    base = Image.fromarray(pale).resize(
        (picture.shape[1] * fine, picture.shape[0] * fine), Image.Resampling.NEAREST
    )
    order = np.argsort(g.opacity, kind="stable")
    order = order[(np.abs(g.rho[order]) < 1) & (g.opacity[order] > 0)]
    sigma, rho, opacity = g.sigma[order] * fine, g.rho[order], g.opacity[order]
    edge = contours(sigma, rho)
    # A line as the ring between two curves, filled at once: no corner is painted twice.
    slope = edge / sigma[:, None] ** 2 - rho[:, None, None] * (
        edge[..., ::-1] / sigma.prod(axis=1)[:, None, None]
    )
    normal = slope / np.linalg.norm(slope, axis=-1, keepdims=True)
    half = LINE * SHARP / 2
    inward = np.minimum(half, (normal * edge).sum(axis=-1, keepdims=True))
    outer, inner = edge + half * normal, edge - inward * normal
    ring = np.concatenate([outer, outer[:, :1], inner[:, :1], inner[:, :0:-1], inner[:, :1]], 1)
    ring += ((g.centre[order] + 0.5) * fine - 0.5)[:, None]

    colours = palette(int(g.label.max()) + 1 if len(g.label) else 1)
    draw = ImageDraw.Draw(base, "RGBA")
    corners = np.rint(ring[..., ::-1]).astype(int).reshape(-1, 2 * ring.shape[1]).tolist()
    for xy, label, alpha in zip(corners, g.label[order], opacity, strict=True):
        draw.polygon(xy, (*colours[label].tolist(), round(255 * min(float(alpha), 1.0))))
    return np.asarray(base.reduce(SHARP))


def palette(count: int) -> np.ndarray:
    """Colours of classes 0 .. count - 1, the same every time: uint8 [count, 3].

    Up to eight are those of Okabe and Ito, which the colour-blind tell apart; of more, hues in
    steps of the golden ratio, so that neighbours differ.
    """
    okabe = [(86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66),
             (0, 114, 178), (213, 94, 0), (204, 121, 167), (255, 255, 255)]  # fmt: skip
    if count <= len(okabe):
        return np.array(okabe[:count], np.uint8)
    golden = (math.sqrt(5) - 1) / 2
    tones = [(0.85, 1.0), (0.55, 0.95), (0.9, 0.7)]  # saturation, value
    colours = [colorsys.hsv_to_rgb(i * golden % 1, *tones[i % 3]) for i in range(count)]
    return np.rint(255 * np.array(colours)).astype(np.uint8)


def draw_classes(classes: np.ndarray, count: int) -> np.ndarray:
    """A class map [h, w] in the colours of `palette(count)`: uint8 [h, w, 3]."""
    return palette(count)[classes]


def draw_signed(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Signed values as colours about grey, which is 0: uint8 of the same shape, and what is white.

    That is the 99.5th percentile of their magnitude; what is beyond is cut off.
    """
    white = max(float(np.quantile(np.abs(values), 0.995)), 1e-6)
    return np.rint(127.5 + 127.5 * np.clip(values / white, -1, 1)).astype(np.uint8), white


def draw_dominant(label: np.ndarray, odd: np.ndarray, count: int) -> np.ndarray:
    """`dominant`'s answer in colours; those of every other LR pixel are darker: uint8 [H, W, 3]."""
    return np.rint(palette(count)[label] * np.where(odd, 0.6, 1.0)[..., None]).astype(np.uint8)


def draw_bank(model: GaussianSR, shares: np.ndarray) -> np.ndarray:
    """The N Gaussians of a bank as a sheet, row by row: uint8 [H, W, 3].

    Each with its opacity, in a frame of its colour in the class map, above its share of the LR
    pixels in per cent. `field` is drawn on its window, `official` on the [-5, 5]^2 that it samples.
    """
    cell, frame, text = 41, 3, 13
    kernels = bank_kernels(model, cell)
    side, colours = math.isqrt(len(kernels)), palette(len(kernels))
    step = (cell + 2 * frame + text, cell + 2 * frame + frame)
    sheet = Image.new("RGB", (side * step[1] + frame, side * step[0] + frame), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for n, kernel in enumerate(kernels):
        y, x = (frame + i * size for i, size in zip(divmod(n, side), step, strict=True))
        end = x + cell + 2 * frame - 1
        draw.rectangle((x, y, end, y + cell + 2 * frame - 1), tuple(colours[n].tolist()))
        grey = np.rint(255 * kernel.clip(0, 1)).astype(np.uint8)
        sheet.paste(Image.fromarray(grey), (x + frame, y + frame))
        label = f"{100 * shares[n]:.3g}" if shares[n] >= 1e-4 else "<0.01" if shares[n] else "-"
        draw.text(((x + end) / 2, y + cell + 2 * frame), label, "black", font, anchor="ma")
    return np.asarray(sheet)


def bank_kernels(model: GaussianSR, cell: int) -> np.ndarray:
    """The bank's Gaussians, opacity included, on a square of `cell` samples: [N, cell, cell]."""
    with torch.inference_mode():
        table = model.head.bank.table().double().cpu()
    side = math.isqrt(len(table))
    if isinstance(model.head, OfficialHead):
        return window_kernels(table.T.reshape(1, 4, side, side), side, cell).numpy()
    reach = model.head.radius + 0.5
    u = torch.linspace(-reach, reach, cell, dtype=torch.float64)
    sigma_y, sigma_x, opacity, rho = table.T[:, :, None, None]
    u_y, u_x = u[:, None] / sigma_y, u / sigma_x
    q = (u_y**2 - 2 * rho * u_y * u_x + u_x**2) / (1 - rho**2)
    return (opacity * torch.exp(-q / 2)).numpy()


def _enlarged(image: np.ndarray) -> np.ndarray:
    """A map with whole squares for pixels, so that a small one can be looked at."""
    times = max(1, MAP_SIDE // max(image.shape[:2]))
    return image.repeat(times, 0).repeat(times, 1)


# ---- all of it ----------------------------------------------------------------------------------


def inspect(
    model: GaussianSR,
    picture: np.ndarray,
    box: Box | None = None,
    zoom: int = 8,
    scale: float = 4.0,
    progress: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Everything that `gsr inspect` writes.

    Args:
        picture: uint8 [h, w, 3], of any size.
        box: what is drawn enlarged; the 48 x 48 LR pixels in the middle if left out.
        zoom: of these drawings.
        scale: of `official`.

    Returns:
        Pictures, uint8, by file name, and a report for JSON, whose "pictures" says what each shows.
    """
    _check_picture(picture)
    size = picture.shape[:2]
    box = box or middle(size)
    check_drawing((box.bottom - box.top, box.right - box.left), zoom)
    found = survey(model, picture, box, progress)
    head, first, fields = model.head, found.band.first, found.band.tensors
    crop = picture[box.top : box.bottom, box.left : box.right]

    def ellipses(selected: bool) -> np.ndarray:
        g = listed(model, found, size, box, scale, selected)
        left = g._replace(centre=g.centre - np.array(box[:2]))
        return draw_ellipses(left, crop, zoom)

    low, high = float(found.opacity.min()), float(found.opacity.max())
    stretched = np.rint(255 * (found.opacity - low) / max(high - low, 1e-12)).astype(np.uint8)
    pictures = {"ellipses.png": ellipses(False), "opacity.png": _enlarged(stretched)}
    captions = {
        "ellipses.png": "one-sigma contours on the crop, the more visible the more opaque, "
        "coloured by the Gaussian's number in its LR pixel",
        "opacity.png": f"opacity of the whole photo, black {low:.4g}, white {high:.4g}",
    }
    report: dict[str, Any] = {
        "mode": model.config.mode,
        "photo": {"width": size[1], "height": size[0]},
        "crop": {"x": box.left, "y": box.top, "width": crop.shape[1], "height": crop.shape[0]},
        "zoom": zoom,
        "units": "sigma in LR pixels",
        "gaussians_per_pixel": fields.rho.shape[1],
        "statistics": found.statistics,
    }
    if isinstance(head, DirectHead):
        added = share(head, fields, box, zoom, first)
        check_finite(torch.from_numpy(added), "this photo")
        label, odd = dominant(fields, box, zoom, head.radius, first)
        pictures["share.png"], white = draw_signed(added)
        pictures["dominant.png"] = draw_dominant(label, odd, head.gaussians)
        captions["share.png"] = (
            "what the Gaussians add to the bicubic enlargement of the crop: grey nothing, white "
            f"{white:+.4g}, black {-white:+.4g} of full scale"
        )
        captions["dominant.png"] = (
            "which Gaussian of an LR pixel weighs most, darker for every other LR pixel"
        )
        report["share"] = {
            "mean": float(added.mean()),
            "rms": float(np.sqrt(np.square(added, dtype=np.float64).mean())),
            "largest": float(np.abs(added).max()),
        }
        shares = usage(label, head.gaussians)
        counted = "HR pixels of the crop where a Gaussian weighs most"
    else:
        count = head.config.points
        shares = usage(found.classes, count)
        pictures["classes.png"] = _enlarged(draw_classes(found.classes, count))
        pictures["bank.png"] = draw_bank(model, shares)
        captions["classes.png"] = "the Gaussian of the bank that each LR pixel of the photo selects"
        captions["bank.png"] = (
            "the Gaussians of the bank, framed in their colour of classes.png, with the share of "
            "LR pixels that select each, in per cent"
        )
        captions["ellipses.png"] = (
            "one-sigma contours on the crop, the more visible the more opaque, coloured as in "
            "classes.png"
        )
        counted = "LR pixels of the photo that select a Gaussian of the bank"
    if isinstance(head, OfficialHead):
        pictures["ellipses_selected.png"] = ellipses(True)
        captions["ellipses_selected.png"] = captions["ellipses.png"]
        captions["ellipses.png"] = (
            f"one-sigma contours on the crop of what is splatted at x{scale:g}: the mean Gaussians "
            "that all windows share"
        )
        report["scale"] = scale
        report["units"] = (
            "sigma on the [-5, 5]^2 on which kernels are sampled, "
            f"{2 * EXTENT / (head.config.kernel_size - 1):g} an HR pixel"
        )
    report["usage"] = {
        "of": counted,
        "entropy": entropy(shares),
        "largest_entropy": math.log2(len(shares)),
        "used": int((shares > 0).sum()),
        "shares": shares.tolist(),
    }
    report["pictures"] = captions
    return pictures, report


def middle(size: tuple[int, int], side: int = CROP) -> Box:
    """The `side` x `side` LR pixels in the middle of a picture of `size` (h, w), or what there is."""
    h, w = (min(n, side) for n in size)
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return Box(top, left, top + h, left + w)


def parse_crop(text: str) -> Box:
    """`parse_box` in LR pixels."""
    x, y, w, h = parse_box(text)
    return Box(y, x, y + h, x + w)


def check_crop(box: Box, size: tuple[int, int]) -> None:
    """Raise InputError unless box is a part of a picture of `size` (h, w)."""
    inside = 0 <= box.top < box.bottom <= size[0] and 0 <= box.left < box.right <= size[1]
    if not inside:
        x, y, w, h = box.left, box.top, box.right - box.left, box.bottom - box.top
        raise InputError(
            f"--crop {x},{y},{w},{h} is no part of the photo's {size[1]} x {size[0]} pixels; "
            "give x,y,width,height within it"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """`gsr inspect PHOTO -o FOLDER`: write the pictures and inspection.json. Raises InputError."""
    parser = argparse.ArgumentParser(
        prog="gsr inspect",
        description="Draw what a model makes of a photograph: its Gaussians, their opacity, which "
        "of them is chosen.",
    )
    parser.add_argument("photo", metavar="PHOTO", help="picture file")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="folder to write to, made if needed"
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="model folder or published .pth file (default: the bundled model)",
    )
    parser.add_argument(
        "--crop",
        type=parse_crop,
        metavar="x,y,w,h",
        help=f"part to draw enlarged, in pixels of the photo (default: the {CROP} x {CROP} in the "
        "middle)",
    )
    parser.add_argument(
        "--zoom", type=int, default=16, metavar="N", help="how much it is enlarged (default: 16)"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=4.0,
        metavar="S",
        help="official only: the scale at which Gaussians are drawn (default: 4)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    args = parser.parse_args(argv)

    from gsr.device import pick_device, set_threads
    from gsr.io.image import read_image, write_atomic, write_image
    from gsr.io.paths import as_json, check_takes_files, make_folder, usable
    from gsr.models.checkpoint import load
    from gsr.models.sizes import check_scale

    # All that can be wrong with the arguments is found before the model is loaded.
    set_threads(args.threads)
    check_scale(args.scale)
    device = pick_device(args.device)
    picture = read_image(args.photo)
    box = args.crop or middle(picture.shape[:2])
    check_crop(box, picture.shape[:2])
    check_drawing((box.bottom - box.top, box.right - box.left), args.zoom)
    folder = usable(args.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; name a folder")
    for name in NAMES:
        if (folder / name).exists() and os.path.samefile(folder / name, args.photo):
            raise InputError(f"{folder / name} would overwrite the photo; choose another folder")
    check_takes_files(next(p for p in (folder, *folder.parents) if p.exists()))
    model = load(args.model).to(device)
    pictures, report = inspect(
        model, picture, box, args.zoom, args.scale, not args.quiet and sys.stderr.isatty()
    )
    make_folder(folder)
    for name, image in pictures.items():
        write_image(folder / name, image)
    about = describe_model(model, called_after(args.model))
    report["photo"]["name"] = Path(args.photo).name
    report = {"model": about, **report}
    write_atomic(folder / "inspection.json", as_json(report))
    if not args.quiet:
        for name, caption in report["pictures"].items():
            print(f"{folder / name}: {caption}")
        print(f"{folder / 'inspection.json'}: statistics")
