"""Batches that are killed, run out of disk or lose their folder; thousands of damaged files."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gsr import cli
from gsr.io.image import TEMPORARY
from gsr.models.checkpoint import save_model
from tests.io.test_damage import FORMATS, damaged, originals  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
COUNT = 50

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of files"),
]


@pytest.fixture
def batch(tmp_path, monkeypatch, tiny_model):
    """In in/ 50 images, in whole/ their results."""
    monkeypatch.chdir(tmp_path)
    save_model("model", tiny_model)
    Path("in/sub").mkdir(parents=True)
    for i in range(COUNT):
        suffix = ("png", "jpg", "tif", "webp", "gif")[i % 5]
        noise = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"in/{'sub/' * (i % 2)}{i:02d}.{suffix}")
    assert run("-o", "whole").returncode == 0
    return files("whole")


def command(*argv):
    argv = ["in", "--scale", "4", "--model", "model", *argv]
    return [sys.executable, "-m", "gsr", "upscale", *argv]


def run(*argv, **options):
    return subprocess.run(
        command(*argv), env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, **options,
    )  # fmt: skip


def files(folder):
    found = {p.relative_to(folder).as_posix(): p for p in Path(folder).rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def begun(output, least):
    """Start a run; returns it once it has finished so many files."""
    process = subprocess.Popen(
        command("-o", output), env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Which is ignored where the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while sum(p.suffix not in ("", TEMPORARY) for p in Path(output).rglob("*")) < least:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    return process


def is_resumed(output, whole, done):
    """The next run does what is missing, and no more."""
    process = run("-o", output, "--skip-existing")
    assert process.returncode == 0, process.stderr
    said = process.stdout.splitlines()[-1]
    assert said == f"{COUNT - done} of {COUNT - done} images upscaled, {done} there already"
    assert files(output) == whole


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("least", [1, 20])
def test_killed(batch, number, least):
    process = begun("out", least)
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[number]
    assert "Traceback" not in err
    left = files("out")
    finished = {name: data for name, data in left.items() if not name.endswith(TEMPORARY)}
    assert finished == {name: batch[name] for name in finished} and len(finished) < COUNT
    assert number == "SIGKILL" or left == finished
    is_resumed("out", batch, len(finished))


def test_a_disk_that_takes_no_more(batch):
    """The system refuses larger files than the median, as a full disk refuses them."""
    most = sorted(map(len, batch.values()))[COUNT // 2]

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    process = run("-o", "out", preexec_fn=limited)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    done = {name: data for name, data in batch.items() if len(data) <= most}
    assert files("out") == done and 10 < len(done) < COUNT
    failed = [line for line in process.stderr.splitlines() if line.startswith("  ")]
    assert len(failed) == COUNT - len(done)
    assert all("cannot be written: File too large" in line for line in failed)
    is_resumed("out", batch, len(done))


def test_a_source_folder_that_is_gone(batch):
    process = begun("out", 5)
    os.rename("in", "elsewhere")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    done = files("out")
    assert done == {name: batch[name] for name in done} and 5 <= len(done) < COUNT
    failed = [line for line in err.splitlines() if line.startswith("  ")]
    assert len(failed) == COUNT - len(done)
    assert all("there is no such file" in line for line in failed)
    os.rename("elsewhere", "in")
    is_resumed("out", batch, len(done))


def test_two_runs_at_once(batch):
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    both = [
        subprocess.Popen(
            command("-o", "out", "--skip-existing"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert files("out") == batch
    assert sum(int(out.splitlines()[-1].split()[0]) for out, _ in said) <= COUNT + 2


def test_ten_thousand_damaged_files(tmp_path, tiny_model, originals, capsys):  # noqa: F811
    """Through the whole command: a whole result or one sentence each, in bounded memory."""
    save_model(tmp_path / "model", tiny_model)
    each, total, failed = -(-10_000 // len(originals)), 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in FORMATS:
        folder, out = tmp_path / name, tmp_path / "out"
        folder.mkdir()
        for seed in range(each if name in originals else 0):
            data = damaged(originals[name], f"command {name} {seed}")
            (folder / f"{seed}.{name.removesuffix('16')}").write_bytes(data)
            total += 1
        sources = [str(path) for path in folder.iterdir()]
        argv = ["-o", f"{out}/", "--scale", "1.5", "--max-pixels", "1000000", "--format", "tiff"]
        try:
            cli.main(["upscale", *sources, *argv, "--model", str(tmp_path / "model")])
        except SystemExit as error:
            assert error.code == 1
        said, err = capsys.readouterr()
        sentences = [line for line in err.splitlines() if line.startswith("gsr: error: ")]
        results = list(out.iterdir())
        assert len(results) + len(sentences) == len(sources)
        assert all(line.startswith(("gsr: ", "  ")) for line in err.splitlines())
        for path in results:
            with Image.open(path) as image:
                image.load()
        failed += len(sentences)
        shutil.rmtree(folder)
        shutil.rmtree(out)
    assert total >= 10_000 and failed > 1000
    # Kilobytes: nothing took much more than an image of a million pixels.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000
