"""Published image sets: download an archive, verify it, unpack it, whole or not at all.

A download writes NAME.part, and the next run asks the server for the rest of it. That the parts
belong together is proven by the published checksum. The archive is unpacked into a hidden folder
beside the target, which gets its final name once the images in it have been counted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from gsr import __version__
from gsr.errors import InputError
from gsr.io.paths import check_path, lock_folder

TRIES = 5  # in a row that bring nothing new
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 18  # bytes read at once
# Errors of the network that may pass. Any other OSError is one of the disk.
_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Source:
    """One archive and the folder that it becomes."""

    file: str  # name of the archive
    url: str
    folder: str  # below the output folder
    images: dict[str, int]  # number of images by subfolder ("" is the folder itself)
    checksum: str  # of the archive, as published: "sha256:HEX" or "md5:HEX"
    size: int | None = None  # bytes of the archive, where published

    @property
    def name(self) -> str:
        return self.file.rpartition(".")[0]


_DIV2K = "https://data.vision.ee.ethz.ch/cvl/DIV2K"
_EDSR = "https://cv.snu.ac.kr/research/EDSR"


def _div2k(folder: str, images: int, size: int, sha256: str) -> Source:
    file = folder.replace("/", "_") + ".zip"
    return Source(
        file, f"{_DIV2K}/{file}", f"DIV2K/{folder}", {"": images}, f"sha256:{sha256}", size
    )


# Sizes and SHA-256: tensorflow_datasets/datasets/div2k/checksums.tsv in tensorflow/datasets.
# MD5: torchsr/datasets/{flickr2k,benchmarks}.py in Coloquinte/torchSR.
SETS: dict[str, list[Source]] = {
    "div2k": [
        _div2k("DIV2K_train_HR", 800, 3_530_603_713,
               "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"),
        _div2k("DIV2K_valid_HR", 100, 448_993_893,
               "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"),
        _div2k("DIV2K_valid_LR_bicubic/X2", 100, 117_763_600,
               "60eed9875c697df51204aa579e2a699e1d5215095788a097ff54dd17e2664d57"),
        _div2k("DIV2K_valid_LR_bicubic/X3", 100, 54_513_392,
               "04b9a2ed3b4a0715d3924d3ae8514830c3328fac8d30512ce716d6f419e052a3"),
        _div2k("DIV2K_valid_LR_bicubic/X4", 100, 31_505_881,
               "a50a5d1c4b88de4e8d300d8fb2b904c52fe93b2b298a4899697760d7cbb6d553"),
    ],
    "flickr2k": [
        Source("Flickr2K.tar", f"{_EDSR}/Flickr2K.tar", "Flickr2K", {"Flickr2K_HR": 2650},
               "md5:5d3f39443d5e9489bff8963f8f26cb03"),
    ],
    "benchmark": [
        Source("benchmark.tar", f"{_EDSR}/benchmark.tar", "benchmark",
               {"Set5/HR": 5, "Set14/HR": 14, "B100/HR": 100, "Urban100/HR": 100},
               "md5:4ace41d33c2384b97e6b320cd0afd6ba"),
    ],
}  # fmt: skip


def download(
    name: str,
    output: str | os.PathLike = "data",
    url: str | None = None,
    only: Sequence[str] = (),
    checksum: bool = True,
    keep: bool = False,
    progress: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> None:
    """Download a set of `SETS` into a folder, archive by archive, as `obtain` does.

    Args:
        url: a mirror: the URL of the folder with the archives, or of the one archive.
        only: names of some of the set's archives, without suffix; empty: all.
        say: called with a line for each archive that is done.
    """
    names = [source.name for source in SETS[name]]
    for wanted in only:
        if wanted not in names:
            raise InputError(f"--only {wanted} is none of {name}'s {', '.join(names)}")
    sources = [source for source in SETS[name] if not only or source.name in only]
    one_file = url is not None and _check_url(url).endswith((".zip", ".tar"))
    if one_file and len(sources) > 1:
        raise InputError(
            f"--url {url} is one archive and {name} has {len(sources)}: name the folder that holds "
            "them, or one of them by --only"
        )
    for source in sources:
        mirror = url if url is None or one_file else f"{url.rstrip('/')}/{source.file}"
        new = obtain(source, output, mirror, checksum, keep, progress)
        say(f"{Path(output, source.folder)} is complete" + ("" if new else ", nothing to do"))


def _check_url(url: str) -> str:
    """Return the path of a URL; raise InputError unless it can be downloaded from."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts.path
    raise InputError(f"--url {url} is not a URL to download: name one like https://server/folder")


