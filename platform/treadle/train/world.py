"""The ranks of a run as one value: who am I, add up, and when gradients travel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
        high, low = torch.tensor([number], dtype=torch.float64), torch.tensor([number], dtype=torch.float64)
        high, low = high.to(self.device), low.to(self.device)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        return bool(high == low)

    def wrap(self, network: nn.Module) -> nn.Module:
        """`network` with gradients averaged over the ranks, starting from rank 0's weights."""
        if self.size == 1:
            return network
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices)

    def gradient_sync(self, model: nn.Module, *, when: bool) -> AbstractContextManager[None]:
        """A context in which backward averages gradients over the ranks, if `when`."""
        if isinstance(model, DistributedDataParallel) and not when:
            return model.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def first(self) -> Iterator[bool]:
        """True on rank 0; the other ranks go on once rank 0 has left the block."""
        yield self.rank == 0
        if self.size > 1:
            dist.barrier()
