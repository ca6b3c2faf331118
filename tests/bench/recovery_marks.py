"""What recovery is measured by: finished updates as each rank noted them, and a kill among them."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

__all__ = ["Arm", "Kill", "Log", "Mark", "Recovery", "Tail", "read_recovery", "update_ms", "wait_for"]

WORLD = 2
T = TypeVar("T")

LOOK_S = 0.005
LONGEST_S = 300.0
"""Until a start, a recovery or an end counts as failed."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One update that one rank finished.

    Args:
        update: updates made, this one included. begun_s, done_s: on the wall clock.
        ranks: the ranks that are known to have finished it by this mark.
    """

    update: int
    ranks: frozenset[int]
    begun_s: float
    done_s: float


@dataclass
class Log:
    """What an arm has told so far.

    Args:
        commits: (time, update) of checkpoints that the training loop was told are kept.
        reached: updates known to be finished from elsewhere: (time, update).
    """

    marks: list[Mark] = field(default_factory=list)
    commits: list[tuple[float, int]] = field(default_factory=list)
    reached: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A SIGKILL: to the process of which rank, when, and the update that had been seen then."""

    rank: int
    pid: int
    at_s: float
    seen: int


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What followed a kill; times in seconds from it.

    Args:
        any_s: first update begun and finished after it, by whatever rank, done before or not.
        new_s: first update that had not been reached before, by whatever rank.
        all_s: the same, by all ranks.
        update: the update of `all_s`.
        replayed: updates made a second time.
        lost: updates behind the newest checkpoint that the loop knew of that were made a second time.
    """

    kill: Kill
    any_s: float
    new_s: float
    all_s: float
    update: int
    replayed: int
    lost: int


def read_recovery(log: Log, kill: Kill) -> Recovery | None:
    """What followed `kill`; None until all ranks have made a new update.

    An update that was under way at the kill may still end after it, on a rank that had its gradients already: it
    counts as reached, not as recovered.
    """
    before = [mark for mark in log.marks if mark.begun_s <= kill.at_s]
    after = [mark for mark in log.marks if mark.begun_s > kill.at_s]
    reached = max([mark.update for mark in before] + [update for at_s, update in log.reached if at_s >= kill.at_s])
    seen: dict[int, set[int]] = {}
    for mark in sorted(after, key=lambda mark: mark.done_s):
        ranks = seen.setdefault(mark.update, set())
        ranks |= mark.ranks
        if mark.update > reached and len(ranks) == WORLD:
            break
    else:
        return None
    first = min(other.update for other in after) - 1
    committed = max((update for at_s, update in log.commits if at_s <= kill.at_s), default=0)
    return Recovery(
        kill=kill,
        any_s=min(other.done_s for other in after) - kill.at_s,
        new_s=min(other.done_s for other in after if other.update > reached) - kill.at_s,
        all_s=mark.done_s - kill.at_s,
        update=mark.update,
        replayed=max(0, reached - first),
        lost=max(0, min(committed, reached) - first),
    )


def update_ms(log: Log) -> float:
    """The median time between two updates of one rank."""
    return statistics.median([(mark.done_s - mark.begun_s) * 1000 for mark in log.marks] or [math.nan])


class Arm(Protocol):
    """One way to train that outlives kills. Made by starting it."""

    def look(self) -> Log:
        """What it has told by now, all of it.

        Raises:
            RuntimeError: it has ended otherwise than well.
        """
        ...

    def pid(self, rank: int) -> int:
        """The process to kill; 0 while there is none."""
        ...

    def stages(self, at_s: float) -> str:
        """What came when after a kill, for people."""
        ...

    def finish(self) -> str:
        """Wait for the end; a digest of the final weights, or "" where it has no end."""
        ...

    def stop(self) -> None:
        """Leave nothing running."""
        ...


class Tail:
    """The rows of a growing file of JSON lines, read once each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]


def wait_for(look: Callable[[], T | None], what: str, *, every_s: float = LOOK_S) -> T:
    """The first answer of `look` that is not None.

    Raises:
        RuntimeError: there was none.
    """
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        if (found := look()) is not None:
            return found
        time.sleep(every_s)
    raise RuntimeError(f"{what}: not within {LONGEST_S:.0f} s")
