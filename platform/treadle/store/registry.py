"""Models under names: versions that never change, aliases that move, and a record of every move.

Keys, below `models/<name>/`:

    versions/<n>.json       created once; points at files already in the store, copies none
    aliases/<alias>.json    swapped; names the version and the event that put it there
    audit/<seq>.json        created once; each holds the sha256 of the one before

An event is written before its alias is swapped. One whose swap never came has no effect: what
happened to an alias is the chain of events from the one its pointer names, each naming the one
it followed. The pointer also holds that event's hash, so that cutting off the end of the record
shows as much as changing the middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from treadle import wire
from treadle.errors import ConfigError, ConflictError, IntegrityError, NotFoundError, did_you_mean
from treadle.store.audit import AuditEvent, AuditLog
from treadle.store.blobs import Blobs
from treadle.store.checkpoints import keep
from treadle.store.claims import create_once, numbers, swap
from treadle.store.models import Code, ModelDraft, ModelFile, ModelVersion
from treadle.store.sealed import nonce, read_verified, seal, stamp, unseal

__all__ = ["AliasChange", "AliasPointer", "AuditEvent", "Code", "ModelDraft", "ModelFile", "ModelVersion", "Registry"]

_NEWEST = "latest"


@dataclass(frozen=True, kw_only=True)
class AliasPointer:
    """Where an alias points, and the event (`seq`, `event_hash`) that put it there."""

    alias: str
    version: int
    seq: int
    event_hash: str
    rev: int
    nonce: str


@dataclass(frozen=True, kw_only=True)
class AliasChange:
    """What a promotion or rollback did; before == after where nothing had to change."""

    name: str
    alias: str
    before: int | None
    after: int
    seq: int


class Registry:
    """The models of one store."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def register(self, draft: ModelDraft) -> ModelVersion:
        """The version of that content: a new one, or the one that has it already.

        Raises:
            IntegrityError: a file is missing or has another size.
        """
        self._check_present(draft)
        digest = draft.content_digest
        taken = self._version_numbers(draft.name)
        for number in taken:
            if found := self._same_content(draft.name, number, digest):
                return found
        number = max(taken, default=0) + 1
        while True:
            content = {f.name: getattr(draft, f.name) for f in fields(ModelDraft)}
            version = ModelVersion(**content, version=number, digest=digest, created_at=stamp())
            if create_once(self._blobs, self._version_key(draft.name, number), seal("model", version)):
                return version
            if found := self._same_content(draft.name, number, digest):
                return found
            number += 1

    def models(self) -> list[str]:
        """The names of all models."""
        return self._blobs.children("models")

    def versions(self, name: str) -> list[ModelVersion]:
        """Every version of a model, in order.

        Raises:
            NotFoundError: no such model.
        """
        return [self._version(name, number) for number in self._known_numbers(name)]

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version."""
        return {alias: pointer.version for alias, pointer in self._pointers(name).items()}

    def resolve(self, ref: str) -> ModelVersion:
        """The version that `name@3`, `name@alias`, `name@latest` or `name` (the newest) means.

        Raises:
            NotFoundError: no such model, version or alias.
        """
        name, at, which = ref.partition("@")
        known = self._known_numbers(name)
        if not at or which == _NEWEST:
            return self._version(name, known[-1])
        if which.isdecimal():
            if int(which) not in known:
                raise NotFoundError(
                    f"model: got {ref!r}, expected a version from {known[0]} to {known[-1]}",
                    hint=f"treadle models show {name}",
                )
            return self._version(name, int(which))
        pointer, _ = self._pointer(name, _check_alias(which))
        if pointer is None:
            aliases = self.aliases(name)
            listed = ", ".join(sorted(aliases)) or "none yet"
            raise NotFoundError(
                f"model: got {ref!r}, expected a version from {known[0]} to {known[-1]} or an alias ({listed})"
                f"{did_you_mean(which, aliases)}",
                hint=f"treadle models promote {name}@{known[-1]} {which}",
            )
        return self._version(name, pointer.version)

    def read(self, version: ModelVersion, file: str) -> bytes:
        """One file of a version, verified.

        Raises:
            NotFoundError: the version has no such file.
            IntegrityError: its bytes are not those that were registered.
        """
        found = version.files.get(file)
        if found is None:
            near = did_you_mean(file, version.files)
            raise NotFoundError(f"{version}: got file {file!r}, expected one of {sorted(version.files)}{near}")
        return read_verified(self._blobs, found.key, size_bytes=found.size_bytes, xxh3_128=found.xxh3_128)

    def promote(
        self, name: str, version: int, alias: str = "production", *, actor: str, reason: str = ""
    ) -> AliasChange:
        """Point `alias` at a version, after reading all of it.

        Raises:
            ConflictError: someone else moved the alias meanwhile.
            IntegrityError: a file of the version is not what was registered.
            ConfigError: a metric of the version is not finite, or the alias may not be used.
        """
        pointer, seen = self._pointer(name, _check_alias(alias))
        model = self.resolve(f"{name}@{version}")
        if pointer is not None and pointer.version == version:
            return AliasChange(name=name, alias=alias, before=version, after=version, seq=pointer.seq)
        return self._move(model, alias, (pointer, seen), action="promote", actor=actor, reason=reason)

    def rollback(self, name: str, alias: str = "production", *, actor: str, reason: str = "") -> AliasChange:
        """Point `alias` at the version that it had before the one it has.

        Promotions pile up and a rollback takes the top one off, so that two rollbacks go two
        versions back.

        Raises:
            NotFoundError: there is no such alias, or nothing before.
            ConflictError: someone else moved the alias meanwhile.
        """
        self._known_numbers(name)
        pointer, seen = self._pointer(name, _check_alias(alias))
        pile = _pile(self._audit(name).chain(alias, pointer.seq if pointer else 0))
        if pointer is None or len(pile) < 2:
            now = f"version {pointer.version}, its first" if pointer else "no version"
            raise NotFoundError(
                f"{name}@{alias}: got {now}, expected one with another before it",
                hint=f"treadle models promote {name}@VERSION {alias}",
            )
        model = self._version(name, pile[-2])
        return self._move(model, alias, (pointer, seen), action="rollback", actor=actor, reason=reason)

    def history(self, name: str) -> list[AuditEvent]:
        """Every event of a model, in order, verified; one whose alias was then not moved had no effect.

        Raises:
            IntegrityError: one is edited, missing or out of place; the message names its number.
        """
        self._known_numbers(name)
        anchors = {pointer.seq: pointer.event_hash for pointer in self._pointers(name).values()}
        return self._audit(name).verified(anchors)

    def alias_history(self, name: str, alias: str) -> list[AuditEvent]:
        """The events that took effect on one alias, in order."""
        pointer, _ = self._pointer(name, alias)
        return self._audit(name).chain(alias, pointer.seq if pointer else 0)

    # Registering

    def _check_present(self, draft: ModelDraft) -> None:
        for name, file in draft.files.items():
            keep(self._blobs, file.key, by=draft.name)  # before the look, so that what is seen stays
            entry = self._blobs.head(file.key)
            if entry is None or entry.size_bytes != file.size_bytes:
                seen = "nothing" if entry is None else f"{entry.size_bytes} bytes"
                raise IntegrityError(f"{draft.name}/{name}: got {seen} at {file.key}, expected {file.size_bytes} bytes")
        if draft.card is not None and self._blobs.head(draft.card) is None:
            raise IntegrityError(f"{draft.name}: got no model card at {draft.card}, expected one")

    def _same_content(self, name: str, number: int, digest: str) -> ModelVersion | None:
        try:
            found = self._version(name, number)
        except IntegrityError:
            return None  # a damaged old version must not stop a new one
        return found if found.digest == digest else None

    # Moving an alias

    def _move(
        self,
        model: ModelVersion,
        alias: str,
        old: tuple[AliasPointer | None, str | None],
        *,
        action: str,
        actor: str,
        reason: str,
    ) -> AliasChange:
        if not actor:
            raise ConfigError("actor: got '', expected who decides this")
        self._check_fit(model)
        pointer, seen = old
        before = pointer.version if pointer else None
        event, event_hash = self._audit(model.name).append(
            AuditEvent(
                follows=pointer.seq if pointer else 0,
                name=model.name,
                alias=alias,
                action=action,
                before=before,
                after=model.version,
                actor=actor,
                reason=reason,
            )
        )
        target = AliasPointer(
            alias=alias,
            version=model.version,
            seq=event.seq,
            event_hash=event_hash,
            rev=pointer.rev + 1 if pointer else 1,
            nonce=nonce(),
        )
        if swap(self._blobs, self._alias_key(model.name, alias), seal("alias", target), version=seen) is None:
            now, _ = self._pointer(model.name, alias)
            raise ConflictError(
                f"{model.name}@{alias}: got version {now.version if now else None}, expected version {before}; "
                f"someone else moved it",
                hint=f"look at 'treadle models show {model.name}', then decide again",
            )
        return AliasChange(name=model.name, alias=alias, before=before, after=model.version, seq=event.seq)

    def _check_fit(self, model: ModelVersion) -> None:
        for file in model.files:
            self.read(model, file)
        if bad := sorted(name for name, value in model.metrics.items() if not math.isfinite(value)):
            raise ConfigError(f"{model}: got metrics {', '.join(bad)} not finite, expected numbers")

    # Reading

    def _version_key(self, name: str, number: int) -> str:
        return f"models/{name}/versions/{number:06d}.json"

    def _alias_key(self, name: str, alias: str) -> str:
        return f"models/{name}/aliases/{alias}.json"

    def _audit(self, name: str) -> AuditLog:
        return AuditLog(self._blobs, f"models/{name}/audit")

    def _version_numbers(self, name: str) -> list[int]:
        return numbers(self._blobs, f"models/{wire.check_name('model', name)}/versions")

    def _known_numbers(self, name: str) -> list[int]:
        found = self._version_numbers(name)
        if not found:
            known = self.models()
            listed = ", ".join(known) or "none yet"
            raise NotFoundError(
                f"model: got {name!r}, expected a registered one ({listed}){did_you_mean(name, known)}",
                hint="treadle models ls",
            )
        return found

    def _version(self, name: str, number: int) -> ModelVersion:
        key = self._version_key(name, number)
        found = unseal(ModelVersion, self._blobs.get(key), kind="model", where=key)
        if (found.name, found.version) != (name, number) or found.digest != found.content_digest:
            raise IntegrityError(f"{key}: got the record of {found}, expected that of {name}@{number}")
        return found

    def _pointer(self, name: str, alias: str) -> tuple[AliasPointer | None, str | None]:
        """The pointer and the version to swap it by; (None, None) where there is none."""
        key = self._alias_key(name, alias)
        entry = self._blobs.head(key)  # before the content: a change between shows in the swap
        if entry is None:
            return None, None
        pointer = unseal(AliasPointer, self._blobs.get(key), kind="alias", where=key)
        if pointer.alias != alias:
            raise IntegrityError(f"{key}: got the pointer of {pointer.alias!r}, expected that of {alias!r}")
        return pointer, entry.version

    def _pointers(self, name: str) -> dict[str, AliasPointer]:
        self._known_numbers(name)
        aliases = [entry.removesuffix(".json") for entry in self._blobs.children(f"models/{name}/aliases")]
        return {alias: pointer for alias in aliases if (pointer := self._pointer(name, alias)[0])}


def _pile(events: Iterable[AuditEvent]) -> list[int]:
    """The versions that rollbacks would go through, the one in effect last."""
    pile: list[int] = []
    for event in events:
        if event.action != "rollback":
            pile.append(event.after)
        elif len(pile) >= 2 and pile[-2] == event.after:
            pile.pop()
        else:
            raise IntegrityError(f"{event.name}@{event.alias}: the rollback in event {event.seq} fits no history")
    return pile


def _check_alias(alias: str) -> str:
    """`alias`, if it can be neither a version nor the newest one.

    Raises:
        ConfigError: otherwise.
    """
    wire.check_name("alias", alias)
    if alias == _NEWEST or alias.isdecimal():
        raise ConfigError(f"alias: got {alias!r}, expected a name that is neither a number nor '{_NEWEST}'")
    return alias
