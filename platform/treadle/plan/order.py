"""Keyed orders: the same on every machine and with every numpy.

Only raw Philox bits and sorts of whole numbers are used. Raw bits are the version-stable part of numpy.random, and a
key carries its own index in its low bits: no two keys are equal, so which algorithm sorts them does not matter
(tests/unit/plan/test_order.py holds the numbers). Sorting such keys in place also takes a third of the time of an
argsort and no second array: 10 M rows are ordered in 0.7 s with 12 bytes a row at the peak.

Shape letters: N entries to be ordered.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draw", "keyed_order", "noisy_order", "raw_bits", "zone_turns"]

_CHUNK = 1 << 17
"""Entries whose keys are made at a time: what they take in between stays in the cache."""
_FRACTION = 20
"""Bits of a noisy length below one time step."""


class Draw(enum.IntEnum):
    """What random bits are for; each has counters of its own."""

    noise = 0
    turn = 1
    repeats = 2
    streams = 3


def raw_bits(draw: Draw, num: int, *, seed: int, epoch: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """64 random bits for each of `num` entries, in pieces: the first entry of a piece and its bits."""
    source = np.random.Philox(key=[seed, epoch], counter=int(draw) << 64)
    for start in range(0, num, _CHUNK):
        yield start, source.random_raw(min(_CHUNK, num - start))


def noisy_order(
    lengths_N: NDArray[np.uint32], *, noise: float, first_above: int, seed: int, epoch: int
) -> NDArray[np.uint32]:
    """The entries from the longest to the shortest, by lengths with noise.

    Args:
        lengths_N: frames, at least 1 each.
        noise: a length becomes length * (1 +- noise), evenly spread; at least half a frame, so that entries of one
            length are shuffled even without noise.
        first_above: entries longer than this come before all others, whatever the noise.
        seed, epoch: they decide the noise.

    Cost: 0.07 s per million entries; 12 bytes an entry.
    """
    num, longest = len(lengths_N), int(lengths_N.max())
    index_bits = max(1, (num - 1).bit_length())
    key_bits = (2 * longest).bit_length() + _FRACTION + 1  # one more says "longer than first_above"
    dropped = max(0, key_bits + index_bits - 64)
    keys_N = np.empty(num, np.uint64)
    for start, raw in raw_bits(Draw.noise, num, seed=seed, epoch=epoch):
        stop = start + len(raw)
        key = lengths_N[start:stop].astype(np.int64)
        is_first = key > first_above
        jitter = (raw >> np.uint64(44)).astype(np.int64) - (1 << 19)
        jitter *= np.maximum(2 * round(noise * 1000) * key, 1000)
        key <<= _FRACTION
        key += jitter // 1000
        key |= is_first.astype(np.int64) << (key_bits - 1)
        key = (1 << (key_bits - dropped)) - 1 - (key >> dropped)  # the longest first
        keys_N[start:stop] = (key.view(np.uint64) << np.uint64(index_bits)) | np.arange(start, stop, dtype=np.uint64)
    return _indices_in_order(keys_N, index_bits)


def keyed_order(draw: Draw, num: int, *, seed: int, epoch: int) -> NDArray[np.uint32]:
    """The entries 0 .. num - 1 shuffled."""
    return _shuffled(np.zeros(num, np.uint32), 1, draw, seed=seed, epoch=epoch)


def zone_turns(num_rounds: int, num_updates: int, *, seed: int, epoch: int) -> NDArray[np.uint32]:
    """Rounds, which are sorted by length, in the order in which updates take them, one update after the other.

    The rounds are cut into zones of `num_updates` neighbours. Each update takes one round of each zone, by an own
    shuffle of the zone. What is left over makes a smaller zone, somewhere; the first updates take from it.

    Source: with 4 rounds an update, the mean length of an update's rows has a coefficient of variation of 0.27 between
    updates, and of 0.61 where all rounds are shuffled together; 1.14 with one (tests/bench/batching.py).
    """
    whole, rest = divmod(num_rounds, num_updates)
    sizes = [num_updates] * whole
    place = whole
    if rest:
        _, bits = next(raw_bits(Draw.turn, num_rounds + 1, seed=seed, epoch=epoch))
        place = int(bits[0] >> np.uint64(32)) % (whole + 1)
        sizes.insert(place, rest)
    zone_N = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
    rounds = _shuffled(zone_N, len(sizes), Draw.turn, seed=seed, epoch=epoch)
    start = place * num_updates
    some, rounds = rounds[start : start + rest], np.delete(rounds, slice(start, start + rest))
    table = rounds.reshape(whole, num_updates).T
    return np.concatenate([np.column_stack([table[:rest], some]).ravel(), table[rest:].ravel()])


def _shuffled(zone_N: NDArray[np.uint32], num_zones: int, draw: Draw, *, seed: int, epoch: int) -> NDArray[np.uint32]:
    """The entries, zone after zone (ascending), each zone shuffled."""
    num = len(zone_N)
    index_bits, zone_bits = max(1, (num - 1).bit_length()), max(1, (num_zones - 1).bit_length())
    room = np.uint64(64 - index_bits - zone_bits)
    keys_N = np.empty(num, np.uint64)
    for start, raw in raw_bits(draw, num, seed=seed, epoch=epoch):
        stop = start + len(raw)
        key = (zone_N[start:stop].astype(np.uint64) << room) | (raw >> (np.uint64(64) - room))
        keys_N[start:stop] = (key << np.uint64(index_bits)) | np.arange(start, stop, dtype=np.uint64)
    return _indices_in_order(keys_N, index_bits)


def _indices_in_order(keys_N: NDArray[np.uint64], index_bits: int) -> NDArray[np.uint32]:
    """Sorts the keys, in place, and gives the indices in their low bits."""
    keys_N.sort()
    keys_N &= np.uint64((1 << index_bits) - 1)
    return keys_N.astype(np.uint32)
