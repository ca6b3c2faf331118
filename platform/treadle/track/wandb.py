"""A copy of the run's numbers at Weights & Biases, which may never slow, fail or end the run.

The only importer of wandb. Every call happens on one side thread behind a bounded queue:
`log` and `event` cost microseconds whatever the server does, the oldest rows are dropped (and
counted) when the queue is full, and `close` is bounded. Whatever goes wrong becomes one line
given to `notice`; metrics.jsonl has every row in any case.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.spec.job import WandbMode
from treadle.track.catalogue import Direction, Metric

__all__ = ["WandbRun", "WandbSink"]

_EXIT_CODES = {"finished": 0, "stopped": 0, "preempted": 143}  # 143 is shown as "failed", resumable
_ALERTS = frozenset({"alert", "error", "preempt", "restart"})
_SUMMARY = {Direction.up: "max,last", Direction.down: "min,last"}


@dataclass(frozen=True, kw_only=True)
class WandbRun:
    """What W&B is told about a run.

    Args:
        run_id: the id of the treadle run; with it a restart goes on in the same W&B run.
        job: the display name.
        project: W&B project.
        entity: W&B user or team; None takes the key's default.
        folder: where wandb writes; each attempt gets a folder of its own below it.
        config: nested plain values, secrets left out by the caller.
        attempt: 1 for the first start.
        group: experiment or sweep the run belongs to.
        job_type: "train", "eval", "trial" or "serve".
        tags: free labels.
        base_url: another server than the one wandb is configured for.
    """

    run_id: str
    job: str
    project: str
    folder: Path
    config: Mapping[str, Any]
    entity: str | None = None
    attempt: int = 1
    group: str | None = None
    job_type: str = "train"
    tags: Sequence[str] = ()
    base_url: str | None = None


class WandbSink:
    """The sink; wandb itself is imported and started on its thread, nobody waits for it.

    Args:
        run: what W&B is told.
        mode: auto and online upload when a key is present and the server answers; offline never does.
        catalogue: the metrics, whose directions become W&B summaries.
        notice: takes one line for people; called from the side thread.
        api_key_present: whether wandb will find a key (environment or netrc: the caller looks).
        request_stop: called when the stop button is pressed in the W&B user interface.
        init_timeout_s: longest wait for the server at the start.
        finish_timeout_s: longest wait for the upload at the end.
        max_queue: rows kept for a client that is not ready.
    """

    def __init__(
        self,
        run: WandbRun,
        *,
        mode: WandbMode,
        catalogue: Mapping[str, Metric],
        notice: Callable[[str], None],
        api_key_present: bool,
        request_stop: Callable[[], None] | None = None,
        init_timeout_s: float = 20.0,
        finish_timeout_s: float = 30.0,
        max_queue: int = 10_000,
    ) -> None:
        self._told = run
        self._mode = mode
        self._catalogue = catalogue
        self._say = notice
        self._has_key = api_key_present
        self._request_stop = request_stop
        self._init_timeout_s = init_timeout_s
        self._finish_timeout_s = finish_timeout_s
        self._max_queue = max_queue
        self._queue: deque[tuple[str, Any, Mapping[str, Any]]] = deque()
        self._ready = threading.Condition()
        self._outcome: str | None = None
        self._service: Any = None
        self._has_started = False
        self._is_off = mode is WandbMode.disabled
        self._update = 0
        self.num_dropped = 0
        self.num_failed = 0
        self._thread = threading.Thread(target=self._work, name="treadle-wandb", daemon=True)
        if not self._is_off:
            self._thread.start()

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Queue one row."""
        self._put(("log", update, dict(metrics)))

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Queue one event: a point `events/<name>`, and an alert where people should look (`level` "alert", errors)."""
        self._put(("event", name, dict(facts)))

    def close(self, outcome: str) -> None:
        """Upload what is left and end; returns within both timeouts and 15 s, nothing keeps running."""
        if not self._thread.is_alive() or self._outcome is not None:
            return
        with self._ready:
            self._outcome = outcome
            self._ready.notify()
        start_s = 0.0 if self._has_started else self._init_timeout_s
        self._thread.join(start_s + self._finish_timeout_s + 5)
        if self._thread.is_alive():
            # A client that hangs cannot be asked; without its service process its calls fail.
            self._is_off = True
            with contextlib.suppress(Exception):
                self._service.kill()
            self._thread.join(5)
            with contextlib.suppress(Exception):
                self._service.wait(5)
            self._notice("W&B: the client hung and was ended; metrics.jsonl has every row")
        if self.num_dropped or self.num_failed:
            self._notice(
                f"W&B: {self.num_dropped} rows dropped, {self.num_failed} calls failed; metrics.jsonl has every row"
            )

    def _put(self, item: tuple[str, Any, Mapping[str, Any]]) -> None:
        if self._is_off:
            return
        with self._ready:
            if len(self._queue) >= self._max_queue:
                self._queue.popleft()
                self.num_dropped += 1
            self._queue.append(item)
            self._ready.notify()

    def _take(self) -> tuple[str, Any, Mapping[str, Any]] | None:
        """The next item, waiting for one; None once closed and empty."""
        with self._ready:
            while not self._queue:
                if self._outcome is not None:
                    return None
                self._ready.wait()
            return self._queue.popleft()

    def _notice(self, line: str) -> None:
        with contextlib.suppress(Exception):
            self._say(" ".join(line.split()))

    # Below here: the side thread.

    def _work(self) -> None:
        try:
            import wandb
        except Exception as error:
            self._is_off = True
            self._queue.clear()
            self._notice(f"W&B: wandb cannot be imported ({error}) -> nothing is sent; metrics.jsonl has every row")
            return
        try:
            self._run(wandb)
        except (Exception, SystemExit) as error:  # teardown() calls sys.exit where the service failed
            if not self._is_off:
                self._notice(f"W&B: {_reason(error)} -> nothing more is sent; metrics.jsonl has every row")
        finally:
            self._is_off = True
            with contextlib.suppress(Exception, SystemExit):
                wandb.teardown()

    def _run(self, wandb: Any) -> None:
        run = self._start(wandb)
        self._has_started = True
        while (item := self._take()) is not None:
            try:
                self._send(run, *item)
            except Exception:
                self.num_failed += 1
        outcome = self._outcome or "failed"
        path = run.settings.sync_dir
        try:
            if outcome == "preempted":
                run.mark_preempting()
            run.finish(exit_code=_EXIT_CODES.get(outcome, 1))
        except TimeoutError:
            self._notice(
                f"W&B: the upload was cut after {self._finish_timeout_s:.0f} s -> "
                f"send it again with 'wandb sync --include-online {path}'"
            )

    def _start(self, wandb: Any) -> Any:
        why_offline = self._why_offline(wandb)
        if why_offline is None:
            try:
                run = self._init(wandb, "online")
            except Exception as error:
                why_offline = _reason(error)
                wandb.teardown()  # else the offline start with the same id is refused: "run ID is in use"
            else:
                self._notice(f"W&B: logging to {run.url}")
                return run
        run = self._init(wandb, "offline")
        if why_offline:
            path = run.settings.sync_dir
            self._notice(f"W&B: {why_offline} -> logging offline to {path}; upload with 'wandb sync {path}'")
        return run

    def _why_offline(self, wandb: Any) -> str | None:
        """Why not to go online: "" because it was asked for, None if nothing speaks against it."""
        if self._mode is WandbMode.offline:
            return ""
        if not self._has_key:
            return "no API key"
        if urllib.request.getproxies():
            return None  # the server need not be reachable directly
        url = urllib.parse.urlsplit(
            self._told.base_url or wandb.setup(settings=self._settings(wandb)).settings.base_url
        )
        # wandb takes the whole init_timeout to give up on a port where nobody listens.
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            socket.create_connection((url.hostname or "", port), timeout=min(3.0, self._init_timeout_s)).close()
        except OSError as error:
            return f"{url.hostname}:{port} cannot be reached ({error.strerror or error})"
        return None

    def _settings(self, wandb: Any) -> Any:
        extra: dict[str, Any] = {}
        if self._told.base_url is not None:
            extra["base_url"] = self._told.base_url
        if self._request_stop is not None:
            extra["stop_fn"] = self._request_stop
        return wandb.Settings(
            init_timeout=self._init_timeout_s,
            finish_timeout=self._finish_timeout_s,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=2,
            x_label=f"rank0.a{self._told.attempt}",
            console="off",
            quiet=True,
            silent=True,
            disable_git=True,
            disable_code=True,
            **extra,
        )

    def _init(self, wandb: Any, mode: str) -> Any:
        told = self._told
        # Stamps of wandb's folders have a resolution of 1 s: the attempt keeps two of them apart.
        folder = told.folder / f"attempt-{told.attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._settings(wandb)
        _silence(wandb)
        # Set up first: wandb prints before it has read the settings of init().
        singleton = wandb.setup(settings=settings)
        with contextlib.suppress(AttributeError):
            self._service = singleton.ensure_service()._proc._process  # noqa: SLF001
        run = wandb.init(
            id=told.run_id,
            name=told.job,
            project=told.project,
            entity=told.entity,
            group=told.group,
            job_type=told.job_type,
            tags=list(told.tags),
            config=dict(told.config),
            dir=str(folder),
            mode=mode,
            resume="allow",
            settings=settings,
        )
        run.define_metric("trainer/update")
        run.define_metric("*", step_metric="trainer/update")
        for metric in self._catalogue.values():
            if metric.good in _SUMMARY:
                run.define_metric(metric.name, step_metric="trainer/update", summary=_SUMMARY[metric.good])
        return run

    def _send(self, run: Any, what: str, key: Any, values: Mapping[str, Any]) -> None:
        if what == "log":
            self._update = key
            run.log({"trainer/update": key, **values})
            return
        run.log({"trainer/update": self._update, f"events/{key}": 1})
        if key in _ALERTS or values.get("level") == "alert":
            text = ", ".join(f"{name}: {value}" for name, value in values.items())
            run.alert(title=f"{self._told.job}: {key}", text=text or key)


def _silence(wandb: Any) -> None:
    """Switch off wandb's own telemetry, whose threads outlive the run and call home even offline."""
    with contextlib.suppress(ImportError, AttributeError):
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
