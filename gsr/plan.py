"""What `gsr upscale` is asked to do, settled before anything is computed: files, sizes, models."""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gsr.errors import InputError

PIPE = "-"  # standard input or output


@dataclass
class Job:
    """One file to upscale."""

    source: str
    output: Path

    @property
    def name(self) -> str:
        """What messages call it."""
        return "standard input" if self.source == PIPE else self.source


class Page(NamedTuple):
    """A page or frame: its number, sizes (h, w) and (H, W), and what the result is cropped to."""

    number: int
    shape: tuple[int, int]
    size: tuple[int, int]
    crop: tuple[int, int] | None


@dataclass
class Plan:
    """What a file's header says."""

    pages: list[Page]
    animated: bool
    plays: int
    model: str
    why: str  # for the line that is printed

    @property
    def pixels(self) -> int:
        """Pixels of all results."""
        return sum(math.prod(page.size) for page in self.pages)


# ---- which files ---------------------------------------------------------------------------------


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """Return the files to upscale, those in folders too, and where each result goes.

    Below a folder all images are taken, their subfolders kept. Raises InputError for a path that is
    not there, an output that cannot be, and for two results of one name.
    """
    from gsr.io.image import READ_SUFFIXES, list_images
    from gsr.io.paths import check_path

    if args.wrap and args.fit == "cover" and args.size is not None:
        raise InputError("--wrap keeps all of an image and --fit cover cuts it; drop one")
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
    if not makes_folder(args):
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
    kept = name.suffix.lower() in WRITE_FORMATS and name.suffix.lower() != ".gif"  # of 256 colours
    return name if kept else name.with_suffix(".png")


def check_outputs(args: argparse.Namespace, jobs: list[Job]) -> None:
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


def check_sizes(args: argparse.Namespace, job: Job, planned: Plan) -> None:
    """Raise InputError if a result's format cannot hold it, or its folder takes no files."""
    from gsr.io.image import check_format, check_writable
    from gsr.sheet import layout

    sizes = [page.crop or page.size for page in planned.pages]
    if args.compare:
        height, width = sizes[0]
        check_format(args.compare, layout(width, height)[0])
        check_writable(args.compare)
    if str(job.output) != PIPE:
        for height, width in sizes:
            check_format(job.output, (width, height))
        if not makes_folder(args):
            check_writable(job.output)


def makes_folder(args: argparse.Namespace) -> bool:
    """Return whether --output is a folder, which is made if it is not there."""
    folders = len(args.image) > 1 or any(os.path.isdir(source) for source in args.image)
    return folders or args.output.endswith(("/", os.sep)) or os.path.isdir(args.output)


# ---- one file ------------------------------------------------------------------------------------


def plan(file: BinaryIO, job: Job, args: argparse.Namespace) -> Plan:
    """Read a file's header. Raises InputError if it cannot be upscaled as asked."""
    from PIL import Image

    from gsr.inference.upscale import target_size
    from gsr.io.image import file_format, lossy_compression
    from gsr.io.source import ANIMATED, find_frames, upright_size

    file.seek(0)
    image = Image.open(file)
    frames = find_frames(image)
    numbers, only = frames.numbers, ""
    kind = file_format(f"a.{args.format or 'png'}" if str(job.output) == PIPE else job.output)
    animated = frames.animated and len(numbers) > 1 and kind in ANIMATED
    if len(numbers) > 1 and not animated and kind != "TIFF":
        what = "frames" if frames.animated else "pages"
        numbers, only = numbers[:1], f", the first of {len(numbers)} {what}"
    pages: list[Page] = []
    for number in numbers:
        if number:
            image.seek(number)
        shape = upright_size(image)
        size, crop = wanted(shape, args)
        size, _ = target_size(shape, args.scale, size, limit(args))
        pages.append(Page(number, shape, size, crop))
    planned = Plan(pages, animated, frames.plays, "", only)
    if planned.pixels > limit(args):
        raise InputError(
            f"the results would have {planned.pixels:,} pixels together, more than --max-pixels = "
            f"{limit(args):,}; upscale less, or raise that limit"
        )
    # Pillow takes four bytes a pixel for colours, and so do we for what we make of them.
    held = 8 * max(math.prod(page.shape) for page in pages)
    if args.max_memory is not None and held > args.max_memory:
        raise InputError(
            f"to decode this image takes about {held / 1e6:.0f} MB, more than --max-memory = "
            f"{args.max_memory / 1e6:.0f} MB; allow more"
        )
    planned.model = args.model or "lite"
    if args.model is None:
        lossy = lossy_compression(file)
        planned.model = "photo" if lossy else "lite"
        planned.why = f", by gsr-{planned.model} ({lossy or 'no lossy compression'}){only}"
    return planned


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


def limit(args: argparse.Namespace) -> int:
    from gsr.inference.upscale import MAX_PIXELS

    return MAX_PIXELS if args.max_pixels is None else args.max_pixels
