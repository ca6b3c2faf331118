"""An agent and its rank as real processes, with a real controller and a real, tiny training."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time

import psutil
import pytest
from agents_nursery import Agent
from agents_rig import Attempt, is_gone

from treadle.errors import InfeasibleError, InternalError
from treadle.launch.agent import Orders, start_agent
from treadle.launch.lines import Lines
from treadle.spec import CheckpointSpec, ClusterSpec, TrainSpec

pytestmark = pytest.mark.timeout(110)
HOST = "127.0.0.1"
TRAIN = TrainSpec(epochs=10, seed=1, log_every="0s")
DIE = "import os, signal; os.kill(os.getpid(), signal.{})"
AWAY = "from treadle.errors import TransientError; raise TransientError('the store is away')"
HANG = """
import time
def hang_here():
    time.sleep(1000)
hang_here()
"""


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    """The model of an undisturbed run."""
    attempt = Attempt(nursery, tmp_path_factory.mktemp("whole"), train=TRAIN)
    with attempt.led():
        assert attempt.finish()["status"] == "finished"
    return attempt.weights()


@pytest.fixture
def made(nursery, tmp_path):
    def make(name="run", **changes):
        return Attempt(nursery, tmp_path / name, **({"train": TRAIN} | changes))

    return make


def causes(attempt):
    return [(row["update"], row["cause"], row["message"]) for row in attempt.events("rank_failed")]


def check_gone(*pids, seconds=5.0):
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if not is_gone(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


# Deaths


def test_however_a_rank_dies_the_next_goes_on_and_ends_in_the_same_bits(made, whole):
    attempt = made(checkpoint=CheckpointSpec(every="1h", every_updates=7, keep_last=2))
    attempt.fault("update-5", 0, DIE.format("SIGKILL"))
    attempt.fault("update-12", 0, DIE.format("SIGSEGV"))
    attempt.fault("valid", 0, "import os; os._exit(3)")
    attempt.fault("update-24", 0, DIE.format("SIGTERM"))
    attempt.fault("swap", 0, "import os; os._exit(4)")  # in the thread that commits
    attempt.fault("update-30", 0, AWAY)
    attempt.fault("registered", 0, "import os; os._exit(0)")  # between the model and the word that it is there
    with attempt.led():
        assert attempt.finish()["model_version"] == 1
        (agent,) = attempt.agents  # one and the same all along
        started = attempt.events("rank_started")
        assert {row["agent"] for row in started} == {agent.pid}
        assert len({row["pid"] for row in started}) == len(started) == 8
    found = causes(attempt)
    assert (5, "killed", "killed by SIGKILL") in found
    assert (12, "killed", "killed by SIGSEGV") in found
    assert (24, "killed", "killed by SIGTERM") in found
    assert (30, "exited", "the store is away") in found
    assert {words for _, cause, words in found[:-1] if cause == "exited"} >= {"exit code 3", "exit code 4"}
    assert found[-1][1:] == ("exited", "exit code 0")
    assert attempt.weights() == whole
    assert attempt.versions() == 1


def test_a_bug_ends_the_run_and_says_where(made):
    attempt = made()
    attempt.fault("update-6", 0, "def f():\n    return {}['missing']\nf()")
    with attempt.led(), pytest.raises(InternalError, match="rank 0: KeyError: 'missing'") as failed:
        attempt.finish()
    assert "treadle logs" in failed.value.hint
    assert [row["goes_on"] for row in attempt.events("rank_failed")] == [False]


@pytest.mark.parametrize(
    "error", ["MemoryError()", "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')"]
)
def test_memory_that_is_short_twice_is_said(made, error):
    attempt = made(checkpoint=CheckpointSpec(every="1h", every_updates=2, keep_last=2))
    attempt.fault("update-6", 0, f"raise {error}")
    attempt.fault("update-14", 0, f"raise {error}")
    with attempt.led(), pytest.raises(InfeasibleError, match="killed for memory a second time, at update 14"):
        attempt.finish()
    assert [row["cause"] for row in attempt.events("rank_failed")] == ["memory", "memory"]


def test_an_update_that_kills_every_time_is_named(made):
    attempt = made()
    attempt.before += "\nimport treadle.train.run as r, os, signal; at = r.Reached.at\n"
    attempt.before += (
        "r.Reached.at = lambda self, s: (at(self, s), s.update == 9 and os.kill(os.getpid(), signal.SIGBUS))"
    )
    with attempt.led(), pytest.raises(InternalError, match=r"update 10 was lost 3 times, .*killed by SIGBUS"):
        attempt.finish()
    assert [row["update"] for row in attempt.events("rank_failed")] == [9, 9, 9]


# Hanging


def test_a_rank_that_hangs_leaves_its_stacks_and_is_replaced(made, whole):
    attempt = made(cluster=ClusterSpec(workers=0, hang_after="1s"))
    attempt.fault("update-40", 0, HANG)  # by then their agent knows how long updates take
    with attempt.led():
        attempt.wait_for(attempt.injected, "the fault")
        began = time.monotonic()
        attempt.wait_for(lambda: attempt.events("rank_failed"), "the loss")
        assert time.monotonic() - began < 10
        attempt.finish()
    ((update, cause, words),) = causes(attempt)
    assert (update, cause) == (40, "hung")
    assert words.startswith("no progress for ")
    (told,) = attempt.events("stacks")
    text = attempt.blobs.get(told["key"]).decode()
    assert "in hang_here" in text
    assert "in fit" in text  # the whole of it
    assert text.count("hread 0x") > 1  # and of all threads
    assert attempt.weights() == whole


def test_a_stopped_rank_is_noticed_but_not_at_once(made, whole):
    attempt = made(cluster=ClusterSpec(workers=0, hang_after="2s"))
    attempt.fault("update-10", 0, "import os, signal, time; reach('short'); os.kill(os.getpid(), signal.SIGSTOP)")
    attempt.fault("update-20", 0, DIE.format("SIGSTOP"))
    with attempt.led():
        pid = attempt.wait_for(attempt.pid, "the rank")
        attempt.wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the first stop")
        time.sleep(0.7)
        os.kill(pid, signal.SIGCONT)
        attempt.wait_for(lambda: "update-20.0.done" in attempt.injected(), "the second stop")
        began = time.monotonic()
        attempt.wait_for(lambda: is_gone(pid), "its end")
        assert 1.5 < time.monotonic() - began < 10
        attempt.finish()
    ((update, cause, words),) = causes(attempt)
    assert (update, cause) == (20, "hung")
    assert words.startswith("stopped by a signal for ")
    (told,) = attempt.events("stacks")
    assert attempt.blobs.get(told["key"]) == b"none: the process is in state T"
    assert attempt.weights() == whole


# Those above


def test_an_agent_that_dies_takes_its_rank_along_and_another_goes_on(made, whole):
    attempt = made(checkpoint=CheckpointSpec(every="1h", every_updates=5, keep_last=2))
    with attempt.led():
        attempt.reach(7)
        rank, agent = attempt.pid(), attempt.agents[0].pid
        os.kill(rank, signal.SIGSTOP)  # one that can do nothing about it
        os.kill(agent, signal.SIGTERM)
        check_gone(agent, rank)
        attempt.replaced(0, rank)
        attempt.reach(12)
        rank, agent = attempt.pid(), attempt.agents[1].pid
        os.kill(agent, signal.SIGKILL)
        check_gone(agent, rank)
        attempt.finish()
    assert [row["cause"] for row in attempt.events("rank_failed")] == ["node", "node"]
    assert attempt.weights() == whole


@pytest.mark.parametrize("number", [None, signal.SIGSTOP], ids=["running", "stopped"])
def test_nothing_outlives_the_parent(made, number):
    attempt = made(train=TrainSpec(epochs=1000, seed=1))
    with attempt.led():
        agent = attempt.agents[0]
        attempt.wait_for(attempt.pid, "the rank")
        # Somebody who holds the other end of its standard input, as a parent does.
        parent = subprocess.Popen(["sleep", "1000"], pass_fds=[agent.stdin.fileno()])
        agent.stdin.close()
        attempt.reach(2)
        rank = attempt.pid()
        if number is not None:
            os.kill(rank, number)
        assert not is_gone(agent.pid)
        attempt.restart = lambda: None  # nobody starts another
        parent.kill()
        parent.wait()
        check_gone(agent.pid, rank)


def test_the_agent_forks_from_a_single_thread(made):
    attempt = made(train=TrainSpec(epochs=1000, seed=1))
    attempt.fault("started", 0, "import os\nassert len(os.listdir('/proc/self/task')) == 1")
    with attempt.led():
        attempt.reach(3)
        assert psutil.Process(attempt.agents[0].pid).num_threads() == 1
        assert attempt.injected() == ["started.0.done"]
        attempt.replaced(0, attempt.kill(0))
        assert psutil.Process(attempt.agents[0].pid).num_threads() == 1
    assert [row["cause"] for row in attempt.events("rank_failed")] == ["killed"]


# The protocol, against a controller that is played here


class Lead:
    """Plays the controller of one agent."""

    def __init__(self, attempt, nursery):
        self.server = socket.create_server((HOST, 0))
        self.orders = Orders(
            host=HOST,
            port=self.server.getsockname()[1],
            token="secret",
            rank=0,
            world=1,
            node=HOST,
            assignment={"store": str(attempt.store), "run": attempt.run, "attempt": 1, "code": {}},
            hang_after_s=5.0,
        )
        self.agent: Agent = nursery.start(self.orders, before=attempt.before)
        self.link = Lines(self.server.accept()[0])
        self.heard = []

    def expect(self, kind, seconds=20.0):
        """The next message of a kind, those of others left out."""
        deadline = time.monotonic() + seconds
        while True:
            while self.heard:
                message = self.heard.pop(0)
                if message["kind"] == kind:
                    return message
            assert select.select([self.link], [], [], max(0.0, deadline - time.monotonic()))[0], kind
            self.heard = self.link.receive()
            assert self.link.is_open, kind

    def start(self):
        self.link.send("start", fresh=True, world=1, host=HOST, port=1)
        return self.expect("started")["pid"]

    def close(self):
        self.link.close()
        self.server.close()
        self.agent.close()


@pytest.fixture
def played(made, nursery):
    attempt = made(train=TrainSpec(epochs=1000, seed=1))
    attempt.runs.claim_attempt(attempt.run, "inline")
    lead = Lead(attempt, nursery)
    yield lead
    lead.close()


def test_the_words_of_an_agent(played):
    hello = played.expect("hello")
    assert (hello["token"], hello["rank"], hello["world"], hello["node"]) == ("secret", 0, 1, HOST)
    assert hello["pid"] == played.agent.pid
    played.link.send("form", world=1, host=HOST, port=1)  # to nobody
    played.link.send("hung", why="nobody")
    played.link.send("kill")
    pid = played.start()
    while (pulse := played.expect("pulse"))["update"] < 3:
        pass
    assert pulse["phase"] in ("training", "evaluating")
    assert pulse["stale"] == ""
    assert -1 <= pulse["committed"] <= pulse["update"]
    played.link.send("hung", why="so it is said")
    played.link.send("hung", why="twice")
    played.link.send("start", fresh=True, world=1, host=HOST, port=1)  # it has one
    assert "fit" in played.expect("stacks")["text"]
    exited = played.expect("exited")
    assert (exited["cause"], exited["words"], exited["done"]) == ("hung", "so it is said", False)
    assert exited["update"] >= 3
    assert is_gone(pid)
    second = played.start()
    played.link.send("kill")
    exited = played.expect("exited")
    assert (exited["cause"], exited["words"], exited["error"]) == ("killed", "killed by SIGKILL", None)
    assert is_gone(second)
    third = played.start()
    played.link.send("end")
    check_gone(third, played.agent.pid)


def test_ranks_leave_neither_files_nor_memory_in_their_agent(played):
    played.expect("hello")
    process, seen = psutil.Process(played.agent.pid), []
    for _ in range(8):
        played.start()
        played.expect("pulse")
        seen.append((process.num_fds(), process.memory_info().rss))
        played.link.send("kill")
        played.expect("exited")
    files, memory = zip(*seen, strict=True)
    assert len(set(files)) == 1
    assert memory[-1] - memory[2] < 1 << 20


def test_an_agent_whose_controller_is_gone_ends(played):
    played.expect("hello")
    pid = played.start()
    played.link.close()
    check_gone(pid, played.agent.pid)


def too_late(port):
    return Orders(host=HOST, port=port, token="t", rank=0, world=1, node=HOST, assignment={}, hang_after_s=1.0)


def test_an_agent_that_comes_too_late_ends_in_peace():
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    agent = start_agent(too_late(port))  # the real one
    assert agent.wait(timeout=60) == 0  # who keeps the place would start it again otherwise
    agent.stdin.close()
