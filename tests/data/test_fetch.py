"""`gsr data download` against a server on 127.0.0.1: cut connections, unsafe archives, kills."""

import errno
import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gsr import cli
from gsr.data import fetch
from gsr.data.benchmarks import open_set
from gsr.data.fetch import SETS, Source, obtain
from gsr.errors import InputError
from gsr.io.image import list_images
from gsr.io.paths import lock_folder

ROOT = Path(__file__).parents[2]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve `server.files`; each transfer takes its fault from the front of `server.faults`.

    A fault is a status code, or the number of bytes of the body after which the connection ends.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, data = self.server, self.server.files.get(self.path.partition("?")[0])
        range_ = self.headers.get("Range")
        server.asked.append(range_)
        fault = server.faults.pop(0) if server.faults else None
        start = int(range_[6:-1]) if range_ and server.ranges else 0
        code = 404 if data is None else 416 if start > len(data) - 1 >= 0 else 206 if start else 200
        if fault and fault in http.HTTPStatus.__members__.values():
            code, fault = fault, None
        body = data[start:] if code in (200, 206) else b""
        self.send_response(code)
        if code == 302:
            self.send_header("Location", server.location)
        if server.lengths:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:fault])
        self.wfile.flush()
        if fault and server.hang:
            server.hang.wait(60)
        self.close_connection = fault is not None or not server.lengths

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 5)
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that hangs up is none
    server.files, server.asked, server.faults = {}, [], []
    server.ranges, server.lengths, server.hang = True, True, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def noise(count, seed=0):
    return np.random.default_rng(seed).bytes(count)


