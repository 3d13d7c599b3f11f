"""What `evaluate.py` measures with: methods, degradations of LR, means, the report and its checks.

Bicubic is measured in the same run, so that a mistake in the data or in the protocol shows there.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gsr.data.benchmarks import DataSet, check_spared
from gsr.data.degradations import add_noise, save_jpeg
from gsr.describe import telling
from gsr.errors import InputError
from gsr.inference.strips import run
from gsr.io.paths import check_path, make_folder
from gsr.metrics import PERCEPTUAL, PROTOCOLS, Protocol, psnr, psnr_y, ssim
from gsr.ops.resize import imresize

if TYPE_CHECKING:
    from gsr.models import GaussianSR

SCALES = (2, 3, 4)
SEED = 0  # of the noise that is added to LR
Method = Callable[..., Tensor]  # (LR [1, 3, h, w], (H, W), *, scale) to [1, 3, H, W], not clamped


# ---- methods ------------------------------------------------------------------------------------


def method_labels(models: Iterable[str], ensemble: bool = False) -> list[str]:
    """Return the labels of what is measured: bicubic, models and, with `ensemble`, LABEL+.

    Raises InputError for two methods of one label.
    """
    labels = ["bicubic"]
    for label in models:
        labels += [label, f"{label}+"] if ensemble else [label]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two methods are called {label}; rename a checkpoint")
    return labels


def make_methods(models: Mapping[str, GaussianSR], ensemble: bool = False) -> dict[str, Method]:
    """Make the methods that `method_labels` names."""
    methods: dict[str, Method] = {"bicubic": upsample_bicubic}
    for label, model in models.items():
        methods[label] = functools.partial(run, model)
        if ensemble:
            methods[f"{label}+"] = functools.partial(self_ensemble, methods[label])
    return methods


def upsample_bicubic(lr: Tensor, size: tuple[int, int], scale: Any = None) -> Tensor:
    """Upsample float [1, 3, h, w] to [1, 3, H, W] by MATLAB's bicubic, not clamped."""
    array = lr[0].permute(1, 2, 0).numpy()
    return torch.from_numpy(imresize(array, size=size)).permute(2, 0, 1)[None]


def self_ensemble(method: Method, lr: Tensor, size: tuple[int, int], *, scale: Any) -> Tensor:
    """Return the mean of a method's results for the 8 flips and transposes of LR.

    Args:
        method: for a transposed image, the size and a pair of scales (s_y, s_x) come swapped.
        lr: [B, C, h, w].
        size: (H, W).
        scale: s or (s_y, s_x).

    Source: Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution" (EDSR),
    CVPR workshops 2017, section 3.4.
    """
    swapped = scale[::-1] if isinstance(scale, tuple) else scale
    total = 0
    for transposed in (False, True):
        for flips in ((), (-1,), (-2,), (-2, -1)):
            if transposed:
                turned = lr.mT.flip(flips).contiguous()
                sr = method(turned, size[::-1], scale=swapped).flip(flips).mT
            else:
                sr = method(lr.flip(flips), size, scale=scale).flip(flips)
            total = total + sr.double()  # the mean of 8 equal images is that image, exactly
    return (total / 8).to(sr.dtype)


@dataclass(frozen=True)
class Degradation:
    """Degrade every LR image before a method gets it: Gaussian noise, then JPEG.

    Args:
        noise: standard deviation in levels of 255, from 0 to 255; None adds no noise.
        jpeg: Pillow's quality, from 1 to 100, at 4:2:0; None saves no JPEG.

    Raises:
        InputError: a value outside its range.
    """

    noise: float | None = None
    jpeg: int | None = None

    def __post_init__(self):
        if self.noise is not None and not 0 <= self.noise <= 255:  # NaN is not either
            raise InputError(f"noise (--noise) must be from 0 to 255, not {self.noise}")
        if self.jpeg is not None and not 1 <= self.jpeg <= 100:
            raise InputError(f"JPEG quality (--jpeg) must be from 1 to 100, not {self.jpeg}")

    def __call__(self, lr: np.ndarray, name: str, scale: float) -> np.ndarray:
        """Degrade LR, uint8 [h, w, 3], of the image `name`."""
        image = Image.fromarray(lr)
        if self.noise is not None:
            # A function of name and scale alone: the same in any set, order and process.
            text = f"{SEED} {name} x{scale}".encode(errors="surrogateescape")
            seed = int.from_bytes(hashlib.sha256(text).digest(), "big")
            rng = np.random.default_rng(seed)
            image = add_noise(image, sigma=self.noise, shot=0.0, rng=rng)
        if self.jpeg is not None:
            image = save_jpeg(image, self.jpeg, subsampling="420")
        return np.asarray(image)

    def __str__(self) -> str:
        parts = []
        if self.noise is not None:
            parts.append(f"Gaussian noise of sigma {self.noise:g} (levels of 255)")
        if self.jpeg is not None:
            parts.append(f"JPEG of quality {self.jpeg} at 4:2:0")
        return ", then ".join(parts)


