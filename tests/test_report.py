"""Tables and figures of a report: every number in its place, the literature where it fits."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from bench import card
from gsr import report as reports
from gsr.report import csv_text, differing_box, figure, markdown, published, telling_picture

ROOT = Path(__file__).parents[1]
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
DIV2K = {2: 31.01, 3: 28.22, 4: 26.66, 6: 24.82, 12: 22.27, 18: 21.00, 24: 20.19, 30: 19.59}


def image(psnr, ssim=0.9):
    return {"psnr": psnr, "ssim": ssim, "psnr_rgb": psnr, "psnr_y": psnr}


def method(*psnr):
    """A method's part of a report, with these PSNR of pictures a, b, ..."""
    images = {name: image(value) for name, value in zip("abcdefgh", psnr, strict=False)}
    return {**image(psnr[0]), "images": images, "seconds": 1.0}


def make_report(name="DIV2K_valid", pictures=100, protocol="div2k", scales=(2, 3), **methods):
    methods = methods or {"bicubic": method(30.0, 20.0), "model": method(34.5678, 26.0)}
    rows = [{"scale": scale, "shave": 8, "lr": "paired", "methods": methods} for scale in scales]
    model = {"checkpoint": "mine", "mode": "direct", "parameters": 1234567, "sha256": "ab" * 32}
    colour = "RGB" if protocol == "div2k" else "Y"
    return {
        "protocol": {"name": protocol, "psnr": {"colour": colour}, "shave": "ceil(scale) + 6"},
        "model": model,
        "sets": [{"name": name, "pictures": pictures, "scales": rows}],
    }


# ---- the literature -----------------------------------------------------------------------------


def test_published_rows_are_those_of_the_set_and_the_protocol():
    data = make_report()["sets"][0]
    rows = dict(published(data, "div2k"))
    assert rows["bicubic (Chen et al., CVPR 2021, Table 1)"] == DIV2K
    assert [label.partition(" (")[0] for label in rows] == [
        "bicubic", "LIIF", "LTE", "Thera Air", "GaussianSR",
    ]  # fmt: skip
    assert rows["GaussianSR (Hu et al., AAAI 2025)"] == {2: 34.61, 4: 29.01}
    # Every network is better than bicubic, and every scale harder than the one before.
    for known in rows.values():
        assert list(known.values()) == sorted(known.values(), reverse=True)
        assert all(DIV2K[scale] <= psnr < DIV2K[scale] + 4 for scale, psnr in known.items())
    assert published(data, "benchmark") == []
    five = {"name": "Set5", "pictures": 5}
    assert len(published(five, "benchmark")) == 2 and published(five, "div2k") == []


def test_every_figure_is_as_it_is_printed():
    for row in reports.PUBLISHED:
        words = []
        for name, known in row.psnr.items():
            words += [name] if name != "DIV2K_valid" else []
            words += [word for s, psnr in known.items() for word in (f"x{s}", f"{psnr:.2f}")]
        assert " ".join(words) == PRINTED[row.label]
    assert len(PRINTED) == len(reports.PUBLISHED)


def test_the_legend_says_on_what_footing_the_literature_is():
    text = markdown(make_report(scales=(2, 30)))
    assert "| published | 34.67 | 20.48 |" in text and "not entered here" in text
    assert "Beyond x4 their papers made LR with other bicubic code" in text
    assert "GaussianSR's paper trained its rivals anew" in text and "luma alone" not in text
    text = markdown(make_report("Set5", 5, "benchmark"))
    assert "VDSR" in text and "luma alone: their figures are near to this protocol's" in text
    assert "EDSR-baseline" not in text


def test_tables_say_where_lr_is_from():
    report = make_report("photos", scales=(2, 3))
    assert "LR made" not in markdown(report)
    report["sets"][0]["scales"][1]["lr"] = "imresize"
    text = markdown(report)
    assert text.splitlines()[0].endswith("| x2 | x3* |") and "*: LR made from HR by" in text


