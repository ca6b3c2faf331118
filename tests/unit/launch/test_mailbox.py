"""Wishes to a running attempt: heard once each, also past a damaged one, and machines that go away."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest

from treadle.launch import mailbox
from treadle.launch.mailbox import Mailbox
from treadle.store import Backend, RequestKind, Runs
from treadle.testing import MemoryBlobs


@dataclass
class Commits:
    """Stands where the saver stands: says how long the last commit took."""

    last_commit_s: float = 0.0


@pytest.fixture
def asked(monkeypatch):
    """A run with one attempt, its mailbox, and a way to ask."""
    monkeypatch.setattr(mailbox, "POLL_S", 0.002)
    blobs = MemoryBlobs()
    runs = Runs(blobs)
    run = runs.create(b"{}", b"{}", job="toy", backend=Backend.inline).run
    number = runs.claim_attempt(run, Backend.inline)
    made = Mailbox(runs, run, number, Commits())

    def ask(kind, within_s=None):
        return runs.request(run, kind, "a test", attempt=number, within_s=within_s)

    yield made, ask, blobs, run
    made.close()
    assert not [t for t in threading.enumerate() if t.name == "treadle-mailbox"]


def eventually(wanted, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if wanted():
            return True
        time.sleep(0.002)
    return False


def test_wishes_are_heard_once_each(asked):
    made, ask, _, _ = asked
    assert not made.wants_stop()
    assert not made.wants_checkpoint()
    for _ in range(2):
        ask(RequestKind.checkpoint)
        assert eventually(made.wants_checkpoint)
        assert not made.wants_checkpoint()
    ask(RequestKind.stop)
    assert eventually(made.wants_stop)
    assert made.wants_stop()
    assert not made.is_drained


def test_a_damaged_wish_does_not_hide_those_after_it(asked):
    made, ask, blobs, run = asked
    blobs.put(f"runs/{run}/control/000001.json", b"{half of a rec")
    assert ask(RequestKind.stop) == 2
    assert eventually(made.wants_stop)


def test_a_machine_that_goes_away_gets_a_commit_on_sight_and_another_before_the_end(asked, monkeypatch):
    made, ask, _, _ = asked
    monkeypatch.setattr(mailbox, "LAST_S", 0.2)
    ask(RequestKind.drain, within_s=0.6)
    assert eventually(made.wants_checkpoint)
    assert made.is_drained
    assert not made.wants_stop()  # there is time to go on
    started = time.monotonic()
    assert eventually(made.wants_stop)
    assert 0.1 < time.monotonic() - started < 0.6


def test_the_last_commit_begins_early_enough_for_what_commits_take(asked, monkeypatch):
    made, ask, _, _ = asked
    monkeypatch.setattr(mailbox, "LAST_S", 0.2)
    made._saver.last_commit_s = 30.0
    ask(RequestKind.drain, within_s=50.0)
    assert eventually(lambda: made.is_drained)
    assert made.wants_stop()


def test_the_earliest_of_several_deadlines_counts(asked, monkeypatch):
    made, ask, _, _ = asked
    monkeypatch.setattr(mailbox, "LAST_S", 0.1)
    ask(RequestKind.drain, within_s=100.0)
    ask(RequestKind.drain, within_s=0.2)
    ask(RequestKind.drain, within_s=100.0)
    assert eventually(made.wants_stop)
