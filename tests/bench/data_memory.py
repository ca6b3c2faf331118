"""Predicted memory of an update beside measured memory, over a grid of models, tasks and shapes, on one thread.

Measured: every tensor alive at the peak of forward, backward, clipping and step, with AdamW's moments.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from recording import record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "plan"))

from test_size import (
    CELLS,
    CLOSE,
    OPTIONS,
    SHAPES,
    lengths_of,
    measured_and_predicted,
    signature_of,
)

from treadle.spec import ClassifySpec, CtcSpec, MinSpec, Pooling

SIZES = (32, 128, 512)
TASKS = (ClassifySpec(), ClassifySpec(pooling=Pooling.attention), CtcSpec(), CtcSpec(frames_per_step=2))
MORE = [*OPTIONS, {"attention_every": 1, "attention_window": 8}, {"conv_size": 4, "norm": True, "mlp_factor": 4.0}]


def grid_of(cell, *, both: bool) -> list[float]:
    """predicted / measured - 1 of every size, number of layers and shape, the rest drawn."""
    found, chance = [], random.Random(f"{cell.kind} {both}")
    for size, layers, shape in itertools.product(SIZES, (1, 2, 3), SHAPES):
        model = cell(
            hidden_size=size, num_layers=layers, bidirectional=both, embedding_size=chance.choice((16, 64, 128))
        )
        lengths = lengths_of(shape, full=chance.random() < 0.25)
        measured, predicted = measured_and_predicted(model, chance.choice(TASKS), signature_of(chance), lengths)
        found.append(predicted / measured - 1)
    return found


def options_of(options: dict) -> list[float]:
    found, chance = [], random.Random(str(options))
    for cell, both, (layers, shape) in itertools.product(CELLS, (False, True), ((1, SHAPES[1]), (3, SHAPES[4]))):
        one_way = "conv_size" in options or "attention_window" in options
        if (both and one_way) or ("expansion" in options and not issubclass(cell, MinSpec)):
            continue
        model = cell(hidden_size=64, num_layers=layers, bidirectional=both, embedding_size=64, **options)
        lengths = lengths_of(shape, full=False)
        measured, predicted = measured_and_predicted(model, chance.choice(TASKS), signature_of(chance), lengths)
        found.append(predicted / measured - 1)
    return found


def main() -> None:
    torch.set_num_threads(1)
    cases: dict[str, list[float]] = defaultdict(list)
    for cell, both in itertools.product(CELLS, (False, True)):
        cases[f"{cell.kind}, {'two directions' if both else 'one direction'}"] = grid_of(cell, both=both)
    for options in MORE:
        cases[", ".join(f"{name}={value}" for name, value in options.items())] = options_of(options)
    rows = [
        (
            name,
            len(errors),
            f"{np.mean(errors):+.1%}",
            f"{min(errors):+.1%}",
            f"{max(errors):+.1%}",
            f"{np.mean(np.abs(errors) <= CLOSE):.0%}",
        )
        for name, errors in cases.items()
    ]
    title = (
        f"Predicted / measured peak memory of an update: sizes {SIZES}, 1 to 3 layers, (rows, time steps) of "
        f"{SHAPES}, tokens and frames, classification and ctc, fp32"
    )
    headers = ["model", "cases", "mean error", "least", "most", f"within {CLOSE:.0%}"]
    record("data_memory", title, "python tests/bench/data_memory.py", headers, rows)


if __name__ == "__main__":
    main()
