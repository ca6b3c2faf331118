"""Values of text files as columns of a type; those that are not of it are told apart, so that only their lines go."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle.data.chunk import Problem

__all__ = ["array_of", "json_or_none", "misfit", "utf8_problem"]


def array_of(values: Sequence[Any], type_: pa.DataType) -> tuple[pa.Array, NDArray[np.bool_]]:
    """JSON values as a type, null where there is none, and which of them are not of that type."""
    try:
        return pa.array(values, type_), np.zeros(len(values), bool)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        values = [_rounded(value, type_) for value in values]
        fits = np.array([_fits(value, type_) for value in values], bool)
        return pa.array([v if ok else None for v, ok in zip(values, fits, strict=True)], type_), ~fits


def _rounded(value: Any, type_: pa.DataType) -> Any:
    """The value, whole numbers as the nearest float where that is the type: pyarrow refuses those beyond 2^53."""
    if pa.types.is_list(type_) and isinstance(value, list):
        return [_rounded(item, type_.value_type) for item in value]
    if not pa.types.is_floating(type_) or type(value) is not int:
        return value
    try:
        return float(value)
    except OverflowError:  # as pyarrow reads such digits
        return math.inf if value > 0 else -math.inf


def _fits(value: Any, type_: pa.DataType) -> bool:
    try:
        pa.array([value], type_)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def json_or_none(text: str) -> Any:
    """The value of a JSON text; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def misfit(file: str, number: int, field: pa.Field, seen: str) -> Problem:
    """What is said of a line with a value of another type than its column has."""
    message = f"got {seen}, expected {_words(field.type)}, as in the first lines"
    return Problem(file=file, number=number, column=field.name, message=message)


def utf8_problem(file: str, number: int, column: str, seen: bytes) -> Problem:
    """What is said of a line with bytes that are no text."""
    return Problem(file=file, number=number, column=column, message=f"got {seen[:40]!r}, expected text in UTF-8")


def _words(type_: pa.DataType) -> str:
    if pa.types.is_list(type_):
        return f"a list of {_words(type_.value_type).removeprefix('a ')}s"
    names = {pa.int64(): "a whole number", pa.float64(): "a number", pa.bool_(): "a boolean"}
    return names.get(type_, "a text")
