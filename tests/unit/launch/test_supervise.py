"""What is decided about lost ranks, as tables and over random histories."""

from __future__ import annotations

import dataclasses
import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import (
    ConfigError,
    DivergenceError,
    InfeasibleError,
    IntegrityError,
    InternalError,
    PreemptedError,
    TransientError,
)
from treadle.launch.supervise import SAME_UPDATE, Cause, Loss, Losses, slow_ranks
from treadle.spec import ClusterSpec


def losses(max_failures=3, max_preemptions=None):
    return Losses(ClusterSpec(max_failures=max_failures, max_preemptions=max_preemptions), "toy-1")


def loss(cause=Cause.killed, update=0, rank=1, error=None, words="killed by SIGKILL"):
    return Loss(rank=rank, cause=cause, update=update, words=words, error=error)


def verdicts(judged, *given):
    """What comes of (loss, committed) one after the other: names of errors, and None."""
    found = [judged.judge(*item) for item in given]
    return [None if error is None else type(error).__name__ for error in found]


# Tables


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a"),
        InfeasibleError("b"),
        DivergenceError("c", update=3, rows=[1, 2]),
        IntegrityError("d"),
        InternalError("e", hint="h"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("is_new", [True, False])
def test_what_would_come_again_ends_the_run_at_once(error, is_new):
    found = losses().judge(loss(Cause.exited, error=error.to_json()), -1, is_new=is_new)
    assert type(found) is type(error)
    assert (found.message, found.hint, found.context) == (error.message, error.hint, error.context)


@pytest.mark.parametrize("cause", [Cause.killed, Cause.exited, Cause.hung, Cause.node])
def test_the_budget_is_of_losses_in_a_row(cause):
    judged = losses(max_failures=2)
    found = verdicts(judged, *[(loss(cause, update=u), -1) for u in (1, 2, 3)])
    assert found == [None, None, "TransientError"]


@pytest.mark.parametrize("cause", [Cause.killed, Cause.exited, Cause.hung, Cause.node])
def test_a_checkpoint_begins_a_new_row(cause):
    judged = losses(max_failures=1)
    found = verdicts(judged, *[(loss(cause, update=u), u - 1) for u in range(1, 50)])
    assert found == [None] * 49
    assert verdicts(judged, (loss(cause, update=51), 48)) == ["TransientError"]  # that one counts already


def test_a_checkpoint_that_is_not_newer_changes_nothing():
    judged = losses(max_failures=2)
    assert verdicts(judged, *[(loss(update=u), 10) for u in (11, 12, 13)]) == [None, None, "TransientError"]
    assert verdicts(losses(max_failures=0), (loss(), 10)) == ["TransientError"]


def test_one_update_that_ends_ranks_again_and_again_is_the_one_to_look_at():
    judged = losses(max_failures=100)
    assert verdicts(judged, *[(loss(update=7), 5) for _ in range(2)]) == [None, None]
    found = judged.judge(loss(update=7, rank=2, words="killed by SIGSEGV"), 6)
    assert isinstance(found, InternalError)
    assert "update 8 was lost 3 times, the last time on rank 2: killed by SIGSEGV" in found.message
    assert found.context == {"update": 7, "rank": 2}
    assert "treadle logs toy-1" in found.hint


def test_progress_between_does_not_excuse_an_update():
    judged = losses(max_failures=1)
    given = [(loss(update=7), 6), (loss(update=9), 8), (loss(update=7), 8), (loss(update=12), 10), (loss(update=7), 11)]
    assert verdicts(judged, *given) == [None, None, "TransientError", None, "InternalError"]


def test_ranks_that_are_lost_while_they_start_are_not_lost_at_the_first_update():
    # Killed by chance before they were restored, between checkpoints that tell of progress.
    judged = losses(max_failures=20)
    found = verdicts(judged, *((loss(update=0), committed) for committed in (-1, -1, 10, 20, 20, 30, 30, 40)))
    assert found == [None] * 8
    # The same without progress: it is the checkpoint, or what is made of it, that ends them.
    found = judged.judge(loss(update=0), 40), judged.judge(loss(update=0), 40)
    assert found[0] is None
    assert "update 41 was lost 3 times" in found[1].message


def test_nodes_say_nothing_about_an_update():
    judged = losses(max_failures=100)
    assert verdicts(judged, *[(loss(Cause.node, update=7), -1) for _ in range(20)]) == [None] * 20
    assert verdicts(judged, *[(loss(update=7), -1) for _ in range(2)]) == [None] * 2
    assert verdicts(judged, (loss(Cause.node, update=7), -1), (loss(update=7), -1)) == [None, "InternalError"]


def test_a_store_that_is_away_says_nothing_about_an_update_either():
    judged = losses(max_failures=4)
    away = TransientError("S3: not reached", hint="wait").to_json()
    found = [judged.judge(loss(Cause.exited, update=0, error=away), -1) for _ in range(5)]
    assert found[:4] == [None] * 4
    assert isinstance(found[4], TransientError)  # which may be tried again later, and not a bug
    assert "S3: not reached" in found[4].message


def test_memory_is_given_one_more_try():
    judged = losses(max_failures=100)
    out = TransientError("rank 1: out of memory: cannot allocate").to_json()
    assert verdicts(judged, (loss(Cause.memory, update=3, error=out), 2), (loss(update=5), 4)) == [None, None]
    found = judged.judge(loss(Cause.memory, update=9, error=out), 8)  # progress does not excuse it
    assert isinstance(found, InfeasibleError)
    assert "cannot allocate" in found.message
    assert "batch.max_slots" in found.hint


def test_preemptions_have_a_budget_of_their_own():
    unlimited = losses(max_failures=0)
    assert verdicts(unlimited, *[(loss(Cause.preempted, update=3), -1) for _ in range(50)]) == [None] * 50
    assert verdicts(unlimited, (loss(), -1)) == ["TransientError"]
    two = losses(max_failures=3, max_preemptions=2)
    assert verdicts(two, *[(loss(Cause.preempted), c) for c in range(3)]) == [None, None, "PreemptedError"]
    assert PreemptedError.exit_code == 76


def test_what_comes_with_another_loss_is_not_counted():
    judged = losses(max_failures=1)
    assert judged.judge(loss(update=7), -1) is None
    for rank in range(2, 9):
        assert judged.judge(loss(update=7, rank=rank), -1, is_new=False) is None
        assert judged.judge(loss(Cause.memory, update=7, rank=rank), -1, is_new=False) is None
    assert judged.judge(loss(update=8), 7) is None


def test_the_error_says_what_to_do():
    found = losses(max_failures=0).judge(loss(update=4, words="exit code 3"), -1)
    assert "rank 1 was lost at update 4 (exit code 3)" in found.message
    assert "cluster.max_failures = 0" in found.message
    assert found.hint == "treadle resume toy-1"


# Histories

causes = st.sampled_from(list(Cause))
retried = st.sampled_from([None, TransientError("away").to_json(), PreemptedError("left").to_json()])
histories = st.lists(
    st.tuples(causes, st.integers(0, 30), st.integers(0, 3), retried, st.integers(0, 2), st.booleans()), max_size=80
)


@given(histories, st.integers(0, 5), st.none() | st.integers(0, 3))
def test_it_gives_up_neither_before_the_budget_nor_after(history, max_failures, max_preemptions):
    judged = losses(max_failures, max_preemptions)
    committed, in_a_row, preemptions, memory, at = -1, 0, 0, 0, {}
    for cause, update, rank, error, progress, is_new in history:
        if progress:
            committed, in_a_row = committed + progress, 0
        found = judged.judge(loss(cause, update=update, rank=rank, error=error), committed, is_new=is_new)
        if not is_new:
            assert found is None
            continue
        if cause is Cause.preempted:
            preemptions += 1
            is_over = max_preemptions is not None and preemptions > max_preemptions
            assert isinstance(found, PreemptedError) if is_over else found is None
            continue
        in_a_row += 1
        memory += cause is Cause.memory
        is_at = cause is not Cause.node and error is None
        at[update] = at.get(update, 0) + is_at
        if is_at and at[update] >= SAME_UPDATE:
            assert isinstance(found, InternalError)
        elif memory >= 2:
            assert isinstance(found, InfeasibleError)
        elif in_a_row > max_failures:
            assert type(found) is TransientError
        else:
            assert found is None


@given(
    st.lists(st.tuples(causes.filter(lambda c: c is not Cause.preempted), st.integers(0, 1000)), min_size=8),
    st.integers(0, 6),
)
def test_without_progress_it_always_ends(history, max_failures):
    judged = losses(max_failures)
    found = [judged.judge(loss(cause, update=update), 5) for cause, update in history]
    assert any(found[: max_failures + 1])
    assert not any(error is not None and error.exit_code == 70 for error in found[:2])


@given(st.integers(1, 40), st.integers(1, 5))
def test_an_update_that_kills_ends_the_run_even_with_progress(update, every):
    judged, lives = losses(max_failures=1000), 0
    while judged.judge(loss(update=update), committed=lives * every) is None:
        lives += 1
        assert lives < SAME_UPDATE
    assert lives == SAME_UPDATE - 1


# Slow ranks


@pytest.mark.parametrize(
    ("busy_s", "slow"),
    [
        ([], []),
        ([0.1], []),
        ([0.1, 0.1], []),
        ([0.1, 0.3], [1]),
        ([0.3, 0.1], [0]),
        ([0.1, 0.19], []),
        ([0.1, 0.1, 0.3], [2]),
        ([0.1, 0.3, 0.3], []),  # who is right is not known
        ([0.1, 0.1, 0.1, 0.3, 0.3], [3, 4]),
        ([0.0005, 0.0015], []),  # by chance
        ([0.0, 0.0, 0.1], [2]),
    ],
)
def test_who_is_slow(busy_s, slow):
    assert slow_ranks(busy_s) == slow


@given(st.lists(st.floats(0.0, 10.0), min_size=2, max_size=12))
def test_only_the_slower_half_is_ever_named(busy_s):
    found = slow_ranks(busy_s)
    assert len(found) <= len(busy_s) // 2
    assert all(busy_s[rank] >= median(busy_s) for rank in found)
    assert found == [rank for rank in slow_ranks([2 * s for s in busy_s]) if rank in found]


@pytest.mark.parametrize("world", [2, 3, 8, 64])
def test_noise_alone_names_nobody(world):
    rng = random.Random(world)
    for _ in range(500):
        assert slow_ranks([0.1 * rng.lognormvariate(0.0, 0.1) for _ in range(world)]) == []


def test_a_loss_is_a_value():
    assert dataclasses.replace(loss(), rank=3).rank == 3
