"""Tables in documents, each between a pair of marks, `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

from pathlib import Path

from gsr.errors import InputError
from gsr.io.image import write_atomic


def read(document: Path, name: str) -> str:
    """A Markdown file's text; InputError unless it has that pair of marks once."""
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{document} must be a page with marks, but: {error}") from None
    if [text.count(mark) for mark in _marks(name)] != [1, 1]:
        both = " and ".join(_marks(name))
        raise InputError(f"{document} must hold {both}, once each; add them")
    return text


def put(document: Path, name: str, table: str) -> None:
    """Replace what stands between the marks."""
    first, last = _marks(name)
    before, rest = read(document, name).split(first)
    _, after = rest.split(last)
    write_atomic(document, f"{before}{first}\n{table}\n{last}{after}".encode())


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- /{name} -->"
