"""The import rule: a module imports only from its own layer's package and from layers below."""

import ast
from pathlib import Path

import pytest

GSR = Path(__file__).parents[1] / "gsr"
# From the bottom up; what stands in one line does not import each other.
LAYERS = [
    ("errors",), ("io", "parts"), ("schema",), ("config",), ("device",), ("kernels", "ops"),
    ("models",), ("inference",),
    ("distributed", "losses", "metrics", "optim"), ("data",), ("graphs",), ("describe", "sheet"),
    ("viz",), ("evaluation", "runs"), ("plan",), ("batch",), ("cli",),
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path):
    """Names directly below gsr that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "gsr":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gsr."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("gsr."))


@pytest.mark.parametrize("path", sorted(GSR.rglob("*.py")), ids=lambda p: str(p.relative_to(GSR)))
def test_imports_go_down(path):
    own = path.relative_to(GSR).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for name in set(imported(path)) - {"__version__", own}:
        assert LEVEL[name] < LEVEL[own] or (own, name) == ("ops", "kernels"), f"imports gsr.{name}"
