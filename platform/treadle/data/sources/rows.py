"""Rows of a generator, in chunks: never all of them at once, and one malformed row stops no other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle.data.chunk import CHUNK_BYTES, Chunk, Part, Problem, Schema
from treadle.data.draft import SPLITS, Draft, Frames, Row, Tokens, Values
from treadle.spec import TargetPer

__all__ = ["DraftSource", "chunks_of_rows"]

_MOST_ROWS = 16_384
_MOST_SYMBOLS = CHUNK_BYTES // 8


class DraftSource:
    """The rows of a draft. They have times, and ids, if the first row has them. Read once.

    Args:
        draft: its first row is taken from the generator here; what the generator raises is raised on.
    """

    def __init__(self, draft: Draft) -> None:
        rows = iter(draft.rows)
        first = next(rows, None)
        self._rows = rows if first is None else itertools.chain([first], rows)
        self._keyed = isinstance(first, Row) and first.id is not None
        timed = isinstance(first, Row) and first.times is not None
        self.schema = Schema(inputs=draft.inputs, target=draft.target, timed=timed)
        self.parts = (Part(file=""),)

    def read(self, part: Part) -> Iterator[Chunk]:
        return chunks_of_rows(self._rows, self.schema, keyed=self._keyed)


def chunks_of_rows(rows: Iterable[Row], schema: Schema, *, keyed: bool = False) -> Iterator[Chunk]:
    """Rows in chunks of about CHUNK_BYTES. A row of a wrong form becomes a problem of its chunk.

    Args:
        keyed: whether every row is to have an id; else none may.

    Cost: about 4 us a row of a few symbols.
    """
    gathered = _Gathered(schema, keyed)
    for number, row in enumerate(rows, start=1):
        gathered.add(number, row)
        if gathered.is_full:
            yield gathered.chunk()
            gathered = _Gathered(schema, keyed)
    if gathered.numbers or gathered.problems:
        yield gathered.chunk()


class _MalformedError(Exception):
    """A field of a row that has not the form it should have; `column` where the reader of it reads several."""

    def __init__(self, message: str, column: str = "") -> None:
        super().__init__(message)
        self.message, self.column = message, column


class _Gathered:
    """Rows since the last chunk, field by field."""

    def __init__(self, schema: Schema, keyed: bool) -> None:
        self.schema, self.keyed = schema, keyed
        self.numbers: list[int] = []
        self.lengths: list[int] = []
        self.symbols: list[str] = []
        self.frames: list[NDArray[np.float32]] = []
        self.target_lengths: list[int] = []
        self.labels: list[str | None] = []
        self.values: list[NDArray[np.float32]] = []
        self.times: list[NDArray[np.float64]] = []
        self.scalars: list[tuple[str, str | None, str | None, float, float, int, str]] = []
        self.problems: list[Problem] = []
        self.size = 0

    @property
    def is_full(self) -> bool:
        if isinstance(self.schema.inputs, Frames):
            return self.size * 4 >= CHUNK_BYTES or len(self.numbers) >= _MOST_ROWS
        return self.size >= _MOST_SYMBOLS or len(self.numbers) >= _MOST_ROWS

    def add(self, number: int, row: Any) -> None:
        if not isinstance(row, Row):
            self._complain(number, None, "row", f"got {type(row).__name__}, expected a Row")
            return
        found: list[Any] = []
        complaints: list[tuple[str, str]] = []
        for column, read in (("inputs", _inputs), ("target", _target), ("times", _times), ("row", _scalars)):
            try:
                found.append(read(row, self.schema, self.keyed))
            except _MalformedError as error:
                complaints.append((error.column or column, error.message))
        if not complaints and self.schema.timed and len(found[2]) != len(found[0]):
            complaints.append(("times", f"got {len(found[2])}, expected one for each of {len(found[0])} frames"))
        for column, message in complaints:
            self._complain(number, row, column, message)
        if not complaints:
            self._keep(number, found)

    def _complain(self, number: int, row: Row | None, column: str, message: str) -> None:
        entity, where = (row.entity, row.where) if row is not None else ("", "")
        self.problems.append(
            Problem(
                file="",
                number=number,
                column=column,
                message=message,
                entity=_speakable(entity),
                where=_speakable(where),
            )
        )

    def _keep(self, number: int, found: list[Any]) -> None:
        inputs, target, times, scalars = found
        self.numbers.append(number)
        self.lengths.append(len(inputs))
        if isinstance(self.schema.inputs, Frames):
            self.frames.append(inputs)
            self.size += inputs.size
        else:
            self.symbols.extend(inputs)
            self.size += len(inputs)
        self.target_lengths.append(len(target))
        if isinstance(self.schema.target, Values):
            self.values.append(target)
        else:
            self.labels.extend(target)
        if self.schema.timed:
            self.times.append(times)
        self.scalars.append(scalars)

    def chunk(self) -> Chunk:
        if isinstance(self.schema.inputs, Frames):
            inputs, symbols = _stacked(self.frames, len(self.schema.inputs.channels)), ()
        else:
            inputs, symbols = _encoded(self.symbols)
        if isinstance(self.schema.target, Values):
            targets, labels = _stacked(self.values, len(self.schema.target.names)), ()
        else:
            targets, labels = _encoded(self.labels)
        entity, group, key, time, weight, split, where = zip(*self.scalars, strict=True) if self.scalars else [()] * 7
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and complained of
            weight_R = np.asarray(weight, np.float64).astype(np.float32) + np.float32(0)
        return Chunk(
            file="",
            number_R=np.asarray(self.numbers, np.int64),
            lengths_R=np.asarray(self.lengths, np.int64),
            inputs=inputs,
            symbols=symbols,
            target_lengths_R=np.asarray(self.target_lengths, np.int64),
            targets=targets,
            labels=labels,
            times_N=np.concatenate([np.zeros(0), *self.times]) + 0.0 if self.schema.timed else None,
            entity_R=pa.array(entity, pa.string()),
            group_R=None
            if all(g is None for g in group)
            else pa.array([e if g is None else g for e, g in zip(entity, group, strict=True)], pa.string()),
            id_R=pa.array(key, pa.string()) if self.keyed else None,
            time_R=np.asarray(time, np.float64) + 0.0,  # -0.0 is 0.0: rows in two orders are one data set
            weight_R=weight_R,
            split_R=np.asarray(split, np.int8),
            where_R=pa.array(where, pa.string()) if any(where) else None,
            problems=tuple(self.problems),
        )


def _speakable(text: Any) -> str:
    """Text for a message that UTF-8 can hold."""
    return text.encode(errors="replace").decode() if isinstance(text, str) else ""


def _stacked(arrays: list[NDArray[np.float32]], width: int) -> NDArray[np.float32]:
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.zeros((0, width), np.float32), *arrays])


def _encoded(texts: list[Any]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    encoded = pa.array(texts, pa.string()).dictionary_encode()
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), tuple(encoded.dictionary.to_pylist())


def _inputs(row: Row, schema: Schema, keyed: bool) -> Any:
    if isinstance(schema.inputs, Tokens):
        return _texts(row.inputs, "symbols")
    width = len(schema.inputs.channels)
    values = _numbers(row.inputs, f"[T, {width}]")
    if not values.size:
        return np.zeros((0, width), np.float32)
    if values.ndim != 2 or values.shape[1] != width:
        raise _MalformedError(f"got shape {list(values.shape)}, expected [T, {width}]")
    return values


def _target(row: Row, schema: Schema, keyed: bool) -> Any:
    target = row.target
    if schema.target is None:
        if target is not None:
            raise _MalformedError("got one, expected None in a data set without targets")
        return ()
    if isinstance(schema.target, Values):
        return _value_target(target, schema.target)
    if schema.target.per is TargetPer.row:
        if not isinstance(target, str):
            raise _MalformedError(f"got {_shown(target)}, expected a label")
        return _texts([target], "labels")
    return _texts(target, "labels", or_none=schema.target.per is TargetPer.frame)


def _value_target(target: Any, values: Values) -> NDArray[np.float32]:
    width = len(values.names)
    if values.per is TargetPer.row:
        found = np.atleast_1d(_numbers(target, f"[{width}]"))
        if found.shape != (width,):
            raise _MalformedError(f"got shape {list(found.shape)}, expected [{width}]")
        return found[None]
    found = _numbers(target, f"[T, {width}]")
    if found.ndim == 1 and width == 1:
        found = found[:, None]
    if found.ndim != 2 or found.shape[1] != width:
        raise _MalformedError(f"got shape {list(found.shape)}, expected [T, {width}]")
    return found


def _times(row: Row, schema: Schema, keyed: bool) -> Any:
    if (row.times is not None) is not schema.timed:
        raise _MalformedError(
            "got None, expected times as the first row has them"
            if schema.timed
            else "got times, expected None as in the first row"
        )
    if not schema.timed:
        return ()
    times = _numbers(row.times, "[T]", np.float64)
    if times.ndim != 1:
        raise _MalformedError(f"got shape {list(times.shape)}, expected [T]")
    return times


def _scalars(row: Row, schema: Schema, keyed: bool) -> Any:
    _check_text("entity", row.entity)
    if row.group is not None:
        _check_text("group", row.group)
    if (row.id is not None) is not keyed:
        raise _MalformedError(f"got {_shown(row.id)}, expected {'one' if keyed else 'None'} as in the first row", "id")
    if keyed:
        _check_text("id", row.id)
    if row.split is not None and row.split not in SPLITS:
        raise _MalformedError(f"got {_shown(row.split)}, expected {', '.join(SPLITS)} or None", "split")
    _check_text("where", row.where)
    time = np.nan if row.time is None else _scalar("time", row.time)
    split = -1 if row.split is None else SPLITS.index(row.split)
    return row.entity, row.group, row.id, time, _scalar("weight", row.weight), split, row.where


def _check_text(column: str, text: Any) -> None:
    if not isinstance(text, str):
        raise _MalformedError(f"got {_shown(text)}, expected text", column)
    if not text.isascii():
        _check_unicode(text, column)


def _check_unicode(text: str, column: str = "") -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _MalformedError("got half a surrogate pair, expected text that UTF-8 can hold", column) from None


def _scalar(column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise _MalformedError(f"got {_shown(value)}, expected a number", column)
    return float(value)


def _texts(texts: Any, what: str, *, or_none: bool = False) -> list[Any]:
    """`texts` as a list, if it is a sequence of text."""
    if isinstance(texts, np.ndarray) and texts.ndim == 1:
        texts = texts.tolist()
    if not isinstance(texts, list | tuple):
        hint = f", as [{texts!r}]" if isinstance(texts, str) and len(texts) < 40 else ""
        raise _MalformedError(f"got {_shown(texts)}, expected a list of {what}{hint}")
    kinds = set(map(type, texts))
    if kinds == {str} or not kinds:
        joined = "".join(texts)
    else:
        for place, text in enumerate(texts):
            if not (isinstance(text, str) or (or_none and text is None)):
                raise _MalformedError(f"got {_shown(text)} at {place}, expected a list of {what}")
        joined = "".join(text for text in texts if text is not None)
    if not joined.isascii():
        _check_unicode(joined)
    return list(texts)


def _numbers(values: Any, form: str, dtype: Any = np.float32) -> NDArray[Any]:
    """`values` as an array of its own, if they are numbers; None among them, and what is masked, becomes NaN.

    A copy: a generator may fill one buffer for all rows, or give views of arrays that are much larger.
    """
    try:
        array = np.asarray(_filled(values))
        if array.dtype.kind == "O" and not isinstance(values, str) and values is not None:
            array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise _MalformedError(f"got {_shown(values)}, expected numbers of the shape {form}") from None
    if array.dtype.kind not in "fiub":
        raise _MalformedError(f"got {_shown(values)}, expected numbers of the shape {form}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and complained of
        return array.astype(dtype, copy=not isinstance(values, list | tuple))  # of a list it is new already


def _filled(values: Any) -> Any:
    """Masked arrays, or lists of them, with NaN for what is masked."""
    if isinstance(values, list | tuple) and values and not isinstance(values[0], float | int):
        values = np.ma.array(values) if np.ma.MaskedArray in set(map(type, values)) else values
    if isinstance(values, np.ma.MaskedArray) and values.dtype.kind in "fiubO":
        return np.ma.filled(values.astype(np.float64), np.nan)
    return values


def _shown(value: Any) -> str:
    """A value for a message, short."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return f"a {type(value).__name__}"
