"""int8 weights: the products are exact, the answers stay near, and what is stated was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cell_oracles import KINDS
from safetensors.torch import load, save
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn import MinGRU, int8
from treadle.nn.cell import Reading
from treadle.nn.compress import Batch, Limits, serialised_bytes
from treadle.nn.heads import ClassifyHead, CtcHead
from treadle.nn.hybrid import HybridStack
from treadle.nn.int8 import Int8Cell, Int8Embedding, Int8Linear, Recurrence, kernel_status, round_rows
from treadle.nn.network import Network
from treadle.nn.quantize import check_quantised, quantize
from treadle.nn.rows import Rows

LENGTHS = [9, 1, 30, 7, 12]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "residual": True, "norm": True},
    {"conv_size": 3, "mlp_factor": 2.0, "residual": True, "norm": True, "learned_state": True},
]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "bidirectional", "everything"])
EVERYTHING_ALLOWED = Limits(speedup=None, relative_error=None)


def rounded_product(x_NK: Tensor, weight_GK: Tensor, bias_G: Tensor) -> Tensor:
    """What int8 arithmetic should give: both sides rounded to 127 parts of their row's largest, then exact."""
    x_most, w_most = (part.abs().amax(1, keepdim=True) for part in (x_NK, weight_GK))
    x_whole = (x_NK * (torch.full_like(x_most, 127) / x_most)).round().double()
    w_whole = (weight_GK / (w_most / 127)).round().double()
    return (x_whole @ w_whole.T) * (x_most / 127) * (w_most / 127).T + bias_G


def test_the_kernel_is_built() -> None:
    assert kernel_status().available, kernel_status().detail


@pytest.mark.parametrize("num_frames", [1, 2, 33, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 31), (13, 40), (64, 33), (257, 9), (512, 64)])
def test_products_are_exact(num_frames: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(num_frames + inputs)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(num_frames, inputs)
    y = Int8Linear(weight, bias)(x)
    torch.testing.assert_close(y.double(), rounded_product(x, weight, bias), rtol=2e-6, atol=2e-6)


def test_extreme_frames() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(40, 24), torch.randn(40))
    x = torch.randn(6, 24)
    x[0] = 0.0
    x[1] = 1e-42  # 127 / 1e-42 is no fp32
    x[2, 3], x[3, 23] = torch.nan, -torch.inf
    x[4] *= 1e30
    y = layer(x)
    assert torch.equal(y[0], layer.bias)
    assert torch.equal(y[1], layer.bias)
    assert y[2:4].isnan().all()
    torch.testing.assert_close(y[4] / 1e30, layer(x[4:5] / 1e30)[0] - layer.bias, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[5:], layer(x[5:]))


def test_threads_change_nothing() -> None:
    torch.manual_seed(0)
    stack, _ = quantize(KINDS["lstm"](64, 64, 2))
    x = torch.randn(40, 33, 64)
    one, _ = stack(x)
    torch.set_num_threads(2)  # the suite sets it to one again
    assert torch.equal(stack(x)[0], one)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("recurrence", Recurrence)
def test_kernel_does_what_the_torch_form_does(recurrence: Recurrence, reverse: bool) -> None:
    torch.manual_seed(0)
    hidden, modules = 20, {Recurrence.lstm: nn.LSTM, Recurrence.gru: nn.GRU}
    module = modules.get(recurrence, nn.RNN)
    cell = Int8Cell.of(recurrence, module(7, hidden))
    rows = Rows.of_lengths(LENGTHS, device=torch.device("cpu"))
    marked, num_frames = torch.rand(rows.num_frames) < 0.2, rows.num_frames
    state = {name: torch.randn(len(LENGTHS), hidden) for name in cell.state_names}
    reset = {name: torch.randn(1, hidden) for name in cell.state_names}
    plain = Reading(rows=rows, reverse=reverse)
    for reading in (
        plain,
        dataclasses.replace(plain, decay=torch.rand(num_frames, hidden)),
        dataclasses.replace(plain, starts_N=marked),
        dataclasses.replace(plain, starts_N=marked, reset=reset, decay=torch.rand(num_frames, hidden)),
    ):
        pre = torch.randn(num_frames, cell.from_h.out_features)
        y, last = cell._run(pre, state, reading)
        expected, expected_last = cell._run_in_torch(pre, state, reading)
        # The last bit of a state may tip a rounding over, which is then off by one part in 127 of a weight: how often
        # hangs on the processor's own tanh and fused sums (none, one or two of these 1,180 values so far).
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-3)
        assert (y - expected).abs().mean() < 1e-5
        for name, part in expected_last.items():
            torch.testing.assert_close(last[name], part, rtol=0, atol=4e-3)


@pytest.mark.parametrize("kind", ["rnn_relu", "lstm", "gru", "minlstm"])
def test_without_a_kernel_the_same_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stack, _ = quantize(KINDS[kind](40, 24, 2, bidirectional=True))
    x = torch.randn(3, 9, 40)
    expected, _ = stack(x, lengths=[9, 1, 4])
    monkeypatch.setattr(int8, "_kernel", lambda: None)  # what it gives where there is no compiler
    y, _ = stack(x, lengths=[9, 1, 4])
    torch.testing.assert_close(y, expected, rtol=0, atol=4e-3)
    assert (y - expected).abs().mean() < 1e-5


