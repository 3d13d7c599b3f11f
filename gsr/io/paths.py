"""Paths that users name, checked before anything is done with them, and texts that hold them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gsr.errors import InputError

StrPath = str | os.PathLike[str]


def check_path(path: StrPath) -> Path:
    """Return the path, there or not; its `exists` and `is_dir` do not raise then.

    Raises InputError if the operating system refuses it: a name that is too long, a folder on the
    way that may not be searched, a NUL character.
    """
    path = Path(path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: this path cannot be used ({reason}); name another") from None
    return path


def make_folder(folder: StrPath) -> Path:
    """Make a folder, and those above it, unless it is there; InputError if it takes no files."""
    folder = check_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be made ({error.strerror}); choose another"
        ) from None
    check_takes_files(folder)
    return folder


def check_takes_files(folder: Path) -> None:
    """Raise InputError unless a file can be made in this folder, by making one without a name."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"the folder {folder} may not be written to ({error.strerror}); choose another"
        ) from None


def as_text(text: str) -> bytes:
    """Encode as UTF-8; what is none, as names of files can be, becomes an escape."""
    return text.encode(errors="backslashreplace")


def as_json(report: Any) -> bytes:
    """Encode as JSON, see `as_text`; a reader gets names that are no UTF-8 back."""
    return as_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


_held: list[int] = []  # handles of the folders that are held


@contextmanager
def lock_folder(folder: Path, refusal: str) -> Generator[None]:
    """Hold a folder against other runs, where the system has such locks; a kill releases it.

    Raises InputError with the sentence `refusal` if another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    _held.append(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


def _release() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    # A forked process has the handle too, and might hold the folder for longer than a killed run.
    os.register_at_fork(after_in_child=_release)
