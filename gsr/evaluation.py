"""Measuring a model on folders of pictures, by the published protocols, next to bicubic.

A data folder is FOLDER/HR with FOLDER/LR_bicubic/X2/NAMEx2.png (likewise X3, ...), or plain HR
pictures, or NAME_HR with NAME_LR_bicubic beside it, as DIV2K is laid out. Where a set has no LR
pictures for a scale they are made from HR by `imresize`. Every report is one JSON file that says
how the numbers came about; bicubic is measured in the same run, so that a mistake in the data or
in the protocol shows there. `gsr.report` makes tables and a figure of it.

Scales may be fractional. A picture must have 11 pixels a side left at every scale, after the HR
pixels that LR does not cover and those that the protocol shaves are gone: one of 256 pixels has at
x30, one of 64 has not. If a picture is too small for one of the scales, nothing is measured: a mean
over fewer pictures would not be that of the set.

Under `torchrun --nproc-per-node N evaluate.py ...` the pictures are divided among the processes,
and the report is that of one process in every digit but for the seconds, if each of them has as
many threads (torchrun gives them one each, unless OMP_NUM_THREADS says otherwise).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gsr import report as reports
from gsr.device import pick_device, set_threads
from gsr.errors import InputError
from gsr.image import (
    READ_SUFFIXES,
    check_format,
    list_images,
    read_image,
    save_image,
    to_tensor,
    to_uint8,
    write_atomic,
    write_image,
)
from gsr.infer import run
from gsr.metrics import (
    PERCEPTUAL,
    PROTOCOLS,
    SSIM_WINDOW,
    VGG16_LEAST,
    Protocol,
    check_size,
    perceptual,
    psnr,
    psnr_y,
    ssim,
)
from gsr.paths import make_folder, usable
from gsr.resize import imresize

if TYPE_CHECKING:
    from gsr.models import GaussianSR

SCALES = (2, 3, 4)
MAX_SCALE = 1000
BUNDLED = "bundled"  # what reports and the command line call the bundled model


# ---- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    name: str  # path below the HR folder without suffix, e.g. "baby"
    hr: Path
    lr: dict[float, Path]  # by scale; a scale that is not here is made by imresize


@dataclass(frozen=True)
class DataSet:
    name: str
    pictures: list[Picture]
    folders: tuple[Path, Path]  # of HR and of LR, resolved


def open_set(
    folder: str | os.PathLike, scales: Sequence[float], limit: int | None = None
) -> DataSet:
    """Find the HR pictures of a data folder and their LR pictures at `scales`; reads none of them.

    Args:
        folder: see the module's text.
        scales: each from 1 to 1000.
        limit: only the first so many pictures, by name.

    Raises:
        InputError: no such folder, no picture, two pictures of one name, a bad scale or limit, or
            a folder of LR pictures that lacks one of them or has none for any scale.
    """
    scales = _check_scales(scales)
    if limit is not None and limit < 1:
        raise InputError(f"limit (--limit) must be at least 1, not {limit}")
    folder = usable(folder)
    name, hr_folder, lr_folder = folder.resolve().name, folder, folder / "LR_bicubic"
    if (folder / "HR").is_dir():
        hr_folder = folder / "HR"
    elif name.endswith("_HR"):
        name = name[: -len("_HR")]
        lr_folder = folder.resolve().parent / f"{name}_LR_bicubic"

    # A set whose HR pictures lie beside its folder LR_bicubic.
    paths = [path for path in list_images(hr_folder) if lr_folder not in path.parents]
    if not paths:
        raise InputError(f"{hr_folder} holds LR pictures only; put HR pictures into it")
    names = _by_name(paths, hr_folder)
    if lr_folder.is_dir() and not any(x.is_dir() for x in lr_folder.glob("X[0-9]*")):
        raise InputError(
            f"{lr_folder} holds no folder of a scale, spelt X2, X3, ...; rename what it holds, or "
            "remove it to have LR made from HR"
        )
    lr: dict[float, dict[str, Path]] = {}
    for scale in scales:
        x = lr_folder / f"X{scale}"
        if not x.is_dir():
            continue
        found = _by_name(list_images(x), x)
        missing = [n for n in names if f"{n}x{scale}" not in found]
        if missing:
            raise InputError(
                f"{x} lacks {len(missing)} of the {len(names)} LR pictures, first "
                f"{missing[0]}x{scale}.png; add them, or remove {x.name} to have LR made from HR"
            )
        lr[scale] = {n: found[f"{n}x{scale}"] for n in names}
    pictures = [Picture(n, hr, {s: lr[s][n] for s in lr}) for n, hr in names.items()]
    return DataSet(name, pictures[:limit], (hr_folder.resolve(), lr_folder.resolve()))


def check_spared(option: str, path: Path, sets: Sequence[DataSet]) -> None:
    """Raise InputError if a file to be written would replace a picture of a set, or become one."""
    exists, above = usable(path).exists(), (path.parent.resolve() / path.name).parents
    picture = path.suffix.lower() in READ_SUFFIXES
    for data in sets:
        own = (file for p in data.pictures for file in (p.hr, *p.lr.values()))
        if (picture and any(folder in above for folder in data.folders)) or (
            exists and any(os.path.samefile(path, file) for file in own)
        ):
            raise InputError(
                f"--{option} would write {path} among the pictures of {data.name}, or over one of "
                "them; choose another place"
            )


def _by_name(paths: list[Path], folder: Path) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in names:
            raise InputError(f"{names[name]} and {path} have the same name; rename one of them")
        names[name] = path
    return names


def _check_scales(scales: Sequence[float]) -> list[float]:
    """Each scale once, as an int where it is whole, so that files and reports say x2, not x2.0."""
    for scale in scales:
        if not 1 <= scale <= MAX_SCALE:  # NaN is not either
            raise InputError(f"scale (--scale) must be from 1 to {MAX_SCALE}, not {scale}")
    if not scales:
        raise InputError("scale (--scale): give at least one")
    return list(dict.fromkeys(int(s) if s == int(s) else float(s) for s in scales))


def read_pair(picture: Picture, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """LR [h, w, 3] and HR [round(h s), round(w s), 3], uint8, of a picture at a scale s.

    The LR file if there is one, else HR cropped and reduced by `imresize`; either way HR loses
    what LR does not cover, at the bottom and on the right.

    Raises:
        InputError: an unreadable picture, one with no LR pixel left, or LR of another size.
    """
    hr = read_image(picture.hr)
    if scale in picture.lr:
        lr = read_image(picture.lr[scale])
        if not _reduced(hr.shape, lr.shape, scale):
            raise InputError(
                f"{picture.lr[scale]} has {lr.shape[1]} x {lr.shape[0]} pixels, which is not "
                f"{picture.hr} ({hr.shape[1]} x {hr.shape[0]}) reduced {scale} times, rounded "
                "down; replace one of them"
            )
        return lr, _crop(hr, lr.shape, scale)
    size = _lr_size(picture, hr.shape, scale)
    hr = _crop(hr, size, scale)
    return imresize(hr, size=size), hr


def check_sizes(
    data: DataSet, scales: Sequence[float], protocol: str | Protocol, least: int = SSIM_WINDOW
) -> None:
    """Raise InputError if a picture is too small to measure at a scale, or LR is not HR reduced.

    Of good files only the heads are read. `least`: pixels that must be left a side, see the text of
    the module.
    """
    protocol = _protocol(protocol)
    for picture in data.pictures:
        size = _head(picture.hr)
        for scale in scales:
            hr_size = [round(n * scale) for n in _lr_size(picture, size, scale)]
            with _named_picture(picture, scale):
                check_size(hr_size, protocol.shave(scale), least)
            if scale in picture.lr and not _reduced(size, _head(picture.lr[scale]), scale):
                read_pair(picture, scale)  # which turns pictures upright and has the last word


def _head(path: Path) -> tuple[int, int]:
    """(H, W) as a file's head says it, or what `read_image` raises."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            return image.height, image.width
    except Exception:  # whatever is wrong with the file, reading it says so
        return read_image(path).shape[:2]


