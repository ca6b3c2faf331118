"""What the forward and backward pass of a microbatch hold in memory, by arithmetic alone.

Counted as `treadle.nn.footprint.peak_bytes` counts: every tensor that is alive, none of a kernel's own scratch memory.
The constants are numbers of fp32 values, read off the operations' saved tensors on a CPU and checked over a grid of
models and shapes by tests/unit/plan/test_size.py and tests/bench/data_memory.py. On CUDA, where cuDNN keeps less for
the LSTM, they are an upper estimate.

S: microbatches, which are counted at once. H: hidden units. W: width of a layer's input. E: width of what the first
layer reads. A slot is a padded time step of cells that read padded rows (rnn, lstm, gru), a frame of those that read
packed ones (mingru, minlstm).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.spec import (
    ClassifySpec,
    CtcSpec,
    GruSpec,
    InputKind,
    LanguageSpec,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    MinSpec,
    ModelSpec,
    Pooling,
    RnnSpec,
    Signature,
    TagSpec,
    TaskSpec,
)

__all__ = ["Shapes", "activation_peaks", "is_packed", "output_width", "state_size"]

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shapes:
    """Of microbatches.

    Args:
        rows_S: sequences. steps_S: time steps that each is padded to. frames_S: real time steps of all.
        labels_S: of the longest target, for ctc.
        is_full_S: whether there is no padding: nothing is packed, padded or zeroed then.
    """

    rows_S: Values
    steps_S: Values
    frames_S: Values
    labels_S: Values
    is_full_S: NDArray[np.bool_]

    @functools.cached_property
    def slots_S(self) -> Values:
        return self.rows_S * self.steps_S


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


def activation_peaks(
    model: ModelSpec,
    task: TaskSpec,
    signature: Signature,
    shapes: Shapes,
    gradients: tuple[int, ...],
    *,
    recompute: bool = False,
) -> Values:
    """The most values alive beside weights and moments: activations, what passes, and gradients made so far; [S].

    Args:
        gradients: values of the gradients of the input, of each layer, and of the head, which are made from the last
            to the first.
        recompute: whether a layer's activations are computed again on the way back.
    """
    cell, tokens = _CELLS[type(model)], signature.input_kind is InputKind.tokens
    slots_S = shapes.frames_S if cell.packed else shapes.slots_S
    # Of what the first layer reads: one copy for the backward pass, the others until the forward pass is through.
    kept_S, copies_S = _input(model, signature, shapes, slots_S)
    width = model.embedding_size if tokens else signature.input_size
    at_input_S = kept_S + width * slots_S
    peak_S, backward = np.zeros_like(slots_S), list[Values]()
    for layer in range(1, model.num_layers + 1):
        read_S = kept_S
        own, ahead, back = _layer(model, cell, width, first=layer == 1)
        kept_S = kept_S + own * slots_S + _states(model, cell, width) * shapes.rows_S
        states = 2 * state_size(model) if cell.packed else 0
        backward.append(kept_S + back * slots_S + states * shapes.rows_S)
        width = output_width(model)
        around, passing = _around(model, cell, width, layer=layer)
        if recompute:
            peak_S = np.maximum(peak_S, read_S + copies_S + (ahead + width) * slots_S)
            at_cell_S = np.maximum(backward[-1], kept_S + (ahead + width) * slots_S)
            kept_S, backward[-1] = _recomputed(model, slots_S, read_S, kept_S + around * slots_S, at_cell_S, layer)
            continue
        peak_S = np.maximum(peak_S, kept_S + copies_S + ahead * slots_S)
        kept_S = kept_S + around * slots_S
        weights = model.mlp_factor * width**2  # of a feed-forward layer's matrix while its gradient is made
        after_S = np.maximum(copies_S + width * slots_S, passing * slots_S + weights)
        peak_S = np.maximum(peak_S, kept_S + after_S)
    head_S, passing_S = _head(model, task, signature, shapes)
    peak_S = np.maximum(peak_S, kept_S + head_S + passing_S)
    made = gradients[-1]
    for layer in range(model.num_layers, 0, -1):
        in_work_S = _in_work(model, cell, gradients[layer], slots_S)
        peak_S = np.maximum(peak_S, backward[layer - 1] + made + in_work_S)
        made += gradients[layer]
    return np.maximum(peak_S, at_input_S + sum(gradients))


def _recomputed(
    model: ModelSpec, slots_S: Values, read_S: Values, kept_S: Values, at_cell_S: Values, layer: int
) -> tuple[Values, Values]:
    """What stays of a layer that is computed again on the way back, and the most that is alive then.

    Args:
        read_S: before the layer. kept_S: after it, if nothing were computed again. at_cell_S: the most that is alive
            while its cell is computed again or its gradient made.
    """
    width = output_width(model)
    output = 0 if model.bidirectional else _CELLS[type(model)].output * width  # is not made again
    has_attention = model.attention_every > 0 and layer % model.attention_every == 0
    mlp, passing, weights = 0.0, 1.0 * width, 0.0  # the gradient of the output, if nothing else
    if model.mlp_factor:
        mlp, passing = (3 + 2 * model.mlp_factor) * width, (2 + model.mlp_factor) * width
        weights = model.mlp_factor * width**2
    attention = 10 * width + mlp if has_attention else 0.0
    peak_S = np.maximum(at_cell_S, kept_S + (passing - attention) * slots_S + weights) - output * slots_S
    if has_attention:  # a block, and its feed-forward layer another
        inside = 3.5 if model.attention_window is None else 13.0
        peak_S = np.maximum(peak_S, read_S + (12 + inside) * width * slots_S)
    blocks = 1 + (1 + bool(mlp) if has_attention else 0)
    return read_S + blocks * width * slots_S, peak_S


def _in_work(model: ModelSpec, cell: _Cell, gradient: float, slots_S: Values) -> Values | float:
    """Values of a layer's gradient while it is made."""
    if cell.weights:
        return cell.weights * model.hidden_size**2
    own = gradient / (2 if model.bidirectional else 1)
    # A packed cell's weights come after its scan, when a gradient of the size of the state is gone again.
    return np.maximum(0.0, own - state_size(model) * slots_S) if cell.packed else own


