"""The states of a run that were committed, and only those.

Keys, below `runs/<run>/`:

    HEAD.json                                    who may commit, and what was committed
    ckpt/<update>-<attempt>-<nonce>/<file>       written first, never overwritten
    ckpt/<update>-<attempt>-<nonce>/MANIFEST.json   written last, when the store holds the very bytes of the files
    ckpt/.../quarantine.json                     found damaged; never offered again
    ckpt/.../KEEP.json                           something points here; retention leaves it

A checkpoint counts from the moment HEAD names it. HEAD is swapped only by the attempt that holds
it, so a zombie of an older attempt can write bytes but cannot make anyone restore them.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from treadle import wire
from treadle.errors import ConfigError, IntegrityError, NotFoundError, TreadleError
from treadle.store.blobs import Blobs, Data, check_key
from treadle.store.claims import create_once
from treadle.store.lease import Head, Lease
from treadle.store.sealed import nonce, seal, stamp, unseal
from treadle.store.transfers import Sums, read_files, write_files

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
        best: whether it was the best so far when it was committed.
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
    best: bool = False

    def key(self, name: str) -> str:
        """The key of the file `name`."""
        return f"{self.prefix}/{name}"


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
        self._folder = f"runs/{run}/ckpt"
        self._lease = Lease(blobs, run, attempt=attempt, rebuild=self._rebuilt_head)
        self._lock = threading.RLock()

    def acquire(self) -> None:
        """Become the one attempt that may commit; whoever held the run before is fenced off.

        Raises:
            ConflictError: a newer attempt holds it.
        """
        with self._lock:
            self._lease.take()

    def commit(
        self, update: int, files: Mapping[str, Data], state: Mapping[str, Any], *, best: bool = False
    ) -> CheckpointManifest:
        """Make one state durable; when this returns, `latest` offers it.

        What is older than the last `keep_last` and is not the best is removed, after that.

        Args:
            update: optimizer steps done.
            files: their bytes by name; they are not copied as a whole.
            state: the small state, JSON.
            best: whether retention is to keep it until another best is committed.

        Raises:
            ConflictError: a newer attempt holds the run; nothing changed for it.
            IntegrityError: the store does not hold what was written; what was committed before still stands.
        """
        with self._lock:
            if self._lease.held is None:
                self.acquire()
            held = self._lease.check()
            prefix = f"{self._folder}/{update:08d}-{self.attempt:04d}-{nonce()}"
            for name in files:
                self._check_file_name(prefix, name)
            manifest = CheckpointManifest(
                run=self.run,
                update=update,
                attempt=self.attempt,
                prefix=prefix,
                prev=held.kept[0] if held.kept else None,
                files=self._write(prefix, files),
                state=dict(state),
                best=best,
                **self._digests,
            )
            sealed = self._seal(manifest)
            before = self._folders()
            kept = tuple(old for old in held.kept if not self._is_quarantined(old))[: self._keep_last - 1]
            self._lease.swap(lambda head: replace(head, kept=(prefix, *kept), best=prefix if best else head.best))
            self._retire(before)
            return unseal(CheckpointManifest, sealed, kind="checkpoint", where=prefix)

    def latest(self) -> CheckpointManifest | None:
        """The newest committed checkpoint whose every byte is as written, or None.

        One that is damaged is quarantined, and the one before it is tried.

        Raises:
            IntegrityError: all of them are damaged, or it was made under another spec or on other data.
        """
        found = self.restore()
        return found[0] if found else None

    def restore(self) -> tuple[CheckpointManifest, dict[str, bytes]] | None:
        """`latest` together with its files, read once; None only where nothing was ever committed.

        Raises:
            IntegrityError: as for `latest`.
        """
        tried: dict[str, str] = {}
        while (prefix := next((p for p in self._offered() if p not in tried), None)) is not None:
            try:
                manifest = self._manifest(prefix)
                files = self._read_files(manifest)
            except IntegrityError as error:
                tried[prefix] = error.message
                # A reader may be overtaken by the retention of the running attempt: only what is
                # still offered and still damaged is damaged.
                if prefix in self._offered():
                    self._quarantine(prefix, error)
                continue
            self._check_lineage(manifest)
            return manifest, files
        if damaged := self._named():
            raise self._all_damaged(damaged, tried)
        return None

    def best(self) -> CheckpointManifest | None:
        """The manifest of the best checkpoint; None where none was marked as such. `read` gives its files.

        Raises:
            IntegrityError: its manifest is damaged, or it was made under another spec or on other data.
        """
        head = self._lease.read() or self._rebuilt_head()
        if head.best is None:
            return None
        manifest = self._manifest(head.best)
        self._check_lineage(manifest)
        return manifest

    def read(self, manifest: CheckpointManifest) -> dict[str, bytes]:
        """The files of a checkpoint, verified.

        Raises:
            IntegrityError: a file is not as written (the message names it), or the checkpoint was
                made by another run, under another spec or on other data.
        """
        self._check_lineage(manifest)
        return self._read_files(manifest)

    # Writing

    def _check_file_name(self, prefix: str, name: str) -> None:
        check_key(f"{prefix}/{name}")
        if name in {_MANIFEST, _QUARANTINE, _KEEP}:
            raise ConfigError(f"checkpoint file: got {name!r}, expected a name that is not reserved")

    def _write(self, prefix: str, files: Mapping[str, Data]) -> Sums:
        try:
            sums = write_files(self._blobs, {f"{prefix}/{name}": data for name, data in files.items()})
        except TreadleError as error:
            with contextlib.suppress(TreadleError):  # what was written takes the space that the next one needs
                self._remove(prefix)
            if isinstance(error, IntegrityError):
                self._lease.check()  # a newer attempt sweeps what we write: say that instead
            raise
        return {key.removeprefix(f"{prefix}/"): told for key, told in sums.items()}

    def _seal(self, manifest: CheckpointManifest) -> bytes:
        """Write the manifest; without it the files are nobody's."""
        sealed = seal("checkpoint", manifest)
        key = manifest.key(_MANIFEST)
        with contextlib.suppress(NotFoundError):  # a newer attempt sweeps what we write
            if create_once(self._blobs, key, sealed) and self._blobs.get(key) == sealed:
                return sealed
        self._lease.check()
        raise IntegrityError(f"{key}: does not read back as written")

    def _folders(self) -> list[str]:
        """The folders that retention may remove once HEAD is swapped.

        Listed before the swap: while HEAD was ours nobody else wrote, so that none of these is on its way to a commit
        of a process that took over since.
        """
        return [
            f"{self._folder}/{folder}"
            for folder in self._blobs.children(self._folder)
            if (match := _FOLDER.fullmatch(folder)) and int(match[2]) <= self.attempt
        ]

    def _retire(self, before: list[str]) -> None:
        """Remove what HEAD does not name: older checkpoints, and what dead writers left."""
        assert self._lease.held is not None
        named = self._lease.held.named
        try:
            for prefix in before:
                if prefix not in named:
                    self._remove(prefix)
        except TreadleError:
            pass  # the commit stands; the next one sweeps again

    def _remove(self, prefix: str) -> None:
        names = [entry.key.removeprefix(f"{prefix}/") for entry in self._blobs.list(f"{prefix}/")]
        if _KEEP in names or _QUARANTINE in names:
            return
        for name in sorted(names, key=lambda name: name != _MANIFEST):  # first of all it stops being whole
            self._blobs.delete(f"{prefix}/{name}")

    # Reading

    def _rebuilt_head(self) -> Head:
        """HEAD as the folders tell it."""
        listed = self._listed()
        newest = max((attempt for attempt, _, _ in listed), default=0)
        prefixes = tuple(prefix for _, _, prefix in listed)
        best = next((prefix for prefix in prefixes if self._was_best(prefix)), None)
        return Head(attempt=newest, rev=0, holder="", nonce="", kept=prefixes, best=best)

    def _was_best(self, prefix: str) -> bool:
        try:
            return self._manifest(prefix).best
        except IntegrityError:
            return False

    def _named(self) -> tuple[str, ...]:
        """What was committed and is to be kept, damaged or not."""
        return (self._lease.read() or self._rebuilt_head()).named

    def _offered(self) -> list[str]:
        return [prefix for prefix in self._named() if not self._is_quarantined(prefix)]

    def _listed(self) -> list[tuple[int, int, str]]:
        """(attempt, update, prefix) of every folder with a manifest, or else of every folder; newest first."""
        matches = (_FOLDER.fullmatch(folder) for folder in self._blobs.children(self._folder))
        found = [(int(match[2]), int(match[1]), f"{self._folder}/{match[0]}") for match in matches if match]
        whole = [item for item in found if self._blobs.head(f"{item[2]}/{_MANIFEST}")]
        # Without HEAD and without any manifest nobody can tell a lost commit from one that was never finished;
        # they are offered, and found damaged, so that a run is not begun anew in silence.
        return sorted(whole or found, reverse=True)

    def _manifest(self, prefix: str) -> CheckpointManifest:
        key = f"{prefix}/{_MANIFEST}"
        try:
            data = self._blobs.get(key)
        except NotFoundError:
            raise IntegrityError(f"{key}: missing") from None
        manifest = unseal(CheckpointManifest, data, kind="checkpoint", where=key)
        if (manifest.prefix, manifest.run) != (prefix, self.run):
            raise IntegrityError(f"{key}: got the manifest of {manifest.prefix}, expected that of {prefix}")
        return manifest

    def _read_files(self, manifest: CheckpointManifest) -> dict[str, bytes]:
        found = read_files(self._blobs, {manifest.key(name): told for name, told in manifest.files.items()})
        return {name: found[manifest.key(name)] for name in manifest.files}

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

    def _all_damaged(self, damaged: tuple[str, ...], reasons: Mapping[str, str]) -> IntegrityError:
        told = "; ".join(reasons.get(prefix, f"{prefix}: quarantined before") for prefix in damaged)
        return IntegrityError(
            f"run {self.run}: got {len(damaged)} checkpoints, all damaged ({told}), expected a sound one",
            hint=f"put the files of one back from a copy of {self._blobs.uri} and delete the {_QUARANTINE} beside "
            "them, or start a new run",
            run=self.run,
            damaged=list(damaged),
        )


def keep(blobs: Blobs, key: str, *, by: str) -> None:
    """Exempt the checkpoint that holds `key` from retention; any other key needs no exemption."""
    if match := _INSIDE.fullmatch(key):
        create_once(blobs, f"{match[1]}/{_KEEP}", seal("keep", {"by": by, "time": stamp()}))
