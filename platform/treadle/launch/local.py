"""A driver process beside the command line, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO

from treadle.errors import ConflictError, InternalError
from treadle.store import AttemptEnd, AttemptStatus, Backend, Blobs, Runs

__all__ = ["LocalDriver", "start_local"]

KILL_AFTER_S = 10.0


@dataclass(frozen=True, kw_only=True)
class LocalDriver:
    """A driver that was started here, in a session of its own: a Ctrl-C in the terminal does not reach it."""

    process: subprocess.Popen[bytes]
    run: str
    _output: IO[bytes] = field(repr=False)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def record_death(self, blobs: Blobs, attempts_before: int) -> None:
        """Write down the end of a driver that could not do it itself (killed, out of memory)."""
        runs = Runs(blobs)
        code = self.process.wait()
        words = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        error = InternalError(
            f"the driver ended without a word ({words}){self._last_words()}", hint=f"treadle resume {self.run}"
        )
        pid = self.process.pid
        own = [a.attempt for a in runs.attempts(self.run) if a.attempt > attempts_before and a.info.get("pid") == pid]
        if not own and code == ConflictError.exit_code:
            raise ConflictError(
                f"run {self.run}: attempt {attempts_before + 1} was started by someone else",
                hint=f"treadle logs -f {self.run}",
            )
        number = own[-1] if own else runs.claim_attempt(self.run, Backend.local, {"pid": pid})
        end = AttemptEnd(status=AttemptStatus.failed, exit_code=error.exit_code, error=error.to_json())
        runs.end_attempt(self.run, number, end)

    def kill(self) -> None:
        """End the driver and everything it started, now."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return
            deadline = time.monotonic() + (KILL_AFTER_S if number is signal.SIGTERM else 60.0)
            while self.is_alive() and time.monotonic() < deadline:
                time.sleep(0.1)

    def release(self) -> None:
        """Wait for a driver whose end is recorded, and let go of its output."""
        try:
            self.process.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._output.close()

    def _last_words(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").strip().splitlines()
        return "".join(f"\n  {line}" for line in lines[-5:])


def start_local(store: str, run: str, *, threads: int, in_process: bool, after: int | None = None) -> LocalDriver:
    """Start the driver of a run; it outlives the caller.

    Args:
        threads: of each rank. in_process: one rank beside the driver, without Ray.
        after: the attempt that it is to follow; it ends at once where another has done so.
    """
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["PYTHONUNBUFFERED"] = "1"
    output = tempfile.TemporaryFile()  # noqa: SIM115 - the driver writes to it after we return
    backend = Backend.inline if in_process else Backend.local
    command = [sys.executable, "-P", "-m", "treadle.launch.driver", "--store", store, "--run", run]
    try:
        process = subprocess.Popen(
            [*command, "--backend", backend.value, *([] if after is None else ["--after", str(after)])],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise InternalError(f"driver: {error}") from None
    return LocalDriver(process=process, run=run, _output=output)
