"""docs/paper.md names code that is there."""

import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")


def found(name):
    """What a full name such as gsr.losses.l1 means; AttributeError if nothing."""
    words = name.split(".")
    for count in range(len(words), 0, -1):
        try:
            thing = import_module(".".join(words[:count]))
        except ImportError:
            continue
        for word in words[count:]:
            thing = getattr(thing, word)
        return thing
    raise AttributeError(name)


def test_all_names_are_there():
    names = re.findall(r"`(gsr\.[\w.]+)`", PAGE)
    assert len(names) > 20
    for name in names:
        found(name)


def test_all_files_are_there():
    files = re.findall(r"`(\w+/\w+\.py)`", PAGE) + re.findall(r"\]\(\.\./(\S+)\)", PAGE)
    assert files and all((ROOT / file).is_file() for file in files)