@every_kind
@every_option
def test_stack_stays_near_and_keeps_its_ways(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    stack = KINDS[kind](64, 64, 2, **options).eval()
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.5)
    x = torch.randn(len(LENGTHS), max(LENGTHS), 64)
    batches = [Batch(x=x, lengths=LENGTHS), Batch(x=torch.randn(2, 11, 64))]
    quantised, report = quantize(stack, batches, limits=EVERYTHING_ALLOWED)
    assert report.relative_error is not None
    assert 0 < report.relative_error < 0.02
    assert report.smaller > 3.4
    with torch.inference_mode():
        y, state = quantised(x, lengths=LENGTHS)
        expected, expected_state = stack(x, lengths=LENGTHS)
        assert y.shape == expected.shape
        assert {name: (part.shape, part.dtype) for name, part in state.items()} == {
            name: (part.shape, part.dtype) for name, part in expected_state.items()
        }
        assert not y[1, 1:].any()
        # Alone as in company, whatever stands at padded slots.
        alone, _ = quantised(x[3:4, :7])
        torch.testing.assert_close(alone[0], y[3, :7], rtol=0, atol=2e-6)
        if not stack.bidirectional:
            check_pieces_and_steps(quantised, x)


def check_pieces_and_steps(stack: nn.Module, x: Tensor) -> None:
    whole, end = stack(x)
    first, state = stack(x[:, :11])
    second, state = stack(x[:, 11:], state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(state, end, rtol=0, atol=2e-6)
    outputs, state = [], None
    for x_BD in x.unbind(1):
        y_BH, state = stack.step(x_BD, state)
        outputs.append(y_BH)
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru", "mingru"])
def test_restarts_are_rows_of_their_own(kind: str) -> None:
    torch.manual_seed(0)
    stack, _ = quantize(KINDS[kind](32, 32, 2, bidirectional=True, learned_state=True))
    x, starts = torch.randn(1, 12, 32), torch.zeros(1, 12, dtype=torch.bool)
    starts[0, 5] = True
    y, _ = stack(x, starts=starts)
    pieces = torch.cat((stack(x[:, :5])[0], stack(x[:, 5:])[0]), dim=1)
    torch.testing.assert_close(y, pieces, rtol=0, atol=2e-6)


@every_kind
def test_a_stack_of_weights_is_smaller_by_3_5(kind: str) -> None:
    stack = KINDS[kind](256, 256, 2)
    quantised, report = quantize(stack)
    assert report.smaller >= 3.5
    assert report.bytes_before == sum(4 * parameter.numel() for parameter in stack.parameters())
    assert report.bytes_after == len(save(quantised.state_dict())) - len_of_header(quantised)
    assert report.bytes_after < 0.28 * report.bytes_before
    assert report.faster is None
    assert report.relative_error is None


def len_of_header(module: nn.Module) -> int:
    return len(save(module.state_dict())) - sum(t.numel() * t.element_size() for t in module.state_dict().values())


@pytest.mark.parametrize("kind", ["lstm", "gru", "minlstm"])
def test_state_dict_loads_into_a_quantised_twin(kind: str) -> None:
    torch.manual_seed(0)
    networks = [make_network(kind, pooling="attention") for _ in range(2)]
    (one, _), (other, _) = (quantize(network, embeddings=True) for network in networks)
    tokens = torch.randint(50, (3, 9))
    assert not torch.equal(one(tokens), other(tokens))
    saved = load(save(one.state_dict()))
    assert {str(value.dtype) for value in saved.values()} == {"torch.int8", "torch.float32"}
    assert saved["stack.layers.0.ahead.project.int8" if "min" in kind else "stack.layers.0.ahead.from_h.int8"].shape[
        1
    ] == (20 if "min" in kind else 48)
    other.load_state_dict(saved)
    assert torch.equal(one(tokens), other(tokens))


def make_network(kind: str, pooling: str = "mean", **options: Any) -> Network:
    stack = KINDS[kind](20, 48, 2, **options)
    head = ClassifyHead(stack.output_size, 60, pooling, stack.num_directions)
    return Network(embedding=nn.Embedding(50, 20), dropout=0.1, stack=stack, head=head).eval()


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "attention"])
def test_network(pooling: str) -> None:
    torch.manual_seed(0)
    network = make_network("gru", pooling, bidirectional=True)
    tokens = torch.randint(50, (len(LENGTHS), max(LENGTHS)))
    quantised, report = quantize(
        network, [Batch(x=tokens, lengths=LENGTHS)], embeddings=True, limits=EVERYTHING_ALLOWED
    )
    assert isinstance(quantised.embedding, Int8Embedding)
    assert isinstance(quantised.head.linear, Int8Linear)
    assert report.relative_error is not None
    assert 0 < report.relative_error < 0.02
    assert not quantised.training
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_attention_layers_become_int8_too() -> None:
    torch.manual_seed(0)
    stack = HybridStack(KINDS["gru"], 48, 48, 2, attention_every=1, window=8).eval()
    x = torch.randn(2, 20, 48)
    quantised, report = quantize(stack, [Batch(x=x, lengths=[20, 5])], limits=EVERYTHING_ALLOWED)
    assert not any(type(part) is nn.Linear or isinstance(part, nn.GRU) for part in quantised.modules())
    assert report.relative_error is not None
    assert 0 < report.relative_error < 0.03
    whole, _ = quantised(x)
    first, state = quantised(x[:, :9])
    second, _ = quantised(x[:, 9:], state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=0, atol=2e-6)


