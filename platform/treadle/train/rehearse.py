"""Updates of an epoch's largest microbatches before training begins: too little memory shows at once, not hours later.

Shape letters: N rows that are trained on, G rounds, L lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.errors import InfeasibleError
from treadle.plan import EpochPlan
from treadle.train.budget import Learner, peak_of_update, untouched

__all__ = ["rehearse"]

Ints = NDArray[np.int64]


def rehearse(learner: Learner, plan: EpochPlan, rows_N: Ints, targets_N: NDArray[Any]) -> int:
    """Bytes at the peak of an update, over the largest microbatches of `plan`; 0 where all rows are read in pieces.

    Weights, optimizer and random streams are as before afterwards.

    Args:
        learner: of the job, on the device of the job.
        rows_N: training rows, by number in the data set. targets_N: their targets.

    Raises:
        InfeasibleError: the device has too little memory for one of them.

    Cost: an update of each, at most four, and one more where the optimizer has no moments yet.
    """
    peak = 0
    with untouched(learner):
        for place in _largest(plan, targets_N):
            rows = plan.lane_rows(*place)
            try:
                batch = learner.read(rows_N[rows])
                if not learner.optimizer.state:
                    learner.update(batch)  # makes the moments
                peak = max(peak, peak_of_update(learner, batch))
            except torch.OutOfMemoryError as error:
                raise InfeasibleError(
                    f"memory: an update of {len(rows)} rows x {plan.steps(*place)} time steps needs more than "
                    f"{learner.device} has ({str(error).splitlines()[0]})",
                    hint="a smaller batch.max_slots or model.hidden_size",
                ) from None
    return peak


def _largest(plan: EpochPlan, targets_N: NDArray[Any]) -> list[tuple[int, int]]:
    """(round, lane) of the microbatches of whole rows with the most padded slots, frames, rows, and alignments."""
    whole = slice(len(plan.pieces_G), None)
    if len(plan.pieces_G) == plan.num_rounds:
        return []
    tables = (plan.padded_GL, plan.frames_GL, plan.rows_GL, plan.padded_GL * plan.most_GL(targets_N))
    places = dict.fromkeys(divmod(int(table_GL[whole].argmax()), plan.lanes) for table_GL in tables)
    return [(len(plan.pieces_G) + number, lane) for number, lane in places]
