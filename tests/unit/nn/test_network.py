"""The network of a job: shapes, pooling, parameter counts and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from treadle.errors import ConfigError, DataError
from treadle.nn import build_network, count_parameters
from treadle.spec import (
    Candidate,
    ClassifySpec,
    CtcSpec,
    GruSpec,
    InputKind,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    ModelSpec,
    Pooling,
    RnnSpec,
    Signature,
    TaskSpec,
)
from treadle.spec.job import Nonlinearity

SIZES: dict[str, Any] = {"hidden_size": 6, "num_layers": 2, "embedding_size": 5}
TOKENS = Signature(input_kind=InputKind.tokens, input_size=11, num_labels=4, max_length=50)
FRAMES = Signature(input_kind=InputKind.frames, input_size=3, num_labels=4, max_length=50)
LENGTHS = [7, 2, 5]

MODELS: list[ModelSpec] = [
    RnnSpec(**SIZES),
    RnnSpec(**SIZES, nonlinearity=Nonlinearity.relu, residual=True, norm=True),
    LstmSpec(**SIZES, bidirectional=True),
    GruSpec(**SIZES, bidirectional=True, residual=True),
    MinGruSpec(**SIZES, bidirectional=True, norm=True),
    MinLstmSpec(**SIZES),
    MinLstmSpec(**SIZES, normalize_gates=False, bidirectional=True),
]
BLOCKS: list[ModelSpec] = [
    LstmSpec(**SIZES, learned_state=True, mlp_factor=1.5),
    MinGruSpec(**SIZES, residual=True, norm=True, conv_size=3, mlp_factor=2.0, expansion=1.5),
    GruSpec(**SIZES, attention_every=2, attention_heads=3, attention_window=3, mlp_factor=1.0),
    MinGruSpec(**SIZES, attention_every=1, attention_heads=2, bidirectional=True),
    MinLstmSpec(**SIZES, learned_state=True, candidate=Candidate.tanh, forget_bias=2.0, bidirectional=True),
]
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.kind)


def make_input(signature: Signature) -> torch.Tensor:
    torch.manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS))
    if signature.input_kind is InputKind.tokens:
        return torch.randint(0, signature.input_size, shape)
    return torch.randn(*shape, signature.input_size)


@pytest.mark.parametrize("model", MODELS + BLOCKS, ids=lambda model: model.kind)
@pytest.mark.parametrize("signature", [TOKENS, FRAMES], ids=["tokens", "frames"])
@pytest.mark.parametrize("task", [CtcSpec(frames_per_step=3), *(ClassifySpec(pooling=pooling) for pooling in Pooling)])
def test_shapes_padding_and_gradients(model: ModelSpec, signature: Signature, task: TaskSpec) -> None:
    network = build_network(model, task, signature)
    x = make_input(signature)
    logits = network(x, LENGTHS)
    lengths = network.label_lengths(LENGTHS)
    if isinstance(task, CtcSpec):
        assert logits.shape == (3, 7 * 3, 4 + 1)
        assert lengths.tolist() == [21, 6, 15]
    else:
        assert logits.shape == (3, 4)
        assert lengths.tolist() == LENGTHS
    # One row alone gives what it gives in company, whatever stands at its padded slots.
    other = x.clone()
    other[1, 2:] = 1 if signature is TOKENS else torch.nan
    again, alone = network(other, torch.tensor(LENGTHS)), network(x[1:2, :2])
    if isinstance(task, CtcSpec):
        again, logits = again[1:2, :6], logits[1:2, :6]
    else:
        again, logits = again[1:2], logits[1:2]
    assert torch.equal(again, logits)
    torch.testing.assert_close(alone, logits, rtol=0, atol=1e-6)
    network(x, LENGTHS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_pooling_is_over_frames(bidirectional: bool) -> None:
    task = {pooling: ClassifySpec(pooling=pooling) for pooling in Pooling if pooling is not Pooling.attention}
    model = GruSpec(**SIZES, bidirectional=bidirectional)
    networks = {pooling: build_network(model, spec, FRAMES) for pooling, spec in task.items()}
    for network in networks.values():
        network.load_state_dict(networks[Pooling.last].state_dict())
    x_BTD = make_input(FRAMES)
    stack, linear = networks[Pooling.last].stack, networks[Pooling.last].head.linear
    h_BTH, _ = stack(x_BTD, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS):
        frames = h_BTH[row, :length]
        last = frames[-1] if not bidirectional else torch.cat((frames[-1, :6], frames[0, 6:]))
        expected = {Pooling.mean: frames.mean(0), Pooling.max: frames.amax(0), Pooling.last: last}
        for pooling, vector in expected.items():
            got = networks[pooling](x_BTD, LENGTHS)[row]
            torch.testing.assert_close(got, linear(vector), rtol=0, atol=1e-6)
            alone = networks[pooling](x_BTD[row : row + 1, :length])[0]
            torch.testing.assert_close(alone, got, rtol=0, atol=1e-6)


def cell_parameters(kind: str, inputs: int, hidden: int) -> int:
    gates = {"rnn": 1, "gru": 3, "lstm": 4}.get(kind)
    if gates is not None:
        return gates * hidden * (inputs + hidden + 2)
    return {"mingru": 2, "minlstm": 3}[kind] * hidden * (inputs + 1)


@every_model
@pytest.mark.parametrize("signature", [TOKENS, FRAMES], ids=["tokens", "frames"])
def test_count_parameters(model: ModelSpec, signature: Signature) -> None:
    directions = 2 if model.bidirectional else 1
    inputs = 5 if signature is TOKENS else 3
    sizes = (inputs, 6 * directions)
    expected = 11 * 5 if signature is TOKENS else 0
    expected += directions * sum(cell_parameters(model.kind, size, 6) for size in sizes)
    expected += sum(sizes) if model.norm else 0
    ctc = build_network(model, CtcSpec(frames_per_step=3), signature)
    assert count_parameters(ctc) == expected + 3 * (4 + 1) * (6 * directions + 1)
    classify = build_network(model, ClassifySpec(), signature)
    assert count_parameters(classify) == expected + 4 * (6 * directions + 1)


def test_dropout_acts_while_training_only() -> None:
    network = build_network(GruSpec(**SIZES, dropout=0.5), CtcSpec(), TOKENS)
    x_BT = make_input(TOKENS)
    assert not torch.equal(network(x_BT), network(x_BT))
    network.eval()
    assert torch.equal(network(x_BT), network(x_BT))


def test_symbol_zero_is_a_symbol() -> None:
    network = build_network(GruSpec(**SIZES), ClassifySpec(), TOKENS)
    network(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    assert network.embedding is not None
    assert network.embedding.weight.grad is not None
    assert network.embedding.weight.grad[0].any()


@pytest.mark.parametrize("task", [CtcSpec(), ClassifySpec(pooling=Pooling.last)], ids=["ctc", "last"])
@every_model
def test_autocast_keeps_the_answer(model: ModelSpec, task: TaskSpec) -> None:
    network = build_network(model, task, TOKENS)
    x_BT = make_input(TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(x_BT, LENGTHS)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), network(x_BT, LENGTHS), rtol=0, atol=0.1)


def test_seed_fixes_the_weights() -> None:
    def weights() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return build_network(LstmSpec(**SIZES), CtcSpec(), TOKENS).state_dict()

    first, second = weights(), weights()
    assert list(first)[:2] == ["embedding.weight", "stack.layers.0.ahead.rnn.weight_ih_l0"]
    assert list(first)[-2:] == ["head.linear.weight", "head.linear.bias"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("model", MODELS + BLOCKS, ids=lambda model: model.kind)
@pytest.mark.parametrize("signature", [TOKENS, FRAMES], ids=["tokens", "frames"])
@pytest.mark.parametrize("task", [CtcSpec(frames_per_step=3), ClassifySpec(pooling=Pooling.attention)])
def test_packed_frames_give_what_padded_ones_give(model: ModelSpec, signature: Signature, task: TaskSpec) -> None:
    network = build_network(model, task, signature)
    x = make_input(signature)
    packed = torch.cat([x[i, :n] for i, n in enumerate(LENGTHS)])
    wanted, got = network(x, LENGTHS), network(packed, torch.tensor(LENGTHS), packed=True)
    assert torch.equal(got, wanted)
    assert network.packed == network.stack.packed


def test_packed_frames_need_lengths_that_fit() -> None:
    network = build_network(MinGruSpec(**SIZES), CtcSpec(), TOKENS)
    with pytest.raises(ConfigError, match="lengths: got none beside packed frames"):
        network(torch.zeros(5, dtype=torch.int64), packed=True)
    with pytest.raises(ConfigError, match="lengths: got 6 frames in all, expected 5"):
        network(torch.zeros(5, dtype=torch.int64), [4, 2], packed=True)


def test_refusals() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OtherModel(ModelSpec):
        kind = "other"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OtherTask(TaskSpec):
        kind = "other"

    with pytest.raises(ConfigError, match="model: got OtherModel, expected one of"):
        build_network(OtherModel(), CtcSpec(), TOKENS)
    with pytest.raises(ConfigError, match="task: got OtherTask"):
        build_network(GruSpec(), OtherTask(), TOKENS)
    network = build_network(GruSpec(**SIZES), CtcSpec(), TOKENS)
    with pytest.raises(DataError, match=r"lengths\[1\]: got 0"):
        network(make_input(TOKENS), [7, 0, 5])
