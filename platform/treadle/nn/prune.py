"""Fewer hidden units, or weights set to zero, for a trained stack or network.

Shape letters: H hidden, L layers * directions.

A hidden unit shows in many tensors: in each gate's rows of its own cell, in columns of its own cell and of whatever
reads its output, in norms, convolutions and feed-forward layers on the way. `_Wiring` lists all of them, so that
scores are summed and units taken out in one way for every cell.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.compress import Batch, Metric, Report, compare
from treadle.nn.irregular import TimeDecay
from treadle.nn.layer import Layer
from treadle.nn.network import Network, recurrent_stack_of
from treadle.nn.pooling import AttentionPooling, RowPooling
from treadle.nn.stack import RecurrentStack

__all__ = ["prune_units", "prune_weights"]

_Module = TypeVar("_Module", bound=nn.Module)


def prune_units(
    module: _Module,
    hidden_size: int,
    loss: Callable[[nn.Module], Tensor] | None = None,
    *,
    batches: Sequence[Batch] = (),
    metric: Metric | None = None,
) -> tuple[_Module, Report]:
    """A module with fewer hidden units, of which the most important are kept: smaller and faster everywhere.

    Every layer and direction keeps `hidden_size` units of its own choice; layers that a residual connection joins
    keep the same ones. Feed-forward layers lose the same share of their inner units. The result is an ordinary module
    of the smaller size, to be trained further. Units that nothing reads go first, and taking them out changes nothing;
    but an RMS norm reads every unit: it takes the mean square of those that are left.

    Source: scores after Molchanov et al. 2019, arXiv 1906.10771, section 3, where there is a loss; else the product of
    the norms of what a unit reads and of what reads it.

    Args:
        module: a RecurrentStack or a Network. For a stack alone, no residual connection over its input.
        hidden_size: units to keep in each layer and direction.
        loss: of a module on some rows, for scores by the gradient.
        batches: held-out rows for the report.
        metric: how good a module is on held-out rows; higher is better.

    Returns:
        The smaller copy and what it saves. Without training further, expect errors.

    Raises:
        ConfigError: a module of another kind, a head that is not known, or a size that does not fit.
    """
    stack = recurrent_stack_of(module)
    if not 1 <= hidden_size <= stack.hidden_size:
        raise ConfigError(f"hidden_size: got {hidden_size}, expected 1 to {stack.hidden_size}")
    pruned = copy.deepcopy(module)
    wiring = _wired(pruned)
    _score(wiring, pruned, loss)
    share = hidden_size / stack.hidden_size
    for units in wiring.units():
        units.keep(hidden_size if units.size == stack.hidden_size else max(1, round(units.size * share)))
    _take_out(wiring, pruned, hidden_size)
    return pruned, compare(module, pruned, batches, metric)


def prune_weights(
    module: _Module,
    share: float,
    *,
    per_matrix: bool = False,
    batches: Sequence[Batch] = (),
    metric: Metric | None = None,
) -> tuple[_Module, Report]:
    """The module with the smallest weights of its matrices set to zero.

    For study: zeros are stored and multiplied like other numbers, so this saves neither bytes nor time. Embeddings,
    biases, norms and convolutions stay.

    Source: Han et al. 2015, arXiv 1506.02626, section 3.

    Args:
        module: a RecurrentStack or a Network.
        share: of the weights, from 0 to below 1.
        per_matrix: this share of each matrix; else of all of them together, by size alone.
        batches: held-out rows for the report.
        metric: how good a module is on held-out rows; higher is better.

    Raises:
        ConfigError: a module of another kind, or a share out of range.
    """
    recurrent_stack_of(module)
    if not 0 <= share < 1:
        raise ConfigError(f"share: got {share}, expected 0 to below 1")
    pruned = copy.deepcopy(module)
    matrices = list(_matrices(pruned))
    with torch.no_grad():
        every = [matrix.abs().flatten() for matrix in matrices]
        together = _threshold(torch.cat(every), share)
        for matrix, sizes in zip(matrices, every, strict=True):
            threshold = _threshold(sizes, share) if per_matrix else together
            matrix.masked_fill_(matrix.abs() < threshold, 0.0)
    return pruned, compare(module, pruned, batches, metric)


def _threshold(sizes: Tensor, share: float) -> Tensor:
    """The size that `share` of all is below."""
    return sizes.sort().values[int(share * sizes.numel())]


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.RNNBase)):
            yield from (parameter for parameter in part.parameters(recurse=False) if parameter.ndim == 2)


# ---- which tensors show which units ----


class _Units:
    """Units that go or stay together wherever they show."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept = torch.arange(size)
        self.read = torch.zeros(size, dtype=torch.float64)  # scores of the weights that the units read through
        self.write = torch.zeros(size, dtype=torch.float64)  # and of those that others read them through

    def keep(self, count: int) -> None:
        self.kept = (self.read + self.write).topk(count).indices.sort().values


