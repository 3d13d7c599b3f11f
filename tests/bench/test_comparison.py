"""The page of the comparison shows what bench.compare wrote, and nothing that is not finished."""

import pytest

from bench import comparison
from gsr.errors import InputError

HEAD = "method,finished,seeds,parameters,lr_macs,hr_macs,splat_weights,training_seconds,"
HEAD += "upscaling_seconds,S x2 psnr mean,S x2 psnr std,S x4 psnr mean,S x4 psnr std,T x2 psnr mean"
ROWS = [
    "bicubic,,,,,,,,0.01,30.1,,28,,25",
    "a,2,2,1234,100.4,0,36,90,0.02,31.234,0.0123,28.5,0.004,26",
    "b,2,2,20,7,12,,240,0.3,31.2,0.1,28.75,0.004,26.5",
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    result, page = tmp_path / "comparison.csv", tmp_path / "page.md"
    monkeypatch.setattr(comparison, "RESULT", result)
    monkeypatch.setattr(comparison, "PAGE", page)
    stds = [row.rsplit(",", 1) for row in ROWS]
    lines = [HEAD + ",T x2 psnr std", *(f"{a},{b}," for a, b in stds)]
    result.write_text("\n".join(lines) + "\n")
    page.write_text("before\n<!-- comparison -->\nold\n<!-- /comparison -->\nafter\n")
    return result, page


def test_tables(files):
    comparison.main([])
    text = files[1].read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    for line in (
        "| S | x2 | x4 |",
        "| bicubic | 30.10 | 28.00 |",
        "| a | **31.23 ± 0.012** | 28.50 ± 0.004 |",
        "| b | 31.20 ± 0.100 | **28.75 ± 0.004** |",
        "| lead of the best | 0.034 | 0.250 |",
        "| T | x2 |",
        "| a | 1,234 | 100 | 0 | 36 | 2 | 0.020 |",
        "| b | 20 | 7 | 12 |  | 4 | 0.300 |",
    ):
        assert line in text.splitlines(), line


def test_unfinished(files):
    result, page = files
    before = page.read_text()
    result.write_text(result.read_text().replace("b,2,2", "b,1,2"))
    with pytest.raises(InputError, match="some runs are not finished"):
        comparison.main([])
    result.unlink()
    with pytest.raises(InputError, match="must be what bench.compare wrote"):
        comparison.main([])
    assert page.read_text() == before
