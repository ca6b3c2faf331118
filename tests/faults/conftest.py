"""The fault matrix: every row a fault, every test of it marked `@pytest.mark.fault(row, what)`.

`make test` runs a fast subset; `make faults` (`pytest tests/faults --faults=full --matrix`) runs everything and prints
the matrix, in which a row without a test shows as one. A test tells what it injected and what came of it with
`matrix.note(...)`; one that injected nothing has tested nothing and fails.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from treadle.errors import ConfigError
from treadle.testing import SkewedClock, Victims

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
FULL_TIMEOUT_S = 1200
ROWS = {
    1: "kill -9 of a worker at a random update",
    2: "kill -9 of a worker, recovery per update",
    3: "kill -9 of all workers, the controller, the driver",
    4: "kill of a raylet, then of the head",
    5: "a rank stands still for 5 s, or for ever",
    6: "a rank three times slower than the others",
    7: "notice of preemption, 30 s and 5 s ahead",
    8: "S3 answers 503, resets, hangs, is slow",
    9: "S3 cuts off or flips what is read or written",
    10: "damage to any part of a checkpoint",
    11: "kill at every system call of commit, promote, audit",
    12: "power cut: what was not flushed is lost",
    13: "disk full, quota, I/O error in a commit",
    14: "many writers promote one model or hold one run",
    15: "NaN or Inf on one rank, spikes",
    16: "poisoned source files and shards",
    17: "out of memory",
    18: "clocks an hour off, or running backwards",
    19: "W&B unreachable, hanging, swallowing",
    20: "resume twice, at the end of an epoch, with other ranks",
    21: "kill of a replica under load, a bad new model",
    22: "endpoint overloaded ten times",
    23: "secrets as canaries",
    24: "a flipped bit in the weights of one replica",
    25: "processes left after a job",
}

UNIT = HERE.parent / "unit"
sys.path.append(str(UNIT / "track"))  # fake_wandb: a server that the real client talks to
sys.path.append(str(UNIT / "launch"))  # agents_rig: real ranks, with faults at exact places
from agents_rig import nursery  # noqa: E402, F401


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--faults", choices=["fast", "full"], default="fast", help="how many faults are injected")
    group.addoption("--matrix", action="store_true", help="print the fault matrix and record it")


def is_full(config: pytest.Config) -> bool:
    # Where tests/faults is not named on the command line, this file comes too late to add an option.
    return config.getoption("--faults", "fast") == "full"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        marker = item.get_closest_marker("fault")
        if marker is None or marker.args[:1] == () or marker.args[0] not in ROWS or len(marker.args) != 2:
            raise pytest.UsageError(
                f"{item.nodeid}: expected @pytest.mark.fault(row, what), row one of 1 to {len(ROWS)}"
            )
        if is_full(config):
            item.add_marker(pytest.mark.timeout(FULL_TIMEOUT_S))
        elif item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="of the full matrix: make faults"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if marker := item.get_closest_marker("fault"):
        item.user_properties.append(("fault", list(marker.args)))


@dataclass
class Matrix:
    """What one test reports."""

    properties: list[tuple[str, object]]
    injected: int = 0

    def note(self, *, injected: int, seen: str) -> None:
        """Faults that did happen, and what came of them in a few words."""
        self.injected += injected
        self.properties += [("injected", injected), ("seen", seen)]


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> Iterator[Matrix]:
    found = Matrix(request.node.user_properties)
    yield found
    call = request.node.stash.get(CALL, None)
    if call is not None and call.passed:
        assert found.injected > 0, "the test injected no fault"


CALL = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call":
        item.stash[CALL] = report
    return report


@pytest.fixture(scope="session")
def choose(request: pytest.FixtureRequest) -> Callable[[T, T], T]:
    """The first of two in a fast run, the second in a full one."""
    full = is_full(request.config)
    return lambda fast, slow: slow if full else fast


@pytest.fixture(scope="session")
def points(choose: Callable[[int, int], int]) -> Callable[..., Any]:
    """All of a sequence in a full run; of a fast one about `fast`, evenly spread, its ends among them."""

    def chosen(everything: Any, fast: int) -> Any:
        step = max(1, (len(everything) - 1) / max(1, fast - 1))
        numbers = sorted({min(round(i * step), len(everything) - 1) for i in range(fast)})
        return choose([everything[i] for i in numbers], list(everything))

    return chosen


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    """Children that run the functions of fault_victims.py."""
    try:
        with Victims(HERE / "fault_victims.py", {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}) as found:
            found.run("nothing")
            yield found
    except ConfigError as error:
        pytest.skip(error.message)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory where there is such a place: thousands of flushes then cost nothing."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="treadle-faults-", dir=memory) as name:
        yield Path(name)


@pytest.fixture
def clock(tmp_path: Path) -> SkewedClock:
    try:
        return SkewedClock(tmp_path / "clock")
    except ConfigError as error:
        pytest.skip(error.message)


# The table


@dataclass
class Row:
    """What is known of one row after all its tests."""

    injected: int = 0
    seen: dict[str, None] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def verdict(self) -> str:
        if self.failed:
            return f"**RED**: {', '.join(sorted(self.failed))}"
        if self.known:
            return f"**known defect**: {'; '.join(dict.fromkeys(self.known.values()))}"
        skipped = f", {len(self.skipped)} skipped ({next(iter(self.skipped.values()))})" if self.skipped else ""
        if self.passed:
            return f"green, {len(self.passed)} tests{skipped}"
        return skipped.removeprefix(", ") or "no test"


def gather(reports: list[pytest.TestReport]) -> dict[int, Row]:
    rows = {number: Row() for number in ROWS}
    for report in reports:
        facts = report.user_properties
        number = next((args[0] for name, args in facts if name == "fault"), None)  # type: ignore[index]
        if number is None:
            continue
        row, name = rows[number], report.nodeid.partition("::")[2]
        row.seconds += report.duration
        if report.failed:
            row.failed.add(name)
            row.passed.discard(name)
        elif report.skipped and hasattr(report, "wasxfail"):
            row.known[name] = str(report.wasxfail)
        elif report.skipped:
            row.skipped[name] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.when == "call":
            row.passed.add(name)
        if report.when == "teardown":
            row.injected += sum(int(str(value)) for key, value in facts if key == "injected")
            row.seen |= {str(value): None for key, value in facts if key == "seen"}
    return rows


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--matrix", default=False):
        return
    reports = [r for found in terminalreporter.stats.values() for r in found if isinstance(r, pytest.TestReport)]
    lines = [
        (f"F{number}", ROWS[number], row.injected or "", "; ".join(row.seen), row.verdict(), f"{row.seconds:.0f}")
        for number, row in gather(reports).items()
    ]
    headers = ("row", "fault", "injected", "seen", "verdict", "s")
    how = "full" if is_full(config) else "fast"
    title = "Fault matrix" if how == "full" else "Fault matrix, fast subset"
    name = "faults" if how == "full" else "faults_fast"
    config = terminalreporter.config
    is_whole = not config.option.keyword and not any("test_" in part for part in config.args)
    with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        recording().record(name, title, f"make faults FAULTS={how}", headers, lines, keep=is_whole)


def recording() -> Any:
    path = HERE.parent / "bench" / "recording.py"
    spec = importlib.util.spec_from_file_location("recording", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
