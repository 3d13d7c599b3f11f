"""The command `gsr`: `upscale`, `data` and `inspect`.

Wrong input prints one sentence on stderr and exits with 2, an interruption exits with 130. Training
and measuring are scripts of the checkout: train.py, evaluate.py and `python -m bench.compare`.
"""

from __future__ import annotations

import argparse
import gc
import io
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from gsr import __version__
from gsr.errors import InputError
from gsr.parts import import_own

EPILOG = """\
examples:
  gsr upscale photo.jpg -o large.png --scale 3.7
  gsr upscale photo.jpg -o wide.png --scale 2x3.5        (2 times as wide, 3.5 times as high)
  gsr upscale photo.jpg -o hd.png --size 1920x1080       (width x height)
  gsr upscale *.jpg -o folder/ --scale 4
  gsr upscale holiday/ -o large/ --long-edge 4096 --skip-existing
  gsr upscale - -o - --scale 2 < small.png > large.png
"""


def guard(main: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Run `main(argv)` as a command: call it, and leave the process by the right exit code if it
    raises. InputError prints its sentence and exits with 2, Ctrl-C with 130; any other exception
    is a bug and keeps its traceback. Returns if main returns.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files may hold what the terminal has not.
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
    except InputError as error:
        print(f"gsr: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BaseException as error:
        if not _interrupted(error):
            raise
        print("gsr: interrupted", file=sys.stderr)
        sys.exit(130)


def _interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C is behind an exception: numpy makes an ImportError of it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def command() -> None:
    """Run the console script `gsr`: `main` in a process of its own, which starts and ends quickly.

    Python would look for garbage dozens of times while PyTorch is imported, and at the end take
    PyTorch apart piece by piece.
    """
    gc.set_threshold(50_000)
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, or a pipe that nobody reads any more
            code = code or 1
    os._exit(code or 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `gsr` with these arguments, or those of the process."""
    # The default of these ends the process at once, and leaves half a file under a hidden name.
    main_thread = threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGHUP") if main_thread else ()  # Windows has the first alone
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = [signal.signal(number, _terminate) for number in numbers]
    try:
        guard(dispatch, argv)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _terminate(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def dispatch(argv: Sequence[str] | None = None) -> None:
    """Run `main` without the guard: raises InputError on wrong input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser("inspect" in argv).parse_args(argv)
    for module in args.modules:
        import_own(module, "--import")
    args.run(args)


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add the option --import, a list of names of modules in `modules`."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import your module first: a model may be made with an encoder or head from it",
    )


def _parser(inspect: bool) -> argparse.ArgumentParser:
    """Make the parser of all commands; `inspect` is in full only where it is the command."""
    from gsr.data.commands import add_data_parser

    parser = argparse.ArgumentParser(
        prog="gsr", description="Image super-resolution at any scale by 2D Gaussian splatting."
    )
    parser.add_argument("--version", action="version", version=f"gsr {__version__}")
    add_import(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser(
        "upscale",
        help="upscale images",
        description="Upscale images by any factor, or to any size.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    up.add_argument(
        "image",
        nargs="+",
        metavar="IMAGE",
        help="file to upscale, or a folder with all images in it and below; - is standard input",
    )
    up.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="file to write (.png, .jpg, .webp, .tiff, .avif, .gif or .bmp), or a folder: an "
        "existing one, or with a / at its end; - is standard output",
    )
    how = up.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--scale",
        type=_scale,
        metavar="S",
        help="factor, at least 1, or two as WIDTHxHEIGHT: 2x3.5 is 2 times as wide and 3.5 times "
        "as high",
    )
    how.add_argument(
        "--size",
        type=_size,
        metavar="WIDTHxHEIGHT",
        help="size in pixels: 1920x1080, 1920x or x1080",
    )
    how.add_argument("--long-edge", type=_positive, metavar="N", help="pixels of the longer side")
    how.add_argument("--megapixels", type=_positive, metavar="N", help="millions of pixels")
    up.add_argument(
        "--fit",
        choices=("contain", "cover", "stretch"),
        default="contain",
        help="an image of other proportions than --size fits into it (contain, the default), "
        "covers it and is cropped (cover), or is distorted (stretch)",
    )
    up.add_argument(
        "--wrap",
        action="store_true",
        help="the image is a texture that is laid in tiles: the result is one without seams, too",
    )
    up.add_argument(
        "--model",
        metavar="lite|photo|PATH",
        help="lite, for lossless images; photo, for JPEG, noise and blur; or a model folder or "
        "published .pth file (default: photo for files of lossy compression, lite for others)",
    )
    up.add_argument(
        "--compare",
        metavar="FILE",
        help="also write the bicubic upsampling and the result side by side",
    )
    up.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    up.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    up.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="refuse results with more pixels than this (default: 400 million)",
    )
    up.add_argument(
        "--max-memory",
        type=_bytes,
        metavar="SIZE",
        help="memory the process may take, such as 2GB or 800MB (default: what is quickest)",
    )
    up.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto (default) takes bf16 where the processor is fast in it and the model was "
        "measured to lose at most 0.01 dB by it; fp32 has all digits, on a GPU without TF32",
    )
    _add_output_options(up)
    up.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    up.set_defaults(run=_upscale)
    add_data_parser(commands)
    if inspect:  # imports torch
        from gsr.viz import add_parser

        add_parser(commands)
    else:
        commands.add_parser("inspect", help="draw a model's Gaussians (gsr inspect --help)")
    return parser