_Blocks = tuple["_Units | int", ...]
"""What stands along a dimension of a tensor: units, and numbers of other things that stay."""


@dataclass(frozen=True)
class _Wire:
    """A dimension of a parameter, and the units along it."""

    module: nn.Module
    name: str
    dim: int
    blocks: _Blocks
    role: str = ""
    """"read" where a weight feeds the units, "write" where it is fed by them."""

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.name)

    def index(self) -> Tensor:
        """What stays of the dimension."""
        parts, first = [], 0
        for block in self.blocks:
            size = block if isinstance(block, int) else block.size
            parts.append(first + (torch.arange(size) if isinstance(block, int) else block.kept))
            first += size
        return torch.cat(parts)


@dataclass
class _Wiring:
    wires: list[_Wire] = field(default_factory=list)
    initial: list[_Units] = field(default_factory=list)
    """Of the learned initial state's rows."""

    def add(self, module: nn.Module, name: str, dim: int, blocks: _Blocks, role: str = "") -> None:
        if module.get_parameter(name).shape[dim] != sum(b if isinstance(b, int) else b.size for b in blocks):
            raise ConfigError(f"module: got {type(module).__name__}.{name} of an unknown layout, cannot prune it")
        self.wires.append(_Wire(module, name, dim, blocks, role))

    def linear(self, module: nn.Linear, inputs: _Blocks, outputs: _Blocks) -> None:
        self.add(module, "weight", 0, outputs, "read")
        self.add(module, "weight", 1, inputs, "write")
        if module.bias is not None:
            self.add(module, "bias", 0, outputs)

    def units(self) -> list[_Units]:
        found = {id(block): block for wire in self.wires for block in wire.blocks if not isinstance(block, int)}
        return list(found.values())


def _wired(module: nn.Module) -> _Wiring:
    stack, wiring = recurrent_stack_of(module), _Wiring()
    first = stack.layers[0]
    assert isinstance(first, Layer)
    blocks: _Blocks = (stack.input_size,)
    if first.residual:
        if not isinstance(module, Network) or module.embedding is None:
            raise ConfigError(
                "module: got a residual connection over the input, whose features cannot be taken out; "
                "expected a network with an embedding, or an input of another width"
            )
        blocks = tuple(_Units(stack.hidden_size) for _ in range(stack.num_directions))
        wiring.add(module.embedding, "weight", 1, blocks, "read")
    for layer in stack.layers:
        assert isinstance(layer, Layer)
        blocks = _wire_layer(wiring, layer, blocks, stack)
    if isinstance(module, Network):
        _wire_head(wiring, module.head, blocks)
    return wiring


def _wire_layer(wiring: _Wiring, layer: Layer, inputs: _Blocks, stack: RecurrentStack) -> _Blocks:
    if layer.conv is not None:
        wiring.add(layer.conv, "weight", 1, inputs)
        wiring.add(layer.conv, "bias", 0, inputs)
    if layer.norm is not None:
        wiring.add(layer.norm, "weight", 0, inputs)
    outputs = inputs if layer.residual else tuple(_Units(stack.hidden_size) for _ in range(stack.num_directions))
    for name, out in zip(("ahead", "back"), outputs, strict=False):
        assert isinstance(out, _Units)
        state = _wire_cell(wiring, getattr(layer, name), inputs, out)
        wiring.initial.append(state)
        if name in layer.decay:
            wiring.add(layer.decay[name], "weight", 0, (state,))
            wiring.add(layer.decay[name], "bias", 0, (state,))
    if layer.mlp is not None:
        inner = _Units(layer.mlp.up.out_features)
        wiring.add(layer.mlp.norm, "weight", 0, outputs)
        wiring.linear(layer.mlp.up, outputs, (inner,))
        wiring.linear(layer.mlp.down, (inner,), outputs)
    return outputs


