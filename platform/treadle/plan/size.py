"""How big a model is and what memory its training takes, by arithmetic alone."""

from __future__ import annotations

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
    OptimSpec,
    Pooling,
    RnnSpec,
    SgdSpec,
    Signature,
    TaskSpec,
)

__all__ = ["count_parameters", "training_bytes"]

# Gates of (input projection, recurrent projection) and biases per hidden unit, and the fp32 values a
# frame and channel of the state keeps for the backward pass (measured).
_CELLS: dict[type[ModelSpec], tuple[int, int, int, float]] = {
    RnnSpec: (1, 1, 2, 4.0),
    LstmSpec: (4, 4, 8, 17.5),
    GruSpec: (3, 3, 6, 8.0),
    MinGruSpec: (2, 0, 2, 3.0),
    MinLstmSpec: (3, 0, 3, 4.0),
}


def count_parameters(model: ModelSpec, task: TaskSpec, signature: Signature) -> int:
    """Trained values of the network that `treadle.nn.build_network` makes of the same three specs."""
    into, recurrent, biases, _ = _CELLS[type(model)]
    directions = 2 if model.bidirectional else 1
    tokens = signature.input_kind is InputKind.tokens
    width = model.embedding_size if tokens else signature.input_size
    total = signature.input_size * model.embedding_size if tokens else 0
    state, out = _state_size(model), 0
    if isinstance(model, MinSpec) and model.expansion != 1:
        out = state * model.hidden_size
    states = len(("h", "c") if isinstance(model, LstmSpec) else ("h",))
    for layer in range(1, model.num_layers + 1):
        total += width if model.norm else 0
        total += (model.conv_size + 1) * width if model.conv_size else 0
        total += directions * (state * (into * width + recurrent * state + biases) + out)
        total += directions * states * state if model.learned_state else 0
        width = model.hidden_size * directions
        total += _feed_forward(width, model.mlp_factor)
        if model.attention_every and layer % model.attention_every == 0:
            total += width + 4 * width * width + _feed_forward(width, model.mlp_factor)
    return total + _head_parameters(width, task, signature)


def _feed_forward(width: int, factor: float) -> int:
    inner = max(1, round(width * factor))
    return width + 2 * width * inner + inner + width if factor else 0


def _state_size(model: ModelSpec) -> int:
    return round(model.hidden_size * model.expansion) if isinstance(model, MinSpec) else model.hidden_size


def _head_parameters(width: int, task: TaskSpec, signature: Signature) -> int:
    total = (width + 1) * _head_width(task, signature)
    if isinstance(task, ClassifySpec) and task.pooling is Pooling.attention:
        total += ((width + 1) // 2) * (width + 2)
    return total


def _head_width(task: TaskSpec, signature: Signature) -> int:
    if isinstance(task, CtcSpec):
        return task.frames_per_step * (signature.num_labels + 1)
    assert isinstance(task, ClassifySpec)
    return signature.num_labels


def training_bytes(
    model: ModelSpec, task: TaskSpec, signature: Signature, optim: OptimSpec, *, slots: int, world: int
) -> int:
    """Bytes of one worker at its peak, an estimate: weights, gradients, moments, the ranks' sum, activations.

    Accuracy: within a factor of two of the resident growth of a real worker; meant to refuse what
    cannot fit, not to fill a device to the brim.
    """
    moments = 1 if isinstance(optim, SgdSpec) else 2
    copies = 2 + moments + (1 if world > 1 else 0)
    state = 4 * count_parameters(model, task, signature) * copies
    width = model.hidden_size * (2 if model.bidirectional else 1)
    kept = _CELLS[type(model)][3] * _state_size(model) / model.hidden_size + 2 * model.mlp_factor
    if model.attention_every:
        kept += (8 + 2 * model.mlp_factor) / model.attention_every
    frames = task.frames_per_step if isinstance(task, CtcSpec) else 1
    activations = 4 * slots * (width * model.num_layers * kept + 3 * frames * (signature.num_labels + 1))
    return int(state + activations)
