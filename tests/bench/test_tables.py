"""Tables of a report, and crops: every figure in its place, the literature where it fits."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import card, crops
from bench.tables import PUBLISHED, csv_text, markdown, published
from gsr.errors import InputError
from gsr.io.image import read_image, write_image
from gsr.viz import Crop

ROOT = Path(__file__).parents[2]
# What is printed, spelt once more. LIIF: arXiv 2012.09161; LTE: arXiv 2111.08918; Thera: arXiv
# 2311.17643; FSRCNN: arXiv 1608.00367; VDSR: arXiv 1511.04587.
PRINTED = {
    # LIIF, Table 1: the rows "Bicubic" and "EDSR-baseline-LIIF".
    "bicubic (Chen et al., CVPR 2021, Table 1)": "x2 31.01 x3 28.22 x4 26.66 x6 24.82 x12 22.27 "
    "x18 21.00 x24 20.19 x30 19.59",
    "LIIF (Chen et al., CVPR 2021, Table 1)": "x2 34.67 x3 30.96 x4 29.00 x6 26.75 x12 23.71 "
    "x18 22.17 x24 21.18 x30 20.48",
    # LTE, Table 1: the row "EDSR-baseline-LTE".
    "LTE (Lee & Jin, CVPR 2022, Table 1)": "x2 34.72 x3 31.02 x4 29.04 x6 26.81 x12 23.78 "
    "x18 22.23 x24 21.24 x30 20.53",
    "Thera Air (Becker et al., 2025)": "x2 34.75 x3 31.09 x4 29.10 x6 26.84 x12 23.80",
    "GaussianSR (Hu et al., AAAI 2025)": "x2 34.61 x4 29.01",
    "FSRCNN (Dong et al., ECCV 2016)": "Set5 x2 37.00 x3 33.16 x4 30.71",
    "VDSR (Kim et al., CVPR 2016)": "Set5 x2 37.53 x3 33.66 x4 31.35 Set14 x2 33.03 x3 29.77 "
    "x4 28.01 B100 x2 31.90 x3 28.82 x4 27.29",
}


def method(*psnr):
    """A method's part of a report, with these PSNR of images a, b, ..."""
    images = {n: {"psnr": v, "ssim": 0.9} for n, v in zip("abcd", psnr, strict=False)}
    return {"psnr": psnr[0], "ssim": 0.9, "images": images, "seconds": 1.0}


def make_report(name="DIV2K_valid", images=100, protocol="div2k", scales=(2, 3), **methods):
    methods = methods or {"bicubic": method(30.0, 20.0), "mine": method(34.5678, 26.0)}
    rows = [{"scale": scale, "shave": 8, "lr": "paired", "methods": methods} for scale in scales]
    model = {"mode": "direct", "parameters": 1234567, "sha256": "ab" * 32}
    colour = "RGB" if protocol == "div2k" else "Y"
    return {
        "protocol": {"name": protocol, "psnr": {"colour": colour}, "shave": "ceil(scale) + 6"},
        "models": {label: model for label in methods if label != "bicubic"},
        "sets": [{"name": name, "images": images, "scales": rows}],
    }


# ---- the literature -----------------------------------------------------------------------------


def test_every_figure_is_as_it_is_printed():
    for row in PUBLISHED:
        words = []
        for name, known in row.psnr.items():
            words += [name] if name != "DIV2K_valid" else []
            words += [word for s, psnr in known.items() for word in (f"x{s}", f"{psnr:.2f}")]
        assert " ".join(words) == PRINTED[row.label]
    assert len(PRINTED) == len(PUBLISHED)


@pytest.mark.parametrize(
    "name, images, protocol, count",
    [
        ("DIV2K_valid", 100, "div2k", 5), ("div2k_VALID_HR", 100, "div2k", 5),
        ("DIV2K_valid", 99, "div2k", 0), ("DIV2K_valid", 100, "benchmark", 0),
        ("photos", 100, "div2k", 0), ("Set5", 5, "benchmark", 2), ("Set5", 5, "div2k", 0),
        ("Set14", 5, "benchmark", 0), ("BSD100", 100, "benchmark", 1),
    ],
)  # fmt: skip
def test_published_rows_are_of_the_whole_set_and_the_protocol(name, images, protocol, count):
    data = {"name": name, "images": images}
    assert len(published(data, {"name": protocol})) == count
    assert published(data, {"name": protocol, "degradation": {}}) == []


def test_the_documents_show_the_same_rows():
    """The README's tables are made by bench.card, from this table too."""
    readme = (ROOT / "README.md").read_text()
    report = json.loads(card.REPORT.read_text())
    for data in report["sets"]:
        for label, known in published(data, report["protocol"]):
            values = " | ".join(f"{psnr:.2f}" for psnr in known.values())
            assert f"| {label}, published | {values} |" in readme


# ---- tables -------------------------------------------------------------------------------------


