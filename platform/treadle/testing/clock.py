"""A clock of the wall that is wrong, for chosen processes."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

from treadle.errors import ConfigError
from treadle.native import COMPILERS

__all__ = ["SkewedClock"]

_SOURCE = Path(__file__).with_name("clock_shim.c")
_NS = 1_000_000_000


class SkewedClock:
    """A clock that processes started with `environment` see instead of the real one; it can be moved while they run.

    Durations (the monotonic clock) and the times that a file system sets itself stay right, as on a machine whose
    administrator sets the clock.

    Args:
        folder: takes the compiled shim and the file that holds the shift.
        seconds: how far the clock is ahead; below 0: behind.

    Raises:
        ConfigError: no C compiler, or a system whose loader knows no LD_PRELOAD.
    """

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None or not sys.platform.startswith("linux"):
            seen = f"{sys.platform} and {compiler or 'no C compiler'}"
            raise ConfigError(f"clock: got {seen}, expected Linux and one of {', '.join(COMPILERS)}")
        folder.mkdir(parents=True, exist_ok=True)
        shim = folder / "clock_shim.so"
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(shim), str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(
                f"clock: got {done.stderr.strip()[:200]!r}, expected {compiler} to compile {_SOURCE.name}"
            )
        self._file = folder / "shift"
        self._file.write_bytes(bytes(8))
        self.move(seconds)
        self.environment = {"LD_PRELOAD": str(shim), "TREADLE_CLOCK_FILE": str(self._file)}

    def move(self, seconds: float) -> None:
        """Set the clock so far ahead of the real one; processes that run see it at once."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("=q", round(seconds * _NS)))
