"""`gsr data`: the published sets of pictures, and cutting pictures into tiles to train on.

`gsr data download` makes the folders that `gsr train` and `gsr evaluate` read:

    FOLDER/DIV2K/DIV2K_train_HR            FOLDER/Flickr2K/Flickr2K_HR
    FOLDER/DIV2K/DIV2K_valid_HR            FOLDER/benchmark/Set5/HR
    FOLDER/DIV2K/DIV2K_valid_LR_bicubic/X2 FOLDER/benchmark/Set5/LR_bicubic/X2

`gsr data prepare` checks every picture of a folder and cuts it into overlapping tiles, as is common
for DIV2K: a training that decodes 480 x 480 pixels for a patch waits less than one that decodes 2K.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gsr.data.fetch import Source, check_address, describe_bytes, obtain
from gsr.errors import InputError
from gsr.io.paths import alone, as_json, make_folder, usable

EPILOG = """\
examples:
  gsr data download benchmark                      Set5, Set14, B100 and Urban100 into data/
  gsr evaluate --data data/benchmark/Set5 data/benchmark/Set14 --scale 2 3 4

  gsr data download div2k                          into data/DIV2K
  gsr data prepare data/DIV2K/DIV2K_train_HR tiles
  gsr train --config configs/published.yaml data.train=tiles data.repeat=1 train.epochs=1000 \\
      train.step_epochs=100

32,000 tiles, each visited once, are 2,000 steps of 16: 1,000 such epochs have the 2 million steps
of the recipe, whose learning rate is halved every 200,000. With its own values for 800 pictures
(repeat 20, 2,000 epochs), tiles would be trained on for 40 times as long.
"""
DOWNLOAD_EPILOG = """\
Whatever ends a download, running the same command again goes on where it stopped; what is complete
is skipped. An archive that was brought into the folder by hand is verified and unpacked like one
that was fetched, and stays.

DIV2K's sizes and SHA-256 are those that TensorFlow Datasets publishes, the MD5 of Flickr2K and
benchmark those of torchSR.

The pictures belong to their owners. DIV2K's page allows academic research only; Flickr2K comes
without terms.
"""
PREPARE_EPILOG = """\
Tiles are named NAME_s001.png, NAME_s002.png, ... row by row, below the picture's own subfolder. The
last tile of a row or column ends at the border, and a picture narrower than the crop is taken whole
in that direction. Running again goes on where it stopped: tiles that are there are skipped.
OUTPUT/prepare.json is the report, with the bytes of every tile, by which a damaged one is told.

