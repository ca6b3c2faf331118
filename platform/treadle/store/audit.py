"""A record of decisions that shows when it was tampered with.

Events are numbered from 1 without holes; each holds the sha256 of the one before, as stored, so
that an edited, dropped or moved event breaks the chain. Who acts on an event keeps its hash
somewhere else too (the registry: in the alias), because a chain alone does not show that its end
was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from treadle import wire
from treadle.errors import IntegrityError, NotFoundError
from treadle.store.blobs import Blobs
from treadle.store.claims import create_once, numbers
from treadle.store.sealed import nonce, seal, stamp, unseal

__all__ = ["AuditEvent", "AuditLog"]

_NO_HASH = "0" * 64


@dataclass(frozen=True, kw_only=True)
class AuditEvent:
    """One decision about an alias.

    Args:
        follows: the event that was in effect for this alias when it was decided; 0: none.
        name: the model.
        alias: what is moved.
        action: promote or rollback.
        before: the version it pointed to, or None.
        after: the version it is to point to.
        actor: who decided.
        reason: why, for people.
        seq: its number; this and what follows is filled in by `AuditLog.append`.
        prev_hash: sha256 of the event before it, as stored.
        time: UTC, for people.
        nonce: tells equal decisions apart.
    """

    follows: int
    name: str
    alias: str
    action: str
    before: int | None
    after: int
    actor: str
    reason: str
    seq: int = 0
    prev_hash: str = ""
    time: str = ""
    nonce: str = ""


class AuditLog:
    """The events about one model.

    Args:
        blobs: the store.
        folder: where the events lie.
    """

    def __init__(self, blobs: Blobs, folder: str) -> None:
        self._blobs = blobs
        self._folder = folder

    def append(self, draft: AuditEvent) -> tuple[AuditEvent, str]:
        """`draft` under the next number, and its hash.

        Raises:
            IntegrityError: the event before it is damaged.
        """
        number = max(numbers(self._blobs, self._folder), default=0)
        prev_hash = self._read(number)[1] if number else _NO_HASH
        while True:
            number += 1
            event = replace(draft, seq=number, prev_hash=prev_hash, time=stamp(), nonce=nonce())
            data = seal("audit", event)
            if create_once(self._blobs, self._key(number), data):
                return event, wire.digest(data)
            prev_hash = self._read(number)[1]

    def verified(self, anchors: dict[int, str]) -> list[AuditEvent]:
        """Every event, in order.

        Args:
            anchors: hashes of events by number, kept elsewhere and read before this call.

        Raises:
            IntegrityError: an event is edited, missing or out of place; the message names its number.
        """
        prev_hash, found, hashes = _NO_HASH, [], {}
        for number in range(1, max(numbers(self._blobs, self._folder), default=0) + 1):
            event, event_hash = self._read(number)
            if event.prev_hash != prev_hash:
                raise IntegrityError(
                    f"{self._key(number)}: event {number} does not follow event {number - 1} as stored"
                )
            prev_hash = hashes[number] = event_hash
            found.append(event)
        for number, expected in anchors.items():
            if hashes.get(number) != expected:
                raise IntegrityError(f"{self._key(number)}: event {number} is missing or not the one that was acted on")
        return found

    def chain(self, alias: str, last: int) -> list[AuditEvent]:
        """The events that took effect on `alias`, in order, the one numbered `last` (0: none) at the end.

        Raises:
            IntegrityError: one is missing, damaged or about something else.
        """
        found = []
        while last:
            event, _ = self._read(last)
            if event.alias != alias or event.follows >= last:
                raise IntegrityError(f"{self._key(last)}: event {last} is not one that followed for {alias!r}")
            found.append(event)
            last = event.follows
        return found[::-1]

    def _key(self, number: int) -> str:
        return f"{self._folder}/{number:012d}.json"

    def _read(self, number: int) -> tuple[AuditEvent, str]:
        """An event and its hash."""
        key = self._key(number)
        try:
            data = self._blobs.get(key)
        except NotFoundError:
            raise IntegrityError(f"{key}: event {number} is missing") from None
        try:
            event = unseal(AuditEvent, data, kind="audit", where=key)
        except IntegrityError as error:
            raise IntegrityError(f"{error.message}: event {number} is damaged") from None
        if event.seq != number:
            raise IntegrityError(f"{key}: event {number} got the content of event {event.seq}")
        return event, wire.digest(data)
