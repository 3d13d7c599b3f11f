"""Write the figures of a report of evaluate.py into the documents that show them.

    python -m bench.card

Each document has a pair of marks, `<!-- figures -->` and `<!-- /figures -->`; what stands between
them is replaced by tables made from bench/results/gsr-lite.json, a report on the bundled weights:

    python evaluate.py --data FOLDER ... --output bench/results/gsr-lite.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import document
from bench.tables import check_weights, published, published_cells, read_report
from gsr.cli import guard
from gsr.errors import InputError
from gsr.evaluation import cell

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "bench" / "results" / "gsr-lite.json"
DOCUMENTS = [ROOT / "README.md", ROOT / "gsr" / "weights" / "gsr-lite" / "README.md"]


def tables(report: dict[str, Any]) -> str:
    """One Markdown table a data set: PSNR and, for what was measured here, SSIM at every scale."""
    blocks = []
    for data in report["sets"]:
        scales, rows = data["scales"], []
        for method, label in (("bicubic", "bicubic"), ("lite", "**gsr-lite**")):
            rows.append([label, *(cell(s["methods"][method], ("psnr", "ssim")) for s in scales)])
        for label, known in published(data, report["protocol"]):
            rows.append([f"{label}, published", *published_cells(known, scales)])
        head = [data["name"], *(f"x{row['scale']:g}" for row in scales)]
        blocks.append(document.table(head, rows))
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
    check_weights(report, REPORT, "lite")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables into the documents."""
    report = read_report(REPORT)
    check(report)
    for path in DOCUMENTS:
        document.read(path, "figures")  # before either is written
    for path in DOCUMENTS:
        document.put(path, "figures", tables(report))


if __name__ == "__main__":
    guard(main)
