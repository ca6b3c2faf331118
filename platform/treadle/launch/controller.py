"""Keeps the ranks of one attempt together: who is there, who was lost, and when they meet again.

It listens to the agents (launch/agent.py), one beside each rank, and is the only one that decides. Where a rank is
lost, the others are told to come together anew, with their state (`recovery=replace`) or from the last checkpoint
(`recovery=restart`). What it decides by is pure (launch/supervise.py).
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from treadle.errors import InternalError, TransientError, TreadleError
from treadle.launch.lines import Lines
from treadle.launch.supervise import Cause, Loss, Losses, slow_ranks
from treadle.spec import ClusterSpec

__all__ = ["Controller", "Teller"]

LOOK_S = 0.1
END_S = 10.0
SETTLE_S = 15.0
"""How long a rank may wait for others after one was lost: its collective fails, of more than two one after another."""
STRANGER_BYTES = 1 << 16
"""Of who has not said the token yet."""
WINDOW = 20
"""Looks over which a rank has to be slow before it is named."""


class Teller(Protocol):
    """Who writes down what happened."""

    def tell(self, event: str, /, **facts: Any) -> None: ...


@dataclass
class _Seat:
    """One rank, as its agent tells.

    Args:
        state: waiting (no process), running, joining (a new process that takes up the newest checkpoint), holding
            (alive, without a group), or done.
    """

    link: Lines
    node: str
    door: int
    agent: int
    pid: int = 0
    state: str = "waiting"
    update: int = 0
    phase: str = "starting"
    summary: dict[str, Any] | None = None
    busy_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    is_expected: bool = False
    """Its end was ordered: no loss of its own."""
    waiting_s: float | None = None
    """Since when it has been inside a collective."""


class Controller:
    """The lead of one attempt.

    Args:
        spec: of the cluster. run: for messages.
        can_replace: ranks that lost another go on with the state they hold.
        host: address to listen on, which agents can reach.
        teller: of events.
        on_agent_lost: called where an agent is gone, with its rank; for who can start another.
        keep_stacks: given (rank, text) of a rank that hung.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        run: str,
        *,
        can_replace: bool,
        host: str,
        teller: Teller,
        on_agent_lost: Callable[[int], object] = lambda rank: None,
        keep_stacks: Callable[[int, str], None] = lambda rank, text: None,
    ) -> None:
        self._spec = spec
        self._run = run
        self._teller = teller
        self._on_agent_lost = on_agent_lost
        self._keep_stacks = keep_stacks
        self._can_replace = can_replace
        self._losses = Losses(spec, run)
        self._seats: dict[int, _Seat] = {}
        self._world = max(1, spec.workers)
        self._generation = 0
        self._update, self._committed = 0, -1
        self._settling_s: float | None = None
        self._slow: set[int] = set()
        self._waiting_s: dict[int, float] = {}  # since when a rank has waited too long for others
        self._lost_ranks: dict[int, Cause] = {}  # since the group came together
        self._is_fresh = True  # it began from a checkpoint
        self._draining = False
        self._result: dict[str, Any] | None = None
        self._error: TreadleError | None = None
        self._over = threading.Event()
        self._server = socket.create_server((host, 0))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self.host, self.port = host, int(self._server.getsockname()[1])
        self.token = secrets.token_hex(32)

    # For the driver

    def run(self, agents_alive: Callable[[], bool] = lambda: True) -> None:
        """Lead until the run is finished, or is given up; `outcome` tells.

        Args:
            agents_alive: whether an agent that has not said anything yet may still do so.
        """
        try:
            while not self._over.is_set():
                self._look()
                if not self._seats and not agents_alive():
                    raise TransientError("agent: ended before it began", hint=f"treadle logs {self._run}")
        except TreadleError as error:
            self._give_up(error)
        except Exception as error:  # nobody else would tell the agents
            traceback.print_exc()
            self._give_up(InternalError(f"controller: {type(error).__name__}: {error}", hint="treadle logs"))
        finally:
            self._end()

    def outcome(self) -> dict[str, Any]:
        """Rank 0's summary.

        Raises:
            TreadleError: what ended the run.
        """
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def give_up(self, error: TreadleError) -> None:
        """End from another thread."""
        self._give_up(error)

    def drain(self) -> None:
        """Losses from now on are those of a machine that goes away."""
        self._draining = True

    @property
    def beat(self) -> dict[str, Any]:
        """What the heartbeat of the run says."""
        seats = dict(self._seats)
        return {
            "update": self._update,
            "committed": self._committed,
            "generation": self._generation,
            "ranks": [
                {"rank": rank, "pid": seat.pid, "node": seat.node, "state": seat.state, "phase": seat.phase}
                for rank, seat in sorted(seats.items())
            ],
            "slow": sorted(self._slow),
        }

    # Listening

    def _look(self) -> None:
        for key, _ in self._selector.select(LOOK_S):
            if key.fileobj is self._server:
                self._let_in()
            else:
                self._read(key.fileobj)  # type: ignore[arg-type]
        self._settle()
        self._finish()

    def _let_in(self) -> None:
        with contextlib.suppress(OSError):  # who called is gone, or this process has no file left to give
            link = Lines(self._server.accept()[0], most_bytes=STRANGER_BYTES)
            self._selector.register(link, selectors.EVENT_READ)

    def _read(self, link: Lines) -> None:
        messages = link.receive()
        for message in messages:
            rank = self._rank_of(link)
            if rank is not None:
                self._hear(rank, self._seats[rank], message)
            elif not self._greet(link, message):
                break
        if not link.is_open:
            self._selector.unregister(link)
            link.close()
            if (rank := self._rank_of(link)) is not None:
                self._agent_lost(rank)

    def _rank_of(self, link: Lines) -> int | None:
        return next((rank for rank, seat in self._seats.items() if seat.link is link), None)

    def _greet(self, link: Lines, message: dict[str, Any]) -> bool:
        """Whether it is one of ours."""
        said = str(message.get("token")).encode(errors="replace")
        if message["kind"] != "hello" or not hmac.compare_digest(said, self.token.encode()):
            link.is_open = False
            return False
        link.trust()
        rank, world = int(message["rank"]), int(message["world"])
        if world != self._world or rank in self._seats:  # who starts agents has put the ranks together anew
            self._send_away()
            self._world = world
        self._seats[rank] = _Seat(link=link, node=message["node"], door=message["door"], agent=message["pid"])
        if self._settling_s is None:
            self._settling_s = time.monotonic()
        return True

    def _send_away(self) -> None:
        """All agents: who started them starts new ones."""
        for seat in self._seats.values():
            seat.link.send("end")
        self._seats = {}

    def _hear(self, rank: int, seat: _Seat, message: dict[str, Any]) -> None:
        seat.door = message.get("door", seat.door)
        seat.update = max(seat.update, message.get("update", 0))
        self._update = max(self._update, seat.update)
        self._committed = max(self._committed, message.get("committed", -1))
        kind = message["kind"]
        if kind == "started":
            seat.pid = message["pid"]
            self._teller.tell(
                "rank_started",
                rank=rank,
                pid=seat.pid,
                agent=seat.agent,
                node=seat.node,
                generation=self._generation + (seat.state == "joining"),
            )
        elif kind == "pulse":
            self._feel(rank, seat, message)
        elif kind == "stacks":
            self._keep_stacks(rank, message["text"])
        elif kind == "holding":
            seat.state, seat.waiting_s = "holding", None
            self._part()
        elif kind == "done":
            seat.state, seat.summary = "done", message["summary"]
        elif kind == "exited":
            self._exited(rank, seat, message)

    def _feel(self, rank: int, seat: _Seat, message: dict[str, Any]) -> None:
        now = time.monotonic()
        seat.phase = message["phase"]
        seat.waiting_s = (seat.waiting_s or now) if message["waiting"] else None
        if message["busy_s"] is not None:
            seat.busy_s.append(message["busy_s"])
            self._look_for_slow()
        why = message["stale"]
        if not why or seat.state not in ("running", "joining"):
            self._waiting_s.pop(rank, None)
        elif not message["waiting"]:
            seat.link.send("hung", why=why)
        elif self._settling_s is not None:
            self._waiting_s.pop(rank, None)
        elif not all(other.state != "running" or other.phase == "training" for other in self._seats.values()):
            return
        # Whom it waits for must say itself that it hangs; where nobody does, the meeting hangs.
        elif now - self._waiting_s.setdefault(rank, now) > SETTLE_S:
            seat.link.send("hung", why=f"{why}, waiting for other ranks")

    def _look_for_slow(self) -> None:
        seats = [self._seats.get(rank) for rank in range(self._world)]
        if any(seat is None or len(seat.busy_s) < WINDOW for seat in seats):
            return
        means = [sum(seat.busy_s) / len(seat.busy_s) for seat in seats if seat is not None]
        found = set(slow_ranks(means))
        for rank in found - self._slow:
            self._teller.tell("slow_rank", rank=rank, busy_ms=[round(1000 * mean, 3) for mean in means])
        self._slow = found

    # Losing and coming together

    def _exited(self, rank: int, seat: _Seat, message: dict[str, Any]) -> None:
        was, seat.pid = seat.state, 0
        if was == "done":
            return
        seat.state = "waiting"
        if seat.is_expected or was == "holding" or message["collateral"]:
            seat.is_expected = False
            self._part()
            return
        cause = Cause(message["cause"])
        if self._draining and cause is Cause.killed:
            cause = Cause.preempted
        self._lost(
            Loss(rank=rank, cause=cause, update=message["update"], words=message["words"], error=message["error"])
        )

    def _agent_lost(self, rank: int) -> None:
        seat = self._seats[rank]
        if self._is_done and self._settling_s is None:
            self._settling_s = time.monotonic()
        if self._over.is_set() or self._is_done or seat.state == "done":
            return
        self._send_away()
        self._lost(
            Loss(
                rank=rank,
                cause=Cause.preempted if self._draining else Cause.node,
                update=seat.update,
                words=f"its agent on {seat.node} is gone",
            )
        )
        if not self._over.is_set():
            self._on_agent_lost(rank)

    def _lost(self, loss: Loss) -> None:
        # What ends several ranks at once, or a rank and then its agent, is one loss; the end of a rank that had just
        # taken the place of another is one more.
        before = self._lost_ranks.get(loss.rank)
        is_its_agent = loss.cause is Cause.node and before is not Cause.node
        is_new = not self._lost_ranks or (before is not None and not is_its_agent)
        self._lost_ranks = {**({} if is_new else self._lost_ranks), loss.rank: loss.cause}
        error = None if self._is_done else self._losses.judge(loss, self._committed, is_new=is_new)
        self._teller.tell(
            "rank_failed",
            rank=loss.rank,
            cause=loss.cause.value,
            update=loss.update,
            committed=self._committed,
            message=loss.error["message"] if loss.error else loss.words,
            goes_on=error is None,
        )
        if error is not None:
            self._give_up(error)
            return
        self._part()

    def _part(self) -> None:
        """The group is broken: from now on its ranks come home."""
        if self._settling_s is None:
            self._settling_s = time.monotonic()
        if any(seat.state == "done" for seat in self._seats.values()):
            return  # others may end, too: they meet no more
        if not self._can_replace:
            self._stop("running", "joining", "holding")
        elif self._is_fresh:  # one that has not begun yet holds nothing
            self._stop("running", phase="starting")

    def _stop(self, *states: str, phase: str | None = None) -> None:
        for seat in self._seats.values():
            if seat.state in states and phase in (None, seat.phase):
                self._stop_one(seat)

    def _stop_one(self, seat: _Seat) -> None:
        if not seat.is_expected:
            seat.is_expected = True
            seat.link.send("kill")

    def _settle(self) -> None:
        """Put the ranks together as soon as each of them holds its state, or all are gone."""
        if self._settling_s is None or len(self._seats) < self._world or self._over.is_set() or self._is_done:
            return
        seats, now = list(self._seats.values()), time.monotonic()
        for seat in seats:
            if seat.state == "running" and seat.waiting_s and now - max(seat.waiting_s, self._settling_s) > SETTLE_S:
                self._stop_one(seat)  # it waits for who will not come, and cannot be told
        states = {seat.state for seat in seats}
        if "done" in states:
            if "running" not in states:
                self._call_back(seats)
        elif self._can_replace and {"holding", "waiting"} <= states:
            for seat in seats:
                if seat.state == "waiting":
                    self._start(seat, "joining", is_fresh=False)
        elif len(states) == 1 and states < {"holding", "waiting"}:
            self._form(is_fresh="waiting" in states)

    def _call_back(self, seats: list[_Seat]) -> None:
        """What is left to do wants all ranks: those that are done, too, go on from the last checkpoint."""
        if gone := [rank for rank, seat in self._seats.items() if not seat.link.is_open]:
            self._seats[gone[0]].state = "waiting"
            self._agent_lost(gone[0])
            return
        self._stop("joining", "holding", "done")
        if all(seat.state == "waiting" or (seat.state == "done" and not seat.pid) for seat in seats):
            for seat in seats:
                seat.state = "waiting"

    def _form(self, *, is_fresh: bool) -> None:
        if self._generation and not self._lost_ranks:  # they did not find together, for whatever reason: that ends, too
            error = TransientError("the ranks did not meet").to_json()
            self._lost(Loss(rank=0, cause=Cause.exited, update=self._update, error=error))
            if self._over.is_set():
                return
        self._generation += 1
        self._settling_s, self._is_fresh = None, is_fresh
        self._lost_ranks.clear()
        self._waiting_s.clear()
        self._slow.clear()
        if self._generation > 1:
            self._teller.tell("regrouped", generation=self._generation, world=self._world, is_fresh=is_fresh)
        for seat in self._seats.values():
            if is_fresh:
                self._start(seat, "running", is_fresh=True)
            else:
                seat.state, seat.is_expected = "running", False
                seat.busy_s.clear()
                seat.link.send("form", **self._place)

    @property
    def _place(self) -> dict[str, Any]:
        """Where ranks meet."""
        return {"world": self._world, "host": self._seats[0].node, "port": self._seats[0].door}

    def _start(self, seat: _Seat, state: str, *, is_fresh: bool) -> None:
        """Start a rank, with all others or to take the place of a lost one."""
        seat.state, seat.summary, seat.phase = state, None, "starting"
        seat.is_expected, seat.waiting_s = False, None
        seat.busy_s.clear()
        seat.link.send("start", fresh=is_fresh, **self._place)

    # The end

    @property
    def _is_done(self) -> bool:
        """Rank 0 has registered the model: nothing is left that any rank could be missed for."""
        return 0 in self._seats and self._seats[0].state == "done"

    def _finish(self) -> None:
        is_broken = self._settling_s is not None
        if self._is_done and (is_broken or all(seat.state == "done" for seat in self._seats.values())):
            self._result = self._seats[0].summary
            self._over.set()

    def _give_up(self, error: TreadleError) -> None:
        if self._error is None and self._result is None:
            self._error = error
        self._over.set()

    def _end(self) -> None:
        """Tell all agents to end, and wait until they have, for a while."""
        for seat in self._seats.values():
            seat.link.send("end")
        awaited = {seat.link for seat in self._seats.values() if seat.link.is_open}
        deadline = time.monotonic() + END_S
        while awaited and time.monotonic() < deadline:
            for key, _ in self._selector.select(LOOK_S):
                if key.fileobj is self._server:
                    with contextlib.suppress(OSError):
                        self._server.accept()[0].close()
                elif isinstance(key.fileobj, Lines):
                    key.fileobj.receive()
                    if not key.fileobj.is_open:
                        self._selector.unregister(key.fileobj)
                        key.fileobj.close()
                        awaited.discard(key.fileobj)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
