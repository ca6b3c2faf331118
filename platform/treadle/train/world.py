"""The ranks of a run as one value: who am I, and what do we hold together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["World"]


@dataclass(frozen=True, kw_only=True)
class World:
    """One rank's view of all ranks. A world of one needs no process group.

    Args:
        rank: 0 to size - 1. size: ranks. device: where this rank computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def joined(cls, device: torch.device) -> World:
        """The world of the process group that this process has joined."""
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added over all ranks, in float64; one small all-reduce."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, value: Tensor) -> Tensor:
        """`value` added over all ranks, in place where there are several."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, digest: str) -> bool:
        """Whether all ranks hold the same hex digest."""
        if self.size == 1:
            return True
        number = int(digest[:12], 16)  # 48 bits, exact in float64
        extremes = torch.tensor([number, -number], dtype=torch.float64, device=self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])

    def share_weights(self, network: nn.Module) -> None:
        """Give every rank rank 0's weights."""
        if self.size > 1:
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, src=0)

    def sum_gradients(self, network: nn.Module, flags: Sequence[float]) -> list[float]:
        """Add the gradients of all ranks up, in place, and `flags` with them; returns the flags' sums.

        One all-reduce of one buffer in the order of the parameters, the same at every update; a rank
        that had no rows adds zeros. DistributedDataParallel sorts its buckets anew after its first
        backward pass: from three ranks on, a resumed run would then add in another order than the run
        it goes on from, and give other bits (tests/unit/train/test_ranks.py). Its overlap with the
        backward pass is given up for that.

        Args:
            flags: small whole numbers, which any format of gradients holds exactly.
        """
        if self.size == 1:
            return list(flags)
        parameters = [p for p in network.parameters() if p.requires_grad]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(part.reshape(-1) for part in parts), parts[0].new_tensor(flags)])
        dist.all_reduce(flat)
        *sums, flag_sums = flat.split([*(p.numel() for p in parameters), len(flags)])
        for p, part in zip(parameters, sums, strict=True):
            p.grad = part.view_as(p)
        return flag_sums.tolist()

    @contextlib.contextmanager
    def first(self) -> Iterator[bool]:
        """True on rank 0; the other ranks go on once rank 0 has left the block."""
        yield self.rank == 0
        if self.size > 1:
            dist.barrier()