def _reduced(hr_size: Sequence[int], lr_size: Sequence[int], scale: float) -> bool:
    """Whether LR has the size of HR reduced, rounded down."""
    # The slack is for scales that binary cannot express.
    return all(-1e-6 < hr_size[axis] - lr_size[axis] * scale < scale for axis in (0, 1))


def _lr_size(picture: Picture, hr_shape: Sequence[int], scale: float) -> tuple[int, int]:
    size = tuple(math.floor(n / scale + 1e-9) for n in hr_shape[:2])
    if 0 in size:
        raise InputError(
            f"{picture.hr} has {hr_shape[1]} x {hr_shape[0]} pixels, too few for scale {scale}; "
            "remove it"
        )
    return size


def _crop(hr: np.ndarray, lr_shape: Sequence[int], scale: float) -> np.ndarray:
    return hr[: round(lr_shape[0] * scale), : round(lr_shape[1] * scale)]


# ---- measuring ----------------------------------------------------------------------------------


def enlarge_bicubic(lr: Tensor, size: tuple[int, int]) -> Tensor:
    """MATLAB's bicubic: float [1, 3, h, w] to [1, 3, H, W] of the same dtype, not clamped."""
    array = lr[0].permute(1, 2, 0).numpy()
    return torch.from_numpy(imresize(array, size=size)).permute(2, 0, 1)[None]


