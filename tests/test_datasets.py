"""`gsr data`: transfers that are interrupted, archives that are wicked, tiles that are complete."""

import collections
import dataclasses
import email.utils
import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gsr import cli
from gsr.config import DataConfig, load_config
from gsr.data import fetch as download
from gsr.data import tiles as datasets
from gsr.data.benchmarks import open_set
from gsr.data.fetch import Source, fetch, obtain, unpack
from gsr.data.patches import PatchDataset, split_images, steps_per_epoch
from gsr.data.tiles import Tiling, boxes, check, prepare, starts
from gsr.errors import InputError
from gsr.io.image import list_images, read_image, write_image
from gsr.io.paths import alone

ROOT = Path(__file__).parent.parent


# ---- a server -----------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, as `server.how` says; notes the requests in `server.asked`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        how, data = self.server.how, self.server.files.get(self.path)
        self.server.asked.append(dict(self.headers))
        if how.answers:
            code = how.answers.pop(0)
        else:
            code = 200 if data is not None else 404
        if code != 200:
            self.send_response(code)
            if code == 302:
                self.send_header("Location", how.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = f'"{hashlib.sha256(data).hexdigest()[:8]}"'
        modified = email.utils.formatdate(len(data), usegmt=True)
        start, wanted, condition = 0, self.headers.get("Range"), self.headers.get("If-Range")
        if wanted and how.range and (how.blind or condition in (etag, modified)):
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) + how.shift
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.server.asked[-1]["resumed"] = True
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if how.etag:
            self.send_header("ETag", how.etag if isinstance(how.etag, str) else etag)
        if how.modified:
            self.send_header("Last-Modified", modified)
        if how.length:
            self.send_header("Content-Length", str(len(data) - start))
        else:
            self.close_connection = True
        self.end_headers()
        stop = how.cuts.pop(0) if how.cuts else len(data)
        self.wfile.write(data[start:stop])
        self.wfile.flush()
        if stop < len(data):
            if how.hang:
                how.hang.wait(60)
            if how.reset:  # closing does not wait, and tells the other side so
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.shutdown = lambda how: None
                self.connection.close()
            self.close_connection = True

    def log_message(self, *_):
        pass


class How:
    """etag, modified, length: which headers there are; range: honours Range; blind: whatever
    If-Range says; shift: from another place; cuts: where the next transfers break off; answers: the
    next status codes; location: where 302 leads."""

    etag = modified = length = range = True
    blind, hang, reset, shift, location = False, None, False, 0, None

    def __init__(self):
        self.cuts, self.answers = [], []


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 5)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that hangs up is none
    server.files, server.asked, server.how = {}, [], How()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def noise(count, seed=0):
    return np.random.default_rng(seed).bytes(count)


def png(size=(8, 6), seed=0):
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