def obtain(
    source: Source,
    output: str | os.PathLike,
    url: str | None = None,
    checksum: bool = True,
    keep: bool = False,
    progress: bool = False,
) -> bool:
    """Make a source's folder below `output` unless it is complete; return whether it was made.

    An archive that lies in `output` already is verified and unpacked like one from the server.

    Args:
        url: the file on a mirror; None: the source's own URL.
        checksum: False takes a file that is not the published one.
        keep: leave the archive there after unpacking; one that was not downloaded always stays.
        progress: show a bar on stderr.

    Raises:
        InputError: network trouble, a wrong checksum, a damaged or unsafe archive, an incomplete
            folder, a full disk, or another run at work in `output`.
    """
    output, url = check_path(output), url or source.url
    folder, archive = output / source.folder, output / source.file
    # Without a checksum nothing but the URL tells which file a part is of.
    kind = "" if checksum else f".{zlib.crc32(url.encode()):08x}"
    part = output / f"{source.file}{kind}.part"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(
            output, f"another download is at work in {output}; wait until it has ended"
        ):
            new = not os.path.lexists(folder)
            if new:
                if source.file.endswith(".tar") and not hasattr(tarfile, "data_filter"):
                    raise InputError(
                        f"Python before 3.10.12 or 3.11.4 cannot unpack {archive} safely: update it"
                    )
                packed = archive if archive.exists() else part
                if packed == part:
                    fetch(url, part, source.size if checksum else None, progress)
                if checksum:
                    _verify(packed, source.checksum, downloaded=packed == part)
                _place(packed, folder, source)
                if keep and packed == part:
                    part.rename(archive)
            elif missing := _missing(folder, source):
                raise InputError(f"{folder} is incomplete ({missing}): move it away and run again")
            for left in output.glob(f"{source.file}*.part"):
                left.unlink()
    except OSError as error:
        raise InputError(
            f"{source.file} cannot be put into {output} ({error}): fix that and run again"
        ) from None
    return new


def fetch(url: str, part: Path, size: int | None = None, progress: bool = False) -> None:
    """Download a file to `part`, from where an earlier run stopped.

    Args:
        size: bytes that the file must have; None: what the server says.

    Raises:
        InputError: the server refuses, has a file of another size, or cannot be reached in `TRIES`
            tries; or the disk is full.
    """
    tries, most = 0, _length(part)
    while True:
        try:
            return _transfer(url, part, size, progress)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            code = getattr(error, "code", 500)
            if code == 416:  # no bytes are left to send; whether all are right, the checksum tells
                return
            have = _length(part)
            tries, most = (1 if have > most else tries + 1), max(have, most)
            passing = isinstance(error, _NETWORK) and (code >= 500 or code in (408, 429))
            if not passing or tries >= TRIES:
                raise InputError(
                    f"{url} cannot be downloaded to {part} ({_reason(error)}): run again to "
                    "resume, or name a mirror by --url"
                ) from None
        time.sleep(2**tries)


