"""Gradients of all ranks added up, most of it while the backward pass still runs.

Gradients are added in buckets, the same in every process and at every update, last layers first, because these are
known first. A bucket leaves as soon as the backward pass has filled it. DistributedDataParallel does the like but sorts
its buckets anew after the first backward pass of a process: from three ranks on, a run that is resumed then adds in
another order than the one it goes on from, and ends in other bits (tests/unit/train/test_ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treadle.errors import InfeasibleError
from treadle.nn import Network
from treadle.train.compiling import few_frames
from treadle.train.sharding import is_sharded
from treadle.train.world import PeerLost, World

__all__ = ["GradientSum", "plan_buckets", "summing"]

BUCKET_BYTES = 4 << 20
"""Of a bucket that leaves while the backward pass runs, but for a parameter that alone has more."""
END_BYTES = 1 << 20
"""Of the first one, so that the ranks begin soon, and of the last, whose way no computation is left to hide."""


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients travel together; `missing` are those the backward pass still owes."""

    parameters: list[nn.Parameter]
    missing: int = 0
    flat: Tensor | None = None
    work: dist.Work | None = None
    flags: list[float] = field(default_factory=list)

    def leave(self, world: World) -> None:
        """Begin to add up; a rank without a gradient adds zeros."""
        flags = [torch.tensor(self.flags, dtype=self.parameters[0].dtype).to(self.parameters[0].device)]
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self.parameters]
        # Fresh memory at each update: what an update that failed still writes to belongs to nobody then.
        self.flat = torch.cat(parts + flags if self.flags else parts)
        self.drop_gradients()
        with world.meeting:
            self.work = dist.all_reduce(self.flat, async_op=True)

    def arrive(self, world: World) -> None:
        """Wait until the sum is there (on CUDA: make what follows wait); the gradients are views of it then."""
        assert self.work is not None
        assert self.flat is not None
        with world.meeting:
            self.work.wait()
        start = 0
        for p in self.parameters:
            p.grad = self.flat[start : start + p.numel()].view_as(p)
            start += p.numel()

    def drop_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None

    def forget(self) -> None:
        self.flat = self.work = None
        self.flags = []


