"""The symbols and labels of a data set out of those of its parts, and what its shards hold by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.data.chunk import Schema
from treadle.data.draft import Frames, Labels, Values
from treadle.data.manifest import Content
from treadle.spec import TargetKind, TargetPer

__all__ = ["Names", "content_of", "merge_names"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Names:
    """Symbols or labels by id.

    Args:
        names: by their id in the data set.
        ids: for each part, the id of each of its names, and last -1, which is what -1 stays.
    """

    names: tuple[str, ...]
    ids: tuple[NDArray[np.int32], ...]


def merge_names(
    parts: Sequence[Sequence[str]], declared: Sequence[str] | None, used: Sequence[set[int]] | None = None
) -> Names:
    """The names of all parts under one numbering.

    Args:
        parts: the names of each part, by their ids in it.
        declared: all names in the order of their ids; None: those that occur, sorted, as numbers if all are whole ones.
        used: ids of each part that occur in rows that are kept; None: all. Others become -1.
    """
    if used is not None:
        found = {part[number] for part, numbers in zip(parts, used, strict=True) for number in numbers if number >= 0}
    else:
        found = {name for part in parts for name in part}
    names = tuple(declared) if declared is not None else tuple(_sorted(found))
    place = {name: number for number, name in enumerate(names)}
    ids = (np.array([*(place.get(name, -1) for name in part), -1], np.int32) for part in parts)
    return Names(names=names, ids=tuple(ids))


def _sorted(names: set[str]) -> list[str]:
    if all(name.isascii() and name.removeprefix("-").isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def content_of(schema: Schema, symbols: tuple[str, ...], labels: tuple[str, ...]) -> Content:
    """What the shards of rows of this schema hold."""
    inputs, target = schema.inputs, schema.target
    kinds = {Labels: TargetKind.labels, Values: TargetKind.values, type(None): TargetKind.none}
    return Content(
        symbols=symbols,
        channels=inputs.channels if isinstance(inputs, Frames) else (),
        target=kinds[type(target)],
        target_per=TargetPer.row if target is None else target.per,
        labels=labels,
        value_names=target.names if isinstance(target, Values) else (),
        missing=isinstance(inputs, Frames) and inputs.missing,
        timed=schema.timed,
    )
