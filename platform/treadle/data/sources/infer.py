"""What the columns of the first file say of the data set: which inputs and targets rows have.

Inputs in one column: lists of text or of whole numbers are symbols (a number by its digits), text is parted at white
space into symbols, lists of other numbers are one channel, lists of lists of D numbers are D channels, called after
the column and numbered. Inputs in several columns: a list of numbers for each channel. Targets likewise: text and
whole numbers are labels, other numbers are values. Of events, a line holds one element of what is a list elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from treadle.data.chunk import Schema
from treadle.data.draft import Frames, Labels, Tokens, Values
from treadle.data.sources.arrays import (
    element_type,
    flat_lists,
    is_list,
    is_number,
    is_text,
    is_time,
    names_things,
)
from treadle.errors import ConfigError, did_you_mean
from treadle.spec import ColumnsSpec, DataSpec, Missing, TargetPer

__all__ = ["columns_of", "infer_events", "infer_rows"]


def columns_of(spec: ColumnsSpec) -> list[tuple[str, str]]:
    """Every column that is read, as (key of the spec, name)."""
    single = ("entity", "group", "id", "times", "time", "weight", "split")
    named = [(key, getattr(spec, key)) for key in single if getattr(spec, key) is not None]
    return [*(("inputs", name) for name in spec.inputs), *(("target", name) for name in spec.target), *named]


def infer_rows(data: DataSpec, spec: ColumnsSpec, sample: pa.RecordBatch, file: str) -> Schema:
    """The schema of such rows.

    Args:
        sample: the first rows: their types, and how many numbers a frame has where the type does not say it.

    Raises:
        ConfigError: columns of types that cannot be what the spec says; all are named.
    """
    problems: list[str] = []
    inputs = _inputs_of(data, spec, sample, problems)
    target = _target_of(spec, sample, problems)
    for key, column, fits, rule in (
        ("times", spec.times, lambda t: is_list(t) and is_time(element_type(t)), "lists of numbers or times"),
        ("time", spec.time, is_time, "numbers, dates or timestamps"),
        ("weight", spec.weight, is_number, "numbers"),
        ("split", spec.split, is_text, "text"),
        *((k, getattr(spec, k), names_things, "text") for k in ("entity", "group", "id")),
    ):
        if column is not None and not fits(sample.schema.field(column).type):
            problems.append(f"columns.{key}: {column!r}: got {sample.schema.field(column).type}, expected {rule}")
    if problems or inputs is None:
        raise ConfigError(f"{file}: " + "\n".join(problems))
    _check_limits(spec, inputs, target)
    return Schema(inputs=inputs, target=target, timed=spec.times is not None)


def _inputs_of(
    data: DataSpec, spec: ColumnsSpec, sample: pa.RecordBatch, problems: list[str]
) -> Tokens | Frames | None:
    found = [sample.schema.field(name).type for name in spec.inputs]
    missing = data.missing is not Missing.refuse
    if len(found) == 1 and (is_text(found[0]) or (is_list(found[0]) and names_things(element_type(found[0])))):
        return Tokens(vocabulary=tuple(spec.symbols) or None)
    if spec.symbols:
        problems.append(f"columns.symbols: got {len(spec.symbols)} with inputs of numbers, expected none")
    if len(found) == 1 and is_list(found[0]) and is_list(element_type(found[0])):
        names = _vector_names(spec.inputs[0], sample, "inputs", problems)
        return Frames(channels=names, missing=missing, **_limits_of(spec, spec.inputs, names))
    wrong = [
        f"columns.inputs: {name!r}: got {type_}, expected a list of symbols, or of numbers, or of lists of numbers"
        + (" (columns.layout=events, if a line is one frame)" if is_number(type_) else "")
        for name, type_ in zip(spec.inputs, found, strict=True)
        if not (is_list(type_) and is_number(element_type(type_)))
    ]
    problems += wrong
    if wrong:
        return None
    names = tuple(spec.inputs)
    return Frames(channels=names, missing=missing, **_limits_of(spec, spec.inputs, names))


def _vector_names(column: str, sample: pa.RecordBatch, key: str, problems: list[str]) -> tuple[str, ...]:
    """`column0`, `column1`, ... for the numbers of a frame."""
    type_ = sample.schema.field(column).type
    inner = element_type(type_)
    if not is_number(element_type(inner)):
        problems.append(f"columns.{key}: {column!r}: got {type_}, expected lists of lists of numbers")
        return ()
    width = inner.list_size if pa.types.is_fixed_size_list(inner) else 0
    if not width:
        lengths_N, _ = flat_lists(flat_lists(sample.column(column))[1])
        width = int(lengths_N[lengths_N > 0][0]) if lengths_N.any() else 0
    if not width:
        problems.append(f"columns.{key}: {column!r}: got no frame in the first rows, expected one")
    return tuple(f"{column}{d}" for d in range(width))


def _limits_of(spec: ColumnsSpec, columns: Sequence[str], names: Sequence[str]) -> dict[str, Mapping[str, float]]:
    """Limits by name; a column's are those of all names in it."""
    whole = columns[0] if len(columns) == 1 else ""

    def by_name(limits: Mapping[str, float]) -> dict[str, float]:
        return {name: limits.get(name, limits.get(whole, np.nan)) for name in names if {name, whole} & limits.keys()}

    return {"lower": by_name(spec.lower), "upper": by_name(spec.upper)}


