"""Which rows of a chunk keep the rules, and what is wrong with the others: all of them, rule by rule.

A sound chunk is only looked over: two passes of least and largest values, and some sums over rows. Only where these
say that something is wrong are the frames looked for.

Shape letters: R rows, N frames of all rows laid end to end, D channels, U targets of all rows so, K values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle.data.chunk import Chunk, Problem, Schema, keep_rows
from treadle.data.draft import Frames, Labels, Values
from treadle.errors import did_you_mean
from treadle.spec import TargetPer

__all__ = ["check_chunk"]

_WIDEST = float(np.finfo(np.float32).max)
"""Gaps between frames are kept as float32."""
_TILE = 4096
"""Values that are reduced side by side: reducing by rows of a few channels is eight times slower."""


def check_chunk(chunk: Chunk, schema: Schema, *, max_length: int) -> tuple[Chunk, list[Problem]]:
    """The rows that keep the rules, and a problem for each rule that one of the others breaks.

    Args:
        max_length: most frames of a row.

    Returns:
        The chunk (itself, not a copy, if all its rows are good), without problems; and the problems in the order of
        rows, those that reading found included.

    Cost: about 5 GB/s of frames where all is well.
    """
    found = _Found(chunk)
    _check_lengths(found, max_length)
    _check_scalars(found)
    if isinstance(schema.inputs, Frames):
        limits = _limits(schema.inputs.channels, schema.inputs.lower, schema.inputs.upper)
        _check_numbers(found, "inputs", chunk.inputs, chunk.lengths_R, limits, missing=schema.inputs.missing)
    else:
        _check_tokens(found, schema.inputs.vocabulary)
    if schema.timed:
        _check_times(found)
    if isinstance(schema.target, Labels):
        _check_labels(found, schema.target)
    elif isinstance(schema.target, Values):
        _check_values(found, schema.target)
    problems = sorted([*chunk.problems, *found.problems], key=lambda problem: problem.number)
    good = keep_rows(chunk, ~found.bad_R)
    return dataclasses.replace(good, problems=()) if chunk.problems else good, problems


class _Found:
    """What is wrong with a chunk so far."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.bad_R = np.zeros(chunk.num_rows, bool)
        self.problems: list[Problem] = []

    def rows(self, bad_R: NDArray[np.bool_], column: str, message: Callable[[int], str]) -> None:
        """Rows that break a rule."""
        if bad_R.any():
            self.bad_R |= bad_R
            self.problems += [self.chunk.problem(int(row), column, message(int(row))) for row in np.flatnonzero(bad_R)]

    def elements(
        self,
        bad_N: NDArray[np.bool_],
        lengths_R: NDArray[np.int64],
        column: str,
        message: Callable[[int, int], str],
    ) -> None:
        """Rows with an element that breaks a rule: the first is named, as message(place in all, place in the row)."""
        if not bad_N.any():
            return
        ends = np.cumsum(lengths_R)
        places = np.flatnonzero(bad_N)
        rows, first, counts = np.unique(
            np.searchsorted(ends, places, side="right"), return_index=True, return_counts=True
        )
        self.bad_R[rows] = True
        for row, place, count in zip(rows.tolist(), places[first].tolist(), counts.tolist(), strict=True):
            text = message(place, place - int(ends[row] - lengths_R[row]))
            more = f" (and {count - 1} more of this row)" if count > 1 else ""
            self.problems.append(self.chunk.problem(row, column, text + more))


def _check_lengths(found: _Found, max_length: int) -> None:
    lengths = found.chunk.lengths_R
    found.rows(lengths == 0, "inputs", lambda row: "got no frame, expected at least one")
    found.rows(
        lengths > max_length,
        "inputs",
        lambda row: f"got {lengths[row]} frames, expected at most data.max_length = {max_length}",
    )


def _check_scalars(found: _Found) -> None:
    chunk = found.chunk
    for column, texts in (("entity", chunk.entity_R), ("group", chunk.group_R), ("id", chunk.id_R)):
        if texts is not None:
            found.rows(_empty(texts), column, lambda row, t=texts: f"got {t[row].as_py()!r}, expected text")
    weight, time = chunk.weight_R, chunk.time_R
    found.rows(
        ~((weight >= 0) & np.isfinite(weight)),
        "weight",
        lambda row: f"got {weight[row]}, expected a finite number from 0 up",
    )
    found.rows(np.isinf(time), "time", lambda row: f"got {time[row]}, expected a finite number")


def _empty(texts: pa.StringArray) -> NDArray[np.bool_]:
    """Which texts are null or ""."""
    offsets = np.frombuffer(texts.buffers()[1] or b"", np.int32)[texts.offset : texts.offset + len(texts) + 1]
    if not len(texts):
        return np.zeros(0, bool)
    empty = np.diff(offsets) == 0
    return empty | texts.is_null().to_numpy(zero_copy_only=False) if texts.null_count else empty


def _check_tokens(found: _Found, vocabulary: Sequence[str] | None) -> None:
    ids, symbols, lengths = found.chunk.inputs, found.chunk.symbols, found.chunk.lengths_R
    if len(ids) and ids.min() < 0:
        found.elements(ids < 0, lengths, "inputs", lambda _, at: f"got null at {at}, expected a symbol")
    if vocabulary is None:
        return
    known = set(vocabulary)
    strange = np.array([symbol not in known for symbol in symbols] + [False])  # -1 finds the last
    if strange.any():
        found.elements(
            strange[ids],
            lengths,
            "inputs",
            lambda place, at: f"got {_outside(symbols[ids[place]], 'symbols', vocabulary)} at {at}",
        )


