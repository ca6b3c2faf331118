"""Many requests, one model: rows gather while the model runs, and leave in batches of like length.

One thread owns the model. There is no timer: the first row to arrive at an idle engine starts at
once, and whatever arrives meanwhile is the next batch's choice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from treadle.errors import InternalError, OverloadError, RequestError
from treadle.serve.batcher import Batcher
from treadle.serve.inputs import Encoded
from treadle.serve.predictor import Output, Predictor

__all__ = ["Answers", "Engine"]

_log = logging.getLogger(__name__)
_MOST_RETRY_AFTER_S = 60


class Answers(Protocol):
    """The part of a predictor that the worker thread needs."""

    def predict(self, rows: Sequence[Encoded]) -> list[Output]: ...


@dataclass(kw_only=True, eq=False)
class _Request:
    """A request under way. `outputs` belongs to the worker thread until the future is set."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Output]]
    outputs: list[Output | None]
    missing: int
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Row:
    encoded: Encoded
    request: _Request
    number: int

    @property
    def length(self) -> int:
        return self.encoded.length


@dataclass(kw_only=True)
class _Counts:
    """Since the start. frames: time steps of answered rows; slots: those and their padding."""

    requests: int = 0
    rows: int = 0
    batches: int = 0
    frames: int = 0
    slots: int = 0
    busy_s: float = 0.0
    errors: dict[int, int] = field(default_factory=lambda: defaultdict(int))


class Engine:
    """Answers requests of any event loop through one worker thread, until `close`.

    Args:
        predictor: the model, its input rules and its limits.
        model: runs the batches; the predictor itself when not given.
    """

    def __init__(self, predictor: Predictor, *, model: Answers | None = None) -> None:
        self.predictor = predictor
        self._model = model or predictor
        self._batcher: Batcher[_Row] = Batcher(max_queue_slots=predictor.serve.max_queue_slots)
        self._wakes = threading.Condition()
        self._is_closed = False
        self._counts = _Counts()
        self._started_s = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="treadle-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether rows offered now will be answered."""
        return self._thread.is_alive() and not self._is_closed

    async def answer(self, inputs: Any) -> list[Output]:
        """The answers to the inputs of one request, in order.

        A caller that is cancelled takes its waiting rows with it.

        Raises:
            RequestError: the model cannot take them.
            OverloadError: too much waits already; nothing of this request was queued.
            InternalError: the model failed.
        """
        rows = self.predictor.validate(inputs)
        loop = asyncio.get_running_loop()
        request = _Request(loop=loop, future=loop.create_future(), outputs=[None] * len(rows), missing=len(rows))
        waiting = [_Row(encoded=row, request=request, number=i) for i, row in enumerate(rows)]
        with self._wakes:
            if not self.is_alive:
                raise OverloadError("engine: got a request while stopping, expected it before", retry_after_s=1)
            try:
                tickets = self._batcher.offer(waiting)
            except OverloadError as error:
                retry_after_s = self._retry_after_s()
                raise OverloadError(error.message, hint=error.hint, retry_after_s=retry_after_s) from None
            self._counts.requests += 1
            self._wakes.notify()
        try:
            outputs = await request.future
        finally:
            if request.missing:
                with self._wakes:
                    self._batcher.withdraw(tickets)
        for i, output in enumerate(outputs):
            if not math.isfinite(output.confidence):
                raise RequestError(
                    f"inputs[{i}]: got numbers in which the network overflows, expected ones like those it learned from"
                )
        return outputs

    def count_error(self, status: int) -> None:
        """Count a request that was answered with an error."""
        with self._wakes:
            self._counts.errors[status] += 1

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what waits now."""
        with self._wakes:
            counts = self._counts
            return {
                "uptime_s": round(time.monotonic() - self._started_s, 3),
                "busy_s": round(counts.busy_s, 3),
                "requests": counts.requests,
                "rows": counts.rows,
                "batches": counts.batches,
                "frames": counts.frames,
                "slots": counts.slots,
                "fill": round(counts.frames / counts.slots, 4) if counts.slots else None,
                "waiting_rows": len(self._batcher),
                "waiting_slots": self._batcher.queued_slots,
                "errors": {str(status): number for status, number in sorted(counts.errors.items())},
            }

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Answer what waits, then end the thread. What still waits after `timeout_s` is refused."""
        with self._wakes:
            self._is_closed = True
            self._wakes.notify()
        self._thread.join(timeout_s)

    def _retry_after_s(self) -> int:
        """How long what waits will take, at the speed so far."""
        speed = self._counts.frames / self._counts.busy_s if self._counts.busy_s else math.inf
        return max(1, min(_MOST_RETRY_AFTER_S, math.ceil(self._batcher.queued_slots / speed)))

    # The worker thread

    def _work(self) -> None:
        budget_slots = self.predictor.serve.batch_slots
        while True:
            with self._wakes:
                self._wakes.wait_for(lambda: len(self._batcher) or self._is_closed)
                rows = self._batcher.take(budget_slots)
            if not rows:
                return
            began_s = time.monotonic()
            answers = self._run(rows)
            with self._wakes:
                self._counts.busy_s += time.monotonic() - began_s
                self._counts.batches += 1
                self._counts.rows += len(rows)
                self._counts.frames += sum(row.length for row in rows)
                self._counts.slots += len(rows) * max(row.length for row in rows)
            self._deliver(rows, answers)

    def _run(self, rows: list[_Row]) -> list[Output | Exception]:
        try:
            return list(self._model.predict([row.encoded for row in rows]))
        except Exception as error:
            failure = error
        if len(rows) > 1:  # one row must not take its neighbours with it
            return [answer for row in rows for answer in self._run([row])]
        _log.error("the model failed on a row of %d time steps", rows[0].length, exc_info=failure)
        return [failure]

    def _deliver(self, rows: list[_Row], answers: list[Output | Exception]) -> None:
        finished: dict[asyncio.AbstractEventLoop, list[_Request]] = defaultdict(list)
        for row, answer in zip(rows, answers, strict=True):
            request = row.request
            if isinstance(answer, Exception):
                request.error = answer
            else:
                request.outputs[row.number] = answer
            request.missing -= 1
            if not request.missing:
                finished[request.loop].append(request)
        for loop, requests in finished.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(_resolve, requests)


def _resolve(requests: list[_Request]) -> None:
    """Runs in the event loop of the requests."""
    for request in requests:
        if request.future.done():  # its caller was cancelled
            continue
        if request.error is not None:
            request.future.set_exception(InternalError("model: failed on this request, expected an answer"))
        else:
            request.future.set_result([output for output in request.outputs if output is not None])
