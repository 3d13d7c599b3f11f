"""Measuring a model on folders of pictures, by the published protocols, next to bicubic.

A data folder is FOLDER/HR with FOLDER/LR_bicubic/X2/NAMEx2.png (likewise X3, ...), or plain HR
pictures, or NAME_HR with NAME_LR_bicubic beside it, as DIV2K is laid out. Where a set has no LR
pictures for a scale they are made from HR by `imresize`. Every report is one JSON file that says
how the numbers came about; bicubic is measured in the same run, so that a mistake in the data or
in the protocol shows there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gsr.device import pick_device, set_threads
from gsr.errors import InputError
from gsr.image import list_images, read_image, to_tensor, to_uint8, write_atomic, write_image
from gsr.infer import run
from gsr.metrics import PROTOCOLS, Protocol, ssim
from gsr.paths import make_folder, usable
from gsr.resize import imresize

if TYPE_CHECKING:
    from gsr.models import GaussianSR

SCALES = (2, 3, 4)
MAX_SCALE = 1000


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
            a folder of LR pictures that lacks one of them.
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
    return DataSet(name, pictures[:limit])


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
        # Reduced sizes are rounded down; the slack is for scales that binary cannot express.
        rest = [hr.shape[axis] - lr.shape[axis] * scale for axis in (0, 1)]
        if not all(-1e-6 < pixels < scale for pixels in rest):
            raise InputError(
                f"{picture.lr[scale]} has {lr.shape[1]} x {lr.shape[0]} pixels, which is not "
                f"{picture.hr} ({hr.shape[1]} x {hr.shape[0]}) reduced {scale} times, rounded "
                "down; replace one of them"
            )
        return lr, _crop(hr, lr.shape, scale)
    size = tuple(math.floor(n / scale + 1e-9) for n in hr.shape[:2])
    if 0 in size:
        raise InputError(
            f"{picture.hr} has {hr.shape[1]} x {hr.shape[0]} pixels, too few for scale {scale}; "
            "remove it"
        )
    hr = _crop(hr, size, scale)
    return imresize(hr, size=size), hr


def _crop(hr: np.ndarray, lr_shape: Sequence[int], scale: float) -> np.ndarray:
    return hr[: round(lr_shape[0] * scale), : round(lr_shape[1] * scale)]


# ---- measuring ----------------------------------------------------------------------------------


def enlarge_bicubic(lr: Tensor, size: tuple[int, int]) -> Tensor:
    """MATLAB's bicubic: float [1, 3, h, w] to [1, 3, H, W] of the same dtype, not clamped."""
    array = lr[0].permute(1, 2, 0).numpy()
    return torch.from_numpy(imresize(array, size=size)).permute(2, 0, 1)[None]


