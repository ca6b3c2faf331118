"""Leaves nothing running when a process is killed that had started a Ray; run as a module, it is the keeper.

Ray's raylet dies with the process that started it, but its agents were seen to live on for as long as one looked (Ray
2.60, after SIGKILL). So a process beside it waits for the end of a pipe, then kills everything that was started with
its mark in the environment or belongs to its session, and removes Ray's folder. Both signs are needed: some of Ray's
processes write their title over their environment, and a session may be somebody else's.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["leaving_nothing"]

_MARK = "TREADLE_REMAINS"
_FOLDER = b"RAY_TMPDIR="
_LOOKS = 50
_LOOK_S = 0.2


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Whatever is started within the block ends with it, however this process ends. Linux only; elsewhere nothing."""
    if not Path("/proc/self/environ").exists():
        yield
        return
    mark = secrets.token_hex(8)
    session = str(os.getpid()) if os.getsid(0) == os.getpid() else "0"
    keeper = subprocess.Popen(
        [sys.executable, "-P", "-m", "treadle.launch.sweeps.remains", mark, session],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert keeper.stdin is not None
    os.environ[_MARK] = mark
    try:
        yield
    finally:
        del os.environ[_MARK]
        keeper.stdin.close()
        keeper.wait()


def _main(mark: str, session: int) -> None:
    starter = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    folders: set[str] = set()
    for _ in range(_LOOKS):  # some are being started by others that are being killed
        found = [(pid, folder) for pid, folder in _marked(f"{_MARK}={mark}".encode(), session) if pid != starter]
        if not found:
            break
        for pid, folder in found:
            folders.add(folder)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)
    for folder in folders - {""}:
        shutil.rmtree(folder, ignore_errors=True)


def _marked(mark: bytes, session: int) -> Iterator[tuple[int, str]]:
    """Processes of ours that have not ended, each with its RAY_TMPDIR where it still shows."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            settings = (entry / "environ").read_bytes().split(b"\0")
            state, _, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if state != "Z" and (mark in settings or int(owner) == session):
            folder = next((text.removeprefix(_FOLDER) for text in settings if text.startswith(_FOLDER)), b"")
            yield int(entry.name), folder.decode()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
