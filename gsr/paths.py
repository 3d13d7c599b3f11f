"""Paths that users name, checked before anything is done with them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gsr.errors import InputError


def usable(path: str | os.PathLike) -> Path:
    """The path, whether or not anything is there; its `exists` and `is_dir` do not raise then.

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


def make_folder(folder: str | os.PathLike) -> Path:
    """Make a folder, and those above it, unless it is there; InputError if it takes no files."""
    folder = usable(folder)
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
