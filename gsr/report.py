"""What a paper shows of a report of `gsr.evaluation`: tables beside the literature, and crops.

`csv_text` lists every picture, `markdown` sets the means beside what papers state for the same set
and protocol (`PUBLISHED`), and `figure` draws crops of one picture side by side. All of them only
arrange: no number is computed here but where methods differ most.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# ---- the literature -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A row of somebody's table: PSNR in dB, by set and scale, as printed there."""

    name: str
    source: str
    protocol: str  # of gsr.metrics, the nearest to the paper's; see CAVEATS
    psnr: dict[str, dict[int, float]]

    @property
    def label(self) -> str:
        return f"{self.name} ({self.source})"


DIV2K_SCALES = (2, 3, 4, 6, 12, 18, 24, 30)


def _div2k(name: str, source: str, *psnr: float) -> Published:
    return Published(
        name, source, "div2k", {"DIV2K_valid": dict(zip(DIV2K_SCALES, psnr, strict=False))}
    )


PUBLISHED = (
    # Networks for luma at whole scales, one trained for each (VDSR: one for all three).
    Published(
        "FSRCNN", "Dong et al., ECCV 2016", "benchmark", {"Set5": {2: 37.00, 3: 33.16, 4: 30.71}}
    ),
    Published(
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
    Published("GaussianSR", "Hu et al., AAAI 2025", "div2k", {"DIV2K_valid": {2: 34.61, 4: 29.01}}),
)  # fmt: skip
# What the legend says of a protocol's rows.
CAVEATS = {
    "benchmark": "The published networks reduce and enlarge luma alone: their figures are near to "
    "this protocol's, not of it.",
    "div2k": "The published networks have the encoder EDSR-baseline. Beyond x4 their papers made "
    "LR with other bicubic code than ours; the two rows of bicubic show how much that matters. "
    "GaussianSR's paper trained its rivals anew: its row is on another footing than theirs.",
}
# How many pictures a set has, and what its folder may be called besides.
PICTURES = {"Set5": 5, "Set14": 14, "B100": 100, "DIV2K_valid": 100}
ALIASES = {"bsd100": "B100", "bsds100": "B100", "div2k_valid_hr": "DIV2K_valid"}


def published(data: Mapping[str, Any], protocol: str) -> list[tuple[str, dict[int, float]]]:
    """(label, PSNR by scale) of every published row that a measured set can stand beside.

    Args:
        data: one of a report's "sets". The literature fits its name (in any case) if it has all
            the pictures: the mean over some of them would be of something else.
        protocol: "benchmark" or "div2k".
    """
    known = {name.lower(): name for name in PICTURES} | ALIASES
    name = known.get(data["name"].lower())
    if name is None or data["pictures"] != PICTURES[name]:
        return []
    return [
        (row.label, row.psnr[name])
        for row in PUBLISHED
        if row.protocol == protocol and name in row.psnr
    ]


# ---- tables -------------------------------------------------------------------------------------


def metrics_of(report: Mapping[str, Any]) -> list[str]:
    """The metrics that tables show: psnr, ssim, and lpips and dists where they were measured."""
    return ["psnr", "ssim", *report["protocol"].get("perceptual", {})]


def cell(values: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Means of a method at a scale as text: "33.68 / 0.9306"."""
    return " / ".join(
        ("inf" if values[key] is None else f"{values[key]:.2f}")
        if key == "psnr"
        else f"{values[key]:.4f}"
        for key in metrics
    )


MADE = "*: LR made from HR by imresize, not the data set's own"


def column(row: Mapping[str, Any]) -> str:
    """A scale as the head of a column: "x3", or "x3*" where LR was made from HR."""
    return f"x{row['scale']:g}" + ("*" if row["lr"] == "imresize" else "")


def made_lr(report: Mapping[str, Any]) -> bool:
    """Whether LR was made from HR anywhere in a report."""
    return any(row["lr"] == "imresize" for data in report["sets"] for row in data["scales"])


def csv_text(report: Mapping[str, Any]) -> str:
    """Every number of a report as CSV: a row for each set, scale, method and picture.

    All digits, in the order in which they were measured; an infinite PSNR is inf. A model is called
    by its checkpoint.
    """
    called = _names(report)
    first = next(iter(report["sets"][0]["scales"][0]["methods"].values()))
    metrics = list(next(iter(first["images"].values())))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["set", "scale", "shave", "lr", "method", "picture", *metrics])
    for data in report["sets"]:
        for row in data["scales"]:
            for method, values in row["methods"].items():
                for picture, image in values["images"].items():
                    numbers = ["inf" if image[key] is None else repr(image[key]) for key in metrics]
                    where = [data["name"], row["scale"], row["shave"], row["lr"]]
                    writer.writerow([*where, called.get(method, method), picture, *numbers])
    return file.getvalue()


def markdown(report: Mapping[str, Any]) -> str:
    """One Markdown table a data set: what was measured, then what papers state, at every scale.

    A model is called by its checkpoint. An empty cell is a figure that is not entered here. Below
    the tables stands what the figures mean.
    """
    protocol, metrics = report["protocol"], metrics_of(report)
    names = " / ".join(
        f"PSNR {protocol['psnr']['colour']} in dB" if key == "psnr" else key.upper()
        for key in metrics
    )
    called, blocks, quoted = _names(report), [], False
    for data in report["sets"]:
        scales = data["scales"]
        count = f"{data['pictures']} picture{'s' if data['pictures'] > 1 else ''}"
        head = f"{data['name']}, {count}: {names}"
        lines = [table_row(head, "figures", *map(column, scales))]
        lines.append("|---" * (2 + len(scales)) + "|")
        for method in scales[0]["methods"]:
            label = f"**{called[method]}**" if method in called else method
            cells = [cell(row["methods"][method], metrics) for row in scales]
            lines.append(table_row(label, "measured", *cells))
        for label, known in published(data, protocol["name"]):
            quoted = True
            cells = [
                f"{known[row['scale']]:.2f}" if row["scale"] in known else "" for row in scales
            ]
            lines.append(table_row(label, "published", *cells))
        blocks.append("\n".join(lines))
    blocks.append(_legend(report, quoted))
    return "\n\n".join(blocks) + "\n"


def table_row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(text.replace("|", r"\|") for text in cells) + " |"


def _models(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a report says of every model, by the label of its rows."""
    return report["models"] if "models" in report else {"model": report["model"]}


def _names(report: Mapping[str, Any]) -> dict[str, str]:
    """What the models' rows are called, by label."""
    called = {label: model["checkpoint"] for label, model in _models(report).items()}
    return called | {f"{label}+": f"{name}+" for label, name in called.items()}


def _legend(report: Mapping[str, Any], quoted: bool) -> str:
    protocol = report["protocol"]
    text = [
        f"measured: protocol `{protocol['name']}`, means over the pictures, {protocol['shave']} "
        "pixels shaved on each side, pictures not rounded to 8 bits, SSIM of luma.",
        *(
            f"{model['checkpoint']}: mode {model['mode']}, {model['parameters']:,} parameters, "
            f"sha256 {model['sha256'][:12]}."
            for model in _models(report).values()
        ),
    ]
    text += [f"{MADE}."] if made_lr(report) else []
    if "ensemble" in protocol:
        text.append(f"With +: {protocol['ensemble']}.")
    if quoted:
        text += [
            "published: PSNR as the cited paper prints it, not measured here; an empty cell is not "
            "entered here.",
            CAVEATS[protocol["name"]],
        ]
    return " ".join(text)


# ---- figure -------------------------------------------------------------------------------------

PANEL = 240  # pixels that a crop is enlarged to, at most, unless it is larger itself
LEAST = 160  # pixels of width of a label, and of height of the picture, however small the box is
TEXT, BAND, GAP = 14, 22, 8  # pixels: letters, the line they stand in, between panels
COLOUR = "#e41a1c"

Box = tuple[int, int, int, int]  # left, top, width, height in HR pixels


def parse_box(text: str) -> Box:
    """ "120,80,64,48" as four whole numbers; ArgumentTypeError for anything else."""
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not left,top,width,height in pixels, such as 120,80,64,48"
        ) from None
    return x, y, w, h


def telling_picture(report: Mapping[str, Any], scale: float) -> tuple[str, str]:
    """(set, name) of the picture whose PSNR differs most between the methods at a scale.

    The first one of several. It shows the largest difference, not the usual one.
    """
    best, where = -1.0, ("", "")
    for data in report["sets"]:
        methods = next(r for r in data["scales"] if r["scale"] == scale)["methods"]
        for name in next(iter(methods.values()))["images"]:
            values = [method["images"][name]["psnr"] for method in methods.values()]
            values = [math.inf if value is None else value for value in values]
            spread = max(values) - min(values) if min(values) < math.inf else 0.0
            if spread > best:
                best, where = spread, (data["name"], name)
    return where


def differing_box(pictures: Sequence[np.ndarray], shave: int = 0) -> Box:
    """The square in which pictures differ most, about a sixth of their smaller side.

    Differ: largest minus smallest value of a channel, squared, summed over channels and pixels.
    In whole numbers, so that it is the same on every machine; the topmost, then leftmost of equals.

    Args:
        pictures: uint8 [H, W, 3] each, two or more.
        shave: pixels at the edges to keep away from, if the picture is large enough.
    """
    stack = np.stack(pictures).astype(np.int64)
    height, width = stack.shape[1:3]
    side = min(height, width, 128, max(16, min(height, width) // 6))
    if min(height, width) < side + 2 * shave:
        shave = 0
    spread = np.square(stack.max(0) - stack.min(0)).sum(-1)
    spread = spread[shave : height - shave, shave : width - shave]
    total = np.pad(spread.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    y, x = np.unravel_index(sums.argmax(), sums.shape)
    return int(x) + shave, int(y) + shave, side, side


def figure(
    hr: np.ndarray,
    methods: Mapping[str, np.ndarray],
    box: Box,
    notes: Mapping[str, str],
    title: str,
) -> Image.Image:
    """HR with a box drawn into it, and beside it what HR and the methods have in the box.

    The crops are enlarged by nearest neighbour, a whole number of times, so that their pixels are
    what is seen.

    Args:
        hr: uint8 [H, W, 3].
        methods: uint8 [H, W, 3] by label.
        box: within the picture.
        notes: what is written behind a label, such as the PSNR of the crop.
        title: below HR.
    """
    from PIL import Image, ImageDraw, ImageFont

    x, y, w, h = box
    crops = {"HR": hr, **methods}
    zoom = max(1, PANEL // max(w, h))
    columns = len(crops) if len(crops) <= 3 else math.ceil(len(crops) / 2)
    rows = math.ceil(len(crops) / columns)
    panel_w, panel_h = max(w * zoom, LEAST), h * zoom
    inner = rows * (panel_h + BAND + GAP) - GAP - BAND
    # The crops of a flat box would leave no height for the picture.
    whole, factor = _fitted_picture(Image.fromarray(hr), max(inner, LEAST), 2 * columns * PANEL)
    left = 2 * GAP + whole.width
    size = (left + columns * (panel_w + GAP), max(inner, whole.height) + BAND + 2 * GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)

    sheet.paste(whole, (GAP, GAP))
    corners = [GAP + round(v * factor) for v in (x, y, x + w, y + h)]
    draw.rectangle([corners[0] - 1, corners[1] - 1, corners[2], corners[3]], None, COLOUR, 2)
    _write(draw, font, title, "", (GAP, GAP + whole.height), whole.width)
    for n, (label, picture) in enumerate(crops.items()):
        at = (left + n % columns * (panel_w + GAP), GAP + n // columns * (panel_h + BAND + GAP))
        crop = Image.fromarray(np.ascontiguousarray(picture[y : y + h, x : x + w]))
        crop = crop.resize((w * zoom, h * zoom), Image.Resampling.NEAREST)
        sheet.paste(crop, at)
        edge = (at[0] - 2, at[1] - 2, at[0] + w * zoom + 1, at[1] + h * zoom + 1)
        draw.rectangle(edge, None, COLOUR, 2)
        _write(draw, font, label, notes.get(label, ""), (at[0], at[1] + panel_h), panel_w)
    return sheet


def _fitted_picture(picture: Image.Image, height: int, most: int) -> tuple[Image.Image, float]:
    """A picture made to fit a height, and at most so many pixels wide, and by which factor."""
    from PIL import Image

    factor = min(height / picture.height, most / picture.width)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    kind = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    return picture.resize(size, kind), factor


def _write(draw: Any, font: Any, label: str, note: str, at: tuple[int, int], width: int) -> None:
    """A label and its note on one line; a label that is too long loses its middle, not the note."""
    note = f"  {note}" if note else ""
    text, kept = label + note, len(label)
    while draw.textlength(text, font) > width and kept > 2:
        kept -= 1
        text = f"{label[: (kept + 1) // 2]}...{label[len(label) - kept // 2 :]}{note}"
    draw.text((at[0], at[1] + BAND // 2 + 1), text, "black", font, anchor="lm")
