"""A clock that is wrong, a disk that is full and a process that stands still are so."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treadle.errors import ConfigError, NotFoundError
from treadle.testing import SkewedClock, small_disk, stopped

NOW = "import time, datetime as d; print(time.time(), d.datetime.now(d.UTC).timestamp(), time.monotonic())"


def clock(folder: Path, seconds: float = 0.0) -> SkewedClock:
    try:
        return SkewedClock(folder, seconds)
    except ConfigError as error:
        pytest.skip(error.message)


@pytest.mark.parametrize("seconds", [3600.0, -3600.0, 0.0])
def test_a_child_sees_another_time_and_the_same_durations(tmp_path: Path, seconds: float) -> None:
    skewed = clock(tmp_path / "clock", seconds)
    out = subprocess.run(
        [sys.executable, "-c", NOW], env=os.environ | skewed.environment, capture_output=True, text=True, check=True
    ).stdout
    wall, date, monotonic = map(float, out.split())
    assert abs(wall - time.time() - seconds) < 60
    assert abs(date - wall) < 1
    assert abs(monotonic - time.monotonic()) < 60


def test_a_clock_moves_under_a_process_that_runs(tmp_path: Path) -> None:
    skewed = clock(tmp_path / "clock")
    code = "import sys, time\nfor _ in sys.stdin: print(time.time(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | skewed.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        seen = []
        for seconds in (0, 3600, -3600):
            skewed.move(seconds)
            process.stdin.write("\n")
            process.stdin.flush()
            seen.append(float(process.stdout.readline()))
        process.stdin.close()
    assert seen[1] - seen[0] > 3000
    assert seen[2] - seen[1] < -7000


def test_a_clock_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="no C compiler"):
        SkewedClock(tmp_path)


def test_a_small_disk_is_full_at_once_and_gone_at_the_end(tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "disk", 1 << 20) as folder:
            (folder / "fits").write_bytes(bytes(500_000))
            with pytest.raises(OSError, match="space") as full:
                (folder / "too large").write_bytes(bytes(800_000))
            assert full.value.errno == errno.ENOSPC
    except ConfigError as error:
        pytest.skip(error.message)
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_process_stands_still_for_the_block_and_then_goes_on() -> None:
    code = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        with stopped(process.pid):
            process.stdin.write(b"x\n")
            process.stdin.flush()
            time.sleep(0.3)
            assert not process.stdout.read()
        os.set_blocking(process.stdout.fileno(), True)
        assert process.stdout.readline() == b"x\n"
        process.stdin.close()
    with pytest.raises(NotFoundError), stopped(process.pid):
        pass
