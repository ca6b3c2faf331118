"""Fewer hidden units: what nothing reads can go, the rest is an ordinary module of the smaller size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cell_oracles import KINDS
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn import GRU, LSTM, RNN, MinGRU, MinLSTM
from treadle.nn.compress import Batch
from treadle.nn.heads import ClassifyHead, CtcHead
from treadle.nn.network import Network
from treadle.nn.prune import prune_units, prune_weights
from treadle.nn.stack import RecurrentStack

HIDDEN, SMALLER = 10, 6
LENGTHS = [8, 1, 5]
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, hidden: int = HIDDEN, pooling: str = "mean", **options: Any) -> Network:
    """A network with weights of size 0.4 everywhere; over a residual connection the embedding is as wide as a layer."""
    torch.manual_seed(0)
    width = hidden * (2 if options.get("bidirectional") else 1) if options.get("residual") else 7
    stack = KINDS[kind](width, hidden, 3, **options)
    head = (
        CtcHead(stack.output_size, 4, 2)
        if pooling == "ctc"
        else ClassifyHead(stack.output_size, 4, pooling, stack.num_directions)
    )
    network = Network(embedding=nn.Embedding(11, width), dropout=0.0, stack=stack, head=head)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.4)
    return network.eval()


def silence(network: Network, units: dict[tuple[int, int], list[int]]) -> None:
    """Zeroes whatever reads the given units of (layer, direction). No norms: those read every unit."""
    stack, columns = network.stack, {}
    with torch.no_grad():
        for (index, direction), numbers in units.items():
            columns.setdefault(index, []).extend(direction * HIDDEN + number for number in numbers)
            cell = getattr(stack.layers[index], ("ahead", "back")[direction])
            if hasattr(cell, "rnn"):
                cell.rnn.weight_hh_l0[:, numbers] = 0.0
        if stack.layers[0].residual:
            columns[-1] = columns[0]  # the embedding's features are the units of the first layer
        for index, numbers in columns.items():
            if index + 1 == stack.num_layers:
                readers = [network.head.linear.weight]
                if (attention := getattr(getattr(network.head, "pool", None), "attention", None)) is not None:
                    readers.append(attention.hidden.weight)
            else:
                layer = stack.layers[index + 1]
                cells = [layer.ahead] if layer.back is None else [layer.ahead, layer.back]
                readers = [c.rnn.weight_ih_l0 if hasattr(c, "rnn") else c.project.weight for c in cells]
            for weight in readers:
                weight[:, numbers] = 0.0


def tokens() -> Tensor:
    return torch.randint(11, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))


def choose(num_layers: int, num_directions: int, *, same: bool) -> dict[tuple[int, int], list[int]]:
    """HIDDEN - SMALLER units of every layer and direction, the same in all layers where a residual joins them."""
    generator = torch.Generator().manual_seed(2)
    chosen = {}
    for direction in range(num_directions):
        for index in range(num_layers):
            if index == 0 or not same:
                numbers = torch.randperm(HIDDEN, generator=generator)[: HIDDEN - SMALLER].tolist()
            chosen[index, direction] = numbers
    return chosen


@every_kind
@pytest.mark.parametrize(
    ("options", "pooling"),
    [
        ({}, "attention"),
        ({"bidirectional": True, "learned_state": True}, "last"),
        ({"residual": True, "learned_state": True}, "max"),
        ({"bidirectional": True, "residual": True}, "attention"),
        ({"conv_size": 3, "bias": False}, "ctc"),
    ],
    ids=["plain", "bidirectional", "residual", "both", "conv"],
)
def test_units_that_nothing_reads_can_go(kind: str, options: dict[str, Any], pooling: str) -> None:
    network = make(kind, pooling=pooling, **options)
    units = choose(3, network.stack.num_directions, same=bool(options.get("residual")))
    silence(network, units)
    pruned, report = prune_units(network, SMALLER, batches=[Batch(x=tokens(), lengths=LENGTHS)])
    assert pruned.stack.hidden_size == SMALLER
    torch.testing.assert_close(pruned(tokens(), LENGTHS), network(tokens(), LENGTHS), rtol=1e-5, atol=1e-5)
    assert report.max_error is not None
    assert report.max_error < 1e-5
    # One unit less than can be spared shows.
    fewer = prune_units(network, SMALLER - 1)[0](tokens(), LENGTHS)
    assert (fewer - network(tokens(), LENGTHS)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_units_are_read_by_their_own_layer(kind: str) -> None:
    torch.manual_seed(0)
    stack, dead = KINDS[kind](7, HIDDEN), [0, 4, 5, 9]
    with torch.no_grad():
        stack.layers[0].ahead.rnn.weight_hh_l0[:, dead] = 0.0
    x = torch.randn(3, 8, 7)
    kept = [unit for unit in range(HIDDEN) if unit not in dead]
    pruned, _ = prune_units(stack, SMALLER)
    torch.testing.assert_close(pruned(x)[0], stack(x)[0][..., kept], rtol=0, atol=1e-6)


def test_layers_that_a_residual_joins_keep_the_same_units() -> None:
    network = make("mingru", residual=True, bidirectional=True)
    pruned, _ = prune_units(network, SMALLER)
    kept = columns_kept(network.embedding.weight, pruned.embedding.weight)
    assert len(set(kept)) == 2 * SMALLER
    assert {unit - HIDDEN for unit in kept[SMALLER:]} != set(kept[:SMALLER])  # each direction chooses for itself
    for old, new in zip(network.stack.layers, pruned.stack.layers, strict=True):
        rows = [unit for unit in kept if unit < HIDDEN]
        torch.testing.assert_close(new.ahead.project.bias[:SMALLER], old.ahead.project.bias[rows], rtol=0, atol=0)
    assert columns_kept(network.head.linear.weight, pruned.head.linear.weight) == kept


def columns_kept(old: Tensor, new: Tensor) -> list[int]:
    return [int((old == column[:, None]).all(0).nonzero()) for column in new.T]


@every_kind
def test_the_rest_is_an_ordinary_network(kind: str) -> None:
    options: dict[str, Any] = {
        "bidirectional": True, "residual": True, "norm": True, "learned_state": True, "mlp_factor": 2.0
    }  # fmt: skip
    if "min" in kind:
        options["expansion"] = 2.0
    pruned, report = prune_units(make(kind, pooling="attention", **options), SMALLER)
    fresh = make(kind, SMALLER, pooling="attention", **options)
    # The scorer's own units stay, and what it reads depends on the widest.
    fresh.head.pool.attention.hidden = nn.Linear(2 * SMALLER, HIDDEN)
    fresh.head.pool.attention.score = nn.Linear(HIDDEN, 1, bias=False)
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(tokens(), LENGTHS), pruned(tokens(), LENGTHS))
    assert report.smaller > 1.7
    before = [parameter.clone() for parameter in pruned.parameters()]
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    pruned.train()(tokens(), LENGTHS).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, pruned.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["lstm", "mingru"])
def test_stack_alone_with_decay_goes_on_from_a_state(kind: str) -> None:
    torch.manual_seed(0)
    stack = KINDS[kind](7, HIDDEN, 2, time_decay=True, learned_state=True, conv_size=2)
    pruned, report = prune_units(stack, SMALLER)
    x, gaps = torch.randn(2, 9, 7), torch.rand(2, 9)
    whole, end = pruned(x, gaps=gaps)
    first, state = pruned(x[:, :4], gaps=gaps[:, :4])
    second, state = pruned(x[:, 4:], state, gaps=gaps[:, 4:])
    assert whole.shape == (2, 9, SMALLER)
    assert state["h"].shape == (2, 2, SMALLER)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-6)
    assert stack.hidden_size == HIDDEN
    assert report.relative_error is None


@every_kind
def test_keeping_all_units_changes_nothing(kind: str) -> None:
    network = make(kind, norm=True, mlp_factor=1.0, residual=True)
    assert torch.equal(prune_units(network, HIDDEN)[0](tokens(), LENGTHS), network(tokens(), LENGTHS))


def test_a_loss_says_which_units_matter() -> None:
    torch.manual_seed(0)
    stack = MinGRU(7, HIDDEN)
    with torch.no_grad():  # by their weights the last four would be kept
        stack.layers[0].ahead.project.weight[SMALLER:HIDDEN] *= 10
        stack.layers[0].ahead.project.weight[HIDDEN + SMALLER :] *= 10
    x = torch.randn(3, 8, 7)
    pruned, _ = prune_units(stack, SMALLER, lambda module: module(x)[0][..., :SMALLER].square().sum())
    torch.testing.assert_close(pruned(x)[0], stack(x)[0][..., :SMALLER], rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in stack.parameters())


def test_inner_units_of_feedforward_layers_go_too() -> None:
    network = make("mingru", mlp_factor=2.0)
    dead = [1, 2, 5, 8, 11, 13, 17, 19]
    with torch.no_grad():
        for layer in network.stack.layers:
            layer.mlp.down.weight[:, dead] = 0.0
    pruned, _ = prune_units(network, SMALLER)
    for old, new in zip(network.stack.layers, pruned.stack.layers, strict=True):
        kept = [unit for unit in range(2 * HIDDEN) if unit not in dead]
        assert new.mlp.up.out_features == 2 * SMALLER
        torch.testing.assert_close(new.mlp.up.bias, old.mlp.up.bias[kept], rtol=0, atol=0)


@every_kind
@pytest.mark.parametrize("per_matrix", [False, True])
def test_small_weights_become_zero(kind: str, per_matrix: bool) -> None:
    network = make(kind, norm=True, mlp_factor=1.0)
    pruned, report = prune_weights(network, 0.6, per_matrix=per_matrix, batches=[Batch(x=tokens())])
    zeros, total = 0, 0
    for (name, old), new in zip(network.named_parameters(), pruned.parameters(), strict=True):
        if old.ndim != 2 or "embedding" in name or "conv" in name or "initial" in name:
            assert torch.equal(old, new), name
            continue
        zero = new == 0
        assert torch.equal(new[~zero], old[~zero])
        if per_matrix:
            assert int(zero.sum()) == int(0.6 * old.numel())
            assert old[zero].abs().max() <= old[~zero].abs().min()
        zeros, total = zeros + int(zero.sum()), total + old.numel()
    assert zeros == pytest.approx(0.6 * total, abs=20)
    assert report.bytes_after == report.bytes_before
    assert report.relative_error is not None
    assert report.relative_error > 0


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="hidden_size: got 11, expected 1 to 10"):
        prune_units(make("gru"), 11)
    with pytest.raises(ConfigError, match="module: got Linear"):
        prune_units(nn.Linear(3, 3), 2)
    with pytest.raises(ConfigError, match="share: got 1"):
        prune_weights(make("gru"), 1.0)
    with pytest.raises(ConfigError, match="residual connection over the input"):
        prune_units(LSTM(HIDDEN, HIDDEN, residual=True), 5)
    network = make("gru")
    network.head = nn.Identity()
    with pytest.raises(ConfigError, match="got a head Identity"):
        prune_units(network, 5)


@pytest.mark.parametrize("cls", [RNN, LSTM, GRU, MinGRU, MinLSTM])
def test_step_of_a_pruned_stack(cls: type[RecurrentStack]) -> None:
    torch.manual_seed(0)
    pruned, _ = prune_units(cls(7, HIDDEN, 2, norm=True), SMALLER)
    x = torch.randn(2, 5, 7)
    whole, _ = pruned(x)
    state, outputs = None, []
    for x_BD in x.unbind(1):
        y_BH, state = pruned.step(x_BD, state)
        outputs.append(y_BH)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=0, atol=1e-6)
