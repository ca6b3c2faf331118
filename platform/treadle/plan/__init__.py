"""What will happen: pure arithmetic over specs and lengths, with no torch, Ray or network."""

from treadle.plan.batches import EpochPlan, plan_epoch
from treadle.plan.job import Capacity, DataCard, Plan, SplitCard, make_plan, trainable_rows
from treadle.plan.size import count_parameters

__all__ = [
    "Capacity",
    "DataCard",
    "EpochPlan",
    "Plan",
    "SplitCard",
    "count_parameters",
    "make_plan",
    "plan_epoch",
    "trainable_rows",
]
