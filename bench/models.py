"""Tables and plots of the bundled models, for docs/models.md and the card of gsr-photo.

    python -m bench.models

They are made from reports of evaluate.py in bench/results/models: `clean.json`, and one
`jpeg-QUALITY.json` for every JPEG quality:

    python evaluate.py --checkpoint lite photo --data Set5 Set14 B100 --scale 2 3 4 \
        --output bench/results/models/clean.json
    python evaluate.py --checkpoint lite photo --data B100 --scale 2 4 --jpeg 75 \
        --output bench/results/models/jpeg-75.json
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import document
from bench.plot import pyplot
from bench.tables import check_weights, read_report
from gsr.cli import guard
from gsr.evaluation import cell
from gsr.io.image import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "models"
PAGE = ROOT / "docs" / "models.md"
CARD = ROOT / "gsr" / "weights" / "gsr-photo" / "README.md"
IMAGES = ROOT / "docs" / "images"
NAMES = {"bicubic": "bicubic", "lite": "gsr-lite", "photo": "gsr-photo"}


def read_reports() -> tuple[dict, dict[int, dict]]:
    """Read the clean report, and those of JPEG by quality, best first.

    Raises:
        InputError: there is none, or one is not of the bundled weights.
    """
    reports = {}
    for path in [RESULTS / "clean.json", *RESULTS.glob("jpeg-*.json")]:
        reports[path.stem] = read_report(path)
        check_weights(reports[path.stem], path, "lite", "photo")
    clean = reports.pop("clean")
    by_quality = {r["protocol"]["degradation"]["jpeg"]: r for r in reports.values()}
    return clean, dict(sorted(by_quality.items(), reverse=True))


def clean_tables(report: dict) -> str:
    """PSNR and SSIM of both models at every scale, a table a set."""
    blocks = []
    for data in report["sets"]:
        scales = data["scales"]
        blocks.append(document.table(
            [data["name"], *(f"x{row['scale']:g}" for row in scales)],
            [[name, *(cell(row["methods"][key], ("psnr", "ssim")) for row in scales)]
             for key, name in NAMES.items()],
        ))  # fmt: skip
    return "\n\n".join(blocks)


def psnr(report: dict, scale: float, method: str) -> float:
    """Mean PSNR of a method on the report's only set at a scale."""
    (data,) = report["sets"]
    return next(r["methods"][method]["psnr"] for r in data["scales"] if r["scale"] == scale)


def gain(report: dict, scale: float, model: str) -> float:
    return psnr(report, scale, model) - psnr(report, scale, "bicubic")


def only(report: dict, name: str) -> dict:
    """A report with one of its sets."""
    return {**report, "sets": [data for data in report["sets"] if data["name"] == name]}


def jpeg_table(clean: dict, jpeg: dict[int, dict]) -> str:
    """Gain over bicubic on B100 by JPEG quality: rows are scales and models."""
    columns = {"clean": only(clean, "B100"), **{f"quality {q}": r for q, r in jpeg.items()}}
    rows = [
        [f"x{scale}, {NAMES[model]}", *(f"{gain(r, scale, model):+.2f}" for r in columns.values())]
        for scale in (2, 4)
        for model in ("lite", "photo")
    ]
    return document.table(["B100, gain over bicubic, dB", *columns], rows)


def png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, dpi=100, bbox_inches="tight")
    return file.getvalue()


def plots(clean: dict, jpeg: dict[int, dict]) -> dict[str, bytes]:
    """PNG files by name: PSNR against scale, gain against JPEG quality, gain against time."""
    plt, found = pyplot(), {}
    figure, axes = plt.subplots(figsize=(6, 4))
    data = only(clean, "B100")["sets"][0]["scales"]
    for key, name in NAMES.items():
        points = [(row["scale"], row["methods"][key]["psnr"]) for row in data]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="scale", ylabel="PSNR (Y), dB", title="B100, clean bicubic LR")
    axes.legend()
    found["models_scale.png"] = png(figure)

    figure, axes = plt.subplots(figsize=(6, 4))
    for scale, style in ((2, "-"), (4, "--")):
        for model in ("lite", "photo"):
            points = [(q, gain(r, scale, model)) for q, r in jpeg.items()]
            axes.plot(
                *zip(*points, strict=True), style, marker="o", label=f"{NAMES[model]}, x{scale}"
            )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.invert_xaxis()
    axes.set(xlabel="JPEG quality of LR", ylabel="gain over bicubic, dB", title="B100")
    axes.legend()
    found["models_jpeg.png"] = png(figure)

    figure, axes = plt.subplots(figsize=(6, 4))
    data = only(clean, "B100")["sets"][0]
    row = next(r for r in data["scales"] if r["scale"] == 4)
    for key, name in NAMES.items():
        method = row["methods"][key]
        axes.plot(method["seconds"] / data["images"], method["psnr"], "o", label=name)
    axes.set(xscale="log", xlabel="CPU seconds an image", ylabel="PSNR (Y), dB", title="B100, x4")
    axes.legend()
    found["models_time.png"] = png(figure)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    clean, jpeg = read_reports()
    tables: dict[tuple[Path, str], Any] = {
        (PAGE, "clean"): clean_tables(clean),
        (PAGE, "jpeg"): jpeg_table(clean, jpeg),
        (CARD, "jpeg"): jpeg_table(clean, jpeg),
    }
    for path, name in tables:
        document.read(path, name)  # before anything is written
    for (path, name), text in tables.items():
        document.put(path, name, text)
    for name, content in plots(clean, jpeg).items():
        write_atomic(IMAGES / name, content)


if __name__ == "__main__":
    guard(main)
