"""Attention layers against plain loops, in pieces, across documents, and at their edges.

Shape letters: N frames of all rows laid end to end, B rows, T frames of one row, D width, E features of a head.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.attention import AttentionLayer
from treadle.nn.rows import Rows

WIDTH, HEADS = 12, 2
LENGTHS = [5, 1, 70, 2, 33]
KINDS = {
    "window 2": {"causal": True, "window": 2},
    "window 9": {"causal": True, "window": 9},
    "window 100": {"causal": True, "window": 100},
    "causal": {"causal": True},
    "both ways": {"causal": False},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_window = pytest.mark.parametrize("window", [2, 9, 40])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make_rows(lengths: list[int]) -> Rows:
    return Rows.of_lengths(lengths, device=torch.device("cpu"))


def make_layer(**kwargs: object) -> AttentionLayer:
    torch.manual_seed(0)
    layer = AttentionLayer(WIDTH, HEADS, **kwargs)
    for parameter in layer.parameters():  # scores large enough for the choice of frames to matter
        nn.init.normal_(parameter, std=0.6)
    return layer


def make_frames(num_frames: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(num_frames, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(num_frames))


def attention_loop(layer: AttentionLayer, x_TD: Tensor, first: int = 0) -> Tensor:
    """The layer over one document, frame by frame, positions counted from `first`, rotations as complex numbers."""
    x_TD = x_TD.double()
    weights = {name: value.detach().double() for name, value in layer.named_parameters()}
    normed = x_TD / (x_TD.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["norm.weight"]
    q_TD, k_TD, v_TD = (normed @ weights["qkv.weight"].T).chunk(3, dim=-1)
    size = layer.width // layer.num_heads
    outputs = []
    for t in range(len(x_TD)):
        from_t = 0 if layer.window is None else max(0, t - layer.window + 1)
        seen = slice(from_t, t + 1 if layer.causal else len(x_TD))
        heads = []
        for head in range(layer.num_heads):
            part = slice(head * size, (head + 1) * size)
            q_E, k_SE = turned(q_TD[t : t + 1, part], first + t)[0], turned(k_TD[seen, part], first + from_t)
            scores_S = (q_E * k_SE.conj()).sum(-1).real / math.sqrt(size)
            heads.append(torch.softmax(scores_S, 0) @ v_TD[seen, part])
        outputs.append(weights["out.weight"] @ torch.cat(heads))
    return torch.stack(outputs)


def turned(x_TE: Tensor, first: int) -> Tensor:
    """Pairs of features as complex numbers, turned by the angles of positions `first`, `first` + 1 ..."""
    half = x_TE.shape[1] // 2
    angles = [[position * 10_000.0 ** (-e / half) for e in range(half)] for position in range(first, first + len(x_TE))]
    angle_TE = torch.tensor(angles, dtype=torch.float64)
    return torch.complex(x_TE[:, :half], x_TE[:, half:]) * torch.polar(torch.ones_like(angle_TE), angle_TE)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, [37, 37]], ids=["ragged", "full"])
def test_equals_a_loop(kind: str, dtype: torch.dtype, lengths: list[int]) -> None:
    layer = make_layer(**KINDS[kind]).to(dtype)
    x_ND = make_frames(sum(lengths), dtype)
    y_ND, _ = layer(x_ND, make_rows(lengths))
    assert y_ND.dtype == dtype
    for x_TD, y_TD in zip(x_ND.split(lengths), y_ND.split(lengths), strict=True):
        expected = attention_loop(layer, x_TD, first=1000)  # positions count by their distance only
        torch.testing.assert_close(y_TD.double(), expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@every_window
@pytest.mark.parametrize("sizes", [[1, 7, 64, 61], [1] * 133, [66, 67]], ids=["1, 7, 64, rest", "steps", "halves"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pieces_and_steps_equal_the_whole(window: int, sizes: list[int], dtype: torch.dtype) -> None:
    layer = make_layer(causal=True, window=window).to(dtype)
    x_BTD = make_frames(3 * 133, dtype).view(3, 133, WIDTH)
    whole, whole_end = layer(x_BTD.flatten(0, 1), make_rows([133] * 3))
    weight = torch.randn_like(whole)
    whole_grads = torch.autograd.grad((whole * weight).sum(), list(layer.parameters()))
    state, pieces = None, []
    for piece_BTD in x_BTD.split(sizes, 1):
        length = piece_BTD.shape[1]
        if length == 1:
            y_ND, state = layer.step(piece_BTD[:, 0], state)
        else:
            y_ND, state = layer(piece_BTD.flatten(0, 1), make_rows([length] * 3), state)
        pieces.append(y_ND.view(3, length, WIDTH))
    got = torch.cat(pieces, 1).flatten(0, 1)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, whole, rtol=tolerance, atol=tolerance)
    assert state is not None
    for name, part in whole_end.items():
        torch.testing.assert_close(state[name], part, rtol=tolerance, atol=tolerance)
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()  # keeps no frames alive
    for grad, wanted in zip(
        torch.autograd.grad((got * weight).sum(), list(layer.parameters())), whole_grads, strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=10 * tolerance * wanted.abs().max().item())


@every_window
def test_ragged_pieces_hand_over_each_rows_own_end(window: int) -> None:
    layer = make_layer(causal=True, window=window).double()
    first, second = [4, 1, 60], [3, 50, 2]
    x1, x2 = make_frames(sum(first)), make_frames(sum(second))
    _, state = layer(x1, make_rows(first))
    assert state["count"][0, :, 0].tolist() == [min(length, window - 1) for length in first]
    got, _ = layer(x2, make_rows(second), state)
    for row, piece in enumerate(got.split(second)):
        together = torch.cat((x1.split(first)[row], x2.split(second)[row]))
        alone, _ = layer(together, make_rows([len(together)]))
        torch.testing.assert_close(piece, alone[first[row] :], rtol=1e-12, atol=1e-12)


@every_kind
@pytest.mark.parametrize("starts", [[0], [1, 2, 3], [49], [0, 12, 13, 49]], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_starts_equal_separate_rows(kind: str, starts: list[int], ragged: bool) -> None:
    layer = make_layer(**KINDS[kind]).double()
    lengths = [60, 50] if ragged else [50, 50]
    x_ND = make_frames(sum(lengths))
    starts_N = torch.zeros(sum(lengths), dtype=torch.bool)
    starts_N[[lengths[0] + start for start in starts]] = True
    before = lone = None
    if layer.window is not None:  # a past for both rows to look back on, or not to
        _, before = layer(make_frames(2 * 30), make_rows([30, 30]))
        lone = {name: part[:, 1:] for name, part in before.items()}
    got, end = layer(x_ND, make_rows(lengths), before, starts_N=starts_N)
    first_before = None if before is None else {name: part[:, :1] for name, part in before.items()}
    untouched, _ = layer(x_ND[: lengths[0]], make_rows(lengths[:1]), first_before)
    torch.testing.assert_close(got[: lengths[0]], untouched, rtol=1e-12, atol=1e-12)
    x_TD, got_TD = x_ND[lengths[0] :], got[lengths[0] :]
    for start, stop in itertools.pairwise(sorted({0, *starts, 50})):
        state = None if start in starts else lone
        alone, alone_end = layer(x_TD[start:stop], make_rows([stop - start]), state)
        torch.testing.assert_close(got_TD[start:stop], alone, rtol=1e-12, atol=1e-12)
        if stop == 50 and layer.window is not None:
            assert torch.equal(end["count"][:, 1:], alone_end["count"])
            num_seen = int(alone_end["count"])
            for name in ("key", "value"):
                torch.testing.assert_close(
                    end[name][-num_seen:, 1:], alone_end[name][-num_seen:], rtol=1e-12, atol=1e-12
                )


def test_steps_after_a_start_see_no_earlier_document() -> None:
    layer = make_layer(causal=True, window=20).double()
    x_TD = make_frames(40)
    starts_N = torch.arange(40) == 30
    whole, _ = layer(x_TD, make_rows([40]), starts_N=starts_N)
    _, state = layer(x_TD[:33], make_rows([33]), starts_N=starts_N[:33])
    for t in range(33, 40):
        y_BD, state = layer.step(x_TD[t : t + 1], state)
        torch.testing.assert_close(y_BD[0], whole[t], rtol=1e-12, atol=1e-12)


@every_kind
@pytest.mark.parametrize("bad", [None, torch.nan])
def test_rows_do_not_touch_each_other(kind: str, bad: float | None) -> None:
    layer = make_layer(**KINDS[kind])
    rows = make_rows(LENGTHS)
    weight_ND = torch.randn(rows.num_frames, WIDTH)

    def run(x_ND: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x_ND = x_ND.clone().requires_grad_()
        y_ND, end = layer(x_ND, rows)
        return y_ND.detach(), torch.autograd.grad((y_ND * weight_ND).sum(), x_ND)[0], end

    x_ND = make_frames(rows.num_frames, torch.float32)
    y_ND, grad_ND, end = run(x_ND)
    changed = rows.row_N == 2
    x_ND[changed] = x_ND[changed] + 1 if bad is None else bad
    other_ND, other_grad, other_end = run(x_ND)
    assert not torch.equal(y_ND[changed], other_ND[changed])
    assert torch.equal(y_ND[~changed], other_ND[~changed])
    assert torch.equal(grad_ND[~changed], other_grad[~changed])
    for name, part in end.items():
        for row in (0, 1, 3, 4):
            assert torch.equal(part[:, row], other_end[name][:, row])


@every_window
def test_no_frame_looks_ahead_or_too_far_back(window: int) -> None:
    layer = make_layer(causal=True, window=window)
    x_TD = make_frames(120, torch.float32)
    y_TD, _ = layer(x_TD, make_rows([120]))
    x_TD[50] += 1.0
    changed = (layer(x_TD, make_rows([120]))[0] != y_TD).any(-1).nonzero()[:, 0].tolist()
    assert changed == list(range(50, min(120, 50 + window)))


@pytest.mark.parametrize("kind", ["window 2", "window 9", "causal", "both ways"])
def test_gradients(kind: str) -> None:
    torch.manual_seed(0)
    layer = AttentionLayer(4, 2, **KINDS[kind]).double()
    rows = make_rows([4, 2])
    state = layer.initial_state(2) if layer.window is not None else {}
    inputs = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True), layer.qkv.weight]
    if state:
        state = {name: torch.rand_like(part) for name, part in state.items()}
        state["count"][:] = 1.0
        inputs += [state["key"].requires_grad_(), state["value"].requires_grad_()]

    def run(x_ND: Tensor, weight: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        before = {**state, "key": carried[0], "value": carried[1]} if carried else None
        y_ND, end = torch.func.functional_call(layer, {"qkv.weight": weight}, (x_ND, rows, before))
        return y_ND, *(end[name] for name in ("key", "value") if end)

    assert torch.autograd.gradcheck(run, tuple(inputs))


def test_positions_stay_sharp_after_a_million_frames() -> None:
    # Angles computed in fp32 are off by up to 0.03 there.
    cos, sin = make_layer(causal=True)._turns(torch.tensor([10**6 + 1]))
    angles = [(10**6 + 1) * 10_000.0 ** (-e / 3) for e in range(3)]
    assert cos[0].tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=1e-6)
    assert sin[0].tolist() == pytest.approx([math.sin(angle) for angle in angles], abs=1e-6)


@every_kind
def test_autocast_keeps_the_format_and_carries_fp32(kind: str) -> None:
    layer = make_layer(**KINDS[kind])
    rows = make_rows(LENGTHS)
    x_ND = make_frames(rows.num_frames, torch.float32)
    plain, _ = layer(x_ND, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_ND, end = layer(x_ND, rows)
        narrow, _ = layer(x_ND.bfloat16(), rows)
    assert y_ND.dtype == torch.float32
    assert narrow.dtype == torch.bfloat16
    assert {part.dtype for part in end.values()} <= {torch.float32}
    torch.testing.assert_close(y_ND, plain, rtol=0.05, atol=0.1)


def test_dropout_acts_in_training_only() -> None:
    layer = AttentionLayer(WIDTH, HEADS, causal=True, dropout=0.5)
    arguments = (make_frames(30, torch.float32), make_rows([30]))
    dropped = (layer(*arguments)[0] == 0).float().mean().item()
    assert 0.35 < dropped < 0.65
    assert not (layer.eval()(*arguments)[0] == 0).any()


@pytest.mark.parametrize("causal", [True, False])
def test_a_state_needs_a_window(causal: bool) -> None:
    layer = make_layer(causal=causal)
    assert layer.state_names == ()
    _, end = layer(make_frames(3, torch.float32), make_rows([3]))
    assert end == {}
    message = (
        "causal attention without a window, expected" if causal else "attention both ways, expected one that looks"
    )
    for call in (
        lambda: layer.initial_state(1),
        lambda: layer(make_frames(3, torch.float32), make_rows([3]), end),
        lambda: layer.step(make_frames(3, torch.float32)),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_misfits_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads: got 5"):
        AttentionLayer(12, 5, causal=True)
    with pytest.raises(ConfigError, match="num_heads: got 4, expected one that parts a width of 12 into even"):
        AttentionLayer(12, 4, causal=True)
    with pytest.raises(ConfigError, match="window: got 1, expected 2 or more"):
        AttentionLayer(12, 2, causal=True, window=1)
    with pytest.raises(ConfigError, match="window: got 8 for a layer that looks both ways"):
        AttentionLayer(12, 2, causal=False, window=8)
    layer = make_layer(causal=True, window=4)
    frames, rows = make_frames(7, torch.float32), make_rows([3, 4])
    with pytest.raises(ConfigError, match=r"x_ND: got shape \(6, 12\), expected \(7, 12\)"):
        layer(frames[:6], rows)
    with pytest.raises(ConfigError, match=r"starts_N: got shape \(7,\) of torch.int64"):
        layer(frames, rows, starts_N=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"state: got .*'key': \(3, 1, 12\)"):
        layer(frames, rows, layer.initial_state(1))


def test_a_final_state_can_be_spared() -> None:
    layer = make_layer(causal=True, window=4)
    frames, rows = make_frames(7, torch.float32), make_rows([3, 4])
    spared, nothing = layer(frames, rows, final_state=False)
    assert nothing == {}
    assert torch.equal(spared, layer(frames, rows)[0])