def evaluate(
    model: GaussianSR | None,
    folder: str | os.PathLike,
    scales: Sequence[float] = SCALES,
    protocol: str | Protocol = "benchmark",
    limit: int | None = None,
    save: str | os.PathLike | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Mean PSNR and SSIM of bicubic and of a model over a data folder, at every scale.

    Args:
        model: works on its own device; None measures bicubic only.
        folder: a data folder, see the module's text.
        scales: each from 1 to 1000.
        protocol: "benchmark" (luma PSNR) or "div2k" (RGB PSNR), see `gsr.metrics`.
        limit: only the first so many pictures, by name.
        save: folder for what the model makes, as save/SET/x2/NAME.png.
        progress: a bar on stderr.

    Returns:
        {"name", "pictures", "scales": [{"scale", "shave", "lr", "methods"}]}: "lr" is "paired" or
        "imresize"; "methods" has "bicubic" and "model", each with mean "psnr" (dB) and "ssim" and
        both for each of "images", and with the "seconds" that enlarging took. An infinite PSNR
        (equal pictures) is None.

    Raises:
        InputError: anything `open_set` and `read_pair` raise, an unknown protocol, a picture too
            small to measure, or a model that gives NaN or infinity.
    """
    protocol = _protocol(protocol)
    scales = _check_scales(scales)
    data = open_set(folder, scales, limit)
    methods = {"bicubic": enlarge_bicubic}
    rows = []
    with _bar(len(data.pictures) * len(scales), data.name, progress) as bar:
        for scale in scales:
            if model is not None:
                methods["model"] = lambda lr, size, scale=scale: run(model, lr, size, scale=scale)
            images = {method: {} for method in methods}
            seconds = dict.fromkeys(methods, 0.0)
            for picture in data.pictures:
                lr, hr = (to_tensor(array) for array in read_pair(picture, scale))
                for method, enlarge in methods.items():
                    start = time.perf_counter()
                    sr = enlarge(lr, tuple(hr.shape[-2:])).cpu()
                    seconds[method] += time.perf_counter() - start
                    _check_finite(sr, picture, scale)
                    sr = sr.clamp(0, 1)
                    images[method][picture.name] = _measure(sr, hr, scale, protocol, picture)
                    if method == "model" and save is not None:
                        path = Path(save, data.name, f"x{scale}", f"{picture.name}.png")
                        make_folder(path.parent)
                        write_image(path, to_uint8(sr))
                bar.update()
            rows.append(
                {
                    "scale": scale,
                    "shave": protocol.shave(scale),
                    "lr": "paired" if scale in data.pictures[0].lr else "imresize",
                    "methods": {
                        method: {**_mean(images[method]), "seconds": seconds[method]}
                        for method in methods
                    },
                }
            )
    return {"name": data.name, "pictures": len(data.pictures), "scales": rows}


def _protocol(protocol: str | Protocol) -> Protocol:
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def _check_finite(sr: Tensor, picture: Picture, scale: float) -> None:
    if not sr.isfinite().all():
        raise InputError(
            f"the model gives values that are not finite for {picture.hr} at x{scale}; its "
            "weights are damaged or its training diverged, choose another checkpoint"
        )


def _measure(
    sr: Tensor, hr: Tensor, scale: float, protocol: Protocol, picture: Picture
) -> dict[str, float]:
    try:
        return {
            "psnr": protocol(sr, hr, scale),
            "ssim": ssim(sr, hr, protocol.shave(scale)),
        }
    except InputError as error:
        raise InputError(f"{picture.hr} at x{scale}: {error}, or remove it") from None


def _mean(images: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The report of one method at one scale: means, then every picture."""
    means = {
        key: _json_number(math.fsum(image[key] for image in images.values()) / len(images))
        for key in ("psnr", "ssim")
    }
    each = {
        name: {key: _json_number(value) for key, value in image.items()}
        for name, image in images.items()
    }
    return {**means, "images": each}


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _bar(total: int, name: str, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit="picture", disable=not progress)


# ---- reports ------------------------------------------------------------------------------------


def describe_protocol(protocol: str | Protocol) -> dict[str, Any]:
    """What the numbers of a protocol mean, for a report."""
    protocol = _protocol(protocol)
    shave = "ceil(scale)" + (f" + {protocol.extra}" if protocol.extra else "")
    return {
        "name": protocol.name,
        "psnr": {
            "colour": protocol.colour,
            "unit": "dB",
            "mean": "of the PSNR of each picture; null stands for infinity",
        },
        "ssim": {"colour": "Y", "window": "Gaussian 11 x 11, sigma 1.5", "range": 255},
        "shave": shave,
        "quantised": False,  # predictions are clamped to [0, 1], not rounded to 8 bits
        "hr": "cropped to round(LR size * scale)",
        "lr": "paired: the data set's own files; imresize: made from HR, 8 bits",
        "bicubic": "MATLAB-compatible imresize, a = -0.5, of LR",
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
    colour = report["protocol"]["psnr"]["colour"]
    lines = []
    for data in report["sets"]:
        count = f"{data['pictures']} picture{'s' if data['pictures'] > 1 else ''}"
        head = f"{data['name']} ({count}), PSNR {colour} / SSIM"
        width = max(len(head), 8)
        cells = [[f"x{row['scale']:g}" for row in data["scales"]]]
        for method in data["scales"][0]["methods"]:
            cells.append([_cell(row["methods"][method]) for row in data["scales"]])
        for label, row in zip([head, *data["scales"][0]["methods"]], cells, strict=True):
            lines.append(f"{label:{width}}" + "".join(f"  {cell:>14}" for cell in row))
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(values: dict[str, Any]) -> str:
    psnr = "inf" if values["psnr"] is None else f"{values['psnr']:.2f}"
    return f"{psnr} / {values['ssim']:.4f}"


# ---- command line -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """`evaluate.py --data FOLDER ...`: print the table, write the report. Raises InputError."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measure a model, next to bicubic, on folders of pictures.",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="model folder or published .pth (default: the bundled model)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="HR pictures, or HR/ with LR_bicubic/X2/NAMEx2.png",
    )
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
    parser.add_argument(
        "--output",
        default="evaluation.json",
        metavar="FILE",
        help="report as JSON, replaced if there (default: evaluation.json in this folder)",
    )
    parser.add_argument(
        "--save", metavar="FOLDER", help="what the model makes, as FOLDER/SET/xS/NAME.png"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures of a set")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)

    from gsr.checkpoint import load

    start = time.perf_counter()
    set_threads(args.threads)
    # All that can be wrong with paths is found before anything slow begins.
    names = [open_set(folder, args.scale, args.limit).name for folder in args.data]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two data folders (--data) are called {name}; rename one of them")
    output = usable(args.output)
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; name the JSON file to write")
    make_folder(output.parent)
    if args.save is not None:
        make_folder(args.save)
    device = pick_device(args.device)
    model = load(args.checkpoint).to(device)

    report = {
        "protocol": describe_protocol(args.protocol),
        "model": describe_model(
            model, Path(args.checkpoint).name if args.checkpoint else "bundled"
        ),
        **describe_run(device),
        "sets": [
            evaluate(model, folder, args.scale, args.protocol, args.limit, args.save, progress=True)
            for folder in args.data
        ],
    }
    report["seconds"] = time.perf_counter() - start
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(output, text.encode())
    print(f"{table(report)}\n\nreport: {output}")
