"""Signs of life between a process and its fork."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import timeit

import pytest

from treadle.launch.pulse import Phase, Pulse


@pytest.fixture
def forked():
    """Runs a function in a fork, for as long as the test lasts."""
    pids = []

    def start(function):
        pid = os.fork()
        if not pid:
            try:
                function()
            finally:
                os._exit(0)
        pids.append(pid)

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_new_one_is_starting():
    began = time.monotonic()
    beat = Pulse().read()
    assert (beat.update, beat.phase, beat.is_waiting, beat.waited_s, beat.committed) == (
        0,
        Phase.starting,
        False,
        0.0,
        -1,
    )
    assert began <= beat.changed_s <= time.monotonic()


def test_what_a_child_writes_its_parent_reads(forked):
    pulse = Pulse()

    def live():
        pulse.enter("training")
        pulse.at(7)
        pulse.commit(5)
        pulse.meet("waiting")
        time.sleep(0.05)
        pulse.meet("computing")
        pulse.enter("evaluating")
        pulse.meet("waiting")
        time.sleep(60)

    forked(live)
    wait_for(lambda: pulse.read().phase is Phase.evaluating and pulse.read().is_waiting)
    beat = pulse.read()
    assert (beat.update, beat.committed) == (7, 5)
    assert 0.05 <= beat.waited_s < 30
    time.sleep(0.05)
    assert pulse.read() == beat  # nothing changes by being looked at


def test_a_reader_never_sees_a_field_half_written(forked):
    pulse = Pulse()
    big = 1 << 40  # every byte of a word that is being written differs from what it was

    def live():
        pulse.enter("training")
        pulse.at(big)
        pulse.commit(3)
        number = 0
        while True:
            number += 1
            pulse.at(big + number)
            pulse.meet("waiting")
            pulse.meet("computing")

    forked(live)
    wait_for(lambda: pulse.read().update > big)
    before, end, looks = pulse.read(), time.monotonic() + 1.0, 0
    while time.monotonic() < end:
        beat = pulse.read()
        assert beat.update >= before.update
        assert (beat.phase, beat.committed) == (Phase.training, 3)
        assert beat.changed_s >= before.changed_s
        assert beat.waited_s >= before.waited_s
        before, looks = beat, looks + 1
    assert looks > 1000


def test_what_is_new_is_never_seen_with_an_old_time(forked):
    pulse = Pulse()

    def live():
        while True:
            pulse.at(time.monotonic_ns())

    forked(live)
    wait_for(lambda: pulse.read().update)
    for _ in range(50_000):
        beat = pulse.read()
        assert beat.changed_s >= beat.update * 1e-9 - 1e-8


def test_a_commit_of_another_thread_takes_nothing_back():
    pulse, stop = Pulse(), threading.Event()

    def commit():
        number = 0
        while not stop.is_set():
            number += 1
            pulse.commit(number)

    thread, interval = threading.Thread(target=commit), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for number in range(5000):
            pulse.at(number)
            pulse.meet("waiting")
            beat = pulse.read()
            assert beat.is_waiting
            assert beat.update == number
            pulse.meet("computing")
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert pulse.read().committed > 0


def test_only_waiting_is_counted_as_waiting():
    pulse = Pulse()
    pulse.meet("computing")  # without having waited
    assert pulse.read().waited_s == 0.0
    for _ in range(3):
        pulse.meet("waiting")
        pulse.meet("computing")
        pulse.meet("computing")
        time.sleep(0.02)
    assert 0.0 < pulse.read().waited_s < 0.02


def test_a_call_costs_next_to_nothing():
    pulse = Pulse()
    calls = [lambda: pulse.at(3), lambda: pulse.meet("waiting"), lambda: pulse.meet("computing")]
    each_s = max(min(timeit.repeat(call, number=2000, repeat=5)) / 2000 for call in calls)
    assert each_s < 50e-6  # half a microsecond on a quiet machine; an update takes milliseconds


def test_an_unknown_phase_is_a_bug():
    with pytest.raises(KeyError):
        Pulse().enter("sleeping")