def test_markdown_sets_measured_and_published_side_by_side():
    text = markdown(make_report(scales=(2, 2.5, 12)))
    lines = text.splitlines()
    assert lines[0] == (
        "| DIV2K_valid, 100 images: PSNR RGB in dB / SSIM | figures | x2 | x2.5 | x12 |"
    )
    assert lines[1] == "|---|---|---|---|---|"
    assert lines[2] == "| bicubic | measured | 30.00 / 0.9000 | 30.00 / 0.9000 | 30.00 / 0.9000 |"
    assert lines[3].startswith("| **mine** | measured | 34.57 / 0.9000 |")
    assert "| LIIF (Chen et al., CVPR 2021, Table 1) | published | 34.67 |  | 23.71 |" in lines
    assert "| GaussianSR (Hu et al., AAAI 2025) | published | 34.61 |  |  |" in lines
    assert {line.count("|") for line in lines if line.startswith("|")} == {6}
    for part in (
        "protocol `div2k`", "ceil(scale) + 6 pixels shaved", "not measured here",
        "mine: mode direct, 1,234,567 parameters, sha256 abababababab.",
        "Beyond x4 their papers made LR with other bicubic code",
    ):  # fmt: skip
        assert part in lines[-1]
    assert "luma alone: their figures are near" in markdown(make_report("Set5", 5, "benchmark"))


def test_markdown_of_a_set_that_no_paper_knows():
    methods = {"bicubic": method(None), "a": method(40), "a+": method(41)}
    report = make_report("my|photos", 1, "benchmark", **methods)
    report["protocol"] |= {"ensemble": "the mean of 8", "perceptual": {"lpips": "LPIPS"}}
    for values in methods.values():
        values["lpips"] = 0.25
    report["sets"][0]["scales"][1]["lr"] = "imresize"
    text = markdown(report)
    head = "| my\\|photos, 1 image: PSNR Y in dB / SSIM / LPIPS | figures | x2 | x3* |"
    assert text.splitlines()[0] == head
    assert "| bicubic | measured | inf / 0.9000 / 0.2500 |" in text and "published" not in text
    assert "| **a+** | measured | 41.00 / 0.9000 / 0.2500 |" in text
    assert "With +: the mean of 8." in text and "*: LR made from HR by imresize" in text


def test_csv_has_every_image_in_all_digits():
    third = 100 / 3
    report = make_report("s,et", bicubic=method(third, None), mine=method(40.0, 41.0))
    rows = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert len(rows) == 2 * 2 * 2
    assert rows[0] == {
        "set": "s,et", "scale": "2", "shave": "8", "lr": "paired", "method": "bicubic",
        "image": "a", "psnr": repr(third), "ssim": "0.9",
    }  # fmt: skip
    assert float(rows[0]["psnr"]) == third and rows[1]["psnr"] == "inf"
    assert [(row["scale"], row["method"], row["image"]) for row in rows[3:5]] == [
        ("2", "mine", "b"), ("3", "bicubic", "a"),
    ]  # fmt: skip


# ---- crops --------------------------------------------------------------------------------------


def test_differing_crop_is_where_a_search_finds_it():
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (40, 53, 3), dtype=np.uint8) for _ in range(3)]
    crop = crops.differing_crop(images, shave=4)
    assert crop.size == (16, 16)
    stack = np.stack(images).astype(float)
    spread = ((stack.max(0) - stack.min(0)) ** 2).sum(-1)
    sums = {
        (spread[top : top + 16, left : left + 16].sum(), top, left)
        for top in range(4, 40 - 4 - 16 + 1)
        for left in range(4, 53 - 4 - 16 + 1)
    }
    assert max(sums)[1:] == crop.start


def test_differing_crop_of_equals_and_of_small_images():
    black = np.zeros((300, 240, 3), np.uint8)
    assert crops.differing_crop([black, black], 5) == Crop(slice(5, 45), slice(5, 45))
    small = black[:9, :20]
    assert crops.differing_crop([small, small], 4) == Crop(slice(0, 9), slice(0, 9))


def test_crops(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    generator = np.random.default_rng(1)
    write_image(tmp_path / "a.png", generator.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    options = [str(tmp_path / "a.png"), "--scale", "2", "-o", str(tmp_path / "new/crops.png")]
    figures, draw = [], crops.draw
    monkeypatch.setattr(
        crops, "draw", lambda *args, **more: figures.append(draw(*args, **more)) or figures[-1]
    )
    crops.main([*options, "--crop", "10,4,16,20"])
    assert Image.open(tmp_path / "new/crops.png").width > 300
    whole, *panels = figures[0].axes
    hr = read_image(tmp_path / "a.png")
    assert np.array_equal(whole.images[0].get_array(), hr)
    assert np.array_equal(panels[0].images[0].get_array(), hr[4:24, 10:26])
    titles = [axes.get_title() for axes in panels]
    assert titles[0] == "HR" and titles[1].startswith("bicubic ") and titles[2].endswith(" dB")
    with pytest.raises(InputError, match="crop"):
        crops.main([*options, "--crop", "50,4,16,20"])
    plt.close("all")
