"""What an attempt needs to lead its ranks, whatever starts them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from treadle.errors import TreadleError
from treadle.launch.controller import Controller
from treadle.launch.records import Assignment, read_job
from treadle.launch.tracking import Events
from treadle.spec import ClusterSpec, JobSpec, Parallel, Recovery
from treadle.store import Blobs, Runs

__all__ = ["Lead"]


@dataclass(kw_only=True)
class Lead:
    """One attempt as its driver sees it.

    Args:
        now: its controller, once there is one.
    """

    assignment: Assignment
    blobs: Blobs
    events: Events
    now: Controller | None = field(default=None)
    _stacks: Iterator[int] = field(default_factory=lambda: itertools.count(1), init=False, repr=False)

    @cached_property
    def spec(self) -> JobSpec:
        """As submitted."""
        return read_job(Runs(self.blobs), self.assignment.run)[0]

    @property
    def cluster(self) -> ClusterSpec:
        return self.spec.cluster

    @property
    def can_replace(self) -> bool:
        """Whether ranks that lost another hold all that is needed to go on."""
        is_whole = self.cluster.parallel is Parallel.data and not self.spec.batch.streams
        # On CUDA a collective that lost a rank cannot be left without ending the process.
        return self.cluster.recovery is Recovery.replace and is_whole and not self.cluster.gpus_per_worker

    def controller(self, host: str, *, on_agent_lost: Callable[[int], object] = lambda rank: None) -> Controller:
        """The controller, listening on `host`."""
        self.now = Controller(
            self.cluster,
            self.assignment.run,
            can_replace=self.can_replace,
            host=host,
            teller=self.events,
            on_agent_lost=on_agent_lost,
            keep_stacks=self._keep_stacks,
        )
        return self.now

    def orders(self, controller: Controller) -> dict[str, Any]:
        """What every agent is told alike."""
        return {
            "host": controller.host,
            "port": controller.port,
            "token": controller.token,
            "assignment": asdict(self.assignment),
            "hang_after_s": self.cluster.hang_after_s,
            "use_gpu": bool(self.cluster.gpus_per_worker),
        }

    @property
    def beat(self) -> dict[str, Any]:
        """What the heartbeat says of the ranks."""
        return self.now.beat if self.now is not None else {}

    def _keep_stacks(self, rank: int, text: str) -> None:
        attempt, number = self.assignment.attempt, next(self._stacks)
        key = f"runs/{self.assignment.run}/stacks/a{attempt}-{number:03d}-rank{rank}.txt"
        try:
            self.blobs.put(key, text.encode())
        except TreadleError as error:  # a store that is away must not keep a rank from being replaced
            print(f"stacks of rank {rank}: not kept ({error.message})\n{text}", file=sys.stderr)
        else:
            self.events.tell("stacks", rank=rank, key=key)
