"""Write the figures of a report of evaluate.py into the documents that show them.

    python -m bench.card

Each document has a pair of marks, `<!-- figures -->` and `<!-- /figures -->`; what stands between
them is replaced by tables made from bench/results/gsr-lite.json, a report on the bundled weights:

    python evaluate.py --data FOLDER ... --output bench/results/gsr-lite.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import document
from bench.tables import published, published_cells, table_row
from gsr.cli import guard
from gsr.describe import describe_model
from gsr.errors import InputError
from gsr.evaluation import cell
from gsr.models.checkpoint import load

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "bench" / "results" / "gsr-lite.json"
DOCUMENTS = [ROOT / "README.md", ROOT / "gsr" / "weights" / "gsr-lite" / "README.md"]


def tables(report: dict) -> str:
    """One Markdown table a data set: PSNR and, for what was measured here, SSIM at every scale."""
    blocks = []
    for data in report["sets"]:
        scales = data["scales"]
        lines = [
            table_row(data["name"], *(f"x{row['scale']:g}" for row in scales)),
            "|---|" + "---|" * len(scales),
        ]
        for method, label in (("bicubic", "bicubic"), ("lite", "**gsr-lite**")):
            cells = [cell(row["methods"][method], ("psnr", "ssim")) for row in scales]
            lines.append(table_row(label, *cells))
        for label, known in published(data, report["protocol"]):
            lines.append(table_row(f"{label}, published", *published_cells(known, scales)))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def check(report: dict[str, Any]) -> None:
    """Raise InputError unless the report is of the protocol `benchmark` and the bundled weights."""
    protocol = report["protocol"]
    name = protocol["name"] + (", of degraded LR" if "degradation" in protocol else "")
    if name != "benchmark":
        raise InputError(f"{REPORT.name}: its protocol is {name}; use evaluate.py's default")
    if list(report["models"]) != ["lite"]:
        raise InputError(
            f"{REPORT.name}: its models are {', '.join(report['models'])}; measure lite alone"
        )
    want, have = describe_model(load(), "lite")["sha256"], report["models"]["lite"]["sha256"]
    if have != want:
        raise InputError(
            f"{REPORT.name}: the weights measured (sha256 {have[:12]}) are not the bundled ones "
            f"({want[:12]}); measure these with evaluate.py, without --checkpoint"
        )


def main(argv: Sequence[str] | None = None) -> None:
    try:
        report = json.loads(REPORT.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{REPORT} must be a report of evaluate.py, but: {error}") from None
    check(report)
    for path in DOCUMENTS:
        document.read(path, "figures")  # before either is written
    for path in DOCUMENTS:
        document.put(path, "figures", tables(report))


if __name__ == "__main__":
    guard(main)