A training on tiles needs data.val, other pictures: tiles of one picture overlap, and some of what
is validated would have been trained on. An epoch visits every tile data.repeat times, so lower
data.repeat by about the number of tiles that a picture has; see gsr data --help.
"""

_DIV2K = "https://data.vision.ee.ethz.ch/cvl/DIV2K"
_EDSR = "https://cv.snu.ac.kr/research/EDSR"


def _div2k(folder: str, pictures: int, size: int, sha256: str) -> Source:
    file = folder.replace("/", "_") + ".zip"
    return Source(
        file, f"{_DIV2K}/{file}", f"DIV2K/{folder}", {"": pictures}, f"sha256:{sha256}", size
    )


# Sizes and SHA-256: tensorflow_datasets/datasets/div2k/checksums.tsv in tensorflow/datasets.
# MD5: torchsr/datasets/{flickr2k,benchmarks}.py in Coloquinte/torchSR.
SETS: dict[str, list[Source]] = {
    "div2k": [
        _div2k(
            "DIV2K_train_HR", 800, 3_530_603_713,
            "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335",
        ),
        _div2k(
            "DIV2K_valid_HR", 100, 448_993_893,
            "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc",
        ),
        _div2k(
            "DIV2K_valid_LR_bicubic/X2", 100, 117_763_600,
            "60eed9875c697df51204aa579e2a699e1d5215095788a097ff54dd17e2664d57",
        ),
        _div2k(
            "DIV2K_valid_LR_bicubic/X3", 100, 54_513_392,
            "04b9a2ed3b4a0715d3924d3ae8514830c3328fac8d30512ce716d6f419e052a3",
        ),
        _div2k(
            "DIV2K_valid_LR_bicubic/X4", 100, 31_505_881,
            "a50a5d1c4b88de4e8d300d8fb2b904c52fe93b2b298a4899697760d7cbb6d553",
        ),
    ],
    "flickr2k": [
        Source(
            "Flickr2K.tar", f"{_EDSR}/Flickr2K.tar", "Flickr2K", {"Flickr2K_HR": 2650},
            checksum="md5:5d3f39443d5e9489bff8963f8f26cb03",
        ),
    ],
    "benchmark": [
        Source(
            "benchmark.tar", f"{_EDSR}/benchmark.tar", "benchmark",
            {"Set5/HR": 5, "Set14/HR": 14, "B100/HR": 100, "Urban100/HR": 100},
            checksum="md5:4ace41d33c2384b97e6b320cd0afd6ba",
        ),
    ],
}  # fmt: skip


# ---- download -----------------------------------------------------------------------------------


def download(
    name: str,
    output: str | os.PathLike = "data",
    url: str | None = None,
    only: Sequence[str] | None = None,
    checksum: bool = True,
    keep: bool = False,
    progress: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> None:
    """Download a set of `SETS` into a folder; see `gsr.data.fetch.obtain` for what can go wrong.

    Args:
        url: a mirror: the address of the folder with the archives, or of the one archive.
        only: names of some of the set's archives, without suffix.
    """
    sources = SETS[name]
    names = [source.name for source in sources]
    for wanted in only or []:
        if wanted not in names:
            raise InputError(f"--only {wanted} is none of {name}'s {', '.join(names)}")
    sources = [source for source in sources if not only or source.name in only]
    if url is not None:
        check_address(url)
    one_file = url is not None and urlsplit(url).path.endswith((".zip", ".tar"))
    if one_file and len(sources) > 1:
        raise InputError(
            f"--url {url} is one archive and {name} has {len(sources)}: name the folder that holds "
            "them, or one of them by --only"
        )
    for source in sources:
        address = url
        if url is not None and not one_file:
            address = f"{url.rstrip('/')}/{source.file}"
        new = obtain(source, output, address, checksum, keep, progress)
        say(f"{Path(output, source.folder)} is complete" + ("" if new else ", nothing to do"))


# ---- tiles --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut; lengths in pixels."""

    crop: int = 480  # side of a tile
    step: int = 240  # from one tile to the next
    min_side: int = 192  # of a picture; the largest crop of a default training, patch 48 x scale 4
    format: str = "png"

    def __post_init__(self):
        if self.crop < 1 or self.min_side < 1:
            least = "crop (--crop)" if self.crop < 1 else "min_side (--min-side)"
            raise InputError(f"{least} must be at least 1 pixel")
        if not 1 <= self.step <= self.crop:
            raise InputError(
                f"step (--step) must be from 1 to the crop's {self.crop}, not {self.step}; a "
                "larger one would leave pixels out"
            )
        if self.format not in FORMATS:
            raise InputError(f"format (--format) must be one of {', '.join(FORMATS)}")


FORMATS = ("png", "tiff", "bmp")  # those that gsr.io.image writes without loss
PLAN = "prepare.json"


def starts(length: int, crop: int, step: int) -> list[int]:
    """Where tiles begin along a side, in pixels: every `step`, and the last ends at the border."""
    last = max(length - crop, 0)
    return [*range(0, last, step), last]


