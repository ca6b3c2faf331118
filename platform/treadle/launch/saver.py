"""Commits states in the background, beside the loop that goes on changing them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from treadle.errors import DivergenceError, IntegrityError, TransientError, TreadleError
from treadle.spec import JobSpec
from treadle.store import Checkpoints
from treadle.track import Tracker
from treadle.train import TrainState
from treadle.train.snapshot import Snapshot
from treadle.train.updater import UPDATER_FILE

__all__ = ["NoSaver", "Saver"]

GIVE_UP_S = 900.0
_NICE = 10
"""Of the writing threads: where all cores are taken they get a tenth of one (tests/bench/checkpoints.py)."""


class Saver:
    """Copies states while the loop reads them, and commits them one at a time on threads of its own.

    There is one set of buffers. A state that comes due while another is on its way is not saved then, but at the first
    update after it; a state that is saved on purpose (a stop, a wish, the end) waits.

    A store that is away for a while costs checkpoints, not the run: the next state replaces the one that could not be
    committed, until GIVE_UP_S have passed without any. So do bytes that are damaged on the way, and states that are
    not finite, which are never committed.

    Args:
        checkpoints: of the run, acquired.
        spec: of the job.
        tracker: is told of every commit (`checkpoint`), failure (`checkpoint_failed`) and refusal
            (`checkpoint_refused`), from threads of the saver.

    Cost: one times the state in host memory; what the loop waits is in `waited_ms` of the event `checkpoint`.
    """

    def __init__(self, checkpoints: Checkpoints, spec: JobSpec, tracker: Tracker) -> None:
        self.last_commit_s = 0.0
        """Time from `save` to the end of the last commit; 0 before the first."""
        self.skipped = 0
        """How often a state came due by count while another was on its way."""
        self._checkpoints = checkpoints
        self._spec = spec.checkpoint
        self._every_s = spec.checkpoint.every_s  # reads a string
        self._tracker = tracker
        self._snapshot = Snapshot()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="treadle-saver", initializer=_give_way)
        self._pending: Future[None] | None = None
        self._saved_at = self._committed_at = time.monotonic()
        self._saved: tuple[TrainState, bool] | None = None
        self._counted_from: int | None = None

    def is_due(self, state: TrainState) -> bool:
        """Whether to save after the update that `state` is about to take.

        Raises:
            TreadleError: what the last commit raised, where the next one cannot mend it.
        """
        every = self._spec.every_updates
        self._settle_if_done()
        if self._pending is not None:
            self.skipped += every is not None and (state.update + 1) % every == 0
            return False
        if self._counted_from is None:
            self._counted_from = state.update
        # At multiples of `every`, whatever was resumed from; later where a commit was in flight at one.
        by_count = every is not None and (state.update + 1) // every > self._counted_from // every
        return by_count or time.monotonic() - self._saved_at >= self._every_s

    def save(
        self,
        state: TrainState,
        tensors: Mapping[str, Mapping[str, Tensor]],
        *,
        best: bool = False,
        inline: Collection[str] = (),
    ) -> None:
        """Start to copy `tensors` and to commit the copies; waits for the state before, where that is on its way.

        Args:
            state: where the run stands.
            tensors: live ones by file and by name; nothing may change them before `join`.
            best: whether retention is to keep this one until another best.
            inline: names of tensors that a forward pass changes: they are copied here.

        Raises:
            TreadleError: as in `is_due`.
        """
        self._settle_if_done()
        if self._saved in ((state, best), (state, True)):
            return
        self._snapshot.join()
        self._settle()
        self._saved, self._counted_from, self._saved_at = (state, best), state.update, time.monotonic()
        self._snapshot.begin(tensors, inline=inline)
        self._pending = self._pool.submit(self._commit, state, best, self._saved_at)

    def join(self) -> None:
        """Return when the tensors of the last `save` may be changed; at once where nothing is being copied."""
        self._snapshot.join()

    def wait(self) -> None:
        """Return when everything saved is committed.

        Raises:
            TreadleError: what the last commit raised.
        """
        self._snapshot.join()
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        """End the threads, after the commit in flight."""
        self._pool.shutdown(wait=True)
        self._snapshot.close()

    def _settle_if_done(self) -> None:
        if self._pending is not None and self._pending.done():
            self._settle()

    def _settle(self) -> None:
        """Take note of the last commit; raise what cannot be mended by the next one."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
                self._committed_at = time.monotonic()
        except (TransientError, IntegrityError, DivergenceError) as error:
            if time.monotonic() - self._committed_at > GIVE_UP_S:
                raise
            self._saved = None
            self._tracker.event(_event(error), message=str(error)[:2000])

    def _commit(self, state: TrainState, best: bool, started: float) -> None:
        contents = self._snapshot.contents()
        self._refuse_nonfinite(state)
        self._checkpoints.commit(state.update, contents, state.to_json(), best=best)
        self.last_commit_s = time.monotonic() - started
        self._tracker.event(
            "checkpoint",
            update=state.update,
            epoch=state.epoch,
            bytes=sum(len(data) for data in contents.values()),
            commit_s=round(self.last_commit_s, 4),
            waited_ms=round(1000 * self._snapshot.waited_s, 3),
            skipped=self.skipped,
            best=best,
        )

    def _refuse_nonfinite(self, state: TrainState) -> None:
        # The updater notes the norms of updates that it refused: they may be anything.
        names = [name for name in self._snapshot.nonfinite() if not name.startswith(f"{UPDATER_FILE}: ")]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise DivergenceError(
                f"checkpoint of update {state.update}: got values that are not finite in {', '.join(names[:5])}{more}, "
                "expected finite ones; it was not kept",
                update=state.update,
            )


class NoSaver:
    """For ranks above 0."""

    last_commit_s = 0.0

    def is_due(self, state: TrainState) -> bool:
        return False

    def save(
        self,
        state: TrainState,
        tensors: Mapping[str, Mapping[str, Tensor]],
        *,
        best: bool = False,
        inline: Collection[str] = (),
    ) -> None: ...

    def join(self) -> None: ...

    def wait(self) -> None: ...


def _event(error: TreadleError) -> str:
    return "checkpoint_refused" if isinstance(error, DivergenceError) else "checkpoint_failed"


def _give_way() -> None:
    """Let this thread, and those that it starts, run where the others leave time."""
    if sys.platform == "linux":  # elsewhere the number would mean the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
