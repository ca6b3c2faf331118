"""Stacks of recurrent and attention layers: against plain loops, in pieces, in every form of batch, and their errors.

Shape letters: B rows, T time steps, D features, N frames of all rows laid end to end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cell_oracles import KINDS, run_row
from test_attention import attention_loop
from torch import Tensor, nn

from treadle.errors import ConfigError, DataError
from treadle.nn import GRU, LSTM, MinGRU
from treadle.nn.footprint import peak_bytes
from treadle.nn.hybrid import HybridStack
from treadle.nn.long import checkpointed, train_in_chunks

LENGTHS = [5, 1, 23, 17]
WAYS = {
    "window": {"window": 7},
    "causal": {},
    "both ways": {"bidirectional": True},
}
every_way = pytest.mark.parametrize("way", WAYS)
some_kinds = pytest.mark.parametrize("kind", ["mingru", "lstm", "gru"])


def make_stack(kind: str, num_layers: int = 4, **options: Any) -> HybridStack:
    torch.manual_seed(0)
    given = {"attention_every": 2, "num_heads": 2, "mlp_factor": 1.5, **options}
    stack = HybridStack(KINDS[kind], 3, 8, num_layers, **given).double()
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.4)
    return stack


def make_frames(lengths: list[int]) -> Tensor:
    """Padded frames, with NaN at padded slots: what stands there must never be read."""
    torch.manual_seed(1)
    x_BTD = torch.randn(len(lengths), max(lengths), 3, dtype=torch.float64)
    for row, length in enumerate(lengths):
        x_BTD[row, length:] = torch.nan
    return x_BTD


def packed(x_BTD: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([row_TD[:length] for row_TD, length in zip(x_BTD, lengths, strict=True)])


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0)


def rms_normed(x_TD: Tensor, norm: nn.Module) -> Tensor:
    return x_TD / (x_TD.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def feed_forward(x_TD: Tensor, mlp: nn.Module) -> Tensor:
    hidden = rms_normed(x_TD, mlp.norm) @ mlp.up.weight.T + mlp.up.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return x_TD + hidden @ mlp.down.weight.T + mlp.down.bias


def loop(kind: str, stack: HybridStack, x_TD: Tensor) -> Tensor:
    """One row through the layers in the order that is promised, each from its equations."""
    places = [("r", 0), ("r", 1), ("a", 0), ("r", 2), ("r", 3), ("a", 1)]
    for place, index in places:
        if place == "a":
            x_TD = feed_forward(x_TD + attention_loop(stack.attention[index], x_TD), stack.mlp[index])
            continue
        layer = stack.recurrent[index].layers[0]
        zeros = [dict.fromkeys(stack.recurrent[index].state_names, torch.zeros(8, dtype=torch.float64))] * 2
        y_TD, _ = run_row(kind, stack.recurrent[index], rms_normed(x_TD, layer.norm), zeros)
        x_TD = feed_forward(x_TD + y_TD if x_TD.shape == y_TD.shape else y_TD, layer.mlp)
    return x_TD


@some_kinds
@every_way
def test_equals_a_loop(kind: str, way: str) -> None:
    stack = make_stack(kind, **WAYS[way])
    for layer in stack.attention:
        assert (layer.causal, layer.window) == (way != "both ways", WAYS[way].get("window"))
    x_BTD = make_frames(LENGTHS)
    with torch.no_grad():
        y_BTD, _ = stack(x_BTD, lengths=LENGTHS)
        assert y_BTD.shape[-1] == stack.output_size == 8 * stack.num_directions
        for row, length in enumerate(LENGTHS):
            expected = loop(kind, stack, x_BTD[row, :length])
            torch.testing.assert_close(y_BTD[row, :length], expected, rtol=1e-9, atol=1e-9)
            assert not y_BTD[row, length:].any()


@some_kinds
@every_way
def test_every_form_of_batch_gives_the_same(kind: str, way: str) -> None:
    stack = make_stack(kind, **WAYS[way])
    x_BTD = make_frames(LENGTHS)
    starts = torch.rand(x_BTD.shape[:2]) < 0.2
    for marks in ({}, {"starts": starts}):
        y_BTD, end = stack(x_BTD, lengths=LENGTHS, **marks)
        flat_marks = {name: packed(mark, LENGTHS) for name, mark in marks.items()}
        y_ND, flat_end = stack(packed(x_BTD, LENGTHS), offsets=offsets(LENGTHS), **flat_marks)
        torch.testing.assert_close(y_ND, packed(y_BTD, LENGTHS), rtol=1e-10, atol=1e-10)
        for name, part in end.items():
            torch.testing.assert_close(flat_end[name], part, rtol=1e-10, atol=1e-10)
        for row, length in enumerate(LENGTHS):  # alone, and so without padding
            alone = {name: mark[row : row + 1, :length] for name, mark in marks.items()}
            y_1TD, lone_end = stack(x_BTD[row : row + 1, :length], **alone)
            torch.testing.assert_close(y_1TD[0], y_BTD[row, :length], rtol=1e-10, atol=1e-10)
            for name, part in lone_end.items():
                if "attention" not in name:
                    torch.testing.assert_close(part[:, 0], end[name][:, row], rtol=1e-10, atol=1e-10)


@some_kinds
def test_time_first(kind: str) -> None:
    stack, other = make_stack(kind, window=7), make_stack(kind, window=7, batch_first=False)
    x_BTD = make_frames(LENGTHS)
    y_BTD, _ = stack(x_BTD, lengths=LENGTHS)
    y_TBD, _ = other(x_BTD.transpose(0, 1), lengths=LENGTHS)
    assert torch.equal(y_TBD.transpose(0, 1), y_BTD)


@some_kinds
@pytest.mark.parametrize(
    "options", [{}, {"conv_size": 3, "learned_state": True, "time_decay": True}], ids=["plain", "all"]
)
def test_pieces_and_steps_equal_the_whole(kind: str, options: dict[str, Any]) -> None:
    stack = make_stack(kind, 2, attention_every=1, window=9, **options)
    x_BTD = torch.randn(3, 80, 3, dtype=torch.float64)
    starts = torch.rand(3, 80) < 0.05
    gaps = torch.rand(3, 80, dtype=torch.float64) if "time_decay" in options else None
    marks = {"starts": starts} | ({} if gaps is None else {"gaps": gaps})
    whole, whole_end = stack(x_BTD, **marks)
    assert set(whole_end) == set(stack.state_names) == set(stack.initial_state(1))
    wanted = torch.autograd.grad(whole.square().sum(), list(stack.parameters()))
    sizes, first = [1, 7, 64, 8], 0
    pieces, state = [], None
    for size in sizes:
        part = {name: mark[:, first : first + size] for name, mark in marks.items()}
        y_BTD, state = stack(x_BTD[:, first : first + size], state, **part)
        pieces.append(y_BTD)
        first += size
    steps, step_state = [], None
    with torch.no_grad():
        for t in range(80):
            y_BD, step_state = stack.step(x_BTD[:, t], step_state, **{name: mark[:, t] for name, mark in marks.items()})
            steps.append(y_BD)
    for got, end in ((torch.cat(pieces, 1), state), (torch.stack(steps, 1), step_state)):
        assert end is not None
        torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-9)
        for name, part in whole_end.items():
            hidden = (part - end[name]).abs()
            if name.endswith((".key", ".value")):  # what a start has put out of sight may differ
                place = name.rpartition(".")[0]
                age = torch.arange(len(part), 0, -1)[:, None]
                hidden = hidden * (age <= whole_end[f"{place}.count"][0, :, 0])[..., None]
            assert hidden.max() < 1e-9
    grads = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), list(stack.parameters()))
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-8)


@every_way
def test_rows_do_not_touch_each_other(way: str) -> None:
    stack = make_stack("mingru", **WAYS[way])
    x_BTD = make_frames(LENGTHS)
    weight = torch.randn(len(LENGTHS), max(LENGTHS), stack.output_size, dtype=torch.float64)

    def run(x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD.clone().requires_grad_()
        y_BTD, _ = stack(x_BTD, lengths=LENGTHS)
        return y_BTD.detach(), torch.autograd.grad((y_BTD * weight).sum(), x_BTD)[0]

    y_BTD, grad = run(x_BTD)
    x_BTD[2] += 1.0
    other, other_grad = run(x_BTD)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(y_BTD[row], other[row]) == (row != 2)
        assert torch.equal(grad[row], other_grad[row]) == (row != 2)
        assert not grad[row, length:].any()


def test_exact_chunks_and_checkpoints_equal_the_whole() -> None:
    stack = make_stack("lstm", 2, attention_every=1, window=5, dropout=0.2)
    pieces = torch.randn(2, 60, 3, dtype=torch.float64).split(13, 1)
    parameters = list(stack.parameters())

    def run(index: int, state: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        y_BTD, state = stack(pieces[index], state)
        return y_BTD.square().sum(), state

    torch.manual_seed(5)
    loss, state = torch.zeros(()), None
    for index in range(len(pieces)):
        part, state = run(index, state)
        loss = loss + part
    wanted = torch.autograd.grad(loss, parameters)
    torch.manual_seed(5)
    train_in_chunks(run, len(pieces))
    torch.manual_seed(5)
    y_BTD, _ = checkpointed(stack, torch.cat(pieces, 1), chunk=13)
    again = torch.autograd.grad(y_BTD.square().sum(), parameters)
    for parameter, grad, other in zip(parameters, again, wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, other, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-9)


def test_memory_grows_with_the_frames_and_not_with_their_pairs() -> None:
    stack = HybridStack(MinGRU, 4, 8, 1, attention_every=1, num_heads=2, window=16)
    peaks = [peak_bytes(lambda: stack(torch.randn(1, length, 4))[0].sum().backward()) for length in (1024, 4096)]  # noqa: B023
    assert peaks[1] < 4.2 * peaks[0]


def test_layers_stand_in_their_order() -> None:
    stack = HybridStack(MinGRU, 3, 8, 5, attention_every=2, num_heads=2, window=4, dropout=0.3)
    assert "order=['recurrent', 'recurrent', 'attention', 'recurrent', 'recurrent', 'attention', 'recurrent']" in repr(
        stack
    )
    shares = [
        {m.p for m in part.modules() if isinstance(m, nn.Dropout)}
        for part in (*stack.recurrent, *stack.attention, *stack.mlp)
    ]
    assert shares == [{0.3}] * 4 + [{0.0}] + [{0.3}] * 4
    assert len(HybridStack(MinGRU, 3, 8, 3, attention_every=3, num_heads=2, mlp_factor=0).attention) == 1


@pytest.mark.parametrize("cell_class", [MinGRU, LSTM, GRU])
def test_autocast_gives_one_format_and_fp32_states(cell_class: Any) -> None:
    stack = HybridStack(cell_class, 3, 8, 2, num_heads=2, window=4)
    x_BTD = make_frames(LENGTHS).float()
    plain, _ = stack(x_BTD, lengths=LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BTD, end = stack(x_BTD, lengths=LENGTHS)
        step, after = stack.step(x_BTD[:, 0])
    assert y_BTD.dtype == step.dtype == torch.bfloat16
    assert {part.dtype for part in (*end.values(), *after.values())} == {torch.float32}
    torch.testing.assert_close(y_BTD.float(), plain, rtol=0.05, atol=0.1)
    torch.testing.assert_close(step, y_BTD[:, 0], rtol=0.05, atol=0.05)


@some_kinds
def test_state_dict_loads_into_another(kind: str) -> None:
    stack, other = make_stack(kind, window=7), make_stack(kind, window=7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(stack.state_dict())
    x_BTD = make_frames([6, 6])
    assert torch.equal(other(x_BTD)[0], stack(x_BTD)[0])


def test_states_are_refused_where_there_are_none() -> None:
    for options, message in (
        ({}, "causal attention without a window"),
        ({"bidirectional": True}, "attention both ways"),
    ):
        stack = make_stack("mingru", **options)
        _, end = stack(make_frames([4, 4]))
        assert all(name.startswith("recurrent") for name in end)
        for call in (
            lambda: stack.initial_state(2),  # noqa: B023
            lambda: stack(make_frames([4, 4]), end),  # noqa: B023
            lambda: stack.step(make_frames([4, 4])[:, 0]),  # noqa: B023
        ):
            with pytest.raises(ConfigError, match=message):
                call()


def test_misfits_are_refused() -> None:
    for every in (0, 5):
        with pytest.raises(ConfigError, match=rf"attention_every: got {every}, expected 1 to num_layers \(4\)"):
            make_stack("gru", attention_every=every)
    with pytest.raises(ConfigError, match="window: got 7 for a layer that looks both ways"):
        make_stack("gru", bidirectional=True, window=7)
    with pytest.raises(ConfigError, match="num_heads: got 3"):
        make_stack("gru", num_heads=3)
    stack = make_stack("gru", window=7)
    with pytest.raises(ConfigError, match=r"state: got \['h'\], expected \['attention0.count'"):
        stack(make_frames([4]), {"h": torch.zeros(1, 1, 8)})
    with pytest.raises(
        ConfigError, match=r"state\['recurrent0.h'\]: got \(1, 2, 8\) torch.float64 on cpu, expected \(1, 1, 8\)"
    ):
        stack(make_frames([4]), stack.initial_state(2))
    with pytest.raises(ConfigError, match=r"x: got shape \(2, 5\)"):
        stack(torch.zeros(2, 5))
    with pytest.raises(ConfigError, match="gaps: got a tensor, expected none without time_decay"):
        stack(make_frames([4]), gaps=torch.zeros(1, 4))
    with pytest.raises(DataError, match=r"lengths\[1\]: got 0"):
        stack(make_frames([4, 4]), lengths=[4, 0])
