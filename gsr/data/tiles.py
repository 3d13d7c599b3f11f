"""Cut a folder of images into overlapping tiles to train on.

This is common for DIV2K: a training that decodes 480 x 480 pixels for a patch waits less than one
that decodes 2K. A tile is complete if it has the pixels that this run would write, so running again
continues an interrupted run and replaces what is damaged.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gsr.errors import InputError
from gsr.io.paths import as_json, check_path, lock_folder, make_folder

FORMATS = ("png", "tiff", "bmp")  # those that gsr.io.image writes without loss
REPORT = "prepare.json"

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class Tiling:
    """Settings of the cut; lengths in pixels."""

    crop: int = 480  # side of a tile
    step: int = 240  # from one tile to the next
    min_side: int = 192  # of an image; the largest crop of a default training, patch 48 x scale 4
    format: str = "png"

    def __post_init__(self):
        for name in ("crop", "min_side"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise InputError(f"{name} (--{option}) must be at least 1 pixel")
        if not 1 <= self.step <= self.crop:
            raise InputError(
                f"step (--step) must be from 1 to the crop's {self.crop}, not {self.step}; a "
                "larger one would leave pixels out"
            )
        if self.format not in FORMATS:
            raise InputError(f"format (--format) must be one of {', '.join(FORMATS)}")


def starts(length: int, crop: int, step: int) -> list[int]:
    """Return where tiles start along a side: every `step`, and the last ends at the border."""
    last = max(length - crop, 0)
    return [*range(0, last, step), last]


def tile_boxes(stem: Path, height: int, width: int, tiling: Tiling) -> dict[Path, Box]:
    """Return file and box of an image's tiles, row by row: stem_s001.png, stem_s002.png, ..."""
    crop, step = tiling.crop, tiling.step
    boxes = [
        (top, left, min(crop, height), min(crop, width))
        for top in starts(height, crop, step)
        for left in starts(width, crop, step)
    ]
    return {
        stem.with_name(f"{stem.name}_s{i:03d}.{tiling.format}"): box
        for i, box in enumerate(boxes, 1)
    }


