"""What will happen: pure arithmetic over specs and lengths, with no torch, Ray or network."""

from treadle.plan.augment import check_augment
from treadle.plan.batches import EpochPlan, plan_epoch
from treadle.plan.cards import Capacity, DataCard, SplitCard
from treadle.plan.explain import Explained, Zone, explain
from treadle.plan.job import Plan, make_plan, trainable_rows
from treadle.plan.position import PlanInputs, Position, check_position, plan_inputs
from treadle.plan.repeats import class_repeats
from treadle.plan.size import count_parameters
from treadle.plan.slots import with_slots
from treadle.plan.streaming import streams_of
from treadle.plan.streams import StreamPieces, StreamPlan, plan_streams

__all__ = [
    "Capacity",
    "DataCard",
    "EpochPlan",
    "Explained",
    "Plan",
    "PlanInputs",
    "Position",
    "SplitCard",
    "StreamPieces",
    "StreamPlan",
    "Zone",
    "check_augment",
    "check_position",
    "class_repeats",
    "count_parameters",
    "explain",
    "make_plan",
    "plan_epoch",
    "plan_inputs",
    "plan_streams",
    "streams_of",
    "trainable_rows",
    "with_slots",
]
