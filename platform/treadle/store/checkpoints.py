"""The states of a run that were committed, and only those.

Keys, below `runs/<run>/`:

    HEAD.json                                    who may commit, and what was committed
    ckpt/<update>-<attempt>-<nonce>/<file>       written first, never overwritten
    ckpt/<update>-<attempt>-<nonce>/MANIFEST.json   written last
    ckpt/.../quarantine.json                     found damaged; never offered again
    ckpt/.../KEEP.json                           something points here; retention leaves it

A checkpoint counts from the moment HEAD names it. HEAD is swapped only by the attempt that holds
it, so a zombie of an older attempt can write bytes but cannot make anyone restore them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from treadle import wire
from treadle.errors import ConfigError, ConflictError, IntegrityError, NotFoundError, TreadleError
from treadle.store.blobs import Blobs, check_key
from treadle.store.claims import create_once, swap
from treadle.store.sealed import checksum, nonce, read_verified, seal, stamp, unseal

__all__ = ["CheckpointManifest", "Checkpoints", "keep"]

_MANIFEST = "MANIFEST.json"
_QUARANTINE = "quarantine.json"
_KEEP = "KEEP.json"
_FOLDER = re.compile(r"([0-9]{8,})-([0-9]{4,})-([0-9a-f]{16})")
_INSIDE = re.compile(r"(runs/[^/]+/ckpt/[^/]+)/.+")


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """One committed state.

    Args:
        run: the run it belongs to.
        update: optimizer steps done.
        attempt: the attempt that wrote it.
        prefix: the folder of its files.
        prev: the folder of the checkpoint before it, or None.
        files: size in bytes and xxh3_128 of each file, by name.
        state: the small state (update, epoch, position, ...), JSON.
        spec_digest: sha256 of the job spec it was trained under.
        data_digest: digest of the data set it was trained on.
    """

    run: str
    update: int
    attempt: int
    prefix: str
    prev: str | None
    files: dict[str, tuple[int, str]]
    state: dict[str, Any]
    spec_digest: str
    data_digest: str

    def key(self, name: str) -> str:
        """The key of the file `name`."""
        return f"{self.prefix}/{name}"


@dataclass(frozen=True, kw_only=True)
class _Head:
    """Who may commit (`attempt`, `holder`) and what was committed (`kept`, newest first).

    `rev` and `nonce` make every content unlike all before it: an S3 version is a hash of the
    content, and an old content put back would let a stale swap succeed.
    """

    attempt: int
    rev: int
    holder: str
    nonce: str
    kept: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run, as one attempt sees them.

    Args:
        blobs: the store.
        run: run id.
        attempt: number of this attempt; a higher one fences it off. Readers pass 0.
        keep_last: committed checkpoints kept.
        spec_digest: what a restored checkpoint must have been trained under.
        data_digest: what a restored checkpoint must have been trained on.
    """

    def __init__(
        self, blobs: Blobs, run: str, *, attempt: int, keep_last: int, spec_digest: str, data_digest: str
    ) -> None:
        if keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last: got {keep_last}, expected at least 1")
        self.run = wire.check_name("run", run)
        self.attempt = attempt
        self._blobs = blobs
        self._keep_last = keep_last
        self._digests = {"spec_digest": spec_digest, "data_digest": data_digest}
        self._head_key = f"runs/{run}/HEAD.json"
        self._folder = f"runs/{run}/ckpt"
        self._holder = nonce()
        self._held: _Head | None = None
        self._lock = threading.RLock()

    def acquire(self) -> None:
        """Become the one attempt that may commit; whoever held the run before is fenced off.

        Raises:
            ConflictError: a newer attempt holds it.
        """
        with self._lock:
            self._advance(lambda head: replace(head, attempt=self.attempt, holder=self._holder), taking=True)

    def commit(self, update: int, files: Mapping[str, bytes], state: Mapping[str, Any]) -> CheckpointManifest:
        """Make one state durable; when this returns, `latest` offers it.

        Raises:
            ConflictError: a newer attempt holds the run; nothing changed for it.
            IntegrityError: the store does not hold what was written.
        """
        with self._lock:
            if self._held is None:
                self.acquire()
            held = self._check_held()
            prefix = f"{self._folder}/{update:08d}-{self.attempt:04d}-{nonce()}"
            sums = {self._file_name(prefix, name): (len(data), checksum(data)) for name, data in files.items()}
            manifest = CheckpointManifest(
                run=self.run,
                update=update,
                attempt=self.attempt,
                prefix=prefix,
                prev=held.kept[0] if held.kept else None,
                files=sums,
                state=dict(state),
                **self._digests,
            )
            sealed = seal("checkpoint", manifest)
            self._write(prefix, files, sealed)
            kept = [old for old in held.kept if not self._is_quarantined(old)]
            self._advance(lambda head: replace(head, kept=(prefix, *kept[: self._keep_last - 1])))
            self._retire()
            return unseal(CheckpointManifest, sealed, kind="checkpoint", where=prefix)

    def latest(self) -> CheckpointManifest | None:
        """The newest committed checkpoint whose every byte is as written, or None.

        One that is damaged is quarantined, and the one before it is tried.

        Raises:
            IntegrityError: it was made under another spec or on other data.
        """
        found = self.restore()
        return found[0] if found else None

    def restore(self) -> tuple[CheckpointManifest, dict[str, bytes]] | None:
        """`latest` together with its files, read once."""
        tried: set[str] = set()
        while (prefix := next((p for p in self._offered() if p not in tried), None)) is not None:
            tried.add(prefix)
            try:
                manifest = self._manifest(prefix)
                files = self._read_files(manifest)
            except IntegrityError as error:
                # A reader may be overtaken by the retention of the running attempt: only what is
                # still offered and still damaged is damaged.
                if prefix in self._offered():
                    self._quarantine(prefix, error)
                continue
            self._check_lineage(manifest)
            return manifest, files
        return None

    def read(self, manifest: CheckpointManifest) -> dict[str, bytes]:
        """The files of a checkpoint, verified.

        Raises:
            IntegrityError: a file is not as written (the message names it), or the checkpoint was
                made by another run, under another spec or on other data.
        """
        self._check_lineage(manifest)
        return self._read_files(manifest)

    # Writing

    def _file_name(self, prefix: str, name: str) -> str:
        check_key(f"{prefix}/{name}")
        if name in {_MANIFEST, _QUARANTINE, _KEEP}:
            raise ConfigError(f"checkpoint file: got {name!r}, expected a name that is not reserved")
        return name

    def _write(self, prefix: str, files: Mapping[str, bytes], sealed: bytes) -> None:
        for name, data in files.items():
            self._blobs.put(f"{prefix}/{name}", data)
        for name, data in files.items():
            entry = self._blobs.head(f"{prefix}/{name}")
            if entry is None or entry.size_bytes != len(data):
                seen = "nothing" if entry is None else f"{entry.size_bytes} bytes"
                self._check_held()  # a newer attempt sweeps what we write: say that instead
                raise IntegrityError(f"{prefix}/{name}: got {seen} after writing, expected {len(data)} bytes")
        key = f"{prefix}/{_MANIFEST}"
        if not create_once(self._blobs, key, sealed) or self._blobs.get(key) != sealed:
            raise IntegrityError(f"{key}: does not read back as written")

    def _retire(self) -> None:
        """Remove what HEAD does not name: older checkpoints, and what dead writers left."""
        assert self._held is not None
        kept = set(self._held.kept)
        try:
            for folder in self._blobs.children(self._folder):
                match = _FOLDER.fullmatch(folder)
                prefix = f"{self._folder}/{folder}"
                if match and int(match[2]) <= self.attempt and prefix not in kept:
                    self._remove(prefix)
        except TreadleError:
            pass  # the commit stands; the next one sweeps again

    def _remove(self, prefix: str) -> None:
        names = [entry.key.removeprefix(f"{prefix}/") for entry in self._blobs.list(f"{prefix}/")]
        if _KEEP in names or _QUARANTINE in names:
            return
        for name in sorted(names, key=lambda name: name != _MANIFEST):  # first of all it stops being whole
            self._blobs.delete(f"{prefix}/{name}")

    # HEAD

    def _read_head(self) -> tuple[_Head | None, str | None]:
        """HEAD (None: missing or unreadable) and the version to swap it by (None: missing)."""
        entry = self._blobs.head(self._head_key)  # before the content: a change between shows in the swap
        if entry is None:
            return None, None
        try:
            return unseal(_Head, self._blobs.get(self._head_key), kind="head", where=self._head_key), entry.version
        except (IntegrityError, NotFoundError):
            return None, entry.version

    def _rebuilt_head(self) -> _Head:
        """HEAD as the folders tell it."""
        listed = self._listed()
        newest = max((attempt for attempt, _, _ in listed), default=0)
        return _Head(attempt=newest, rev=0, holder="", nonce="", kept=tuple(prefix for _, _, prefix in listed))

    def _check_held(self) -> _Head:
        head, _ = self._read_head()
        if head is None:
            head = self._held or self._rebuilt_head()
        if head.holder != self._holder:
            raise self._fenced(head)
        return head

    def _advance(self, change: Callable[[_Head], _Head], *, taking: bool = False) -> None:
        """Swap HEAD for `change(HEAD)`, unless another attempt holds it."""
        while True:
            head, version = self._read_head()
            if head is None:
                head = self._rebuilt_head()
                if self._held is not None and head.attempt <= self.attempt:
                    head = self._held
            if head.attempt > self.attempt or (head.holder != self._holder and not taking):
                raise self._fenced(head)
            head = replace(change(head), rev=head.rev + 1, nonce=nonce())
            if swap(self._blobs, self._head_key, seal("head", head), version=version):
                self._held = head
                return

    def _fenced(self, head: _Head) -> ConflictError:
        holder = f"attempt {head.attempt}" if head.attempt != self.attempt else "a later process of the same attempt"
        return ConflictError(
            f"run {self.run}: got a commit of attempt {self.attempt}, expected {holder}, which holds the run",
            hint="end this process; it was replaced",
            run=self.run,
            attempt=self.attempt,
            holder=head.attempt,
        )

    # Reading

    def _offered(self) -> Iterator[str]:
        head, _ = self._read_head()
        kept = head.kept if head else [prefix for _, _, prefix in self._listed()]
        return (prefix for prefix in kept if not self._is_quarantined(prefix))

    def _listed(self) -> list[tuple[int, int, str]]:
        """(attempt, update, prefix) of every folder with a manifest, newest first."""
        found = []
        for folder in self._blobs.children(self._folder):
            match = _FOLDER.fullmatch(folder)
            if match and self._blobs.head(f"{self._folder}/{folder}/{_MANIFEST}"):
                found.append((int(match[2]), int(match[1]), f"{self._folder}/{folder}"))
        return sorted(found, reverse=True)

    def _manifest(self, prefix: str) -> CheckpointManifest:
        key = f"{prefix}/{_MANIFEST}"
        try:
            data = self._blobs.get(key)
        except NotFoundError:
            raise IntegrityError(f"{key}: missing") from None
        manifest = unseal(CheckpointManifest, data, kind="checkpoint", where=key)
        if manifest.prefix != prefix:
            raise IntegrityError(f"{key}: got the manifest of {manifest.prefix}, expected that of {prefix}")
        return manifest

    def _read_files(self, manifest: CheckpointManifest) -> dict[str, bytes]:
        return {
            name: read_verified(self._blobs, manifest.key(name), size_bytes=size_bytes, xxh3_128=xxh3_128)
            for name, (size_bytes, xxh3_128) in manifest.files.items()
        }

    def _check_lineage(self, manifest: CheckpointManifest) -> None:
        for name, expected in {"run": self.run, **self._digests}.items():
            if (seen := getattr(manifest, name)) != expected:
                raise IntegrityError(
                    f"{manifest.prefix}: got {name} {seen}, expected {expected}",
                    hint="resume the run with its stored spec, or start a new run",
                )

    def _is_quarantined(self, prefix: str) -> bool:
        return self._blobs.head(f"{prefix}/{_QUARANTINE}") is not None

    def _quarantine(self, prefix: str, error: IntegrityError) -> None:
        note = {"reason": error.message, "attempt": self.attempt, "time": stamp()}
        create_once(self._blobs, f"{prefix}/{_QUARANTINE}", seal("quarantine", note))


def keep(blobs: Blobs, key: str, *, by: str) -> None:
    """Exempt the checkpoint that holds `key` from retention; any other key needs no exemption."""
    if match := _INSIDE.fullmatch(key):
        create_once(blobs, f"{match[1]}/{_KEEP}", seal("keep", {"by": by, "time": stamp()}))