# ---- figures ------------------------------------------------------------------------------------


def check_finite(sr: Tensor, what: str) -> None:
    """Raise InputError, which names what was upsampled, if a result has NaN or infinity."""
    if not sr.isfinite().all():
        raise InputError(
            f"the model gives values that are not finite for {what}; its weights are damaged or "
            "its training diverged, choose another checkpoint"
        )


def measure(
    sr: Tensor,
    hr: Tensor,
    protocol: Protocol,
    *,
    scale: float,
    extra: Mapping[str, Callable[[Tensor, Tensor, int], float]],
) -> dict[str, float]:
    """Return PSNR of the protocol's colour and of both, SSIM and the `extra` metrics."""
    shave = protocol.shave(scale)
    return {
        "psnr": protocol(sr, hr, scale),
        "ssim": ssim(sr, hr, shave),
        "psnr_rgb": psnr(sr, hr, shave),
        "psnr_y": psnr_y(sr, hr, shave),
        **{name: metric(sr, hr, shave) for name, metric in extra.items()},
    }


def summarize(
    data: DataSet,
    scales: Sequence[float],
    protocol: Protocol,
    *,
    measured: Mapping[tuple[float, str, str], tuple[dict[str, float], float]],
) -> dict[str, Any]:
    """Return a report's part about one set: means, the metrics of every image, and times.

    Args:
        measured: metrics and seconds, by (scale, method, image).

    Returns:
        {"name", "images", "scales": [{"scale", "shave", "lr", "methods"}]}: "lr" is "paired" or
        "imresize"; every method has the mean of each metric, all metrics of each of its "images",
        and the "seconds" that upsampling took. An infinite PSNR (equal images) is None.
    """
    rows = []
    for scale in scales:
        methods = {}
        for method in dict.fromkeys(method for _, method, _ in measured):
            # In the order of the set, so that nothing depends on which process measured what.
            results = {image.name: measured[scale, method, image.name] for image in data.images}
            images = {name: metrics for name, (metrics, _) in results.items()}
            methods[method] = {
                **{
                    key: _json_number(math.fsum(m[key] for m in images.values()) / len(images))
                    for key in next(iter(images.values()))
                },
                "images": {
                    name: {key: _json_number(value) for key, value in metrics.items()}
                    for name, metrics in images.items()
                },
                "seconds": math.fsum(seconds for _, seconds in results.values()),
            }
        lr = "paired" if scale in data.images[0].lr else "imresize"
        rows.append({"scale": scale, "shave": protocol.shave(scale), "lr": lr, "methods": methods})
    return {"name": data.name, "images": len(data.images), "scales": rows}


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


# ---- report -------------------------------------------------------------------------------------


def describe_protocol(
    protocol: Protocol,
    degradation: Degradation,
    *,
    ensemble: bool = False,
    extra: Iterable[str] = (),
) -> dict[str, Any]:
    """Say what the figures of a report mean; `extra`: names of perceptual metrics."""
    more: dict[str, Any] = {}
    if str(degradation):
        more["degradation"] = {
            "noise": degradation.noise,
            "jpeg": degradation.jpeg,
            "lr": str(degradation),
            "seed": "of the noise: the image's name and the scale, and nothing else",
        }
    if ensemble:
        more["ensemble"] = (
            "the mean over 8 flips and transposes (Lim et al., EDSR, 2017, section 3.4)"
        )
    if extra := list(extra):
        more["perceptual"] = {
            name: f"{PERCEPTUAL[name][0]} of piq on VGG16, RGB, shaved likewise; 0 is equal"
            for name in extra
        }
    return {
        "name": protocol.name,
        "psnr": {
            "colour": protocol.colour,
            "unit": "dB",
            "mean": "of the PSNR of each image; null stands for infinity",
            "also": "psnr_rgb and psnr_y: of either colour, shaved likewise",
        },
        "ssim": {"colour": "Y", "window": "Gaussian 11 x 11, sigma 1.5", "range": 255},
        "shave": "ceil(scale)" + (f" + {protocol.extra}" if protocol.extra else ""),
        "quantised": False,  # predictions are clamped to [0, 1], not rounded to 8 bits
        "hr": "cropped to round(LR size * scale)",
        "lr": "paired: the data set's own files; imresize: made from HR, 8 bits",
        "bicubic": "MATLAB-compatible imresize, a = -0.5, of LR",
        **more,
    }


