"""Who may commit the states of a run, and which were committed: one record, HEAD, swapped as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from treadle.errors import ConflictError, IntegrityError, NotFoundError
from treadle.store.blobs import Blobs
from treadle.store.claims import swap
from treadle.store.sealed import nonce, seal, unseal

__all__ = ["Head", "Lease"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """Who may commit (`attempt`, `holder`) and what was committed (`kept`, newest first).

    `rev` and `nonce` make every content unlike all before it: an S3 version is a hash of the
    content, and an old content put back would let a stale swap succeed.

    `best` is the checkpoint that retention leaves until a better one is committed; records that were
    written before it was kept have none.
    """

    attempt: int
    rev: int
    holder: str
    nonce: str
    kept: tuple[str, ...]
    best: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """What retention leaves, in the order in which it is restored: the newest first, the best last."""
        return self.kept if self.best is None or self.best in self.kept else (*self.kept, self.best)


class Lease:
    """The right of one process to commit, for as long as nobody took it over.

    Args:
        blobs: the store.
        run: run id.
        attempt: number of this attempt; a higher one fences it off.
        rebuild: HEAD as the folders tell it, where the record is missing or damaged.
    """

    def __init__(self, blobs: Blobs, run: str, *, attempt: int, rebuild: Callable[[], Head]) -> None:
        self._blobs = blobs
        self._run = run
        self._attempt = attempt
        self._rebuild = rebuild
        self._key = f"runs/{run}/HEAD.json"
        self._holder = nonce()
        self._held: Head | None = None

    @property
    def held(self) -> Head | None:
        """HEAD as this process last wrote it."""
        return self._held

    def read(self) -> Head | None:
        """HEAD as it is now; None where it is missing or unreadable."""
        return self._read()[0]

    def take(self) -> None:
        """Become the holder.

        Raises:
            ConflictError: a newer attempt is.
        """
        self._advance(lambda head: replace(head, attempt=self._attempt, holder=self._holder), taking=True)

    def check(self) -> Head:
        """HEAD, held by this process.

        Raises:
            ConflictError: somebody else holds it.
        """
        head = self.read() or self._held or self._rebuild()
        if head.holder != self._holder:
            raise self._fenced(head)
        return head

    def swap(self, change: Callable[[Head], Head]) -> None:
        """Make HEAD what `change` makes of it.

        Raises:
            ConflictError: somebody else holds it; nothing was changed.
        """
        self._advance(change, taking=False)

    def _read(self) -> tuple[Head | None, str | None]:
        """HEAD (None: missing or unreadable) and the version to swap it by (None: missing)."""
        entry = self._blobs.head(self._key)  # before the content: a change between shows in the swap
        if entry is None:
            return None, None
        try:
            return unseal(Head, self._blobs.get(self._key), kind="head", where=self._key), entry.version
        except (IntegrityError, NotFoundError):
            return None, entry.version

    def _advance(self, change: Callable[[Head], Head], *, taking: bool) -> None:
        while True:
            head, version = self._read()
            if head is None:
                head = self._rebuild()
                if self._held is not None and head.attempt <= self._attempt:
                    head = self._held
            if head.attempt > self._attempt or (head.holder != self._holder and not taking):
                raise self._fenced(head)
            head = replace(change(head), rev=head.rev + 1, nonce=nonce())
            if swap(self._blobs, self._key, seal("head", head), version=version):
                self._held = head
                return

    def _fenced(self, head: Head) -> ConflictError:
        is_older = head.attempt != self._attempt
        holder = f"attempt {head.attempt}" if is_older else "a later process of the same attempt"
        return ConflictError(
            f"run {self._run}: got a commit of attempt {self._attempt}, expected {holder}, which holds the run",
            hint="end this process; it was replaced",
            run=self._run,
            attempt=self._attempt,
            holder=head.attempt,
        )
