"""Pooling of packed frames against each row on its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.errors import ConfigError
from treadle.nn.pooling import (
    AttentionPooling,
    RowPooling,
    pool_attention,
    pool_last,
    pool_max,
    pool_mean,
    segment_softmax,
)
from treadle.nn.rows import Rows
from treadle.spec import Pooling

CPU = torch.device("cpu")
LENGTHS = st.lists(st.one_of(st.integers(1, 40), st.integers(250, 520)), min_size=1, max_size=5)


def make_rows(*lengths: int) -> Rows:
    return Rows.of_lengths(lengths, device=CPU)


def attention_of_row(frames: Tensor, scores: Tensor) -> Tensor:
    """One head's weighted mean of one row, in float64 and plain Python sums."""
    top = max(scores.tolist())
    shares = [math.exp(score - top) for score in scores.tolist()]
    return sum(share * frame for share, frame in zip(shares, frames, strict=True)) / sum(shares)  # type: ignore[return-value]


@given(lengths=LENGTHS, seed=st.integers(0, 2**16))
@settings(max_examples=30)
def test_every_pooling_is_of_the_rows_own_frames(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h_ND = torch.randn(sum(lengths), 4, generator=generator)
    scores_NA = 3 * torch.randn(sum(lengths), 2, generator=generator)
    rows = make_rows(*lengths)
    mean_SD, max_SD = pool_mean(h_ND, rows), pool_max(h_ND, rows)
    last_SD, ends_SD = pool_last(h_ND, rows), pool_last(h_ND, rows, 2)
    attended, weights_NA = pool_attention(h_ND, scores_NA, rows)
    pieces = zip(h_ND.double().split(lengths), scores_NA.double().split(lengths), strict=True)
    for row, (frames, scores) in enumerate(pieces):
        torch.testing.assert_close(mean_SD[row].double(), frames.sum(0) / len(frames), rtol=0, atol=2e-6)
        assert torch.equal(max_SD[row].double(), torch.stack([*frames]).sort(0).values[-1])
        assert torch.equal(last_SD[row].double(), frames[-1])
        assert torch.equal(ends_SD[row].double(), torch.cat((frames[-1, :2], frames[0, 2:])))
        expected = torch.cat([attention_of_row(frames, scores[:, head]) for head in range(2)])
        torch.testing.assert_close(attended[row].double(), expected, rtol=0, atol=5e-6)
    for weights in weights_NA.split(lengths):
        torch.testing.assert_close(weights.sum(0), torch.ones(2), rtol=0, atol=1e-5)
    assert mean_SD.dtype == attended.dtype == torch.float32


POOLINGS: list[Callable[[Tensor, Rows], Tensor]] = [
    pool_mean,
    pool_max,
    pool_last,
    lambda h, rows: pool_last(h, rows, 2),
    lambda h, rows: pool_attention(h, h[:, :2], rows)[0],
    segment_softmax,
]
NAMES = ["mean", "max", "last", "both ends", "attention", "softmax"]
every_pooling = pytest.mark.parametrize("pool", POOLINGS, ids=NAMES)


@every_pooling
def test_gradients(pool: Callable[[Tensor, Rows], Tensor]) -> None:
    torch.manual_seed(0)
    rows = make_rows(3, 1, 4, 260)  # the last is longer than a block of the sums
    h_ND = torch.randn(rows.num_frames, 2, dtype=torch.float64, requires_grad=True)
    picked = torch.cat((torch.arange(8), torch.tensor([8, 100, 263, 264, 267])))

    def some(x_MD: Tensor) -> Tensor:
        return pool(h_ND.detach().index_copy(0, picked, x_MD), rows)

    assert torch.autograd.gradcheck(some, h_ND.detach()[picked].requires_grad_())


@every_pooling
def test_another_row_changes_nothing(pool: Callable[[Tensor, Rows], Tensor]) -> None:
    torch.manual_seed(0)
    lengths = (300, 7, 513, 1, 20)
    rows = make_rows(*lengths)
    values_ND = torch.randn(rows.num_frames, 4)
    own = (rows.row_N != 2)[:, None]

    def run(h_ND: Tensor) -> tuple[Tensor, Tensor]:
        h_ND = h_ND.clone().requires_grad_()
        pooled = pool(h_ND, rows)
        return pooled.detach(), torch.autograd.grad(pooled.square().sum(), h_ND)[0]

    first, other = run(values_ND), run(torch.where(own, values_ND, torch.nan))
    frame_wise = first[0].shape[0] == rows.num_frames
    kept = own[:, 0] if frame_wise else torch.arange(5) != 2
    assert torch.equal(first[0][kept], other[0][kept])
    assert torch.equal(first[1][own[:, 0]], other[1][own[:, 0]])
    # A row alone gives, to the bit, what it gives in company.
    parts = values_ND.split(lengths)
    alone = torch.cat([pool(part, make_rows(len(part))) for part in parts])
    assert torch.equal(alone, first[0])


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_scores_are_finite(size: float) -> None:
    rows = make_rows(3, 2, 1)
    scores_N = torch.tensor([size, -size, size, -size, -size, -size], requires_grad=True)
    weights_N = segment_softmax(scores_N, rows)
    assert weights_N.tolist() == [0.5, 0.0, 0.5, 0.5, 0.5, 1.0]
    (weights_N * torch.arange(6)).sum().backward()
    assert scores_N.grad is not None
    assert scores_N.grad.isfinite().all()


def test_minus_infinity_shuts_a_frame_out_and_nan_shows() -> None:
    rows = make_rows(2, 3, 2)
    weights = segment_softmax(torch.tensor([0.0, -torch.inf, 0.0, torch.nan, 0.0, 1.0, 1.0]), rows)
    assert weights[:2].tolist() == [1.0, 0.0]
    assert weights[2:5].isnan().all()
    assert weights[5:].tolist() == [0.5, 0.5]


def test_means_of_long_rows_are_exact_enough() -> None:
    # One running sum per row is off by 3e-4 here: every addition rounds the same way.
    rows = make_rows(5, 32768, 3)
    pooled = pool_mean(torch.full((rows.num_frames, 2), 0.1), rows)
    torch.testing.assert_close(pooled, torch.full((3, 2), 0.1), rtol=1e-5, atol=0)


def test_largest_frames_share_the_gradient_and_nan_shows() -> None:
    rows = make_rows(3, 2)
    h_ND = torch.tensor([[1.0], [2.0], [2.0], [0.0], [torch.nan]], requires_grad=True)
    pooled = pool_max(h_ND, rows)
    assert pooled[0].item() == 2.0
    assert pooled[1].isnan().all()
    pooled[0].sum().backward()
    assert h_ND.grad is not None
    assert h_ND.grad[:3].tolist() == [[0.0], [0.5], [0.5]]


def test_bf16_frames_are_summed_in_fp32() -> None:
    rows = make_rows(1000, 3)
    torch.manual_seed(0)
    h_ND = torch.randn(rows.num_frames, 2).bfloat16()
    expected = torch.stack([part.double().mean(0) for part in h_ND.split([1000, 3])])
    pooled, weights = pool_attention(h_ND, torch.zeros(1003, 1).bfloat16(), rows)  # equal scores: the mean
    for got in (pool_mean(h_ND, rows), pooled):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)
    assert weights.dtype == torch.float32
    assert pool_max(h_ND, rows).dtype == pool_last(h_ND, rows).dtype == torch.bfloat16


