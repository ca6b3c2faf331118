"""Ray Train, and torchft below it, in the bench of recoveries: a driver, watched through what its ranks note."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recovery_marks import LONGEST_S, WORLD, Log, Mark, Tail
from recovery_treadle import NETWORK

__all__ = ["Peer"]

SCRIPT = Path(__file__).with_name("recovery_peer_job.py")


class Peer:
    """See `recovery_marks.Arm`.

    Args:
        environment: beside this process's, of the driver and all it starts.
        torchft: arguments of its lighthouse; empty for plain Ray Train. site: the folder that it is installed in.
    """

    def __init__(
        self,
        folder: Path,
        *,
        updates: int,
        every: int,
        environment: Mapping[str, str] | None = None,
        torchft: Mapping[str, Any] | None = None,
        site: Path | None = None,
    ) -> None:
        self._has_end = not torchft
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._ray = Path(tempfile.mkdtemp(prefix="rb"))  # a socket's path holds 107 characters
        notes = self._folder / "notes.jsonl"
        config = {
            **NETWORK,
            "updates": updates if self._has_end else 1_000_000,
            "every": every,
            "world": WORLD,
            "notes": str(notes),
            "storage": str(self._folder / "storage"),
            "ray_folder": str(self._ray),
            "torchft": dict(torchft or {}),
        }
        (self._folder / "config.json").write_text(json.dumps(config))
        self._output = (self._folder / "output.txt").open("wb")
        self._driver = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(self._folder / "config.json")],
            env=_environment(environment or {}, site),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._tail = Tail(notes)
        self._log = Log()
        self._pids: dict[int, int] = {}
        self._started: list[float] = []
        self._digests: dict[int, str] = {}

    def look(self) -> Log:
        for row in self._tail.rows():
            if row["kind"] == "started":
                self._pids[row["rank"]] = row["pid"]
                self._started.append(row["time"])
            elif row["kind"] == "commit" and row["rank"] == 0:
                self._log.commits.append((row["time"], row["update"]))
            elif row["kind"] == "weights":
                self._digests[row["rank"]] = row["digest"]
            elif row["kind"] == "update":
                # What a rank of torchft makes alone, the others have not made.
                ranks = frozenset({row["rank"]}) if row.get("ranks", WORLD) == WORLD else frozenset()
                mark = Mark(update=row["update"], ranks=ranks, begun_s=row["begun"], done_s=row["time"])
                self._log.marks.append(mark)
        if self._driver.poll() is not None and (self._driver.returncode or not self._has_end):
            raise RuntimeError(f"driver: exit code {self._driver.returncode}\n{self.words()}")
        return self._log

    def pid(self, rank: int) -> int:
        return self._pids.get(rank, 0)

    def stages(self, at_s: float) -> str:
        """When the ranks' processes started after `at_s`, in seconds."""
        return ", ".join(f"started {started - at_s:.2f}" for started in self._started if started > at_s)

    def finish(self) -> str:
        if not self._has_end:
            return ""
        self._driver.wait(LONGEST_S)
        self.look()
        if len(set(self._digests.values())) != 1:
            raise RuntimeError(f"weights: got {self._digests}, expected the same on all ranks")
        return self._digests[0]

    def stop(self) -> None:
        if self._driver.poll() is None:
            self._driver.send_signal(signal.SIGTERM)  # Ray's handler unwinds, and ends its own processes
            deadline = time.monotonic() + 30.0
            while self._driver.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            if self._driver.poll() is None:
                os.killpg(self._driver.pid, signal.SIGKILL)
            self._driver.wait()
        self._output.close()
        shutil.rmtree(self._ray, ignore_errors=True)

    def words(self) -> str:
        """The end of what the driver and its ranks printed."""
        return (self._folder / "output.txt").read_text(errors="replace")[-4000:]


def _environment(more: Mapping[str, str], site: Path | None) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Nothing here changes how a loss is noticed or mended; a busy machine needs longer than 30 s for a raylet.
    found |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "180"}
    if site is not None:
        found["PYTHONPATH"] = str(site)
    return found | dict(more)