def test_published_rows_need_the_whole_set():
    for name, pictures, count in [
        ("DIV2K_valid_HR", 100, 5), ("div2k_VALID", 100, 5), ("DIV2K_valid", 99, 0),
        ("photos", 100, 0),
    ]:  # fmt: skip
        assert len(published({"name": name, "pictures": pictures}, "div2k")) == count
    assert len(published({"name": "BSD100", "pictures": 100}, "benchmark")) == 1
    assert published({"name": "Set14", "pictures": 5}, "benchmark") == []


def test_the_documents_show_the_same_rows():
    """The README's tables are made by bench.card, from this table too."""
    readme = (ROOT / "README.md").read_text()
    data = json.loads(card.REPORT.read_text())
    for part in data["sets"]:
        for label, known in published(part, "benchmark"):
            values = " | ".join(f"{psnr:.2f}" for psnr in known.values())
            assert f"| {label}, published | {values} |" in readme


# ---- tables -------------------------------------------------------------------------------------


def test_markdown_sets_measured_and_published_side_by_side():
    text = markdown(make_report(scales=(2, 2.5, 12)))
    lines = text.splitlines()
    assert lines[0] == (
        "| DIV2K_valid, 100 pictures: PSNR RGB in dB / SSIM | figures | x2 | x2.5 | x12 |"
    )
    assert lines[1] == "|---|---|---|---|---|"
    assert lines[2] == "| bicubic | measured | 30.00 / 0.9000 | 30.00 / 0.9000 | 30.00 / 0.9000 |"
    assert lines[3].startswith("| **mine** | measured | 34.57 / 0.9000 |")
    assert "| LIIF (Chen et al., CVPR 2021, Table 1) | published | 34.67 |  | 23.71 |" in lines
    assert "| GaussianSR (Hu et al., AAAI 2025) | published | 34.61 |  |  |" in lines
    assert {line.count("|") for line in lines if line.startswith("|")} == {6}
    legend = lines[-1]
    assert "protocol `div2k`" in legend and "ceil(scale) + 6 pixels shaved" in legend
    assert "mine: mode direct, 1,234,567 parameters, sha256 abababababab." in legend
    assert "not measured here" in legend


def test_markdown_of_a_set_that_no_paper_knows():
    text = markdown(
        make_report("my|photos", 1, "benchmark", bicubic=method(None), model=method(40))
    )
    assert "| my\\|photos, 1 picture: PSNR Y in dB / SSIM |" in text
    assert "| bicubic | measured | inf / 0.9000 |" in text and "published" not in text


def test_markdown_of_several_models_with_everything():
    report = make_report()
    report["models"] = {name: {**report["model"], "checkpoint": name} for name in ("a", "b")}
    del report["model"]
    report["protocol"] |= {"ensemble": "the mean of 8", "perceptual": {"lpips": "LPIPS"}}
    for row in report["sets"][0]["scales"]:
        row["methods"] = {name: {**method(30), "lpips": 0.25} for name in ("bicubic", "a", "a+")}
    text = markdown(report)
    assert "PSNR RGB in dB / SSIM / LPIPS |" in text
    assert "| **a+** | measured | 30.00 / 0.9000 / 0.2500 |" in text
    assert (
        "a: mode direct" in text and "b: mode direct" in text and "With +: the mean of 8." in text
    )


def test_csv_has_every_picture_in_all_digits():
    third = 100 / 3
    report = make_report("s,et", bicubic=method(third, None), model=method(40.0, 41.0))
    rows = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert len(rows) == 2 * 2 * 2
    assert rows[0] == {
        "set": "s,et", "scale": "2", "shave": "8", "lr": "paired", "method": "bicubic",
        "picture": "a", "psnr": repr(third), "ssim": "0.9", "psnr_rgb": repr(third),
        "psnr_y": repr(third),
    }  # fmt: skip
    assert float(rows[0]["psnr"]) == third and rows[1]["psnr"] == "inf"
    assert [(row["scale"], row["method"], row["picture"]) for row in rows[3:5]] == [
        ("2", "mine", "b"), ("3", "bicubic", "a"),
    ]  # fmt: skip


# ---- figure -------------------------------------------------------------------------------------


