"""The command `gsr`: `upscale`, `data` and `inspect`.

Wrong input prints one sentence on stderr and exits with 2, an interruption exits with 130. Training
and measuring are scripts of the checkout: train.py, evaluate.py and `python -m bench.compare`.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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
"""


def guard(main: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Run `main(argv)` as a command: call it, and leave the process by the right exit code if it
    raises. InputError prints its sentence and exits with 2, Ctrl-C with 130; any other exception
    is a bug and keeps its traceback. Returns if main returns.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # names of files may hold what the terminal has not
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
    except InputError as error:
        print(f"gsr: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gsr: interrupted", file=sys.stderr)
        sys.exit(130)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script `gsr`."""
    guard(dispatch, argv)


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
    up.add_argument("image", nargs="+", metavar="IMAGE", help="file to upscale")
    up.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="file to write (.png, .jpg, .webp, .tiff or .bmp), or a folder: an existing one, or "
        "with a / at its end",
    )
    how = up.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--scale",
        type=_scale,
        metavar="S",
        help="factor, at least 1, or two as WIDTHxHEIGHT: 2x3.5 is 2 times as wide and 3.5 times "
        "as high",
    )
    how.add_argument("--size", type=_size, metavar="WIDTHxHEIGHT", help="size in pixels: 1920x1080")
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
        help="auto (default) takes bf16 for large images if the processor has it and the image "
        "loses nothing that can be seen by it (0.01 dB)",
    )
    up.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    up.set_defaults(run=_upscale)
    add_data_parser(commands)
    if inspect:  # imports torch
        from gsr.viz import add_parser

        add_parser(commands)
    else:
        commands.add_parser("inspect", help="draw a model's Gaussians (gsr inspect --help)")
    return parser


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


def _size(text: str) -> tuple[int, int]:
    """Parse "1920x1080" (width x height) to (H, W)."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size such as 1920x1080 (width x height)"
        ) from None
    return height, width


def _bytes(text: str) -> int:
    """Parse "2GB", "1.5 GiB", "800MB" or a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory such as 2GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def _upscale(args: argparse.Namespace) -> None:
    sources = [Path(source) for source in args.image]
    if args.compare and len(sources) > 1:
        raise InputError("--compare takes one IMAGE; upscale them one by one")
    if args.max_pixels is not None and args.max_pixels < 1:
        raise InputError(f"--max-pixels must be at least 1, not {args.max_pixels}")

    from gsr.device import select_device, set_threads
    from gsr.inference.upscale import MAX_PIXELS, target_size, upscale, upscale_to_file
    from gsr.io.image import (
        check_format,
        check_writable,
        lossy_compression,
        open_image,
        save_image,
    )
    from gsr.io.paths import check_path, make_folder

    # Everything that can be refused is refused before the model is loaded or a pixel computed, and
    # before anything is written, be it a folder.
    set_threads(args.threads)
    limit = MAX_PIXELS if args.max_pixels is None else args.max_pixels
    sizes = []
    for source in sources:
        image = open_image(source)
        try:
            (height, width), _ = target_size(
                (image.height, image.width), args.scale, args.size, limit
            )
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        sizes.append((width, height))
    outputs = _outputs(sources, args.output)
    comparison = check_path(args.compare) if args.compare else None
    if comparison is not None and comparison.resolve() == outputs[0].resolve():
        raise InputError(f"--compare and --output both name {comparison}; choose two names")
    files = list(zip(outputs, sizes, strict=True))
    if comparison is not None:
        files.append((comparison, _sheet(*sizes[0])[0]))
    for path, size in files:
        check_format(path, size)
        for source in sources:
            if path.exists() and os.path.samefile(source, path):
                raise InputError(f"{path} would overwrite the input {source}; choose another name")
    if _is_folder(sources, args.output):
        make_folder(args.output)
    for path, _ in files:
        check_writable(path)

    from gsr.models.checkpoint import load

    device = select_device(args.device)
    choices = [_choose(args.model, lossy_compression(source)) for source in sources]
    # All of them at once: a model that is missing is found before the first image is computed.
    models = {name: load(name).to(device) for name in dict.fromkeys(c[0] for c in choices)}
    progress = not args.quiet and sys.stderr.isatty()
    for source, output, (width, height), (name, why) in zip(
        sources, outputs, sizes, choices, strict=True
    ):
        model = models[name]
        if len(sources) > 1:  # otherwise it is still there from the checks
            image = open_image(source)
        options = (
            args.scale, args.size, model, progress, limit, args.max_memory, args.precision
        )  # fmt: skip
        start = time.perf_counter()
        streamed = output.suffix.lower() == ".png" and comparison is None
        try:
            if streamed:
                upscale_to_file(output, image, *options)
            else:
                large = upscale(image, *options)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        if not streamed:
            save_image(output, large)
        if not args.quiet:
            seconds = time.perf_counter() - start
            print(f"{output}: {width} x {height} in {seconds:.1f} s{why}", flush=True)
    if comparison is not None:
        save_image(comparison, _side_by_side(image, large))
        if not args.quiet:
            print(f"{comparison}: bicubic left, gsr right")


def _choose(model: str | None, lossy: str | None) -> tuple[str, str]:
    """Return the model for a file, by name or path, and why, for the line that is printed."""
    if model is not None:
        return model, ""
    if lossy:
        return "photo", f", by gsr-photo ({lossy})"
    return "lite", ", by gsr-lite (no lossy compression)"


def _outputs(sources: list[Path], output: str) -> list[Path]:
    """Return the file to write for each image."""
    from gsr.io.image import WRITE_FORMATS
    from gsr.io.paths import check_path

    if not _is_folder(sources, output):
        return [check_path(output)]
    names = [
        source.name if source.suffix.lower() in WRITE_FORMATS else f"{source.stem}.png"
        for source in sources
    ]
    paths = [check_path(Path(output, name)) for name in names]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"two images would be written to {path}; rename one of them")
    return paths


def _is_folder(sources: list[Path], output: str) -> bool:
    """Return whether --output means a folder, which may not be there yet."""
    return len(sources) > 1 or output.endswith(("/", os.sep)) or os.path.isdir(output)


def _sheet(width: int, height: int) -> tuple[tuple[int, int], int, int, int]:
    """Return the size of a sheet with two images, of its text, of the gap and the label band."""
    text = max(12, round(height / 28))
    gap, band = max(2, text // 3), math.ceil(1.6 * text)
    return (2 * width + gap, band + height), text, gap, band


def _side_by_side(image: Any, large: Any) -> Any:
    """Draw the small image, upsampled bicubically, beside the large one, under labels."""
    from PIL import Image, ImageDraw, ImageFont

    from gsr.io.image import on_white, to_rgb

    width, height = large.size
    size, text, gap, band = _sheet(width, height)
    bicubic = to_rgb(on_white(image)).resize(large.size, Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(bicubic, (0, band))
    sheet.paste(to_rgb(on_white(large)), (width + gap, band))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(text)
    for left, label in ((0, "bicubic"), (width + gap, "gsr")):
        draw.text((left + text // 2, band // 2), label, "black", font, anchor="lm")
    return sheet


if __name__ == "__main__":
    main()
