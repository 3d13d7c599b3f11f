"""Markdown tables, in documents between a pair of marks, `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from gsr.errors import InputError
from gsr.io.image import write_atomic


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of these cells."""
    lines = [
        "| " + " | ".join(text.replace("|", r"\|") for text in cells) + " |"
        for cells in (head, *rows)
    ]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


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
    start, stop = _marks(name)
    before, rest = read(document, name).split(start)
    _, after = rest.split(stop)
    write_atomic(document, f"{before}{start}\n{table}\n{stop}{after}".encode())


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- /{name} -->"
