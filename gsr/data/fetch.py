"""Archives of pictures from the network: fetched, verified and unpacked, whole or not at all.

A transfer writes NAME.part and, before the first byte, NAME.part.json with what the server says of
the file (ETag, Last-Modified, length). Whatever ends it, the next run asks for the rest on the
condition that the file is still the same (RFC 9110, sections 13.1.5 and 14.2), and starts anew
where it is not. Of an archive only regular files and folders are unpacked, by their names and bytes
alone, into a hidden folder that gets its final name when the pictures in it have been counted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import lzma
import os
import re
import shutil
import ssl
import stat
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from gsr import __version__
from gsr.errors import InputError
from gsr.io.paths import alone, make_folder, usable

TRIES = 5  # in a row that bring nothing new
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 18  # bytes read at once
MAX_MEMBERS = 200_000  # of an archive
SLACK = 64 << 20  # bytes that an archive of pictures may unpack to beyond twice its own size
# What zipfile, tarfile and the decoders below them raise on damaged archives, OSError aside.
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError,
    NotImplementedError, RuntimeError, ValueError, OverflowError,
)  # fmt: skip
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@dataclass(frozen=True)
class Source:
    """One archive and what comes of it."""

    file: str  # name of the archive; below the output folder it is NAME.part unless it is kept
    url: str
    folder: str  # what it becomes, below the output folder
    pictures: dict[str, int]  # how many lie in which subfolder ("" is the folder itself)
    checksum: str  # of the archive, as published: "sha256:HEX" or "md5:HEX"
    size: int | None = None  # bytes of the archive, where published

    @property
    def name(self) -> str:
        return self.file.rpartition(".")[0]


def obtain(
    source: Source,
    output: str | os.PathLike,
    url: str | None = None,
    checksum: bool = True,
    keep: bool = False,
    progress: bool = False,
) -> bool:
    """Make a source's folder below `output`, unless it is there; True if there was work to do.

    An archive that lies in `output` already, brought there by other means, is verified and used.

    Args:
        url: address of the file on a mirror; None: the source's own.
        checksum: False takes a file that is not the published one.
        keep: leave the archive there after unpacking; one that was not fetched always stays.
        progress: show bars on stderr.

    Raises:
        InputError: no network, an answer that is not the file, a wrong checksum, a full disk, a
            damaged archive or one that a picture archive should not be like, an incomplete folder,
            another run at work in `output`.
    """
    output = usable(output)
    folder, archive = output / source.folder, output / source.file
    part = archive.with_name(f"{archive.name}.part")
    if _is_complete(folder, source):
        _remove(part)  # of a run that was killed at its very end
        return False
    make_folder(output)
    make_folder(folder.parent)
    with alone(output, f"another download is at work in {output}; wait until it has ended"):
        if _is_complete(folder, source):  # another run has ended since
            return False
        if archive.is_dir():
            raise InputError(f"{archive} is a folder, and no archive: move it away and run again")
        by_hand = archive.exists()
        packed = archive if by_hand else part
        if not by_hand:
            fetch(url or source.url, part, source.size if checksum else None, progress)
        if checksum:
            verify(packed, source, progress)
        temporary = folder.with_name(f".{folder.name}.gsr-tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        try:
            unpack(packed, temporary / "archive", progress=progress)
            if keep and not by_hand:
                packed = part.replace(archive)
            _settle(temporary / "archive", folder, source, packed)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove(part)
    return True


def _remove(part: Path) -> None:
    for path in (part, _note(part)):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def describe_bytes(count: float) -> str:
    """3530603713 as "3.5 GB"."""
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise InputError unless so many bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder} has {describe_bytes(free)} free, and {what} needs "
            f"{describe_bytes(needed)}: make room, or name a folder on another disk (--output)"
        )


# ---- transfer -----------------------------------------------------------------------------------


def fetch(url: str, part: Path, size: int | None = None, progress: bool = False) -> None:
    """The file at an address into `part`, from where an earlier run stopped.

    Args:
        size: bytes that the file must have; None: what the server says.

    Raises:
        InputError: the address is none, or answers with something else; the network fails so
            often in a row that more tries seem of no use; the disk is full.
    """
    check_address(url)
    failures, most = 0, _length(part)
    with _bar(part.name.removesuffix(".part"), progress) as bar:
        while True:
            try:
                return _transfer(url, part, size, bar)
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"the server answers {error.code} ({_reason(error)})"
                if error.code == 416:  # there is no rest: what came was of another file
                    part.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 425, 429):
                    raise InputError(f"{url}: {reason}; name a mirror by --url") from None
            except (http.client.InvalidURL, UnicodeError) as error:
                raise InputError(f"{url} is no address of a file ({error})") from None
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                reason = _reason(error)
                if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                    raise InputError(
                        f"{url}: the server's certificate is not trusted ({reason}); mend the "
                        "system's certificates, or name a mirror by --url"
                    ) from None
            length = _length(part)
            failures, most = (0 if length > most else failures + 1), max(most, length)
            if failures >= TRIES:
                kept = f"{part} keeps the {describe_bytes(length)} that came" if length else ""
                raise InputError(
                    f"{url} cannot be fetched ({reason}, {TRIES} tries in a row); check the "
                    "network and run again, or name a mirror by --url" + (kept and f" ({kept})")
                )
            wait = min(2**failures, 60)
            if progress:
                bar.write(f"{reason}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def check_address(url: str) -> None:
    """Raise InputError unless this is an address to fetch something from."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise InputError(
            f"{url} is no address that can be fetched: name one like https://server/folder/file"
        )


