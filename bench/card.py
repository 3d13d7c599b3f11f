"""Write the figures of a report of evaluate.py into the documents that show them.

    python -m bench.card

Each document has a pair of marks, `<!-- figures -->` and `<!-- /figures -->`; what stands between
them is replaced by tables made from bench/results/gsr-lite.json.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "bench" / "results" / "gsr-lite.json"
DOCUMENTS = [ROOT / "README.md", ROOT / "gsr" / "weights" / "gsr-lite" / "README.md"]
MARKS = ("<!-- figures -->", "<!-- /figures -->")

# Y-PSNR of fixed-scale networks, one trained for each scale (VDSR: one for all three).
PUBLISHED = {
    "FSRCNN (Dong et al., ECCV 2016)": {"Set5": {2: 37.00, 3: 33.16, 4: 30.71}},
    "VDSR (Kim et al., CVPR 2016)": {
        "Set5": {2: 37.53, 3: 33.66, 4: 31.35},
        "Set14": {2: 33.03, 3: 29.77, 4: 28.01},
        "B100": {2: 31.90, 3: 28.82, 4: 27.29},
    },
}


def tables(report: dict) -> str:
    """One Markdown table a data set: PSNR and, for what was measured here, SSIM at every scale."""
    blocks = []
    for data in report["sets"]:
        scales = data["scales"]
        lines = [
            f"| {data['name']} | " + " | ".join(f"x{row['scale']:g}" for row in scales) + " |",
            "|---|" + "---|" * len(scales),
        ]
        for method, label in (("bicubic", "bicubic"), ("model", "**gsr-lite**")):
            cells = [row["methods"][method] for row in scales]
            lines.append(
                f"| {label} | "
                + " | ".join(f"{cell['psnr']:.2f} / {cell['ssim']:.4f}" for cell in cells)
                + " |"
            )
        for label, sets in PUBLISHED.items():
            if data["name"] in sets:
                known = sets[data["name"]]
                cells = [
                    f"{known[row['scale']]:.2f}" if row["scale"] in known else "" for row in scales
                ]
                lines.append(f"| {label}, published | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def fill(text: str, report: dict) -> str:
    """The document with its figures made anew."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{tables(report)}\n{MARKS[1]}{after}"


def main() -> None:
    report = json.loads(REPORT.read_text())
    for path in DOCUMENTS:
        path.write_text(fill(path.read_text(), report))


if __name__ == "__main__":
    main()
