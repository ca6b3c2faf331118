"""What all cells share: forms of input, restarts, options around the cell, and refusals.

The values themselves are checked in test_cells.py; here one form or option must equal another.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cell_oracles import KINDS
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from treadle.errors import ConfigError, DataError
from treadle.nn import debug_checks, from_torch
from treadle.nn.cell import Reading, State
from treadle.nn.frames import groups_of_like_length
from treadle.nn.rows import Rows
from treadle.nn.stack import RecurrentStack

every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTHS = [5, 1, 30, 8, 30, 9]
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "block": {"residual": True, "norm": True, "conv_size": 3, "mlp_factor": 2.0},
    "learned": {"learned_state": True},
    "decay": {"time_decay": True, "learned_state": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS)


def make(kind: str, options: str, **more: object) -> RecurrentStack:
    torch.manual_seed(0)
    stack = KINDS[kind](4, 4, 2, **OPTIONS[options], **more)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "initial" in name or "conv" in name or "decay" in name:
                parameter.copy_(torch.rand_like(parameter))  # their own initial values are mostly zeros
    return stack


def make_gaps(stack: RecurrentStack, *shape: int) -> Tensor | None:
    return torch.rand(shape) if stack.time_decay else None


def offsets_of(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def states_close(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for name, part in wanted.items():
        assert got[name].dtype == part.dtype
        close(got[name], part)


@every_kind
@pytest.mark.parametrize(
    ("options", "bidirectional"),
    [(options, both) for options in OPTIONS for both in (False, True) if not (both and options == "block")],
)
def test_every_form_of_input_gives_the_same(kind: str, options: str, bidirectional: bool) -> None:
    stack = make(kind, options, bidirectional=bidirectional)
    rows = Rows.of_lengths(LENGTHS, device=torch.device("cpu"))
    x_ND, gaps_N = torch.randn(rows.num_frames, 4), make_gaps(stack, rows.num_frames)
    alone = [
        stack(x[None], gaps=None if gaps_N is None else gaps_N[begin:end][None])
        for (begin, end), x in zip(itertools.pairwise(offsets_of(LENGTHS)), x_ND.split(LENGTHS), strict=True)
    ]
    wanted_ND = torch.cat([y[0] for y, _ in alone])
    wanted = {name: torch.cat([end[name] for _, end in alone], dim=1) for name in alone[0][1]}

    packed, end = stack(x_ND, offsets=offsets_of(LENGTHS), gaps=gaps_N)
    close(packed, wanted_ND)
    states_close(end, wanted)

    x_BTD = rows.pad(x_ND).masked_fill(~rows.valid_BT[..., None], torch.nan)
    gaps_BT = None if gaps_N is None else rows.pad(gaps_N)
    padded, end = stack(x_BTD, lengths=LENGTHS, gaps=gaps_BT)
    close(padded, rows.pad(wanted_ND))
    states_close(end, wanted)

    if gaps_N is None:
        sequence = pack_padded_sequence(rows.pad(x_ND), torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
        output, end = stack(sequence)
        close(pad_packed_sequence(output, batch_first=True)[0], rows.pad(wanted_ND))
        assert torch.equal(output.batch_sizes, sequence.batch_sizes)
        states_close(end, wanted)


@every_kind
@every_option
def test_a_restart_equals_a_row_of_its_own(kind: str, options: str) -> None:
    stack = make(kind, options)
    x_ND, starts_N = torch.randn(20, 4), torch.zeros(20, dtype=torch.bool)
    starts_N[[4, 5, 6, 12, 15]] = True  # row 0: frames 0 to 12, row 1: 13 to 19
    starts_N[13] = options == "plain"  # also the first frame of a row, whose state must not enter
    gaps_N = make_gaps(stack, 20)
    offsets = [0, 13, 20]
    before = {name: torch.rand_like(part) for name, part in stack.initial_state(2).items()}
    got, end = stack(x_ND, before, offsets=offsets, starts=starts_N, gaps=gaps_N)

    begins = sorted({*offsets, *starts_N.nonzero()[:, 0].tolist()})
    carried = [begin in (0, 13) and not starts_N[begin] for begin in begins[:-1]]
    fresh = stack.initial_state(len(carried))
    state = {
        name: torch.stack(
            [
                before[name][:, begin // 13] if carries else part[:, piece]
                for piece, (begin, carries) in enumerate(zip(begins, carried, strict=False))
            ],
            dim=1,
        )
        for name, part in fresh.items()
    }
    if gaps_N is not None:  # decay at a gap of 0 is 1 here, so that pieces can say that a fresh state does not fade
        with torch.no_grad():
            for layer in stack.layers:
                layer.decay["ahead"].bias.zero_()  # type: ignore[union-attr,index]
        got, end = stack(x_ND, before, offsets=offsets, starts=starts_N, gaps=gaps_N)
        fresh_at = [begin for begin, carries in zip(begins, carried, strict=False) if not carries]
        gaps_N = gaps_N.index_fill(0, torch.tensor(fresh_at), 0.0)
    wanted, piece_end = stack(x_ND, state, offsets=begins, gaps=gaps_N)
    close(got, wanted)
    ends = [i for i, begin in enumerate(begins[1:]) if begin in offsets]
    states_close(end, {name: part[:, ends] for name, part in piece_end.items()})

    # One frame at a time, and in chunks, the same flags give the same.
    state, outputs = {name: part[:, :1] for name, part in before.items()}, []
    for n in range(13):
        gap = None if gaps_N is None else gaps_N[n : n + 1]
        y, state = stack.step(x_ND[n : n + 1], state, starts=starts_N[n : n + 1], gaps=gap)
        outputs.append(y)
    close(torch.cat(outputs), got[:13])
    states_close(state, {name: part[:, :1] for name, part in end.items()})
    state, outputs = {name: part[:, :1] for name, part in before.items()}, []
    for chunk in (slice(0, 1), slice(1, 5), slice(5, 13)):
        gaps = None if gaps_N is None else gaps_N[None, chunk]
        y, state = stack(x_ND[None, chunk], state, starts=starts_N[None, chunk], gaps=gaps)
        outputs.append(y[0])
    close(torch.cat(outputs), got[:13])
    states_close(state, {name: part[:, :1] for name, part in end.items()})


@every_kind
def test_a_restart_cuts_both_directions(kind: str) -> None:
    stack = make(kind, "learned", bidirectional=True)
    x_ND, starts_N = torch.randn(20, 4), torch.zeros(20, dtype=torch.bool)
    starts_N[[0, 3, 9, 19]] = True
    got, _ = stack(x_ND[None], starts=starts_N[None])
    wanted, _ = stack(x_ND, offsets=[0, 3, 9, 19, 20])
    close(got[0], wanted)


@every_kind
@every_option
def test_pieces_equal_the_whole(kind: str, options: str) -> None:
    stack = make(kind, options)
    x_BTD, gaps_BT = torch.randn(2, 80, 4), make_gaps(stack, 2, 80)

    def gradients(output: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(output.square().mean(), list(stack.parameters()), allow_unused=True))

    whole, whole_end = stack(x_BTD, gaps=gaps_BT)
    outputs, state, begin = [], None, 0
    for size in (1, 7, 64, 8):
        gaps = None if gaps_BT is None else gaps_BT[:, begin : begin + size]
        y, state = stack(x_BTD[:, begin : begin + size], state, gaps=gaps)
        outputs.append(y)
        begin += size
    assert state is not None
    close(torch.cat(outputs, 1), whole)
    states_close(state, whole_end)
    for got, wanted in zip(gradients(torch.cat(outputs, 1)), gradients(whole), strict=True):
        close(got, wanted, 1e-5)


@every_kind
def test_learned_state_is_where_rows_begin_and_gets_gradients(kind: str) -> None:
    stack = make(kind, "learned")
    x_BTD = torch.randn(3, 4, 4)
    y, _ = stack(x_BTD)
    given, _ = stack(x_BTD, {name: part.detach() for name, part in stack.initial_state(3).items()})
    close(y, given)
    zeros = {name: torch.zeros_like(part) for name, part in stack.initial_state(3).items()}
    assert not torch.allclose(y, stack(x_BTD, zeros)[0], atol=1e-3)
    starts = torch.zeros(3, 4, dtype=torch.bool)
    starts[:, 2] = True
    for output in (y, stack(x_BTD, zeros, starts=starts)[0]):
        output.square().sum().backward()
        for parameter in stack.initial.values():
            assert parameter.grad is not None
            assert parameter.grad.abs().min() > 0
            parameter.grad = None


@pytest.mark.parametrize("kind", ["mingru", "minlstm", "minlstm_raw"])
@pytest.mark.parametrize("candidate", ["g", "tanh", "identity"])
def test_expansion_widens_the_state_and_projects_back(kind: str, candidate: str) -> None:
    torch.manual_seed(0)
    stack = KINDS[kind](3, 6, 2, expansion=2.5, candidate=candidate)
    wide = KINDS[kind](3, 15, candidate=candidate)
    names = ("layers.0.ahead.project.weight", "layers.0.ahead.project.bias")
    wide.load_state_dict({name: stack.state_dict()[name] for name in names})
    x_BTD = torch.randn(2, 9, 3)
    _, end = stack(x_BTD)
    assert tuple(end["h"].shape) == (2, 2, 15)
    middle = wide(x_BTD)[0] @ stack.get_parameter("layers.0.ahead.out.weight").T
    again, _ = stack.layers[1].ahead(  # type: ignore[union-attr]
        middle.flatten(0, 1),
        {"h": torch.zeros(2, 15)},
        Reading(rows=Rows.full(2, 9, torch.device("cpu"))),
    )
    close(stack(x_BTD)[0], again.view(2, 9, 6))


def test_convolution_is_causal_and_starts_as_the_identity() -> None:
    plain, block = KINDS["mingru"](4, 4), KINDS["mingru"](4, 4, conv_size=4)
    block.load_state_dict(plain.state_dict(), strict=False)
    x_BTD = torch.randn(1, 10, 4)
    close(block(x_BTD)[0], plain(x_BTD)[0])
    block = make("mingru", "block")
    changed = x_BTD.clone()
    changed[:, 6] += 1.0
    difference = (block(x_BTD)[0] - block(changed)[0]).abs().sum(-1)[0]
    assert not difference[:6].any()
    assert difference[6:].all()


@every_kind
def test_decay_fades_the_state_with_time(kind: str) -> None:
    stack = make(kind, "decay")
    x_BTD = torch.randn(1, 3, 4)
    state = {name: torch.rand_like(part) for name, part in stack.initial_state(1).items()}
    zeros = {name: torch.zeros_like(part) for name, part in state.items()}
    gone, _ = stack(x_BTD, state, gaps=torch.tensor([[1e4, 0.0, 0.0]]))
    close(gone, stack(x_BTD, zeros, gaps=torch.tensor([[1e4, 0.0, 0.0]]))[0])
    assert not torch.allclose(gone, stack(x_BTD, state, gaps=torch.zeros(1, 3))[0], atol=1e-3)


def test_torch_forms_of_the_state_are_taken() -> None:
    gru, lstm = make("gru", "plain"), make("lstm", "plain")
    x_BTD, h, c = torch.randn(2, 3, 4), torch.rand(2, 2, 4), torch.rand(2, 2, 4)
    assert torch.equal(gru(x_BTD, h)[0], gru(x_BTD, {"h": h})[0])
    assert torch.equal(lstm(x_BTD, (h, c))[0], lstm(x_BTD, {"h": h, "c": c})[0])


def test_rows_of_like_length_run_together() -> None:
    lengths = [500, 3, 490, 2, 3, 480]
    groups = groups_of_like_length(Rows.of_lengths(lengths, device=torch.device("cpu")), 8)
    assert [group.tolist() for group in groups] == [[0, 2, 5], [1, 3, 4]]
    close_lengths = Rows.of_lengths(list(range(90, 101)), device=torch.device("cpu"))
    assert len(groups_of_like_length(close_lengths, 8)) == 1


@every_kind
def test_bad_arguments_are_named(kind: str) -> None:
    stack = make(kind, "plain")
    x_ND, x_BTD = torch.zeros(6, 4), torch.zeros(2, 3, 4)
    cases: list[tuple[type[Exception], str, Tensor, dict[str, object]]] = [
        (ConfigError, "x: got shape.*expected .frames, 4. beside offsets", torch.zeros(6, 5), {"offsets": [0, 6]}),
        (ConfigError, r"x: got shape \(6, 4\), expected \(rows, time steps, 4\)", x_ND, {}),
        (ConfigError, "offsets: got 0 to 5, expected 0 to 6", x_ND, {"offsets": [0, 2, 5]}),
        (ConfigError, "offsets: got 1 to 6", x_ND, {"offsets": [1, 6]}),
        (ConfigError, "offsets: got shape", x_ND, {"offsets": torch.zeros(2, 2, dtype=torch.int64)}),
        (ConfigError, "offsets: got .*float32", x_ND, {"offsets": torch.tensor([0.0, 6.0])}),
        (DataError, r"offsets\[1:3\]: got 2 to 2", x_ND, {"offsets": [0, 2, 2, 6]}),
        (DataError, r"offsets\[1:3\]: got 5 to 4", x_ND, {"offsets": [0, 5, 4, 6]}),
        (ConfigError, "lengths: got a value beside packed frames", x_ND, {"offsets": [0, 6], "lengths": [6]}),
        (ConfigError, r"starts: got shape \(3,\)", x_BTD, {"starts": torch.zeros(3, dtype=torch.bool)}),
        (ConfigError, "starts: got torch.float32", x_BTD, {"starts": torch.zeros(2, 3)}),
        (ConfigError, "gaps: got a tensor, expected none without time_decay", x_BTD, {"gaps": torch.zeros(2, 3)}),
    ]
    for error, match, x, arguments in cases:
        with pytest.raises(error, match=match):
            stack(x, **arguments)  # type: ignore[arg-type]
    good = stack.initial_state(2)
    for bad, match in (
        ({**good, "h": good["h"][:, :1]}, r"state\['h'\]: got \(2, 1, 4\) torch.float32 on cpu, expected \(2, 2, 4\)"),
        ({**good, "h": good["h"].bfloat16()}, "got .* torch.bfloat16 .* expected .* torch.float32"),
        ({**good, "h": good["h"].to("meta")}, "on meta, expected .* on cpu"),
        ({"x": good["h"]}, r"state: got \['x'\], expected"),
    ):
        with pytest.raises(ConfigError, match=match):
            stack(x_BTD, bad)
        with pytest.raises(ConfigError, match=match):
            stack.step(x_BTD[:, 0], bad)
    with pytest.raises(ConfigError, match="gaps: got none, expected time since"):
        make(kind, "decay")(x_BTD)
    with pytest.raises(ConfigError, match="x: got shape"):
        stack.step(x_BTD)


@every_kind
def test_things_that_are_no_frames_lengths_or_marks_are_named(kind: str) -> None:
    stack, x_BTD = make(kind, "plain"), torch.zeros(2, 3, 4)
    cases: list[tuple[str, object, dict[str, object]]] = [
        ("x: got torch.int64, expected torch.float32 like the weights", x_BTD.long(), {}),
        ("x: got torch.bfloat16, expected torch.float32", x_BTD.bfloat16(), {}),
        ("x: got torch.float64, expected torch.float32", x_BTD.double(), {}),
        ("x: got ndarray, expected a tensor", x_BTD.numpy(), {}),
        ("lengths: got shape .2,. of torch.float32, expected whole numbers", x_BTD, {"lengths": torch.ones(2)}),
        ("lengths: got .3.0, 2.5., expected whole numbers", x_BTD, {"lengths": [3.0, 2.5]}),
        ("lengths: got shape .2, 1. of torch.int64", x_BTD, {"lengths": torch.ones(2, 1, dtype=torch.int64)}),
        ("starts: got list, expected a tensor", x_BTD, {"starts": [[0] * 3] * 2}),
        ("state: got something else than tensors", x_BTD, {"state": [3, 2]}),
    ]
    for match, x, arguments in cases:
        with pytest.raises(ConfigError, match=match):
            stack(x, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_weights_in_half_precision_are_refused_where_the_state_would_be_too(kind: str) -> None:
    stack = make(kind, "plain").bfloat16()
    x_BTD = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    for call in (lambda: stack(x_BTD), lambda: stack.step(x_BTD[:, 0])):
        with pytest.raises(ConfigError, match=r"weights: got torch\.bfloat16, expected torch\.float32"):
            call()
    mine, _ = make("mingru", "plain").bfloat16()(x_BTD)
    assert mine.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_of_torch_keep_their_weights(kind: type[nn.RNNBase], bidirectional: bool, batch_first: bool) -> None:
    options = {"nonlinearity": "relu"} if kind is nn.RNN else {}
    theirs = kind(3, 5, 2, bidirectional=bidirectional, batch_first=batch_first, **options).double().eval()
    mine = from_torch(theirs)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    wanted, hidden = theirs(x)
    got, state = mine(x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for part, name in zip(hidden if isinstance(hidden, tuple) else (hidden,), "hc", strict=False):
        torch.testing.assert_close(state[name], part, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="expected torch's RNN, LSTM or GRU"):
        from_torch(nn.LSTM(3, 5, proj_size=2))


def test_a_stack_says_what_it_is() -> None:
    text = repr(KINDS["minlstm"](3, 4, 2, expansion=2.0))
    assert "3, 4, num_layers=2, bidirectional=False, residual=False, expansion=2.0" in text


def test_bad_options_are_named() -> None:
    make_mingru, make_rnn = KINDS["mingru"], KINDS["rnn_tanh"]
    for match, call in (
        ("candidate: got 'relu'", lambda: make_mingru(3, 4, candidate="relu")),
        ("expansion: got 0", lambda: make_mingru(3, 4, expansion=0.0)),
        ("conv_size: got 1", lambda: make_mingru(3, 4, conv_size=1)),
        ("conv_size: got a causal", lambda: make_mingru(3, 4, conv_size=4, bidirectional=True)),
        ("mlp_factor: got -1", lambda: make_mingru(3, 4, mlp_factor=-1)),
        ("num_layers: got 0", lambda: make_mingru(3, 4, 0)),
        ("hidden_size: got 0", lambda: make_mingru(3, 0)),
        ("dropout: got 1.5", lambda: make_mingru(3, 4, 2, dropout=1.5)),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
    from treadle.nn import RNN

    with pytest.raises(ConfigError, match="nonlinearity: got 'gelu'"):
        RNN(3, 4, nonlinearity="gelu")
    assert make_rnn(3, 4).hidden_size == 4


@pytest.mark.parametrize("kind", ["mingru", "lstm"])
def test_debug_checks_find_nan_where_it_enters(kind: str) -> None:
    stack, x_BTD = make(kind, "plain"), torch.zeros(2, 3, 4)
    x_BTD[1, 2, 0] = torch.nan
    assert stack(x_BTD)[0][1, 2].isnan().all()  # without the flag nothing waits for the device
    with debug_checks():
        with pytest.raises(DataError, match=r"x\[1, 2, 0\]: got nan"):
            stack(x_BTD)
        stack(x_BTD, lengths=[3, 2])  # a padded slot may hold anything
