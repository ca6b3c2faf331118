"""Death at every system call of what must be all or nothing (F11)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fault_victims import files_at, open_run, register

from treadle.store import Registry, open_blobs
from treadle.store.audit import AuditLog
from treadle.testing import CHANGES, LOOKS, Call, Victims

NUM_UPDATES = 3


def calls_of(victims: Victims, names: Any, function: str, *arguments: Any) -> tuple[Call, ...]:
    outcome = victims.run(function, *arguments, names=names)
    assert (outcome.status, outcome.error) == (0, None)
    return outcome.calls


@pytest.mark.fault(11, "kill at every system call of a commit")
def test_no_acknowledged_commit_is_lost(victims: Victims, folder: Path, matrix, points, choose) -> None:
    names = choose(CHANGES, CHANGES + LOOKS)
    calls = points(calls_of(victims, names, "commit_on_one_thread", str(folder / "whole"), 1, 1, NUM_UPDATES), 16)
    for i, call in enumerate(calls):
        store = folder / str(i)
        said = victims.kill(call, "commit_on_one_thread", str(store), 1, 1, NUM_UPDATES).said
        found = open_run(open_blobs(str(store)), 0).restore()
        update = found[0].update if found else 0
        assert update in {max(said, default=0), max(said, default=0) + 1}, call
        assert found is None or found[1] == files_at(update), call
        # The same attempt again, as a restart of the process would do it, and then a later one.
        again = victims.run("commit_on_one_thread", str(store), 1, 1, NUM_UPDATES, names=["fsync"])
        assert (again.status, again.said) == (0, [1, 2, 3]), (call, again.error)
        open_run(open_blobs(str(store)), 2).commit(9, files_at(9), {})
        last = open_run(open_blobs(str(store)), 0).restore()
        assert last is not None
        assert last[1] == files_at(9)
        assert len(open_blobs(str(store)).children("runs/toy-20260101-000000-abcd/ckpt")) == 2, call
        assert not list((store / ".treadle" / "tmp").iterdir()), call
        shutil.rmtree(store)
    matrix.note(injected=len(calls), seen="commit: 0 acknowledged updates lost, 0 torn, re-runs end alike")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three versions, none of them promoted."""
    store = tmp_path_factory.mktemp("registered") / "store"
    register(open_blobs(str(store)), 3)
    return store


@pytest.mark.fault(11, "kill at every system call of two promotions")
def test_a_promotion_is_done_or_not(victims: Victims, registered: Path, folder: Path, matrix, points, choose) -> None:
    def fresh(name: str) -> Path:
        return Path(shutil.copytree(registered, folder / name))

    names = choose(CHANGES, CHANGES + LOOKS)
    calls = points(calls_of(victims, names, "promote", str(fresh("whole")), 2, 3), 10)
    for i, call in enumerate(calls):
        store = fresh(str(i))
        said = victims.kill(call, "promote", str(store), 2, 3).said
        registry = Registry(open_blobs(str(store)))
        now = registry.aliases("toy").get("production", 0)
        assert now in {said[-1], 3} if said else now in {0, 2}, call
        registry.history("toy")  # verifies the chain
        effective = [event.after for event in registry.alias_history("toy", "production")]
        assert effective == [2, 3][: len(effective)]
        assert effective[-1:] == [now] * (now > 0), call
        assert victims.run("promote", str(store), 2, 3, names=["fsync"]).said == [2, 3]
        registry.history("toy")
        assert registry.resolve("toy@production").version == 3
        shutil.rmtree(store)
    matrix.note(injected=len(calls), seen="promote: done or not, history whole, re-runs end alike")


@pytest.mark.fault(11, "kill at every system call of an audit append")
def test_no_acknowledged_event_is_lost(victims: Victims, folder: Path, matrix, points, choose) -> None:
    names = choose(CHANGES, CHANGES + LOOKS)
    calls = points(calls_of(victims, names, "append", str(folder / "whole"), 3), 10)
    for i, call in enumerate(calls):
        store = folder / str(i)
        said = victims.kill(call, "append", str(store), 3).said
        log = AuditLog(open_blobs(str(store)), "models/toy/audit")
        kept = [event.seq for event in log.verified({})]
        assert kept in ([1, 2, 3][: len(said)], [1, 2, 3][: len(said) + 1]), call
        again = victims.run("append", str(store), 3, names=["fsync"]).said
        assert again == [len(kept) + n for n in (1, 2, 3)], call
        assert len(log.verified({})) == len(kept) + 3
        shutil.rmtree(store)
    matrix.note(injected=len(calls), seen="audit: 0 acknowledged events lost, chain whole")


@pytest.mark.fault(11, "control: truncate and write in place")
def test_the_control_that_writes_in_place_is_torn(victims: Victims, folder: Path, matrix) -> None:
    calls = calls_of(victims, CHANGES, "commit_in_place", str(folder / "whole"), 1, NUM_UPDATES)
    torn: list[Call] = []
    for i, call in enumerate(calls):
        said = victims.kill(call, "commit_in_place", str(folder / str(i)), 1, NUM_UPDATES).said
        path = folder / str(i) / "state"
        kept = path.read_bytes() if path.exists() else b""
        whole = [files_at(update)["model.safetensors"] for update in range(1, NUM_UPDATES + 1)]
        if said and kept not in whole[said[-1] - 1 :]:
            torn.append(call)
    assert torn, "the control survived: what kills the others finds nothing"
    matrix.note(injected=len(calls), seen=f"control (in place): torn at {len(torn)} of {len(calls)} calls")
