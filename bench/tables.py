"""Tables of a report of evaluate.py: Markdown beside the literature, or every image as CSV.

    python -m bench.tables evaluation.json [--csv]

Nothing is computed here. What papers state is in `PUBLISHED`, and nowhere else.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import document
from gsr.cli import guard
from gsr.describe import describe_model
from gsr.errors import InputError
from gsr.evaluation import cell, column, count_images, metric_names, metrics_of, notes
from gsr.models.checkpoint import load

# ---- the literature -----------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedRow:
    """A row of a paper's table: PSNR in dB, by set and scale, as printed there."""

    name: str
    source: str
    protocol: str  # of gsr.metrics, the nearest to the paper's; see CAVEATS
    psnr: dict[str, dict[int, float]]

    @property
    def label(self) -> str:
        return f"{self.name} ({self.source})"


def _div2k(name: str, source: str, *psnr: float) -> PublishedRow:
    scales = (2, 3, 4, 6, 12, 18, 24, 30)
    return PublishedRow(
        name, source, "div2k", {"DIV2K_valid": dict(zip(scales, psnr, strict=False))}
    )


PUBLISHED = (
    # Networks for luma at whole scales, one trained for each (VDSR: one for all three).
    PublishedRow(
        "FSRCNN", "Dong et al., ECCV 2016", "benchmark", {"Set5": {2: 37.00, 3: 33.16, 4: 30.71}}
    ),
    PublishedRow(
        "VDSR",
        "Kim et al., CVPR 2016",
        "benchmark",
        {
            "Set5": {2: 37.53, 3: 33.66, 4: 31.35},
            "Set14": {2: 33.03, 3: 29.77, 4: 28.01},
            "B100": {2: 31.90, 3: 28.82, 4: 27.29},
        },
    ),
    # Networks for any scale, all with the encoder EDSR-baseline.
    _div2k(
        "bicubic", "Chen et al., CVPR 2021, Table 1",
        31.01, 28.22, 26.66, 24.82, 22.27, 21.00, 20.19, 19.59,
    ),
    _div2k(
        "LIIF", "Chen et al., CVPR 2021, Table 1",
        34.67, 30.96, 29.00, 26.75, 23.71, 22.17, 21.18, 20.48,
    ),
    _div2k(
        "LTE", "Lee & Jin, CVPR 2022, Table 1",
        34.72, 31.02, 29.04, 26.81, 23.78, 22.23, 21.24, 20.53,
    ),
    _div2k("Thera Air", "Becker et al., 2025", 34.75, 31.09, 29.10, 26.84, 23.80),
    PublishedRow(
        "GaussianSR", "Hu et al., AAAI 2025", "div2k", {"DIV2K_valid": {2: 34.61, 4: 29.01}}
    ),
)  # fmt: skip
# What the legend says of a protocol's rows.
CAVEATS = {
    "benchmark": "The published networks downsample and upsample luma alone: their figures are "
    "near to this protocol's, not of it.",
    "div2k": "The published networks have the encoder EDSR-baseline. Beyond x4 their papers made "
    "LR with other bicubic code than ours; the two rows of bicubic show how much that matters. "
    "GaussianSR's paper trained its rivals anew: its row is on another footing than theirs.",
}
# How many images a set has, and what its folder may be called besides.
IMAGES = {"Set5": 5, "Set14": 14, "B100": 100, "DIV2K_valid": 100}
ALIASES = {"bsd100": "B100", "bsds100": "B100", "div2k_valid_hr": "DIV2K_valid"}


def published(
    data: Mapping[str, Any], protocol: Mapping[str, Any]
) -> list[tuple[str, dict[int, float]]]:
    """Return (label, PSNR by scale) of the published rows that fit a measured set.

    Args:
        data: one of a report's "sets". The literature fits its name (in any case) if it has all
            the images: the mean over some of them would be of something else.
        protocol: a report's "protocol". Nothing fits LR that was degraded.
    """
    known = {name.lower(): name for name in IMAGES} | ALIASES
    name = known.get(data["name"].lower())
    if name is None or data["images"] != IMAGES[name] or "degradation" in protocol:
        return []
    return [
        (row.label, row.psnr[name])
        for row in PUBLISHED
        if row.protocol == protocol["name"] and name in row.psnr
    ]