def _transfer(url: str, part: Path, size: int | None, progress: bool) -> None:
    """Make one request for the bytes that `part` lacks, and append them."""
    from tqdm import tqdm

    have = _length(part)
    if have == size:
        return
    headers = {"User-Agent": f"gsr/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if not isinstance(answer, http.client.HTTPResponse):  # urllib follows redirects to ftp
            raise InputError(
                f"{url} leads to {answer.url}, which is not HTTP: name a mirror by --url"
            )
        if answer.status != 206:  # the server sends the whole file instead of the rest
            have = 0
        total = size if answer.length is None else have + answer.length
        if size is not None and total != size:
            raise InputError(
                f"{url} has {total:,} bytes and not the published {size:,}: name a mirror by "
                "--url, or take it as it is by --no-checksum"
            )
        bar = tqdm(
            desc=part.stem, total=total, initial=have, unit="B", unit_scale=True,
            disable=not progress,
        )  # fmt: skip
        with bar, open(part, "ab" if have else "wb") as file:
            while block := answer.read1(BLOCK):
                file.write(block)
                bar.update(len(block))
    if total is not None and _length(part) < total:  # a cut connection looks like an end of file
        raise ConnectionError(f"the connection ended after {_length(part):,} of {total:,} bytes")


def _verify(path: Path, checksum: str, downloaded: bool) -> None:
    """Raise InputError unless a file has the published checksum; remove it if downloaded."""
    kind, _, published = checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() == published:
        return
    if downloaded:  # or every run would resume it
        path.unlink()
    fix = "run again" if downloaded else "remove it and run again"
    raise InputError(
        f"{path} has the {kind} {digest.hexdigest()} and not the published {published}: {fix} to "
        "download it anew, or take it as it is by --no-checksum"
    )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive into an empty folder.

    Raises:
        InputError: the archive is damaged, or holds a link, a device or a path that leads out of
            `folder`; what was unpacked before stays.
        OSError: the files cannot be written.
    """
    try:
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter=_plain_file)
            return
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                path = PurePosixPath(name.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts:  # zipfile would write it elsewhere
                    raise zipfile.BadZipFile(f"{name!r} leads out of the folder")
            file.extractall(folder)
    except Exception as error:  # damaged archives raise almost anything
        # Decoders raise OSError without a number, a wrong offset is EINVAL; the rest is the disk.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise InputError(
            f"{archive} is damaged or unsafe ({_reason(error)}): remove it and run again, or name "
            "a mirror by --url"
        ) from None


def _plain_file(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """The data filter of tarfile, without the links that it allows; no image set has any."""
    if member.issym() or member.islnk():
        raise tarfile.TarError(f"{member.name!r} is a link")
    return tarfile.data_filter(member, folder)


def _place(archive: Path, folder: Path, source: Source) -> None:
    """Unpack an archive beside a folder, and rename what holds its images to that folder."""
    temporary = folder.with_name(f".{folder.name}.gsr-tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    top = temporary / "archive"
    try:
        top.mkdir(parents=True)
        unpack(archive, top)
        while missing := _missing(top, source):
            if list(source.images.values()) == [_count(top)]:
                # A mirror may have the images of the one subfolder without the subfolder.
                whole = temporary / "whole"
                inner = whole / next(iter(source.images))
                inner.parent.mkdir(parents=True)
                top.rename(inner)
                top = whole
                continue
            # Folders of any name may wrap what is looked for, but then hold no images themselves.
            folders = [path for path in top.glob("[!.]*") if path.is_dir()]
            inside = [path for path in folders if path.name != "__MACOSX"]
            if len(inside) != 1 or _count(top):
                raise InputError(
                    f"{archive} unpacks to {missing}: remove it and run again, or name a mirror "
                    "by --url"
                )
            top = inside[0]
        if hasattr(os, "sync"):  # a power cut must not leave the name without the images
            os.sync()
        top.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _missing(folder: Path, source: Source) -> str:
    """Say which subfolder has another number of images than it should; "" if none has."""
    for name, count in source.images.items():
        found = _count(folder / name)
        if found != count:
            return f"{found} images in {Path(source.folder, name)} instead of {count}"
    return ""


def _count(folder: Path) -> int:
    """Return the number of images in a folder, without its subfolders and hidden files."""
    from gsr.io.image import READ_SUFFIXES

    return sum(path.suffix.lower() in READ_SUFFIXES for path in folder.glob("[!.]*"))


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