def _add_output_options(up: argparse.ArgumentParser) -> None:
    """Add what is about the files that are written."""
    there = up.add_mutually_exclusive_group()
    there.add_argument("--overwrite", action="store_true", help="replace files that are there")
    there.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave files that are there, and do the rest: after an interruption, for example",
    )
    there.add_argument(
        "--no-clobber", action="store_true", help="refuse to write where a file is (the default)"
    )
    up.add_argument(
        "--format",
        choices=("png", "jpg", "webp", "tiff", "avif", "gif", "bmp"),
        help="format of files in a folder and of standard output (default: that of the source)",
    )
    up.add_argument(
        "--quality", type=_quality, metavar="1-100", help="of JPEG, WebP and AVIF (default: 95)"
    )
    up.add_argument(
        "--chroma",
        choices=("4:4:4", "4:2:2", "4:2:0"),
        help="colour resolution of JPEG and AVIF (default: 4:4:4)",
    )
    up.add_argument(
        "--bits",
        choices=("8", "16", "same"),
        default="same",
        help="a channel; same (default) is what the source has, or the most that the format has",
    )
    up.add_argument(
        "--strip-metadata",
        action="store_true",
        help="leave out EXIF, XMP, resolution and texts; the colour profile stays",
    )
    up.add_argument(
        "--dry-run", action="store_true", help="only say what would be written, by which model"
    )


def _scale(text: str) -> tuple[float, float]:
    """Parse "3.7" or "2x3.5" (horizontal x vertical) to (s_y, s_x)."""
    try:
        factors = [float(part) for part in text.lower().split("x")]
        horizontal, vertical = factors if len(factors) == 2 else factors * 2
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a factor such as 3.7 nor two such as 2x3.5 (width x height)"
        ) from None
    return vertical, horizontal


def _size(text: str) -> tuple[int | None, int | None]:
    """Parse "1920x1080" (width x height), "1920x" or "x1080" to (H, W), None where left out."""
    match = re.fullmatch(r"(\d*)x(\d*)", text.strip().lower())
    if match is None or match.groups() == ("", ""):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size such as 1920x1080, 1920x or x1080 (width x height)"
        )
    width, height = (int(part) if part else None for part in match.groups())
    if 0 in (width, height):
        raise argparse.ArgumentTypeError(f"the size {text!r} has no pixels")
    return height, width


def _positive(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _quality(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100")
    return int(text)


def _bytes(text: str) -> int:
    """Parse "2GB", "1.5 GiB", "800MB" or a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory such as 2GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def _upscale(args: argparse.Namespace) -> None:
    if args.max_pixels is not None and args.max_pixels < 1:
        raise InputError(f"--max-pixels must be at least 1, not {args.max_pixels}")
    from gsr.batch import run

    run(args)


if __name__ == "__main__":
    command()
