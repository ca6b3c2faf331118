"""The run's own record of numbers and events, and the places that are shown a copy.

`metrics.jsonl` and `events.jsonl` are the truth; W&B and the terminal are sinks, which may
lose rows but never end a run: a sink that raises is left out from then on, with an event.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from treadle import wire
from treadle.errors import IntegrityError, InternalError
from treadle.track.catalogue import Metric

__all__ = ["History", "Lines", "NullTracker", "RunTracker", "Series", "Sink", "Tracker", "now_s", "read_metrics"]

SCHEMA = 1
_RESERVED = frozenset({"schema", "attempt", "time", "event"})


def now_s() -> float:
    """Unix seconds: the one reading of the wall clock. Durations take time.monotonic()."""
    return time.time()  # noqa: TID251


class Lines(Protocol):
    """A place that keeps JSON rows in order, each whole or not at all."""

    def append(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> object: ...


class Sink(Protocol):
    """A place that is shown what was logged; it may drop rows."""

    def log(self, update: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, name: str, facts: Mapping[str, Any]) -> None: ...

    def close(self, outcome: str) -> None: ...


class Tracker(Protocol):
    """What the training loop tells."""

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Record numbers that hold after `update` updates."""
        ...

    def event(self, name: str, /, **facts: Any) -> None:
        """Record that something happened, with JSON-ready facts."""
        ...

    def close(self, outcome: str) -> None:
        """End the record; `outcome` is "finished", "stopped", "preempted" or "failed"."""
        ...


class NullTracker:
    """A tracker that keeps nothing: for ranks above 0 and for tests."""

    def log(self, update: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, name: str, /, **facts: Any) -> None: ...

    def close(self, outcome: str) -> None: ...


class RunTracker:
    """The tracker of one attempt of a run. Threads may share it.

    Args:
        metrics: where metric rows go, kept open by this tracker until `close`.
        events: where event rows go, likewise.
        sinks: who is shown a copy, in this order.
        attempt: 1 for the first start of the run.
        catalogue: the metrics that may be logged.
    """

    def __init__(
        self, *, metrics: Lines, events: Lines, sinks: Sequence[Sink], attempt: int, catalogue: Mapping[str, Metric]
    ) -> None:
        self._metrics = metrics
        self._events = events
        self._sinks = list(sinks)
        self._attempt = attempt
        self._catalogue = catalogue
        self._lock = threading.RLock()
        self._is_open = True

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Write one row and show it to the sinks.

        Non-finite values are written as "nan", "inf" or "-inf", since JSON has no such numbers.

        Raises:
            InternalError: a name that is not in the catalogue, or a value that is not a number.
        """
        if unknown := sorted(set(metrics) - self._catalogue.keys()):
            raise InternalError(f"metrics: got {unknown}, expected names of treadle.track.catalogue")
        values = {name: _number(name, value) for name, value in metrics.items()}
        row = {
            "schema": SCHEMA,
            "attempt": self._attempt,
            "update": int(update),
            "time": now_s(),
            "metrics": {name: value if math.isfinite(value) else str(value) for name, value in values.items()},
        }
        with self._lock:
            self._check_open()
            self._metrics.append(row)
            self._show("log", int(update), values)

    def event(self, name: str, /, **facts: Any) -> None:
        """Write one event and show it to the sinks.

        Raises:
            InternalError: a fact that bears the name of a fixed field.
        """
        if taken := sorted(_RESERVED & facts.keys()):
            raise InternalError(f"event {name!r}: got facts named {taken}, expected other names")
        plain = _finite(wire.encode(facts))
        with self._lock:
            self._check_open()
            self._write_event(name, plain)
            self._show("event", name, plain)

    def close(self, outcome: str) -> None:
        """Write the event `end`, then close the sinks and both files. A second call does nothing."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            with contextlib.closing(self._events), contextlib.closing(self._metrics):
                self._write_event("end", {"outcome": outcome})
                self._show("close", outcome)

    def _check_open(self) -> None:
        if not self._is_open:
            raise InternalError("tracker: got a row after close(), expected none")

    def _write_event(self, name: str, facts: Mapping[str, Any]) -> None:
        self._events.append({"schema": SCHEMA, "attempt": self._attempt, "time": now_s(), "event": name, **facts})

    def _show(self, method: str, *args: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(*args)
            except Exception as error:
                self._sinks.remove(sink)
                self._write_event("sink_lost", {"sink": type(sink).__name__, "reason": str(error)[:500]})


def _number(name: str, value: Any) -> float:
    if isinstance(value, int):
        return int(value)
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise InternalError(f"metrics {name!r}: got {type(value).__name__}, expected a number")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric over the updates, ascending; the four columns are of one length."""

    updates: tuple[int, ...]
    values: tuple[float, ...]
    times_s: tuple[float, ...]
    attempts: tuple[int, ...]

    @property
    def last(self) -> float:
        return self.values[-1]


@dataclass(frozen=True, kw_only=True)
class History:
    """What a metrics file says.

    Args:
        series: by metric name; a metric that was never logged is missing.
        starts: attempt -> its first logged update.
        num_skipped: rows that could not be read (a torn tail, another schema).
    """

    series: dict[str, Series]
    starts: dict[int, int]
    num_skipped: int

    def last(self, name: str) -> float | None:
        """The newest value of a metric, or None."""
        return self.series[name].last if name in self.series else None


def read_metrics(rows: Iterable[Any]) -> History:
    """The columns in metric rows, given as mappings or as JSON text.

    Where several attempts logged the same update, the highest attempt counts: the others went
    on from a state that was thrown away. Within one attempt the later row wins, name by name.
    """
    cells: dict[str, dict[int, tuple[int, float, float]]] = {}  # name -> update -> attempt, time, value
    newest: dict[int, int] = {}  # update -> highest attempt
    starts: dict[int, int] = {}
    num_skipped = 0
    for item in rows:
        try:
            attempt, update, time_s, values = _parse(item)
        except (IntegrityError, KeyError, TypeError, ValueError, AttributeError):
            num_skipped += 1
            continue
        starts[attempt] = min(update, starts.get(attempt, update))
        newest[update] = max(attempt, newest.get(update, attempt))
        for name, value in values.items():
            column = cells.setdefault(name, {})
            if update not in column or column[update][0] <= attempt:
                column[update] = (attempt, time_s, value)
    series = {}
    for name, column in cells.items():
        kept = [(update, *cell) for update, cell in sorted(column.items()) if cell[0] == newest[update]]
        if kept:
            updates, attempts, times_s, values = zip(*kept, strict=True)
            series[name] = Series(updates=updates, values=values, times_s=times_s, attempts=attempts)
    return History(series=series, starts=dict(sorted(starts.items())), num_skipped=num_skipped)


def _parse(item: Any) -> tuple[int, int, float, dict[str, float]]:
    row = wire.parse_json(item, where="metrics row") if isinstance(item, str | bytes) else item
    if row["schema"] != SCHEMA:
        raise ValueError("another schema")
    values = {str(name): float(value) for name, value in row["metrics"].items()}
    return int(row["attempt"]), int(row["update"]), float(row["time"]), values
