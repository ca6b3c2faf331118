"""The controller against agents that are played here, over real sockets."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time

import pytest

from treadle.errors import DivergenceError, InternalError, TransientError
from treadle.launch import controller as module
from treadle.launch.controller import Controller
from treadle.launch.lines import Lines
from treadle.launch.supervise import Cause
from treadle.spec import ClusterSpec

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "SETTLE_S", 0.3)
    monkeypatch.setattr(module, "END_S", 0.2)


class Told:
    """A teller that remembers."""

    def __init__(self):
        self.rows = []

    def tell(self, event, /, **facts):
        self.rows.append((event, facts))

    def of(self, name):
        return [facts for event, facts in self.rows if event == name]


class Played:
    """An agent and its rank: says what it is told to, and hears what it is sent."""

    def __init__(self, led, rank, world=2, *, token=None, port=None):
        self.rank, self.heard = rank, []
        self.link = Lines(socket.create_connection((HOST, port or led.controller.port)))
        self.door = 1000 + rank
        self.link.send(
            "hello",
            token=led.controller.token if token is None else token,
            rank=rank,
            world=world,
            node=HOST,
            pid=100 + rank,
            door=self.door,
        )

    def expect(self, kind, *, seconds=10.0):
        """The next message, which is one of this kind."""
        deadline = time.monotonic() + seconds
        while not self.heard:
            left = deadline - time.monotonic()
            assert left > 0, f"rank {self.rank}: no {kind!r}"
            if select.select([self.link], [], [], left)[0]:
                self.heard += self.link.receive()
                assert self.link.is_open or self.heard, f"rank {self.rank}: closed, expected {kind!r}"
        assert self.heard[0]["kind"] == kind, self.heard
        return self.heard.pop(0)

    def expect_nothing(self, seconds=0.15):
        if not self.heard and select.select([self.link], [], [], seconds)[0]:
            self.heard += self.link.receive()
        assert not self.heard

    def expect_closed(self, seconds=10.0):
        deadline = time.monotonic() + seconds
        while self.link.is_open:
            assert select.select([self.link], [], [], deadline - time.monotonic())[0]
            self.heard += self.link.receive()

    def begin(self, *, fresh=True, pid=None):
        """Be started; gives the message."""
        message = self.expect("start")
        assert message["fresh"] is fresh
        self.link.send("started", pid=pid or 1000 + self.rank, door=self.door)
        return message

    def train(self, update=5, **facts):
        told = {"phase": "training", "waiting": False, "committed": -1, "busy_s": None, "stale": ""}
        self.link.send("pulse", update=update, **(told | facts))

    def hold(self, update=5):
        self.door += 10
        self.link.send("holding", update=update, door=self.door)

    def exit(
        self, update=5, *, committed=-1, error=None, collateral=False, cause=Cause.killed, words="killed by SIGKILL"
    ):
        self.door += 10
        self.link.send(
            "exited",
            update=update,
            committed=committed,
            done=False,
            error=error.to_json() if error else None,
            collateral=collateral,
            cause=cause.value,
            words=words,
            door=self.door,
        )

    def done(self, *, exits=True, **summary):
        self.link.send("done", summary={"status": "finished", "rank": self.rank} | summary)
        if exits:
            self.exited_done()

    def exited_done(self):
        self.link.send(
            "exited",
            update=9,
            committed=-1,
            done=True,
            error=None,
            collateral=False,
            cause="exited",
            words="exit code 0",
            door=self.door,
        )


class Led:
    """A controller at work."""

    def __init__(self, workers=2, *, can_replace=True, max_failures=3, **more):
        self.told, self.lost, self.stacks = Told(), [], []
        spec = ClusterSpec(workers=workers, max_failures=max_failures, **more)
        self.controller = Controller(
            spec,
            "toy-1",
            can_replace=can_replace,
            host=HOST,
            teller=self.told,
            on_agent_lost=self.lost.append,
            keep_stacks=lambda rank, text: self.stacks.append((rank, text)),
        )
        self.agents_alive = True
        self.thread = threading.Thread(target=self.controller.run, args=(lambda: self.agents_alive,), daemon=True)
        self.played = []
        self.thread.start()

    def agents(self, world=2, ranks=None):
        found = [Played(self, rank, world) for rank in (range(world) if ranks is None else ranks)]
        self.played += found
        return found

    def begun(self, world=2):
        """Agents whose ranks train."""
        found = self.agents(world)
        for agent in found:
            agent.begin()
            agent.train()
        self.wait_for(lambda: all(row["phase"] == "training" for row in self.controller.beat["ranks"]))
        return found

    def wait_for(self, condition, seconds=10.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.controller.beat, self.told.rows)
            time.sleep(0.002)

    def states(self):
        return [row["state"] for row in self.controller.beat["ranks"]]

    def finish(self, seconds=10.0):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), (self.controller.beat, self.told.rows)
        return self.controller.outcome()

    def fail(self, cls):
        with pytest.raises(cls) as failed:
            self.finish()
        assert type(failed.value) is cls
        return failed.value

    def close(self):
        self.controller.give_up(TransientError("the test is over"))
        for agent in self.played:
            agent.link.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def lead():
    """Makes controllers that end with the test."""
    made = []

    def make(*args, **options):
        made.append(Led(*args, **options))
        return made[-1]

    yield make
    for led in made:
        led.close()


# The plain course


def test_ranks_are_started_together_when_all_are_there(lead):
    led = lead(3)
    first, second = led.agents(3, ranks=(2, 0))
    first.expect_nothing()
    (late,) = led.agents(3, ranks=(1,))
    started = [agent.begin() for agent in (first, second, late)]
    assert started[0] == {"kind": "start", "fresh": True, "world": 3, "host": HOST, "port": 1000}
    assert started[0] == started[1] == started[2]
    for agent in (late, first, second):
        agent.done(metrics={"loss": float("nan")})
    assert led.finish()["rank"] == 0
    assert led.controller.is_over
    assert sorted(facts["rank"] for facts in led.told.of("rank_started")) == [0, 1, 2]
    assert not led.told.of("regrouped")


def test_one_rank_is_a_world_of_its_own(lead):
    led = lead(0)
    (agent,) = led.agents(1)
    assert agent.begin()["world"] == 1
    agent.done(update=7)
    assert led.finish()["update"] == 7
    agent.expect("end")


def test_the_beat_says_who_does_what(lead):
    led = lead(2)
    zero, one = led.begun()
    zero.train(update=12, committed=10)
    one.train(update=11, phase="evaluating")
    led.wait_for(
        lambda: led.controller.beat["update"] == 12 and led.controller.beat["ranks"][1]["phase"] == "evaluating"
    )
    beat = led.controller.beat
    assert (beat["committed"], beat["generation"], beat["slow"]) == (10, 1, [])
    assert beat["ranks"][0] == {"rank": 0, "pid": 1000, "node": HOST, "state": "running", "phase": "training"}


# Strangers


@pytest.mark.parametrize("token", ["", "x" * 64, "é" * 64, None, 3, ["a"], "\ud800"], ids=repr)
def test_a_stranger_is_shown_out(lead, token):
    led = lead(1)
    link = Lines(socket.create_connection((HOST, led.controller.port)))
    link.send("hello", token=token, rank=0, world=1, node=HOST, pid=1, door=1)
    while link.is_open:
        assert select.select([link], [], [], 10)[0]
        assert link.receive() == []
    link.close()
    (agent,) = led.agents(1)  # as if nothing had been
    agent.begin()
    agent.done()
    led.finish()


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"[" * 50_000 + b"\n", b"x" * 200_000, b'{"kind":"done"}\n', b""]
)
def test_what_strangers_send_hurts_nobody(lead, data):
    led = lead(1)
    with socket.create_connection((HOST, led.controller.port)) as raw:
        with contextlib.suppress(OSError):
            raw.sendall(data)
        (agent,) = led.agents(1)
        agent.begin()
        agent.done()
        led.finish()


# Losses


def test_a_lost_rank_is_replaced_while_the_others_hold(lead):
    led = lead(3)
    zero, one, two = led.begun(3)
    one.exit(update=5)
    zero.expect_nothing()  # who computes is left alone
    zero.hold()
    one.begin(fresh=False, pid=77)  # as soon as there is a state to come to
    two.hold()
    one.hold(update=0)
    for agent in (zero, one, two):
        form = agent.expect("form")
        assert form == {"kind": "form", "world": 3, "host": HOST, "port": zero.door}
    assert led.states() == ["running"] * 3
    (failed,) = led.told.of("rank_failed")
    assert (failed["rank"], failed["cause"], failed["update"], failed["goes_on"]) == (1, "killed", 5, True)
    assert failed["message"] == "killed by SIGKILL"
    assert led.told.of("regrouped") == [{"generation": 2, "world": 3, "is_fresh": False}]
    assert led.told.of("rank_started")[-1]["pid"] == 77
    for agent in (zero, one, two):
        agent.done()
    led.finish()


def test_a_replacement_that_dies_leaves_the_others_as_they_are(lead):
    led = lead(2, max_failures=2)
    zero, one = led.begun()
    one.exit()
    zero.hold()
    for _ in range(2):
        one.begin(fresh=False)
        zero.expect_nothing()
        assert led.states() == ["holding", "joining"]
        one.exit(update=0, error=TransientError("the store is away"), cause=Cause.exited)
    assert "the store is away" in led.fail(TransientError).message
    assert [facts["goes_on"] for facts in led.told.of("rank_failed")] == [True, True, False]  # each of them counts


def test_a_rank_that_dies_while_it_holds_costs_nothing_more(lead):
    led = lead(3, max_failures=1)
    zero, one, two = led.begun(3)
    one.exit()
    zero.hold()
    one.begin(fresh=False)
    zero.exit()
    two.hold()
    zero.begin(fresh=False)
    one.hold()
    zero.hold()
    assert {agent.expect("form")["port"] for agent in (zero, one, two)} == {zero.door}
    assert len(led.told.of("rank_failed")) == 1


def test_several_ranks_that_die_at_once_are_one_loss(lead):
    led = lead(4, max_failures=1)
    agents = led.begun(4)
    for agent in agents[1:]:
        agent.exit(update=7)
    agents[0].hold()
    for agent in agents[1:]:
        agent.begin(fresh=False)
        agent.hold(0)
    for agent in agents:
        agent.expect("form")
    assert len(led.told.of("rank_failed")) == 3
    assert all(facts["goes_on"] for facts in led.told.of("rank_failed"))
    agents[2].train(update=8)
    agents[2].exit(update=8)
    led.fail(TransientError)


def test_where_all_die_all_begin_anew(lead):
    led = lead(2)
    zero, one = led.begun()
    for agent in (zero, one):
        agent.exit()
    for agent in (zero, one):
        assert agent.begin(fresh=True)["port"] == zero.door
    assert led.told.of("regrouped")[-1]["is_fresh"] is True


def test_in_restart_mode_all_are_ended_and_begin_anew(lead):
    led = lead(3, can_replace=False)
    zero, one, two = led.begun(3)
    two.exit()
    zero.expect("kill")
    one.expect("kill")
    one.hold()  # it noticed by itself; its end is on the way
    one.expect_nothing()
    zero.exit(cause=Cause.killed)
    one.exit(cause=Cause.killed)
    for agent in (zero, one, two):
        agent.begin(fresh=True)
    assert [facts["rank"] for facts in led.told.of("rank_failed")] == [2]
    assert led.told.of("regrouped") == [{"generation": 2, "world": 3, "is_fresh": True}]
    # And again: what was ordered once is not taken for ordered for ever.
    for agent in (zero, one, two):
        agent.train(8)
    zero.exit(update=8)
    one.expect("kill")
    two.expect("kill")


def test_ranks_that_had_not_begun_are_not_waited_for(lead):
    led = lead(2)
    zero, one = led.agents(2)
    for agent in (zero, one):
        agent.begin()
    one.exit(update=0)
    zero.expect("kill")  # it holds nothing, and would wait for the other for long
    zero.exit()
    for agent in (zero, one):
        agent.begin(fresh=True)


def test_an_error_that_would_come_again_ends_the_run(lead):
    led = lead(2)
    zero, one = led.begun()
    one.exit(error=TransientError("lost the others"), collateral=True, cause=Cause.exited)
    zero.exit(error=DivergenceError("training diverged", update=3), cause=Cause.exited)
    error = led.fail(DivergenceError)
    assert error.message == "training diverged"
    one.expect("end")


def test_an_error_that_comes_after_another_loss_still_counts(lead):
    led = lead(2)
    zero, one = led.begun()
    one.exit()
    zero.exit(error=DivergenceError("training diverged"), cause=Cause.exited)
    led.fail(DivergenceError)


def test_losses_without_a_cause_end_too(lead):
    led = lead(2, max_failures=2)
    zero, one = led.agents(2)
    for _ in range(3):
        zero.begin()
        one.begin()
        zero.exit(error=TransientError("did not meet"), collateral=True, cause=Cause.exited)
        one.expect("kill")
        one.exit()
    assert "the ranks did not meet" in led.fail(TransientError).message


def test_holding_without_a_cause_ends_too(lead):
    led = lead(2, max_failures=1)
    zero, one = led.begun()
    for agent in (zero, one):
        agent.hold()
    for agent in (zero, one):
        agent.expect("form")
        agent.hold()
    led.fail(TransientError)


# Ranks that do not come home


def test_a_rank_that_waits_for_the_lost_one_for_ever_is_ended(lead):
    led = lead(3)
    zero, one, two = led.begun(3)
    two.train(waiting=True)
    one.exit()
    zero.hold()
    one.begin(fresh=False)
    two.expect("kill", seconds=5)
    two.exit()
    two.begin(fresh=False)
    one.hold()
    two.hold()
    for agent in (zero, one, two):
        agent.expect("form")
    assert len(led.told.of("rank_failed")) == 1


def test_a_rank_that_computes_may_take_its_time(lead):
    led = lead(2)
    zero, one = led.begun()
    one.exit()
    for _ in range(10):  # three times as long as one may wait
        zero.train(waiting=False)
        zero.expect_nothing(0.1)
    zero.hold()
    one.begin(fresh=False)


def test_a_rank_that_hangs_while_others_hold_is_ended(lead):
    led = lead(3)
    zero, one, two = led.begun(3)
    one.exit()
    zero.hold()
    one.begin(fresh=False)
    two.train(stale="no progress for 11 s")
    assert two.expect("hung")["why"] == "no progress for 11 s"
    two.exit(cause=Cause.hung)
    two.begin(fresh=False)


# Hanging


def test_a_rank_that_hangs_is_ended_and_those_that_wait_for_it_are_not(lead):
    led = lead(2)
    zero, one = led.begun()
    one.train(waiting=True, stale="no progress for 3 s")
    zero.train(stale="no progress for 3 s")
    assert zero.expect("hung")["why"] == "no progress for 3 s"
    one.expect_nothing()
    zero.link.send("stacks", text="File fit.py")
    zero.exit(cause=Cause.hung, words="no progress for 3 s")
    led.wait_for(lambda: led.stacks == [(0, "File fit.py")])
    one.train(waiting=True, stale="no progress for 4 s")
    one.expect_nothing(0.05)
    one.hold()
    zero.begin(fresh=False)
    assert led.told.of("rank_failed")[0]["cause"] == "hung"


def test_where_all_wait_the_meeting_hangs_and_that_is_one_loss(lead):
    led = lead(4, max_failures=1)
    agents = led.begun(4)
    end = time.monotonic() + 5
    hung = []
    while len(hung) < 4 and time.monotonic() < end:
        for agent in agents:
            if agent in hung:
                continue
            agent.train(waiting=True, stale="no progress for 12 s")
            if select.select([agent.link], [], [], 0.02)[0]:
                assert "waiting for other ranks" in agent.expect("hung")["why"]
                hung.append(agent)
                agent.exit(cause=Cause.hung)
                break
        if hung:
            break
    assert hung
    for agent in agents:
        if agent is not hung[0]:
            agent.hold()
    hung[0].begin(fresh=False)
    hung[0].hold()
    for agent in agents:
        agent.expect("form")


def test_who_waits_while_another_reads_does_not_hang(lead):
    led = lead(2)
    zero, one = led.begun()
    zero.train(phase="evaluating")
    for _ in range(10):
        one.train(waiting=True, stale="no progress for 60 s")
        one.expect_nothing(0.05)


def test_a_stale_word_from_before_does_not_end_who_holds(lead):
    led = lead(2)
    zero, one = led.begun()
    one.exit()
    zero.hold()
    zero.train(stale="no progress for 11 s")
    zero.expect_nothing()


# Ranks that are done


def test_when_rank_0_is_done_nobody_is_missed(lead):
    led = lead(2)
    zero, one = led.begun()
    one.exit()
    zero.done(model_version=1)
    assert led.finish()["model_version"] == 1


def test_when_rank_0_is_done_the_others_may_die(lead):
    led = lead(3)
    zero, one, _ = led.begun(3)
    zero.done(exits=False, model_version=1)
    one.exit(error=DivergenceError("too late"), cause=Cause.exited)
    assert led.finish()["model_version"] == 1


def test_when_rank_0_is_done_an_agent_may_die(lead):
    led = lead(2)
    zero, one = led.begun()
    zero.done(model_version=1)
    one.link.close()
    assert led.finish()["model_version"] == 1
    assert led.lost == []


def test_a_rank_that_is_done_is_called_back_where_rank_0_is_lost(lead):
    led = lead(3)
    zero, one, two = led.begun(3)
    one.done(exits=False)
    two.hold()
    zero.exit()
    one.expect("kill")  # a new one must not be told of the old one's end
    two.expect("kill")
    two.exit()
    zero.expect_nothing()
    one.exited_done()
    for agent in (zero, one, two):
        agent.begin(fresh=True)
    for agent in (zero, one, two):
        agent.done()
    led.finish()


def test_rank_0_is_not_disturbed_where_another_is_done_and_a_third_dies(lead):
    for can_replace in (True, False):
        led = lead(3, can_replace=can_replace)
        zero, one, two = led.begun(3)
        one.done()
        two.exit()
        zero.expect_nothing()
        zero.done(model_version=1)
        assert led.finish()["model_version"] == 1


def test_a_rank_that_is_done_and_whose_agent_is_gone_is_missed_only_when_needed(lead):
    led = lead(2)
    zero, one = led.begun()
    one.done()
    one.link.close()
    zero.expect_nothing()
    assert led.lost == []
    zero.exit()
    zero.expect("end")
    led.wait_for(lambda: led.lost == [1])


# Agents


def test_a_lost_agent_ends_the_others_and_new_ones_begin_anew(lead):
    led = lead(2)
    zero, one = led.begun()
    one.link.close()
    zero.expect("end")
    zero.link.close()
    led.wait_for(lambda: led.lost == [1])
    (failed,) = led.told.of("rank_failed")
    assert (failed["cause"], failed["message"]) == ("node", f"its agent on {HOST} is gone")
    for agent in led.agents(2):
        agent.begin(fresh=True)
    assert led.told.of("regrouped") == [{"generation": 2, "world": 2, "is_fresh": True}]


def test_a_rank_and_then_its_agent_are_one_loss(lead):
    led = lead(2, max_failures=1)
    _, one = led.begun()
    one.exit()
    one.link.close()
    led.wait_for(lambda: led.lost == [1])
    for agent in led.agents(2):
        agent.begin(fresh=True)
    assert [facts["goes_on"] for facts in led.told.of("rank_failed")] == [True, True]


def test_agents_that_die_before_they_begin_are_counted(lead):
    led = lead(1, max_failures=2)
    for number in range(1, 4):
        (agent,) = led.agents(1)
        agent.begin()
        agent.link.close()
        led.wait_for(lambda number=number: len(led.told.of("rank_failed")) == number)
    led.fail(TransientError)
    assert led.lost == [0, 0]  # for the last one nobody needs another


def test_agents_that_die_while_others_are_awaited_are_counted(lead):
    led = lead(2, max_failures=2)
    for number in range(1, 4):
        (agent,) = led.agents(2, ranks=(0,))
        led.wait_for(lambda: led.states() == ["waiting"])
        agent.link.close()
        led.wait_for(lambda number=number: len(led.told.of("rank_failed")) == number)
    led.fail(TransientError)


def test_the_ranks_may_come_back_as_more_or_fewer(lead):
    led = lead(3)
    first = led.begun(3)
    first[0].link.close()
    for agent in first[1:]:
        agent.expect("end")
    two = led.agents(2)
    for agent in two:
        assert agent.begin()["world"] == 2
        agent.train()
    four = led.agents(4)  # without a word of the two before
    for agent in two:
        agent.expect("end")
    for agent in four:
        assert agent.begin()["world"] == 4
    for agent in two:
        agent.link.close()  # nobody of importance any more
    for agent in four:
        agent.train(6)
    led.wait_for(lambda: led.controller.beat["update"] == 6)
    assert led.states() == ["running"] * 4


def test_a_second_agent_of_a_rank_means_a_new_group(lead):
    led = lead(2)
    old = led.begun()
    (zero,) = led.agents(2, ranks=(0,))
    for agent in old:
        agent.expect("end")
        agent.link.close()
    zero.expect_nothing()  # its group is not whole; and it is not sent away with the old one
    (one,) = led.agents(2, ranks=(1,))
    for agent in (zero, one):
        agent.begin(fresh=True)


def test_agents_that_never_come_are_said(lead):
    led = lead(1)
    time.sleep(0.1)
    assert not led.controller.is_over
    led.agents_alive = False
    assert "ended before it began" in led.fail(TransientError).message


def test_a_machine_that_goes_away_is_no_failure(lead):
    led = lead(1, max_failures=0)
    (agent,) = led.agents(1)
    agent.begin()
    led.controller.drain()
    agent.exit()
    agent.begin()
    agent.link.close()
    led.wait_for(lambda: led.lost == [0])
    assert [facts["cause"] for facts in led.told.of("rank_failed")] == ["preempted", "preempted"]
    (agent,) = led.agents(1)
    agent.begin()
    agent.exit(cause=Cause.exited, words="exit code 1")  # a machine that goes away does not do that
    led.fail(TransientError)


# Slow ranks


def test_a_slow_rank_is_named_and_forgotten(lead):
    led = lead(2)
    zero, one = led.begun()
    for busy_s in (0.1, 0.3, 0.1):
        for _ in range(2 * module.WINDOW):
            zero.train(busy_s=0.1)
            one.train(busy_s=busy_s)
        zero.train(update=int(1000 * busy_s))
        led.wait_for(lambda busy_s=busy_s: led.controller.beat["slow"] == ([1] if busy_s > 0.2 else []))
    (named,) = led.told.of("slow_rank")
    assert named["rank"] == 1


# The end


def test_giving_up_from_another_thread_ends_everything(lead):
    led = lead(2)
    zero, one = led.begun()
    led.controller.give_up(TransientError("Ray Train ended"))
    led.controller.give_up(DivergenceError("later"))
    assert led.fail(TransientError).message == "Ray Train ended"
    for agent in (zero, one):
        agent.expect("end")
        agent.expect_closed()


def test_a_result_is_not_taken_back(lead):
    led = lead(1)
    (agent,) = led.agents(1)
    agent.begin()
    agent.done(update=3)
    led.thread.join(10)
    led.controller.give_up(TransientError("Ray Train ended before the run did"))
    assert led.finish()["update"] == 3


def test_a_bug_ends_the_run_and_the_agents_hear_of_it(lead, capfd):
    led = lead(1)
    (agent,) = led.agents(1)
    agent.begin()
    agent.link.send("exited", update=3)  # half of what it should say
    assert "KeyError" in led.fail(InternalError).message
    agent.expect("end")
    assert "Traceback" in capfd.readouterr().err


def test_an_agent_that_does_not_leave_holds_nobody_up(lead):
    led = lead(1)
    (agent,) = led.agents(1)
    agent.begin()
    agent.done()
    started = time.monotonic()
    led.finish()
    assert time.monotonic() - started < 5
    agent.expect("end")


def test_callers_at_the_end_are_refused(lead):
    led = lead(1)
    (agent,) = led.agents(1)
    agent.begin()
    led.controller.give_up(TransientError("over"))
    agent.expect("end")
    with contextlib.suppress(ConnectionError):  # it may be gone by now
        late = Played(led, 0, 1)
        late.expect_closed()
        assert late.heard == []
        late.link.close()
    agent.link.close()
    led.thread.join(10)
    with pytest.raises(ConnectionRefusedError):
        Played(led, 0, 1)


def test_nothing_is_left_open(lead):
    def files():
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def life():
        led = lead(2)
        zero, one = led.begun()
        stranger = socket.create_connection((HOST, led.controller.port))
        one.exit()
        zero.hold()
        one.begin(fresh=False)
        led.close()
        stranger.close()

    life()
    before = files()
    for _ in range(3):
        life()
    assert files() == before