def _wire_cell(wiring: _Wiring, cell: nn.Module, inputs: _Blocks, out: _Units) -> _Units:
    """Adds a cell whose output is `out`; gives the units of its state."""
    rnn, project, narrow = (getattr(cell, name, None) for name in ("rnn", "project", "out"))
    if isinstance(rnn, nn.RNNBase):
        for name, parameter in rnn.named_parameters():
            wiring.add(rnn, name, 0, (out,) * (len(parameter) // out.size), "read" if parameter.ndim == 2 else "")
        wiring.add(rnn, "weight_ih_l0", 1, inputs, "write")
        wiring.add(rnn, "weight_hh_l0", 1, (out,), "write")
        return out
    if not isinstance(project, nn.Linear):
        raise ConfigError(f"module: got a cell {type(cell).__name__}, expected one of treadle.nn with fp32 weights")
    state = out
    if isinstance(narrow, nn.Linear):
        state = _Units(narrow.in_features)
        wiring.linear(narrow, (state,), (out,))
    wiring.linear(project, inputs, (state,) * (project.out_features // state.size))
    return state


def _wire_head(wiring: _Wiring, head: nn.Module, inputs: _Blocks) -> None:
    linear, pool = getattr(head, "linear", None), getattr(head, "pool", None)
    if not isinstance(linear, nn.Linear):
        raise ConfigError(f"module: got a head {type(head).__name__}, expected one that is a linear layer")
    if isinstance(pool, RowPooling) and pool.attention is not None:
        attention = pool.attention
        for scorer in (attention.hidden, attention.gate):
            if scorer is not None:
                wiring.linear(scorer, inputs, (scorer.out_features,))
        inputs = inputs * attention.num_heads
    wiring.linear(linear, inputs, (linear.out_features,))


# ---- scores, and taking out ----


def _score(wiring: _Wiring, module: nn.Module, loss: Callable[[nn.Module], Tensor] | None) -> None:
    """Scores of all units, larger for what matters more."""
    gradients: dict[int, Tensor | None] = {}
    if loss is not None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        training = module.training
        found = torch.autograd.grad(loss(module.eval()), parameters, allow_unused=True)
        module.train(training)
        gradients = {id(parameter): gradient for parameter, gradient in zip(parameters, found, strict=True)}
    for wire in wiring.wires:
        if not wire.role:
            continue
        weight = wire.parameter.detach().double()
        if loss is not None:
            gradient = gradients.get(id(wire.parameter))
            weight = torch.zeros_like(weight) if gradient is None else weight * gradient.double()
        along = weight.square().sum([dim for dim in range(weight.ndim) if dim != wire.dim])
        sizes = [block if isinstance(block, int) else block.size for block in wire.blocks]
        for block, scores in zip(wire.blocks, along.split(sizes), strict=True):
            if not isinstance(block, int):
                side = block.read if wire.role == "read" else block.write
                side += scores.cpu()
    if loss is None:
        for units in wiring.units():  # a unit that nothing reads counts nothing, whatever it reads
            units.read, units.write = units.read * units.write, torch.zeros_like(units.write)


def _take_out(wiring: _Wiring, module: nn.Module, hidden_size: int) -> None:
    for wire in wiring.wires:
        old = wire.parameter
        kept = old.detach().index_select(wire.dim, wire.index().to(old.device)).clone()
        setattr(wire.module, wire.name, nn.Parameter(kept, requires_grad=old.requires_grad))
    stack = recurrent_stack_of(module)
    for name, old in list(stack.initial.items()):
        rows = [row[units.kept.to(row.device)] for row, units in zip(old.detach(), wiring.initial, strict=True)]
        stack.initial[name] = nn.Parameter(torch.stack(rows), requires_grad=old.requires_grad)
    for part in module.modules():
        _resize(part)
    stack.hidden_size = hidden_size
    stack.output_size = hidden_size * stack.num_directions
    for layer in stack.layers:
        assert isinstance(layer, Layer)
        for cell in (layer.ahead, layer.back):
            if cell is not None:
                cell.output_size = hidden_size
                cell.state_size = len(wiring.initial[0].kept)
    stack._state_size = len(wiring.initial[0].kept)  # noqa: SLF001
    for index, layer in enumerate(stack.layers):
        if isinstance(layer, Layer) and layer.conv is not None:
            stack._windows[f"conv{index}"] = layer.conv.taps, layer.conv.weight.shape[1]  # noqa: SLF001
    if isinstance(module, Network):
        if module.embedding is not None:
            stack.input_size = module.embedding.embedding_dim
        if isinstance(pool := getattr(module.head, "pool", None), RowPooling):
            pool.output_size = module.head.linear.in_features


def _resize(part: nn.Module) -> None:
    """The sizes that a module keeps beside its weights."""
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, nn.Embedding):
        part.embedding_dim = part.weight.shape[1]
    elif isinstance(part, nn.RMSNorm):
        part.normalized_shape = tuple(part.weight.shape)
    elif isinstance(part, nn.RNNBase):
        part.hidden_size = part.get_parameter("weight_hh_l0").shape[1]
        part.input_size = part.get_parameter("weight_ih_l0").shape[1]
    elif isinstance(part, TimeDecay):
        part.hidden_size = part.weight.shape[0]
    elif isinstance(part, AttentionPooling):
        part.output_size = part.num_heads * part.hidden.in_features
