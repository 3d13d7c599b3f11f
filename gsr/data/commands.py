"""`gsr data`: the arguments and the output of `download` and `prepare`.

`gsr data download` makes the folders that `train.py` and `evaluate.py` read:

    FOLDER/DIV2K/DIV2K_train_HR            FOLDER/Flickr2K/Flickr2K_HR
    FOLDER/DIV2K/DIV2K_valid_HR            FOLDER/benchmark/Set5/HR
    FOLDER/DIV2K/DIV2K_valid_LR_bicubic/X2 FOLDER/benchmark/Set5/LR_bicubic/X2
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from gsr.data.fetch import SETS, download
from gsr.data.tiles import FORMATS, Tiling, check, describe, prepare
from gsr.errors import InputError
from gsr.io.paths import as_json, check_path, make_folder

EPILOG = """\
examples:
  gsr data download benchmark                      Set5, Set14, B100 and Urban100 into data/
  python evaluate.py --data data/benchmark/Set5 data/benchmark/Set14 --scale 2 3 4

  gsr data download div2k                          into data/DIV2K
  gsr data prepare data/DIV2K/DIV2K_train_HR tiles
  python train.py --config configs/published.yaml data.train=tiles data.repeat=1 \\
      train.epochs=1000 train.step_epochs=100

32,000 tiles, each visited once, are 2,000 steps of 16: 1,000 such epochs have the 2 million steps
of the recipe, whose learning rate is halved every 200,000. With its own values for 800 images
(repeat 20, 2,000 epochs), tiles would be trained on for 40 times as long.
"""
DOWNLOAD_EPILOG = """\
Whatever ends a download, running the same command again resumes it; what is complete is skipped. An
archive that was brought into the folder by hand is verified and unpacked like one that was
downloaded, and stays.

Every archive must have the published checksum: DIV2K's SHA-256 are those of TensorFlow Datasets,
the MD5 of Flickr2K and benchmark those of torchSR. Any other archive can be unpacked by hand.

The images belong to their owners. DIV2K's page allows academic research only; Flickr2K comes
without terms.
"""
PREPARE_EPILOG = """\
Tiles are named NAME_s001.png, NAME_s002.png, ... row by row, below the image's own subfolder. The
last tile of a row or column ends at the border, and an image narrower than the crop is taken whole
in that direction. Running again resumes: tiles that are complete are skipped, damaged ones written
anew. OUTPUT/prepare.json is the report.

A training on tiles needs data.val, other images: tiles of one image overlap, and some of what is
validated would have been trained on. An epoch visits every tile data.repeat times, so lower
data.repeat by about the number of tiles that an image has; see gsr data --help.
"""


def add_data_parser(subparsers: Any) -> None:
    """Add `data` and its commands to argparse's subparsers; args.run(args) runs what was chosen."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "data",
        help="get images (gsr data --help)",
        description="Download the published image sets, and cut images into tiles to train on.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    down = commands.add_parser(
        "download",
        help="fetch DIV2K, Flickr2K or the benchmarks (gsr data download --help)",
        description="Download a published set and unpack it to where train.py and evaluate.py "
        "read it.",
        epilog=DOWNLOAD_EPILOG,
        formatter_class=raw,
    )
    down.set_defaults(run=_download)
    down.add_argument("set", choices=list(SETS), help="which set")
    down.add_argument("--output", default="data", metavar="FOLDER", help="where to (default: data)")
    down.add_argument(
        "--only", nargs="+", default=(), metavar="NAME",
        help="only some archives, such as DIV2K_valid_HR",
    )  # fmt: skip
    down.add_argument("--url", help="a mirror: the URL of the folder that holds the archives")
    down.add_argument("-q", "--quiet", action="store_true", help="print nothing")

    cut = commands.add_parser(
        "prepare",
        help="check images and cut them into tiles (gsr data prepare --help)",
        description="Check every image of a folder (decodable, large enough, no duplicate) and cut "
        "it\ninto tiles, written without loss.",
        epilog=PREPARE_EPILOG,
        formatter_class=raw,
    )
    default = Tiling()
    cut.set_defaults(run=_prepare)
    cut.add_argument("source", metavar="SOURCE", help="folder of images, with its subfolders")
    cut.add_argument("output", nargs="?", metavar="OUTPUT", help="folder for the tiles")
    cut.add_argument(
        "--check", action="store_true", help="only check and report; exit code 2 if any is refused"
    )
    for name, text in (
        ("crop", "side of a tile"),
        ("step", "from one tile to the next"),
        ("min-side", "refuse images with a shorter side"),
    ):
        value = getattr(default, name.replace("-", "_"))
        cut.add_argument(
            f"--{name}", type=int, default=value, metavar="N",
            help=f"{text}, pixels (default: {value})",
        )  # fmt: skip
    cut.add_argument("--format", choices=FORMATS, default=default.format, help="default: png")
    cut.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one for each core)"
    )
    cut.add_argument("--report", metavar="FILE", help="write the report there too, as JSON")
    cut.add_argument("-q", "--quiet", action="store_true", help="print nothing")


def _download(args: argparse.Namespace) -> None:
    say = (lambda text: None) if args.quiet else print
    download(args.set, args.output, url=args.url, only=args.only, progress=not args.quiet, say=say)


def _prepare(args: argparse.Namespace) -> None:
    from gsr.io.image import write_atomic

    if not (args.output or args.check):
        raise InputError("OUTPUT is missing: name a folder for the tiles, or only --check")
    if args.report is not None:  # refused before hours of work rather than after
        file = check_path(args.report)
        if file.is_dir() or file.suffix.lower() != ".json":
            raise InputError(f"--report {file} must be a .json file; name one, such as report.json")
        make_folder(file.parent)
    tiling = Tiling(args.crop, args.step, args.min_side, args.format)
    workers = _cores() if args.workers is None else args.workers
    if args.check:
        report = check(args.source, tiling, workers=workers, progress=not args.quiet)
    else:
        report = prepare(args.source, args.output, tiling, workers=workers, progress=not args.quiet)
    if args.report is not None:
        write_atomic(args.report, as_json(report))
    if not args.quiet:
        print(describe(report))
    if args.check and report["refused"]:
        raise InputError(
            f"{report['counts']['refused']} of the {report['counts']['found']} images in "
            f"{args.source} cannot be used: {report['refused'][0]['reason']}"
        )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
