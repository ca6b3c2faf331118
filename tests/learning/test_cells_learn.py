"""The network of a job learns, in seconds, to recall the first symbol of a row of unknown length, with each cell.

Guessing scores 1 in 6; what follows the first symbol, from the same alphabet, says nothing about it. The margins are
of eight seeds: the least score of any cell was 0.977.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treadle.nn import RNN, Network, build_network, classify_loss_sum
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

NUM_SYMBOLS, LONGEST, UPDATES, CHECK_EVERY = 6, 12, 500, 25
SIGNATURE = Signature(input_kind=InputKind.tokens, input_size=NUM_SYMBOLS, num_labels=NUM_SYMBOLS, max_length=LONGEST)
MODELS = [
    RnnSpec(hidden_size=32, embedding_size=16),
    LstmSpec(hidden_size=32, embedding_size=16),
    GruSpec(hidden_size=32, embedding_size=16),
    MinGruSpec(hidden_size=32, embedding_size=16, num_layers=2),
    MinLstmSpec(hidden_size=32, embedding_size=16, num_layers=2),
]


def draw(num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    tokens_BT = torch.randint(0, NUM_SYMBOLS, (num_rows, LONGEST), generator=generator)
    lengths_B = torch.randint(4, LONGEST + 1, (num_rows,), generator=generator)
    return tokens_BT, lengths_B, tokens_BT[:, 0]


@torch.no_grad()
def accuracy(network: Network, rows: tuple[Tensor, Tensor, Tensor]) -> float:
    tokens_BT, lengths_B, targets_B = rows
    return (network(tokens_BT, lengths_B).argmax(-1) == targets_B).float().mean().item()


def train(network: Network, generator: torch.Generator) -> int:
    """The number of updates it took until rows held out were answered."""
    watched = draw(512, generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3 if isinstance(network.stack, RNN) else 5e-3)
    for update in range(UPDATES):
        if update % CHECK_EVERY == 0 and accuracy(network, watched) >= 0.995:
            return update
        tokens_BT, lengths_B, targets_B = draw(32, generator)
        loss = classify_loss_sum(network(tokens_BT, lengths_B), targets_B) / len(targets_B)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return UPDATES


def run(model: ModelSpec, seed: int) -> tuple[float, int]:
    """Accuracy on rows never seen, and the updates made."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    network = build_network(model, ClassifySpec(pooling=Pooling.last), SIGNATURE)
    updates = train(network, generator)
    return accuracy(network, draw(512, generator)), updates


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.kind)
def test_recalls_the_first_symbol(model: ModelSpec) -> None:
    reached, updates = run(model, seed=0)
    assert reached >= 0.95, f"{model.kind}: {reached:.3f} after {updates} updates"
