"""Beside each rank: starts its process, watches it, and starts it again: `python -m treadle.launch.agent`.

The rank is a fork of this process, in which torch is imported already: it is there in a tenth of a second instead of
several. An agent has one thread and no CUDA, so that forking is safe at any time. What it sees goes to the attempt's
controller (launch/controller.py), which decides; where the controller or the parent is gone, the rank is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from treadle.launch.lines import Lines
from treadle.launch.pulse import Beat, Phase, Pulse
from treadle.launch.supervise import Cause

__all__ = ["Orders", "main", "start_agent"]

POLL_S = 0.1
TELL_S = 0.5
MEDIANS = 5.0
"""Median updates without progress after which a rank counts as hung, if that is more than `hang_after_s`."""
LEARNED = 5
"""Updates to see before their median says anything: the first are slow."""
WINDOW = 64
"""Newest updates that medians are of."""
PATIENCE_S = {Phase.starting: 900.0, Phase.reading: 900.0, Phase.evaluating: 900.0, Phase.ending: 900.0}
WARM_UP_S = 300.0
STACKS_S, STACKS_BYTES = 3.0, 200_000
_STOPPED = "stopped by a signal"
_PR_SET_PDEATHSIG = 1
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Without these numpy and pyarrow start threads when they are imported."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What an agent is started with, as JSON on its standard input.

    Args:
        host, port, token: where the controller listens, and what it wants to hear.
        rank, world: place among the ranks. node: address of this machine for other ranks.
        assignment: of launch/worker.py. hang_after_s: least patience. use_gpu: the rank computes on CUDA.
    """

    host: str
    port: int
    token: str
    rank: int
    world: int
    node: str
    assignment: dict[str, Any]
    hang_after_s: float
    use_gpu: bool = False

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass
class _Child:
    """A rank's process."""

    pid: int
    handle: int
    link: Lines
    pulse: Pulse
    stacks: BinaryIO
    """Where it writes the stacks of its threads when asked to; without a name, so that nothing is left of it."""
    failure: dict[str, Any] | None = None
    is_collateral: bool = False
    """It failed because another rank did."""
    is_memory: bool = False
    """It failed for want of memory."""
    is_done: bool = False
    is_holding: bool = False
    """It waits for the controller, not for itself."""
    formed_s: float = 0.0
    hung: str = ""


