"""How big a model is and what memory its training takes, by arithmetic alone.

Shape letters: N rows, S microbatches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.plan.activations import Shapes, activation_peaks, is_packed, output_width, state_size
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
    OptimSpec,
    Pooling,
    RmsPropSpec,
    RnnSpec,
    SgdSpec,
    Signature,
    TagSpec,
    TaskSpec,
)

__all__ = ["count_parameters", "longest_target", "moments_per_weight", "parameter_sizes", "training_bytes"]

Counts = int | NDArray[np.int64]

# Gates of the input and of the recurrent projection, and biases, per hidden unit.
_GATES: dict[type[ModelSpec], tuple[int, int, int]] = {
    RnnSpec: (1, 1, 2),
    LstmSpec: (4, 4, 8),
    GruSpec: (3, 3, 6),
    MinGruSpec: (2, 0, 2),
    MinLstmSpec: (3, 0, 3),
}


def count_parameters(model: ModelSpec, task: TaskSpec, signature: Signature) -> int:
    """Trained values of the network that `treadle.nn.build_network` makes of the same three specs."""
    return sum(parameter_sizes(model, task, signature))


def parameter_sizes(model: ModelSpec, task: TaskSpec, signature: Signature) -> tuple[int, ...]:
    """Trained values of the embedding (0 for frames), of each layer, and of the head."""
    tokens = signature.input_kind is InputKind.tokens
    width = model.embedding_size if tokens else signature.input_size
    layers: list[int] = []
    for layer in range(1, model.num_layers + 1):
        layers.append(_layer_parameters(model, width, layer))
        width = output_width(model)
    embedding = signature.input_size * model.embedding_size if tokens else 0
    return embedding, *layers, _head_parameters(model, width, task, signature)


def _layer_parameters(model: ModelSpec, width: int, layer: int) -> int:
    into, recurrent, biases = _GATES[type(model)]
    directions = 2 if model.bidirectional else 1
    state, after = state_size(model), output_width(model)
    total = width if model.norm else 0
    total += (model.conv_size + 1) * width if model.conv_size else 0
    total += directions * state * (into * width + recurrent * state + biases)
    if isinstance(model, MinSpec) and model.expansion != 1:
        total += directions * state * model.hidden_size
    if model.learned_state:
        total += directions * state * (2 if isinstance(model, LstmSpec) else 1)
    total += _feed_forward(after, model.mlp_factor)
    if model.attention_every and layer % model.attention_every == 0:
        total += after + 4 * after * after + _feed_forward(after, model.mlp_factor)
    return total


def _feed_forward(width: int, factor: float) -> int:
    inner = max(1, round(width * factor))
    return width + 2 * width * inner + inner + width if factor else 0


def _head_parameters(model: ModelSpec, width: int, task: TaskSpec, signature: Signature) -> int:
    if isinstance(task, LanguageSpec) and task.tied:
        return signature.input_size + (0 if width == model.embedding_size else width * model.embedding_size)
    total = (width + 1) * _head_width(task, signature)
    if isinstance(task, ClassifySpec) and task.pooling is Pooling.attention:
        total += ((width + 1) // 2) * (width + 2)
    return total


def _head_width(task: TaskSpec, signature: Signature) -> int:
    if isinstance(task, CtcSpec):
        return task.frames_per_step * (signature.num_labels + 1)
    if isinstance(task, LanguageSpec):
        return signature.input_size
    if isinstance(task, TagSpec):
        return signature.num_labels
    assert isinstance(task, ClassifySpec)
    return signature.num_labels


def moments_per_weight(optim: OptimSpec) -> int:
    """Values that are kept for each weight from update to update: by the optimizer, and by the mean of weights."""
    mean = 0 if optim.ema is None else 1
    if isinstance(optim, SgdSpec):
        return mean + (1 if optim.momentum else 0)
    if isinstance(optim, RmsPropSpec):
        return mean + (2 if optim.momentum else 1)
    return mean + 2


def longest_target(lengths_N: NDArray[Any], targets_N: NDArray[Any], steps: int) -> int:
    """The most targets of a row of up to `steps` frames: what a microbatch of that length may hold."""
    return int(targets_N[lengths_N <= steps].max(initial=0))


def training_bytes(
    model: ModelSpec,
    task: TaskSpec,
    signature: Signature,
    optim: OptimSpec,
    *,
    rows: Counts,
    time_steps: Counts,
    frames: Counts | None = None,
    labels: Counts | None = None,
    world: int,
    recompute: bool = False,
) -> int:
    """Bytes of all tensors that one worker holds at its peak: weights, moments, gradients, activations, the batch.

    The peak is the largest of these: somewhere in the forward pass, in the loss, in the backward pass with the
    gradients made so far, or where gradients are added up over the ranks.

    Args:
        model, task, signature, optim: of the job.
        rows: sequences of the microbatch; or of several microbatches [S], whose largest peak is wanted.
        time_steps: that each is padded to.
        frames: real time steps of all rows together, which is what packed rows take; None: as many as slots.
        labels: of the longest target, for ctc; None: half as many as its label frames.
        world: ranks.
        recompute: whether a layer's activations are computed again on the way back (`train.recompute`).

    Accuracy: within 15 % of what `treadle.nn.footprint.peak_bytes` measures on a CPU over a whole update in fp32: all
    cells, one and two directions, 1 to 3 layers, sizes of 32 to 512, tokens and frames, both tasks, and every option
    but `attention_window`, which is within 25 % (tests/unit/plan/test_size.py holds it for a part of that,
    tests/bench/data_memory.py prints all). Not in it: what kernels use inside, such as ctc's second table of the size
    of its first; and what an allocator makes of it, which for glibc may be a multiple of small sizes. bf16 takes less.

    Cost: 0.1 ms, and 0.1 s per million microbatches.
    """
    sizes = parameter_sizes(model, task, signature)
    rows_S, steps_S = (np.atleast_1d(np.asarray(count, np.float64)) for count in (rows, time_steps))
    slots_S = rows_S * steps_S
    frames_S = slots_S if frames is None else np.asarray(frames, np.float64)
    label_frames_S = steps_S * (task.frames_per_step if isinstance(task, CtcSpec) else 1)
    shapes = Shapes(
        rows_S=rows_S,
        steps_S=steps_S,
        frames_S=frames_S,
        labels_S=label_frames_S // 2 if labels is None else np.asarray(labels, np.float64),
        is_full_S=np.full(slots_S.shape, frames is not None) & (frames_S == slots_S),
    )
    weights = sum(sizes)
    moments = weights * moments_per_weight(optim)
    added_up = weights * (2 if world > 1 or isinstance(optim, RmsPropSpec) else 1)  # or a root for each gradient
    read_S = frames_S if is_packed(model) else slots_S
    batch_S = read_S * (2 if signature.input_kind is InputKind.tokens else signature.input_size)
    passing_S = np.maximum(activation_peaks(model, task, signature, shapes, sizes, recompute=recompute), added_up)
    return int(4 * (weights + moments + (passing_S + batch_S).max()))