def self_ensemble(
    enlarge: Callable[[Tensor, tuple[int, int], Any], Tensor],
    lr: Tensor,
    size: tuple[int, int],
    scale: float | tuple[float, float] | None = None,
) -> Tensor:
    """Mean of what `enlarge` makes of the 8 flips and transposes of LR, each turned back.

    Args:
        enlarge: (lr, size, scale) to [B, C, H, W]; for a transposed picture, size and a pair of
            scales (s_y, s_x) come exchanged.
        lr: [B, C, h, w].
        size: (H, W).

    Source: Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution" (EDSR),
    CVPR workshops 2017, section 3.4.
    """
    total = 0
    for transposed in (False, True):
        for flips in ((), (-1,), (-2,), (-2, -1)):
            if transposed:
                turned = scale[::-1] if isinstance(scale, tuple) else scale
                sr = enlarge(lr.mT.flip(flips).contiguous(), size[::-1], turned).flip(flips).mT
            else:
                sr = enlarge(lr.flip(flips), size, scale).flip(flips)
            total = total + sr.double()  # the mean of 8 equal pictures is that picture, exactly
    return (total / 8).to(sr.dtype)


def evaluate(
    model: GaussianSR | Mapping[str, GaussianSR] | None,
    folder: str | os.PathLike,
    scales: Sequence[float] = SCALES,
    protocol: str | Protocol = "benchmark",
    limit: int | None = None,
    save: str | os.PathLike | None = None,
    progress: bool = False,
    ensemble: bool = False,
    extra: Mapping[str, Callable[[Tensor, Tensor, int], float]] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Mean PSNR and SSIM of bicubic and of models over a data folder, at every scale.

    Args:
        model: works on its own device; several by label; None measures bicubic only.
        folder: a data folder, see the module's text.
        scales: each from 1 to 1000.
        protocol: "benchmark" (luma PSNR) or "div2k" (RGB PSNR), see `gsr.metrics`.
        limit: only the first so many pictures, by name.
        save: folder for what the model makes, as save/SET/x2/NAME.png; what several make, or one
            and its ensemble, as save/LABEL/SET/x2/NAME.png.
        progress: a bar on stderr.
        ensemble: measure every model once more as "LABEL+", by `self_ensemble`.
        extra: more metrics by name, such as `gsr.metrics.perceptual` makes.
        ranks: the processes that share the pictures, each of which calls this; each gets the whole
            report.

    Returns:
        {"name", "pictures", "scales": [{"scale", "shave", "lr", "methods"}]}: "lr" is "paired" or
        "imresize"; "methods" has "bicubic" and "model" (or the labels), each with mean "psnr" (dB,
        of the protocol's colour), "ssim", "psnr_rgb", "psnr_y" and the extra metrics, all of them
        for each of "images", and with the "seconds" that enlarging took, of all processes
        together, what a model's first call compiles included. An infinite PSNR (equal pictures) is
        None.

    Raises:
        InputError: anything `open_set`, `check_sizes` and `read_pair` raise, an unknown protocol,
            or a model that gives NaN or infinity.
    """
    protocol, scales, ranks = _protocol(protocol), _check_scales(scales), ranks or Ranks()
    models = _by_label(model)
    data = open_set(folder, scales, limit)
    check_sizes(data, scales, protocol)
    own = ranks.share(data.pictures)
    folders = _save_folders(save, methods_at(1, models, ensemble), data, [data])
    try:
        measured = {}
        with _bar(len(own) * len(scales), data.name, progress and ranks.rank == 0) as bar:
            for scale in scales:
                methods = methods_at(scale, models, ensemble)
                found = _measure_all(own, scale, methods, protocol, folders, extra or {}, bar)
                measured |= {(scale, method): found[method] for method in methods}
    except InputError as error:
        measured = error  # the other processes wait to hear of it
    everywhere = ranks.gather(measured)
    for error in everywhere:
        if isinstance(error, InputError):
            raise error

    names = [picture.name for picture in data.pictures]
    rows = [
        {
            "scale": scale,
            "shave": protocol.shave(scale),
            "lr": "paired" if scale in data.pictures[0].lr else "imresize",
            "methods": {
                method: _together([part[scale, method] for part in everywhere], names)
                for method in methods_at(scale, models, ensemble)
            },
        }
        for scale in scales
    ]
    return {"name": data.name, "pictures": len(data.pictures), "scales": rows}


def _save_folders(
    save: str | os.PathLike | None, methods: Sequence[str], data: DataSet, sets: Sequence[DataSet]
) -> dict[str, Path]:
    """Where pictures go, by method; InputError if that is among the pictures of one of the sets."""
    labels = [] if save is None else [label for label in methods if label != "bicubic"]
    folders = {label: Path(save, label, data.name) for label in labels}
    if len(folders) == 1:
        folders = {labels[0]: Path(save, data.name)}
    for folder in folders.values():
        check_spared("save", folder / "x2" / "NAME.png", sets)
    return folders


def _by_label(model: GaussianSR | Mapping[str, GaussianSR] | None) -> Mapping[str, GaussianSR]:
    if model is None:
        return {}
    return model if isinstance(model, Mapping) else {"model": model}


def methods_at(
    scale: float, models: Mapping[str, GaussianSR], ensemble: bool = False
) -> dict[str, Callable[[Tensor, tuple[int, int]], Tensor]]:
    """What is measured at a scale, by label: functions (lr, size) to [1, 3, H, W].

    Raises InputError for two methods of one label.
    """
    methods = {"bicubic": enlarge_bicubic}
    for label, model in models.items():
        enlarge = functools.partial(_enlarge, model)
        ours = {label: functools.partial(enlarge, scale=scale)}
        if ensemble:
            ours[f"{label}+"] = functools.partial(self_ensemble, enlarge, scale=scale)
        for name in ours:
            if name in methods:
                raise InputError(f"two methods are called {name}; rename a checkpoint")
        methods |= ours
    return methods


def _enlarge(model: GaussianSR, lr: Tensor, size: tuple[int, int], scale: Any) -> Tensor:
    return run(model, lr, size, scale=scale)


def _protocol(protocol: str | Protocol) -> Protocol:
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def check_finite(values: Tensor, what: str) -> None:
    """Raise InputError if a model gives NaN or infinity for what is named."""
    if not values.isfinite().all():
        raise InputError(
            f"the model gives values that are not finite for {what}; its weights are damaged or "
            "its training diverged, choose another checkpoint"
        )


def _measure_all(
    pictures: Sequence[Picture],
    scale: float,
    methods: Mapping[str, Callable[[Tensor, tuple[int, int]], Tensor]],
    protocol: Protocol,
    folders: Mapping[str, Path],
    extra: Mapping[str, Callable[[Tensor, Tensor, int], float]],
    bar: Any,
) -> dict[str, dict[str, Any]]:
    """{"images": {name: metrics}, "seconds"} of every method on these pictures at one scale."""
    found = {method: {"images": {}, "seconds": 0.0} for method in methods}
    for picture in pictures:
        lr, hr = (to_tensor(array) for array in read_pair(picture, scale))
        for method, enlarge in methods.items():
            start = time.perf_counter()
            sr = enlarge(lr, tuple(hr.shape[-2:])).cpu()
            found[method]["seconds"] += time.perf_counter() - start
            check_finite(sr, f"{picture.hr} at x{scale}")
            sr = sr.clamp(0, 1)
            found[method]["images"][picture.name] = _measure(
                sr, hr, scale, protocol, picture, extra
            )
            if method in folders:
                path = folders[method] / f"x{scale}" / f"{picture.name}.png"
                make_folder(path.parent)
                write_image(path, to_uint8(sr))
        bar.update()
    return found


def _measure(
    sr: Tensor,
    hr: Tensor,
    scale: float,
    protocol: Protocol,
    picture: Picture,
    extra: Mapping[str, Callable[[Tensor, Tensor, int], float]],
) -> dict[str, float]:
    shave = protocol.shave(scale)
    with _named_picture(picture, scale):
        return {
            "psnr": protocol(sr, hr, scale),
            "ssim": ssim(sr, hr, shave),
            "psnr_rgb": psnr(sr, hr, shave),
            "psnr_y": psnr_y(sr, hr, shave),
            **{name: metric(sr, hr, shave) for name, metric in extra.items()},
        }


@contextmanager
def _named_picture(picture: Picture, scale: float) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{picture.hr} at x{scale}: {error}, or remove it") from None


def _together(parts: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """The report of one method at one scale: means, then every picture, then the time.

    The parts are those of the processes. All is put in the order of `names` before a mean is taken,
    so that nothing depends on who measured what.
    """
    found = {name: image for part in parts for name, image in part["images"].items()}
    images = {name: found[name] for name in names}
    means = {
        key: _json_number(math.fsum(image[key] for image in images.values()) / len(images))
        for key in images[names[0]]
    }
    each = {
        name: {key: _json_number(value) for key, value in image.items()}
        for name, image in images.items()
    }
    return {**means, "images": each, "seconds": math.fsum(part["seconds"] for part in parts)}


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _bar(total: int, name: str, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit="picture", disable=not progress)


# ---- several processes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Which one of the processes that share an evaluation this is, and how many they are."""

    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's part: every count-th, so that sets sorted by size are divided evenly."""
        return items[self.rank :: self.count]

    def gather(self, value: Any) -> list[Any]:
        """What every process has for `value`, by rank; each of them must ask."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def _ranks() -> Iterator[Ranks]:
    """The processes that torchrun has started, connected by gloo; one without torchrun."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        yield Ranks()
        return
    import torch.distributed as dist

    try:
        # A process that is done waits for the others, however long they take.
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"WORLD_SIZE is {count}, but the processes cannot be connected ({error}); start them "
            "with torchrun, or unset WORLD_SIZE"
        ) from None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


# ---- reports ------------------------------------------------------------------------------------


def describe_protocol(
    protocol: str | Protocol, ensemble: bool = False, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """What the numbers of a protocol mean, for a report; `extra`: names of perceptual metrics."""
    protocol = _protocol(protocol)
    shave = "ceil(scale)" + (f" + {protocol.extra}" if protocol.extra else "")
    more = {}
    if ensemble:
        more["ensemble"] = (
            "the mean over 8 flips and transposes (Lim et al., EDSR, 2017, section 3.4)"
        )
    if extra:
        more["perceptual"] = {
            name: f"{PERCEPTUAL[name][0]} of piq on VGG16, RGB, shaved likewise; 0 is equal"
            for name in extra
        }
    return {
        "name": protocol.name,
        "psnr": {
            "colour": protocol.colour,
            "unit": "dB",
            "mean": "of the PSNR of each picture; null stands for infinity",
            "also": "psnr_rgb and psnr_y: of either colour, shaved likewise",
        },
        "ssim": {"colour": "Y", "window": "Gaussian 11 x 11, sigma 1.5", "range": 255},
        "shave": shave,
        "quantised": False,  # predictions are clamped to [0, 1], not rounded to 8 bits
        "hr": "cropped to round(LR size * scale)",
        "lr": "paired: the data set's own files; imresize: made from HR, 8 bits",
        "bicubic": "MATLAB-compatible imresize, a = -0.5, of LR",
        **more,
    }


def describe_model(model: GaussianSR, checkpoint: str) -> dict[str, Any]:
    """Which model was measured: its name, mode, size, configuration and a hash of its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "checkpoint": checkpoint,
        "mode": model.config.mode,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": digest.hexdigest(),
        "config": asdict(model.config),
    }


def describe_run(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit: what else the numbers depend on."""
    import PIL

    import gsr

    cuda = device.type == "cuda"
    return {
        "versions": {
            "gsr": gsr.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this checkout, "-dirty" where files differ; None if it is no checkout."""
    root = Path(__file__).resolve().parents[1]
    # Installed into an environment inside somebody's own repository, git would name that one.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def table(report: dict[str, Any]) -> str:
    """A report as text: one block a data set, one row a method, PSNR and SSIM at every scale."""
    metrics = reports.metrics_of(report)
    names = " / ".join(
        f"PSNR {report['protocol']['psnr']['colour']}" if key == "psnr" else key.upper()
        for key in metrics
    )
    lines = []
    for data in report["sets"]:
        count = f"{data['pictures']} picture{'s' if data['pictures'] > 1 else ''}"
        methods = list(data["scales"][0]["methods"])
        labels = [f"{data['name']} ({count}), {names}", *methods]
        cells = [[reports.column(row) for row in data["scales"]]]
        for method in methods:
            cells.append([reports.cell(row["methods"][method], metrics) for row in data["scales"]])
        width, column = max(map(len, labels)), 14 + 9 * (len(metrics) - 2)
        for label, row in zip(labels, cells, strict=True):
            lines.append(f"{label:{width}}" + "".join(f"  {cell:>{column}}" for cell in row))
        lines.append("")
    if reports.made_lr(report):
        lines.append(reports.MADE)
    return "\n".join(lines).rstrip()


def crops(
    models: Mapping[str, GaussianSR],
    picture: Picture,
    scale: float,
    protocol: str | Protocol,
    box: reports.Box | None = None,
    ensemble: bool = False,
    title: str | None = None,
) -> Image.Image:
    """One picture as a figure: HR, bicubic and the models in a box, with the PSNR of each crop.

    Args:
        models, scale, protocol, ensemble: as in `evaluate`. The PSNR is of the protocol's colour,
            of nothing but the crop, which is not shaved.
        box: left, top, width and height in HR pixels; None takes the square in which the methods
            differ most (`gsr.report.differing_box`).

    Raises:
        InputError: anything `read_pair` and `check_box` raise, or a model that gives NaN.
    """
    protocol = _protocol(protocol)
    lr, hr = (to_tensor(array) for array in read_pair(picture, scale))
    made = {}
    for label, enlarge in methods_at(scale, models, ensemble).items():
        made[label] = enlarge(lr, tuple(hr.shape[-2:])).cpu()
        check_finite(made[label], f"{picture.hr} at x{scale}")
    levels = {label: to_uint8(sr) for label, sr in made.items()}
    if box is None:
        box = reports.differing_box([*levels.values()], protocol.shave(scale))
    check_box(box, hr.shape[-2:], picture, scale)
    x, y, w, h = box
    inside = (..., slice(y, y + h), slice(x, x + w))
    notes = {}
    for label, sr in made.items():
        value = protocol.metric(sr.clamp(0, 1)[inside], hr[inside], 0)
        notes[label] = f"{value:.2f} dB"
    title = f"{title or picture.name}, x{scale:g}; PSNR {protocol.colour} of the crop"
    return reports.figure(to_uint8(hr), levels, box, notes, title)


def check_box(box: reports.Box, size: Sequence[int], picture: Picture, scale: float) -> None:
    """Raise InputError unless a box is at least 1 x 1 pixel, within HR of size (H, W)."""
    x, y, w, h = box
    if min(x, y) < 0 or min(w, h) < 1 or x + w > size[1] or y + h > size[0]:
        raise InputError(
            f"the box (--box) {x},{y},{w},{h} is not within {picture.hr}, of which x{scale:g} "
            f"measures {size[1]} x {size[0]} pixels; give left,top,width,height in these"
        )


# ---- command line -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """`evaluate.py --data FOLDER ...`: print the table, write the reports. Raises InputError."""
    args = _parser().parse_args(argv)
    with _ranks() as ranks:
        _main(args, ranks)


def _main(args: argparse.Namespace, ranks: Ranks) -> None:
    from gsr.checkpoint import load

    start = time.perf_counter()
    set_threads(args.threads)
    # All that can be wrong with paths and sizes is found before anything slow begins.
    scales = _check_scales(args.scale)
    sets = [open_set(folder, scales, args.limit) for folder in args.data]
    names = [data.name for data in sets]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two data folders (--data) are called {name}; rename one of them")
    least = VGG16_LEAST if args.perceptual else SSIM_WINDOW
    for data in sets:
        check_sizes(data, scales, args.protocol, least)
    shown = _shown(args, sets, scales)
    paths = _checkpoints(args.checkpoint)
    called = {n: called_after(path) if n == "model" else n for n, path in paths.items()}
    methods_at(1, dict.fromkeys(called.values()), args.ensemble)  # tables must tell them apart
    for data in sets:
        _save_folders(args.save, methods_at(1, paths, args.ensemble), data, sets)
    files = _files(args, sets)
    if args.save is not None:
        make_folder(args.save)
    device = pick_device(args.device)
    if ranks.count > 1 and args.device == "auto" and device.type == "cuda":
        # The processes of one machine take its GPUs in turn.
        local = int(os.environ.get("LOCAL_RANK", ranks.rank)) % torch.cuda.device_count()
        device = torch.device("cuda", local)
    extra = {name: perceptual(name, device) for name in args.perceptual}
    models = {label: load(path).to(device) for label, path in paths.items()}
    for model in models.values():  # what is compiled or allocated at first counts for no picture
        run(model, torch.zeros(1, 3, 16, 16), (32, 32), scale=2)

    described = {label: describe_model(model, called[label]) for label, model in models.items()}
    report = {
        "protocol": describe_protocol(args.protocol, args.ensemble, list(extra)),
        **({"models": described} if len(described) > 1 else described),
        **describe_run(device),
        "sets": [
            evaluate(
                models, folder, scales, args.protocol, args.limit, args.save, True,
                args.ensemble, extra, ranks,
            )
            for folder in args.data
        ],
    }  # fmt: skip
    if ranks.rank > 0:
        return
    report["seconds"] = time.perf_counter() - start
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(files["output"], text.encode())
    if "csv" in files:
        write_atomic(files["csv"], reports.csv_text(report).encode())
    if "markdown" in files:
        write_atomic(files["markdown"], reports.markdown(report).encode())
    if shown is not None:
        scale, name = shown
        where, picture = _find(sets, name or "/".join(reports.telling_picture(report, scale)))
        title = f"{where}/{picture.name}"
        named = {called[label]: model for label, model in models.items()}
        drawn = crops(named, picture, scale, args.protocol, args.box, args.ensemble, title)
        save_image(files["figure"], drawn)
    print(f"{table(report)}\n\nreport: {files.pop('output')}")
    for option, path in files.items():
        print(f"{option}: {path}")


def _shown(
    args: argparse.Namespace, sets: list[DataSet], scales: Sequence[float]
) -> tuple[float, str | None] | None:
    """Scale and picture of --figure, None for a picture to be chosen; InputError if it cannot be.

    The whole is None where no figure is asked for.
    """
    chosen = {"--box": args.box, "--picture": args.picture, "--figure-scale": args.figure_scale}
    if args.figure is None:
        for option, value in chosen.items():
            if value is not None:
                raise InputError(f"{option} is for --figure; give that too")
        return None
    scale = max(scales)
    if args.figure_scale is not None:
        (scale,) = _check_scales([args.figure_scale])
        if scale not in scales:
            listed = ", ".join(f"{s:g}" for s in scales)
            raise InputError(
                f"--figure-scale {scale:g} is none of the scales measured ({listed}); add it to "
                "--scale"
            )
    if args.picture is not None:
        _, picture = _find(sets, args.picture)
        if args.box is not None:
            check_box(args.box, read_pair(picture, scale)[1].shape[:2], picture, scale)
    elif args.box is not None:
        raise InputError("--box is a place in one picture; name that by --picture")
    return scale, args.picture


def _find(sets: list[DataSet], name: str) -> tuple[str, Picture]:
    """The set and the first picture called NAME or SET/NAME."""
    for data in sets:
        for picture in data.pictures:
            if name in (picture.name, f"{data.name}/{picture.name}"):
                return data.name, picture
    raise InputError(
        f"--picture {name} is none of the pictures measured, such as {sets[0].name}/"
        f"{sets[0].pictures[0].name}; give NAME or SET/NAME, without suffix"
    )


def _files(args: argparse.Namespace, sets: Sequence[DataSet]) -> dict[str, Path]:
    """What is to be written, by option; InputError unless all of it can be, and spares the sets."""
    kinds = {"output": "JSON", "csv": "CSV", "markdown": "Markdown", "figure": "picture"}
    files: dict[str, Path] = {}
    for option, kind in kinds.items():
        if getattr(args, option) is None:
            continue
        path = usable(getattr(args, option))
        if path.is_dir():
            raise InputError(f"--{option} {path} is a folder; name the {kind} file to write")
        for other, taken in files.items():
            if path.resolve() == taken.resolve():
                raise InputError(f"--{option} and --{other} both name {path}; choose two names")
        check_spared(option, path, sets)
        files[option] = path
    if "figure" in files:
        check_format(files["figure"], (1, 1))
    for path in files.values():
        make_folder(path.parent)
    return files


def _checkpoints(paths: list[str] | None) -> dict[str, str | None]:
    """Path of every model by label, None for the bundled one: "model" if there is one.

    Of several, the label is the end of the path, as much of it as tells it from the others.
    """
    if paths is None:
        return {"model": None}
    # The word, unless something is called so here.
    named = [None if p == BUNDLED and not usable(p).exists() else p for p in paths]
    if len(named) == 1:
        return {"model": named[0]}
    parts = [(BUNDLED,) if p is None else Path(os.path.abspath(p)).parts[1:] for p in named]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-max(count, _telling(part)) :]) for part in parts]
        if len(set(labels)) == len(labels):
            return dict(zip(labels, named, strict=True))
    twice = next(path for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1)
    raise InputError(f"--checkpoint names {twice} twice; name each model once")


def called_after(path: str | os.PathLike | None) -> str:
    """What a report calls a checkpoint: the end of its path, "run/best" for what a run wrote."""
    if path is None:
        return BUNDLED
    parts = Path(os.path.abspath(path)).parts[1:]
    return "/".join(parts[-_telling(parts) :])


def _telling(parts: Sequence[str]) -> int:
    """How many parts of a path, from its end, name a model: every run has a best."""
    return 2 if re.fullmatch("best|model|step-.*", "".join(parts[-1:])) else 1


def _box(text: str) -> reports.Box:
    """ "120,80,64,48" (left, top, width, height) as four whole numbers."""
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not left,top,width,height in pixels, such as 120,80,64,48"
        ) from None
    return x, y, w, h


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """The options that say how sets are measured: --scale, --protocol and --limit."""
    parser.add_argument(
        "--scale",
        nargs="+",
        type=float,
        default=list(SCALES),
        metavar="S",
        help="any scales from 1 (default: 2 3 4)",
    )
    parser.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        default="benchmark",
        help="benchmark: luma, shave s (default); div2k: RGB, shave s + 6",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures of a set")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measure models, next to bicubic, on folders of pictures. Under torchrun the "
        "pictures are divided among its processes.",
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="PATH",
        help="model folder or published .pth, or the word bundled (default: the bundled model); "
        "several are measured side by side",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="HR pictures, or HR/ with LR_bicubic/X2/NAMEx2.png",
    )
    add_protocol(parser)
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="measure every model also as the mean over 8 flips and transposes, as NAME+",
    )
    parser.add_argument(
        "--perceptual",
        nargs="+",
        choices=list(PERCEPTUAL),
        default=[],
        metavar="METRIC",
        help="lpips, dists or both; needs the extra `perceptual` and its weights",
    )
    parser.add_argument(
        "--output",
        default="evaluation.json",
        metavar="FILE",
        help="report as JSON, replaced if there (default: evaluation.json in this folder)",
    )
    parser.add_argument("--csv", metavar="FILE", help="every picture's numbers as CSV")
    parser.add_argument(
        "--markdown", metavar="FILE", help="tables with what papers state for the same set"
    )
    parser.add_argument(
        "--figure", metavar="FILE", help="crops of one picture side by side, as .png"
    )
    parser.add_argument(
        "--picture",
        metavar="NAME",
        help="picture of the figure, NAME or SET/NAME (default: where PSNR differs most)",
    )
    parser.add_argument(
        "--box",
        type=_box,
        metavar="X,Y,W,H",
        help="crop of the figure in HR pixels (default: where the methods differ most)",
    )
    parser.add_argument(
        "--figure-scale",
        type=float,
        metavar="S",
        help="scale of the figure (default: the largest measured)",
    )
    parser.add_argument(
        "--save",
        metavar="FOLDER",
        help="what the model makes, as FOLDER/SET/xS/NAME.png (of several: FOLDER/MODEL/SET/...)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    return parser