def check(
    source: str | os.PathLike,
    tiling: Tiling | None = None,
    *,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Decode every image of a folder and report which can be used; of `tiling` min_side counts.

    Returns the report: `counts`, `refused` (file, reason), `duplicates` (file, same_as: the pixels
    are equal) and `images` (height and width by path). Raises InputError if there is no image.
    """
    from gsr.io.image import list_images

    tiling = tiling or Tiling()
    paths = list_images(source)
    jobs = [(path, tiling.min_side) for path in paths]
    images, refused, duplicates, by_content = {}, [], [], {}
    results = _map(_inspect, jobs, workers=workers, progress=progress, label="checking")
    for path, (content, facts) in zip(paths, results, strict=True):
        name = path.relative_to(source).as_posix()
        if content is None:
            refused.append({"file": name, "reason": facts})
        elif content in by_content:
            duplicates.append({"file": name, "same_as": by_content[content]})
        else:
            by_content[content], images[name] = name, facts
    kept = {"kept": len(images), "refused": len(refused), "duplicates": len(duplicates)}
    return {
        "source": str(source),
        "counts": {"found": len(paths), **kept},
        "refused": refused,
        "duplicates": duplicates,
        "images": images,
    }


def prepare(
    source: str | os.PathLike,
    output: str | os.PathLike,
    tiling: Tiling | None = None,
    *,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Check a folder of images and write the tiles to another that are not complete there.

    Returns the report of `check` with `settings` and `tiles` (count, written now, skipped, bytes),
    which is also written to OUTPUT/prepare.json.

    Raises:
        InputError: no image can be used, two have one name, `output` lies in `source` or the other
            way round or holds other images than these tiles, or another run is at work there.
    """
    from gsr.io.image import remove_left_over, write_atomic

    tiling = tiling or Tiling()
    source, output = check_path(source), check_path(output)
    a, b = source.resolve(), output.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise InputError(
            f"{output} and {source} must not lie in one another; choose another output folder"
        )
    report = {
        "settings": asdict(tiling),
        **check(source, tiling, workers=workers, progress=progress),
    }
    if not report["images"]:
        raise InputError(
            f"{source} holds no image that can be used: {report['refused'][0]['reason']}"
        )
    jobs = []
    image_of: dict[Path, str] = {}  # by tile
    for name, size in report["images"].items():
        stem = output / Path(name).with_suffix("")
        targets = tile_boxes(stem, size["height"], size["width"], tiling)
        if other := image_of.get(next(iter(targets))):
            raise InputError(
                f"{other} and {name} have the same name without suffix; rename one of them"
            )
        image_of.update((target, name) for target in targets)
        jobs.append((source / name, stem, tiling))

    make_folder(output)
    with lock_folder(
        output, f"another gsr data prepare is at work in {output}; wait until it has ended"
    ):
        _refuse_foreign(output, image_of)
        for folder in {output, *(target.parent for target in image_of)}:
            make_folder(folder)
            remove_left_over(folder)
        done = list(_map(_cut, jobs, workers=workers, progress=progress, label="cutting"))
        written = sum(count for count, _ in done)
        report["tiles"] = {
            "count": len(image_of),
            "written": written,
            "skipped": len(image_of) - written,
            "bytes": sum(size for _, size in done),
        }
        write_atomic(output / REPORT, as_json(report))
    return report


def describe(report: dict[str, Any], most: int = 10) -> str:
    """Return a report as a few lines of text, with `most` refusals at most."""
    from tqdm import tqdm

    counts = report["counts"]
    lines = [
        f"{report['source']}: {counts['found']:,} images, {counts['kept']:,} of use, "
        f"{counts['refused']:,} refused, {counts['duplicates']:,} duplicates"
    ]
    entries = [f"  refused: {entry['reason']}" for entry in report["refused"]]
    entries += [f"  duplicate: {e['file']} is {e['same_as']}" for e in report["duplicates"]]
    lines += entries[:most]
    if len(entries) > most:
        lines.append(f"  ... and {len(entries) - most:,} more in the report")
    if "tiles" in report:
        tiles = report["tiles"]
        lines.append(
            f"{tiles['count']:,} tiles ({tqdm.format_sizeof(tiles['bytes'], 'B')}): "
            f"{tiles['written']:,} written, {tiles['skipped']:,} were there"
        )
    return "\n".join(lines)


def _inspect(path: Path, min_side: int) -> tuple[str | None, Any]:
    """Return the SHA-256 of an image's pixels and its size, or None and the reason to refuse it."""
    from gsr.io.image import read_image

    try:
        array = read_image(path)
    except InputError as error:
        return None, str(error)
    height, width = array.shape[:2]
    if min(height, width) < min_side:
        return None, (
            f"{path} is {width} x {height} pixels, below the least side {min_side} (--min-side)"
        )
    digest = hashlib.sha256(f"{width} {height} ".encode() + array.tobytes())
    return digest.hexdigest(), {"height": height, "width": width}


def _cut(path: Path, stem: Path, tiling: Tiling) -> tuple[int, int]:
    """Write the tiles of an image that are not complete; return how many, and bytes of all."""
    from gsr.io.image import read_image, write_image

    array = read_image(path)
    height, width = array.shape[:2]
    targets = tile_boxes(stem, height, width, tiling)
    written = 0
    for target, (top, left, h, w) in targets.items():
        tile = array[top : top + h, left : left + w]
        if not _holds(target, tile):
            write_image(target, tile)  # whole or not at all
            written += 1
    return written, sum(target.stat().st_size for target in targets)


def _holds(path: Path, pixels: Any) -> bool:
    """Return whether a file is an image of these pixels."""
    import numpy as np

    from gsr.io.image import read_image

    try:
        return path.exists() and np.array_equal(read_image(path), pixels)
    except InputError:  # damaged or cut short
        return False


def _refuse_foreign(output: Path, tiles: Iterable[Path]) -> None:
    """Raise InputError if `output` holds other images, which a training would take as well."""
    from gsr.io.image import list_images

    try:
        present = list_images(output)
    except InputError:  # there is none
        return
    for path in present:
        if path not in tiles:
            raise InputError(
                f"{output} holds {path.relative_to(output)}, which is no tile of this source with "
                "these settings; choose an empty output folder"
            )


def _map(
    function: Callable[..., Any], jobs: Sequence[tuple], *, workers: int, progress: bool, label: str
) -> Iterator[Any]:
    """Yield function(*job) of every job, in order, from so many processes (1: from this one)."""
    from tqdm import tqdm

    if workers < 1:
        raise InputError(f"workers (--workers) must be at least 1, not {workers}")
    workers = min(workers, len(jobs))
    with _pool(workers) if workers > 1 else nullcontext() as pool:
        results = (pool.map if pool else map)(function, *zip(*jobs, strict=True))
        try:
            yield from tqdm(results, label, len(jobs), unit="image", disable=not progress)
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed, perhaps for want of memory; run again with fewer "
                "--workers"
            ) from None


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: PyTorch's threads do not survive it. A fork server loads PyTorch once for all.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["gsr.io.image"])
    # Ctrl-C is for the process that the user started; it ends the others.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    return ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignore)
