"""Each cell learns, in seconds, to recall the first symbol of a row of unknown length.

Guessing scores 1 in 6; what follows the first symbol says nothing about it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treadle.nn import Network, build_network, classify_loss_sum
from treadle.spec import (
    ClassifySpec,
    GruSpec,
    InputKind,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    ModelSpec,
    Pooling,
    RnnSpec,
    Signature,
)

NUM_SYMBOLS, LONGEST, UPDATES = 6, 12, 500
SIGNATURE = Signature(input_kind=InputKind.tokens, input_size=NUM_SYMBOLS, num_labels=NUM_SYMBOLS, max_length=LONGEST)


def draw(num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    tokens_BT = torch.randint(0, NUM_SYMBOLS, (num_rows, LONGEST), generator=generator)
    lengths_B = torch.randint(4, LONGEST + 1, (num_rows,), generator=generator)
    return tokens_BT, lengths_B, tokens_BT[:, 0]


def train(network: Network, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(UPDATES):
        tokens_BT, lengths_B, targets_B = draw(32, generator)
        loss = classify_loss_sum(network(tokens_BT, lengths_B), targets_B) / len(targets_B)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize(
    "model",
    [
        RnnSpec(hidden_size=32, embedding_size=16),
        LstmSpec(hidden_size=32, embedding_size=16),
        GruSpec(hidden_size=32, embedding_size=16),
        MinGruSpec(hidden_size=32, embedding_size=16, num_layers=2),
        MinLstmSpec(hidden_size=32, embedding_size=16, num_layers=2),
    ],
    ids=lambda model: model.kind,
)
def test_recalls_the_first_symbol(model: ModelSpec) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network = build_network(model, ClassifySpec(pooling=Pooling.last), SIGNATURE)
    train(network, generator)
    tokens_BT, lengths_B, targets_B = draw(512, generator)
    with torch.no_grad():
        accuracy = (network(tokens_BT, lengths_B).argmax(-1) == targets_B).float().mean().item()
    assert accuracy >= 0.95, f"{model.kind}: {accuracy:.3f}"