# ---- tables -------------------------------------------------------------------------------------


def csv_text(report: Mapping[str, Any]) -> str:
    """Return every figure of a report as CSV: a row a set, scale, method and image.

    All digits, in the order in which they were measured; an infinite PSNR is inf.
    """
    first = next(iter(report["sets"][0]["scales"][0]["methods"].values()))
    metrics = list(next(iter(first["images"].values())))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["set", "scale", "shave", "lr", "method", "image", *metrics])
    for data in report["sets"]:
        for row in data["scales"]:
            where = [data["name"], row["scale"], row["shave"], row["lr"]]
            for method, values in row["methods"].items():
                for image, found in values["images"].items():
                    figures = ["inf" if found[key] is None else repr(found[key]) for key in metrics]
                    writer.writerow([*where, method, image, *figures])
    return file.getvalue()


def markdown(report: Mapping[str, Any]) -> str:
    """Return a Markdown table a data set: what was measured, then what papers state.

    An empty cell is a figure that is not entered here. What the figures mean stands below.
    """
    protocol, metrics = report["protocol"], metrics_of(report)
    names = metric_names(report, " in dB")
    blocks, quoted = [], False
    for data in report["sets"]:
        scales = data["scales"]
        head = f"{data['name']}, {count_images(data)}: {names}"
        rows = []
        for method in scales[0]["methods"]:
            label = method if method == "bicubic" else f"**{method}**"
            cells = [cell(row["methods"][method], metrics) for row in scales]
            rows.append([label, "measured", *cells])
        for label, known in published(data, protocol):
            quoted = True
            rows.append([label, "published", *published_cells(known, scales)])
        blocks.append(document.table([head, "figures", *map(column, scales)], rows))
    return "\n\n".join([*blocks, _legend(report, quoted)]) + "\n"


def published_cells(known: Mapping[int, float], scales: list[Mapping[str, Any]]) -> list[str]:
    """PSNR of a published row at a report's scales; empty where it is not entered here."""
    return [f"{known[row['scale']]:.2f}" if row["scale"] in known else "" for row in scales]


def _legend(report: Mapping[str, Any], quoted: bool) -> str:
    protocol = report["protocol"]
    text = [
        f"measured: protocol `{protocol['name']}`, means over the images, {protocol['shave']} "
        "pixels shaved on each side, images not rounded to 8 bits, SSIM of luma.",
        *(
            f"{label}: mode {model['mode']}, {model['parameters']:,} parameters, sha256 "
            f"{model['sha256'][:12]}."
            for label, model in report["models"].items()
        ),
        *(f"{note}." for note in notes(report)),
    ]
    if "ensemble" in protocol:
        text.append(f"With +: {protocol['ensemble']}.")
    if quoted:
        text += [
            "published: PSNR as the cited paper prints it, not measured here; an empty cell is not "
            "entered here.",
            CAVEATS[protocol["name"]],
        ]
    return " ".join(text)


# ---- reports ------------------------------------------------------------------------------------


def read_report(path: Path) -> dict[str, Any]:
    """What evaluate.py wrote; InputError if it is not there, or is not JSON."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} must be a report of evaluate.py, but: {error}") from None


def check_weights(report: Mapping[str, Any], path: Path, *names: str) -> None:
    """Raise InputError unless the report is of the bundled models of these names, as they are."""
    for name in names:
        want = describe_model(load(name), name)["sha256"]
        have = report["models"].get(name, {}).get("sha256", "none")
        if have != want:
            raise InputError(
                f"{path}: the weights measured as {name} (sha256 {have[:12]}) are not the bundled "
                f"ones ({want[:12]}); measure again"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of a report."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("report", type=Path, help="what evaluate.py wrote")
    parser.add_argument("--csv", action="store_true", help="every image's figures, as CSV")
    args = parser.parse_args(argv)
    sys.stdout.write((csv_text if args.csv else markdown)(read_report(args.report)))


if __name__ == "__main__":
    guard(main)
