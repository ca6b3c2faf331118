"""Power cuts: only what was flushed is there afterwards (F12)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fault_victims import files_at, open_run, register

from treadle.errors import IntegrityError
from treadle.store import Registry, open_blobs, read_journal
from treadle.testing import CHANGES, Call, Disk, Lost, Victims, said_in

NUM_UPDATES = 3


def cuts(
    disk: Disk, calls: Sequence[Call], ends: Sequence[int], folder: Path, check: Callable[[Path, list[Any]], str]
) -> tuple[int, list[str]]:
    """How many power cuts there were, and what was wrong after them.

    Args:
        disk: what is there before the calls.
        calls: what a child did.
        ends: numbers of calls after which the power goes.
        folder: an empty one.
        check: gets the root after the cut and what had been acknowledged; says what is wrong, or "".
    """
    wanted, count, wrong = set(ends), 0, []
    for end, call in enumerate(calls, 1):
        disk.apply(call)
        if end not in wanted:
            continue
        for lost in Lost:
            root = disk.write(folder / "cut", lost, seed=end)
            count += 1
            if problem := check(root, said_in(calls[:end])):
                wrong.append(f"after {call}, {lost.name} lost: {problem}")
            shutil.rmtree(folder / "cut")
    return count, wrong


def check_commits(root: Path, said: list[Any]) -> str:
    least = max(said, default=0)
    try:
        found = open_run(open_blobs(str(root)), 0).restore() if root.exists() else None
    except IntegrityError as error:
        return error.message
    update = found[0].update if found else 0
    if update < least:
        return f"update {update} is restored, {least} was acknowledged"
    if found and found[1] != files_at(update):
        return f"update {update} has other bytes"
    open_run(open_blobs(str(root)), 2).commit(9, files_at(9), {})  # what is left is no hindrance
    return ""


@pytest.mark.fault(12, "power cut after every system call of a commit")
def test_no_acknowledged_commit_is_lost_to_a_power_cut(victims: Victims, folder: Path, matrix, points) -> None:
    root = folder / "store"
    disk = Disk(root)
    calls = victims.run("commit", str(root), 1, 1, NUM_UPDATES).calls
    count, wrong = cuts(disk, calls, points(range(1, len(calls) + 1), 24), folder, check_commits)
    assert not wrong, wrong[:5]
    matrix.note(injected=count, seen="commit: 0 acknowledged updates lost, 0 torn")


@pytest.mark.fault(12, "control: nothing is flushed")
def test_the_control_that_flushes_nothing_loses(victims: Victims, folder: Path, matrix) -> None:
    root = folder / "store"
    disk = Disk(root)
    calls = victims.run("commit_unflushed", str(root), 1, 1, NUM_UPDATES).calls
    count, wrong = cuts(disk, calls, range(1, len(calls) + 1, 10), folder, check_commits)
    assert wrong
    matrix.note(injected=count, seen=f"control (no flush): loses in {len(wrong)} of {count}")


@pytest.mark.fault(12, "power cut after a kill and a restart")
def test_what_a_killed_process_left_unflushed_is_flushed_by_the_next(
    victims: Victims, folder: Path, matrix, points
) -> None:
    whole = victims.run("commit_on_one_thread", str(folder / "whole"), 1, 1, 1).calls
    kills = points([call for call in whole if call.name in ("openat", "mkdir", "fsync", "link", "rename")], 5)
    count, wrong = 0, list[str]()
    for i, call in enumerate(kills):
        root = folder / str(i) / "store"
        root.parent.mkdir()
        disk = Disk(root)
        inject = f"{call.name}:signal=SIGKILL:when={call.number}"
        first = victims.run("commit_on_one_thread", str(root), 1, 1, 1, inject=[inject])
        assert first.status < 0
        for done in first.calls:
            disk.apply(done)
        second = victims.run("commit", str(root), 2, 2, 3).calls
        said = [end for end, done in enumerate(second, 1) if said_in([done])]
        more, problems = cuts(disk, second, said, root.parent, check_commits)
        count += more
        wrong += [f"killed at {call}; {problem}" for problem in problems]
    assert not wrong, wrong[:5]
    matrix.note(injected=count, seen="kill, restart, commit, power cut: 0 lost")


@pytest.mark.fault(12, "power cut after every system call of a promotion")
def test_no_acknowledged_promotion_is_lost_to_a_power_cut(victims: Victims, folder: Path, matrix, points) -> None:
    root = folder / "store"
    register(open_blobs(str(root)), 3)
    disk = Disk(root)

    def check(root: Path, said: list[Any]) -> str:
        registry = Registry(open_blobs(str(root)))
        now = registry.aliases("toy").get("production", 0)
        registry.history("toy")
        effective = [event.after for event in registry.alias_history("toy", "production")]
        if now < max(said, default=0):
            return f"production is {now}, {said[-1]} was acknowledged"
        return "" if effective[-1:] == [now] * (now > 0) else f"production is {now}, its history {effective}"

    calls = victims.run("promote", str(root), 2, 3).calls
    count, wrong = cuts(disk, calls, points(range(1, len(calls) + 1), 25), folder, check)
    assert not wrong, wrong[:5]
    matrix.note(injected=count, seen="promote: 0 lost, history whole")


@pytest.mark.fault(12, "power cut after every system call of a journal")
def test_no_flushed_row_is_lost_to_a_power_cut(victims: Victims, folder: Path, matrix, points) -> None:
    root = folder / "store"
    disk = Disk(root)

    def check(root: Path, said: list[Any]) -> str:
        rows = [row["update"] for row in read_journal(open_blobs(str(root)), "runs/toy/metrics.jsonl")]
        return "" if rows[: len(said)] == said else f"rows {rows} are there, {said} were flushed"

    calls = victims.run("journal", str(root), 4, names=CHANGES).calls
    count, wrong = cuts(disk, calls, points(range(1, len(calls) + 1), 20), folder, check)
    assert not wrong, wrong[:5]
    matrix.note(injected=count, seen="journal: 0 flushed rows lost")