def test_telling_picture():
    report = make_report(bicubic=method(30, 25, 20, 30), model=method(31, 28, 23, None))
    assert telling_picture(report, 3) == ("DIV2K_valid", "d")
    report = make_report(bicubic=method(30, 25, 20), model=method(31, 28, 17))
    assert telling_picture(report, 2) == ("DIV2K_valid", "b")  # the first of two
    report = make_report(bicubic=method(None, 30), model=method(None, 30.1))
    assert telling_picture(report, 2) == ("DIV2K_valid", "b")


def test_differing_box_is_where_a_search_finds_it():
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (40, 53, 3), dtype=np.uint8) for _ in range(3)]
    x, y, w, h = differing_box(pictures, shave=4)
    assert (w, h) == (16, 16)
    stack = np.stack(pictures).astype(float)
    spread = ((stack.max(0) - stack.min(0)) ** 2).sum(-1)
    sums = {
        (spread[top : top + 16, left : left + 16].sum(), -top, -left)
        for top in range(4, 40 - 4 - 16 + 1)
        for left in range(4, 53 - 4 - 16 + 1)
    }
    assert max(sums)[1:] == (-y, -x)


def test_differing_box_of_equals_and_of_small_pictures():
    black = np.zeros((300, 240, 3), np.uint8)
    assert differing_box([black, black], 5) == (5, 5, 40, 40)  # nothing differs: the first
    white = black.copy()
    white[100:110, 200:205] = 255
    x, y, w, h = differing_box([black, white], 5)
    assert x <= 200 and x + w >= 205 and y <= 100 and y + h >= 110
    assert differing_box([black[:9, :20], white[:9, :20]], 4) == (0, 0, 9, 9)


def test_figure_shows_the_pixels_of_the_box():
    generator = np.random.default_rng(1)
    pictures = [generator.integers(0, 256, (60, 90, 3), dtype=np.uint8) for _ in range(3)]
    hr, methods = (
        pictures[0],
        dict(zip(("bicubic", "a very long name of a model" * 3), pictures[1:], strict=True)),
    )
    box = (30, 20, 24, 16)
    sheet = np.asarray(figure(hr, methods, box, {"bicubic": "20.00 dB"}, "title"))
    zoom = reports.PANEL // 24
    left = sheet.shape[1] - 3 * (reports.PANEL + reports.GAP)
    for n, picture in enumerate(pictures):
        x, y = left + n * (reports.PANEL + reports.GAP), reports.GAP
        shown = sheet[y : y + 16 * zoom, x : x + 24 * zoom]
        crop = picture[20:36, 30:54]
        assert np.array_equal(shown, crop.repeat(zoom, 0).repeat(zoom, 1))
        label = sheet[y + 16 * zoom + 2 : y + 16 * zoom + reports.BAND, x : x + reports.PANEL]
        assert (label.min(-1) < 100).any()
        between = sheet[:, x + reports.PANEL + 2 : x + reports.PANEL + reports.GAP - 2]
        assert (between == 255).all()  # no label runs into the next
    # The box is drawn around the same place in the whole picture.
    factor = 16 * zoom / 60
    red = (sheet[:, : left - 2] == [0xE4, 0x1A, 0x1C]).all(-1)
    rows, columns = np.nonzero(red.any(1))[0], np.nonzero(red.any(0))[0]
    want = [reports.GAP + v * factor for v in (20, 36, 30, 54)]
    have = [rows[0], rows[-1], columns[0], columns[-1]]
    assert np.abs(np.subtract(have, want)).max() < 3


@pytest.mark.parametrize(
    "count, shape, box",
    [
        (1, (20, 300), (0, 0, 8, 8)),
        (5, (400, 30), (3, 390, 27, 10)),
        (3, (700, 900), (0, 0, 500, 300)),
        (1, (300, 400), (0, 7, 400, 1)),
        (1, (300, 400), (7, 0, 1, 300)),
    ],
)
def test_figure_of_any_shape(count, shape, box):
    picture = np.full((*shape, 3), 90, np.uint8)
    methods = {f"method {n}": picture for n in range(count)}
    sheet = figure(picture, methods, box, dict.fromkeys(methods, "31.00 dB"), "title")
    assert max(sheet.size) < 3000 and sheet.height > reports.LEAST / 2
    again = figure(picture, methods, box, dict.fromkeys(methods, "31.00 dB"), "title")
    assert sheet.tobytes() == again.tobytes()
