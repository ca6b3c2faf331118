"""Heads: shapes, layouts, predictions that keep their promises, and learning signals that reach every parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from treadle.errors import ConfigError, DataError
from treadle.nn.heads import ClassifyHead, CoxHead, CtcHead, HazardHead, Regression, RegressionHead, TagHead
from treadle.nn.losses import ctc_loss_sum, gaussian_nll_sum, huber_loss_sum, pinball_loss_sum, squared_loss_sum
from treadle.nn.pooling import AttentionPooling, pool_max, pool_mean
from treadle.nn.rows import Rows
from treadle.nn.survival import Ties, concordance_index, cox_loss_sum

LENGTHS = (4, 1, 3)
ROWS = Rows.of_lengths(LENGTHS, device=torch.device("cpu"))
EDGES = (0.0, 1.0, 2.0, 5.0)
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def make_frames(size: int = 6) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(ROWS.num_frames, size)


ROW_HEADS: dict[str, Callable[[str], nn.Module]] = {
    "classify": lambda pooling: ClassifyHead(6, 3, pooling, 2),
    "point": lambda pooling: RegressionHead(6, 2, pooling=pooling, num_directions=2),
    "quantile": lambda pooling: RegressionHead(6, 2, "quantile", levels=LEVELS, pooling=pooling, num_directions=2),
    "gaussian": lambda pooling: RegressionHead(6, 2, "gaussian", pooling=pooling, num_directions=2),
    "hazard": lambda pooling: HazardHead(6, EDGES, pooling, 2),
    "cox": lambda pooling: CoxHead(6, pooling, 2),
}
SHAPES = {"classify": (3,), "point": (2,), "quantile": (2, 5), "gaussian": (2, 2), "hazard": (3,), "cox": ()}


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "attention"])
@pytest.mark.parametrize("kind", ROW_HEADS)
def test_heads_of_a_row(kind: str, pooling: str) -> None:
    torch.manual_seed(0)
    head, h_NH = ROW_HEADS[kind](pooling), make_frames()
    scores = head(h_NH, ROWS)
    assert scores.shape == (3, *SHAPES[kind])
    other = h_NH.clone()
    other[:4] = torch.nan  # row 0
    assert torch.equal(head(other, ROWS)[1:], scores[1:])
    scores.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())
    with pytest.raises(ConfigError, match="expected 8 packed frames"):
        head(h_NH[1:], ROWS)


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "attention"])
def test_heads_of_a_row_take_narrow_frames(pooling: str) -> None:
    head, h_NH = ClassifyHead(6, 3, pooling), make_frames()
    wide = head(h_NH, ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(head(h_NH.bfloat16(), ROWS).float(), wide, rtol=0, atol=0.05)
    narrow = head.bfloat16()(h_NH.bfloat16(), ROWS)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=0, atol=0.05)


def test_classify_is_linear_in_the_pooled_row() -> None:
    h_NH = make_frames()
    for name, pooled in (("mean", pool_mean(h_NH, ROWS)), ("max", pool_max(h_NH, ROWS))):
        head = ClassifyHead(6, 3, name)
        assert torch.equal(head(h_NH, ROWS), head.linear(pooled))
        assert list(head.state_dict()) == ["linear.weight", "linear.bias"]
    own = AttentionPooling(6, num_heads=2)
    head = ClassifyHead(6, 3, own)
    pooled, weights = own(h_NH, ROWS)
    assert torch.equal(head(h_NH, ROWS), head.linear(pooled))
    assert head.pool.attention is own
    assert weights.shape == (8, 2)


def test_tags_of_any_leading_shape() -> None:
    head, h_NH = TagHead(6, 5), make_frames()
    assert head(h_NH, ROWS).shape == (8, 5)
    assert torch.equal(head(h_NH.view(2, 4, 6)), head(h_NH).view(2, 4, 5))


@pytest.mark.parametrize("frames_per_step", [1, 3])
def test_ctc_layouts_agree(frames_per_step: int) -> None:
    head, h_NH = CtcHead(6, 4, frames_per_step), make_frames()
    packed, padded = head(h_NH, ROWS), head.padded(h_NH, ROWS)
    assert packed.shape == (8 * frames_per_step, 5)
    assert padded.shape == (3, 4 * frames_per_step, 5)
    assert torch.equal(head(ROWS.pad(h_NH))[0], padded[0])
    lengths = head.label_lengths(LENGTHS)
    assert lengths.tolist() == [4 * frames_per_step, frames_per_step, 3 * frames_per_step]
    for row, part in enumerate(packed.split(lengths.tolist())):
        assert torch.equal(part, padded[row, : len(part)])
    # The label frames of a time step stand in order, beside those of the next.
    step = (head.linear.weight @ h_NH[2] + head.linear.bias).view(frames_per_step, 5)
    torch.testing.assert_close(padded[0, 2 * frames_per_step : 3 * frames_per_step], step)
    ctc_loss_sum(padded, lengths, torch.tensor([1, 2, 3]), [1, 1, 1]).backward()
    assert head.linear.weight.grad is not None
    assert head.linear.weight.grad.isfinite().all()


@given(scale=st.sampled_from([0.0, 1.0, 100.0, 1e4, 1e7]), seed=st.integers(0, 2**16))
@settings(max_examples=60)
def test_quantiles_never_cross(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    head = RegressionHead(6, 3, Regression.quantile, levels=LEVELS)
    quantiles = head(scale * torch.randn(8, 6), ROWS)
    assert quantiles.isfinite().all()
    assert (quantiles.diff(dim=-1) >= 0).all()


def test_quantiles_are_steps_from_the_lowest() -> None:
    head, h_NH = RegressionHead(6, 2, "quantile", levels=(0.1, 0.5, 0.9)), make_frames()
    raw = head.outputs(h_NH, ROWS).view(3, 2, 3)
    expected = raw.clone()
    expected[..., 1:] = raw[..., 1:].exp().log1p()
    torch.testing.assert_close(head(h_NH, ROWS), expected.cumsum(-1))


def test_log_variance_has_a_floor_and_a_way_back() -> None:
    head = RegressionHead(1, 1, "gaussian", log_variance_floor=-4.0, pooling="mean")
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[0.0], [1.0]]))
        head.linear.bias.zero_()
    rows = Rows.of_lengths([1] * 5, device=torch.device("cpu"))
    h_NH = torch.tensor([[-1e4], [-20.0], [-4.0], [6.0], [1e4]], requires_grad=True)
    log_variances = head(h_NH, rows)[:, 0, 1]
    assert (log_variances >= -4.0).all()
    assert log_variances[3:].tolist() == pytest.approx([6.0, 1e4], abs=1e-3)
    (grad,) = torch.autograd.grad(log_variances[1], h_NH)
    assert grad[1].item() > 0
    loss = head.loss_sum(head(h_NH, rows), torch.ones(5, 1))
    assert loss.isfinite()


@pytest.mark.parametrize("kind", ["squared", "huber", "quantile", "gaussian"])
def test_regression_learns_by_the_loss_of_its_kind(kind: str) -> None:
    torch.manual_seed(0)
    options = {"squared": {}, "huber": {"huber_delta": 0.5}}.get(kind, {"kind": kind})
    head, h_NH, targets_SR = RegressionHead(6, 2, **options), make_frames(), torch.randn(3, 2)  # type: ignore[arg-type]
    scores = head(h_NH, ROWS)
    expected = {
        "squared": lambda: squared_loss_sum(scores, targets_SR),
        "huber": lambda: huber_loss_sum(scores, targets_SR, 0.5),
        "quantile": lambda: pinball_loss_sum(scores, targets_SR, (0.1, 0.5, 0.9)),
        "gaussian": lambda: gaussian_nll_sum(scores[..., 0], scores[..., 1], targets_SR),
    }[kind]()
    assert torch.equal(head.loss_sum(scores, targets_SR), expected)
    with pytest.raises(DataError, match=r"targets\[0, 0\]: got inf"):
        head.loss_sum(scores, torch.full((3, 2), torch.inf))


def test_hazards_from_times_to_risks() -> None:
    torch.manual_seed(0)
    head, h_NH = HazardHead(6, EDGES), make_frames()
    times_S, events_S = torch.tensor([0.5, 3.0, 9.0]), torch.tensor([True, False, True])
    logits_SJ = head(h_NH, ROWS)
    hazards = logits_SJ.double().sigmoid()
    # Event in the first interval; censored before the middle of the last; event after the last edge.
    expected = hazards[0, 0] * (1 - hazards[1, :2]).prod() * (1 - hazards[2]).prod()
    loss = head.loss_sum(logits_SJ, times_S, events_S)
    assert loss.item() == pytest.approx(-expected.log().item(), rel=1e-5)
    curve = head.survival_curve(logits_SJ)
    assert curve.shape == (3, 4)
    torch.testing.assert_close(head.risk_by(logits_SJ, 2.0), 1 - curve[:, 2])
    assert (curve.diff(dim=-1) < 0).all()


@pytest.mark.parametrize("ties", [*Ties, "efron", "breslow"])
def test_cox_head(ties: Ties | str) -> None:
    head, h_NH = CoxHead(6, ties=ties), make_frames()
    times_S, events_S = torch.ones(3), torch.ones(3, dtype=torch.bool)
    log_risk_S = head(h_NH, ROWS)
    expected = cox_loss_sum(log_risk_S, times_S, events_S, Ties(ties))
    assert torch.equal(head.loss_sum(log_risk_S, times_S, events_S), expected)
    assert list(head.state_dict()) == ["linear.weight"]


@pytest.mark.parametrize("kind", ["hazard", "cox"])
def test_survival_heads_learn_who_fails_first(kind: str) -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, 6, (80,))
    rows = Rows.of_lengths(lengths, device=torch.device("cpu"))
    h_NH = torch.randn(rows.num_frames, 3)
    times_S = 2.5 * torch.exp(-2 * pool_mean(h_NH, rows)[:, 0])  # the first feature shortens the time
    events_S = torch.rand(80) < 0.7
    head = HazardHead(3, (0.0, 1.0, 2.0, 4.0, 8.0)) if kind == "hazard" else CoxHead(3)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (head.loss_sum(head(h_NH, rows), times_S, events_S) / 80).backward()
        optimizer.step()
    scores = head(h_NH, rows)
    risk_S = head.risk_by(scores, 4.0) if isinstance(head, HazardHead) else scores
    assert concordance_index(risk_S, times_S, events_S) > 0.97


def test_refusals() -> None:
    with pytest.raises(
        ConfigError, match=r"pooling: got 'sum', expected one of \['last', 'mean', 'max', 'attention'\]"
    ):
        ClassifyHead(6, 3, "sum")
    with pytest.raises(ConfigError, match=r"kind: got 'quantiles', expected one of .* did you mean 'quantile'\?"):
        RegressionHead(6, 2, "quantiles")
    with pytest.raises(ConfigError, match="levels: got"):
        RegressionHead(6, 2, "quantile", levels=(0.9, 0.1))
    with pytest.raises(ConfigError, match=r"huber_delta: got -1.0, expected a number above 0"):
        RegressionHead(6, 2, huber_delta=-1.0)
    with pytest.raises(ConfigError, match="frames_per_step: got 0"):
        CtcHead(6, 2, 0)
    with pytest.raises(ConfigError, match="edges: got"):
        HazardHead(6, (1.0, 2.0))
    with pytest.raises(ConfigError, match="ties: got 'exact'"):
        CoxHead(6, ties="exact")
