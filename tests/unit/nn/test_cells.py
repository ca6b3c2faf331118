"""Every cell against independent step loops, torch's own layers, itself in pieces, and its contracts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cell_oracles import KINDS, run_row
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from treadle.errors import ConfigError, DataError
from treadle.nn import GRU, LSTM, RNN, MinGRU
from treadle.nn.cell import State
from treadle.nn.stack import RecurrentStack

every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTHS = [5, 1, 9, 8, 9]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make(kind: str, *args: int, seed: int = 0, **kwargs: object) -> RecurrentStack:
    torch.manual_seed(seed)
    return KINDS[kind](*args, **kwargs)


def make_input(num_features: int = 3, lengths: list[int] = LENGTHS, seed: int = 1) -> Tensor:
    """Frames, with NaN at padded slots: what stands there must never be read."""
    torch.manual_seed(seed)
    x_BTD = torch.randn(len(lengths), max(lengths), num_features)
    for row, length in enumerate(lengths):
        x_BTD[row, length:] = torch.nan
    return x_BTD


def random_state(stack: RecurrentStack, num_rows: int) -> State:
    return {name: torch.rand_like(part) for name, part in stack.initial_state(num_rows).items()}


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize(("bidirectional", "bias"), [(False, True), (True, True), (False, False)])
def test_equals_step_loop(kind: str, dtype: torch.dtype, ragged: bool, bidirectional: bool, bias: bool) -> None:
    lengths = LENGTHS if ragged else [7] * 3
    stack = make(kind, 3, 5, 2, bias=bias, bidirectional=bidirectional).to(dtype)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.4)  # the ReLU cell grows without bound above
    x_BTD = make_input(lengths=lengths).to(dtype)
    state = None if bidirectional else random_state(stack, len(lengths))
    output, end = stack(x_BTD, state, lengths=lengths if ragged else None)
    before = state or stack.initial_state(len(lengths))
    for row, length in enumerate(lengths):
        carries = [{name: part[i, row].double() for name, part in before.items()} for i in range(len(end["h"]))]
        expected, ends = run_row(kind, stack, x_BTD[row, :length], carries)
        torch.testing.assert_close(output[row, :length].double(), expected, rtol=0, atol=TOLERANCE[dtype])
        assert not output[row, length:].any()
        for name, part in end.items():
            wanted = torch.stack([carry[name] for carry in ends])
            torch.testing.assert_close(part[:, row].double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("ours", "theirs"), [(RNN, nn.RNN), (LSTM, nn.LSTM), (GRU, nn.GRU)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equals_torch_over_packed_rows(
    ours: type[RecurrentStack], theirs: Callable[..., nn.RNNBase], bidirectional: bool
) -> None:
    lengths = [3, 40, 1, 200, 77]
    stack = ours(6, 16, 2, bidirectional=bidirectional)
    oracle = theirs(6, 16, 2, bidirectional=bidirectional, batch_first=True)
    for name, parameter in oracle.named_parameters():
        kind, _, place = name.rpartition("_l")
        layer, _, reverse = place.partition("_")
        copied = stack.get_parameter(f"layers.{layer}.{'back' if reverse else 'ahead'}.rnn.{kind}_l0")
        parameter.data.copy_(copied.data)
    x_BTD = make_input(6, lengths).nan_to_num(0.0)
    output, end = stack(x_BTD, lengths=torch.tensor(lengths))
    packed, hidden = oracle(pack_padded_sequence(x_BTD, torch.tensor(lengths), batch_first=True, enforce_sorted=False))
    torch.testing.assert_close(output, pad_packed_sequence(packed, batch_first=True)[0], rtol=0, atol=1e-5)
    for name, wanted in zip("hc", hidden if isinstance(hidden, tuple) else (hidden,), strict=False):
        torch.testing.assert_close(end[name], wanted, rtol=0, atol=1e-5)

    # Same loss, same gradients: of the outputs and of every final state.
    loss = output.square().sum() + sum(part.sin().sum() for part in end.values())
    hiddens = hidden if isinstance(hidden, tuple) else (hidden,)
    wanted_loss = packed.data.square().sum() + sum(part.sin().sum() for part in hiddens)
    loss.backward()
    wanted_loss.backward()
    for name, parameter in oracle.named_parameters():
        kind, _, place = name.rpartition("_l")
        layer, _, reverse = place.partition("_")
        grad = stack.get_parameter(f"layers.{layer}.{'back' if reverse else 'ahead'}.rnn.{kind}_l0").grad
        assert grad is not None
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4)


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["list", "tensor"])
def test_full_rows_need_no_lengths(kind: str, bidirectional: bool, form: str) -> None:
    stack = make(kind, 3, 4, 2, bidirectional=bidirectional)
    x_BTD = make_input(lengths=[6, 6])
    lengths = [6, 6] if form == "list" else torch.tensor([6, 6])
    plain, given = stack(x_BTD), stack(x_BTD, lengths=lengths)
    assert torch.equal(plain[0], given[0])
    # Beside a shorter row, so that the ragged path runs: the full rows keep their values.
    ragged, _ = stack(torch.cat((x_BTD, x_BTD[:1])), lengths=[6, 6, 2])
    torch.testing.assert_close(ragged[:2], plain[0], rtol=0, atol=1e-6)


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rows_do_not_touch_each_other_and_padding_has_no_gradient(kind: str, bidirectional: bool) -> None:
    stack = make(kind, 3, 4, 2, bidirectional=bidirectional, residual=True, norm=True)
    weight_BTH = torch.randn(len(LENGTHS), max(LENGTHS), stack.output_size)

    def run(x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD.clone().requires_grad_()
        output, end = stack(x_BTD, lengths=LENGTHS)
        ((output * weight_BTH).sum() + sum(part.square().sum() for part in end.values())).backward()
        assert x_BTD.grad is not None
        return output.detach(), x_BTD.grad

    x_BTD = make_input()
    output, grad = run(x_BTD)
    changed = 3
    x_BTD[changed] += 1.0
    other_output, other_grad = run(x_BTD)
    assert not torch.equal(output[changed], other_output[changed])
    for row, length in enumerate(LENGTHS):
        assert not grad[row, length:].any()
        assert grad[row, :length].any()
        if row != changed:
            assert torch.equal(output[row], other_output[row])
            assert torch.equal(grad[row], other_grad[row])


@every_kind
@pytest.mark.parametrize("options", [{}, {"residual": True, "norm": True}], ids=["plain", "residual"])
def test_pieces_and_steps_equal_the_whole(kind: str, options: dict[str, bool]) -> None:
    stack = make(kind, 8, 8, 3, **options)
    x_BTD = torch.randn(4, 40, 8)

    def grads(output: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(output.square().mean(), list(stack.parameters())))

    whole, whole_end = stack(x_BTD)
    whole_grads = grads(whole)
    outputs, state = [], None
    for piece in x_BTD.split([1, 7, 32], dim=1):
        output, state = stack(piece, state)
        outputs.append(output)
    steps, step_state = [], None
    for x_BD in x_BTD.unbind(1):
        h_BH, step_state = stack.step(x_BD, step_state)
        steps.append(h_BH)
    for pieces, end in ((torch.cat(outputs, 1), state), (torch.stack(steps, 1), step_state)):
        assert end is not None
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-6)
        for name, part in whole_end.items():
            assert part.dtype == end[name].dtype == torch.float32
            torch.testing.assert_close(end[name], part, rtol=0, atol=1e-6)
        for got, wanted in zip(grads(pieces), whole_grads, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@every_kind
def test_ragged_piece_hands_over_each_rows_own_end(kind: str) -> None:
    stack = make(kind, 3, 5, 2)
    first, second = make_input(lengths=[4, 2, 6]), make_input(lengths=[3, 3, 3], seed=2)
    _, state = stack(first, lengths=[4, 2, 6])
    continued, _ = stack(second, state)
    for row, length in enumerate([4, 2, 6]):
        alone, _ = stack(torch.cat((first[row, :length], second[row]))[None])
        torch.testing.assert_close(continued[row], alone[0, length:], rtol=0, atol=1e-6)


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast_gives_one_format_and_fp32_states(kind: str, bidirectional: bool) -> None:
    stack = make(kind, 3, 4, 2, bidirectional=bidirectional, norm=True)
    x_BTD = make_input().requires_grad_()
    plain, _ = stack(x_BTD, lengths=LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, end = stack(x_BTD, lengths=LENGTHS)
        again, _ = stack(x_BTD, lengths=LENGTHS, final_state=False)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, again)
    assert {part.dtype for part in end.values()} == {torch.float32}
    torch.testing.assert_close(output.float(), plain, rtol=0, atol=0.05)
    output.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in stack.parameters())
    if not bidirectional:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step, after = stack.step(x_BTD[:, 0].detach())
        assert step.dtype == torch.bfloat16
        assert {part.dtype for part in after.values()} == {torch.float32}


def test_bf16_min_cells_carry_fp32_so_that_pieces_are_bit_equal() -> None:
    for kind in ("mingru", "minlstm", "minlstm_raw"):
        stack = make(kind, 8, 16)
        x_BTD = torch.randn(2, 40, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            whole, end = stack(x_BTD)
            first, state = stack(x_BTD[:, :7])
            second, state = stack(x_BTD[:, 7:], state)
        assert torch.equal(torch.cat((first, second), 1), whole)
        assert torch.equal(state["h"], end["h"])


@every_kind
def test_state_dict_names_are_fixed(kind: str) -> None:
    stack = make(kind, 3, 4, 2, bidirectional=True, norm=True)
    names = ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"]
    names = ["project.weight", "project.bias"] if kind.startswith("min") else names
    cells = [f"{direction}.{name}" for direction in ("ahead", "back") for name in names]
    expected = [f"layers.{layer}.{name}" for layer in range(2) for name in ["norm.weight", *cells]]
    assert list(stack.state_dict()) == expected


@every_kind
def test_time_first(kind: str) -> None:
    stack = make(kind, 3, 4, bidirectional=True)
    other = make(kind, 3, 4, bidirectional=True, batch_first=False)
    x_BTD = make_input()
    output, end = stack(x_BTD, lengths=LENGTHS)
    other_output, other_end = other(x_BTD.transpose(0, 1), lengths=LENGTHS)
    assert torch.equal(other_output.transpose(0, 1), output)
    assert torch.equal(other_end["h"], end["h"])


@every_kind
def test_checkpointed_layers_give_the_same_gradients(kind: str) -> None:
    stack = make(kind, 3, 4, 2, bidirectional=True)
    x_BTD = make_input()
    plain = torch.autograd.grad(stack(x_BTD, lengths=LENGTHS)[0].square().sum(), list(stack.parameters()))

    def run(x: Tensor) -> Tensor:
        return stack(x, lengths=LENGTHS)[0]

    output = checkpoint(run, x_BTD, use_reentrant=False)
    assert isinstance(output, Tensor)
    again = torch.autograd.grad(output.square().sum(), list(stack.parameters()))
    assert all(torch.equal(got, wanted) for got, wanted in zip(again, plain, strict=True))


def test_dropout_residual_and_norm_stand_between_layers() -> None:
    stack = make("mingru", 4, 4, 2, residual=True, norm=True, dropout=0.5).eval()
    x_BTD = torch.randn(2, 5, 4)
    first, second = (copy.deepcopy(make("mingru", 4, 4)) for _ in range(2))
    for single, index in ((first, 0), (second, 1)):
        cell = {name.removeprefix(f"layers.{index}."): value for name, value in stack.state_dict().items()}
        single.load_state_dict({f"layers.0.{n}": v for n, v in cell.items() if n.startswith("ahead.")})

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    middle = x_BTD + first(rms(x_BTD))[0]
    expected = middle + second(rms(middle))[0]
    torch.testing.assert_close(stack(x_BTD)[0], expected, rtol=0, atol=1e-6)

    stack.train()
    seen = []
    stack.get_submodule("layers.1.norm").register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    torch.manual_seed(0)
    stack(x_BTD)
    dropped = seen[0].view_as(x_BTD) - x_BTD  # what the first layer added: half of it zero, the rest doubled
    kept = dropped.abs() > 1e-6
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * first(rms(x_BTD))[0][kept], rtol=0, atol=1e-5)


def test_initial_weights() -> None:
    lstm, gru = make("lstm", 3, 8).state_dict(), make("gru", 3, 8).state_dict()
    for state, gates in ((lstm, 4), (gru, 3)):
        for gate in state["layers.0.ahead.rnn.weight_hh_l0"].chunk(gates):
            torch.testing.assert_close(gate @ gate.T, torch.eye(8), rtol=0, atol=1e-5)
    assert lstm["layers.0.ahead.rnn.bias_ih_l0"].tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16
    assert not gru["layers.0.ahead.rnn.bias_ih_l0"].any()


@pytest.mark.parametrize("cell", [MinGRU, LSTM])
def test_bad_calls_say_what_is_wrong(cell: type[RecurrentStack]) -> None:
    stack, both = cell(3, 4), cell(3, 4, bidirectional=True)
    x_BTD = torch.zeros(3, 5, 3)
    with pytest.raises(DataError, match=r"lengths\[1\]: got 0, expected 1 to 5"):
        stack(x_BTD, lengths=[5, 0, 2])
    with pytest.raises(DataError, match=r"lengths\[2\]: got 6"):
        stack(x_BTD, lengths=torch.tensor([5, 1, 6]))
    with pytest.raises(DataError, match="at least one row"):
        stack(x_BTD[:, :0])
    with pytest.raises(ConfigError, match="got 2 lengths, expected 3"):
        stack(x_BTD, lengths=[5, 5])
    with pytest.raises(ConfigError, match="expected one on the CPU"):
        stack(x_BTD, lengths=torch.ones(3, dtype=torch.int64, device="meta"))
    with pytest.raises(ConfigError, match="x: got shape"):
        stack(torch.zeros(3, 5, 4))
    with pytest.raises(ConfigError, match="bidirectional stack"):
        both(x_BTD, both.initial_state(3))
    with pytest.raises(ConfigError, match="bidirectional stack"):
        both.step(x_BTD[:, 0])
    with pytest.raises(ConfigError, match=r"state\['h'\]: got"):
        stack(x_BTD, stack.initial_state(2))
    with pytest.raises(TypeError, match="normalise"):
        cell(3, 4, normalise=True)
