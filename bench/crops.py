"""Draw what several methods make of one crop of an image, side by side:

    python -m bench.crops photo.png --scale 4 --checkpoint comparison/*-seed0/model -o crops.png

Without --crop it is where the methods differ most, which shows the extreme case, not the usual one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.plot import pyplot
from gsr.cli import guard
from gsr.data.benchmarks import ImageFiles, check_scales, read_pair
from gsr.evaluation import check_finite, label_checkpoints, make_methods, method_labels
from gsr.io.image import to_tensor, to_uint8
from gsr.metrics import psnr_y
from gsr.models.checkpoint import load
from gsr.viz import Crop, check_crop, parse_crop

COLOUR = "#e41a1c"


def differing_crop(images: Sequence[np.ndarray], shave: int) -> Crop:
    """Find the square in which images differ most, about a sixth of their smaller side.

    Differ: largest minus smallest value of a channel, squared, summed over channels and pixels.

    Args:
        images: uint8 [H, W, 3] each, two or more.
        shave: pixels at the edges to keep away from, if the image is large enough.
    """
    stack = np.stack(images).astype(np.int64)  # sums of whole numbers: the same on every machine
    least = min(stack.shape[1:3])
    side = min(least, 128, max(16, least // 6))
    shave = shave if least >= side + 2 * shave else 0
    spread = np.square(stack.max(0) - stack.min(0)).sum(-1)
    spread = spread[shave : spread.shape[0] - shave, shave : spread.shape[1] - shave]
    total = np.pad(spread.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    y, x = (int(n) + shave for n in np.unravel_index(sums.argmax(), sums.shape))
    return Crop(slice(y, y + side), slice(x, x + side))


def draw(hr: np.ndarray, results: Mapping[str, np.ndarray], crop: Crop, *, title: str):
    """Draw HR with the crop marked, then the crop of HR and of every result, by label.

    Args:
        hr: uint8 [H, W, 3], as each of `results`.
    """
    plt = pyplot()
    from matplotlib.patches import Rectangle

    panels = {"HR": hr, **results}
    rows = 1 if len(panels) <= 3 else 2
    columns = math.ceil(len(panels) / rows)
    figure = plt.figure(figsize=(2.4 * (columns + rows), 2.6 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[rows, *[1] * columns])
    whole = figure.add_subplot(grid[:, 0])
    whole.imshow(hr)
    (y, x), (h, w) = crop.start, crop.size
    whole.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, color=COLOUR, lw=2))
    whole.set_title(title, fontsize=9)
    for i, (label, image) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[i // columns, 1 + i % columns])
        axes.imshow(image[crop.rows, crop.columns], interpolation="nearest")
        axes.set_title(label, fontsize=9)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crops", description=__doc__)
    parser.add_argument("image", type=Path, help="HR image; LR is made from it by imresize")
    parser.add_argument("--checkpoint", nargs="+", default=["lite"], metavar="lite|photo|PATH")
    parser.add_argument("--scale", type=float, default=4.0, metavar="S")
    parser.add_argument("--crop", type=parse_crop, metavar="X,Y,W,H", help="in HR pixels")
    parser.add_argument("-o", "--output", type=Path, required=True, help="image file to write")
    args = parser.parse_args(argv)
    (scale,) = check_scales([args.scale])
    checkpoints = label_checkpoints(args.checkpoint)
    method_labels(checkpoints)
    lr, hr = map(to_tensor, read_pair(ImageFiles(args.image.stem, args.image, {}), scale))
    size = (hr.shape[-2], hr.shape[-1])
    if args.crop is not None:
        check_crop(args.crop, size)
    models = {label: load(path) for label, path in checkpoints.items()}
    results = {}
    for label, method in make_methods(models).items():
        results[label] = method(lr, size, scale=scale).clamp(0, 1)
        check_finite(results[label], f"{args.image} at x{scale}")
    levels = {label: to_uint8(sr) for label, sr in results.items()}
    crop = args.crop or differing_crop([*levels.values()], math.ceil(scale))
    inside = (..., crop.rows, crop.columns)
    named = {
        f"{label} {psnr_y(sr[inside], hr[inside]):.2f} dB": levels[label]
        for label, sr in results.items()
    }
    title = f"{args.image.stem}, x{scale:g}; PSNR Y of the crop"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(to_uint8(hr), named, crop, title=title).savefig(args.output, dpi=120)


if __name__ == "__main__":
    guard(main)
