"""Measure models on data folders (`gsr.data.benchmarks`) by the published protocols.

Every report is one JSON file that says how the numbers came about; bicubic is measured in the same
run, so that a mistake in the data or in the protocol shows there. `gsr.report` makes tables and a
figure of it.

Under `torchrun --nproc-per-node N evaluate.py ...` the pictures are divided among the processes,
and the report is that of one process in every digit but for the seconds, if each of them has as
many threads (torchrun gives them one each, unless OMP_NUM_THREADS says otherwise).
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from gsr import distributed
from gsr import report as reports
from gsr.data.benchmarks import (
    DataSet,
    Picture,
    check_scales,
    check_sizes,
    check_spared,
    named_picture,
    open_set,
    open_sets,
    read_pair,
)
from gsr.describe import BUNDLED, called_after, describe_model, describe_run, telling
from gsr.device import set_threads
from gsr.errors import InputError
from gsr.inference.strips import run
from gsr.io.image import (
    check_format,
    save_image,
    to_tensor,
    to_uint8,
    write_atomic,
    write_image,
)
from gsr.io.paths import as_json, as_text, make_folder, usable
from gsr.metrics import (
    PERCEPTUAL,
    PROTOCOLS,
    SSIM_WINDOW,
    VGG16_LEAST,
    Protocol,
    as_protocol,
    perceptual,
    psnr,
    psnr_y,
    ssim,
)
from gsr.ops.resize import imresize

if TYPE_CHECKING:
    from gsr.models import GaussianSR

SCALES = (2, 3, 4)


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
) -> dict[str, Any]:
    """Mean PSNR and SSIM of bicubic and of models over a data folder, at every scale.

    Args:
        model: works on its own device; several by label; None measures bicubic only.
        folder: a data folder, see `gsr.data.benchmarks`.
        scales: each from 1 to 1000.
        protocol: "benchmark" (luma PSNR) or "div2k" (RGB PSNR), see `gsr.metrics`.
        limit: only the first so many pictures, by name.
        save: folder for what the model makes, as save/SET/x2/NAME.png; what several make, or one
            and its ensemble, as save/LABEL/SET/x2/NAME.png.
        progress: a bar on stderr.
        ensemble: measure every model once more as "LABEL+", by `self_ensemble`.
        extra: more metrics by name, such as `gsr.metrics.perceptual` makes.

    Processes that are together (`gsr.distributed`) share the pictures: each calls this, and gets
    the whole report.

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
    protocol, scales = as_protocol(protocol), check_scales(scales)
    models = _by_label(model)
    data = open_set(folder, scales, limit)
    check_sizes(data, scales, protocol)
    own = distributed.share(data.pictures)
    folders = _save_folders(save, methods_at(1, models, ensemble), data, [data])
    shown = progress and distributed.rank() == 0
    measured = {}
    try:
        with _bar(len(own) * len(scales), data.name, shown) as bar:
            for scale in scales:
                methods = methods_at(scale, models, ensemble)
                found = _measure_all(own, scale, methods, protocol, folders, extra or {}, bar)
                measured |= {(scale, method): found[method] for method in methods}
    except InputError as error:
        distributed.agree(error)  # the other processes wait to hear of it
        raise
    distributed.agree()
    everywhere = distributed.gather(measured)

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
    with named_picture(picture, scale):
        return {
            "psnr": protocol(sr, hr, scale),
            "ssim": ssim(sr, hr, shave),
            "psnr_rgb": psnr(sr, hr, shave),
            "psnr_y": psnr_y(sr, hr, shave),
            **{name: metric(sr, hr, shave) for name, metric in extra.items()},
        }


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


# ---- reports ------------------------------------------------------------------------------------


def describe_protocol(
    protocol: str | Protocol, ensemble: bool = False, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """What the numbers of a protocol mean, for a report; `extra`: names of perceptual metrics."""
    protocol = as_protocol(protocol)
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
    protocol = as_protocol(protocol)
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
    with distributed.together():
        _main(args)


def _main(args: argparse.Namespace) -> None:
    from gsr.models.checkpoint import load

    start = time.perf_counter()
    set_threads(args.threads)
    # All that can be wrong with paths and sizes is found before anything slow begins.
    scales = check_scales(args.scale)
    sets = open_sets("data", args.data, scales, args.limit)
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
    device = distributed.pick(args.device, "--device")
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
                args.ensemble, extra,
            )
            for folder in args.data
        ],
    }  # fmt: skip
    if distributed.rank() > 0:
        return
    report["seconds"] = time.perf_counter() - start
    try:  # whatever becomes of the one, there is the other
        write_atomic(files["output"], as_json(report))
    finally:
        print(f"{table(report)}\n", flush=True)
    if "csv" in files:
        write_atomic(files["csv"], as_text(reports.csv_text(report)))
    if "markdown" in files:
        write_atomic(files["markdown"], as_text(reports.markdown(report)))
    if shown is not None:
        scale, name = shown
        where, picture = _find(sets, name or "/".join(reports.telling_picture(report, scale)))
        title = f"{where}/{picture.name}"
        named = {called[label]: model for label, model in models.items()}
        drawn = crops(named, picture, scale, args.protocol, args.box, args.ensemble, title)
        save_image(files["figure"], drawn)
    print(f"report: {files.pop('output')}")
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
        (scale,) = check_scales([args.figure_scale])
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
        labels = ["/".join(part[-max(count, telling(part)) :]) for part in parts]
        if len(set(labels)) == len(labels):
            return dict(zip(labels, named, strict=True))
    twice = next(path for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1)
    raise InputError(f"--checkpoint names {twice} twice; name each model once")


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
        type=reports.parse_box,
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