class GradientSum:
    """Adds the gradients of a network up over the ranks of a world. Made by `summing`.

    Args:
        network: whose parameters' `grad` are summed in place. All ranks have it alike.
    """

    def __init__(self, world: World, network: nn.Module) -> None:
        self._world = world
        self._buckets = [Bucket(parameters=part) for part in plan_buckets(network)]
        self._left = 0  # buckets on their way
        self._expecting = False
        # The last bucket has no hooks: it is filled when the backward pass ends, and carries what is only known then.
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._noting(bucket))
            for bucket in self._buckets[:-1]
            for p in bucket.parameters
        ]

    def expect(self) -> None:
        """The next backward pass is this rank's last before `finish`: what it completes may leave at once."""
        if self._world.size > 1:
            self._expecting = True
            for bucket in self._buckets:
                bucket.missing = len(bucket.parameters)

    def finish(self, flags: Sequence[float]) -> list[float]:
        """Return when all gradients are summed; gives the sums of the flags, which travel with them.

        Args:
            flags: small whole numbers, which any format of gradients holds exactly.

        Raises:
            PeerLost: here, or from the backward pass. No gradient is left then.
        """
        if self._world.size == 1:
            return list(flags)
        self._expecting = False
        last = self._buckets[-1]
        last.flags = list(flags)
        try:
            self._send(len(self._buckets))
            for bucket in self._buckets:
                bucket.arrive(self._world)
        except PeerLost:
            self.drop()
            raise
        assert last.flat is not None
        sums = last.flat[-len(flags) :].tolist() if flags else []
        self._forget()
        return sums

    def again(self) -> None:
        """Before this rank's share of an update is computed once more. What has left was complete, and stays so."""
        self._expecting = False
        for bucket in self._buckets:
            bucket.drop_gradients()

    def idle(self, passes: int) -> None:
        """This rank has so many microbatches less than another: nothing follows from that here."""

    def drop(self) -> None:
        """Forget an update that cannot be finished: gradients, and whatever is on its way."""
        for bucket in self._buckets:
            bucket.drop_gradients()
        self._forget()

    def close(self) -> None:
        """Leave the network as it was."""
        for hook in self._hooks:
            hook.remove()

    def _forget(self) -> None:
        self._left, self._expecting = 0, False
        for bucket in self._buckets:
            bucket.forget()

    def _noting(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def note(_: Tensor) -> None:
            if self._expecting:
                bucket.missing -= 1
                if not bucket.missing:
                    self._send_filled()

        return note

    def _send_filled(self) -> None:
        """In their order, which all ranks share: a bucket that is filled early waits for those before it."""
        filled = self._left
        while filled < len(self._buckets) - 1 and not self._buckets[filled].missing:
            filled += 1
        try:
            self._send(filled)
        except PeerLost:
            self.drop()
            raise

    def _send(self, until: int) -> None:
        while self._left < until:
            self._buckets[self._left].leave(self._world)
            self._left += 1


class ShardedSum(GradientSum):
    """The same of a network whose parts add their gradients up themselves, in every backward pass."""

    def __init__(self, world: World, network: nn.Module) -> None:
        assert isinstance(network, Network)
        self._world = world
        self._network = network

    def expect(self) -> None: ...

    def idle(self, passes: int) -> None:
        """Run so many empty passes beside the ranks that have microbatches left."""
        for _ in range(passes):
            (0.0 * self._network(*few_frames(self._network, (1,))).sum()).backward()

    def finish(self, flags: Sequence[float]) -> list[float]:
        return self._world.sum(flags)

    def again(self) -> None:
        raise InfeasibleError(
            f"memory: a microbatch does not fit on {self._world.device}, and ranks that hold the network together "
            "cannot do it again in parts",
            hint="a smaller batch.max_slots",
        )

    def drop(self) -> None:
        self._network.zero_grad(set_to_none=True)

    def close(self) -> None: ...


@contextmanager
def summing(world: World, network: nn.Module) -> Iterator[GradientSum]:
    """Adds gradients up as long as the block runs; nothing of it stays on the network, nor of an update cut short."""
    total = ShardedSum(world, network) if is_sharded(network) else GradientSum(world, network)
    try:
        yield total
    except BaseException:
        total.drop()
        raise
    finally:
        total.close()


def plan_buckets(network: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters that want gradients, in the order in which a backward pass gives them, cut into buckets.

    Depends on the network's shape alone, so that all ranks, and all processes that go on with a run, agree.
    """
    order = backward_order(network)
    tail: list[nn.Parameter] = []
    while order and (not tail or _fits(order[-1], tail, END_BYTES)):
        tail.insert(0, order.pop())
    buckets: list[list[nn.Parameter]] = []
    for p in order:
        if not buckets or not _fits(p, buckets[-1], BUCKET_BYTES if len(buckets) > 1 else END_BYTES):
            buckets.append([])
        buckets[-1].append(p)
    return [*buckets, tail] if tail else []


def _fits(p: nn.Parameter, bucket: list[nn.Parameter], limit: int) -> bool:
    alike = (bucket[0].dtype, bucket[0].device) == (p.dtype, p.device)
    return alike and sum(part.numel() * part.element_size() for part in (*bucket, p)) <= limit


def backward_order(network: nn.Module) -> list[nn.Parameter]:
    """Last modules first; what belongs to no module that runs on its own, such as first states, comes at the end."""
    parts = getattr(network, "parts", ())
    found = dict.fromkeys(p for part in reversed(parts) for p in reversed(list(part.parameters())))
    rest = reversed([p for p in network.parameters() if p not in found])
    return [p for p in (*found, *rest) if p.requires_grad]