@pytest.mark.parametrize("gated", [False, True])
def test_attention_module(gated: bool) -> None:
    torch.manual_seed(0)
    pool = AttentionPooling(6, 5, num_heads=3, gated=gated)
    rows = make_rows(4, 9, 1)
    h_ND = torch.randn(rows.num_frames, 6)
    pooled, weights = pool(h_ND, rows)
    assert pooled.shape == (3, pool.output_size) == (3, 18)
    assert weights.shape == (14, 3)
    units = torch.tanh(h_ND @ pool.hidden.weight.T + pool.hidden.bias)
    if pool.gate is not None:
        units = units / (1 + torch.exp(-(h_ND @ pool.gate.weight.T + pool.gate.bias)))
    scores = (units @ pool.score.weight.T).double()
    expected = torch.cat([attention_of_row(h_ND[4:13].double(), scores[4:13, head]) for head in range(3)])
    torch.testing.assert_close(pooled[1].double(), expected, rtol=0, atol=5e-6)
    pooled.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in pool.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = pool(h_ND, rows)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, pooled, rtol=0, atol=0.05)


@pytest.mark.parametrize("pooling", [*Pooling, "last", "mean", "max", "attention", AttentionPooling(4, num_heads=2)])
def test_row_pooling_by_name(pooling: Pooling | str | AttentionPooling) -> None:
    torch.manual_seed(0)
    module, rows = RowPooling(pooling, 4, 2), make_rows(3, 2)
    h_ND = torch.randn(5, 4)
    pooled = module(h_ND, rows)
    assert pooled.shape == (2, module.output_size)
    table = {"last": pool_last(h_ND, rows, 2), "mean": pool_mean(h_ND, rows), "max": pool_max(h_ND, rows)}
    if module.attention is not None:
        table["attention"] = module.attention(h_ND, rows)[0]
    assert torch.equal(pooled, table[module.name])
    assert (len(list(module.parameters())) > 0) == (module.name == "attention")


def test_deterministic_to_the_bit() -> None:
    torch.manual_seed(0)
    rows = make_rows(400, 30, 1000)
    pool, values_ND = AttentionPooling(8), torch.randn(rows.num_frames, 8)

    def run() -> list[Tensor]:
        h_ND = values_ND.clone().requires_grad_()
        pooled, weights = pool(h_ND, rows)
        return [pooled, weights, *torch.autograd.grad(pooled.square().sum(), [h_ND, *pool.parameters()])]

    first = run()
    torch.use_deterministic_algorithms(True)  # refuses operations that cannot be
    try:
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_refusals() -> None:
    rows, h_ND = make_rows(3, 2), torch.zeros(6, 3)
    for pool in (pool_mean, pool_max, pool_last, segment_softmax):
        with pytest.raises(ConfigError, match=r"got shape \(6, 3\), expected 5 packed frames"):
            pool(h_ND, rows)
    with pytest.raises(ConfigError, match="num_directions: got 2 for 3 features"):
        pool_last(h_ND[:5], rows, 2)
    with pytest.raises(ConfigError, match="num_directions: got 3"):
        RowPooling("last", 3, 3)
    with pytest.raises(ConfigError, match=r"pooling: got 'attn', expected one of .* did you mean 'attention'"):
        RowPooling("attn", 4)
    with pytest.raises(ConfigError, match="num_heads: got 0, expected 1 or more"):
        AttentionPooling(4, num_heads=0)