def _transfer(url: str, part: Path, size: int | None, bar: Any) -> None:
    """One request for what is missing. OSError or HTTPException where another may do better."""
    from gsr.io.image import write_atomic

    note = _read_note(part)
    have = _length(part) if note.get("url") == url else 0
    if have and note["size"] == have:
        return  # an earlier run got all of it
    headers = {"User-Agent": f"gsr/{__version__}", "Accept-Encoding": "identity"}
    # A weak ETag promises no equal bytes. Without any promise nothing can be continued.
    strong = note.get("etag") if not str(note.get("etag")).startswith("W/") else None
    same = strong or note.get("modified")
    if have and same:
        headers |= {"Range": f"bytes={have}-", "If-Range": same}
    else:
        have = 0
    with _opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        told = {"url": url, **_identity(answer)}
        if answer.status == 206 and have:
            start = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
            # Whatever the answer leaves out is as it was.
            changed = any(told[key] not in (None, note[key]) for key in told)
            if changed or not start or int(start[1]) != have:
                part.unlink()
                raise ConnectionError("the file has changed")
            told = note
        else:
            have = 0
        total = told["size"]
        if None not in (size, total) and total != size:
            raise InputError(
                f"{url} has {total:,} bytes and not the published {size:,}: name a mirror by "
                "--url, or take it as it is by --no-checksum"
            )
        most = size if total is None else total
        if most is not None:  # the pictures take about as much once more
            check_space(part.parent, 2 * most - have, part.name.removesuffix(".part"))
        bar.total, bar.n = most, have
        bar.refresh()
        with _writing(part), open(part, "ab" if have else "wb") as file:
            if not have:  # after the old bytes are gone, or a kill would leave them with this note
                write_atomic(_note(part), json.dumps(told).encode())
            while True:
                with _reading():
                    block = answer.read1(BLOCK)
                have += len(block)
                if not block or (most is not None and have > most):
                    break
                file.write(block)
                file.flush()  # what came is kept, whatever comes next
                bar.update(len(block))
            os.fsync(file.fileno())
    if most is not None and have > most:
        part.unlink()
        raise InputError(
            f"{url} sends more than {most:,} bytes, which is all that there should be: name a "
            "mirror by --url" + ("" if size is None else ", or take it as it is by --no-checksum")
        )
    got = _length(part)
    if most is not None and got < most:
        raise ConnectionError(f"the transfer ended after {got:,} of {most:,} bytes")
    if total is None:
        write_atomic(_note(part), json.dumps({**told, "size": got}).encode())


