"""Positions: small, equal on all ranks, and never taken for those of other batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from treadle import wire
from treadle.errors import ConfigError
from treadle.plan import PlanInputs, Position, check_position, plan_epoch, plan_inputs
from treadle.spec import BatchSpec, Budget, LongRows

LENGTHS = np.arange(1, 400)


def inputs(lengths_N=LENGTHS, *, data="0123456789abcdef" * 4, lanes=4, seed=0, **batch):
    return plan_inputs(BatchSpec(**{"max_slots": "1k", **batch}), lengths_N, data=data, lanes=lanes, seed=seed)


def test_a_position_is_small_and_survives_the_wire():
    large = dataclasses.replace(
        inputs(), rows=10**10, frames=10**13, seed=2**31 - 1, lanes=4096, slots=1 << 20, noise=0.125, class_balance=0.75
    )
    position = Position(epoch=999, update=10**7, inputs=large)
    data = wire.canonical(wire.encode(position))
    assert len(data) <= 340
    assert len(wire.canonical(wire.encode(Position(inputs=inputs())))) <= 300
    assert wire.decode(Position, wire.parse_json(data, where="x")) == position


def test_updates_follow_one_another_over_epochs():
    position = Position(inputs=inputs())
    places = []
    for _ in range(7):
        places.append((position.epoch, position.update))
        position = position.advanced(3)
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_the_same_inputs_go_on():
    check_position(Position(epoch=3, update=4, inputs=inputs()), inputs())


CHANGES = {
    "data (digest)": dict(data="f" * 64),
    "train.seed": dict(seed=1),
    "batch.lanes": dict(lanes=8),
    "batch.max_slots": dict(max_slots="2k"),
    "batch.budget": dict(budget=Budget.frames),
    "batch.max_rows": dict(max_rows=7),
    "batch.rounds_per_update": dict(rounds_per_update=2),
    "batch.noise": dict(noise=0.1),
    "batch.multiple_of": dict(multiple_of=8),
    "batch.long_rows": dict(long_rows=LongRows.chunk),
    "batch.class_balance": dict(class_balance=0.5),
    "batch.max_repeats": dict(max_repeats=3),
    "training rows": dict(lengths_N=LENGTHS[:-1]),
    "training frames": dict(lengths_N=LENGTHS + 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_input_is_named_with_both_values(name):
    was, now = inputs(), inputs(**CHANGES[name])
    with pytest.raises(ConfigError) as refused:
        check_position(Position(inputs=was), now)
    (field,) = (f for f in refused.value.context["changed"] if f != "frames" or name == "training frames")
    line = next(line for line in refused.value.message.splitlines() if line.startswith(name))
    assert f"got {getattr(now, field)}, expected {getattr(was, field)}" in line
    assert was.digest != now.digest


def test_another_way_of_planning_is_named():
    with pytest.raises(ConfigError, match="way of planning: got 2, expected 1"):
        check_position(Position(inputs=dataclasses.replace(inputs(), planner=1)), inputs())


def test_all_that_a_batch_spec_says_is_an_input():
    """A new key of the batch spec that changes batches must be added to PlanInputs."""
    spec = {field.name for field in dataclasses.fields(BatchSpec)} - {"max_slots"}
    assert spec <= {field.name for field in dataclasses.fields(PlanInputs)}


def test_a_run_that_stops_at_any_update_goes_on_with_the_same_rows():
    batch = BatchSpec(max_slots="2k", rounds_per_update=2)

    def rows_from(position, stop_after):
        found = []
        while position.epoch < 2 and len(found) < stop_after:
            plan = plan_epoch(LENGTHS, batch, lanes=2, seed=0, epoch=position.epoch)
            found.append([plan.round_rows(number).tolist() for number in plan.rounds_of(position.update)])
            position = position.advanced(plan.num_updates)
        return found, position

    whole, _ = rows_from(Position(inputs=inputs()), 10**6)
    for stop in range(len(whole) + 1):
        first, position = rows_from(Position(inputs=inputs()), stop)
        data = wire.canonical(wire.encode(position))
        rest, _ = rows_from(wire.decode(Position, wire.parse_json(data, where="x")), 10**6)
        assert first + rest == whole