class Agent:
    """One rank's keeper."""

    def __init__(self, orders: Orders, lead: Lines) -> None:
        self._orders = orders
        self._lead = lead
        self._child: _Child | None = None
        self._is_ended = False
        self._told_s = 0.0
        self._durations: deque[float] = deque(maxlen=WINDOW)
        self._seen: tuple[int, float, float] | None = None
        self._busy_s: deque[float] = deque(maxlen=WINDOW)

    def run(self) -> int:
        """Until the controller says so, or is gone."""
        orders = self._orders
        # Before what takes seconds: an agent that dies on the way is one that the controller knows of.
        self._lead.send(
            "hello",
            token=orders.token,
            rank=orders.rank,
            world=orders.world,
            node=orders.node,
            pid=os.getpid(),
            door=_free_port(orders.node),
        )
        from treadle.launch.warm import num_threads, warm_up  # torch, which takes seconds

        warm_up()
        if (found := num_threads()) > 1:
            print(f"agent: got {found} threads, expected 1: a fork may inherit a lock", file=sys.stderr)
        try:
            while not self._is_ended:
                self._listen()
                self._watch()
        finally:
            if self._child is not None:
                self._kill()
                self._reap()
        return 0

    def _listen(self) -> None:
        child = self._child
        places: list[Any] = [self._lead, sys.stdin.fileno()]
        if child is not None:
            places += [child.handle, *([child.link] if child.link.is_open else [])]
        ready, _, _ = select.select(places, [], [], POLL_S)
        if self._lead in ready:
            for message in self._lead.receive():
                self._obey(message)
        if not self._lead.is_open or (sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 1)):
            self._is_ended = True  # nobody is left to work for
        if child is not None and child.link in ready:
            self._hear(child)
        if child is not None and child.handle in ready:
            self._reap()

    def _obey(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "end":
            self._is_ended = True
        elif kind == "kill":
            self._kill()
        elif kind == "hung" and self._child is not None:
            self._end_hung(self._child, str(message.get("why", "")))
        elif kind == "start" and self._child is None:
            self._start({name: value for name, value in message.items() if name != "kind"})
        elif kind == "form" and self._child is not None:  # else it has just ended, of which the controller will hear
            self._child.is_holding, self._child.formed_s = False, time.monotonic()
            self._child.link.send(**message)

    def _start(self, form: dict[str, Any]) -> None:
        ours, theirs = Lines.pair()
        pulse, stacks = Pulse(), tempfile.TemporaryFile()  # noqa: SIM115  closed when the rank is reaped
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        agent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                _die_with(agent)
                ours.close()
                self._lead.close()
                from treadle.launch.rank import run_rank

                code = run_rank(self._orders, form, theirs, pulse, stacks)
            except BaseException:  # this process ends below, whatever it was
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        theirs.close()
        self._durations.clear()
        self._busy_s.clear()
        self._seen = None
        self._child = _Child(pid=pid, handle=os.pidfd_open(pid), link=ours, pulse=pulse, stacks=stacks)
        orders = self._orders
        print(f"rank {orders.rank} of {orders.world}: process {pid} on {orders.node}", flush=True)
        self._lead.send("started", pid=pid, door=_free_port(orders.node))

    def _hear(self, child: _Child) -> None:
        for message in child.link.receive():
            kind = message.pop("kind")
            if kind == "failed":
                child.failure = message["error"]
                child.is_collateral, child.is_memory = message["collateral"], message["memory"]
            elif kind == "done":
                child.is_done = True
                self._lead.send("done", **message)
            else:
                child.is_holding = kind == "holding"
                self._lead.send(kind, door=_free_port(self._orders.node), **message)

    def _watch(self) -> None:
        """Look at the rank's pulse; say what it shows."""
        child, now = self._child, time.monotonic()
        if child is None:
            return
        beat = child.pulse.read()
        self._learn(beat)
        why = "" if child.is_done or child.is_holding else self._stale(child, beat, now)
        if now - self._told_s < TELL_S and not why:
            return
        self._told_s = now
        self._lead.send(
            "pulse",
            update=beat.update,
            phase=beat.phase.name,
            waiting=beat.is_waiting and not why.startswith(_STOPPED),
            committed=beat.committed,
            busy_s=median(self._busy_s) if len(self._busy_s) >= LEARNED else None,
            stale=why,
        )

    def _learn(self, beat: Beat) -> None:
        if self._seen is None or beat.phase not in (Phase.training, Phase.reading):
            self._seen = (beat.update, beat.changed_s, beat.waited_s)
            return
        update, changed_s, waited_s = self._seen
        if beat.update > update:
            count, took_s = beat.update - update, beat.changed_s - changed_s
            # Many updates are made between two looks, and each of them counts.
            self._durations.extend([took_s / count] * min(count, WINDOW))
            self._busy_s.extend([max(0.0, took_s - (beat.waited_s - waited_s)) / count] * min(count, WINDOW))
            self._seen = (beat.update, beat.changed_s, beat.waited_s)

    def _stale(self, child: _Child, beat: Beat, now_s: float) -> str:
        """Why the rank counts as hung, or ""."""
        quiet_s = now_s - max(beat.changed_s, child.formed_s)
        if quiet_s <= self._orders.hang_after_s:
            return ""
        if _state(child.pid) == "T":
            return f"{_STOPPED} for {quiet_s:.1f} s"
        if beat.phase is not Phase.training:
            limit_s = PATIENCE_S[beat.phase]
        elif len(self._durations) < LEARNED:
            limit_s = max(WARM_UP_S, self._orders.hang_after_s)
        else:
            limit_s = max(self._orders.hang_after_s, MEDIANS * median(self._durations))
        return f"no progress for {quiet_s:.1f} s while {beat.phase.name}" if quiet_s > limit_s else ""

    def _end_hung(self, child: _Child, why: str) -> None:
        """Keep the stacks of a rank that hangs, and end it."""
        if child.hung:
            return
        text = ""
        if _state(child.pid) != "T":  # one that is stopped cannot write
            os.kill(child.pid, signal.SIGUSR1)
            text = _written(child.stacks)
        self._lead.send("stacks", text=text or f"none: the process is in state {_state(child.pid)}")
        child.hung = why or "no progress"
        self._kill()

    def _kill(self) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._child.handle, signal.SIGKILL)

    def _reap(self) -> None:
        child, self._child = self._child, None
        assert child is not None
        _, status = os.waitpid(child.pid, 0)
        while child.link.is_open and select.select([child.link], [], [], 0)[0]:
            self._hear(child)  # its last words
        os.close(child.handle)
        child.link.close()
        child.stacks.close()
        beat = child.pulse.read()
        self._lead.send(
            "exited",
            update=beat.update,
            committed=beat.committed,
            done=child.is_done,
            error=child.failure,
            collateral=child.is_collateral,
            cause=_cause(child, status).value,
            words=child.hung or _words(status),
            door=_free_port(self._orders.node),
        )


def _cause(child: _Child, status: int) -> Cause:
    if child.hung:
        return Cause.hung
    if child.is_memory:
        return Cause.memory
    return Cause.killed if os.WIFSIGNALED(status) else Cause.exited


def _words(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def _written(file: BinaryIO) -> str:
    """What another process writes into a file, as soon as no more comes."""
    deadline, data = time.monotonic() + STACKS_S, b""
    while time.monotonic() < deadline:
        time.sleep(0.1)
        before, data = data, os.pread(file.fileno(), STACKS_BYTES, 0)  # its place in the file is the writer's, too
        if data and data == before:
            break
    return data.decode(errors="replace")


def _state(pid: int) -> str:
    """The letter of /proc: R running, S sleeping, T stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def _free_port(node: str) -> int:
    """A port that was free a moment ago, for the ranks' next meeting."""
    with socket.socket() as probe:
        probe.bind((node, 0))
        return probe.getsockname()[1]


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent dies, even while it is stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(70)


def start_agent(orders: Orders) -> subprocess.Popen[bytes]:
    """An agent as a child of this process; it ends when its standard input is closed, or this process dies."""
    command = [sys.executable, "-P", "-m", "treadle.launch.agent"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | _ONE_THREAD)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its exit code tells
        process.stdin.write(orders.to_json())
        process.stdin.flush()
    return process


def main() -> int:
    orders = Orders(**json.loads(_first_line()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the driver's business
    try:
        lead = Lines(socket.create_connection((orders.host, orders.port)))
    except ConnectionRefusedError:
        print(f"agent of rank {orders.rank}: the attempt is over", file=sys.stderr)
        return 0  # who keeps a place for this rank must not try again
    return Agent(orders, lead).run()


def _first_line() -> bytes:
    """Byte by byte: what comes after it belongs to `select`."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise SystemExit(70)
        line += byte
    return line


if __name__ == "__main__":
    sys.exit(main())