class _Network(Exception):
    """Carries a failure of the network past the handler of failures of the disk."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Network from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except _Network as error:
        raise error.__cause__ from None
    except OSError as error:
        raise InputError(_unwritable(path, error)) from None


def _unwritable(path: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return f"the disk is full at {path}; make room and run again, which goes on from here"
    return f"{path} cannot be written ({error.strerror or error})"


def _opener() -> urllib.request.OpenerDirector:
    """urllib's, without the file, data and FTP addresses that a server might send us to."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _identity(answer: Any) -> dict[str, Any]:
    """What tells a file from its successors: ETag, Last-Modified and length of the whole."""
    length = answer.headers.get("Content-Length")
    if answer.status == 206:
        length = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return {
        "etag": answer.headers.get("ETag"),
        "modified": answer.headers.get("Last-Modified"),
        "size": int(length) if length and length.isdecimal() else None,
    }


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path) -> dict[str, Any]:
    try:
        note = json.loads(_note(part).read_text(encoding="utf-8"))
        promises = [note["etag"], note["modified"]]  # which become headers again
        good = all(p is None or p.isascii() and p.isprintable() for p in promises)
        return note if good and "size" in note else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    words = str(getattr(inner, "strerror", None) or inner).split()
    return " ".join(words) or type(inner).__name__


def _bar(name: str, progress: bool, total: int | None = None) -> Any:
    from tqdm import tqdm

    return tqdm(
        desc=name, total=total, unit="B", unit_scale=True, disable=not progress, file=sys.stderr
    )


# ---- checksums ----------------------------------------------------------------------------------


def verify(path: Path, source: Source, progress: bool = False) -> None:
    """Raise InputError unless a file has the published checksum."""
    kind, _, published = source.checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=kind == "sha256")
    with open(path, "rb") as file, _bar("checksum", progress, _length(path)) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != published:
        raise InputError(
            f"{path} has the {kind} {digest.hexdigest()} and not the published {published}: remove "
            "it to fetch it anew, or take it as it is by --no-checksum"
        )


# ---- unpacking ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    path: Path  # relative
    size: int
    open: Callable[[], IO[bytes]] | None  # None: a folder


def unpack(archive: Path, folder: Path, progress: bool = False) -> None:
    """The files of a zip or plain tar archive into a new folder, without modes, owners or times.

    Everything that names and sizes tell is checked before the first file is written. What is
    refused: absolute paths and such as lead upwards, links of either kind, devices, pipes, sparse
    and encrypted files, a path that comes twice, a file below a file, and more bytes in all than
    twice the archive and 64 MiB, since pictures hardly shrink.

    Raises:
        InputError: any of these, a damaged archive, or a full disk; `folder` may then hold a part.
    """
    with _judged(archive, folder), contextlib.ExitStack() as stack:
        members = list(_members(archive, folder, stack))
        total = sum(member.size for member in members)
        make_folder(folder)
        check_space(folder, total, f"unpacking {archive.name}")
        with _bar("unpack", progress, total) as bar:
            for member in members:
                _write(member, folder, bar)


