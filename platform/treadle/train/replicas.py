"""Whether the ranks of a run still hold the same weights: a broken processor computes wrong values without a word.

Source: "Silent data corruption at scale" (Dixit et al. 2021). Once one rank's weights are others, they stay so: every
rank applies the same sum of gradients to what it has.
"""

from __future__ import annotations

from collections import Counter

import torch
import xxhash
from torch import Tensor, nn

from treadle.errors import IntegrityError
from treadle.train.world import World

__all__ = ["check_replicas", "weights_hash"]

_CHUNK = 1 << 22


def check_replicas(world: World, network: nn.Module, *, update: int, last_update: int) -> None:
    """Nothing, where all ranks hold the same weights, bit by bit. All ranks call it after the same update.

    Args:
        update: made so far. last_update: the last one at which they were equal.

    Raises:
        IntegrityError: on every rank; names those that differ from most.

    Cost: 0.2 ms per million weights on a CPU core, and one small all-reduce.
    """
    if world.size == 1:
        return
    own = weights_hash(network)
    halves = [0.0] * (2 * world.size)  # of all ranks; 32 bits are exact in float64
    halves[2 * world.rank : 2 * world.rank + 2] = own >> 32, own & 0xFFFFFFFF
    found = world.sum(halves)
    hashes = [(found[2 * rank], found[2 * rank + 1]) for rank in range(world.size)]
    (most, held_by), *_ = Counter(hashes).most_common()
    if held_by == world.size:
        return
    others = [rank for rank in range(world.size) if hashes[rank] != most]
    if 2 * held_by > world.size:
        who = f"{_named(others)} from {_named([rank for rank in range(world.size) if rank not in others])}"
    else:
        others = list(range(world.size))
        who = f"{_named(others)} from one another, without a majority"
    raise IntegrityError(
        f"replicas: got other weights in {who} after update {update}, expected equal bits",
        hint=f"resume without the hosts of these ranks; weights were equal after update {last_update}",
        update=update,
        last_update=last_update,
        ranks=others,
    )


def weights_hash(network: nn.Module) -> int:
    """64 bits of all weights: xxh3 of their bytes on a CPU, elsewhere a sum that is computed on the device.

    Either finds every flipped bit; they are compared between ranks only, never with an older one.
    """
    tensors = [tensor.detach() for tensor in network.state_dict().values()]
    if tensors[0].device.type == "cpu":
        state = xxhash.xxh3_64()
        for tensor in tensors:
            state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return state.intdigest()
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        total = total * 0x9E3779B1 + _device_sum(tensor)
    return int(total) & 0xFFFFFFFFFFFFFFFF


def _device_sum(tensor: Tensor) -> Tensor:
    """The sum of (2 i + 1) times the bits of value i, modulo 2^64: an odd factor loses no bit of a single change."""
    bits = tensor.contiguous().view(-1)
    bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + len(part)) + 1, 2, device=tensor.device)
        total = total + (part * odd).sum()
    return total


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
