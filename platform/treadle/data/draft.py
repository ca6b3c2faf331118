"""What a preparation script hands over: rows, and what their values mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.spec import TargetPer

__all__ = ["SPLITS", "Draft", "Frames", "Labels", "Row", "Tokens", "Values"]

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Inputs are symbols.

    Args:
        vocabulary: all symbols there may be; others break a rule. None: whatever occurs. Models know those that
            training rows hold.
    """

    vocabulary: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Inputs are vectors of numbers, scaled for models by mean and deviation of the training rows.

    Args:
        channels: names of the numbers of a frame.
        lower, upper: least and largest value by channel, where there is a limit.
        missing: whether a value may be NaN: not observed.
    """

    channels: tuple[str, ...]
    lower: Mapping[str, float] = field(default_factory=dict)
    upper: Mapping[str, float] = field(default_factory=dict)
    missing: bool = False


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Targets are labels.

    Args:
        names: all labels in the order of their ids; None: whatever occurs, sorted.
        per: `row`: one. `frame`: one for each frame, None where there is none. `sequence`: any number but none (CTC).
    """

    names: tuple[str, ...] | None = None
    per: TargetPer = TargetPer.row


@dataclass(frozen=True, kw_only=True)
class Values:
    """Targets are numbers.

    Args:
        names: of the numbers.
        lower, upper: least and largest by name, where there is a limit.
        per: `row`: a vector. `frame`: a vector for each frame, NaN where there is none.
    """

    names: tuple[str, ...]
    lower: Mapping[str, float] = field(default_factory=dict)
    upper: Mapping[str, float] = field(default_factory=dict)
    per: TargetPer = TargetPer.row


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence and its target.

    Args:
        entity: what must not stand in two splits: a word, a person, a recording.
        inputs: symbols (tokens), or a float array [T, channels] (frames).
        target: a label, a list of labels, or an array of numbers, as the draft's `target` says; None without one.
        group: what is split as one where that is more than the entity.
        id: a key that no two rows share; all rows have one, or none.
        times: when each frame was, never falling; for models that take gaps, and checked against `time`. All rows have
            them, or none.
        time: when the row is asked about; nothing in it may be later.
        weight: what the row counts in the loss.
        split: "train", "valid" or "test" where the source says so, else None.
        where: file and line or key, for messages.
    """

    entity: str
    inputs: Sequence[str] | NDArray[np.floating[Any]]
    target: Any = None
    group: str | None = None
    id: str | None = None
    times: Sequence[float] | NDArray[np.floating[Any]] | None = None
    time: float | None = None
    weight: float = 1.0
    split: str | None = None
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A data set before it is written.

    Args:
        rows: read once, in any order; a generator need never hold them all.
        inputs: Tokens or Frames.
        target: Labels, Values, or None where a model predicts the inputs themselves.
        licence: of the data, a line for people.
        source: file name -> sha256 of what was read.
    """

    rows: Iterable[Row]
    inputs: Tokens | Frames
    target: Labels | Values | None
    licence: str
    source: Mapping[str, str] = field(default_factory=dict)
