"""Tables and plot of a comparison, from the rows of comparison.csv; those of docs/comparison.md:

    python -m bench.comparison

The page is made from bench/results/comparison.csv, which `python -m bench.compare` writes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import document
from gsr.cli import guard
from gsr.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "comparison.csv"
PAGE = ROOT / "docs" / "comparison.md"
COSTS = ("parameters", "lr_macs", "hr_macs", "splat_weights", "training_seconds",
         "upscaling_seconds")  # fmt: skip
MEAN = " psnr mean"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, all digits; an empty cell is None or missing."""
    keys = ["method", "finished", "seeds", *COSTS]
    keys += [key for key in dict.fromkeys(key for row in rows for key in row) if key not in keys]
    text = io.StringIO()
    out = csv.DictWriter(text, keys, lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    return text.getvalue()


def text_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows as they are read from CSV."""
    return list(csv.DictReader(io.StringIO(csv_text(rows))))


def columns(rows: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Scales by set: {"Set5": ["x2", ...]}."""
    found: dict[str, list[str]] = {}
    for key in rows[0]:
        if key.endswith(MEAN):
            name, _, scale = key.removesuffix(MEAN).rpartition(" ")
            found.setdefault(name, []).append(scale)
    return found


def tables(rows: Sequence[Mapping[str, str]]) -> str:
    """PSNR of each set, the best in bold and its lead over the next; then what a method costs."""
    blocks = [_quality(rows, name, scales) for name, scales in columns(rows).items()]
    return "\n\n".join([*blocks, _costs(rows)])


def _quality(rows: Sequence[Mapping[str, str]], name: str, scales: list[str]) -> str:
    methods = [[_name(row)] for row in rows]
    lead = ["lead of the best"]
    for scale in scales:
        texts = [row[f"{name} {scale}{MEAN}"] for row in rows]
        best, second, *_ = [*sorted(map(float, filter(None, texts)), reverse=True), None, None]
        lead.append("" if second is None else f"{best - second:.3f}")
        for row, text, cells in zip(rows, texts, methods, strict=True):
            if not text:  # no run is finished, or the PSNR is infinite
                cells.append("")
                continue
            std = row[f"{name} {scale} psnr std"]
            cell = f"{float(text):.2f}" + (f" ± {float(std):.3f}" if std else "")
            cells.append(f"**{cell}**" if float(text) == best else cell)
    return document.table([name, *scales], [*methods, lead])


def _name(row: Mapping[str, str]) -> str:
    done, seeds = row["finished"], row["seeds"]
    return row["method"] + (f" ({done} of {seeds} seeds)" if done != seeds else "")


def _costs(rows: Sequence[Mapping[str, str]]) -> str:
    heads = ["", "parameters", "multiply-adds, LR pixel", "HR pixel", "weights, HR pixel",
             "training, min", "upscaling, s"]  # fmt: skip
    lines = []
    for row in rows:
        *counts, training, upscaling = (row[key] for key in COSTS)
        lines.append(
            [row["method"]]
            + [f"{float(count):,.0f}" if count else "" for count in counts]
            + [f"{float(training) / 60:,.0f}" if training else ""]
            + [f"{float(upscaling):.3f}" if upscaling else ""]
        )
    return document.table(heads, lines)


def plot(rows: Sequence[Mapping[str, str]], plt: Any) -> bytes:
    """PSNR above bicubic against scale, a panel a set, a line a method with its spread: PNG."""
    sets = columns(rows)
    figure, panels = plt.subplots(
        1, len(sets), figsize=(1 + 4 * len(sets), 3.8), layout="constrained", squeeze=False
    )
    for axes, (name, scales) in zip(panels[0], sets.items(), strict=True):
        for row in rows[1:]:
            points = gains(row, rows[0], name, scales=scales)
            axes.errorbar(
                *zip(*points, strict=True) if points else ([], []), fmt="o-", ms=4, lw=1.2,
                capsize=3, label=row["method"],
            )  # fmt: skip
        axes.set_xticks([float(scale[1:]) for scale in scales], scales)
        axes.set(title=name, xlabel="scale", ylabel="PSNR above bicubic, dB")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    plt.close(figure)
    return buffer.getvalue()


def gains(
    row: Mapping[str, str], bicubic: Mapping[str, str], name: str, *, scales: Sequence[str]
) -> list[tuple[float, float, float]]:
    """(scale, mean above bicubic, standard deviation) where both are known, by scale."""
    points = []
    for scale in scales:
        mean, base = (method[f"{name} {scale}{MEAN}"] for method in (row, bicubic))
        if mean and base:
            std = float(row[f"{name} {scale} psnr std"] or 0)
            points.append((float(scale[1:]), float(mean) - float(base), std))
    return sorted(points)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables of docs/comparison.md."""
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
