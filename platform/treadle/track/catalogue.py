"""Every number a run may log: its name, unit, meaning and good direction.

One table drives the metric rows (an unknown name is a bug, track/log.py), the W&B metric
definitions, the terminal and the report, so that what is logged is what is shown
(tests/unit/track/test_catalogue.py).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from treadle.errors import InternalError
from treadle.spec.job import ClassifySpec, CtcSpec, LanguageSpec, TagSpec, TaskSpec

__all__ = ["Direction", "Metric", "catalogue", "evaluation_names", "headline_name"]


class Direction(enum.Enum):
    """Which way a number should go; `level` for numbers that only describe."""

    up = "up"
    down = "down"
    level = "level"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One logged number.

    Args:
        name: `<group>/<name>`, as it stands in metrics.jsonl.
        unit: what one counts, or "share" for a number from 0 to 1, or "" for a bare number.
        meaning: one sentence for people.
        good: the direction that is better.
    """

    name: str
    unit: str
    meaning: str
    good: Direction = Direction.level

    @property
    def group(self) -> str:
        return self.name.split("/", 1)[0]


_UP, _DOWN = Direction.up, Direction.down

_FIXED = (
    Metric(
        name="trainer/update",
        unit="updates",
        meaning="Updates so far, refused ones included; the x axis of every curve.",
    ),
    Metric(name="trainer/epoch", unit="epochs", meaning="Passes over the training rows so far, with the begun part."),
    Metric(
        name="trainer/frames_seen", unit="frames", meaning="Real time steps trained on so far, padding not counted."
    ),
    Metric(name="train/lr", unit="", meaning="Learning rate of the latest update."),
    Metric(name="train/grad_norm", unit="", meaning="Global gradient norm before clipping, latest update."),
    Metric(
        name="guard/skipped",
        unit="updates",
        meaning="Updates refused so far: their gradient was not finite, or far too large.",
        good=_DOWN,
    ),
    Metric(name="guard/rate_factor", unit="", meaning="What roll-backs have multiplied the learning rate by."),
    Metric(name="guard/loss_scale", unit="", meaning="What fp16 losses are multiplied by before the backward pass."),
    Metric(name="guard/overflows", unit="updates", meaning="Updates refused so far because fp16 had no room for them."),
    Metric(name="perf/frames_per_s", unit="frames/s", meaning="Real time steps per second, all ranks.", good=_UP),
    Metric(name="perf/rows_per_s", unit="rows/s", meaning="Sequences per second, all ranks.", good=_UP),
    Metric(name="perf/update_ms", unit="ms", meaning="Mean wall time of one update.", good=_DOWN),
    Metric(
        name="perf/data_wait_share", unit="share", meaning="Share of the time spent waiting for a batch.", good=_DOWN
    ),
    Metric(name="data/fill", unit="share", meaning="Frames / slots: 1 means no padding at all.", good=_UP),
    Metric(name="ckpt/update", unit="updates", meaning="Update of the newest committed checkpoint."),
    Metric(name="ckpt/save_s", unit="s", meaning="Time the loop stood still for the latest checkpoint.", good=_DOWN),
)


def _loss_unit(task: TaskSpec) -> str:
    # What the sum of the losses is divided by, so that neither padding nor fill can bias it.
    if isinstance(task, LanguageSpec | TagSpec):
        return "nats/frame"
    return "nats/row" if isinstance(task, ClassifySpec) else "nats/label frame"


def _evaluation(task: TaskSpec) -> tuple[Metric, ...]:
    """What an evaluation gives, the headline first; names without their `val/` or `test/`."""
    if isinstance(task, CtcSpec):
        label, sequence = task.label_name, task.sequence_name
        return (
            Metric(
                name=f"{label}_error_rate",
                unit="share",
                meaning=f"Edits (insert, delete, replace) per true {label}, best path.",
                good=_DOWN,
            ),
            Metric(
                name=f"{sequence}_error_rate",
                unit="share",
                meaning=f"Share of rows whose whole {sequence} is not exactly right.",
                good=_DOWN,
            ),
        )
    if isinstance(task, ClassifySpec):
        return (
            Metric(name="accuracy", unit="share", meaning="Share of rows whose class is right.", good=_UP),
            Metric(name="macro_f1", unit="share", meaning="F1 of each class, averaged over the classes.", good=_UP),
        )
    if isinstance(task, LanguageSpec):
        return (
            Metric(
                name="perplexity",
                unit="",
                meaning="How many symbols, alike likely, would leave it as unsure: exp(loss).",
                good=_DOWN,
            ),
            Metric(name="bits_per_symbol", unit="bits", meaning="The loss in bits a predicted symbol.", good=_DOWN),
            Metric(name="accuracy", unit="share", meaning="Share of next symbols that were the likeliest.", good=_UP),
        )
    if isinstance(task, TagSpec):
        return (
            Metric(name="accuracy", unit="share", meaning="Share of labelled frames whose label is right.", good=_UP),
            Metric(name="macro_f1", unit="share", meaning="F1 of each label, averaged over the labels.", good=_UP),
        )
    raise InternalError(f"catalogue: got task {type(task).__name__}, expected one with known metrics")


def evaluation_names(task: TaskSpec) -> tuple[str, ...]:
    """The names an evaluation of `task` reports: "loss" first, then the headline, then the rest."""
    return ("loss", *(metric.name for metric in _evaluation(task)))


def headline_name(task: TaskSpec) -> str:
    """The one evaluation metric that says how good a model of `task` is: "phone_error_rate", "accuracy"."""
    return _evaluation(task)[0].name


def catalogue(task: TaskSpec) -> dict[str, Metric]:
    """All metrics that a run of `task` may log, by name."""
    unit = _loss_unit(task)
    metrics = [
        *_FIXED,
        Metric(name="train/loss", unit=unit, meaning="Training loss since the row before.", good=_DOWN),
    ]
    for part, rows in (("val", "validation"), ("test", "test")):
        metrics.append(Metric(name=f"{part}/loss", unit=unit, meaning=f"Loss on the {rows} rows.", good=_DOWN))
        metrics.extend(
            Metric(
                name=f"{part}/{metric.name}",
                unit=metric.unit,
                meaning=f"{metric.meaning[:-1]}; {rows} rows.",
                good=metric.good,
            )
            for metric in _evaluation(task)
        )
    return {metric.name: metric for metric in metrics}
