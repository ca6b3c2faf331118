"""State decay, missing values and time features against plain loops, in pieces, and at their edges.

Shape letters: N frames of all rows laid end to end, T frames of one row, D features.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from treadle.errors import ConfigError, DataError
from treadle.nn.irregular import MissingValues, TimeDecay, TimeEmbedding
from treadle.nn.rows import Rows

LENGTHS = [40, 1, 73, 2, 40]
CPU = torch.device("cpu")


def make_rows(lengths: list[int]) -> Rows:
    return Rows.of_lengths(lengths, device=CPU)


def make_frames(lengths: list[int], num_features: int = 3, *, missing: float = 0.7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    num_frames = sum(lengths)
    x_ND = torch.randn(num_frames, num_features, generator=generator)
    x_ND[torch.rand(x_ND.shape, generator=generator) < missing] = torch.nan
    gaps_N = 3 * torch.rand(num_frames, generator=generator, dtype=torch.float64) ** 3
    return x_ND, gaps_N


def make_layer(num_features: int = 3, **kwargs: object) -> MissingValues:
    layer = MissingValues(num_features, mean=torch.linspace(-1, 1, num_features), **kwargs)
    with torch.no_grad():  # some features fade from the first moment on, one never does
        layer.weight.copy_(torch.linspace(-0.2, 0.5, num_features))
        layer.bias.copy_(torch.linspace(-0.1, 0.3, num_features))
    return layer


def impute_loop(layer: MissingValues, x_TD: Tensor, gaps_T: Tensor, carried: list[list[float]]) -> list[list[float]]:
    """The features of one row, one value at a time; `carried` = [value, since, seen] of each feature, changed."""
    features = []
    for t in range(len(x_TD)):
        imputed, observed, logs = [], [], []
        for d, carry in enumerate(carried):
            x, mean = float(x_TD[t, d]), float(layer.mean_D[d])
            since = carry[1] + float(gaps_T[t])
            scaled = since / layer.unit
            fade = math.exp(-max(0.0, layer.weight[d].item() * scaled + layer.bias[d].item()))
            known = not math.isnan(x)
            carry[:] = [x, 0.0, 1.0] if known else [carry[0], since, carry[2]]
            imputed.append(x if known else fade * (carry[0] if carry[2] else mean) + (1 - fade) * mean)
            observed.append(float(known))
            logs.append(math.log1p(scaled))
        features.append(imputed + observed + logs)
    return features


def fresh_carry(num_features: int) -> list[list[float]]:
    return [[0.0, 0.0, 0.0] for _ in range(num_features)]


@pytest.mark.parametrize("lengths", [LENGTHS, [9, 9, 9], [600, *[1] * 400]], ids=["ragged", "full", "one long"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_missing_values_equal_a_loop(lengths: list[int], dtype: torch.dtype) -> None:
    layer = make_layer(unit=0.8).to(dtype)
    x_ND, gaps_N = make_frames(lengths)
    x_ND = x_ND.to(dtype)
    features, state = layer(x_ND, gaps_N, make_rows(lengths))
    assert features.shape == (sum(lengths), layer.output_size)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for row, (x_TD, gaps_T, got) in enumerate(
        zip(x_ND.split(lengths), gaps_N.split(lengths), features.split(lengths), strict=True)
    ):
        carried = fresh_carry(3)
        expected = torch.tensor(impute_loop(layer, x_TD, gaps_T, carried), dtype=torch.float64)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        for d, (value, since, seen) in enumerate(carried):
            assert state["seen"][0, row, d].item() == seen
            assert state["since"][0, row, d].item() == pytest.approx(since, rel=1e-12)
            if seen:
                assert state["value"][0, row, d].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("sizes", [[1, 7, 64, 128], [200]], ids=["pieces", "steps"])
def test_missing_values_in_pieces_equal_the_whole(sizes: list[int]) -> None:
    layer, num_rows = make_layer().double(), 3
    x_ND, gaps_N = make_frames([200] * num_rows)
    x_BTD, gaps_BT = x_ND.double().view(num_rows, 200, 3), gaps_N.view(num_rows, 200)
    whole, whole_end = layer(x_ND.double(), gaps_N, make_rows([200] * num_rows))
    state, pieces = None, []
    if sizes == [200]:
        for x_BD, gaps_B in zip(x_BTD.unbind(1), gaps_BT.unbind(1), strict=True):
            piece, state = layer.step(x_BD, gaps_B, state)
            pieces.append(piece[:, None])
    else:
        for x_part, gaps_part in zip(x_BTD.split(sizes, 1), gaps_BT.split(sizes, 1), strict=True):
            length = x_part.shape[1]
            piece, state = layer(x_part.flatten(0, 1), gaps_part.flatten(), make_rows([length] * num_rows), state)
            pieces.append(piece.view(num_rows, length, -1))
    torch.testing.assert_close(torch.cat(pieces, 1).flatten(0, 1), whole, rtol=1e-12, atol=1e-12)
    assert state is not None
    for name, part in whole_end.items():
        torch.testing.assert_close(state[name], part, rtol=1e-12, atol=1e-12)


def test_ragged_pieces_hand_over_each_rows_own_end() -> None:
    layer = make_layer().double()
    first, second = [4, 1, 6], [3, 5, 1]
    (x1, gaps1), (x2, gaps2) = make_frames(first, missing=0.8), make_frames(second, missing=0.8)
    _, state = layer(x1.double(), gaps1, make_rows(first))
    got, _ = layer(x2.double(), gaps2, make_rows(second), state)
    for row, piece in enumerate(got.split(second)):
        x_TD = torch.cat((x1.split(first)[row], x2.split(second)[row])).double()
        gaps_T = torch.cat((gaps1.split(first)[row], gaps2.split(second)[row]))
        alone, _ = layer(x_TD, gaps_T, make_rows([len(x_TD)]))
        torch.testing.assert_close(piece, alone[first[row] :], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("starts", [[0], [1, 2, 3], [39], [0, 12, 13, 39]])
def test_starts_equal_separate_rows(starts: list[int]) -> None:
    layer = make_layer().double()
    x_ND, gaps_N = make_frames([40, 40])
    x_ND = x_ND.double()
    starts_N = torch.zeros(80, dtype=torch.bool)
    starts_N[[40 + start for start in starts]] = True
    before = {name: torch.full_like(part, 0.6) for name, part in layer.initial_state(2).items()}
    got, end = layer(x_ND, gaps_N, make_rows([40, 40]), before, starts_N=starts_N)
    lone_before = {name: part[:, :1] for name, part in before.items()}
    untouched, _ = layer(x_ND[:40], gaps_N[:40], make_rows([40]), lone_before)
    torch.testing.assert_close(got[:40], untouched, rtol=1e-12, atol=1e-12)
    cuts = sorted({0, *starts, 40})
    for first, stop in itertools.pairwise(cuts):
        state = None if first in starts else lone_before
        alone, lone_end = layer(
            x_ND[40 + first : 40 + stop], gaps_N[40 + first : 40 + stop], make_rows([stop - first]), state
        )
        torch.testing.assert_close(got[40 + first : 40 + stop], alone, rtol=1e-12, atol=1e-12)
        if stop == 40:
            for name, part in lone_end.items():
                torch.testing.assert_close(end[name][:, 1:], part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [LENGTHS, [600, *[1] * 200, *[9] * 40]], ids=["padded sums", "row by row"])
def test_rows_do_not_touch_each_other(lengths: list[int]) -> None:
    layer = make_layer().double()
    x_ND, gaps_N = make_frames(lengths)
    rows = make_rows(lengths)
    features, end = layer(x_ND, gaps_N, rows)
    changed = rows.row_N == 0
    x_ND[changed], gaps_N[changed] = torch.inf, gaps_N[changed] * math.pi
    other, other_end = layer(x_ND, gaps_N, rows)
    assert torch.equal(features[~changed], other[~changed])
    for name, part in end.items():
        assert torch.equal(part[:, 1:], other_end[name][:, 1:])


def test_gradients_are_right_and_never_nan() -> None:
    layer = make_layer().double()
    lengths = [6, 1, 4]
    x_ND, gaps_N = make_frames(lengths, missing=0.5)
    known_ND = torch.where(x_ND.isnan(), 0.5, x_ND).double().requires_grad_()
    missing_ND = x_ND.isnan()
    before = {name: torch.rand_like(part) for name, part in layer.initial_state(3).items()}
    before["value"].requires_grad_()

    def run(x: Tensor, weight: Tensor, bias: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        state = {**before, "value": value}
        parameters = {"weight": weight, "bias": bias}
        arguments = (x.masked_fill(missing_ND, torch.nan), gaps_N, make_rows(lengths), state)
        features, end = torch.func.functional_call(layer, parameters, arguments)
        return features, end["value"]

    inputs = (known_ND, layer.weight, layer.bias, before["value"])
    assert torch.autograd.gradcheck(run, inputs)
    features, end_value = run(*inputs)
    (features.sum() + end_value.sum()).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in inputs)


def test_explicit_observations_hide_values() -> None:
    layer = make_layer()
    x_ND, gaps_N = make_frames([30], missing=0.0)
    observed_ND = torch.rand(x_ND.shape) < 0.3
    explicit, _ = layer(x_ND, gaps_N, make_rows([30]), observed_ND=observed_ND)
    by_nan, _ = layer(x_ND.masked_fill(~observed_ND, torch.nan), gaps_N, make_rows([30]))
    assert torch.equal(explicit, by_nan)
    x_ND[5] = torch.nan  # said to be observed all the same
    still, _ = layer(x_ND, gaps_N, make_rows([30]), observed_ND=torch.ones_like(observed_ND))
    assert still.isfinite().all()
    assert not still[5, 3:6].any()


def test_a_year_of_seconds_does_not_stand_still() -> None:
    layer = make_layer(1)
    state = layer.initial_state(1)
    state["since"] += 3.2e7  # in fp32, adding 1 to it changes nothing
    nothing = torch.full((1, 1), torch.nan)
    for _ in range(100):
        _, state = layer.step(nothing, torch.ones(1), state)
    assert state["since"].item() == 3.2e7 + 100


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_gaps_are_refused_with_their_place(bad: float) -> None:
    rows = make_rows([3, 4])
    gaps_N = torch.zeros(7)
    gaps_N[5] = bad
    with pytest.raises(DataError, match=r"gaps_N\[5\] \(row 1, frame 2 of it\): got .*, expected a finite number of 0"):
        TimeDecay(4)(gaps_N, rows)
    with pytest.raises(DataError, match=r"row 1, frame 2"):
        make_layer()(torch.zeros(7, 3), gaps_N, rows)
    with pytest.raises(DataError, match=r"gaps_N\[1\]: got"):
        TimeDecay(4)(gaps_N[4:6])


def test_misfits_are_refused() -> None:
    layer, rows = make_layer(), make_rows([3, 4])
    frames, gaps_N = torch.zeros(7, 3), torch.zeros(7)
    with pytest.raises(ConfigError, match=r"x_ND: got shape \(7, 2\), expected \(7, 3\)"):
        layer(frames[:, :2], gaps_N, rows)
    with pytest.raises(ConfigError, match=r"gaps_N: got shape \(6,\), expected \(7,\)"):
        layer(frames, gaps_N[:6], rows)
    with pytest.raises(ConfigError, match=r"observed_ND: got shape \(7, 3\) of torch.int64"):
        layer(frames, gaps_N, rows, observed_ND=torch.ones(7, 3, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"starts_N: got shape \(3,\)"):
        layer(frames, gaps_N, rows, starts_N=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"state: got .*\(1, 3, 3\)"):
        layer(frames, gaps_N, rows, layer.initial_state(3))
    with pytest.raises(ConfigError, match="mean: got"):
        MissingValues(2, mean=[1.0, math.nan])
    with pytest.raises(ConfigError, match="unit: got 0"):
        TimeDecay(3, unit=0)
    with pytest.raises(ConfigError, match="size: got 1"):
        TimeEmbedding(1)
    with pytest.raises(ConfigError, match="longest: got 5"):
        TimeEmbedding(4, shortest=5, longest=5)


def test_decay_equals_its_equation_and_learns() -> None:
    layer = TimeDecay(6, unit=60.0).double()
    gaps_N = torch.tensor([0.0, 1.0, 60.0, 3600.0, 3e7, 1e300], dtype=torch.float64)
    decay_NH = layer(gaps_N)
    for n, gap in enumerate(gaps_N.tolist()):
        for h in range(6):
            expected = math.exp(-max(0.0, layer.weight[h].item() * gap / 60))
            assert decay_NH[n, h].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(decay_NH[0], torch.ones(6, dtype=torch.float64))
    decay_NH[:4].sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad < 0).all()  # every unit has a slope at first
    assert torch.autograd.gradcheck(
        lambda w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, gaps_N[1:4]),
        (layer.weight, layer.bias.detach().add(0.1).requires_grad_()),
    )


def test_decay_stays_in_its_range_and_streams() -> None:
    layer = TimeDecay(8)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-2, 2, 8))
        layer.bias.copy_(torch.linspace(1, -1, 8))
    gaps_N = torch.logspace(-9, 9, 50)
    decay_NH = layer(gaps_N, make_rows([20, 30]))
    assert decay_NH.min() >= 0
    assert decay_NH.max() <= 1
    steps = torch.stack([layer(gap) for gap in gaps_N])
    assert torch.equal(steps, decay_NH)


def test_embedding_equals_its_equation() -> None:
    layer = TimeEmbedding(6, shortest=2.0, longest=5000.0).double()
    with torch.no_grad():
        layer.shift.copy_(torch.randn(5))
        layer.phase.copy_(torch.randn(5))
    times_N = torch.tensor([0.0, 0.3, 17.0, 4999.0, -60.0], dtype=torch.float64)
    features = layer(times_N)
    periods = [2.0, 2.0, 100.0, 100.0, 5000.0]
    for n, time in enumerate(times_N.tolist()):
        log = math.copysign(math.log1p(abs(time) / 2) / math.log1p(2500), time)
        assert features[n, 0].item() == pytest.approx(log, abs=1e-12)
        for i, period in enumerate(periods):
            angle = (2 * math.pi / period + layer.shift[i].item() / 5000) * time + layer.phase[i].item()
            assert features[n, 1 + i].item() == pytest.approx(math.sin(angle), abs=1e-9)
    times_N.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t, s, p: torch.func.functional_call(layer, {"shift": s, "phase": p}, t),
        (times_N[1:].detach().requires_grad_(), layer.shift, layer.phase),
    )


def test_embedding_is_scaled_from_seconds_to_years() -> None:
    layer = TimeEmbedding(17)
    times_N = torch.logspace(0, math.log10(3e7), 200, dtype=torch.float64)
    features = layer(times_N)
    assert features.abs().max() <= 1
    assert features.std(0).min() > 0.1  # no feature is idle over the whole span
    features.sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() <= len(times_N)


def test_embedding_keeps_seconds_after_years() -> None:
    layer = TimeEmbedding(9, shortest=60.0)
    base, later = torch.tensor([0.0, 1.0, 2.0]), 1.7e9 - 1.7e9 % 60
    near, far = layer(base), layer(base.double() + later)
    torch.testing.assert_close(far[:, 1:3], near[:, 1:3], rtol=0, atol=1e-4)  # a whole number of minutes later


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_embedding_refuses_times_that_are_none(bad: float) -> None:
    with pytest.raises(DataError, match=r"times_N\[1\] \(row 1, frame 0 of it\): got"):
        TimeEmbedding(4)(torch.tensor([0.0, bad]), make_rows([1, 1]))


def test_low_precision_around_it_changes_nothing() -> None:
    x_ND, gaps_N = make_frames([30])
    layer, decay, embedding = make_layer(), TimeDecay(5), TimeEmbedding(5)
    plain = [layer(x_ND, gaps_N, make_rows([30]))[0], decay(gaps_N), embedding(gaps_N)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [layer(x_ND, gaps_N, make_rows([30]))[0], decay(gaps_N), embedding(gaps_N)]
    for expected, got in zip(plain, inside, strict=True):
        assert torch.equal(expected, got)
