"""What a model takes and gives, in numbers; enforced alike in training, registering and serving."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["InputKind", "Signature", "TargetKind"]


class InputKind(enum.Enum):
    """tokens: one symbol id per time step. frames: one vector of numbers per time step."""

    tokens = "tokens"
    frames = "frames"


class TargetKind(enum.Enum):
    """What a target is made of."""

    none = "none"
    labels = "labels"
    values = "values"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The shapes at both ends of a model.

    Args:
        input_kind: what stands at one time step.
        input_size: number of token symbols, or of channels per frame.
        num_labels: number of labels (classes); the CTC blank is not counted.
        max_length: longest sequence accepted, in time steps.
    """

    input_kind: InputKind
    input_size: int
    num_labels: int
    max_length: int
