"""What the forward and backward pass of a microbatch hold in memory, by arithmetic alone.

Counted as `treadle.nn.footprint.peak_bytes` counts: every tensor that is alive, none of a kernel's own scratch memory.
The constants are numbers of fp32 values, read off the operations' saved tensors on a CPU and checked over a grid of
models and shapes by tests/unit/plan/test_size.py and tests/bench/data_memory.py. On CUDA, where cuDNN keeps less for
the LSTM, they are an upper estimate.

H: hidden units. W: width of a layer's input. E: width of what the first layer reads. A slot is a padded time step of
cells that read padded rows (rnn, lstm, gru), a frame of those that read packed ones (mingru, minlstm).
"""

from __future__ import annotations

from dataclasses import dataclass

from treadle.spec import (
    ClassifySpec,
    CtcSpec,
    GruSpec,
    InputKind,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    MinSpec,
    ModelSpec,
    Pooling,
    RnnSpec,
    Signature,
    TaskSpec,
)

__all__ = ["Shape", "activation_peak", "is_packed", "output_width", "state_size"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a microbatch.

    Args:
        rows: sequences. steps: time steps that each is padded to. frames: real time steps of all.
        labels: of the longest target, for ctc.
        is_full: whether there is no padding: nothing is packed, padded or zeroed then.
    """

    rows: int
    steps: int
    frames: int
    labels: int
    is_full: bool

    @property
    def slots(self) -> int:
        return self.rows * self.steps


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """Values per slot and unit of the state.

    Args:
        packed: whether it reads packed frames.
        kept: for the backward pass, by a direction; output: of its output, where that is not among them.
        ahead, ahead_both: what passes while the layer is computed, in one direction and in two.
        back, back_both: what passes while its gradient is computed.
        weights: recurrent matrices of one direction's gradient in work at once, each time step making another.
    """

    packed: bool
    kept: float
    output: float
    ahead: float
    ahead_both: float
    back: float
    back_both: float
    weights: int = 0


_CELLS: dict[type[ModelSpec], _Cell] = {
    RnnSpec: _Cell(packed=False, kept=1, output=1, ahead=1, ahead_both=3, back=0.4, back_both=1.4, weights=3),
    GruSpec: _Cell(packed=False, kept=7, output=1, ahead=3, ahead_both=3, back=0, back_both=0.7, weights=9),
    LstmSpec: _Cell(packed=False, kept=1, output=0, ahead=1, ahead_both=1, back=1, back_both=3),  # and _workspace
    MinGruSpec: _Cell(packed=True, kept=3, output=0, ahead=0, ahead_both=0, back=3, back_both=2),
    MinLstmSpec: _Cell(packed=True, kept=4, output=0, ahead=0, ahead_both=0, back=4, back_both=3),
}


def output_width(model: ModelSpec) -> int:
    """Outputs of a layer, of all its directions."""
    return model.hidden_size * (2 if model.bidirectional else 1)


def is_packed(model: ModelSpec) -> bool:
    """Whether the network reads packed frames, as the layers of its stack do."""
    return _CELLS[type(model)].packed or model.attention_every > 0


def state_size(model: ModelSpec) -> int:
    """Units of the state, per layer and direction."""
    return round(model.hidden_size * model.expansion) if isinstance(model, MinSpec) else model.hidden_size


def activation_peak(
    model: ModelSpec, task: TaskSpec, signature: Signature, shape: Shape, gradients: tuple[int, ...]
) -> float:
    """The most values alive beside weights and moments: activations, what passes, and gradients made so far.

    Args:
        gradients: values of the gradients of the input, of each layer, and of the head, which are made from the last
            to the first.
    """
    cell, tokens = _CELLS[type(model)], signature.input_kind is InputKind.tokens
    slots = shape.frames if cell.packed else shape.slots
    # Of what the first layer reads: one copy for the backward pass, the others until the forward pass is through.
    kept, copies = _input(model, signature, shape, slots)
    width = model.embedding_size if tokens else signature.input_size
    at_input = kept + width * slots
    peak, backward = 0.0, list[float]()
    for layer in range(1, model.num_layers + 1):
        own, ahead, back = _layer(model, cell, width, first=layer == 1)
        kept += own * slots + _states(model, cell, width) * shape.rows
        peak = max(peak, kept + copies + ahead * slots)
        backward.append(kept + back * slots + (2 * state_size(model) * shape.rows if cell.packed else 0))
        width = output_width(model)
        around, passing = _around(model, cell, width, layer=layer)
        kept += around * slots
        weights = model.mlp_factor * width**2  # of a feed-forward layer's matrix while its gradient is made
        peak = max(peak, kept + copies + width * slots, kept + passing * slots + weights)
    head, passing = _head(model, task, signature, shape)
    peak = max(peak, kept + head + passing)
    made = gradients[-1]
    for layer in range(model.num_layers, 0, -1):
        peak = max(peak, backward[layer - 1] + made + _in_work(model, cell, gradients[layer], slots))
        made += gradients[layer]
    return max(peak, at_input + sum(gradients))


def _in_work(model: ModelSpec, cell: _Cell, gradient: float, slots: int) -> float:
    """Values of a layer's gradient while it is made."""
    if cell.weights:
        return cell.weights * model.hidden_size**2
    own = gradient / (2 if model.bidirectional else 1)
    # A packed cell's weights come after its scan, when a gradient of the size of the state is gone again.
    return max(0.0, own - state_size(model) * slots) if cell.packed else own


def _input(model: ModelSpec, signature: Signature, shape: Shape, slots: int) -> tuple[float, float]:
    """Values of the input that are kept, and of its further copies."""
    cell, tokens = _CELLS[type(model)], signature.input_kind is InputKind.tokens
    width = model.embedding_size if tokens else signature.input_size
    kept = width * (1 if tokens and model.dropout else 0)
    if cell.packed:
        return slots * (kept + (width if tokens else 0)), 0.0
    copies = (1 if tokens else 0) if shape.is_full else 3
    places = 0 if shape.is_full else 4  # where frames stand among slots, 8 bytes each
    return slots * (kept + width + (2 if tokens else 0)), slots * (width * copies + places)


def _layer(model: ModelSpec, cell: _Cell, width: int, *, first: bool) -> tuple[float, float, float]:
    """Values per slot of a layer that reads frames of `width`: kept, passing ahead, passing back."""
    state, out = state_size(model), model.hidden_size
    both = model.bidirectional
    kept = (2 if both else 1) * (cell.kept * state + _workspace(model, width))
    if both:
        kept += 2 * out * max(cell.output, 1)  # the two side by side
    else:
        kept += out * max(cell.output, 1 if state != out else 0)
    kept += width * ((1 if first else 2) if model.norm else 0)
    kept += width * (model.conv_size + (0 if cell.packed else 1) if model.conv_size else 0)
    ahead, back = (cell.ahead_both, cell.back_both) if both else (cell.ahead, cell.back)
    flipped = width if both and not cell.packed else 0
    return kept + flipped, ahead * state + flipped * (1 if first else 2), back * state


def _states(model: ModelSpec, cell: _Cell, width: int) -> float:
    """Values per row that a layer keeps: states before the first frame, and one time step more of the workspace."""
    directions = 2 if model.bidirectional else 1
    if isinstance(model, LstmSpec):
        return directions * (8 * model.hidden_size + 6.6 * max(model.hidden_size, width))
    return 0.0 if isinstance(model, GruSpec) else directions * state_size(model)


def _around(model: ModelSpec, cell: _Cell, width: int, *, layer: int) -> tuple[float, float]:
    """Values per slot of what stands behind a cell, of `width`: kept, and passing."""
    kept = 0.0
    anew = not (cell.output or model.bidirectional)  # whether the cell's own output is kept beside what is made of it
    dropping = model.dropout > 0 and layer < model.num_layers
    if dropping:
        kept += width * (2 if anew else 1)
    elif model.residual and layer > 1 and anew:
        kept += width
    mlp = (3 + 2 * model.mlp_factor + (1 + model.mlp_factor if dropping else 0)) * width if model.mlp_factor else 0.0
    kept += mlp
    passing = (2 + model.mlp_factor) * width if mlp else 0.0
    if model.attention_every and layer % model.attention_every == 0:
        kept += 10 * width + mlp
        passing = max(passing, (3.5 if model.attention_window is None else 13.0) * width)
    return kept, passing


def _workspace(model: ModelSpec, width: int) -> float:
    """What oneDNN's LSTM keeps; within 10 % of what it says (tests/unit/plan/test_size.py)."""
    if not isinstance(model, LstmSpec):
        return 0.0
    return 9.1 * model.hidden_size + 6.6 * max(model.hidden_size, width)


_POOLING = {Pooling.mean: 1.0, Pooling.last: 1.0, Pooling.max: 3.0, Pooling.attention: 3.7}


def _head(model: ModelSpec, task: TaskSpec, signature: Signature, shape: Shape) -> tuple[float, float]:
    """Values of the head and the loss: of its input laid out anew, and what they take at their peak."""
    width = output_width(model)
    # oneDNN gives time steps first; torch's other kernels a layout that is kept anyway.
    copied = shape.slots * width if isinstance(model, LstmSpec) and not model.bidirectional else 0
    if isinstance(task, CtcSpec):
        classes, frames = signature.num_labels + 1, shape.slots * task.frames_per_step
        return float(copied), float(frames * max(3 * classes, 2 * classes + 2 * shape.labels + 1))
    assert isinstance(task, ClassifySpec)
    return float(copied), _POOLING[task.pooling] * shape.frames * width