def make_tar(files, **more):
    """`files` as name: bytes; or name: TarInfo attributes for what is no file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **more) as archive:
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


def ranges(server):
    return [headers.get("Range") for headers in server.asked]


# ---- transfer -----------------------------------------------------------------------------------


@pytest.fixture
def part(tmp_path):
    return tmp_path / "file.zip.part"


DATA = noise(700_000)


def test_fetch(server, part):
    server.files["/file"] = DATA
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA and ranges(server) == [None]


@pytest.mark.parametrize("promise", ["etag", "modified"])
def test_interrupted_transfer_resumes(server, part, promise):
    setattr(server.how, {"etag": "modified", "modified": "etag"}[promise], False)
    server.files["/file"] = DATA
    server.how.cuts = [300_000, 450_001]
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=300000-", "bytes=450001-"]
    assert ["resumed" in headers for headers in server.asked] == [False, True, True]


def test_a_reset_connection_resumes(server, part):
    server.files["/file"] = DATA
    server.how.cuts, server.how.reset = [300_000], True
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA and len(server.asked) == 2


def test_a_weak_etag_promises_nothing(server, part):
    server.files["/file"] = DATA
    server.how.etag, server.how.modified, server.how.cuts = 'W/"1"', False, [300_000]
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA and ranges(server) == [None, None]


def fetch_in_two_runs(server, part, change=lambda: None):
    """A run that ends in the middle, and another."""
    server.files["/file"] = DATA
    server.how.cuts, server.how.answers = [300_000], [200, 403]
    with pytest.raises(InputError, match="answers 403"):
        fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA[:300_000]
    change()
    server.asked.clear()
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == server.files["/file"]


def test_the_next_run_resumes(server, part):
    fetch_in_two_runs(server, part)
    assert ranges(server) == ["bytes=300000-"] and "resumed" in server.asked[0]


@pytest.mark.parametrize("blind", [False, True], ids=["server sees it", "server does not"])
def test_a_changed_file_starts_anew(server, part, blind):
    server.how.blind = blind
    fetch_in_two_runs(server, part, lambda: server.files.update({"/file": noise(600_000, 1)}))
    assert ranges(server) == (["bytes=300000-", None] if blind else ["bytes=300000-"])


def test_a_shorter_file_starts_anew(server, part):
    """It has no rest at all: 416."""
    server.how.blind = True
    fetch_in_two_runs(server, part, lambda: server.files.update({"/file": noise(200_000, 1)}))
    assert ranges(server) == ["bytes=300000-", None]


def test_a_server_without_ranges(server, part):
    server.how.range = False
    fetch_in_two_runs(server, part)


def test_another_address_starts_anew(server, part):
    server.files["/mirror"] = DATA[::-1]
    server.files["/file"] = DATA
    server.how.cuts, server.how.answers = [300_000], [200, 403]
    with pytest.raises(InputError):
        fetch(f"{server.url}/file", part)
    fetch(f"{server.url}/mirror", part)
    assert part.read_bytes() == DATA[::-1] and ranges(server)[-1] is None


def test_a_server_that_tells_no_length(server, part):
    server.files["/file"] = DATA
    server.how.length = False
    fetch(f"{server.url}/file", part)
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA and len(server.asked) == 1


def test_a_rest_from_another_place_is_not_appended(server, part):
    server.files["/file"] = DATA
    server.how.cuts, server.how.shift = [300_000], -1000
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA and ranges(server) == [None, "bytes=300000-", None]


@pytest.mark.parametrize(
    "location, text",
    [("file:///etc/hostname", "/file: the server answers 302"), ("ftp://127.0.0.1/x", "type: ftp")],
)
def test_a_redirect_to_another_kind_of_address(server, part, location, text):
    server.how.answers, server.how.location = [302] * 9, location
    with pytest.raises(InputError, match=text):
        fetch(f"{server.url}/file", part)
    assert not part.exists()


def test_a_redirect(server, part):
    server.files["/there"] = DATA
    server.how.answers, server.how.location = [302], f"{server.url}/there"
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA


def test_more_than_was_published(server, part, monkeypatch):
    """Without a length the server could send for ever."""
    server.files["/file"] = noise(5_000_000)
    server.how.length = False
    written = []
    monkeypatch.setattr(download.os, "fsync", lambda handle: written.append(os.fstat(handle)))
    with pytest.raises(InputError, match="sends more than 700,000 bytes"):
        fetch(f"{server.url}/file", part, 700_000)
    assert written[-1].st_size <= 700_000 and not part.exists()


def test_less_than_was_published(server, part):
    server.files["/file"] = DATA
    server.how.length, server.how.cuts = False, [300_000]
    fetch(f"{server.url}/file", part, 700_000)
    assert part.read_bytes() == DATA


@pytest.mark.parametrize(
    "note",
    [
        "null", '["url", "etag", "modified", "size"]', "[" * 100_000,
        '{"url": URL, "etag": "a\\nb: c", "modified": null, "size": 99}',
        '{"url": URL, "etag": "\u2603", "modified": null, "size": 99}',
        '{"url": URL, "etag": {}, "modified": [], "size": "x"}',
        '{"url": URL, "etag": 5, "modified": null, "size": null}',
        '{"url": URL, "etag": "a", "modified": null}',
        '{"url": URL, "etag": "a", "size": null}',
    ],
)  # fmt: skip
def test_notes_that_are_none(server, part, note):
    server.files["/file"] = DATA
    part.write_bytes(DATA[:10])
    url = f"{server.url}/file"
    part.with_name(f"{part.name}.json").write_text(note.replace("URL", json.dumps(url)))
    fetch(url, part)
    assert part.read_bytes() == DATA and ranges(server) == [None]


def test_passing_failures_are_tried_again(server, part):
    server.files["/file"] = DATA
    server.how.answers = [503, 500, 429]
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA


def test_failures_that_last(server, part):
    server.files["/file"] = DATA
    server.how.cuts, server.how.answers = [1000], [200] + [503] * 99
    with pytest.raises(InputError, match=r"503 .* 5 tries in a row.*keeps the 1\.0 kB"):
        fetch(f"{server.url}/file", part)
    assert len(server.asked) == 1 + download.TRIES


def test_waits_grow(server, part, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.how.answers = [503] * 99
    with pytest.raises(InputError):
        fetch(f"{server.url}/file", part)
    assert waits == [2, 4, 8, 16]


def test_not_found(server, part):
    with pytest.raises(InputError, match=r"/none: the server answers 404 \(Not Found\); name a"):
        fetch(f"{server.url}/none", part)
    assert len(server.asked) == 1


def test_no_network(server, part):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match="cannot be fetched .*refused.*check the network"):
        fetch(f"http://127.0.0.1:{port}/file", part)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a/b", "x.zip", "http://", "http://[", ""]
)
def test_addresses_that_are_none(url, part):
    with pytest.raises(InputError, match="no address"):
        fetch(url, part)


def test_another_size_than_published(server, part):
    server.files["/file"] = DATA
    with pytest.raises(InputError, match="700,000 bytes and not the published 5"):
        fetch(f"{server.url}/file", part, 5)
    assert not part.exists()


def test_disk_too_small(server, part, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 1_000_000))
    server.files["/file"] = DATA
    with pytest.raises(InputError, match=r"1\.0 MB free, and file\.zip needs 1\.4 MB"):
        fetch(f"{server.url}/file", part)


def test_disk_full_on_the_way(server, part, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    server.files["/file"] = DATA
    with monkeypatch.context() as patch:
        patch.setattr(download.os, "fsync", full)
        patch.setattr("gsr.io.image.write_atomic", lambda path, data: Path(path).write_bytes(data))
        with pytest.raises(InputError, match="disk is full at .*; make room and run again"):
            fetch(f"{server.url}/file", part)
    assert len(server.asked) == 1  # no other try
    fetch(f"{server.url}/file", part)
    assert part.read_bytes() == DATA


# ---- unpacking ----------------------------------------------------------------------------------

FILES = {"a/1.png": b"one", "./a/b/2.png": b"two" * 50_000, "3.png": b""}
UNPACKED = {"a/1.png": b"one", "a/b/2.png": b"two" * 50_000, "3.png": b""}


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_unpack(tmp_path, make):
    (tmp_path / "x").write_bytes(make(FILES))
    unpack(tmp_path / "x", tmp_path / "out")
    assert contents(tmp_path / "out") == UNPACKED


def zip_entry(name, mode=0, **more):
    info = zipfile.ZipInfo("x")
    info.filename, info.external_attr = name, mode << 16
    for key, value in more.items():
        setattr(info, key, value)
    return info


def wicked():
    dir_type = {"type": tarfile.DIRTYPE}
    yield "up", make_tar({"../evil": b"x"}), "leads upwards"
    yield "up within", make_tar({"a/../../evil": b"x"}), "leads upwards"
    yield "absolute", make_tar({"/evil": b"x"}), "absolute path"
    yield "drive", make_tar({"C:/evil": b"x"}), "absolute path"
    yield "backslash", make_tar({"a\\..\\evil": b"x"}), "character"
    sym = {"type": tarfile.SYMTYPE, "linkname": "/etc"}
    yield "symlink", make_tar({"a": sym, "a/evil": b"x"}), "a link"
    yield "inner symlink", make_tar({"a": {"type": tarfile.SYMTYPE, "linkname": "b"}}), "a link"
    hard = {"type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"}
    yield "hardlink", make_tar({"a": hard}), "a link"
    yield "device", make_tar({"a": {"type": tarfile.CHRTYPE, "devmajor": 1}}), "no regular"
    yield "block device", make_tar({"a": {"type": tarfile.BLKTYPE}}), "no regular"
    yield "pipe", make_tar({"a": {"type": tarfile.FIFOTYPE}}), "no regular"
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.size": "10", "GNU.sparse.map": "0,1"}
    yield "sparse", make_tar({"a": {"pax_headers": sparse}}), "sparse"
    yield "twice", make_tar({"a/b": b"x", "a//./b": b"y"}), "comes twice"
    yield "a file above", make_tar({"a": b"x", "a/b": b"y"}), "a file where a folder"
    yield "a file above a folder", make_tar({"a": b"x", "a/b": dir_type}), "a file where a folder"
    yield "a file below", make_tar({"a/b/c": b"x", "a/b": b"y"}), "a file where a folder"
    yield "a file that is a folder", make_tar({"a": dir_type, "./a": b"y"}), "a file where a"
    yield "no name", make_tar({"./": b"x"}), "without a name"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zip_entry(""), b"x")
    yield "zip no name", file.getvalue(), "without a name"
    negative = {"pax_headers": {"size": "-512"}}
    yield "negative size", make_tar({"a": negative}), "less than no bytes"
    yield "zip up", make_zip({"a/../../evil": b"x"}), "leads upwards"
    yield "zip absolute", make_zip({"/evil": b"x"}), "absolute path"
    yield "zip drive", make_zip({"c:evil": b"x"}), "absolute path"
    for name, mode, text in (
        ("zip symlink", 0o120777, "a link"),
        ("zip device", 0o020644, "no regular"),
        ("zip pipe", 0o010644, "no regular"),
    ):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zip_entry("a", mode), "/etc/passwd")
        yield name, file.getvalue(), text


CASES = {name: (data, text) for name, data, text in wicked()}


@pytest.mark.parametrize("name", CASES)
def test_wicked_archives(tmp_path, name):
    data, text = CASES[name]
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InputError, match=f"{text}.*nothing of it was unpacked"):
        unpack(tmp_path / "x", tmp_path / "in" / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["x"]


def test_an_encrypted_zip(tmp_path):
    data = bytearray(make_zip({"a": b"x"}))
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InputError, match="encrypted"):
        unpack(tmp_path / "x", tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_grows_too_much(tmp_path, kind):
    if kind == "zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", bytes(70 << 20))
        data = file.getvalue()
        assert len(data) < 1 << 20
    else:
        data = make_tar({"a.png": b"x", "b.png": {"size": 1 << 50}})
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InputError, match=r"more than 67\.\d MB"):
        unpack(tmp_path / "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_MEMBERS", 2)
    (tmp_path / "x").write_bytes(make_tar(FILES))
    with pytest.raises(InputError, match="or 2 files"):
        unpack(tmp_path / "x", tmp_path / "out")


def test_a_zip_that_lies_about_a_size(tmp_path):
    """The directory says 10 bytes, the data are a thousand times that."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10_000))
    data = bytearray(file.getvalue())
    entry = data.index(b"PK\1\2")
    data[entry + 24 : entry + 28] = (10).to_bytes(4, "little")
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        unpack(tmp_path / "x", tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*")) <= 10


def test_disk_too_small_for_what_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(make_zip(FILES))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 100_000))
    with pytest.raises(InputError, match=r"100\.0 kB free, and unpacking x needs 150\.0 kB"):
        unpack(tmp_path / "x", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


PAGE = b"<!DOCTYPE html><html>please log in</html>" * 30


def damaged():
    whole = make_zip({"a.png": noise(5000)})
    yield "cut zip", whole[:3000]
    yield "zip with a changed byte", whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
    yield "cut tar", make_tar({"a.png": noise(50_000)})[:20_000]
    yield "web page", PAGE
    yield "empty", b""


@pytest.mark.parametrize("name,data", list(damaged()), ids=[name for name, _ in damaged()])
def test_damaged_archives(tmp_path, name, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InputError, match="x is damaged .*; remove it and run again"):
        unpack(tmp_path / "x", tmp_path / "out")


def test_random_damage_has_an_end(tmp_path):
    """Whatever byte changes: the right files, or a refusal, and never another exception."""
    rng = np.random.default_rng(0)
    for make in (make_zip, make_tar):
        whole = make({"a/1.png": noise(300), "a/2.png": noise(400)})
        for i in range(60):
            data = bytearray(whole)
            data[rng.integers(len(data))] = rng.integers(256)
            (tmp_path / "x").write_bytes(data)
            try:
                unpack(tmp_path / "x", tmp_path / f"{make.__name__}{i}")
            except InputError:
                pass


# ---- sets ---------------------------------------------------------------------------------------

VALID = {f"DIV2K_valid_HR/080{i}.png": png(seed=i) for i in (1, 2, 3)}


def checksum(data, kind="sha256"):
    return f"{kind}:{hashlib.new(kind, data).hexdigest()}"


@pytest.fixture
def valid(server):
    """A source of three pictures with all that is published of DIV2K's."""
    data = make_zip(VALID)
    server.files["/v.zip"] = data
    return Source(
        "DIV2K_valid_HR.zip", f"{server.url}/v.zip", "DIV2K/DIV2K_valid_HR", {"": 3},
        checksum(data), len(data),
    )  # fmt: skip


def test_obtain(server, valid, tmp_path):
    assert obtain(valid, tmp_path / "data")
    assert contents(tmp_path / "data") == {f"DIV2K/{name}": data for name, data in VALID.items()}
    assert len(open_set(tmp_path / "data" / valid.folder, [2]).images) == 3
    assert not obtain(valid, tmp_path / "data") and len(server.asked) == 1


def test_a_folder_that_is_not_complete(valid, tmp_path):
    obtain(valid, tmp_path)
    (tmp_path / valid.folder / "0802.png").unlink()
    with pytest.raises(InputError, match="not complete .2 pictures in .* instead of 3.: move it"):
        obtain(valid, tmp_path)


def test_keep(server, valid, tmp_path):
    obtain(valid, tmp_path, keep=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["DIV2K", "DIV2K_valid_HR.zip"]
    assert (tmp_path / valid.file).read_bytes() == server.files["/v.zip"]
    shutil.rmtree(tmp_path / valid.folder)
    obtain(valid, tmp_path)  # from what was kept, which stays
    assert len(server.asked) == 1 and (tmp_path / valid.file).exists()


def test_a_kill_between_the_pictures_and_the_end(server, valid, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download, "_remove", lambda part: None)
        obtain(valid, tmp_path)
    assert len(list(tmp_path.glob("*.part*"))) == 2
    assert not obtain(valid, tmp_path) and len(server.asked) == 1
    assert not list(tmp_path.glob("*.part*"))


def test_an_archive_brought_by_hand(server, valid, tmp_path):
    server.how.cuts, server.how.answers = [100], [200, 403]
    with pytest.raises(InputError):
        obtain(valid, tmp_path)
    server.asked.clear()
    (tmp_path / valid.file).write_bytes(server.files["/v.zip"])
    obtain(valid, tmp_path)
    assert not server.asked and (tmp_path / valid.file).exists()
    assert not list(tmp_path.glob("*.part*"))
    assert len(list_images(tmp_path / valid.folder)) == 3


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_wrong_checksum(server, valid, tmp_path, kind):
    wrong = bytearray(server.files["/v.zip"])
    right = Source(**{**vars(valid), "checksum": checksum(bytes(wrong), kind)})
    wrong[100] ^= 1
    server.files["/v.zip"] = bytes(wrong)
    for _ in range(2):
        with pytest.raises(InputError, match=f"part has the {kind} .* and not the published"):
            obtain(right, tmp_path)
    assert len(server.asked) == 1 and not (tmp_path / valid.folder).exists()
    # What the sentence says mends it.
    server.files["/v.zip"] = make_zip(VALID)
    (tmp_path / "DIV2K_valid_HR.zip.part").unlink()
    obtain(right, tmp_path)


def test_no_checksum_takes_another_file(server, valid, tmp_path):
    server.files["/v.zip"] = make_zip({**VALID, "readme": b"another"})
    with pytest.raises(InputError, match="bytes and not the published"):
        obtain(valid, tmp_path)
    assert obtain(valid, tmp_path, checksum=False)


@pytest.mark.parametrize("checked", [True, False])
def test_a_page_instead_of_an_archive(server, valid, tmp_path, checked):
    """Whether or not a checksum tells: one sentence, and what it says mends it."""
    source = dataclasses.replace(valid, size=None)
    server.files["/v.zip"] = PAGE
    text = "part has the sha256 .* remove it to" if checked else "part is damaged .*; remove it and"
    for _ in range(2):
        with pytest.raises(InputError, match=f"{text}.* fetch it anew"):
            obtain(source, tmp_path, checksum=checked)
    assert len(server.asked) == 1 and not (tmp_path / valid.folder).exists()
    server.files["/v.zip"] = make_zip(VALID)
    (tmp_path / f"{valid.file}.part").unlink()
    assert obtain(source, tmp_path, checksum=checked)
    assert contents(tmp_path) == {f"DIV2K/{name}": data for name, data in VALID.items()}


def test_a_damaged_archive_brought_by_hand(server, valid, tmp_path):
    archive = tmp_path / valid.file
    archive.write_bytes(server.files["/v.zip"][:-30])
    with pytest.raises(InputError, match="HR.zip has the sha256 .* remove it to fetch it anew"):
        obtain(valid, tmp_path)
    with pytest.raises(InputError, match="HR.zip is damaged .*; remove it and run again to fetch"):
        obtain(valid, tmp_path, checksum=False)
    assert contents(tmp_path) == {valid.file: server.files["/v.zip"][:-30]} and not server.asked
    archive.unlink()
    assert obtain(valid, tmp_path) and not archive.exists()


def in_the_way(source, tmp_path):
    archive, folder = tmp_path / source.file, tmp_path / source.folder
    folder.parent.mkdir()
    yield archive.mkdir, archive.rmdir, "DIV2K_valid_HR.zip is a folder, and no archive: move it"
    link = lambda: folder.symlink_to(tmp_path / "nowhere")  # noqa: E731
    yield link, folder.unlink, "not complete .a link that leads nowhere.: move it away"
    yield lambda: folder.write_text("x"), folder.unlink, "not complete .a file.: move it away"


def test_what_is_in_the_way(valid, tmp_path):
    for put, remove, text in in_the_way(valid, tmp_path):
        put()
        with pytest.raises(InputError, match=text):
            obtain(valid, tmp_path)
        remove()
    assert obtain(valid, tmp_path)


def test_another_run_that_ends_just_before(server, valid, tmp_path, monkeypatch):
    def late(folder, refusal):
        monkeypatch.undo()
        obtain(valid, tmp_path)
        return alone(folder, refusal)

    monkeypatch.setattr(download, "alone", late)
    assert not obtain(valid, tmp_path) and len(server.asked) == 1


def test_another_number_of_pictures(server, valid, tmp_path):
    source = Source(**{**vars(valid), "pictures": {"": 4}})
    text = "HR.zip.part unpacks to 3 pictures in DIV2K/DIV2K_valid_HR instead .* mirror by --url"
    with pytest.raises(InputError, match=text):
        obtain(source, tmp_path)
    assert list((tmp_path / "DIV2K").iterdir()) == []
    # What the sentence says mends it.
    server.files["/mirror"] = make_zip({**VALID, "DIV2K_valid_HR/0804.png": png(seed=4)})
    assert obtain(source, tmp_path, f"{server.url}/mirror", checksum=False)


def test_pictures_beside_a_folder_do_not_wrap_it(server, tmp_path):
    files = {"a.png": png(), **{f"small/{i}.png": png(seed=i) for i in range(3)}}
    server.files["/v.zip"] = make_zip(files)
    digest = checksum(server.files["/v.zip"])
    with pytest.raises(InputError, match="1 pictures in valid instead of 3"):
        obtain(Source("v.zip", f"{server.url}/v.zip", "valid", {"": 3}, digest), tmp_path)


@pytest.mark.parametrize("prefix", ["", "DIV2K_valid_LR_bicubic/X2/", "some/where/else/"])
def test_wrapping_folders_do_not_matter(server, valid, tmp_path, prefix):
    files = {f"{prefix}080{i}x2.png": png(seed=i) for i in (1, 2, 3)}
    server.files["/v.zip"] = make_zip({**files, "__MACOSX/._0801.png": b"x", ".DS_Store": b"x"})
    folder, digest = "DIV2K/DIV2K_valid_LR_bicubic/X2", checksum(server.files["/v.zip"])
    source = Source("x2.zip", f"{server.url}/v.zip", folder, {"": 3}, digest)
    obtain(source, tmp_path)
    found = list_images(tmp_path / source.folder)
    assert [path.name for path in found] == ["0801x2.png", "0802x2.png", "0803x2.png"]


def test_a_set_of_sets(server, tmp_path):
    files = {
        f"benchmark/{name}/{sub}.png": png(size)
        for name in ("Set5", "Set14")
        for sub, size in (("HR/a", (8, 6)), ("LR_bicubic/X2/ax2", (4, 3)))
    }
    server.files["/b.tar"] = make_tar(files)
    pictures, digest = {"Set5/HR": 1, "Set14/HR": 1}, checksum(server.files["/b.tar"], "md5")
    source = Source("b.tar", f"{server.url}/b.tar", "benchmark", pictures, digest)
    obtain(source, tmp_path)
    (picture,) = open_set(tmp_path / "benchmark/Set5", [2]).images
    assert picture.name == "a" and picture.lr[2].name == "ax2.png"


@pytest.mark.parametrize("prefix", ["Flickr2K/Flickr2K_HR/", "Flickr2K/", ""])
def test_a_mirror_with_bare_pictures(server, tmp_path, prefix):
    server.files["/f"] = make_zip({f"{prefix}{i}.png": png(seed=i) for i in range(3)})
    digest = checksum(server.files["/f"])
    obtain(Source("f.tar", f"{server.url}/f", "Flickr2K", {"Flickr2K_HR": 3}, digest), tmp_path)
    assert len(list_images(tmp_path / "Flickr2K/Flickr2K_HR")) == 3


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_two_at_once(valid, tmp_path):
    with alone(tmp_path, ""):
        with pytest.raises(InputError, match="another download is at work"):
            obtain(valid, tmp_path)
    obtain(valid, tmp_path)


KILLED = """
import sys
from gsr import cli
from gsr.data import tiles as datasets
from gsr.data.fetch import Source
datasets.SETS["div2k"] = [Source(*eval(sys.argv[1]))]
cli.main(["data", "download", "div2k", "--output", sys.argv[2]])
"""


@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_restart_after_kill(server, valid, tmp_path, how):
    """In the middle of a transfer, with what an even earlier run was unpacking lying about."""
    size = valid.size
    server.how.cuts, server.how.hang = [size // 2], threading.Event()
    fields = (valid.file, valid.url, valid.folder, valid.pictures, valid.checksum, size)
    command = [sys.executable, "-c", KILLED, repr(fields), str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    part = tmp_path / "DIV2K_valid_HR.zip.part"
    deadline = time.monotonic() + 40
    while (not part.exists() or part.stat().st_size < size // 2) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    process.send_signal(getattr(signal, how))
    errors = process.communicate(timeout=30)[1].decode()
    assert process.returncode == (-9 if how == "SIGKILL" else 130)
    assert "Traceback" not in errors
    server.how.hang.set()
    half = part.stat().st_size
    assert half == size // 2 and not (tmp_path / valid.folder).exists()

    left = tmp_path / "DIV2K/.DIV2K_valid_HR.gsr-tmp/archive"
    left.mkdir(parents=True)
    (left / "0801.png").write_bytes(b"half a pict")
    obtain(valid, tmp_path)
    assert ranges(server) == [None, f"bytes={half}-"]
    assert contents(tmp_path / "DIV2K") == VALID
    assert [path.name for path in tmp_path.iterdir()] == ["DIV2K"]


def test_a_kill_after_the_last_byte(server, valid, tmp_path):
    fetch(valid.url, tmp_path / "DIV2K_valid_HR.zip.part")
    obtain(valid, tmp_path)
    assert len(server.asked) == 1


def test_the_table():
    """Addresses, the layout that the shipped recipe reads, and checksums of the right length."""
    sources = [source for sources in datasets.SETS.values() for source in sources]
    assert len({s.file for s in sources}) == len({s.folder for s in sources}) == len(sources) == 7
    for source in sources:
        assert source.url.startswith("https://") and source.url.endswith("/" + source.file)
        kind, _, digest = source.checksum.partition(":")
        assert len(bytes.fromhex(digest)) == {"sha256": 32, "md5": 16}[kind]
    recipe = (ROOT / "configs/published.yaml").read_text()
    for folder in ("DIV2K/DIV2K_train_HR", "DIV2K/DIV2K_valid_HR"):
        assert f"data/{folder}\n" in recipe and folder in {s.folder for s in sources}
    # A zip archive as large as the one of DIV2K's training pictures may unpack.
    assert max(s.size or 0 for s in sources) == 3_530_603_713


def test_command(server, valid, tmp_path, monkeypatch, capsys):
    other = Source(**{**vars(valid), "file": "other.zip", "folder": "DIV2K/other"})
    monkeypatch.setitem(datasets.SETS, "div2k", [valid, other])
    server.files["/mirror/DIV2K_valid_HR.zip"] = server.files["/v.zip"]
    output = str(tmp_path / "sets")
    arguments = ["data", "download", "div2k", "--output", output]
    mirror = ["--url", f"{server.url}/mirror/"]
    cli.main([*arguments, "--only", "DIV2K_valid_HR", *mirror])
    out, _ = capsys.readouterr()
    assert out == f"{output}/DIV2K/DIV2K_valid_HR is complete\n".replace("/", os.sep)

    def refused(*argv):
        with pytest.raises(SystemExit) as caught:
            cli.main([*arguments, *argv])
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return err.splitlines()[-1]

    assert "/mirror/other.zip: the server answers 404" in refused(*mirror)
    assert "one archive and div2k has 2" in refused("--url", f"{server.url}/v.zip")
    assert "--only x is none of div2k's DIV2K_valid_HR, other" in refused("--only", "x")
    cli.main([*arguments, "-q"])
    cli.main([*arguments, "--only", "other", "--url", f"{server.url}/v.zip?download=1"])
    out, err = capsys.readouterr()
    assert out.endswith("other is complete, nothing to do\n") and err == ""


def test_help(capsys):
    for argv, words in (
        (["data", "--help"], ["gsr data download benchmark", "gsr data prepare", "data.train="]),
        (["data", "download", "--help"], ["--url", "--no-checksum", "academic research"]),
        (["data", "prepare", "--help"], ["--crop", "--check", "data.val"]),
        (["--help"], ["gsr data --help"]),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        out = capsys.readouterr().out
        assert caught.value.code == 0 and all(word in out for word in words), out


# ---- tiles --------------------------------------------------------------------------------------

SMALL = Tiling(crop=24, step=16, min_side=12)


@pytest.mark.parametrize(
    "length,expected",
    [(480, [0]), (300, [0]), (481, [0, 1]), (960, [0, 240, 480]), (1000, [0, 240, 480, 520])],
)
def test_starts(length, expected):
    assert starts(length, 480, 240) == expected


@pytest.mark.parametrize("seed", range(20))
def test_tiles_cover_every_pixel_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    height, width, crop = rng.integers(1, 60, 3)
    tiling = Tiling(int(crop), int(rng.integers(1, crop + 1)), 1)
    covered = np.zeros((height, width), int)
    found = boxes(int(height), int(width), tiling)
    for top, left, h, w in found:
        assert (h, w) == (min(crop, height), min(crop, width))
        assert 0 <= top <= height - h and 0 <= left <= width - w
        covered[top : top + h, left : left + w] += 1
    assert covered.min() >= 1 and len(set(found)) == len(found)


@pytest.fixture
def photos(tmp_path):
    """Pictures of every kind: of use, too small, damaged, duplicate."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)
    for name, size in {
        "a": (60, 50),
        "sub/a": (24, 24),
        "wide": (70, 15),
        "small": (11, 40),
    }.items():
        array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{name}.png")
    Image.open(folder / "a.png").save(folder / "copy.bmp")  # same pixels, another file
    Image.open(folder / "a.png").convert("L").save(folder / "grey.png")
    Image.open(folder / "a.png").convert("RGBA").rotate(180).save(folder / "alpha.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:3000])
    (folder / "text.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("ignored")
    return folder


KEPT = ["a.png", "alpha.png", "grey.png", "sub/a.png", "wide.png"]


def test_check(photos):
    report = check(photos, SMALL)
    assert list(report["pictures"]) == KEPT
    assert report["duplicates"] == [{"file": "copy.bmp", "same_as": "a.png"}]
    reasons = {entry["file"]: entry["reason"] for entry in report["refused"]}
    assert list(reasons) == ["cut.png", "small.png", "text.jpg"]
    assert "damaged or truncated" in reasons["cut.png"] and "not a picture" in reasons["text.jpg"]
    assert "11 x 40 pixels, below the least side 12" in reasons["small.png"]
    assert report["counts"] == {"found": 9, "kept": 5, "refused": 3, "duplicates": 1}
    assert report["width"] == {"min": 24, "median": 60, "max": 70}
    assert report["pixels"] == 3 * 60 * 50 + 24 * 24 + 70 * 15
    assert report["bytes"] == sum((photos / name).stat().st_size for name in KEPT)


def test_prepare(photos, tmp_path):
    output = tmp_path / "tiles"
    report = prepare(photos, output, SMALL)
    expected = {}
    for name in KEPT:
        picture = read_image(photos / name)
        cuts = boxes(*picture.shape[:2], SMALL)
        for i, (top, left, height, width) in enumerate(cuts, 1):
            key = f"{name.removesuffix('.png')}_s{i:03d}.png"
            expected[key] = picture[top : top + height, left : left + width]
    found = {path.relative_to(output).as_posix(): path for path in list_images(output)}
    assert set(found) == set(expected)
    for name, path in found.items():
        assert Image.open(path).format == "PNG" and Image.open(path).mode == "RGB"
        np.testing.assert_array_equal(read_image(path), expected[name])
    assert report["tiles"] == {
        "count": len(expected), "written": len(expected), "skipped": 0,
        "bytes": sum(path.stat().st_size for path in found.values()),
        "sizes": {"24x15": 4, "24x24": len(expected) - 4},
    }  # fmt: skip
    assert json.loads((output / "prepare.json").read_text()) == report and report["complete"]
    text = datasets.describe(report)
    assert "9 pictures, 5 of use" in text and "duplicate: copy.bmp is a.png" in text


def test_processes_make_the_same(photos, tmp_path):
    one = prepare(photos, tmp_path / "one", SMALL)
    two = prepare(photos, tmp_path / "two", SMALL, workers=2)
    assert one == two and contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("format", ["tiff", "bmp"])
def test_other_formats_lose_nothing(photos, tmp_path, format):
    prepare(photos, tmp_path / "tiles", Tiling(24, 16, 12, format))
    tile = read_image(tmp_path / f"tiles/sub/a_s001.{format}")
    np.testing.assert_array_equal(tile, read_image(photos / "sub/a.png"))


def test_prepare_goes_on_where_it_stopped(photos, tmp_path, monkeypatch):
    output = tmp_path / "tiles"
    calls = []

    def failing(path, array):
        calls.append(path)
        if len(calls) == 8:
            raise InputError(f"{path} cannot be written: No space left on device")
        write_image(path, array)

    with monkeypatch.context() as patch:
        patch.setattr("gsr.io.image.write_image", failing)
        with pytest.raises(InputError, match="No space left"):
            prepare(photos, output, SMALL)
    before = {path: path.stat().st_mtime_ns for path in list_images(output)}
    assert len(before) == 7
    assert not json.loads((output / "prepare.json").read_text())["complete"]
    damaged = sorted(before)[-2:]
    damaged[0].write_bytes(b"")  # as a disk may leave it
    damaged[1].write_bytes(png())
    (output / ".a_s009.png.x.gsr-tmp").write_bytes(b"left over")

    report = prepare(photos, output, SMALL)
    assert report["complete"] and report["tiles"]["skipped"] == 5
    for path, then in before.items():
        assert (path.stat().st_mtime_ns == then) == (path not in damaged)
    assert not list(output.glob(".*"))
    again = prepare(photos, output, SMALL)
    assert again["tiles"]["written"] == 0
    assert again == {
        **report,
        "tiles": {**report["tiles"], "written": 0, "skipped": again["tiles"]["count"]},
    }


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_two_prepare_at_once(photos, tmp_path, monkeypatch):
    """The second would remove the file that the first is about to give its name."""
    output, replace, met = tmp_path / "tiles", os.replace, []

    def with_another(temporary, path):
        if Path(path).suffix == ".png" and not met:
            met.append(path)
            with pytest.raises(InputError, match="another gsr data prepare is .*tiles; wait"):
                prepare(photos, output, SMALL)
        replace(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", with_another)
        report = prepare(photos, output, SMALL)
    assert met and report["complete"] and not list(output.rglob(".*"))
    assert prepare(photos, output, SMALL)["tiles"]["written"] == 0


def test_a_tile_that_was_cut_short_is_made_again(photos, tmp_path):
    output = tmp_path / "tiles"
    first = prepare(photos, output, SMALL)
    before = contents(output)
    for i, path in enumerate(list_images(output)[:2]):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        report = prepare(photos, output, SMALL)
        assert report["tiles"]["written"] == 1 and contents(output).keys() == before.keys()
        assert contents(output)[path.name] == before[path.name]
        if i == 0:  # a report of an earlier version, or of a run that was interrupted
            for facts in report["pictures"].values():
                del facts["tiles"]
            (output / "prepare.json").write_text(json.dumps(report))
    assert report["pictures"] == first["pictures"]
    lengths = [n for facts in report["pictures"].values() for n in facts["tiles"]]
    assert sum(lengths) == report["tiles"]["bytes"] and len(lengths) == report["tiles"]["count"]


@pytest.mark.parametrize(
    "plan",
    [
        "null", "[]", '"text"', "[" * 100_000, '{"settings": []}', '{"pictures": {}}',
        '{"settings": null, "pictures": {}}', '{"settings": [], "pictures": {}}',
        '{"settings": SETTINGS, "pictures": null}', '{"settings": SETTINGS, "pictures": ["a"]}',
        '{"settings": SETTINGS, "pictures": {"a.png": 3}}',
        '{"settings": SETTINGS, "pictures": {"a.png": {}}}',
        '{"settings": SETTINGS, "pictures": {"a.png": "sha256"}}',
    ],
)  # fmt: skip
def test_reports_that_are_none(photos, tmp_path, plan):
    (tmp_path / "tiles").mkdir()
    settings = json.dumps(dataclasses.asdict(SMALL))
    (tmp_path / "tiles" / "prepare.json").write_text(plan.replace("SETTINGS", settings))
    with pytest.raises(InputError, match="is no report of `gsr data prepare`; choose another"):
        prepare(photos, tmp_path / "tiles", SMALL)


@pytest.mark.parametrize("lengths", ["[]", '"ab"', "[1, 2]", "7"])
def test_lengths_that_are_none(photos, tmp_path, lengths):
    first = prepare(photos, tmp_path / "tiles", SMALL)
    plan = json.loads((tmp_path / "tiles" / "prepare.json").read_text())
    plan["pictures"]["a.png"]["tiles"] = json.loads(lengths)
    (tmp_path / "tiles" / "prepare.json").write_text(json.dumps(plan))
    again = prepare(photos, tmp_path / "tiles", SMALL)
    assert again["tiles"]["written"] == 0 and again["pictures"] == first["pictures"]


def test_a_picture_that_changes_while_it_is_cut(photos, tmp_path):
    with pytest.raises(InputError, match="a.png has changed while"):
        datasets._cut(str(photos / "a.png"), "0" * 64, (50, 60), ["x.png"] * 12, None, SMALL)


def test_new_pictures_are_added(photos, tmp_path):
    first = prepare(photos, tmp_path / "tiles", SMALL)
    (photos / "0.png").write_bytes((photos / "wide.png").read_bytes())  # sorts before it
    Image.open(photos / "wide.png").rotate(180).save(photos / "new.png")
    report = prepare(photos, tmp_path / "tiles", SMALL)
    assert set(report["pictures"]) == {*first["pictures"], "new.png"}
    assert {"file": "0.png", "same_as": "wide.png"} in report["duplicates"]
    assert report["tiles"]["written"] == 4


def refuse_changed(photos, output):
    Image.open(photos / "a.png").rotate(90).save(photos / "a.png")


def refuse_gone(photos, output):
    (photos / "wide.png").unlink()


def refuse_foreign(photos, output):
    write_image(output / "sub/other.png", np.zeros((30, 30, 3), np.uint8))


def refuse_damaged_report(photos, output):
    (output / "prepare.json").write_text("{")


@pytest.mark.parametrize(
    "change,text",
    [
        (refuse_changed, "1 pictures of .* have changed or gone .* first a.png"),
        (refuse_gone, "changed or gone .* first wide.png"),
        (refuse_foreign, "tiles holds sub.other.png, which is no tile"),
        (refuse_damaged_report, "is no report of"),
    ],
)
def test_tiles_of_something_else(photos, tmp_path, change, text):
    prepare(photos, tmp_path / "tiles", SMALL)
    change(photos, tmp_path / "tiles")
    before = contents(tmp_path / "tiles")
    with pytest.raises(InputError, match=text):
        prepare(photos, tmp_path / "tiles", SMALL)
    assert contents(tmp_path / "tiles") == before


def test_without_pictures_no_folder_is_made(tmp_path):
    for source in ("none", "empty"):
        with pytest.raises(InputError):
            prepare(tmp_path / source, tmp_path / "a/b", SMALL)
        (tmp_path / "empty").mkdir(exist_ok=True)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_prepare_refusals(photos, tmp_path):
    prepare(photos, tmp_path / "tiles", SMALL)
    for output, tiling, text in (
        (tmp_path / "tiles", Tiling(24, 8, 12), "made with --step 16 and not 8"),
        (photos / "tiles", SMALL, "must not lie in one another"),
        (tmp_path, SMALL, "must not lie in one another"),
        (photos, SMALL, "must not lie in one another"),
        (tmp_path / "new", Tiling(), "no picture that can be used: .*a.png is 60 x 50"),
    ):
        with pytest.raises(InputError, match=text):
            prepare(photos, output, tiling)
    shutil.copy(photos / "wide.png", photos / "alpha.bmp")  # a duplicate claims no name
    prepare(photos, tmp_path / "tiles", SMALL)
    Image.open(photos / "wide.png").rotate(180).save(photos / "alpha.bmp")
    with pytest.raises(InputError, match="alpha.bmp and alpha.png have the same name"):
        prepare(photos, tmp_path / "tiles", SMALL)
    for bad in ({"step": 500}, {"step": 0}, {"crop": 0}, {"min_side": 0}, {"format": "jpg"}):
        with pytest.raises(InputError):
            Tiling(**bad)
    with pytest.raises(InputError, match="--workers"):
        check(photos, workers=0)


def test_tiles_are_trained_on(photos, tmp_path):
    prepare(photos, tmp_path / "tiles", Tiling(24, 16, 24))
    config = DataConfig(train=str(tmp_path / "tiles"), patch=6, val_count=2)
    train, val = split_images(config)
    assert len(val) == 2 and len(PatchDataset(train, config)) == len(train) > 20


def test_prepare_command(photos, tmp_path, capsys):
    tiles, report = tmp_path / "tiles", tmp_path / "new" / "report.json"
    sizes = ["--crop", "24", "--step", "16", "--min-side", "12", "--workers", "1"]
    cli.main(["data", "prepare", str(photos), str(tiles), *sizes])
    assert "tiles (" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "prepare", str(photos), "--check", *sizes, "--report", str(report)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and "3 of the 9 pictures" in err.splitlines()[-1]
    assert "5 of use" in out and json.loads(report.read_text())["counts"]["kept"] == 5
    for name in ("cut.png", "small.png", "text.jpg"):
        (photos / name).unlink()
    cli.main(["data", "prepare", str(photos), "--check", "-q", *sizes])
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "prepare", str(photos)])
    assert caught.value.code == 2 and "OUTPUT is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.png", "report.txt", "report", "prepare.json", ""])
def test_reports_that_would_write_over_something(photos, name):
    before = contents(photos)
    with pytest.raises(InputError, match=f"--report .*{name}.* name "):
        datasets.main(["prepare", str(photos), "--check", "-q", "--report", str(photos / name)])
    assert contents(photos) == before


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_names_that_are_not_utf_8(photos, tmp_path, capsys):
    target = os.fsdecode(os.fsencode(photos) + b"/\xff.png")
    shutil.copy(photos / "a.png", target)
    sizes = ["--crop", "24", "--step", "16", "--min-side", "12", "--workers", "1"]
    cli.main(["data", "prepare", str(photos), str(tmp_path / "tiles"), *sizes])
    assert r"duplicate: \udcff.png is a.png" in capsys.readouterr().out
    report = json.loads((tmp_path / "tiles" / "prepare.json").read_text(encoding="utf-8"))
    assert {"file": "\udcff.png", "same_as": "a.png"} in report["duplicates"]


def test_a_recipe_for_tiles():
    """What the help and the documentation say of 32,000 tiles are the published steps."""
    overrides = ["data.repeat=1", "train.epochs=1000", "train.step_epochs=100"]
    for text in (datasets.EPILOG, (ROOT / "docs" / "research.md").read_text(encoding="utf-8")):
        assert all(f" {override}" in text for override in overrides)

    def recipe(pictures, overrides):
        c = load_config(ROOT / "configs" / "published.yaml", overrides)
        steps = steps_per_epoch([c.data.repeat] * pictures, c.data)
        return steps * c.train.epochs, steps * c.train.step_epochs

    assert recipe(800, []) == recipe(32_000, overrides) == (2_000_000, 200_000)
    assert recipe(32_000, [])[0] == 40 * 2_000_000


def test_a_worker_that_is_killed():
    with pytest.raises(InputError, match="fewer --workers"):
        list(datasets._map(os._exit, [(9,)] * 2, 2))