def test_ctc_network_is_compared_at_real_frames_only() -> None:
    torch.manual_seed(0)
    stack = KINDS["mingru"](20, 48)
    network = Network(embedding=nn.Embedding(50, 20), dropout=0.0, stack=stack, head=CtcHead(48, 9, 2)).eval()
    tokens = torch.randint(50, (2, 30))
    padded = quantize(network, [Batch(x=tokens, lengths=[3, 30])], limits=EVERYTHING_ALLOWED)[1]
    apart = quantize(network, [Batch(x=tokens[:1, :3]), Batch(x=tokens[1:])], limits=EVERYTHING_ALLOWED)[1]
    assert padded.mean_error == pytest.approx(apart.mean_error, rel=1e-3)
    assert padded.relative_error == pytest.approx(apart.relative_error, rel=1e-3)


def test_report_states_what_was_measured() -> None:
    torch.manual_seed(0)
    network = make_network("lstm")
    tokens = torch.randint(50, (4, 25))
    metric = {id(network): 0.9}
    quantised, report = quantize(network, [Batch(x=tokens)], lambda module: metric.get(id(module), 0.85))
    if report.kept:  # whether it is faster depends on the machine
        assert isinstance(quantised.stack.layers[0].ahead, Int8Cell)
        assert report.reason == ""
    else:
        assert quantised is network
        assert report.reason.startswith("speedup")
    assert report.latency_before_s is not None
    assert report.latency_after_s is not None
    assert report.faster == pytest.approx(report.latency_before_s / report.latency_after_s)
    assert (report.num_rows, report.num_steps) == (4, 25)
    assert report.max_error is not None
    assert report.mean_error is not None
    assert report.agreement is not None
    assert report.max_error >= report.mean_error > 0
    assert 0 <= report.agreement <= 1
    assert (report.metric_before, report.metric_after) == (0.9, 0.85)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(speedup=1e6), "speedup"),
        (Limits(speedup=None, relative_error=1e-9), "relative_error"),
        (Limits(speedup=None, agreement=1.1), "agreement"),
        (Limits(speedup=None, metric_drop=0.01), "metric_drop"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_beyond_the_limits_the_original_comes_back(limits: Limits, reason: str) -> None:
    torch.manual_seed(0)
    network = make_network("mingru")
    metric = {id(network): 0.9}
    batches = [Batch(x=torch.randint(50, (4, 25)))]
    result, report = quantize(network, batches, lambda module: metric.get(id(module), 0.85), limits=limits)
    assert result is network
    assert not report.kept
    assert report.reason.startswith(f"{reason}: got ")


def test_nan_is_beyond_every_limit() -> None:
    torch.manual_seed(0)
    network = make_network("gru")
    quantised, _ = quantize(network)
    with torch.no_grad():
        quantised.head.linear.bias[0] = torch.nan
    report = check_quantised(network, quantised, [Batch(x=torch.randint(50, (4, 25)))], limits=Limits(speedup=None))
    assert not report.kept


def test_rounding_to_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 90)
    weight[2] = 0.0
    whole, scale = round_rows(weight)
    assert int(whole.abs().max()) == 127
    assert scale[2] == 0
    assert not whole[2].any()
    assert ((whole * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    layer = Int8Linear(weight, None)
    assert torch.equal(layer.int8_GK, whole)
    assert torch.equal(layer.dequantised(), whole * scale[:, None])


def test_refusals() -> None:
    network = make_network("gru")
    with pytest.raises(ConfigError, match="module: got Linear"):
        quantize(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"got torch\.float64 on cpu"):
        quantize(make_network("gru").double())
    quantised, _ = quantize(network)
    with pytest.raises(ConfigError, match="int8 weights, expected fp32"):
        quantize(quantised)
    frames = torch.randn(1, 3, 20, requires_grad=True)
    with pytest.raises(ConfigError, match="asks for a gradient"):
        quantised.stack(frames)
    with torch.no_grad():
        quantised.stack(frames)
    assert serialised_bytes(quantised) < serialised_bytes(network)


def test_a_stack_too_small_to_shrink_is_given_back() -> None:
    stack = MinGRU(4, 4)
    same, report = quantize(stack)
    assert same is stack
    assert not report.kept
    assert report.reason.startswith("bytes: got")
