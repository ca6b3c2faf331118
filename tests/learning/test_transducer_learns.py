"""A transducer learns, in seconds, to name each run of like symbols once, without being told where runs begin.

Symbols last one to four frames, a run may follow another of the same symbol after a frame of silence, and
half of the symbols stand for two labels at once: some rows have more labels than frames.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from treadle.nn import LSTM, MinGRU
from treadle.nn.transducer_decode import transducer_beam, transducer_greedy
from treadle.nn.transducer_model import Joint, Transducer

NUM_SYMBOLS, UPDATES, RATE = 4, 600, 2e-2


def draw(num_rows: int, generator: torch.Generator) -> tuple[Tensor, list[int], list[list[int]]]:
    """Symbols one-hot beside silence; symbol s stands for label s + 1, and for label 5 after it where s is odd."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    frames, rows = [], []
    for _ in range(num_rows):
        shown: list[int] = []
        labels: list[int] = []
        for _ in range(number(1, 4)):
            symbol = number(0, NUM_SYMBOLS - 1)
            silence = [NUM_SYMBOLS] * (1 if shown and shown[-1] == symbol else number(0, 1))
            shown += silence + [symbol] * number(1, 4)
            labels += [symbol + 1] + [NUM_SYMBOLS + 1] * (symbol % 2)
        frames.append(torch.nn.functional.one_hot(torch.tensor(shown), NUM_SYMBOLS + 1).float())
        rows.append(labels)
    return pad_sequence(frames, batch_first=True), [len(row) for row in frames], rows


def train(model: Transducer, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, UPDATES)
    for _ in range(UPDATES):
        x_BTD, frame_lengths, rows = draw(16, generator)
        targets_BU = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        loss = model.loss_sum(x_BTD, frame_lengths, targets_BU, [len(row) for row in rows]) / sum(frame_lengths)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def test_names_each_run_once() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Transducer(LSTM(NUM_SYMBOLS + 1, 32), MinGRU(8, 16), Joint(32, NUM_SYMBOLS + 2))
    train(model, generator)
    model.eval()
    x_BTD, frame_lengths, rows = draw(200, generator)
    assert any(len(row) > length for row, length in zip(rows, frame_lengths, strict=True))
    greedy = transducer_greedy(model, x_BTD, frame_lengths)
    found = transducer_beam(model, x_BTD[:50], frame_lengths[:50], beam=3)
    beam = [list(best[0].labels) for best in found]
    for answers in (greedy, beam):
        right = sum(a == b for a, b in zip(answers, rows, strict=False)) / len(answers)
        assert right >= 0.98, f"{right:.3f}"