def boxes(height: int, width: int, tiling: Tiling) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of the tiles of a picture, row by row."""
    crop, step = tiling.crop, tiling.step
    size = min(crop, height), min(crop, width)
    return [
        (top, left, *size)
        for top in starts(height, crop, step)
        for left in starts(width, crop, step)
    ]


def check(
    source: str | os.PathLike,
    tiling: Tiling | None = None,
    workers: int = 1,
    progress: bool = False,
    first: Iterable[str] = (),
) -> dict[str, Any]:
    """Decode every picture of a folder and say what is in it.

    Args:
        tiling: `min_side` is used.
        first: pictures, by path below `source`, that are kept where others are their duplicates.

    Returns the report without its part about tiles: `pictures` (SHA-256 of the decoded pixels,
    width, height and bytes of the file, by path), `refused` (file, reason), `duplicates` (file,
    same_as), and their counts, sizes and bytes. Raises InputError if there is no picture.
    """
    tiling = tiling or Tiling()
    source = usable(source)
    paths = {path.relative_to(source).as_posix(): path for path in _list(source)}
    first = set(first)
    order = sorted(paths, key=lambda name: (name not in first, name))
    items = [(str(paths[name]), tiling.min_side) for name in order]
    found = zip(order, _each(_inspect, items, workers, progress, "checking"), strict=True)
    pictures: dict[str, dict[str, Any]] = {}
    refused, duplicates, by_content = [], [], {}
    for name, facts in found:
        if "reason" in facts:
            refused.append({"file": name, **facts})
        elif facts["sha256"] in by_content:
            duplicates.append({"file": name, "same_as": by_content[facts["sha256"]]})
        else:
            by_content[facts["sha256"]] = name
            pictures[name] = facts
    pictures = {name: pictures[name] for name in sorted(pictures)}
    return {
        "source": str(source),
        "counts": {
            "found": len(paths), "kept": len(pictures), "refused": len(refused),
            "duplicates": len(duplicates),
        },
        "width": _spread(f["width"] for f in pictures.values()),
        "height": _spread(f["height"] for f in pictures.values()),
        "pixels": sum(f["width"] * f["height"] for f in pictures.values()),
        "bytes": sum(f["bytes"] for f in pictures.values()),
        "refused": sorted(refused, key=lambda entry: entry["file"]),
        "duplicates": sorted(duplicates, key=lambda entry: entry["file"]),
        "pictures": pictures,
    }  # fmt: skip


def prepare(
    source: str | os.PathLike,
    output: str | os.PathLike,
    tiling: Tiling | None = None,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Check a folder of pictures and write its tiles to another, going on where a run stopped.

    The plan (what is cut, from which pixels, how) is in OUTPUT/prepare.json before the first tile,
    and a tile is there whole or not at all; so what is there need not be made again.

    Returns `check`'s report with `settings`, `tiles` (count, written now, skipped, bytes, sizes),
    `complete`, and every picture's `tiles` (bytes of each); the same is in OUTPUT/prepare.json.

    Raises:
        InputError: no picture that can be used, two of one name, `output` in `source` or the other
            way round, an `output` with other pictures, settings or contents than this run's, or
            another run at work there.
    """
    tiling = tiling or Tiling()
    source, output = usable(source), usable(output)
    a, b = source.resolve(), output.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise InputError(
            f"{output} and {source} must not lie in one another; choose another output folder"
        )
    _list(source)  # raises before anything is made
    make_folder(output)
    with alone(output, f"another gsr data prepare is at work in {output}; wait until it has ended"):
        return _prepare(source, output, tiling, workers, progress)