def _outside(name: str, what: str, known: Sequence[str]) -> str:
    listed = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
    return f"{name[:40]!r}, expected one of the {len(known)} {what} ({listed}){did_you_mean(name[:40], known)}"


def _check_times(found: _Found) -> None:
    times, lengths = found.chunk.times_N, found.chunk.lengths_R
    assert times is not None
    if len(times) == 0:
        return
    finite = np.isfinite(times)
    found.elements(~finite, lengths, "times", lambda n, at: f"got {times[n]} at frame {at}, expected a finite number")
    with np.errstate(invalid="ignore", over="ignore"):  # infinite less infinite, and most less least
        gaps = np.diff(times, prepend=times[:1])
    gaps[(np.cumsum(lengths) - lengths)[lengths > 0]] = 0
    found.elements(
        gaps < 0,
        lengths,
        "times",
        lambda n, at: f"got {times[n]} at frame {at} after {times[n - 1]}, expected times that never fall",
    )
    found.elements(
        (gaps > _WIDEST) & finite & np.append(True, finite[:-1]),
        lengths,
        "times",
        lambda n, at: f"got {times[n]} at frame {at} after {times[n - 1]}, expected at most {_WIDEST:g} between them",
    )


def _check_labels(found: _Found, target: Labels) -> None:
    chunk = found.chunk
    ids, labels, counts = chunk.targets, chunk.labels, chunk.target_lengths_R
    if target.per is TargetPer.frame:
        _check_per_frame(found)
    else:
        found.rows(counts == 0, "target", lambda row: "got no label, expected at least one")
        if len(ids) and ids.min() < 0:
            found.elements(ids < 0, counts, "target", lambda _, at: f"got null at {at}, expected a label")
    if target.names is None:
        return
    names = target.names
    known = set(names)
    strange = np.array([label not in known for label in labels] + [False])
    if strange.any():
        found.elements(
            strange[ids],
            counts,
            "target",
            lambda place, at: f"got label {_outside(labels[ids[place]], 'labels', names)} at {at}",
        )


def _check_values(found: _Found, target: Values) -> None:
    per_frame = target.per is TargetPer.frame
    if per_frame:
        _check_per_frame(found)
    limits = _limits(target.names, target.lower, target.upper)
    _check_numbers(
        found, "target", found.chunk.targets, found.chunk.target_lengths_R, limits, missing=per_frame, what="value"
    )


def _check_per_frame(found: _Found) -> None:
    counts, lengths = found.chunk.target_lengths_R, found.chunk.lengths_R
    found.rows(
        counts != lengths,
        "target",
        lambda row: f"got {counts[row]} targets, expected one for each of {lengths[row]} frames",
    )


_Limits = tuple[Sequence[str], NDArray[np.float64], NDArray[np.float64]]


def _limits(names: Sequence[str], lower: Mapping[str, float], upper: Mapping[str, float]) -> _Limits:
    """Names, least and largest value of each, rounded as values are: what stands at a limit keeps to it."""
    with np.errstate(over="ignore"):
        rounded = [
            np.array([limits.get(name, none) for name in names]).astype(np.float32).astype(np.float64)
            for limits, none in ((lower, -np.inf), (upper, np.inf))
        ]
    return names, rounded[0], rounded[1]


def _check_numbers(
    found: _Found,
    column: str,
    values_ND: NDArray[np.float32],
    lengths_R: NDArray[np.int64],
    limits: _Limits,
    *,
    missing: bool,
    what: str = "channel",
) -> None:
    names, lower_D, upper_D = limits
    if not values_ND.size:
        return
    least_D, most_D = _extremes(values_ND, missing)
    # NaN compares false.
    fine = np.isfinite(least_D) & np.isfinite(most_D) & (least_D >= lower_D) & (most_D <= upper_D)
    if missing:
        fine |= np.isnan(least_D) & np.isnan(most_D)
    for channel in np.flatnonzero(~fine).tolist():
        values = values_ND[:, channel].astype(np.float64)
        allowed = "a finite number or NaN" if missing else "a finite number"
        where = f"{what} {names[channel]!r}"

        def said(place: int, at: int, values: NDArray[Any] = values, where: str = where) -> str:
            return f"got {values[place]:.7g} at frame {at}, {where}"

        wrong = np.isinf(values) if missing else ~np.isfinite(values)
        found.elements(wrong, lengths_R, column, lambda n, at, s=said, a=allowed: f"{s(n, at)}, expected {a}")
        for limit, beyond, word in (
            (lower_D[channel], values < lower_D[channel], "at least"),
            (upper_D[channel], values > upper_D[channel], "at most"),
        ):
            found.elements(
                beyond & ~wrong,
                lengths_R,
                column,
                lambda n, at, s=said, w=word, x=limit: f"{s(n, at)}, expected {w} {x:g}",
            )


def _extremes(values_ND: NDArray[np.float32], missing: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the largest value of each channel; NaN if it holds one, or, if `missing`, nothing else."""
    width = values_ND.shape[1]
    least, most = (np.fmin, np.fmax) if missing else (np.minimum, np.maximum)
    high = max(1, _TILE // width)
    whole = len(values_ND) // high * high
    found_D = []
    for reduce in (least.reduce, most.reduce):
        ends = [values_ND[whole:]]
        if whole and values_ND.flags.c_contiguous:
            ends.append(reduce(values_ND[:whole].reshape(-1, high * width), axis=0).reshape(high, width))
        elif whole:
            ends.append(values_ND[:whole])
        found_D.append(reduce(np.concatenate(ends), axis=0).astype(np.float64))
    return found_D[0], found_D[1]
