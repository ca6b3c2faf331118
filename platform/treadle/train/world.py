"""The ranks of a run: who am I, and what do we hold together.

Every meeting of the ranks goes through a `World`, so that a lost rank shows as one error, `PeerLost`, wherever it is
noticed, and so that whoever watches this process can tell a rank that waits for others from one that hangs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treadle.errors import TransientError

__all__ = ["Meeting", "PeerLost", "World"]


class PeerLost(TransientError):  # noqa: N818 - an event, which is reacted to
    """A rank did not come to a meeting. The process group is of no more use: leave it, join another, `World.rejoin`.

    What the ranks were summing is then half summed: gradients are dropped, other tensors given to the meeting hold
    anything. Weights, moments and whatever else only an update moves are untouched.
    """

    def to_json(self) -> dict[str, object]:
        return {**super().to_json(), "error": TransientError.__name__}  # what other processes can read back


@dataclass(kw_only=True, eq=False)
class World:
    """One rank's view of all ranks. A world of one needs no process group.

    A handle: whoever holds it sees the ranks that there are now. They change between two updates only, by `rejoin`.

    Args:
        rank: 0 to size - 1. size: ranks. device: where this rank computes.
        on_phase: told "waiting" when this rank begins to wait for the others and "computing" when it goes on, in
            the thread that waits.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_phase: Callable[[str], None] | None = field(default=None, repr=False)
    meeting: Meeting = field(init=False, repr=False)
    """Context of whatever waits for other ranks."""

    def __post_init__(self) -> None:
        self.meeting = Meeting(self)

    @classmethod
    def joined(cls, device: torch.device) -> World:
        """The world of the process group that this process has joined."""
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device)

    def rejoin(self, rank: int, size: int) -> None:
        """Be a rank of another process group, which this process has joined, or of none where `size` is 1."""
        self.rank, self.size = rank, size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added over all ranks, in float64; one small all-reduce.

        Raises:
            PeerLost: here and in every other method that meets the other ranks.
        """
        if self.size == 1:
            return list(values)
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def sum_tensor(self, value: Tensor) -> Tensor:
        """`value` added over all ranks, in place where there are several."""
        if self.size > 1:
            with self.meeting:
                dist.all_reduce(value)
        return value

    def agree(self, digest: str) -> bool:
        """Whether all ranks hold the same hex digest."""
        if self.size == 1:
            return True
        number = int(digest[:12], 16)  # 48 bits, exact in float64
        extremes = torch.tensor([number, -number], dtype=torch.float64, device=self.device)
        with self.meeting:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])

    def share(self, tensors: Iterable[Tensor], *, source: int = 0) -> None:
        """Give every rank the values that rank `source` has in these tensors; all ranks name alike ones."""
        if self.size == 1:
            return
        for tensor in tensors:
            with self.meeting:
                dist.broadcast(tensor, src=source)

    def share_weights(self, network: nn.Module, *, source: int = 0) -> None:
        """Give every rank the weights of rank `source`."""
        self.share(network.state_dict().values(), source=source)

    @contextlib.contextmanager
    def first(self) -> Iterator[bool]:
        """True on rank 0; the other ranks go on once rank 0 has left the block."""
        yield self.rank == 0
        if self.size > 1:
            with self.meeting:
                dist.barrier()


class Meeting:
    """Says that its world waits while the block runs, and makes of what a process group raises there a `PeerLost`.

    Cost: 0.2 us where nobody is told. Entered again and again, so no generator.
    """

    __slots__ = ("_world",)

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        if (told := self._world.on_phase) is not None:
            told("waiting")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (told := self._world.on_phase) is not None:
            told("computing")
        # gloo and NCCL raise RuntimeError and classes below it; running out of memory is one, too, but nobody's loss.
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            world = self._world
            words = (str(error).splitlines() or [type(error).__name__])[0]
            raise PeerLost(f"rank {world.rank}: got no answer from all {world.size} ranks ({words})") from error
