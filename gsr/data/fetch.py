"""Published image sets: download an archive, verify it, unpack it, whole or not at all.

A download appends to NAME.part, and the next run asks the server for the rest (HTTP's Range). The
published checksum proves that the parts belong together. The archive is unpacked into a hidden
folder beside the target, which gets its name once the images in it have been counted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from gsr import __version__
from gsr.errors import InputError
from gsr.io.paths import check_path, lock_folder

TRIES = 5  # in a row that bring nothing new
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 18  # bytes read at once


@dataclass(frozen=True)
class Source:
    """One archive and the folder that it becomes."""

    url: str
    folder: str  # below the output folder
    images: dict[str, int]  # number of images by subfolder ("" is the folder itself)
    checksum: str  # of the archive, as published: "sha256:HEX" or "md5:HEX"

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def name(self) -> str:
        return Path(self.file).stem

    def is_complete(self, folder: Path) -> bool:
        """Whether a folder holds so many images, those of subfolders and hidden files apart."""
        from gsr.io.image import READ_SUFFIXES

        return all(
            count == sum(p.suffix.lower() in READ_SUFFIXES for p in (folder / sub).glob("[!.]*"))
            for sub, count in self.images.items()
        )


def _div2k(folder: str, images: int, sha256: str) -> Source:
    url = f"https://data.vision.ee.ethz.ch/cvl/DIV2K/{folder.replace('/', '_')}.zip"
    return Source(url, f"DIV2K/{folder}", {"": images}, f"sha256:{sha256}")


_EDSR = "https://cv.snu.ac.kr/research/EDSR"
# SHA-256: tensorflow_datasets/datasets/div2k/checksums.tsv in tensorflow/datasets.
# MD5: torchsr/datasets/{flickr2k,benchmarks}.py in Coloquinte/torchSR.
SETS: dict[str, list[Source]] = {
    "div2k": [
        _div2k("DIV2K_train_HR", 800,
               "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"),
        _div2k("DIV2K_valid_HR", 100,
               "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"),
        _div2k("DIV2K_valid_LR_bicubic/X2", 100,
               "60eed9875c697df51204aa579e2a699e1d5215095788a097ff54dd17e2664d57"),
        _div2k("DIV2K_valid_LR_bicubic/X3", 100,
               "04b9a2ed3b4a0715d3924d3ae8514830c3328fac8d30512ce716d6f419e052a3"),
        _div2k("DIV2K_valid_LR_bicubic/X4", 100,
               "a50a5d1c4b88de4e8d300d8fb2b904c52fe93b2b298a4899697760d7cbb6d553"),
    ],
    "flickr2k": [
        Source(f"{_EDSR}/Flickr2K.tar", "Flickr2K", {"Flickr2K_HR": 2650},
               "md5:5d3f39443d5e9489bff8963f8f26cb03"),
    ],
    "benchmark": [
        Source(f"{_EDSR}/benchmark.tar", "benchmark",
               {"Set5/HR": 5, "Set14/HR": 14, "B100/HR": 100, "Urban100/HR": 100},
               "md5:4ace41d33c2384b97e6b320cd0afd6ba"),
    ],
}  # fmt: skip


def download(
    name: str,
    output: str | os.PathLike = "data",
    *,
    url: str | None = None,
    only: Sequence[str] = (),
    progress: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> None:
    """Download a set of `SETS` into a folder, archive by archive, as `obtain` does.

    Args:
        url: a mirror: the URL of the folder with the archives.
        only: names of some of the set's archives, without suffix; empty: all.
        progress: show bars on stderr.
        say: called with a line for each archive that is done.
    """
    names = [source.name for source in SETS[name]]
    for wanted in only:
        if wanted not in names:
            raise InputError(f"--only {wanted} is none of {name}'s {', '.join(names)}")
    if url is not None and not url.startswith(("http://", "https://")):
        raise InputError(f"--url {url} is not a URL to download: name one like https://host/folder")
    for source in SETS[name]:
        if not only or source.name in only:
            mirror = url and f"{url.rstrip('/')}/{source.file}"
            new = obtain(source, output, url=mirror, progress=progress)
            say(f"{Path(output, source.folder)} is complete" + ("" if new else ", nothing to do"))


def obtain(
    source: Source, output: str | os.PathLike, *, url: str | None = None, progress: bool = False
) -> bool:
    """Make a source's folder below `output` unless it is complete; return whether it was made.

    An archive that lies in `output` already is verified and unpacked like one from the server, and
    stays. `url` is that of the file on a mirror; None: the source's own.

    Raises:
        InputError: network trouble, a wrong checksum, an incomplete folder, a full disk, or another
            run at work in `output`.
    """
    output = check_path(output)
    folder, archive = output / source.folder, output / source.file
    part = output / f"{source.file}.part"
    busy = f"another download is at work in {output}; wait until it has ended"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(output, busy):
            new = not os.path.lexists(folder)
            if new:
                if source.file.endswith(".tar") and not hasattr(tarfile, "data_filter"):
                    raise InputError(
                        f"Python before 3.10.12 or 3.11.4 cannot unpack {archive} safely: update it"
                    )
                packed = archive if archive.exists() else part
                if packed == part:
                    fetch(url or source.url, part, progress=progress)
                verify(packed, source.checksum, downloaded=packed == part)
                unpack(packed, folder, source)
            elif not source.is_complete(folder):
                wanted = ", ".join(
                    f"{n} images in {folder / sub}" for sub, n in source.images.items()
                )
                raise InputError(f"{folder} must hold {wanted}: move it away and run again")
            part.unlink(missing_ok=True)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{source.file} cannot be put into {output} ({error}): fix that and run again"
        ) from None
    return new


def fetch(url: str, part: Path, *, progress: bool = False) -> None:
    """Download a file to `part`, after the bytes that an earlier run left there.

    Raises InputError if the server refuses, or nothing new comes in `TRIES` tries.
    """
    tries = 0
    while True:
        have = _length(part)
        try:
            return _transfer(url, part, have, progress=progress)
        # Of all OSErrors only these: the others are errors of the disk.
        except (URLError, HTTPException, ConnectionError, TimeoutError, ValueError) as error:
            code = getattr(error, "code", 400 if isinstance(error, ValueError) else 500)
            if code == 416:  # no bytes are left to send; whether all are right, the checksum tells
                return
            tries = 1 if _length(part) > have else tries + 1
            if tries >= TRIES or (code < 500 and code not in (408, 429)):
                raise InputError(
                    f"{url} cannot be downloaded to {part} ({error}): run again to resume, or name "
                    "a mirror by --url"
                ) from None
        time.sleep(2**tries)


def _transfer(url: str, part: Path, have: int, *, progress: bool) -> None:
    """Make one request for the bytes after the first `have`, and append them."""
    from tqdm import tqdm

    headers = {"User-Agent": f"gsr/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if answer.status != 206:  # the server sends the whole file instead of the rest
            have = 0
        total = None if answer.length is None else have + answer.length
        bar = tqdm(
            desc=part.stem, total=total, initial=have, unit="B", unit_scale=True,
            disable=not progress,
        )  # fmt: skip
        with bar, open(part, "ab" if have else "wb") as file:
            while block := answer.read1(BLOCK):
                file.write(block)
                bar.update(len(block))
        if answer.length:  # a cut connection looks like an end of file
            raise ConnectionError(f"the connection ended {answer.length:,} bytes too early")


def verify(path: Path, checksum: str, *, downloaded: bool) -> None:
    """Raise InputError unless a file has the published checksum; remove it if downloaded."""
    kind, _, published = checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != published:
        if downloaded:  # or every run would resume it
            path.unlink()
        fix = "run again" if downloaded else "remove it and run again"
        raise InputError(
            f"{path} has the {kind} {digest.hexdigest()} and not the published {published}: {fix} "
            "to download it anew"
        )


def unpack(archive: Path, folder: Path, source: Source) -> None:
    """Unpack an archive beside a folder, and rename what holds its images to that folder.

    Raises:
        InputError: the images are not there.
        OSError, tarfile.TarError, zipfile.BadZipFile: a damaged or unsafe archive, or a full disk.
    """
    temporary = folder.with_name(f".{folder.name}.gsr-tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        if source.file.endswith(".tar"):
            shutil.unpack_archive(archive, temporary, "tar", filter="data")
        else:
            shutil.unpack_archive(archive, temporary, "zip")
        # Folders of any name may wrap the images.
        for top, *_ in os.walk(temporary):
            if source.is_complete(Path(top)):
                os.rename(top, folder)
                return
        raise InputError(f"{archive} does not hold the images of {folder}: name a mirror by --url")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
