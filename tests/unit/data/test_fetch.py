"""Source files from every kind of place, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import socket
import threading
import zipfile

import pytest

from treadle.data.sources.fetch import download, fetch
from treadle.errors import DataError, IntegrityError, TransientError

FILES = {"a.txt": b"alpha\n" * 50, "b c.txt": b"beta"}
SUMS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture
def folder(tmp_path):
    """A folder with both files, loose and in archives."""
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme", "x")
        for name, data in FILES.items():
            archive.writestr(f"inner/{name}", data)
    return tmp_path


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The folder over HTTP, and a few places that misbehave."""

    requests: list[str]

    def do_GET(self):
        self.requests.append(self.path)
        if self.path.startswith("/busy/"):
            self.send_error(503)
        elif self.path.startswith("/short/"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"only this")
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(folder):
    """The address of a real server on this machine, and what it was asked for."""
    requests = []
    handler = functools.partial(type("Handler", (Quiet,), {"requests": requests}), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()
        thread.join()


def test_a_folder_and_an_archive(folder):
    assert fetch(str(folder), SUMS) == FILES
    assert fetch(str(folder / "all.zip"), SUMS) == FILES
    assert fetch(str(folder), {}) == {}


def test_a_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert fetch("~", SUMS) == FILES
    assert fetch("~/all.zip", SUMS) == FILES


def test_a_folder_and_an_archive_over_http(server):
    address, requests = server
    assert fetch(address, SUMS) == FILES
    assert fetch(f"{address}/", SUMS) == FILES
    requests.clear()
    assert fetch(f"{address}/all.zip", SUMS) == FILES
    assert requests == ["/all.zip"]  # once, whatever the number of files
    assert fetch(f"{address}/all.zip?version=1", SUMS) == FILES


def test_another_digest_is_refused(folder):
    with pytest.raises(IntegrityError, match=rf"a\.txt: got sha256 {SUMS['a.txt']}, expected {'0' * 64}"):
        fetch(str(folder), SUMS | {"a.txt": "0" * 64})


def test_what_is_not_there_is_an_error_of_the_data(folder, server):
    address, _ = server
    wanted = {"c.txt": "0" * 64}
    for source, words in (
        (str(folder), "No such file"),
        (str(folder / "none"), "No such file"),
        (str(folder / "none.zip"), "No such file"),
        (str(folder / "a.txt"), "Not a directory"),
        (str(folder / "all.zip"), "holds no file c.txt"),
        (address, "404"),
        (f"{address}/none.zip", "404"),
        (f"{address}/all.zip", "holds no file c.txt"),
        (None, "not given"),
        ("", "not given"),
    ):
        with pytest.raises(DataError, match=words):
            fetch(source, wanted)


def test_a_server_that_is_away_may_come_back(server):
    address, _ = server
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, and nobody listens
        dead = f"http://127.0.0.1:{bound.getsockname()[1]}"
        for source, words in (
            (dead, "refused"),
            (f"{dead}/x.zip", "refused"),
            (f"{address}/busy", "503"),
            (f"{address}/short", "ended 991 bytes early"),
        ):
            with pytest.raises(TransientError, match=words) as refused:
                fetch(source, SUMS)
            assert refused.value.retry


def test_no_more_is_unpacked_or_loaded_than_allowed(folder, server):
    address, _ = server
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", b"\0" * 3_000_000)
    wanted = {"a.txt": SUMS["a.txt"]}
    with pytest.raises(DataError, match=r"a\.txt: got 2\.9 MiB or more, expected at most 976\.6 KiB"):
        fetch(str(folder / "bomb.zip"), wanted, max_bytes=1_000_000)
    with pytest.raises(DataError, match=r"got 101 B or more"):
        fetch(address, wanted, max_bytes=100)
    assert fetch(address, SUMS, max_bytes=300) == FILES


def lying_about(data, size):
    """An archive whose directory says that its file is `size` bytes long."""
    real = len(FILES["a.txt"]).to_bytes(4, "little")
    assert data.count(real) >= 2
    return data.replace(real, size.to_bytes(4, "little"))


def test_damaged_archives_are_refused(folder):
    whole = (folder / "all.zip").read_bytes()
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("a.txt", FILES["a.txt"])
    stored = plain.getvalue()
    at = stored.index(b"alpha")
    for data in (
        b"",
        b"no archive",
        whole[:-30],
        stored[:at] + b"Alpha" + stored[at + 5 :],  # its checksum does not fit
        lying_about(stored, 12),
        stored.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"),  # "encrypted"
    ):
        assert data != stored
        (folder / "bad.zip").write_bytes(data)
        with pytest.raises(IntegrityError, match=r"bad\.zip"):
            fetch(str(folder / "bad.zip"), {"a.txt": SUMS["a.txt"]})


def test_a_download_is_whole_or_not_there(folder, server):
    address, _ = server
    target = folder / "new" / "a.txt"
    download(f"{address}/a.txt", target)
    assert target.read_bytes() == FILES["a.txt"]
    for url, kind in ((f"{address}/short/a", TransientError), (f"{address}/none", DataError)):
        with pytest.raises(kind):
            download(url, folder / "b.txt")
    with pytest.raises(DataError, match="got 101 B or more, expected at most 100 B"):
        download(f"{address}/a.txt", folder / "b.txt", max_bytes=100)
    assert not list(folder.glob("b.txt*"))
