"""What a preparation script hands over: rows, and what their values mean."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draft", "Frames", "Row", "Tokens", "assign_splits"]

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence and its target.

    Args:
        entity: what must not stand in two splits: a word, a person, a recording.
        inputs: symbols (tokens), or a float array [T, channels] (frames).
        target: labels; one for classification, any number for CTC.
        split: "train", "valid" or "test" where the source says so, else None.
        where: file and line or key, for messages.
    """

    entity: str
    inputs: Sequence[str] | NDArray[np.floating[Any]]
    target: Sequence[str]
    split: str | None = None
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Inputs are symbols; the vocabulary is fitted on the training rows."""


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Inputs are vectors of numbers, scaled by mean and deviation of the training rows."""

    channels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A data set before it is written.

    Args:
        rows: read once, in any order.
        inputs: Tokens or Frames.
        labels: every label that a target may hold, in the order of their ids.
        licence: of the data, a line for people.
        source: file name -> sha256 of what was read.
    """

    rows: Iterable[Row]
    inputs: Tokens | Frames
    labels: tuple[str, ...]
    licence: str
    source: Mapping[str, str] = field(default_factory=dict)


def assign_splits(entities: Iterable[str], *, valid: int, test: int, limit: int | None, seed: int) -> dict[str, str]:
    """The split of each entity, by hash: the same entity lands in the same place on every machine.

    Args:
        valid, test: entities to set aside. limit: entities to keep at all, the rest are absent.

    Raises:
        ValueError: valid + test leave nothing to train on.
    """

    def key(entity: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{entity}".encode(), digest_size=16).digest()

    order = sorted(set(entities), key=key)[:limit]
    if valid + test >= len(order):
        raise ValueError(f"valid + test: got {valid} + {test}, expected fewer than the {len(order)} entities there are")
    names = ["test"] * test + ["valid"] * valid
    names += ["train"] * (len(order) - len(names))
    return dict(zip(order, names, strict=True))