@contextlib.contextmanager
def _judged(archive: Path, folder: Path) -> Iterator[None]:
    """What goes wrong between an archive and a folder, in a sentence on the one at fault."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if error.errno is None:  # a decoder's
            raise InputError(_damaged(archive, error)) from None
        raise InputError(_unwritable(folder, error)) from None
    except _DAMAGE as error:
        raise InputError(_damaged(archive, error)) from None


def _damaged(archive: Path, error: Exception) -> str:
    return f"{archive} is damaged ({error}); remove it and run again to fetch it anew"


def _members(archive: Path, folder: Path, stack: contextlib.ExitStack) -> Iterator[_Member]:
    limit = 2 * _length(archive) + SLACK
    with open(archive, "rb") as file:
        start = file.read(4)
    if start in (b"PK\3\4", b"PK\5\6"):
        found = _zip_members(archive, stack)
    else:
        found = _tar_members(archive, folder, stack)
    files: set[Path] = set()
    folders: set[Path] = set()
    total = 0
    for count, (name, size, refusal, opened) in enumerate(found, 1):
        total += size
        refusal = refusal or _bad_name(name)
        path = Path(*(part for part in name.split("/") if part not in ("", ".")))
        above = set(path.parents) if opened else {path, *path.parents}
        if not refusal and size < 0:
            refusal = "a file of less than no bytes"
        elif not refusal and opened and not path.parts:
            refusal = "a file without a name"
        elif not refusal and opened and path in files:
            refusal = "a name that comes twice"
        elif not refusal and (above & files or (opened and path in folders)):
            refusal = "a file where a folder is needed"
        if refusal:
            raise InputError(
                f"{archive} holds {name!r}, {refusal}, and nothing of it was unpacked; fetch the "
                "archive from a place that you trust"
            )
        if count > MAX_MEMBERS or total > limit:
            raise InputError(
                f"{archive} would unpack to more than {describe_bytes(limit)} or {MAX_MEMBERS:,} "
                "files, far more than pictures should, and nothing of it was unpacked; fetch the "
                "archive from a place that you trust"
            )
        if opened:
            files.add(path)
        folders |= above
        yield _Member(path, size, opened)


def _zip_members(archive: Path, stack: contextlib.ExitStack) -> Iterator[tuple]:
    file = stack.enter_context(zipfile.ZipFile(archive))
    for info in file.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where no Unix wrote it
        refusal = ""
        if kind == stat.S_IFLNK:
            refusal = "a link"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            refusal = "no regular file"
        elif info.flag_bits & 1:
            refusal = "an encrypted file"
        opened = None if info.filename.endswith("/") else (lambda info=info: file.open(info))
        yield info.filename, info.file_size, refusal, opened


def _tar_members(archive: Path, folder: Path, stack: contextlib.ExitStack) -> Iterator[tuple]:
    file = stack.enter_context(tarfile.open(archive, "r:"))
    for info in file:
        refusal = ""
        if info.issym() or info.islnk():
            refusal = "a link"
        elif info.issparse():
            refusal = "a sparse file"
        elif not (info.isreg() or info.isdir()):
            refusal = "no regular file"
        elif not _bad_name(info.name) and hasattr(tarfile, "data_filter"):
            try:  # Python's own judgement, where this Python has it
                tarfile.data_filter(info, str(folder))
            except tarfile.FilterError as error:
                refusal = str(error)
        opened = None if info.isdir() else (lambda info=info: file.extractfile(info))
        yield info.name, 0 if info.isdir() else info.size, refusal, opened


def _bad_name(name: str) -> str:
    """Why a member must not be written under this name; "" if it may."""
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "an absolute path"
    if ".." in name.split("/"):
        return "a path that leads upwards"
    if "\\" in name or "\0" in name:
        return "a name with a character that no name may have"
    return ""


def _write(member: _Member, folder: Path, bar: Any) -> None:
    target = folder / member.path
    if member.open is None:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with member.open() as stream, open(target, "xb") as file:
        # One byte more than announced, to see that there is none.
        while block := stream.read(min(BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                raise EOFError(f"{member.path} is larger than the archive says")
            file.write(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    if left:
        raise EOFError(f"{member.path} ends {left:,} bytes early")


def _settle(top: Path, folder: Path, source: Source, archive: Path) -> None:
    """Give what was unpacked into `top` its final name, without folders that merely wrap it."""
    unpacked = top
    while lacking := _lacking(top, source):
        inside = [path for path in _visible(top) if path.is_dir()]
        if len(inside) != 1 or _count(top):
            break
        top = inside[0]
    if lacking and list(source.pictures.values()) == [_count(top)]:
        # A mirror with the bare pictures of the one folder that is needed.
        whole = unpacked.with_name("whole")
        inner = whole / next(iter(source.pictures))
        inner.parent.mkdir(parents=True)
        os.rename(top, inner)
        top, lacking = whole, ""
    if lacking:
        raise InputError(
            f"{archive} unpacks to {lacking}, so it is not the archive that it should be; "
            "remove it and run again, or name a mirror by --url"
        )
    os.rename(top, folder)


def _visible(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX"]


def _count(folder: Path) -> int:
    """Pictures in a folder, not below it."""
    from gsr.io.image import READ_SUFFIXES

    paths = _visible(folder) if folder.is_dir() else []
    return sum(path.suffix.lower() in READ_SUFFIXES for path in paths)


def _lacking(folder: Path, source: Source) -> str:
    """The first subfolder with another number of pictures than it should have, in words, or ""."""
    for name, count in source.pictures.items():
        found = _count(folder / name)
        if found != count:
            return f"{found} pictures in {Path(source.folder, name)} instead of {count}"
    return ""


def _is_complete(folder: Path, source: Source) -> bool:
    """Whether a source's folder is there; InputError if it is, and is not what it should be."""
    if folder.is_dir():
        lacking = _lacking(folder, source)
    elif folder.exists():
        lacking = "a file"
    elif folder.is_symlink():
        lacking = "a link that leads nowhere"
    else:
        return False
    if lacking:
        raise InputError(
            f"{folder} is there and not complete ({lacking}): move it away and run again"
        )
    return True