def _input(model: ModelSpec, signature: Signature, shapes: Shapes, slots_S: Values) -> tuple[Values, Values]:
    """Values of the input that are kept, and of its further copies."""
    cell, tokens = _CELLS[type(model)], signature.input_kind is InputKind.tokens
    width = model.embedding_size if tokens else signature.input_size
    kept = width * (1 if tokens and model.dropout else 0)
    if cell.packed:
        return slots_S * (kept + (width if tokens else 0)), np.zeros_like(slots_S)
    copies_S = np.where(shapes.is_full_S, 1 if tokens else 0, 3)
    places_S = np.where(shapes.is_full_S, 0, 4)  # where frames stand among slots, 8 bytes each
    return slots_S * (kept + width + (2 if tokens else 0)), slots_S * (width * copies_S + places_S)


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


def _head(model: ModelSpec, task: TaskSpec, signature: Signature, shapes: Shapes) -> tuple[Values, Values]:
    """Values of the head and the loss: of its input laid out anew, and what they take at their peak."""
    width = output_width(model)
    # oneDNN gives time steps first; torch's other kernels a layout that is kept anyway.
    copied_S = shapes.slots_S * (width if isinstance(model, LstmSpec) and not model.bidirectional else 0)
    if isinstance(task, CtcSpec):
        classes, frames_S = signature.num_labels + 1, shapes.slots_S * task.frames_per_step
        return copied_S, frames_S * np.maximum(3 * classes, 2 * classes + 2 * shapes.labels_S + 1)
    if isinstance(task, LanguageSpec | TagSpec):
        classes = signature.input_size if isinstance(task, LanguageSpec) else signature.num_labels
        packed_S = np.where(shapes.is_full_S, 0, width) * shapes.frames_S
        return copied_S, packed_S + 3 * classes * shapes.frames_S
    assert isinstance(task, ClassifySpec)
    return copied_S, _POOLING[task.pooling] * width * shapes.frames_S
