"""The kernels with every Triton that a PyTorch within our range requires.

The slow tests take the versions of which `make tritons` has made a folder, each in processes of
its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: nothing compiles the kernels")

from bench import schema, static  # noqa: E402
from gsr.errors import InputError  # noqa: E402

HERE = Path(__file__).resolve().parent
VERSIONS = ("3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0")  # one of each minor version


def environment(version):
    if not (static.TRITONS / version).is_dir():
        pytest.skip(f"Triton {version} is not in build/triton: make tritons")
    return static.triton_environment(version)


@pytest.mark.slow
@pytest.mark.parametrize("target", static.TARGETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_spills(version, target):
    environment(version)
    rows = static.triton_rows(version, [target])
    assert len(rows) > 100 and static.spilling(rows) == []
    loops = [r["loop"] for r in rows if r["case"].startswith("lite") and r["loop"]]
    # Where channels were an axis of a tensor, Triton up to 3.6 spread them over the lanes.
    assert bool(loops) == target.startswith("sm_")
    assert all(loop["SHFL"] == loop["BAR"] == 0 for loop in loops)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "kernel_cases.py",
        "packed_cases.py",
        "window_cases.py",
        "decode_cases.py",
        "far_addresses.py",
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_interpreted(version, script):
    env = environment(version) | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, HERE / script], env=env, capture_output=True, text=True, timeout=3600
    )
    assert done.stdout.startswith("{"), done.stderr[-4000:]
    found = json.loads(done.stdout)
    if script == "kernel_cases.py":
        assert {n: c["failures"] for n, c in found["cases"].items() if c["failures"]} == {}
        assert len(found["cases"]) > 80
    elif script == "decode_cases.py":
        assert found["failures"] == {} and len(found["errors"]) > 15
    elif script == "far_addresses.py":
        assert {n: e for n, e in found.items() if not e <= 1e-5} == {}
    else:
        bounds = {"beside": 0, "out": 1e-5, "d_features": 1e-4, "d_kernels": 1e-4}
        bounds |= {"packed": 1e-5, "levels": 0}
        assert [n for n, e in found.items() for k, v in e.items() if not v <= bounds[k]] == []


def test_blocks_by_version(monkeypatch):
    from gsr.kernels import configs

    for version, expected in (("3.3.1", 32), ("3.4.0+git1", 64), ("3.10.0", 64), ("4.0", 64)):
        monkeypatch.setattr("triton.__version__", version)
        assert configs.choose_windows("forward", "sm_90")["PIXELS"] == expected


def row(arch, kind, *, spills=0):
    config = static._at_scale(kind, {"provider": arch, "sizes": {"K": 9, "C": 3}})
    return schema.row(
        f"lite {kind}", arch, {"C": 3}, config=config, loop={"all": 53},
        resources={"registers": 49, "spills": spills, "stack": spills, "shared": 0},
    )  # fmt: skip


def test_versions_are_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(static, "TRITONS", tmp_path)
    for version in ("3.6.0", "3.7.1"):
        (tmp_path / version / "triton").mkdir(parents=True)
    spills = {"3.6.0": 8, "3.7.1": 0}
    monkeypatch.setattr(
        static, "triton_rows",
        lambda version, arches, options: [
            row(arch, kind, spills=spills[version] if kind == "prepare" else 0)
            for arch in arches
            for kind in static.KINDS
        ],
    )  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text("<!-- tritons -->\n<!-- /tritons -->\n")
    with pytest.raises(InputError, match="1 configurations spill"):
        static.main(["--triton", "3.6.0", "3.7.1", "--arch", "sm_90", "--document", str(page)])
    text = capsys.readouterr().out
    assert "| 3.6.0 | sm_90 | 4 | 1 |" + " 53, 49 |" * 4 in page.read_text()
    assert "| 3.7.1 | sm_90 | 4 | 0 |" in text and "3.6.0 sm_90 lite prepare" in text
    static.main(["--triton", "3.7.1", "--arch", "sm_90"])
    with pytest.raises(InputError, match="no Triton 3.4.0 .*make tritons TRITONS=3.4.0"):
        static.main(["--triton", "3.4.0"])


def test_a_process_finds_its_own_triton():
    assert static.TRITONS == HERE.parents[1] / "build" / "triton"
    home = next((static.TRITONS / v for v in VERSIONS if (static.TRITONS / v).is_dir()), None)
    if home is None:
        pytest.skip("no Triton in build/triton: make tritons")
    done = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env=os.environ | static.triton_environment(home.name), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == home.name
