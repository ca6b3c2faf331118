"""A sweeper beside the command line, or on a Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO

from treadle.errors import ConflictError, InternalError
from treadle.launch.attempt import BEAT_S
from treadle.launch.jobs import RayCluster
from treadle.launch.sweeps.records import FrozenSweep
from treadle.store import AttemptEnd, AttemptStatus, Backend, Blobs
from treadle.store.sweeps import SweepRecord, Sweeps

__all__ = ["LocalSweeper", "check_idle", "start_sweeper"]

_MODULE = "treadle.launch.sweeps.sweeper"


@dataclass(frozen=True, kw_only=True)
class LocalSweeper:
    """A process in a session of its own: a Ctrl-C in the terminal does not reach it."""

    process: subprocess.Popen[bytes]
    sweep: str
    _output: IO[bytes] = field(repr=False)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def record_death(self, blobs: Blobs, before: int) -> None:
        """Write down the end of a sweeper that could not do it itself."""
        sweeps, code = Sweeps(blobs), self.process.wait()
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").strip().splitlines()[-5:]
        error = InternalError(
            f"the sweep ended without a word (exit code {code})" + "".join(f"\n  {line}" for line in lines),
            hint=f"treadle sweep --resume {self.sweep}",
        )
        attempt = sweeps.status(self.sweep).attempt
        if attempt <= before:
            attempt = sweeps.claim(self.sweep, Backend.local, {"pid": self.process.pid}, after=before)
        end = AttemptEnd(status=AttemptStatus.failed, exit_code=error.exit_code, error=error.to_json())
        sweeps.end_attempt(self.sweep, attempt, end)


def check_idle(blobs: Blobs, sweep: str) -> None:
    """Nothing, where nobody carries the sweep out.

    Raises:
        ConflictError: somebody does, by two looks at the heartbeat.
    """
    sweeps = Sweeps(blobs)
    first = sweeps.status(sweep)
    if first.attempt == 0 or first.end is not None:
        return
    deadline = time.monotonic() + 2 * BEAT_S + 1
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = sweeps.status(sweep)
        if now.end is not None:
            return
        if now.beat != first.beat:
            raise ConflictError(f"sweep {sweep}: is running", hint=f"treadle sweep --show {sweep}")


def start_sweeper(blobs: Blobs, record: SweepRecord, frozen: FrozenSweep, *, actor: str) -> LocalSweeper | None:
    """Start an attempt of a sweep; it outlives the caller. None where it runs on a cluster."""
    arguments = ["-m", _MODULE, "--store", blobs.uri, "--sweep", record.sweep, "--actor", actor]
    if record.backend is Backend.ray and frozen.is_direct:
        cluster = RayCluster(frozen.first.cluster.address)
        attempt = Sweeps(blobs).status(record.sweep).attempt + 1
        cluster.start(arguments, f"{record.sweep}-a{attempt}", {"treadle_sweep": record.sweep})
        return None
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    environment["OMP_NUM_THREADS"] = str(frozen.first.cluster.cpus_per_worker)
    output = tempfile.TemporaryFile()  # noqa: SIM115 - the sweeper writes to it after we return
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise InternalError(f"sweeper: {error}") from None
    return LocalSweeper(process=process, sweep=record.sweep, _output=output)
