"""The ranks as one value: alone, told of, lost and joined again; and which gradients travel together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from treadle.errors import TransientError, error_from_json
from treadle.nn import build_network
from treadle.spec import ClassifySpec, GruSpec, InputKind, LstmSpec, MinGruSpec, Signature
from treadle.train import World, gradients
from treadle.train.gradients import GradientSum, backward_order, plan_buckets, summing
from treadle.train.world import PeerLost

SCRIPT = Path(__file__).with_name("world_ranks.py")
SCENES = ("in_sum", "in_agree", "in_share", "in_first", "in_tensor", "in_gradients", "in_backward")
TOKENS = Signature(input_kind=InputKind.tokens, input_size=20, num_labels=3, max_length=9)


@pytest.fixture(scope="module")
def seen(tmp_path_factory, run_ranks):
    """What the two ranks saw that were left over, seen[scene][rank]."""
    folder = tmp_path_factory.mktemp("lost")
    run_ranks(SCRIPT, folder)
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in SCENES}


@pytest.mark.parametrize("scene", SCENES)
def test_a_lost_rank_is_one_error_wherever_it_is_noticed(seen, scene):
    for rank, found in enumerate(seen[scene]):
        assert found["error"].startswith(f"rank {rank}: got no answer from all 3 ranks")
        assert found["exit_code"] == TransientError.exit_code


@pytest.mark.parametrize("scene", SCENES)
def test_a_meeting_that_fails_is_over_too(seen, scene):
    for found in seen[scene]:
        phases = found["phases"]
        assert phases
        assert phases[::2] == ["waiting"] * (len(phases) // 2)
        assert phases[1::2] == ["computing"] * (len(phases) // 2)


def test_no_gradient_is_left_of_an_update_that_failed(seen):
    assert [found["left"] for found in seen["in_gradients"]] == [0, 0]


@pytest.mark.parametrize("scene", SCENES)
def test_those_left_add_up_alike_in_the_next_group(seen, scene):
    first, second = seen[scene]
    assert first["alone"] == [2.0]
    assert first["before"] == second["before"]
    assert first["after"] == second["after"]
    assert first["after"] != first["before"]  # of fewer ranks
    whole = own_gradients(0) + own_gradients(1)
    assert torch.equal(torch.tensor(first["after"]), whole)  # a sum of two does not depend on their order
    assert first["late"] == first["after"]  # nothing depends on when a bucket leaves


def own_gradients(rank: int) -> torch.Tensor:
    sys.path.insert(0, str(SCRIPT.parent))
    from world_ranks import loss, network

    net = network()
    loss(net, rank).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_a_world_of_one_needs_no_group():
    world = World()
    assert world.sum([1.5, 2.0]) == [1.5, 2.0]
    assert world.sum_tensor(torch.ones(2)).tolist() == [1.0, 1.0]
    assert world.agree("00" * 32)
    world.share_weights(nn.Linear(2, 2))
    with world.first() as is_first:
        assert is_first


def test_rejoining_is_seen_by_whoever_holds_the_world():
    world = World(rank=3, size=4)
    holder = [world]
    world.rejoin(0, 2)
    assert (holder[0].rank, holder[0].size) == (0, 2)


def test_a_lost_rank_can_be_read_back_by_a_process_without_torch():
    error = error_from_json(PeerLost("gone", hint="wait").to_json())
    assert type(error) is TransientError
    assert error.retry


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("a\nb"), PeerLost),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError),
        (KeyError(), KeyError),
    ],
)
def test_only_what_a_group_raises_is_a_lost_rank(error, expected):
    world = World(rank=1, size=2)
    with pytest.raises(expected), world.meeting:
        raise error


def test_nobody_is_told_where_nobody_asked():
    told: list[str] = []
    world = World()
    with world.meeting:
        pass
    world.on_phase = told.append
    with world.meeting:
        assert told == ["waiting"]
    assert told == ["waiting", "computing"]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    bucket=st.integers(4, 200),
    end=st.integers(4, 200),
    frozen=st.sets(st.integers(0, 11)),
)
def test_every_parameter_is_in_one_bucket_of_a_bounded_size(sizes, bucket, end, frozen):
    net = nn.ParameterList(
        [nn.Parameter(torch.zeros(size), requires_grad=i not in frozen) for i, size in enumerate(sizes)]
    )
    before = gradients.BUCKET_BYTES, gradients.END_BYTES
    try:
        gradients.BUCKET_BYTES, gradients.END_BYTES = bucket, end
        buckets = plan_buckets(net)
    finally:
        gradients.BUCKET_BYTES, gradients.END_BYTES = before
    order = [p for part in buckets for p in part]
    assert [id(p) for p in order] == [id(p) for p in reversed(list(net)) if p.requires_grad]
    for number, part in enumerate(buckets):
        limit = end if number in (0, len(buckets) - 1) else bucket
        assert part
        assert len(part) == 1 or 4 * sum(p.numel() for p in part) <= limit


def test_formats_travel_apart():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2))
    for part in plan_buckets(net):
        assert len({p.dtype for p in part}) == 1


def test_layers_are_ordered_as_the_backward_pass_meets_them():
    model = MinGruSpec(
        hidden_size=8, num_layers=2, embedding_size=4, attention_every=1, attention_heads=2, mlp_factor=1
    )
    net = build_network(model, ClassifySpec(), TOKENS)
    assert ready_order(net) == unit_order(net)
    net = build_network(LstmSpec(hidden_size=4, num_layers=3, embedding_size=4), ClassifySpec(), TOKENS)
    assert ready_order(net) == unit_order(net)


def ready_order(net: nn.Module) -> list[int]:
    """The parts of the network in the order in which the last gradient of each is ready."""
    part_of = {id(p): number for number, part in enumerate(net.parts) for p in part.parameters()}
    seen: list[int] = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(part_of[id(p)]))
    net(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5, 3])).sum().backward()
    return list(dict.fromkeys(reversed(seen)))[::-1]


def unit_order(net: nn.Module) -> list[int]:
    part_of = {id(p): number for number, part in enumerate(net.parts) for p in part.parameters()}
    return list(dict.fromkeys(part_of[id(p)] for p in backward_order(net)))


def test_learned_states_come_last():
    net = build_network(
        GruSpec(hidden_size=4, num_layers=2, embedding_size=4, learned_state=True), ClassifySpec(), TOKENS
    )
    names = {id(p): name for name, p in net.named_parameters()}
    order = [names[id(p)] for p in backward_order(net)]
    assert sorted(order) == sorted(names.values())
    assert order[0].startswith("head.")
    assert order[-1] == "stack.initial.h"


def test_one_rank_keeps_its_own_gradients():
    net = nn.Linear(3, 2)
    with summing(World(), net) as total:
        total.expect()
        net(torch.ones(1, 3)).sum().backward()
        grads = [p.grad for p in net.parameters()]
        assert total.finish((1.0, 0.0)) == [1.0, 0.0]
    assert all(p.grad is grad for p, grad in zip(net.parameters(), grads, strict=True))


def test_nothing_is_left_on_the_network():
    net = nn.Sequential(*(nn.Linear(9, 9) for _ in range(3)))
    before = gradients.BUCKET_BYTES, gradients.END_BYTES
    gradients.BUCKET_BYTES = gradients.END_BYTES = 100
    try:
        total = GradientSum(World(), net)
        assert any(p._post_accumulate_grad_hooks for p in net.parameters())
        total.close()
    finally:
        gradients.BUCKET_BYTES, gradients.END_BYTES = before
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def test_an_update_that_is_cut_short_leaves_no_gradients():
    net = nn.Linear(3, 2)

    def cut_short() -> None:
        with summing(World(), net):
            net(torch.ones(1, 3)).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        cut_short()
    assert all(p.grad is None for p in net.parameters())