def _check_limits(spec: ColumnsSpec, inputs: Tokens | Frames, target: Labels | Values | None) -> None:
    """Nothing, if every limit is one of numbers that are read.

    Raises:
        ConfigError: otherwise.
    """
    known: set[str] = set()
    if isinstance(inputs, Frames):
        known |= {*inputs.channels, *spec.inputs}
    if isinstance(target, Values):
        known |= {*target.names, *spec.target}
    for key, limits in (("lower", spec.lower), ("upper", spec.upper)):
        for name in limits.keys() - known:
            raise ConfigError(
                f"columns.{key}: got {name!r}, expected a column of numbers in inputs or target"
                f"{did_you_mean(name, known)}"
            )


def _target_of(spec: ColumnsSpec, sample: pa.RecordBatch, problems: list[str]) -> Labels | Values | None:
    if not spec.target:
        return None
    per = spec.target_per
    types = [sample.schema.field(name).type for name in spec.target]
    one = types[0] if len(types) == 1 else None
    if one is not None and _is_labels(one, per):
        return Labels(names=tuple(spec.labels) or None, per=per)
    rule = {
        TargetPer.row: "a label, a number, or a list of numbers",
        TargetPer.frame: "a list of labels, of numbers, or of lists of numbers",
        TargetPer.sequence: "a list of labels, or labels with white space between",
    }[per]
    wrong = [
        f"columns.target: {name!r}: got {type_}, expected {rule}, for target_per={per.name}"
        for name, type_ in zip(spec.target, types, strict=True)
        if not _is_values(type_, per, alone=one is not None)
    ]
    if spec.labels and not wrong:
        wrong.append(f"columns.labels: got {len(spec.labels)} with targets of numbers, expected none")
    problems += wrong
    if wrong:
        return None
    is_vector = one is not None and is_list(one) and (per is TargetPer.row or is_list(element_type(one)))
    names = tuple(spec.target)
    if is_vector:
        names = _value_names(spec.target[0], sample, per, problems)
    return Values(names=names, per=per, **_limits_of(spec, spec.target, names))


def _value_names(column: str, sample: pa.RecordBatch, per: TargetPer, problems: list[str]) -> tuple[str, ...]:
    if per is TargetPer.frame:
        return _vector_names(column, sample, "target", problems)
    lengths_R, _ = flat_lists(sample.column(column))
    if not lengths_R.any():
        problems.append(f"columns.target: {column!r}: got no value in the first rows, expected one")
        return ()
    return tuple(f"{column}{k}" for k in range(int(lengths_R[lengths_R > 0][0])))


