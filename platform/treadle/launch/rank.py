"""One rank's process, from its first meeting with the others to its last word; started by launch/agent.py."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from datetime import timedelta
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # torch has no public way

from treadle.errors import InternalError, TransientError, TreadleError
from treadle.launch.agent import Orders
from treadle.launch.lines import Lines
from treadle.launch.pulse import Pulse
from treadle.launch.records import Assignment
from treadle.launch.worker import Peers, train_rank
from treadle.train.split import out_of_memory
from treadle.train.world import PeerLost, World

__all__ = ["run_rank"]

BEGIN_S = 120.0
"""Longest wait for ranks that are started together."""
JOIN_S = 12.0
"""The same for ranks that hold their state: all of them are there. Shorter than the controller's SETTLE_S."""
COLLECTIVE_S = 1800.0
"""Longest wait in a collective; the agents find a rank that hangs long before."""


class _Group(Peers):
    """The other ranks, as the controller puts them together: each `form` is a new process group."""

    def __init__(self, orders: Orders, form: dict[str, Any], link: Lines, pulse: Pulse) -> None:
        super().__init__(rank=orders.rank, pulse=pulse, is_fresh=bool(form["fresh"]))
        self._orders = orders
        self._link = link
        self._form = form
        self._pulse = pulse
        self.device = torch.device("cuda", torch.cuda.current_device()) if orders.use_gpu else torch.device("cpu")

    def meet(self) -> None:
        """Join the process group of the newest form."""
        form = self._form
        if form["world"] == 1:
            return
        if form["host"] == "127.0.0.1":  # else gloo asks what the machine's own name leads to
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._pulse.meet("waiting")
        try:
            dist.init_process_group(
                "nccl" if self._orders.use_gpu else "gloo",
                init_method=f"tcp://{form['host']}:{form['port']}",
                rank=self.rank,
                world_size=form["world"],
                timeout=timedelta(seconds=BEGIN_S if self.is_fresh else JOIN_S),
            )
            _set_pg_timeout(timedelta(seconds=COLLECTIVE_S))
        except (RuntimeError, ValueError) as error:  # one of them died on the way, or the port was taken
            raise PeerLost(f"rank {self.rank}: the ranks did not meet: {_first_line(error)}") from error
        finally:
            self._pulse.meet("computing")

    def part(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def meet_again(self, update: int) -> None:
        self.part()
        self.is_fresh = False
        self._link.send("holding", update=update)
        while True:
            messages = self._link.receive()
            if not self._link.is_open:
                raise SystemExit(70)
            if messages:
                self._form = messages[-1]
                self.meet()
                return

    @property
    def size(self) -> int:
        return int(self._form["world"])


def run_rank(orders: Orders, form: dict[str, Any], link: Lines, pulse: Pulse, stacks: BinaryIO) -> int:
    """Train; returns the exit code of the process. What it ended with goes over `link`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    group = _Group(orders, form, link, pulse)
    try:
        if group.is_fresh:
            group.meet()
        world = World.joined(group.device) if group.is_fresh and group.size > 1 else World(device=group.device)
        world.on_phase = pulse.meet
        link.send("done", summary=train_rank(Assignment(**orders.assignment), world, peers=group))
    except BaseException as error:
        if not isinstance(error, TreadleError):
            traceback.print_exc()
        elif not isinstance(error, PeerLost):
            print(error, file=sys.stderr, flush=True)
        told, is_memory = _told(error, orders.rank), bool(out_of_memory(error))
        link.send("failed", error=told.to_json(), collateral=isinstance(error, PeerLost), memory=is_memory)
        return told.exit_code
    group.part()
    return 0


def _told(error: BaseException, rank: int) -> TreadleError:
    """What others hear of an error."""
    if isinstance(error, TreadleError):
        return error
    if why := out_of_memory(error):
        return TransientError(f"rank {rank}: out of memory: {why}")
    words = f"rank {rank}: {type(error).__name__}: {_first_line(error)}"
    return InternalError(words, hint="treadle logs, for the whole trace")


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