def table(report: dict[str, Any]) -> str:
    """Return a report as text: a block a data set, a row a method, all metrics at every scale."""
    metrics, names, lines = metrics_of(report), metric_names(report), []
    for data in report["sets"]:
        methods = list(data["scales"][0]["methods"])
        labels = [f"{data['name']} ({count_images(data)}), {names}", *methods]
        cells = [[column(row) for row in data["scales"]]]
        for method in methods:
            cells.append([cell(row["methods"][method], metrics) for row in data["scales"]])
        width, wide = max(map(len, labels)), 14 + 9 * (len(metrics) - 2)
        for label, row in zip(labels, cells, strict=True):
            lines.append(f"{label:{width}}" + "".join(f"  {text:>{wide}}" for text in row))
        lines.append("")
    return "\n".join([*lines, *notes(report)]).rstrip()


def metrics_of(report: Mapping[str, Any]) -> list[str]:
    """Return the metrics that tables show: psnr, ssim, and lpips and dists if measured."""
    return ["psnr", "ssim", *report["protocol"].get("perceptual", {})]


def metric_names(report: Mapping[str, Any], unit: str = "") -> str:
    """Return `metrics_of` as text: "PSNR Y / SSIM"."""
    psnr = f"PSNR {report['protocol']['psnr']['colour']}{unit}"
    return " / ".join([psnr, *(key.upper() for key in metrics_of(report)[1:])])


def cell(values: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Return a method's means at a scale as text: "33.68 / 0.9306"."""
    return " / ".join(
        ("inf" if values[key] is None else f"{values[key]:.2f}")
        if key == "psnr"
        else f"{values[key]:.4f}"
        for key in metrics
    )


def column(row: Mapping[str, Any]) -> str:
    """Return a scale as the head of a column: "x3", or "x3*" where LR was made from HR."""
    return f"x{row['scale']:g}" + ("*" if row["lr"] == "imresize" else "")


def count_images(data: Mapping[str, Any]) -> str:
    """Return "5 images" for one of a report's sets."""
    return f"{data['images']} image{'s' if data['images'] > 1 else ''}"


def notes(report: Mapping[str, Any]) -> list[str]:
    """Return what a table says below itself about its LR."""
    rows = [row for data in report["sets"] for row in data["scales"]]
    lines = []
    if any(row["lr"] == "imresize" for row in rows):
        lines.append("*: LR made from HR by imresize, not the data set's own")
    if "degradation" in report["protocol"]:
        lines.append(f"LR degraded: {report['protocol']['degradation']['lr']}")
    return lines


# ---- arguments ----------------------------------------------------------------------------------


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how sets are measured."""
    add = parser.add_argument
    # fmt: off
    add("--scale", nargs="+", type=float, default=list(SCALES), metavar="S",
        help="any scales from 1 (default: 2 3 4)")
    add("--protocol", choices=list(PROTOCOLS), default="benchmark",
        help="benchmark: luma, shave s (default); div2k: RGB, shave s + 6")
    add("--limit", type=int, metavar="N", help="only the first N images of a set")
    add("--noise", type=float, metavar="SIGMA",
        help="add Gaussian noise to every LR image, sigma in levels of 255")
    add("--jpeg", type=int, metavar="QUALITY",
        help="then save it as JPEG, quality 1 to 100, 4:2:0")
    # fmt: on


def label_checkpoints(paths: Sequence[str]) -> dict[str, str]:
    """Return the checkpoints by label: as much of the path's end as tells them apart."""
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-max(count, telling(part)) :]) for part in parts]
        if len(set(labels)) == len(labels):
            return dict(zip(labels, paths, strict=True))
    twice = next(path for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1)
    raise InputError(f"--checkpoint names {twice} twice; name each model once")


def check_output(file: str, sets: Sequence[DataSet]) -> Path:
    """Return the report's path; InputError unless it can be written and spares the sets."""
    path = check_path(file)
    if path.is_dir():
        raise InputError(f"--output {path} is a folder; name the file to write")
    check_spared("output", path, sets)
    make_folder(path.parent)
    return path


def save_folders(
    save: str | None, labels: Sequence[str], sets: Sequence[DataSet]
) -> dict[tuple[str, str], Path]:
    """Return the folders for results by (label, set): save/SET or, of several models,
    save/LABEL/SET.

    Bicubic is not saved. Raises InputError if a folder lies among the images of a set.
    """
    if save is None:
        return {}
    labels = [label for label in labels if label != "bicubic"]
    homes = {label: Path(save) if len(labels) == 1 else Path(save, label) for label in labels}
    folders = {(label, data.name): homes[label] / data.name for label in labels for data in sets}
    for folder in folders.values():
        check_spared("save", folder / "x2" / "NAME.png", sets)
    make_folder(save)
    return folders
