"""Keyed orders: permutations, by noisy length, the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.plan.order import Draw, keyed_order, noisy_order, raw_bits, zone_turns


def order_of(lengths, *, noise=0.05, first_above=2**33, seed=0, epoch=0):
    return noisy_order(np.array(lengths, np.uint32), noise=noise, first_above=first_above, seed=seed, epoch=epoch)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=300), st.sampled_from([0.0, 0.05, 0.99]))
def test_no_row_is_far_from_its_place(lengths, noise):
    order = order_of(lengths, noise=noise)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    dealt = np.array(lengths, np.float64)[order]
    # Whatever comes later was longer with its noise at most, so no later row can be beyond both ends of the noise.
    later = np.maximum.accumulate(dealt[::-1])[::-1]
    width = max(noise, 0.0)
    assert (later * (1 - width) - 0.5 <= dealt * (1 + width) + 0.5 + 1e-5 * dealt).all()


def test_without_noise_only_equal_lengths_are_shuffled():
    lengths = np.repeat(np.arange(1, 20), 50)
    found = [order_of(lengths, noise=0.0, epoch=epoch) for epoch in range(2)]
    assert all((np.diff(lengths[order]) <= 0).all() for order in found)
    assert (found[0] != found[1]).any()
    assert not (np.diff(found[0][:50].astype(int)) == 1).all()


def test_keys_fit_whatever_the_lengths():
    """Here a key has fewer bits for noise than it takes: 33 of the length, 20 below, 12 of the index."""
    lengths = np.linspace(1, 2**32 - 1, 3000).astype(np.uint32)
    assert (order_of(lengths, noise=0.0) == np.arange(3000)[::-1]).all()
    order = order_of(lengths, noise=0.99, first_above=2**31)
    assert (lengths[order[:1500]] > 2**31).all()
    assert sorted(order.tolist()) == list(range(3000))


def test_rows_above_a_limit_come_first_whatever_the_noise():
    lengths = np.random.default_rng(0).integers(1, 1000, 500)
    order = order_of(lengths, noise=0.99, first_above=900)
    num = int((lengths > 900).sum())
    assert (lengths[order[:num]] > 900).all()
    assert (lengths[order[num:]] <= 900).all()


def test_noise_is_even_and_as_wide_as_it_says():
    lengths = np.full(200_000, 1000)
    lengths[0] = 1020  # among equal rows, its place says its noise
    places = [int(np.flatnonzero(order_of(lengths, epoch=epoch) == 0)[0]) / 200_000 for epoch in range(200)]
    # It becomes 969 to 1071, the others 950 to 1050: the first of all for a fifth of the draws, else anywhere in 80 %.
    assert np.mean(places) == pytest.approx(0.32, abs=0.06)
    assert np.mean([place == 0 for place in places]) == pytest.approx(0.2, abs=0.1)
    assert max(places) == pytest.approx(0.8, abs=0.03)


def test_pieces_of_bits_are_those_of_the_whole():
    num = 300_000
    whole = np.random.Philox(key=[5, 7], counter=int(Draw.streams) << 64).random_raw(num)
    pieces = list(raw_bits(Draw.streams, num, seed=5, epoch=7))
    assert [start for start, _ in pieces] == [0, 1 << 17, 2 << 17]
    assert (np.concatenate([bits for _, bits in pieces]) == whole).all()


def test_draws_are_independent():
    first = [next(raw_bits(draw, 10, seed=0, epoch=0))[1].tolist() for draw in Draw]
    assert len({bit for bits in first for bit in bits}) == 10 * len(Draw)


@pytest.mark.parametrize("num", [1, 2, 1000])
def test_a_shuffle_is_a_permutation(num):
    order = keyed_order(Draw.streams, num, seed=0, epoch=0)
    assert sorted(order.tolist()) == list(range(num))
    assert order.dtype == np.uint32


def test_a_shuffle_prefers_no_order():
    counts = np.zeros((4, 4))
    for epoch in range(2000):
        counts[np.arange(4), keyed_order(Draw.turn, 4, seed=0, epoch=epoch)] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 0.05


def test_zones_may_be_as_many_as_rounds():
    assert zone_turns(5, 1, seed=0, epoch=0).tolist() == [0, 1, 2, 3, 4]
    assert sorted(zone_turns(5, 5, seed=0, epoch=0).tolist()) == [0, 1, 2, 3, 4]


def test_the_bits_are_these_on_every_machine():
    lengths = (np.arange(1000) * 7919) % 97 + 1
    assert order_of(lengths, seed=3, epoch=2)[:12].tolist() == NOISY
    assert keyed_order(Draw.streams, 1000, seed=3, epoch=2)[:12].tolist() == SHUFFLED
    assert zone_turns(11, 3, seed=3, epoch=2).tolist() == TURNS


NOISY = [740, 934, 61, 413, 474, 25, 280, 643, 546, 449, 607, 352]
SHUFFLED = [149, 889, 339, 683, 655, 428, 91, 792, 0, 110, 908, 688]
TURNS = [0, 4, 6, 10, 2, 3, 8, 9, 1, 5, 7]