def _prepare(
    source: Path, output: Path, tiling: Tiling, workers: int, progress: bool
) -> dict[str, Any]:
    """`prepare` in a folder that no other run works in."""
    from gsr.io.image import remove_left_over, write_atomic

    report_file = output / PLAN
    old = _read_plan(report_file, tiling)
    report = check(source, tiling, workers, progress, first=old)
    pictures = report["pictures"]
    if not pictures:
        raise InputError(f"{source} holds no picture that can be used{_first_reason(report)}")
    changed = [name for name in old if old[name]["sha256"] != pictures.get(name, {}).get("sha256")]
    if changed:
        raise InputError(
            f"{len(changed)} pictures of {source} have changed or gone since {output} was made "
            f"from it, first {changed[0]}; choose a new output folder"
        )
    tiles = _name_tiles(pictures, output, tiling)
    _check_foreign(output, {target for targets in tiles.values() for target in targets})

    folders = {target.parent for targets in tiles.values() for target in targets}
    for folder in sorted(folders | {output}):
        make_folder(folder)
        remove_left_over(folder)
    for name in old:
        pictures[name]["tiles"] = old[name]["tiles"]
    report = {"settings": asdict(tiling), "complete": False, **report}
    write_atomic(report_file, as_json(report))
    items = [
        (
            str(source / name),
            facts["sha256"],
            (facts["height"], facts["width"]),
            [str(target) for target in tiles[name]],
            facts.get("tiles"),
            tiling,
        )
        for name, facts in pictures.items()
    ]
    written = 0
    done = _each(_cut, items, workers, progress, "cutting")
    for facts, (new, lengths) in zip(pictures.values(), done, strict=True):
        facts["tiles"] = lengths
        written += new
    sizes = Counter(
        f"{width}x{height}"
        for facts in pictures.values()
        for _, _, height, width in boxes(facts["height"], facts["width"], tiling)
    )
    report["tiles"] = {
        "count": sizes.total(),
        "written": written,
        "skipped": sizes.total() - written,
        "bytes": sum(sum(facts["tiles"]) for facts in pictures.values()),
        "sizes": dict(sorted(sizes.items())),
    }
    report["complete"] = True
    write_atomic(report_file, as_json(report))
    return report


def describe(report: dict[str, Any], most: int = 10) -> str:
    """A report of `check` or `prepare` as a few lines of text, with `most` refusals at most."""
    counts = report["counts"]
    lines = [
        f"{report['source']}: {counts['found']:,} pictures, {counts['kept']:,} of use "
        f"({describe_bytes(report['bytes'])}), {counts['refused']:,} refused, "
        f"{counts['duplicates']:,} duplicates"
    ]
    if counts["kept"]:
        width, height = report["width"], report["height"]
        lines.append(
            f"  width {width['min']} to {width['max']}, median {width['median']:g}; "
            f"height {height['min']} to {height['max']}, median {height['median']:g}"
        )
    entries = [f"  refused: {entry['reason']}" for entry in report["refused"]]
    entries += [f"  duplicate: {e['file']} is {e['same_as']}" for e in report["duplicates"]]
    lines += entries[:most]
    if len(entries) > most:
        lines.append(f"  ... and {len(entries) - most:,} more in the report")
    if "tiles" in report:
        tiles = report["tiles"]
        lines.append(
            f"{tiles['count']:,} tiles ({describe_bytes(tiles['bytes'])}): {tiles['written']:,} "
            f"written, {tiles['skipped']:,} were there"
        )
    return "\n".join(lines)


def _list(source: Path) -> list[Path]:
    from gsr.io.image import list_images

    return list_images(source)


def _inspect(path: str, min_side: int) -> dict[str, Any]:
    """What `check` reports of one picture: its facts, or the reason to refuse it."""
    from gsr.io.image import read_image

    try:
        array = read_image(path)
    except InputError as error:
        return {"reason": str(error)}
    height, width = array.shape[:2]
    if min(height, width) < min_side:
        return {
            "reason": f"{path} is {width} x {height} pixels, below the least side {min_side} "
            "(--min-side)"
        }
    return {
        "sha256": _content(array),
        "width": width,
        "height": height,
        "bytes": os.path.getsize(path),
    }


