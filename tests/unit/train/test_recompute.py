"""Activations that are computed again: the same gradients bit for bit, in less memory, as much as the plan says."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from train_rig import SGD, Toy, toy_spec, weights

from treadle.nn import build_network, recompute_layers
from treadle.nn.footprint import peak_bytes
from treadle.plan.size import training_bytes
from treadle.spec import (
    AdamWSpec,
    BatchSpec,
    ClassifySpec,
    CtcSpec,
    GruSpec,
    InputKind,
    LongRows,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    RnnSpec,
    Signature,
    TrainSpec,
)
from treadle.train import build_optimizer, fit

CELLS = (RnnSpec, LstmSpec, GruSpec, MinGruSpec, MinLstmSpec)
OPTIONS = (
    {},
    {"dropout": 0.3},
    {"bidirectional": True},
    {"norm": True, "residual": True, "mlp_factor": 4.0, "dropout": 0.1},
    {"attention_every": 1},
    {"conv_size": 4},
)
TOKENS = Signature(input_kind=InputKind.tokens, input_size=30, num_labels=5, max_length=99)
FRAMES = Signature(input_kind=InputKind.frames, input_size=12, num_labels=5, max_length=99)


def gradients(model, lengths, *, recompute: bool, signature: Signature = TOKENS, state: bool = False) -> torch.Tensor:
    torch.manual_seed(1)
    network = build_network(model, ClassifySpec(), signature).train()
    recompute_layers(network, recompute)
    shape = (len(lengths), max(lengths))
    tokens = signature.input_kind is InputKind.tokens
    x = torch.randint(0, 30, shape) if tokens else torch.randn(*shape, signature.input_size)
    network(x, torch.tensor(lengths)).sin().sum().backward()
    drawn = torch.rand(1)  # the generator stands where it stood
    return torch.cat([*(p.grad.flatten() for p in network.parameters()), drawn])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_the_same_bit_for_bit(cell, options):
    model = cell(hidden_size=8, num_layers=3, embedding_size=6, **options)
    for lengths in ([7, 7, 7], [9, 2, 5, 1]):
        for signature in (TOKENS, FRAMES):
            plain = gradients(model, lengths, recompute=False, signature=signature)
            again = gradients(model, lengths, recompute=True, signature=signature)
            assert torch.equal(plain, again)
            assert plain.abs().max() > 0


def test_a_run_comes_to_the_same_weights():
    toy = Toy(toy_spec(optim=SGD, train=TrainSpec(epochs=2, seed=5)))
    ends = []
    for recompute in (False, True):
        run = toy.run()
        recompute_layers(run.network, recompute)
        fit(run)
        ends.append(weights(run))
    assert torch.equal(*ends)


def test_rows_in_pieces_come_to_the_same_weights():
    batch = BatchSpec(max_slots="6", lanes=2, long_rows=LongRows.chunk)
    model = MinGruSpec(hidden_size=6, num_layers=2, embedding_size=5, dropout=0.2)
    toy = Toy(toy_spec(task=ClassifySpec(), batch=batch, model=model, optim=SGD, train=TrainSpec(epochs=1)))
    ends = []
    for recompute in (False, True):
        run = toy.run()
        recompute_layers(run.network, recompute)
        fit(run)
        ends.append(weights(run))
    assert torch.equal(*ends)


def test_nothing_is_computed_again_without_gradients():
    network = build_network(LstmSpec(hidden_size=4, num_layers=2, embedding_size=4), ClassifySpec(), TOKENS)
    calls: list[int] = []
    network.stack.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    recompute_layers(network)
    x = torch.zeros(2, 3, dtype=torch.int64)
    with torch.no_grad():
        network(x)
    assert len(calls) == 1
    network(x).sum().backward()
    assert len(calls) == 3
    recompute_layers(network, enabled=False)
    network(x).sum().backward()
    assert len(calls) == 4


def measured_and_predicted(model, task, lengths, *, recompute: bool) -> tuple[int, int]:
    """Bytes at the peak of an update, the optimizer's step left out, and what arithmetic says of it."""
    torch.manual_seed(0)
    optim = AdamWSpec()
    network = build_network(model, task, TOKENS).train()
    recompute_layers(network, recompute)
    optimizer = build_optimizer(optim, network)
    x, lengths_B = torch.randint(0, 30, (sum(lengths),)), torch.tensor(lengths)
    labels = max(1, min(lengths) // 3)

    def update() -> None:
        logits = network(x.clone(), lengths_B, packed=True)
        if isinstance(task, CtcSpec):
            targets = torch.ones(len(lengths), labels, dtype=torch.int64)
            counts = torch.full((len(lengths),), labels)
            scores = logits.transpose(0, 1).log_softmax(-1)
            steps = lengths_B * task.frames_per_step
            torch.nn.functional.ctc_loss(scores, targets, steps, counts, reduction="sum").backward()
        else:
            torch.nn.functional.cross_entropy(logits, torch.zeros(len(lengths), dtype=torch.int64)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()
    state = [part for values in optimizer.state.values() for part in values.values()]
    held = sum(4 * part.numel() for part in (*network.parameters(), *state))
    sizes = {"rows": len(lengths), "time_steps": max(lengths), "frames": sum(lengths), "labels": labels, "world": 1}
    return held + peak_bytes(update), training_bytes(model, task, TOKENS, optim, recompute=recompute, **sizes)


@pytest.mark.parametrize("cell", CELLS)
def test_memory_is_less_and_as_predicted(cell):
    chance = random.Random(cell.kind)
    for number, options in enumerate(OPTIONS):
        hidden = chance.choice((64, 96, 128))
        model = cell(hidden_size=hidden, num_layers=(3, 4, 6)[number % 3], embedding_size=64, **options)
        lengths = [40 - (i % 3) for i in range(16)] if number % 2 else [48] * 12
        plain, _ = measured_and_predicted(model, ClassifySpec(), lengths, recompute=False)
        measured, predicted = measured_and_predicted(model, ClassifySpec(), lengths, recompute=True)
        assert measured < plain
        assert abs(predicted / measured - 1) <= 0.15, (model, predicted / measured)


@pytest.mark.parametrize("cell", [LstmSpec, MinGruSpec])
def test_deep_networks_keep_little(cell):
    model = cell(hidden_size=64, num_layers=12, embedding_size=64, norm=True, residual=True, mlp_factor=4.0)
    plain, _ = measured_and_predicted(model, CtcSpec(), [32] * 64, recompute=False)
    measured, predicted = measured_and_predicted(model, CtcSpec(), [32] * 64, recompute=True)
    assert measured < 0.5 * plain
    assert abs(predicted / measured - 1) <= 0.15


def test_the_plan_knows_of_it():
    model = dataclasses.replace(LstmSpec(), num_layers=4)
    sizes = {"rows": 64, "time_steps": 50, "world": 1}
    kept = training_bytes(model, ClassifySpec(), TOKENS, AdamWSpec(), **sizes)
    assert training_bytes(model, ClassifySpec(), TOKENS, AdamWSpec(), recompute=True, **sizes) < 0.6 * kept