def _is_labels(type_: pa.DataType, per: TargetPer) -> bool:
    if per is TargetPer.row:
        return names_things(type_)
    if per is TargetPer.sequence and is_text(type_):
        return True
    return is_list(type_) and names_things(element_type(type_))


def _is_values(type_: pa.DataType, per: TargetPer, *, alone: bool) -> bool:
    if per is TargetPer.sequence:
        return False
    if per is TargetPer.row:
        return is_number(type_) or (alone and is_list(type_) and is_number(element_type(type_)))
    if not is_list(type_):
        return False
    inner = element_type(type_)
    return is_number(inner) or (alone and is_list(inner) and is_number(element_type(inner)))


def infer_events(data: DataSpec, spec: ColumnsSpec, sample: pa.RecordBatch, file: str) -> Schema:
    """The schema of sequences out of such lines; as `infer_rows`."""
    problems: list[str] = []
    missing = data.missing is not Missing.refuse
    inputs: Tokens | Frames
    if _is_named(spec.inputs, sample):
        inputs = Tokens(vocabulary=tuple(spec.symbols) or None)
    else:
        names = _number_names("inputs", spec.inputs, sample, problems)
        inputs = Frames(channels=names, missing=missing, **_limits_of(spec, spec.inputs, names))
        if spec.symbols:
            problems.append(f"columns.symbols: got {len(spec.symbols)} with inputs of numbers, expected none")
    target = _event_target(spec, sample, problems)
    for key, fits, rule in (
        ("times", is_time, "numbers, dates or timestamps"),
        ("time", is_time, "numbers, dates or timestamps"),
        ("weight", is_number, "numbers"),
        ("split", is_text, "text"),
        *((key, names_things, "text or whole numbers") for key in ("entity", "group", "id")),
    ):
        name = getattr(spec, key)
        if name is not None and not fits(sample.schema.field(name).type):
            problems.append(f"columns.{key}: {name!r}: got {sample.schema.field(name).type}, expected {rule}")
    if problems:
        raise ConfigError(f"{file}: " + "\n".join(problems))
    _check_limits(spec, inputs, target)
    return Schema(inputs=inputs, target=target, timed=True)


def _event_target(spec: ColumnsSpec, sample: pa.RecordBatch, problems: list[str]) -> Labels | Values | None:
    per = spec.target_per
    if not spec.target:
        return None
    if per is TargetPer.sequence:
        problems.append("columns.target_per: got sequence, expected row or frame, for events")
        return None
    if _is_named(spec.target, sample):
        return Labels(names=tuple(spec.labels) or None, per=per)
    if spec.labels:
        problems.append(f"columns.labels: got {len(spec.labels)} with targets of numbers, expected none")
    names = _number_names("target", spec.target, sample, problems)
    return Values(names=names, per=per, **_limits_of(spec, spec.target, names))


def _is_named(columns: Sequence[str], sample: pa.RecordBatch) -> bool:
    """Whether it is one column of text or whole numbers."""
    return len(columns) == 1 and names_things(sample.schema.field(columns[0]).type)


def _number_names(key: str, columns: Sequence[str], sample: pa.RecordBatch, problems: list[str]) -> tuple[str, ...]:
    """Names of the numbers of a line: one a column, or the numbered elements of one list."""
    types = [sample.schema.field(name).type for name in columns]
    if len(columns) == 1 and is_list(types[0]) and is_number(element_type(types[0])):
        lengths_R, _ = flat_lists(sample.column(columns[0]))
        return tuple(f"{columns[0]}{d}" for d in range(int(lengths_R.max(initial=0))))
    problems += [
        f"columns.{key}: {name!r}: got {type_}, expected numbers, one column of text, or one of lists of numbers"
        for name, type_ in zip(columns, types, strict=True)
        if not is_number(type_)
    ]
    return tuple(columns)
