"""The JSON forms that leave a process: canonical text, content digests, versioned records.

Frozen dataclasses are encoded by field. A class that declares `kind` as a class variable is
one variant of a closed family: its tag is written beside its fields, so that a record read
back is the same class with the same fields (`dataclasses.asdict` alone would lose it).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from treadle.errors import ConfigError, IntegrityError

__all__ = ["canonical", "check_name", "decode", "digest", "encode", "parse_json", "record", "unrecord"]

T = TypeVar("T")

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
"""How records write the numbers that JSON does not have; read back where a float is expected."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def check_name(what: str, name: str) -> str:
    """`name`, if it may stand in a path, a Kubernetes object, an S3 key and a W&B id at once.

    Raises:
        ConfigError: anything but lower-case letters, digits and inner dashes, 63 at most.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what}: got {name!r}, expected 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit"
        )
    return name


def canonical(value: Any) -> bytes:
    """One byte string for equal JSON values: sorted keys, no spaces, UTF-8.

    Raises:
        ValueError: NaN or infinity, which are not JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """sha256 (hex) of bytes, or of the canonical JSON of anything else."""
    data = value if isinstance(value, bytes | bytearray | memoryview) else canonical(value)
    return hashlib.sha256(data).hexdigest()


def parse_json(data: bytes | str, *, where: str) -> Any:
    """The JSON value in `data`; duplicate keys, NaN and infinities are refused.

    Raises:
        IntegrityError: `data` is not such JSON; the message names `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("duplicate key")
        return result

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is too large")
        return value

    try:
        return json.loads(data, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: not readable as JSON ({error})") from None


def encode(value: Any) -> Any:
    """The JSON-ready form of a dataclass, enum, tuple, list, dict or scalar."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = getattr(type(value), "kind", None)
        tag = {"kind": kind} if isinstance(kind, str) else {}
        return tag | {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(cls: type[T], value: Any, *, where: str = "record") -> T:
    """The instance of `cls` that `encode` wrote.

    Raises:
        IntegrityError: unknown or missing fields, an unknown `kind`, or a value of another form.
    """
    try:
        return typing.cast("T", _decode(cls, value, where))
    except ConfigError as error:  # a class refused a value that it would not have written
        raise IntegrityError(f"{where}: {error.message}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise IntegrityError(f"{where}: not a {cls.__name__} ({error})") from None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _family(cls: type) -> dict[str, type]:
    found = {kind: cls} if isinstance(kind := cls.__dict__.get("kind"), str) else {}
    for child in cls.__subclasses__():
        found |= _family(child)
    return found


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _decode(args[0], value, where)
    if origin is typing.Union or origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _decode(next(arg for arg in args if arg is not type(None)), value, where)
    if origin in (tuple, list):
        container = tuple if origin is tuple else list
        hints = _item_hints(args, len(_of(list, value, where)), is_tuple=origin is tuple)
        if len(hints) != len(value):
            raise IntegrityError(f"{where}: got {len(value)} items, expected {len(hints)}")
        return container(
            _decode(item_hint, item, f"{where}[{i}]")
            for i, (item_hint, item) in enumerate(zip(hints, value, strict=True))
        )
    if origin is dict:
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in _of(dict, value, where).items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, _of(dict, value, where), where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if value not in [member.value for member in hint]:
            raise IntegrityError(f"{where}: got {value!r}, expected one of {[member.value for member in hint]}")
        return hint(value)
    if hint is float and (type(value) is int or value in _NOT_FINITE):
        return float(value)
    return _of(hint, value, where) if hint in (bool, int, float, str) else value


def _item_hints(args: tuple[Any, ...], length: int, *, is_tuple: bool) -> tuple[Any, ...]:
    """What each item is, of `tuple[int, str]`, or of so many in `tuple[int, ...]` and `list[int]`."""
    if is_tuple and Ellipsis not in args:
        return args
    return (args[0],) * length


def _of(kind: type, value: Any, where: str) -> Any:
    # By exact type: True is an int to Python and not to JSON.
    if type(value) is not kind and not (kind is list and isinstance(value, tuple)):
        raise IntegrityError(f"{where}: got {type(value).__name__}, expected {kind.__name__}")
    return value


def _decode_dataclass(cls: type, value: Any, where: str) -> Any:
    fields = dict(value)
    family = _family(cls)
    if family and "kind" not in {f.name for f in dataclasses.fields(cls)}:
        kind = fields.pop("kind", None)
        if not isinstance(kind, str) or kind not in family:
            raise IntegrityError(f"{where}.kind: got {kind!r}, expected one of {sorted(family)}")
        cls = family[kind]
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - set(known)):
        raise IntegrityError(f"{where}: unknown fields {unknown} for {cls.__name__}")
    required = {
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(fields)):
        raise IntegrityError(f"{where}: missing fields {missing} for {cls.__name__}")
    hints = _hints(cls)
    return cls(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in fields.items()})


def record(kind: str, schema: int, value: Any) -> bytes:
    """The bytes of a versioned record: `{"record": kind, "schema": schema, "body": ...}`."""
    return canonical({"record": kind, "schema": schema, "body": encode(value)})


def unrecord(cls: type[T], data: bytes, *, kind: str, schema: int, where: str) -> T:
    """The body of a record written by `record`.

    Raises:
        IntegrityError: not JSON, another kind of record, or a schema this version does not read.
    """
    value = parse_json(data, where=where)
    if not isinstance(value, dict) or value.get("record") != kind:
        raise IntegrityError(f"{where}: not a record of kind {kind!r}")
    if value.get("schema") != schema:
        raise IntegrityError(
            f"{where}: got schema {value.get('schema')!r}, expected {schema}",
            hint="read it with the treadle version that wrote it",
        )
    return decode(cls, value.get("body"), where=where)
