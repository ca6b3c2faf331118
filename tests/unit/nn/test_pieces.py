"""Rows read in pieces: the gradients of whole rows, for every cell and pooling."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from treadle.errors import ConfigError
from treadle.nn import PieceReader, build_network, train_in_chunks
from treadle.spec import (
    ClassifySpec,
    CtcSpec,
    GruSpec,
    InputKind,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    Pooling,
    RnnSpec,
    Signature,
)

CELLS = [RnnSpec, LstmSpec, GruSpec, MinGruSpec, MinLstmSpec]
SIGNATURE = Signature(input_kind=InputKind.frames, input_size=3, num_labels=4, max_length=100)
LENGTHS = torch.tensor([40, 31])
BOUNDS = [0, 12, 24, 40]


def network_of(model, pooling):
    torch.manual_seed(0)
    return build_network(model, ClassifySpec(pooling=pooling), SIGNATURE).double()


def gradients(network):
    found = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    return found


@pytest.mark.parametrize("pooling", [Pooling.last, Pooling.mean, Pooling.max])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "options",
    [{}, {"norm": True, "residual": True, "learned_state": True}, {"attention_every": 1, "attention_window": 8}],
)
def test_pieces_give_the_gradients_of_whole_rows(cell, pooling, options):
    model = cell(hidden_size=8, num_layers=2, **options)
    network = network_of(model, pooling)
    x_BTD = torch.randn(2, 40, 3, dtype=torch.float64)
    targets = torch.tensor([1, 3])
    whole = functional.cross_entropy(network(x_BTD, LENGTHS), targets, reduction="sum")
    whole.backward()
    expected = gradients(network)
    reader = PieceReader(network=network)

    def run(index, before):
        start, stop = BOUNDS[index], BOUNDS[index + 1]
        after = reader.read(x_BTD[:, start:stop], (LENGTHS - start).clamp(max=stop - start), before)
        if stop < BOUNDS[-1]:
            return None, after
        return functional.cross_entropy(reader.logits(after), targets, reduction="sum"), after

    trained = train_in_chunks(run, len(BOUNDS) - 1)
    assert torch.allclose(trained.loss_sum, whole.detach(), rtol=1e-12)
    for name, grad in gradients(network).items():
        assert torch.allclose(grad, expected[name], rtol=1e-9, atol=1e-12), name


def test_a_network_that_needs_the_whole_row_is_refused():
    ctc = build_network(GruSpec(hidden_size=4), CtcSpec(), SIGNATURE)
    with pytest.raises(ConfigError, match="got a CtcHead, expected a ClassifyHead"):
        PieceReader(network=ctc)
    with pytest.raises(ConfigError, match="pooling: got attention"):
        PieceReader(network=network_of(GruSpec(hidden_size=4), Pooling.attention))
    with pytest.raises(ConfigError, match=r"model\.bidirectional: got true"):
        PieceReader(network=network_of(GruSpec(hidden_size=4, bidirectional=True), Pooling.mean))
