"""Measure models beside bicubic: `python evaluate.py --data Set5 Set14 --scale 2 3 4`.

This file is the whole measurement, to be read and changed. Its parts are in `gsr.evaluation`,
`gsr.data.benchmarks` and `gsr.metrics`; `python -m bench.tables evaluation.json` makes more tables.

On N processes: `torchrun --nproc-per-node N evaluate.py ...`. The images are divided among them;
the report is that of one process in every digit but the seconds, if each has as many threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from gsr import distributed
from gsr.cli import add_import, guard
from gsr.data.benchmarks import check_scales, check_sizes, named_image, open_sets, read_pair
from gsr.describe import describe_model, describe_run
from gsr.device import set_threads
from gsr.evaluation import (
    Degradation,
    add_protocol,
    check_finite,
    check_output,
    describe_protocol,
    label_checkpoints,
    make_methods,
    measure,
    method_labels,
    save_folders,
    summarize,
    table,
)
from gsr.io.image import to_tensor, to_uint8, write_atomic, write_image
from gsr.io.paths import as_json, make_folder
from gsr.metrics import PERCEPTUAL, PROTOCOLS, SSIM_WINDOW, VGG16_LEAST, perceptual
from gsr.models.checkpoint import load
from gsr.parts import import_own


def evaluate(args: argparse.Namespace) -> None:
    """Measure what the arguments name; print the table and write the files."""
    start = time.perf_counter()
    set_threads(args.threads)
    for module in args.modules:
        import_own(module, "--import")

    # All that can be wrong with arguments, paths and sizes raises here, before the slow part.
    scales, protocol = check_scales(args.scale), PROTOCOLS[args.protocol]
    degradation = Degradation(args.noise, args.jpeg)
    sets = open_sets(args.data, scales, args.limit)
    for data in sets:
        least = VGG16_LEAST if args.perceptual else SSIM_WINDOW
        check_sizes(data, scales, protocol, least=least)
    checkpoints = label_checkpoints(args.checkpoint)
    labels = method_labels(checkpoints, args.ensemble)
    output = check_output(args.output, sets)
    folders = save_folders(args.save, labels, sets)

    device = distributed.select_device(args.device, "--device")
    extra = {name: perceptual(name, device) for name in args.perceptual}
    models = {label: load(path).to(device) for label, path in checkpoints.items()}
    methods = make_methods(models, args.ensemble)
    for label in models:  # what is compiled or allocated at first counts for no image
        methods[label](torch.zeros(1, 3, 16, 16), (32, 32), scale=2)

    report = {
        "protocol": describe_protocol(protocol, degradation, ensemble=args.ensemble, extra=extra),
        "models": {label: describe_model(model, label) for label, model in models.items()},
        **describe_run(device),
        "sets": [],
    }
    for data in sets:
        own, measured = distributed.shard(data.images), {}
        quiet, total = distributed.rank() > 0, len(own) * len(scales)
        with tqdm(total=total, desc=data.name, unit="image", disable=quiet) as bar:
            for scale in scales:
                for image in own:
                    lr, hr = read_pair(image, scale)
                    lr, hr = to_tensor(degradation(lr, image.name, scale)), to_tensor(hr)
                    for name, method in methods.items():
                        before = time.perf_counter()
                        sr = method(lr, tuple(hr.shape[-2:]), scale=scale)
                        seconds = time.perf_counter() - before
                        check_finite(sr, f"{image.hr} at x{scale}")
                        sr = sr.clamp(0, 1)
                        with named_image(image, scale):
                            metrics = measure(sr, hr, protocol, scale=scale, extra=extra)
                        measured[scale, name, image.name] = metrics, seconds
                        if (name, data.name) in folders:
                            path = folders[name, data.name] / f"x{scale}" / f"{image.name}.png"
                            make_folder(path.parent)
                            write_image(path, to_uint8(sr))
                    bar.update()
        distributed.agree()  # a rank that failed ends all of them
        measured = {k: v for part in distributed.gather(measured) for k, v in part.items()}
        report["sets"].append(summarize(data, scales, protocol, measured=measured))

    if distributed.rank() > 0:
        return
    report["seconds"] = time.perf_counter() - start
    try:  # whatever becomes of the report, there is the table, and the other way round
        write_atomic(output, as_json(report))
    finally:
        print(f"{table(report)}\n", flush=True)
    print(f"report: {output}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and measure, in the process group that torchrun started, if any."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Measure models beside bicubic on folders of images."
    )
    add = parser.add_argument
    # fmt: off
    add("--data", nargs="+", required=True, metavar="FOLDER",
        help="HR images, or HR/ with LR_bicubic/X2/NAMEx2.png")
    add("--checkpoint", nargs="+", default=["lite"], metavar="lite|photo|PATH",
        help="model folders or published .pth files, measured side by side (default: lite)")
    add_protocol(parser)
    add("--ensemble", action="store_true",
        help="measure every model also as the mean over 8 flips and transposes, as NAME+")
    add("--perceptual", nargs="+", choices=list(PERCEPTUAL), default=[], metavar="METRIC",
        help="lpips, dists or both; needs the extra `perceptual` and its weights")
    add("--output", default="evaluation.json", metavar="FILE",
        help="report as JSON, replaced if there (default: evaluation.json in this folder)")
    add("--save", metavar="FOLDER",
        help="results as FOLDER/SET/xS/NAME.png (of several models: FOLDER/MODEL/SET/...)")
    add_import(parser)
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    # fmt: on
    args = parser.parse_args(argv)
    with distributed.process_group():
        evaluate(args)


if __name__ == "__main__":
    guard(main)
