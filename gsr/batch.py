"""The command `gsr upscale`: any number of files and folders, one after another.

What is wrong with the command is refused before anything is computed or written. A file that
cannot be upscaled stops no other one: it is named at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gsr.errors import InputError

PIPE = "-"  # standard input or output


@dataclass
class Job:
    """One file to upscale."""

    source: str
    output: Path


@dataclass
class Plan:
    """What a file's header says: size (H, W) of the result, what it is cropped to, the model."""

    size: tuple[int, int]
    crop: tuple[int, int] | None
    model: str
    why: str  # for the line that is printed


def run(args: argparse.Namespace) -> None:
    """Upscale what the arguments of `gsr upscale` name. Exits with 1 if some files failed."""
    from gsr.device import select_device, set_threads

    set_threads(args.threads)
    jobs = find_jobs(args)
    several = len(jobs) > 1
    todo = [job for job in jobs if not (args.skip_existing and job.output.exists())]
    _check_outputs(args, todo)
    device = select_device(args.device)
    models: dict[str, Any] = {}
    if several and args.model is not None and not args.dry_run:
        _load(args.model, models, device)  # for all of them: not the fault of any file
    failures: list[str] = []
    for number, job in enumerate(todo, 1):
        try:
            _one(job, args, models, device, f"{number} of {len(todo)}" if several else "gsr")
        except InputError as error:
            if not several:
                raise
            failures.append(str(error))
            print(f"gsr: error: {error}", file=sys.stderr, flush=True)
    if several and not args.quiet:
        there = f", {len(jobs) - len(todo)} there already" if len(jobs) > len(todo) else ""
        done = "would be upscaled" if args.dry_run else "upscaled"
        print(f"{len(todo) - len(failures)} of {len(todo)} images {done}{there}", flush=True)
    if failures:
        print(f"gsr: {len(failures)} of {len(todo)} images failed:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
        sys.exit(1)


def _one(job: Job, args: argparse.Namespace, models: dict, device: Any, name: str) -> None:
    """Upscale one file; `name` stands at the progress bar."""
    from gsr.io.image import decoding, open_file
    from gsr.io.source import read_source

    source = "standard input" if job.source == PIPE else job.source
    with open_file(job.source) as file:
        with decoding(source, _limit(args)), silent():
            planned = plan(file, args)
        _check_sizes(args, job, planned)
        height, width = planned.crop or planned.size
        if args.dry_run:
            if not args.quiet:
                print(f"{source} -> {job.output}: {width} x {height}{planned.why}")
            return
        model = _load(planned.model, models, device)
        start = time.perf_counter()
        with decoding(source, _limit(args)), silent():
            image = read_source(file)
    with _destination(job.output, args) as path:
        _write(path, source, image, planned, model, args, name)
    seconds = time.perf_counter() - start
    if not args.quiet and str(job.output) != PIPE:
        print(f"{job.output}: {width} x {height} in {seconds:.1f} s{planned.why}", flush=True)
    if args.compare:
        from gsr.io.image import open_image, save_image

        save_image(args.compare, _side_by_side(open_image(job.source), open_image(job.output)))
        if not args.quiet:
            print(f"{args.compare}: bicubic left, gsr right")


def _load(name: str, models: dict[str, Any], device: Any) -> Any:
    from gsr.models.checkpoint import load

    if name not in models:
        models[name] = load(name).to(device)
    return models[name]


# ---- which files ---------------------------------------------------------------------------------


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """Return the files to upscale, those in folders too, and where each result goes.

    Below a folder all images are taken, their subfolders kept. Raises InputError for a path that is
    not there, an output that cannot be, and for two results of one name.
    """
    from gsr.io.image import READ_SUFFIXES, list_images
    from gsr.io.paths import check_path

    output = args.output
    found: list[tuple[str, Path]] = []  # the file, and its path below the output folder
    for source in args.image:
        path = check_path(source)
        if source == PIPE:
            found.append((source, Path("stdin.png")))
        elif path.is_dir():
            inside = check_path(output).resolve()
            found += [
                (str(image), image.relative_to(path))
                for image in list_images(path, (*READ_SUFFIXES, ".avif", ".gif", ".heic", ".heif"))
                if inside not in image.resolve().parents
            ]
        elif not path.exists():
            raise InputError(f"{path}: there is no such file")
        else:
            found.append((source, Path(path.name)))
    if output == PIPE:
        if len(args.image) > 1 or os.path.isdir(args.image[0]):
            raise InputError("only one image can go to standard output; name a folder for several")
        return [Job(found[0][0], Path(PIPE))]
    if not _makes_folder(args):
        if args.format and Path(output).suffix.lower() not in _suffixes(args.format):
            raise InputError(f"--format {args.format} and the name {output} do not agree; drop one")
        return [Job(found[0][0], check_path(output))]
    jobs = [Job(source, check_path(Path(output, _named(name, args)))) for source, name in found]
    for path, times in Counter(job.output for job in jobs).items():
        if times > 1:
            raise InputError(f"two images would be written to {path}; rename one of them")
    return jobs


def _suffixes(kind: str) -> tuple[str, ...]:
    return {"jpg": (".jpg", ".jpeg"), "tiff": (".tif", ".tiff")}.get(kind, (f".{kind}",))


def _named(name: Path, args: argparse.Namespace) -> Path:
    """Give a result its suffix: that of --format, its own, or .png."""
    from gsr.io.image import WRITE_FORMATS

    if args.format:
        return name.with_suffix(f".{args.format}")
    return name if name.suffix.lower() in WRITE_FORMATS else name.with_suffix(".png")


def _check_outputs(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Raise InputError if a result would replace an input or, unasked, another file."""
    from gsr.io.image import file_format
    from gsr.io.paths import check_path

    outputs = [job.output for job in jobs if str(job.output) != PIPE]
    if args.compare:
        if len(jobs) > 1 or len(args.image) > 1:
            raise InputError("--compare takes one IMAGE; upscale them one by one")
        if PIPE in (args.image[0], args.output):
            raise InputError("--compare takes files, no pipes; name them")
        comparison = check_path(args.compare)
        if any(comparison.resolve() == path.resolve() for path in outputs):
            raise InputError(f"--compare and --output both name {comparison}; choose two names")
        outputs.append(comparison)
    sources = {_identity(job.source): job.source for job in jobs if job.source != PIPE}
    for path in outputs:
        file_format(path)  # raises for a suffix that stands for none
        if path.exists() and (source := sources.get(_identity(path))):
            raise InputError(f"{path} would overwrite the input {source}; choose another name")
    there = [path for path in outputs if path.is_file()]
    if there and not args.overwrite:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise InputError(
            f"{there[0]} exists{more}; give --overwrite to replace it, --skip-existing to leave it"
        )


def _identity(path: str | Path) -> tuple[int, int]:
    """Return what two names of one file have in common."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _check_sizes(args: argparse.Namespace, job: Job, planned: Plan) -> None:
    """Raise InputError if a result's format cannot hold it, or its folder takes no files."""
    from gsr.io.image import check_format, check_writable

    height, width = planned.crop or planned.size
    if args.compare:
        check_format(args.compare, _sheet(width, height)[0])
        check_writable(args.compare)
    if str(job.output) != PIPE:
        check_format(job.output, (width, height))
        if not _makes_folder(args):
            check_writable(job.output)


def _makes_folder(args: argparse.Namespace) -> bool:
    """Return whether --output is a folder, which is made if it is not there."""
    folders = len(args.image) > 1 or any(os.path.isdir(source) for source in args.image)
    return folders or args.output.endswith(("/", os.sep)) or os.path.isdir(args.output)


@contextmanager
def silent() -> Generator[None]:
    """Drop what C libraries print: libtiff has lines of its own on stderr for damaged files."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _destination(output: Path, args: argparse.Namespace) -> Generator[Path]:
    """Yield the file to write; for standard output one that is copied there at the end."""
    from gsr.io.image import remove_left_over
    from gsr.io.paths import make_folder

    if str(output) == PIPE:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"out.{args.format or 'png'}")
            yield path
            with open(path, "rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return
    if _makes_folder(args):
        make_folder(output.parent)
    remove_left_over(output.parent)
    yield output


# ---- one file ------------------------------------------------------------------------------------


def plan(file: BinaryIO, args: argparse.Namespace) -> Plan:
    """Read a file's header. Raises InputError if it cannot be upscaled as asked."""
    from PIL import Image

    from gsr.inference.upscale import target_size
    from gsr.io.image import lossy_compression
    from gsr.io.source import upright_size

    image = Image.open(file)
    shape = upright_size(image)
    size, crop = wanted(shape, args)
    size, _ = target_size(shape, args.scale, size, _limit(args))
    # Pillow takes four bytes a pixel for colours, and so do we for what we make of them.
    held = 8 * math.prod(shape)
    if args.max_memory is not None and held > args.max_memory:
        raise InputError(
            f"to decode this image takes about {held / 1e6:.0f} MB, more than --max-memory = "
            f"{args.max_memory / 1e6:.0f} MB; allow more"
        )
    # The further images of a phone's JPEG (MPO) are previews and depths, not frames.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    only = f", the first of {frames} frames" if frames > 1 else ""
    if args.model is not None:
        return Plan(size, crop, args.model, only)
    if lossy := lossy_compression(file):
        return Plan(size, crop, "photo", f", by gsr-photo ({lossy}){only}")
    return Plan(size, crop, "lite", f", by gsr-lite (no lossy compression){only}")


def wanted(
    shape: tuple[int, int], args: argparse.Namespace
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Return the size (H, W) that an image of shape (h, w) gets, and that it is cropped to.

    Both are None where --scale says it all. --fit decides about an image of other proportions than
    --size: it fits into that size, covers it and is cropped, or is stretched.
    """
    h, w = shape
    if args.long_edge is not None:
        factor = args.long_edge / max(h, w)
    elif args.megapixels is not None:
        factor = math.sqrt(args.megapixels * 1e6 / (h * w))
    elif args.size is not None:
        height, width = args.size
        if height is None:
            factor = width / w
        elif width is None:
            factor = height / h
        elif args.fit == "stretch":
            return (height, width), None
        elif args.fit == "cover":
            factor = max(height / h, width / w)
            # At least what is asked for, whatever rounding does.
            return (max(height, round(h * factor)), max(width, round(w * factor))), (height, width)
        else:
            factor = min(height / h, width / w)
    else:
        return None, None
    return (max(1, round(h * factor)), max(1, round(w * factor))), None


def _limit(args: argparse.Namespace) -> int:
    from gsr.inference.upscale import MAX_PIXELS

    return MAX_PIXELS if args.max_pixels is None else args.max_pixels


def _write(
    path: Path, name: str, image: Any, planned: Plan, model: Any, args: Any, progress: str
) -> None:
    """Upscale a `gsr.io.source.Source` into a file."""
    from gsr.inference.upscale import upscale_to_file
    from gsr.io.source import Metadata

    if args.strip_metadata:
        image.meta = Metadata(image.meta.icc)  # without its profile it has other colours
    try:
        upscale_to_file(
            path,
            image,
            args.scale,
            None if args.scale else planned.size,
            model,
            progress if not args.quiet and sys.stderr.isatty() else False,
            _limit(args),
            args.max_memory,
            args.precision,
            crop=planned.crop,
            bits=args.bits,
            options={"quality": args.quality, "subsampling": args.chroma},
        )
    except InputError as error:
        if name in str(error) or str(path) in str(error):
            raise
        raise InputError(f"{name}: {error}") from None


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
