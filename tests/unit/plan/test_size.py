"""Predicted memory beside measured memory, over models, tasks and shapes; and the arithmetic's own rules."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from treadle.data import Batch, Form
from treadle.nn import build_network
from treadle.plan.size import count_parameters, longest_target, moments_per_weight, parameter_sizes, training_bytes
from treadle.spec import (
    AdamWSpec,
    ClassifySpec,
    CtcSpec,
    GruSpec,
    InputKind,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    MinSpec,
    Pooling,
    RmsPropSpec,
    RnnSpec,
    SgdSpec,
    Signature,
)
from treadle.train import PrecisionChoice, build_optimizer, build_task
from treadle.train.budget import Learner, peak_of_update

CELLS = (RnnSpec, LstmSpec, GruSpec, MinGruSpec, MinLstmSpec)
SHAPES = ((4, 30), (16, 24), (64, 12), (2, 200), (32, 50), (8, 100))
FP32 = PrecisionChoice(name="fp32", device="cpu", why="", probe_ms={})
CLOSE = 0.15


def batch_of(signature: Signature, lengths, num_labels: int, *, packed: bool) -> Batch:
    rng = np.random.default_rng(0)
    shape = (sum(lengths),) if packed else (len(lengths), max(lengths))
    if signature.input_kind is InputKind.tokens:
        inputs = rng.integers(0, signature.input_size, shape)
    else:
        inputs = rng.normal(size=(*shape, signature.input_size)).astype(np.float32)
    rows = len(lengths)
    return Batch(
        inputs=inputs,
        lengths_B=np.array(lengths),
        labels_BU=rng.permuted(np.tile(np.arange(num_labels) % signature.num_labels, (rows, 1)), axis=1),
        label_lengths_B=np.full(rows, num_labels),
        rows_B=np.arange(rows),
        weights_B=np.ones(rows, np.float32),
        form=Form.packed if packed else Form.padded,
    )


def measured_and_predicted(model, task, signature, lengths, *, optim=None, packed=None, num_labels=None):
    """Bytes of a whole update, and what arithmetic says of it."""
    torch.manual_seed(0)
    optim = optim or AdamWSpec()
    network = build_network(model, task, signature).train()
    packed = network.packed if packed is None else packed
    if num_labels is None:
        num_labels = max(1, min(lengths) // 3) if isinstance(task, CtcSpec) else 1
    learner = Learner(
        network=network,
        optimizer=build_optimizer(optim, network),
        task=build_task(task, signature.num_labels),
        precision=FP32,
        device=torch.device("cpu"),
        read=lambda _: pytest.fail("no data here"),
    )
    batch = batch_of(signature, lengths, num_labels, packed=packed)
    learner.update(batch)  # makes the moments
    predicted = training_bytes(
        model,
        task,
        signature,
        optim,
        rows=len(lengths),
        time_steps=max(lengths),
        frames=sum(lengths),
        labels=num_labels,
        world=1,
    )
    return peak_of_update(learner, batch), predicted


def lengths_of(shape, *, full: bool) -> list[int]:
    rows, steps = shape
    return [steps if full else steps - (i % 3) * max(1, steps // 40) for i in range(rows)]


def signature_of(chance: random.Random) -> Signature:
    return Signature(
        input_kind=chance.choice(list(InputKind)),
        input_size=chance.choice((4, 16, 60)),
        num_labels=chance.choice((2, 40)),
        max_length=1000,
    )


def error_of(found: tuple[int, int]) -> float:
    measured, predicted = found
    return predicted / measured - 1


def assert_close(found: tuple[int, int], *, within: float = CLOSE) -> None:
    assert abs(error_of(found)) <= within, f"predicted {1 + error_of(found):.3f} of what was measured"


@pytest.mark.parametrize("cell", CELLS)
def test_prediction_is_within_15_percent(cell):
    errors: list[float] = []
    for case in range(6):
        chance = random.Random(f"{cell.kind} {case}")
        model = cell(
            hidden_size=(32, 64, 128, 256)[case % 4],
            num_layers=1 + case % 3,
            bidirectional=case % 2 == 1,
            embedding_size=chance.choice((16, 64, 128)),
        )
        task = chance.choice((ClassifySpec(), CtcSpec(frames_per_step=2)))
        shape = chance.choice(SHAPES if cell is LstmSpec and case % 4 < 3 else SHAPES[:4])
        lengths = lengths_of(shape, full=case > 4)
        errors.append(error_of(measured_and_predicted(model, task, signature_of(chance), lengths)))
        assert abs(errors[-1]) <= CLOSE, model
    assert np.mean(np.abs(errors)) <= CLOSE / 3


OPTIONS = [
    {"dropout": 0.3},
    {"norm": True, "residual": True},
    {"conv_size": 4},
    {"mlp_factor": 2.0},
    {"norm": True, "residual": True, "mlp_factor": 4.0, "dropout": 0.1},
    {"attention_every": 1},
    {"learned_state": True},
    {"expansion": 2.0},
]


@pytest.mark.parametrize(("index", "options"), list(enumerate(OPTIONS)))
def test_prediction_covers_the_options(index, options):
    cells = (MinGruSpec, MinLstmSpec) if "expansion" in options else (CELLS[index % 5], CELLS[(index + 2) % 5])
    for cell, layers in zip(cells, (1, 3), strict=True):
        both = layers == 3 and "conv_size" not in options
        model = cell(hidden_size=64, num_layers=layers, bidirectional=both, embedding_size=64, **options)
        chance = random.Random(index)
        lengths = lengths_of((16, 24), full=False)
        assert_close(measured_and_predicted(model, ClassifySpec(), signature_of(chance), lengths), within=0.12)


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("cell", [LstmSpec, MinGruSpec])
def test_prediction_covers_poolings(cell, pooling):
    signature = signature_of(random.Random(1))
    found = measured_and_predicted(
        cell(hidden_size=64), ClassifySpec(pooling=pooling), signature, lengths_of((16, 40), full=False)
    )
    assert_close(found)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", [LstmSpec, MinGruSpec])
def test_both_forms_are_covered(cell, packed):
    signature = Signature(input_kind=InputKind.frames, input_size=16, num_labels=5, max_length=99)
    lengths = lengths_of((16, 40), full=False)
    assert_close(measured_and_predicted(cell(hidden_size=64), ClassifySpec(), signature, lengths, packed=packed))


@pytest.mark.parametrize(
    ("optim", "moments"),
    [
        (AdamWSpec(), 2),
        (AdamWSpec(ema=0.9), 3),
        (SgdSpec(), 1),
        (SgdSpec(momentum=0.0), 0),
        (RmsPropSpec(), 1),
        (RmsPropSpec(momentum=0.5, ema=0.9), 3),
    ],
)
def test_every_optimizer_keeps_its_moments(optim, moments):
    signature = Signature(input_kind=InputKind.frames, input_size=16, num_labels=5, max_length=99)
    assert moments_per_weight(optim) == moments
    if optim.ema is None:
        assert_close(measured_and_predicted(LstmSpec(hidden_size=200), ClassifySpec(), signature, [6, 6], optim=optim))


def test_plain_descent_keeps_one_moment():
    signature = Signature(input_kind=InputKind.frames, input_size=16, num_labels=5, max_length=99)
    model, task = LstmSpec(hidden_size=200), ClassifySpec()
    found = measured_and_predicted(model, task, signature, [6, 6], optim=SgdSpec())
    assert_close(found)
    assert found[0] < 0.8 * measured_and_predicted(model, task, signature, [6, 6])[0]


@pytest.mark.parametrize("cell", [LstmSpec, MinGruSpec])
def test_ctc_takes_what_its_longest_target_takes(cell):
    signature = Signature(input_kind=InputKind.frames, input_size=16, num_labels=20, max_length=99)
    lengths, model, task = lengths_of((16, 60), full=False), cell(hidden_size=16), CtcSpec(frames_per_step=2)
    found = [measured_and_predicted(model, task, signature, lengths, num_labels=n) for n in (2, 30, 110)]
    for pair in found:
        assert_close(pair)
    assert found[0][0] < 0.9 * found[1][0] < 0.6 * found[2][0]


def test_the_longest_target_is_that_of_rows_that_fit():
    lengths, targets = np.array([3, 5, 5, 9]), np.array([2, 7, 4, 1])
    assert [longest_target(lengths, targets, steps) for steps in (2, 3, 5, 9)] == [0, 2, 7, 7]


def predict(*, rows=8, time_steps=50, world=1):
    model = LstmSpec(hidden_size=64, num_layers=2)
    signature = Signature(input_kind=InputKind.frames, input_size=16, num_labels=5, max_length=99)
    return training_bytes(model, ClassifySpec(), signature, AdamWSpec(), rows=rows, time_steps=time_steps, world=world)


def test_more_takes_more():
    sizes = [predict(rows=rows) for rows in (1, 8, 64, 512)]
    assert sizes == sorted(set(sizes))
    sizes = [predict(time_steps=steps) for steps in (1, 10, 1000)]
    assert sizes == sorted(set(sizes))
    assert predict(world=2, rows=1, time_steps=1) > predict(world=1, rows=1, time_steps=1)


def test_frames_count_where_rows_are_packed():
    signature = Signature(input_kind=InputKind.frames, input_size=16, num_labels=5, max_length=99)

    def size(cell, frames):
        return training_bytes(
            cell(hidden_size=64), ClassifySpec(), signature, AdamWSpec(), rows=10, time_steps=90, frames=frames, world=1
        )

    assert size(MinGruSpec, 300) < 0.5 * size(MinGruSpec, 890)
    assert size(LstmSpec, 300) > 0.95 * size(LstmSpec, 890)


@pytest.mark.parametrize(("cell", "layers"), list(itertools.product(CELLS, (1, 3))))
def test_parameters_are_those_of_each_part(cell, layers):
    options = {"expansion": 1.5} if issubclass(cell, MinSpec) else {}
    model = cell(hidden_size=24, num_layers=layers, embedding_size=10, bidirectional=True, norm=True, **options)
    signature = Signature(input_kind=InputKind.tokens, input_size=30, num_labels=7, max_length=64)
    network = build_network(model, CtcSpec(), signature)
    embedding, *of_layers, head = parameter_sizes(model, CtcSpec(), signature)
    assert embedding == network.embedding.weight.numel()
    assert of_layers == [sum(p.numel() for p in layer.parameters()) for layer in network.stack.layers]
    assert head == sum(p.numel() for p in network.head.parameters())
    assert count_parameters(model, CtcSpec(), signature) == embedding + sum(of_layers) + head
