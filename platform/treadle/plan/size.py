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
    ModelSpec,
    OptimSpec,
    RnnSpec,
    SgdSpec,
    Signature,
    TaskSpec,
)

__all__ = ["count_parameters", "training_bytes"]

# Gates of (input projection, recurrent projection) and biases per hidden unit, and the fp32 values a
# frame and channel keeps for the backward pass (measured for torch's fused cells and the plain loop).
_CELLS: dict[type[ModelSpec], tuple[int, int, int, float]] = {
    RnnSpec: (1, 1, 2, 4.0),
    LstmSpec: (4, 4, 8, 17.5),
    GruSpec: (3, 3, 6, 8.0),
    MinGruSpec: (2, 0, 2, 9.0),
    MinLstmSpec: (3, 0, 3, 11.0),
}


def count_parameters(model: ModelSpec, task: TaskSpec, signature: Signature) -> int:
    """Trained values of the network that `treadle.nn.build_network` makes of the same three specs."""
    into, recurrent, biases, _ = _CELLS[type(model)]
    directions = 2 if model.bidirectional else 1
    hidden, tokens = model.hidden_size, signature.input_kind is InputKind.tokens
    width = model.embedding_size if tokens else signature.input_size
    total = signature.input_size * model.embedding_size if tokens else 0
    for _layer in range(model.num_layers):
        total += width if model.norm else 0
        total += directions * hidden * (into * width + recurrent * hidden + biases)
        width = hidden * directions
    return total + (width + 1) * _head_width(task, signature)


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
    kept = _CELLS[type(model)][3]
    frames = task.frames_per_step if isinstance(task, CtcSpec) else 1
    activations = 4 * slots * (width * model.num_layers * kept + 3 * frames * (signature.num_labels + 1))
    return int(state + activations)
