"""Write the tables of a comparison of methods into docs/comparison.md.

    python -m bench.comparison

They are made from bench/results/comparison.csv, which `python -m bench.compare` writes.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from bench import document
from bench.tables import table_row
from gsr.cli import guard
from gsr.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "comparison.csv"
PAGE = ROOT / "docs" / "comparison.md"
MEAN = " psnr mean"


def tables(rows: Sequence[dict[str, str]]) -> str:
    """PSNR of each set, the best in bold and its lead over the next; then what a method costs."""
    columns = [key.removesuffix(MEAN).split(" ") for key in rows[0] if key.endswith(MEAN)]
    blocks = [
        _quality(rows, name, [scale for other, scale in columns if other == name])
        for name in dict.fromkeys(name for name, _ in columns)
    ]
    return "\n\n".join([*blocks, _costs(rows)])


def _quality(rows: Sequence[dict[str, str]], name: str, scales: list[str]) -> str:
    methods = [[row["method"]] for row in rows]
    lead = ["lead of the best"]
    for scale in scales:
        means = [float(row[f"{name} {scale}{MEAN}"]) for row in rows]
        first, second = sorted(means, reverse=True)[:2]
        lead.append(f"{first - second:.3f}")
        for row, mean, cells in zip(rows, means, methods, strict=True):
            std = row[f"{name} {scale} psnr std"]
            text = f"{mean:.2f}" + (f" ± {float(std):.3f}" if std else "")
            cells.append(f"**{text}**" if mean == first else text)
    return _table([name, *scales], [*methods, lead])


def _costs(rows: Sequence[dict[str, str]]) -> str:
    heads = ["", "parameters", "multiply-adds, LR pixel", "HR pixel", "weights, HR pixel",
             "training, min", "upsampling, s"]  # fmt: skip
    keys = {"parameters": 1, "lr_macs": 1, "hr_macs": 1, "splat_weights": 1, "training_seconds": 60}
    return _table(
        heads,
        [
            [row["method"]]
            + [f"{float(row[key]) / unit:,.0f}" if row[key] else "" for key, unit in keys.items()]
            + [f"{float(row['upscaling_seconds']):.3f}" if row["upscaling_seconds"] else ""]
            for row in rows
        ],
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(table_row(*line) for line in [head, ["---"] * len(head), *rows])


def main(argv: Sequence[str] | None = None) -> None:
    try:
        with open(RESULT, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise InputError(f"{RESULT} must be what bench.compare wrote, but: {error}") from None
    if len(rows) < 2 or any(row["finished"] not in ("", row["seeds"]) for row in rows):
        raise InputError(f"{RESULT}: some runs are not finished; run bench.compare again")
    document.put(PAGE, "comparison", tables(rows))


if __name__ == "__main__":
    guard(main)
