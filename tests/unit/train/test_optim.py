"""Optimizers and rates: groups, course, ends."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_rig import Toy, toy_spec

from treadle.spec import AdamWSpec, BatchSpec, LstmSpec, OptimSpec, RateScaling, RmsPropSpec, Schedule, SgdSpec
from treadle.train import World, build_optimizer
from treadle.train.fit import progress
from treadle.train.optim import learning_rate, rate_scale

INVERSE_SQRT = Schedule.inverse_sqrt
shares = st.floats(0, 1)
specs = st.builds(
    AdamWSpec,
    lr=st.floats(1e-5, 10),
    schedule=st.sampled_from(Schedule),
    warmup_share=st.floats(0, 0.9),
    final_lr_share=st.floats(0, 1),
)


@given(specs, shares)
def test_the_rate_stays_between_its_ends(spec: OptimSpec, share):
    rate = learning_rate(spec, share)
    ends = (spec.final_lr_share, 0.01 if spec.warmup_share else 1.0, 0.1 if spec.schedule is INVERSE_SQRT else 1.0)
    floor = min(ends)
    assert floor * spec.lr * (1 - 1e-9) <= rate <= spec.lr * (1 + 1e-9)


@given(specs)
def test_the_rate_ends_where_it_should(spec: OptimSpec):
    shares = {Schedule.linear: spec.final_lr_share, Schedule.cosine: spec.final_lr_share}
    shares[INVERSE_SQRT] = max(spec.warmup_share, 0.01) ** 0.5
    share = shares.get(spec.schedule, 1.0)
    assert learning_rate(spec, 1.0) == pytest.approx(spec.lr * share, rel=1e-9, abs=1e-12)
    assert learning_rate(spec, spec.warmup_share) == pytest.approx(spec.lr)


@given(specs, st.floats(0.01, 1))
def test_the_course_has_no_jumps(spec: OptimSpec, share):
    # The steepest parts are the warm-up (1 / warmup_share) and the cosine (pi / 2 over the rest).
    steepest = spec.lr * max(1 / max(spec.warmup_share, 0.01), 1.6 / (1 - spec.warmup_share))
    step = 1e-7
    assert abs(learning_rate(spec, share) - learning_rate(spec, max(0.01, share - step))) <= steepest * step * 1.01


@given(specs, st.lists(shares, min_size=2, max_size=20))
def test_after_the_warm_up_the_rate_never_rises(spec: OptimSpec, found):
    later = sorted(share for share in found if share >= spec.warmup_share)
    rates = [learning_rate(spec, share) for share in later]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(rates))


def test_the_warm_up_is_linear():
    spec = AdamWSpec(lr=2.0, warmup_share=0.5)
    assert [learning_rate(spec, share) for share in (0.0, 0.125, 0.25, 0.5)] == [0.02, 0.5, 1.0, 2.0]


def test_the_middle_of_the_courses():
    spec = AdamWSpec(lr=1.0, warmup_share=0.2, final_lr_share=0.1)
    rates = {schedule: learning_rate(dataclasses.replace(spec, schedule=schedule), 0.6) for schedule in Schedule}
    wanted = {Schedule.constant: 1.0, Schedule.linear: 0.55, Schedule.cosine: 0.55}
    assert rates == pytest.approx(wanted | {INVERSE_SQRT: (0.2 / 0.6) ** 0.5, Schedule.plateau: 1.0})


@given(specs, shares, st.integers(0, 40))
def test_cuts_lower_the_rate_of_a_plateau_alone_and_not_below_its_end(spec: OptimSpec, share, cuts):
    rate = learning_rate(spec, share, cuts)
    if spec.schedule is not Schedule.plateau or share < spec.warmup_share:
        assert rate == learning_rate(spec, share)
    else:
        assert rate == spec.lr * max(spec.plateau_factor**cuts, spec.final_lr_share)


@pytest.mark.parametrize(
    ("scaling", "wanted"), [(RateScaling.none, 1.0), (RateScaling.linear, 4.0), (RateScaling.sqrt, 2.0)]
)
def test_the_rate_grows_with_the_rows_of_an_update(scaling, wanted):
    assert rate_scale(AdamWSpec(rate_scaling=scaling, base_rows=16), 64.0) == wanted
    assert rate_scale(AdamWSpec(), 64.0) == 1.0


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_rows_of_an_update_are_those_of_the_plan(lanes):
    toy = Toy(toy_spec(batch=BatchSpec(max_slots="48", lanes=lanes, rounds_per_update=2)))
    feeds = [toy.feed(World(rank=rank, size=size)) for size in (1, 2) for rank in range(size)]
    plan = feeds[0].plan(0)
    rows = [sorted(feeds[0].rows_of(0, i)) for i in range(plan.num_updates)]
    assert {feed.mean_rows for feed in feeds} == {sum(map(len, rows)) / len(rows)}
    for feed in feeds:
        assert [feed.rows_of(0, i) for i in range(plan.num_updates)] == rows
        assert feed.rows_before(0, 2) == rows[1]
        assert feed.rows_before(1, 0) == rows[-1]
    seen = [sorted(r for m in u.micros for r in m.batch.rows_B.tolist()) for u in feeds[0].starting_at(0, 0)]
    assert seen[: len(rows)] == rows


@given(specs, shares, st.lists(shares, max_size=5))
def test_how_often_it_is_asked_does_not_matter(spec: OptimSpec, share, before):
    wanted = learning_rate(spec, share)
    for other in before:
        learning_rate(spec, other)
    assert learning_rate(spec, share) == wanted


def test_progress_grows_by_update_and_ends_at_one():
    toy = Toy(toy_spec())
    found = [progress(toy.spec, update) for update in toy.feed(toy.run().world).starting_at(0, 0)]
    assert found == sorted(set(found))
    assert found[-1] == 1.0
    assert found[0] == pytest.approx(1 / len(found), rel=0.5)


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("kind", [AdamWSpec, RmsPropSpec, SgdSpec])
def test_decay_holds_for_matrices_alone(kind, embeddings):
    spec = kind(weight_decay=0.1, lr=0.5, decay_embeddings=embeddings, **({"momentum": 0.0} if kind is SgdSpec else {}))
    network = Toy(toy_spec(model=LstmSpec(hidden_size=4, norm=True))).network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = build_optimizer(spec, network)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in network.parameters()}
    assert len(grouped) == len(before)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # without a gradient, decay is all there is
    for name, p in network.named_parameters():
        decays = p.ndim >= 2 and (embeddings or not name.startswith("embedding"))
        wanted = before[name] * (1 - 0.5 * 0.1) if decays else before[name]
        assert torch.allclose(p, wanted, rtol=1e-6, atol=0), name
    assert any(name.startswith("embedding") for name in before)


def test_rmsprop_is_torchs_but_for_the_decay():
    spec = RmsPropSpec(lr=0.1, alpha=0.9, momentum=0.5, weight_decay=0.1)
    network, other = (Toy(toy_spec()).network() for _ in range(2))
    ours = build_optimizer(spec, network)
    theirs = torch.optim.RMSprop(other.parameters(), lr=0.1, alpha=0.9, momentum=0.5, eps=1e-8)
    for seed in range(3):
        for part in (network, other):
            draws = torch.Generator().manual_seed(seed)
            for p in part.parameters():
                p.grad = torch.randn(p.shape, generator=draws)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1 - 0.1 * 0.1 if p.ndim >= 2 else 1.0)
        ours.step()
        theirs.step()
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(network.parameters(), other.parameters(), strict=True))
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_may_be_none(momentum):
    network = Toy(toy_spec()).network()
    optimizer = build_optimizer(SgdSpec(momentum=momentum), network)
    assert all(group["nesterov"] is (momentum > 0) for group in optimizer.param_groups)
