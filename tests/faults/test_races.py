"""Many who want the same thing at once: one gets it, the others are told, and the record is one history (F14)."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fault_victims import RUN, files_at, open_run, register

from treadle.errors import ConflictError, IntegrityError
from treadle.store import Backend, Blobs, Entry, Registry, Runs
from treadle.store.local import LocalBlobs
from treadle.store.s3 import S3Blobs
from treadle.testing import MemoryBlobs

NUM_WRITERS = 16
VERSIONS = range(1, NUM_WRITERS + 1)
ALIAS = "models/toy/aliases/production.json"


@dataclass(frozen=True)
class Operation:
    """One promotion as its caller saw it, with the times around it."""

    version: int
    start: float
    end: float
    is_won: bool


class LetAllLook:
    """A place where whoever is about to move the alias waits until all others are."""

    def __init__(self, inner: Blobs, num: int) -> None:
        self._inner = inner
        self._barrier = threading.Barrier(num)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, key: str, data: bytes) -> Entry:
        self._wait(key)
        return self._inner.create(key, data)

    def replace(self, key: str, data: bytes, *, version: str) -> Entry:
        self._wait(key)
        return self._inner.replace(key, data, version=version)

    def _wait(self, key: str) -> None:
        if key == ALIAS:
            self._barrier.wait(60)


@pytest.fixture(scope="module")
def registered() -> Callable[[], MemoryBlobs]:
    """A new place with as many versions as writers, none of them promoted."""
    made = MemoryBlobs()
    register(made, NUM_WRITERS)

    def copy() -> MemoryBlobs:
        found = MemoryBlobs()
        found._data = dict(made._data)
        return found

    return copy


def race(places: dict[int, Any]) -> list[Operation]:
    """Each version is promoted, through a place of its own."""
    start = threading.Barrier(len(places))

    def promote(version: int) -> Operation:
        registry = Registry(places[version])
        start.wait(60)
        begun = time.monotonic()
        try:
            registry.promote("toy", version, actor=f"user-{version}")
        except ConflictError:
            return Operation(version, begun, time.monotonic(), is_won=False)
        return Operation(version, begun, time.monotonic(), is_won=True)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(promote, places))


def check_history(blobs: Any, operations: list[Operation], before: list[int]) -> int:
    """That one order of the winners explains everything; how many there are.

    Args:
        blobs: the place.
        operations: all that happened since.
        before: the versions that the alias had until then, in order.
    """
    registry = Registry(blobs)
    events = registry.history("toy")  # verifies the chain of all
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    effective = registry.alias_history("toy", "production")
    order = [event.after for event in effective]
    assert order[: len(before)] == before
    assert [event.before for event in effective] == [None, *order[:-1]]
    assert registry.resolve("toy@production").version == order[-1]
    won = {op.version: op for op in operations if op.is_won}
    new = [won[version] for version in order[len(before) :]]  # nobody is in the record who was told of a conflict
    assert len(new) == len(won)
    for earlier, later in pairwise(new):
        assert earlier.start < later.end, "the record turns round what happened one after the other"
    for lost in (op for op in operations if not op.is_won):
        assert any(op.start < lost.end and lost.start < op.end for op in new), "a conflict with nobody"
    return len(new)


@pytest.mark.fault(14, "16 writers promote, all having seen the same alias")
def test_of_many_who_saw_the_same_exactly_one_wins(registered, matrix, choose) -> None:
    num_runs = choose(50, 1000)
    for number in range(num_runs):
        blobs = registered()
        before = []
        if number % 2:  # replacing as well as creating
            Registry(blobs).promote("toy", 1, actor="first")
            before = [1]
        place = LetAllLook(blobs, NUM_WRITERS - len(before))
        won = check_history(blobs, race({v: place for v in VERSIONS if v not in before}), before)
        assert won == 1
    matrix.note(injected=num_runs, seen=f"{num_runs} races of 16 for one alias: 1 winner each, 15 conflicts")


@pytest.mark.fault(14, "16 writers promote as they come")
@pytest.mark.parametrize("kind", ["memory", "local"])
def test_the_record_of_a_race_is_one_history(kind: str, folder: Path, registered, matrix, choose) -> None:
    num_runs = choose(8, 500) if kind == "memory" else choose(2, 60)
    num_won = 0
    for number in range(num_runs):
        blobs: Any = registered()
        places: dict[int, Any] = dict.fromkeys(VERSIONS, blobs)
        if kind == "local":
            places = {version: LocalBlobs(folder / str(number)) for version in VERSIONS}
            register(places[1], NUM_WRITERS)
        num_won += check_history(places[1], race(places), [])
        again = [op for op in race(places) if op.is_won]  # now that there is something to be replaced
        assert Registry(places[1]).resolve("toy@production").version in {op.version for op in again}
        Registry(places[1]).history("toy")
    assert num_runs <= num_won <= num_runs * NUM_WRITERS
    matrix.note(injected=2 * num_runs, seen=f"{kind}: {num_runs} histories linear")


@pytest.mark.fault(14, "control: a place that ignores the conditions of a write")
def test_the_control_without_conditions_is_found_out(registered, matrix) -> None:
    class Careless(LetAllLook):
        def create(self, key: str, data: bytes) -> Entry:
            self._wait(key)
            return self._inner.put(key, data)

        def replace(self, key: str, data: bytes, *, version: str) -> Entry:
            return self.create(key, data)

    place = Careless(registered(), NUM_WRITERS)
    operations = race(dict.fromkeys(VERSIONS, place))
    with pytest.raises((AssertionError, IntegrityError)):
        assert check_history(place, operations, []) == 1
    matrix.note(injected=1, seen="control (no conditions): found out")


@pytest.mark.s3
@pytest.mark.fault(14, "16 writers promote on a real S3 server")
def test_of_many_on_s3_exactly_one_wins(s3_server, matrix, choose) -> None:
    num_runs, num_writers = choose((1, 4), (20, NUM_WRITERS))
    for _ in range(num_runs):
        blobs = S3Blobs(s3_server.bucket, f"races/{uuid.uuid4().hex}", s3_server.options())
        register(blobs, num_writers)
        place = LetAllLook(blobs, num_writers)
        assert check_history(blobs, race(dict.fromkeys(VERSIONS[:num_writers], place)), []) == 1
    matrix.note(injected=num_runs, seen=f"S3: {num_runs} races of {num_writers}, 1 winner each")


@pytest.mark.fault(14, "two holders of one run, many who want to replace one attempt")
def test_of_two_holders_the_later_one_commits(matrix, choose) -> None:
    num_runs = choose(50, 1000)
    num_fenced = 0
    for number in range(num_runs):
        blobs = MemoryBlobs()
        rng = random.Random(number)
        start = threading.Barrier(2)

        def hold(attempt: int, blobs: Blobs = blobs, rng: random.Random = rng, start: Any = start) -> list[int]:
            """The updates that were acknowledged."""
            checkpoints, done = open_run(blobs, attempt, keep_last=20), []
            start.wait(60)
            time.sleep(rng.random() * 0.003 * attempt)
            try:
                for update in range(1, 4):
                    checkpoints.commit(10 * attempt + update, files_at(10 * attempt + update), {})
                    done.append(10 * attempt + update)
            except ConflictError:
                pass
            return done

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(hold, (1, 2))
        assert second == [21, 22, 23]
        num_fenced += len(first) < 3
        found = open_run(blobs, 0).restore()
        assert found is not None
        assert (found[0].update, found[1]) == (23, files_at(23))
        kept = chain(blobs, found[0])
        assert [
            update for update in kept if update < 20
        ] == first  # nothing of the first is lost, nor more than it knows
    assert num_fenced
    matrix.note(injected=num_runs, seen=f"2 holders: the later one committed in {num_runs}, {num_fenced} fenced off")


def chain(blobs: Blobs, manifest: Any) -> list[int]:
    """The updates that led to a checkpoint, by its `prev`, in order."""
    checkpoints = open_run(blobs, 0)
    found = [manifest.update]
    while manifest.prev:
        manifest = checkpoints._manifest(manifest.prev)
        found.append(manifest.update)
    return found[::-1]


@pytest.mark.fault(14, "16 who want to replace one lost attempt, 16 who submit")
def test_one_replaces_an_attempt_and_numbers_are_all_different(folder: Path, matrix, choose) -> None:
    num_runs = choose(10, 200)
    for number in range(num_runs):
        blobs: Blobs = MemoryBlobs() if number % 5 else LocalBlobs(folder / str(number))
        runs = Runs(blobs)
        runs.create(b"{}", b"{}", job="toy", backend=Backend.ray, run=RUN)
        runs.claim_attempt(RUN, Backend.ray)

        def tell(act: Callable[[], Any]) -> Any:
            try:
                return act()
            except ConflictError:
                return None

        claims = [partial(runs.claim_attempt, RUN, Backend.ray, after=1)] * NUM_WRITERS
        submit = partial(runs.create, b"{}", b"{}", job="toy", backend=Backend.ray)
        submits = [partial(submit, run=f"toy-{i % 8}") for i in range(NUM_WRITERS)]
        with ThreadPoolExecutor(2 * NUM_WRITERS) as pool:
            told = list(pool.map(tell, claims + submits))
        assert sorted(t is None for t in told[:NUM_WRITERS]) == [False] + [True] * 15
        assert runs.status(RUN).attempt == 2
        made = [record for record in told[NUM_WRITERS:] if record is not None]
        assert len({record.run for record in made}) == len(made) == 8
        assert len({record.number for record in made}) == 8
    matrix.note(injected=num_runs, seen="attempts and run ids: 1 of 16 each, no number twice")
