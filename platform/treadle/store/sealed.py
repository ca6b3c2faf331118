"""Records and files that notice their own damage.

A sealed record is a versioned record (`treadle.wire`) that carries the sha256 of the rest of
itself: a flipped bit in a number is still JSON, and would otherwise be believed. A file is
checked by the size and xxh3_128 that the record naming it holds.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

import xxhash

from treadle import wire
from treadle.errors import IntegrityError, NotFoundError
from treadle.store.blobs import Blobs, Data

__all__ = ["checksum", "nonce", "read_verified", "seal", "spell_nonfinite", "stamp", "unseal"]

T = TypeVar("T")


def nonce() -> str:
    """16 random hex digits."""
    return secrets.token_hex(8)


def stamp() -> str:
    """The time now, UTC, for people; nothing is ever ordered by it."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def checksum(data: Data) -> str:
    """xxh3_128 (hex) of `data`."""
    return xxhash.xxh3_128_hexdigest(data)


def read_verified(blobs: Blobs, key: str, *, size_bytes: int, xxh3_128: str) -> bytes:
    """The bytes of `key`, equal to those that were written.

    Raises:
        IntegrityError: missing, of another size or of another content; the message names `key`.
    """
    wrong = ""
    for _ in range(2):  # damage on the way must not condemn what is stored
        try:
            data = blobs.get(key)
        except NotFoundError:
            raise IntegrityError(f"{key}: missing, expected {size_bytes} bytes") from None
        if len(data) != size_bytes:
            wrong = f"{key}: got {len(data)} bytes, expected {size_bytes}"
        elif (seen := checksum(data)) != xxh3_128:
            wrong = f"{key}: got xxh3_128 {seen}, expected {xxh3_128}"
        else:
            return data
    raise IntegrityError(wrong)


def spell_nonfinite(value: Any) -> Any:
    """`value` with NaN and the infinities, which JSON lacks, as strings that `float` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: spell_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spell_nonfinite(item) for item in value]
    return value


def seal(kind: str, value: Any, *, schema: int = 1) -> bytes:
    """The bytes of a versioned record with its own digest; non-finite floats are spelled out."""
    envelope = json.loads(wire.record(kind, schema, spell_nonfinite(wire.encode(value))))
    return wire.canonical(envelope | {"sha256": wire.digest(envelope)})


def unseal(cls: type[T], data: bytes, *, kind: str, where: str, schema: int = 1) -> T:
    """The body of a record written by `seal`.

    Raises:
        IntegrityError: damaged, or a record of another kind or schema; the message names `where`.
    """
    envelope = wire.parse_json(data, where=where)
    if not isinstance(envelope, dict):
        raise IntegrityError(f"{where}: got {type(envelope).__name__}, expected a record of kind {kind!r}")
    stated = envelope.pop("sha256", None)
    try:
        seen = wire.digest(envelope)
        if seen != stated:
            raise IntegrityError(f"{where}: got content of sha256 {seen}, expected {stated}")
        return wire.unrecord(cls, wire.canonical(envelope), kind=kind, schema=schema, where=where)
    except (ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{where}: not readable as {cls.__name__} ({error})") from None