def png(seed=0, size=(80, 60)):
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def make_zip(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # without today's date
    return file.getvalue()


def make_tar(files):
    """`files` as name: bytes; or name: TarInfo attributes for what is no file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                for key, value in data.items():
                    setattr(info, key, value)
                archive.addfile(info)
    return file.getvalue()


def checksum(data, kind="sha256"):
    return f"{kind}:{hashlib.new(kind, data).hexdigest()}"


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


FILES = {f"DIV2K_valid_HR/080{i}.png": png(i) for i in (1, 2, 3)}
PLACED = {f"DIV2K/{name}": data for name, data in FILES.items()}
DATA = make_zip(FILES)
HALF = len(DATA) // 2


@pytest.fixture
def valid(server):
    """A source of three images with all that is published of DIV2K's."""
    server.files["/v.zip"] = DATA
    return Source(f"{server.url}/v.zip", "DIV2K/DIV2K_valid_HR", {"": 3}, checksum(DATA))


def part(source, tmp_path):
    return tmp_path / f"{source.file}.part"


# ---- transfer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_download(server, valid, tmp_path, kind):
    valid = replace(valid, checksum=checksum(DATA, kind))
    assert obtain(valid, tmp_path / "data")
    assert contents(tmp_path / "data") == PLACED
    assert not obtain(valid, tmp_path / "data") and server.asked == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_resumes(server, valid, tmp_path, ranges):
    server.faults, server.ranges = [HALF, 503, 429], ranges
    assert obtain(valid, tmp_path) and contents(tmp_path) == PLACED
    assert server.asked == [None] + 3 * [f"bytes={HALF}-"]


def test_the_next_run_resumes(server, valid, tmp_path):
    server.faults = [HALF, 403]
    with pytest.raises(InputError, match="v.zip cannot be downloaded .*403.* run again to resume"):
        obtain(valid, tmp_path)
    assert obtain(valid, tmp_path) and contents(tmp_path) == PLACED
    assert server.asked[-1] == f"bytes={HALF}-"


def test_a_kill_after_the_last_byte(server, valid, tmp_path):
    part(valid, tmp_path).write_bytes(DATA)
    assert obtain(valid, tmp_path) and contents(tmp_path) == PLACED


def test_without_lengths(server, valid, tmp_path):
    server.lengths = False
    server.faults = [HALF]  # looks like the end of the file
    with pytest.raises(InputError, match="part has the sha256 .* run again to download it anew"):
        obtain(valid, tmp_path)
    assert obtain(valid, tmp_path) and contents(tmp_path) == PLACED and len(server.asked) == 2


def test_the_rest_of_another_file_is_told_by_the_checksum(server, valid, tmp_path):
    part(valid, tmp_path).write_bytes(noise(100))
    with pytest.raises(InputError, match="part has the sha256 .* run again to download it anew"):
        obtain(valid, tmp_path)
    assert obtain(valid, tmp_path) and contents(tmp_path) == PLACED


def test_failures_that_last(server, valid, tmp_path):
    server.faults = [HALF] + [503] * 99
    with pytest.raises(InputError, match="v.zip cannot be downloaded .*503.* run again to resume"):
        obtain(valid, tmp_path)
    assert len(server.asked) == fetch.TRIES and part(valid, tmp_path).read_bytes() == DATA[:HALF]
    server.faults.clear()
    with pytest.raises(InputError, match="404: Not Found.* name a mirror by --url"):
        obtain(valid, tmp_path, url=f"{server.url}/none")
    server.location, server.faults = "file:///etc/hostname", [302] * 9
    with pytest.raises(InputError, match="302"):
        obtain(valid, tmp_path)
    with pytest.raises(InputError, match="refused.* run again"):
        obtain(valid, tmp_path, url="http://127.0.0.1:9/v.zip")  # where nothing listens


def test_a_full_disk(server, valid, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, name in ((fetch, "open"), (shutil, "unpack_archive")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full, raising=False)
            with pytest.raises(InputError, match="No space left on device.* run again"):
                obtain(valid, tmp_path)
    assert len(server.asked) == 2  # no try again
    assert obtain(valid, tmp_path) and contents(tmp_path) == PLACED


# ---- archives -----------------------------------------------------------------------------------


def link(kind, target):
    return {"type": kind, "linkname": target}


UNSAFE = {
    "zip upwards": make_zip({"a/../../evil": b"x"}),
    "zip backslashes": make_zip({"a\\..\\..\\evil": b"x"}),
    "zip absolute": make_zip({"/evil": b"x"}),
    "tar upwards": make_tar({"a": b"x", "../evil": b"x"}),
    "tar upwards within": make_tar({"a/b": b"x", "a/../../evil": b"x"}),
    "tar symlink": make_tar({"a": link(tarfile.SYMTYPE, ".."), "a/evil": b"x"}),
    "tar hardlink": make_tar({"a": b"x", "evil": link(tarfile.LNKTYPE, "a")}),
    "tar device": make_tar({"evil": {"type": tarfile.CHRTYPE}}),
    "tar pipe": make_tar({"evil": {"type": tarfile.FIFOTYPE}}),
}
DAMAGED = {
    "cut zip": DATA[:3000],
    "zip with a changed byte": DATA[:1000] + bytes([DATA[1000] ^ 1]) + DATA[1001:],
    "cut tar": make_tar({"a.png": noise(50_000)})[:20_000],
    "web page": b"<!DOCTYPE html><html>please log in</html>" * 30,
    "empty": b"",
}


@pytest.mark.parametrize("name", [*UNSAFE, *DAMAGED])
def test_unsafe_and_damaged_archives(server, valid, tmp_path, name):
    """Even if the checksum were theirs."""
    data = (UNSAFE | DAMAGED)[name]
    url = f"{server.url}/v.{'tar' if 'tar' in name else 'zip'}"
    server.files[f"/{url[-5:]}"] = data
    with pytest.raises(InputError, match=r"cannot be put into .*in|does not hold the images of"):
        obtain(replace(valid, url=url, checksum=checksum(data)), tmp_path / "in")
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".part" and path.is_file()]
    assert os.listdir(tmp_path / "in/DIV2K") == []


def test_python_without_the_data_filter(server, valid, tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(InputError, match="before 3.10.12 or 3.11.4 cannot unpack .*x.tar safely"):
        obtain(replace(valid, url="https://none/x.tar"), tmp_path)
    assert obtain(valid, tmp_path)


def test_wrong_checksum(server, valid, tmp_path):
    server.files["/v.zip"] = DATA[:100] + bytes([DATA[100] ^ 1]) + DATA[101:]
    with pytest.raises(InputError, match="part has the sha256 .* and not the published"):
        obtain(valid, tmp_path)
    assert not (tmp_path / valid.folder).exists()
    server.files["/v.zip"] = DATA  # and running again is the fix
    assert obtain(valid, tmp_path)


def test_an_archive_brought_by_hand(server, valid, tmp_path):
    archive = tmp_path / valid.file
    archive.write_bytes(DATA[:-30])
    with pytest.raises(InputError, match="v.zip has the sha256 .* remove it and run again"):
        obtain(valid, tmp_path)
    assert archive.read_bytes() == DATA[:-30]
    archive.write_bytes(DATA)
    part(valid, tmp_path).write_bytes(DATA[:100])  # of a run before
    assert obtain(valid, tmp_path) and not server.asked
    assert contents(tmp_path) == {**PLACED, valid.file: DATA}


# ---- folders ------------------------------------------------------------------------------------


def test_an_archive_with_another_number_of_images(valid, tmp_path):
    with pytest.raises(InputError, match="v.zip.part does not hold the images of .*valid_HR: name"):
        obtain(replace(valid, images={"": 4}), tmp_path)
    assert os.listdir(tmp_path / "DIV2K") == []


def test_an_incomplete_folder(valid, tmp_path):
    obtain(valid, tmp_path)
    (tmp_path / valid.folder / "0802.png").unlink()
    with pytest.raises(InputError, match="valid_HR must hold 3 images in .*valid_HR: move it"):
        obtain(valid, tmp_path)
    shutil.rmtree(tmp_path / valid.folder)
    (tmp_path / valid.folder).write_text("a file")
    with pytest.raises(InputError, match="must hold 3 images"):
        obtain(valid, tmp_path)


@pytest.mark.parametrize("prefix", ["", "DIV2K_valid_LR_bicubic/X2/", "some/where/else/"])
def test_wrapping_folders_do_not_matter(server, tmp_path, prefix):
    files = {f"{prefix}080{i}x2.png": png(i) for i in (1, 2, 3)}
    data = make_zip({**files, "__MACOSX/._0801.png": b"x", f"{prefix}._0801.png": b"x"})
    server.files["/v.zip"] = data
    folder = "DIV2K/DIV2K_valid_LR_bicubic/X2"
    obtain(Source(f"{server.url}/v.zip", folder, {"": 3}, checksum(data)), tmp_path)
    found = list_images(tmp_path / folder)
    assert [path.name for path in found] == ["0801x2.png", "0802x2.png", "0803x2.png"]


def test_benchmark_sets(server, tmp_path):
    data = server.files["/b.tar"] = make_tar({
        f"benchmark/{name}/{file}.png": png(size=size)
        for name in ("Set5", "Set14")
        for file, size in (("HR/a", (8, 6)), ("LR_bicubic/X2/ax2", (4, 3)))
    })  # fmt: skip
    images = {"Set5/HR": 1, "Set14/HR": 1}
    source = Source(f"{server.url}/b.tar", "benchmark", images, checksum(data))
    assert obtain(source, tmp_path) and not obtain(source, tmp_path)
    (image,) = open_set(tmp_path / "benchmark/Set5", [2]).images
    assert image.name == "a" and image.lr[2].name == "ax2.png"


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_two_at_once(valid, tmp_path):
    with lock_folder(tmp_path, ""), pytest.raises(InputError, match="another download is at work"):
        obtain(valid, tmp_path)
    assert obtain(valid, tmp_path)


KILLED = """
import sys
from gsr import cli
from gsr.data.fetch import SETS, Source
SETS["div2k"] = [Source(*eval(sys.argv[1]))]
cli.main(["data", "download", "div2k", "--output", sys.argv[2]])
"""


@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_restart_after_kill(server, valid, tmp_path, how):
    """In the middle of a transfer, with what an even earlier run was unpacking."""
    server.faults, server.hang = [HALF], threading.Event()
    command = [sys.executable, "-c", KILLED, repr(tuple(vars(valid).values())), str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 40
    while not (part(valid, tmp_path).exists() and part(valid, tmp_path).stat().st_size):
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
    process.send_signal(getattr(signal, how))
    errors = process.communicate(timeout=30)[1].decode()
    assert process.returncode == (-9 if how == "SIGKILL" else 130) and "Traceback" not in errors
    server.hang.set()
    have = part(valid, tmp_path).stat().st_size
    assert 0 < have <= HALF and not (tmp_path / valid.folder).exists()
    left = tmp_path / "DIV2K/.DIV2K_valid_HR.gsr-tmp/archive/DIV2K_valid_HR"
    left.mkdir(parents=True)
    (left / "0809.png").write_bytes(b"half an ima")

    assert obtain(valid, tmp_path) and contents(tmp_path) == PLACED
    assert server.asked == [None, f"bytes={have}-"]
    assert os.listdir(tmp_path / "DIV2K") == ["DIV2K_valid_HR"]


# ---- sets and command ---------------------------------------------------------------------------


def test_the_table():
    """URLs, the layout that the shipped config reads, and checksums of the right length."""
    sources = [source for sources in SETS.values() for source in sources]
    assert len({s.file for s in sources}) == len({s.folder for s in sources}) == len(sources) == 7
    for source in sources:
        assert source.url.startswith("https://") and source.url.endswith("/" + source.file)
        kind, _, digest = source.checksum.partition(":")
        assert len(bytes.fromhex(digest)) == {"sha256": 32, "md5": 16}[kind]
    config = (ROOT / "configs/published.yaml").read_text()
    for folder in ("DIV2K/DIV2K_train_HR", "DIV2K/DIV2K_valid_HR"):
        assert f"data/{folder}\n" in config and folder in {s.folder for s in sources}


def test_command(server, valid, tmp_path, monkeypatch, capsys):
    other = replace(valid, url=f"{server.url}/other.zip", folder="DIV2K/other")
    monkeypatch.setitem(SETS, "div2k", [valid, other])
    server.files["/mirror/v.zip"] = server.files["/other.zip"] = DATA
    output = str(tmp_path / "sets")
    arguments = ["data", "download", "div2k", "--output", output]
    mirror = ["--url", f"{server.url}/mirror/"]
    cli.main([*arguments, "--only", "v", *mirror])
    out, _ = capsys.readouterr()
    assert out == f"{output}/DIV2K/DIV2K_valid_HR is complete\n".replace("/", os.sep)
    for argv, text in (
        (mirror, "/mirror/other.zip cannot be downloaded"),
        (["--url", "file:///etc/passwd"], "--url file:///etc/passwd is not a URL"),
        (["--url", "http://[", "--only", "other"], "other.zip cannot be downloaded"),
        (["--url", "http://a b", "--only", "other"], "other.zip cannot be downloaded"),
        (["--url", f"http://{'é' * 99}", "--only", "other"], "other.zip cannot be downloaded"),
        (["--only", "x"], "--only x is none of div2k's v, other"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main([*arguments, *argv])
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and text in err.splitlines()[-1] and "Traceback" not in err
    cli.main([*arguments, "--only", "other"])
    assert capsys.readouterr().out.endswith("other is complete\n")
    cli.main([*arguments, "-q"])
    assert capsys.readouterr() == ("", "")
