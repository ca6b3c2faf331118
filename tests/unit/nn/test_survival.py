"""Survival losses and metrics against enumerated likelihoods and textbook double loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.errors import ConfigError, DataError
from treadle.nn.survival import (
    CoxBaseline,
    Ties,
    concordance_index,
    cox_loss_sum,
    hazard_loss_sum,
    risk_by,
    survival_curve,
    to_intervals,
)

EDGES = (0.0, 1.0, 3.0, 7.0)
every_ties = pytest.mark.parametrize("ties", Ties, ids=lambda ties: ties.name)
# Few distinct times, so that most batches have ties.
ROWS = st.lists(st.tuples(st.floats(-3, 3), st.integers(0, 4), st.booleans()), min_size=1, max_size=12)


def columns(rows: list[tuple[float, int, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    risks, times, events = zip(*rows, strict=True)
    return torch.tensor(risks, dtype=torch.float64), torch.tensor(times).double(), torch.tensor(events)


# Discrete hazards


@pytest.mark.parametrize(
    ("time", "event", "expected"),
    [
        (0.0, True, (0, True)),
        (0.99, True, (0, True)),
        (1.0, True, (1, True)),  # an interval holds its lower edge
        (6.9, True, (2, True)),
        (7.0, True, (3, False)),  # past the last edge: survived all
        (50.0, True, (3, False)),
        (0.49, False, (0, False)),
        (0.5, False, (1, False)),  # half an interval counts as the whole
        (1.9, False, (1, False)),
        (2.0, False, (2, False)),
        (4.99, False, (2, False)),
        (5.0, False, (3, False)),
        (99.0, False, (3, False)),
    ],
)
def test_to_intervals(time: float, event: bool, expected: tuple[int, bool]) -> None:
    for dtype in (torch.float32, torch.float64):
        intervals, events = to_intervals(torch.tensor([time, 0.2], dtype=dtype), torch.tensor([event, True]), EDGES)
        assert (intervals[0].item(), events[0].item()) == expected
        assert intervals.dtype == torch.int64


def hazard_likelihoods(logits: list[float]) -> list[float]:
    """The chance of an event in each interval, and of none, by walking through the intervals."""
    chances, alive = [], 1.0
    for logit in logits:
        hazard = 1 / (1 + math.exp(-logit))
        chances.append(alive * hazard)
        alive *= 1 - hazard
    return [*chances, alive]


def test_hazard_loss_is_the_enumerated_likelihood() -> None:
    torch.manual_seed(0)
    cases = [(j, True) for j in range(3)] + [(j, False) for j in range(4)]
    logits_BJ = 2 * torch.randn(len(cases), 3)
    total = 0.0
    for row, (interval, event) in enumerate(cases):
        chances = hazard_likelihoods(logits_BJ[row].double().tolist())
        assert sum(chances) == pytest.approx(1.0)
        # Censored after j intervals: everything that may still happen.
        total -= math.log(chances[interval] if event else sum(chances[interval:]))
    intervals, events = (torch.tensor(part) for part in zip(*cases, strict=True))
    loss = hazard_loss_sum(logits_BJ, intervals, events)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert hazard_loss_sum(logits_BJ.bfloat16(), intervals, events).dtype == torch.float32
    curve = survival_curve(logits_BJ)
    for row in range(len(cases)):
        chances = hazard_likelihoods(logits_BJ[row].double().tolist())
        expected = [sum(chances[j:]) for j in range(4)]
        assert curve[row].tolist() == pytest.approx(expected, rel=1e-5)


def test_hazard_gradients_and_extremes() -> None:
    torch.manual_seed(0)
    intervals, events = torch.tensor([0, 2, 3, 0]), torch.tensor([True, True, False, False])
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hazard_loss_sum(x, intervals, events), logits)
    extreme = torch.tensor([1e4, -1e4, 1e4]).expand(4, 3).clone().requires_grad_()
    loss = hazard_loss_sum(extreme, intervals, events)
    assert loss.isfinite()
    loss.backward()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()
    assert not extreme.grad[3].any()  # censored before the end of any interval: nothing is known
    assert not extreme.grad[0, 1:].any()
    assert survival_curve(extreme).isfinite().all()


def test_risk_by_a_horizon() -> None:
    torch.manual_seed(0)
    logits_BJ = torch.randn(5, 3)
    curve = survival_curve(logits_BJ)
    for j, edge in enumerate(EDGES):
        torch.testing.assert_close(risk_by(logits_BJ, EDGES, edge), 1 - curve[:, j], rtol=1e-5, atol=1e-7)
    # A constant rate within an interval: half of it is survived with the square root of the chance.
    half = 1 - (curve[:, 1] * (curve[:, 2] / curve[:, 1]).sqrt())
    torch.testing.assert_close(risk_by(logits_BJ, EDGES, 2.0), half, rtol=1e-5, atol=1e-7)
    small = risk_by(torch.full((1, 3), -25.0), EDGES, 7.0)
    assert small.item() == pytest.approx(3 * math.exp(-25), rel=1e-5)  # 1 - exp(x) would be 0


# Cox


def cox_double_loop(risks: list[float], times: list[float], events: list[bool], ties: Ties) -> float:
    """Minus the log partial likelihood, time by time, as the textbooks write it."""
    total = 0.0
    for time in sorted({t for t, event in zip(times, events, strict=True) if event}):
        at_risk = sum(math.exp(r) for r, t in zip(risks, times, strict=True) if t >= time)
        tied = [r for r, t, event in zip(risks, times, events, strict=True) if event and t == time]
        for place, risk in enumerate(tied):
            gone = place / len(tied) * sum(math.exp(r) for r in tied) if ties is Ties.efron else 0.0
            total -= risk - math.log(at_risk - gone)
    return total


@every_ties
@given(rows=ROWS)
@settings(max_examples=60)
def test_cox_is_the_double_loop(ties: Ties, rows: list[tuple[float, int, bool]]) -> None:
    risks, times, events = columns(rows)
    loss = cox_loss_sum(risks, times, events, ties)
    expected = cox_double_loop(risks.tolist(), times.tolist(), events.tolist(), ties)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    # Neither the order of rows nor a constant added to all risks matters.
    turned = cox_loss_sum(risks.flip(0) + 5, times.flip(0), events.flip(0), ties)
    assert turned.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_cox_of_a_known_batch() -> None:
    # Two events tied among three at risk, all of risk 1: 1/3 * 1/3 (Breslow), 1/3 * 1/2 (Efron).
    zeros, times, events = torch.zeros(3), torch.tensor([1.0, 1.0, 2.0]), torch.tensor([True, True, False])
    assert cox_loss_sum(zeros, times, events, Ties.breslow).item() == pytest.approx(math.log(9), rel=1e-6)
    assert cox_loss_sum(zeros, times, events).item() == pytest.approx(math.log(6), rel=1e-6)
    # A row censored at the time of an event was at risk.
    other = torch.tensor([True, False, False])
    assert cox_loss_sum(zeros, times, other).item() == pytest.approx(math.log(3), rel=1e-6)


@every_ties
def test_cox_gradients_and_extremes(ties: Ties) -> None:
    torch.manual_seed(0)
    times = torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0, 0.0, 2.0])
    events = torch.tensor([True, True, True, False, True, False, True])
    risks = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cox_loss_sum(x, times, events, ties), risks)
    for extreme in ([1e4, -1e4, 1e4, -1e4, 1e4, 0.0, -1e4], [-1e4, 1e4, -1e4, 1e4, -1e4, 0.0, 1e4]):
        x = torch.tensor(extreme, requires_grad=True)
        loss = cox_loss_sum(x, times, events, ties)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        loss.backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.sum().item() == pytest.approx(0.0, abs=1e-5)  # only differences of risk matter


@every_ties
def test_a_batch_without_events_teaches_nothing(ties: Ties) -> None:
    risks = torch.randn(4, requires_grad=True)
    loss = cox_loss_sum(risks, torch.ones(4), torch.zeros(4, dtype=torch.bool), ties)
    assert loss.item() == 0.0
    loss.backward()
    assert risks.grad is not None
    assert not risks.grad.any()


@given(rows=ROWS)
@settings(max_examples=40)
def test_baseline_is_breslows_sum(rows: list[tuple[float, int, bool]]) -> None:
    risks, times, events = columns(rows)
    if not events.any():
        with pytest.raises(DataError, match="events_B: got no event"):
            CoxBaseline.fit(risks, times, events)
        return
    baseline = CoxBaseline.fit(risks, times, events)
    at = [-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 3.5, 4.0, 9.0]
    survival, data = (
        baseline.survival(risks, at),
        list(zip(risks.tolist(), times.tolist(), events.tolist(), strict=True)),
    )
    for place, time in enumerate(at):
        hazard = 0.0
        for _, when, event in data:
            if event and when <= time:
                hazard += 1 / sum(math.exp(r) for r, t, _ in data if t >= when)
        expected = [math.exp(-hazard * math.exp(risk)) for risk in risks.tolist()]
        assert survival[:, place].tolist() == pytest.approx(expected, rel=1e-9)
        assert baseline.risk_by(risks, time).tolist() == pytest.approx([1 - value for value in expected], abs=1e-12)


# Concordance


def concordance_loop(risks: list[float], times: list[float], events: list[bool]) -> float | None:
    score, pairs = 0.0, 0
    for (r, t, event), (other_r, other_t, other_event) in itertools.permutations(
        zip(risks, times, events, strict=True), 2
    ):
        if event and (t < other_t or (t == other_t and not other_event)):
            pairs += 1
            score += 1.0 if r > other_r else 0.5 if r == other_r else 0.0
    return score / pairs if pairs else None


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 2.0, 2.5]), st.integers(0, 4), st.booleans()), min_size=1, max_size=12
    )
)
def test_concordance_is_the_double_loop(rows: list[tuple[float, int, bool]]) -> None:
    risks, times, events = columns(rows)
    expected = concordance_loop(risks.tolist(), times.tolist(), events.tolist())
    if expected is None:
        with pytest.raises(DataError, match="times_B: got no comparable pair"):
            concordance_index(risks, times, events)
    else:
        assert concordance_index(risks, times, events) == pytest.approx(expected)


def test_concordance_of_known_rankings(monkeypatch: pytest.MonkeyPatch) -> None:
    times, events = torch.arange(50.0), torch.ones(50, dtype=torch.bool)
    assert concordance_index(-times, times, events) == 1.0
    assert concordance_index(times, times, events) == 0.0
    assert concordance_index(torch.zeros(50), times, events) == 0.5
    mixed = torch.randn(50)
    whole = concordance_index(mixed, times, events)
    monkeypatch.setattr("treadle.nn.survival._BLOCK", 170)  # 3 events at once
    assert concordance_index(mixed, times, events) == whole


# Bad input


def test_refusals() -> None:
    times, events, risks = torch.tensor([1.0, -2.0]), torch.tensor([True, False]), torch.zeros(2)
    with pytest.raises(DataError, match=r"times_B\[1\]: got -2.0, expected a finite number, 0 or more"):
        cox_loss_sum(risks, times, events)
    with pytest.raises(DataError, match=r"times_B\[0\]: got nan"):
        to_intervals(torch.tensor([math.nan, 1.0]), events, EDGES)
    with pytest.raises(DataError, match=r"risk_B\[1\]: got inf"):
        concordance_index(torch.tensor([0.0, math.inf]), times.abs(), events)
    with pytest.raises(DataError, match=r"log_risk_B\[0\]: got nan"):
        CoxBaseline.fit(torch.tensor([math.nan, 0.0]), times.abs(), events)
    with pytest.raises(ConfigError, match=r"events_B: got shape \(2,\) of torch.int64"):
        cox_loss_sum(risks, times.abs(), events.long())
    with pytest.raises(ConfigError, match=r"times_B: got shape \(2,\), expected \(3,\)"):
        cox_loss_sum(torch.zeros(3), times.abs(), events)
    with pytest.raises(DataError, match=r"intervals_B\[0\]: got 3, expected 0 to 2, or 3 for a row that survived"):
        hazard_loss_sum(torch.zeros(2, 3), torch.tensor([3, 3]), events)
    with pytest.raises(DataError, match=r"intervals_B\[1\]: got 4"):
        hazard_loss_sum(torch.zeros(2, 3), torch.tensor([2, 4]), events)
    with pytest.raises(ConfigError, match=r"intervals_B: got torch.float32"):
        hazard_loss_sum(torch.zeros(2, 3), torch.tensor([2.0, 0.0]), events)
    with pytest.raises(ConfigError, match=r"intervals_B: got shape \(3,\)"):
        hazard_loss_sum(torch.zeros(2, 3), torch.tensor([2, 0, 0]), events)
    for edges in ((0.0,), (1.0, 2.0), (0.0, 2.0, 2.0), (0.0, math.inf), (), (0.0, math.nan)):
        with pytest.raises(ConfigError, match="edges: got"):
            to_intervals(times.abs(), events, edges)
    with pytest.raises(ConfigError, match=r"horizon: got 7.5, expected 0 to 7.0"):
        risk_by(torch.zeros(2, 3), EDGES, 7.5)
    with pytest.raises(ConfigError, match="edges: got 4, expected 3 for 2 intervals"):
        risk_by(torch.zeros(2, 2), EDGES, 1.0)