def _content(array: Any) -> str:
    """SHA-256 of the size and RGB bytes of a picture, the same whatever file it came in."""
    digest = hashlib.sha256(f"{array.shape[1]} {array.shape[0]} ".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()


def _cut(
    path: str,
    sha256: str,
    size: tuple[int, int],
    targets: list[str],
    lengths: list[int] | None,
    tiling: Tiling,
) -> tuple[int, list[int]]:
    """Write those tiles of a picture that are not there; (how many, bytes of each of all).

    `lengths` are the bytes that each had when it was written, where a report tells.
    """
    from gsr.io.image import read_image, write_image

    cuts = boxes(*size, tiling)
    if not isinstance(lengths, list) or len(lengths) != len(cuts):
        lengths = [None] * len(cuts)
    missing = [
        i for i, cut in enumerate(cuts) if not _is_there(Path(targets[i]), cut[2:], lengths[i])
    ]
    if missing:
        array = read_image(path)
        if _content(array) != sha256:
            raise InputError(f"{path} has changed while it was being cut; run again")
        for i in missing:
            top, left, height, width = cuts[i]
            write_image(targets[i], array[top : top + height, left : left + width])
    return len(missing), [os.path.getsize(target) for target in targets]


def _is_there(path: Path, size: tuple[int, int], length: int | None) -> bool:
    """Whether a file is the whole of a picture of this (height, width).

    Told by its start and its bytes; where these are not known, after an interruption, by decoding.
    """
    from PIL import Image

    from gsr.io.image import read_image

    try:
        if length is None:
            return read_image(path).shape[:2] == size
        with Image.open(path) as image:
            return image.size == size[::-1] and path.stat().st_size == length
    except (OSError, SyntaxError, ValueError):  # InputError is a ValueError
        return False


def _name_tiles(
    pictures: dict[str, dict[str, Any]], output: Path, tiling: Tiling
) -> dict[str, list[Path]]:
    """The files of every picture's tiles."""
    stems: dict[Path, str] = {}
    tiles = {}
    for name, facts in pictures.items():
        stem = Path(name).with_suffix("")
        if stem in stems:
            raise InputError(
                f"{stems[stem]} and {name} have the same name without suffix; rename one of them"
            )
        stems[stem] = name
        count = len(boxes(facts["height"], facts["width"], tiling))
        tiles[name] = [
            output / stem.parent / f"{stem.name}_s{i:03d}.{tiling.format}"
            for i in range(1, count + 1)
        ]
    return tiles


def _read_plan(file: Path, tiling: Tiling) -> dict[str, dict[str, Any]]:
    """The pictures that an earlier run planned to cut; InputError if by other settings."""
    if not file.exists():
        return {}
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        settings = {key: plan["settings"].get(key) for key in asdict(tiling)}
        pictures = {
            name: {"sha256": facts["sha256"], "tiles": facts.get("tiles")}
            for name, facts in plan["pictures"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{file} is no report of `gsr data prepare`; choose another output folder"
        ) from None
    for key, value in asdict(tiling).items():
        if settings[key] != value:
            option = key.replace("_", "-")
            raise InputError(
                f"{file.parent} was made with --{option} {settings[key]} and not {value}; "
                "choose another output folder"
            )
    return pictures


def _check_foreign(output: Path, tiles: set[Path]) -> None:
    """A training would take every picture below `output`, so there must be no other."""
    from gsr.io.image import READ_SUFFIXES

    for path in output.rglob("*"):
        name = path.relative_to(output)
        hidden = any(part.startswith(".") for part in name.parts)  # to a training as well
        if path.suffix.lower() in READ_SUFFIXES and not hidden and path not in tiles:
            raise InputError(
                f"{output} holds {name}, which is no tile of this source; choose an empty output "
                "folder"
            )


def _spread(values: Iterable[int]) -> dict[str, float] | None:
    values = list(values)
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _first_reason(report: dict[str, Any]) -> str:
    return f": {report['refused'][0]['reason']}" if report["refused"] else ""


def _each(
    function: Callable[..., Any], items: list[tuple], workers: int, progress: bool, label: str
) -> Iterator[Any]:
    """function(*item) of every item, in order, in so many processes (1: in this one)."""
    from tqdm import tqdm

    if workers < 1:
        raise InputError(f"workers (--workers) must be at least 1, not {workers}")
    with tqdm(
        total=len(items), desc=label, unit="picture", disable=not progress, file=sys.stderr
    ) as bar:
        for result in _map(function, items, min(workers, len(items))):
            bar.update()
            yield result


def _map(function: Callable[..., Any], items: list[tuple], workers: int) -> Iterator[Any]:
    if workers <= 1:
        yield from (function(*item) for item in items)
        return
    # Not fork: PyTorch's threads do not survive it. A fork server loads PyTorch once for all.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["gsr.io.image"])
    pool = ProcessPoolExecutor(workers, context, initializer=_ignore_interrupts)
    try:
        for future in [pool.submit(function, *item) for item in items]:
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was ended from outside, perhaps for want of memory; run again with "
            "fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C is for the process that the user started; it ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- command line -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """`gsr data download` and `gsr data prepare`. Raises InputError."""
    args = _parser().parse_args(argv)
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="gsr data",
        description="Download the published sets of pictures, and cut pictures into tiles to train "
        "on.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    down = commands.add_parser(
        "download",
        help="fetch DIV2K, Flickr2K or the benchmarks (gsr data download --help)",
        description="Fetch a published set and unpack it to where gsr train and gsr evaluate read "
        "it.",
        epilog=DOWNLOAD_EPILOG,
        formatter_class=raw,
    )
    down.set_defaults(run=_download_command)
    down.add_argument("set", choices=list(SETS), help="which set")
    down.add_argument("--output", default="data", metavar="FOLDER", help="where to (default: data)")
    down.add_argument(
        "--only", nargs="+", metavar="NAME", help="only some archives, such as DIV2K_valid_HR"
    )
    down.add_argument(
        "--url",
        metavar="URL",
        help="a mirror: the folder that holds the archives, or the address of the one archive",
    )
    down.add_argument(
        "--no-checksum", action="store_true", help="take an archive that is not the published one"
    )
    down.add_argument("--keep", action="store_true", help="keep the archives after unpacking")
    down.add_argument("-q", "--quiet", action="store_true", help="print nothing")

    cut = commands.add_parser(
        "prepare",
        help="check pictures and cut them into tiles (gsr data prepare --help)",
        description="Check every picture of a folder (decodable, large enough, no duplicate) and "
        "cut it\ninto tiles, written without loss.",
        epilog=PREPARE_EPILOG,
        formatter_class=raw,
    )
    default = Tiling()
    cut.set_defaults(run=_prepare_command)
    cut.add_argument("source", metavar="SOURCE", help="folder of pictures, with its subfolders")
    cut.add_argument("output", nargs="?", metavar="OUTPUT", help="folder for the tiles")
    cut.add_argument(
        "--check", action="store_true", help="only check and report; exit code 2 if any is refused"
    )
    for name, text in (
        ("crop", "side of a tile"),
        ("step", "from one tile to the next"),
        ("min-side", "refuse pictures with a shorter side"),
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
    return parser


def _download_command(args: argparse.Namespace) -> None:
    download(
        args.set,
        args.output,
        url=args.url,
        only=args.only,
        checksum=not args.no_checksum,
        keep=args.keep,
        progress=not args.quiet,
        say=(lambda text: None) if args.quiet else print,
    )


def _prepare_command(args: argparse.Namespace) -> None:
    from gsr.io.image import write_atomic

    if args.output is None and not args.check:
        raise InputError("OUTPUT is missing: name a folder for the tiles, or only --check")
    if args.report is not None:
        file = usable(args.report)
        if file.is_dir():
            raise InputError(f"--report {file} is a folder; name the JSON file to write")
        if file.suffix.lower() != ".json" or file.name == PLAN:
            raise InputError(
                f"--report {file} must end in .json and not be the {PLAN} of a folder of tiles; "
                "name another file, such as report.json"
            )
        make_folder(file.parent)
    tiling = Tiling(args.crop, args.step, args.min_side, args.format)
    workers = _cores() if args.workers is None else args.workers
    if args.check:
        report = check(args.source, tiling, workers, progress=not args.quiet)
    else:
        report = prepare(args.source, args.output, tiling, workers, progress=not args.quiet)
    if args.report is not None:
        write_atomic(args.report, as_json(report))
    if not args.quiet:
        print(describe(report))
    if args.check and report["refused"]:
        raise InputError(
            f"{report['counts']['refused']} of the {report['counts']['found']} pictures in "
            f"{args.source} cannot be used{_first_reason(report)}"
        )
