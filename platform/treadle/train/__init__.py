"""From batches to weights: the loop, its parts, and the evaluation. Imports torch, not Ray."""

from treadle.train.evaluate import Evaluation, Evaluator
from treadle.train.export import ModelConfig, export_network, restore_network
from treadle.train.feed import Feed
from treadle.train.fit import Checkpointer, Control, NoPulse, Outcome, Pulse, Reached, Run, fit
from treadle.train.optim import build_optimizer
from treadle.train.precision import PrecisionChoice, choose_precision
from treadle.train.state import TrainState, load_weights, pack, unpack
from treadle.train.task import Answer, Task, build_task, run_network
from treadle.train.world import World

__all__ = [
    "Answer",
    "Checkpointer",
    "Control",
    "Evaluation",
    "Evaluator",
    "Feed",
    "ModelConfig",
    "NoPulse",
    "Outcome",
    "PrecisionChoice",
    "Pulse",
    "Reached",
    "Run",
    "Task",
    "TrainState",
    "World",
    "build_optimizer",
    "build_task",
    "choose_precision",
    "export_network",
    "fit",
    "load_weights",
    "pack",
    "restore_network",
    "run_network",
    "unpack",
]
