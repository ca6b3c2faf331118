"""Hashes of numbers: splitmix64 (Steele, Lea and Flood 2014), with Stafford's variant 13 of its finaliser."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALL_BITS", "GOLDEN", "mix", "mixed", "splitmix64"]

Words = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
"""What a counter goes on by."""
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
ALL_BITS = (1 << 64) - 1


def splitmix64(values: Words) -> Words:
    """A bijection of 64 bits in which every input bit moves about half of the output bits."""
    # One value is laid out as an array: NumPy warns of scalars that overflow, as these are meant to.
    return mix(np.asarray(values, np.uint64).reshape(-1) + np.uint64(GOLDEN)).reshape(np.shape(values))


def mixed(value: int) -> int:
    """`splitmix64` of one number, without the cost of an array."""
    value = (value + GOLDEN) & ALL_BITS
    for shift, factor in _ROUNDS:
        value = ((value ^ value >> shift) * factor) & ALL_BITS
    return value ^ value >> 31


def mix(words: Words) -> Words:
    """The finaliser of many, in place."""
    for shift, factor in _ROUNDS:
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words
