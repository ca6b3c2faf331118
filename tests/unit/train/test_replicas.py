"""The fingerprint of weights: every bit counts, on the host and in the sum that a device computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from treadle.train import World
from treadle.train.replicas import _device_sum, check_replicas, weights_hash


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))


def host(network):
    return weights_hash(network)


def device(network):
    return [int(_device_sum(part)) for part in network.state_dict().values()]


@pytest.mark.parametrize("of", [host, device])
@given(part=st.integers(0, 3), place=st.integers(0, 10**6), bit=st.integers(0, 31))
def test_every_flipped_bit_shows(of, part, place, bit):
    network = small()
    before = of(network)
    bits = list(network.state_dict().values())[part].view(-1).view(torch.int32)
    place %= len(bits)
    bits[place] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert of(network) != before
    bits[place] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert of(network) == before


def test_two_values_in_each_others_place_show():
    network = small()
    before = host(network), device(network)
    flat = network[0].weight.data.view(-1)
    flat[[0, 1]] = flat[[1, 0]]
    assert host(network) != before[0]
    assert device(network) != before[1]


def test_formats_and_sizes(monkeypatch):
    values = torch.arange(1000.0)
    whole = int(_device_sum(values))
    monkeypatch.setattr("treadle.train.replicas._CHUNK", 7)
    assert int(_device_sum(values)) == whole
    assert int(_device_sum(values.bfloat16())) != int(_device_sum(values.half()))
    assert int(_device_sum(values[::2])) == int(_device_sum(values[::2].clone()))


def test_a_world_of_one_has_nobody_to_compare_with():
    check_replicas(World(), small(), update=1, last_update=0)
