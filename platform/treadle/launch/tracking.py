"""Where an attempt writes down what happens: metrics and events in the store, and W&B beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treadle import wire
from treadle.launch.surroundings import has_wandb_key, wandb_folder
from treadle.plan import Plan
from treadle.spec import JobSpec, WandbMode
from treadle.store import Blobs, Journal, RequestKind, Runs
from treadle.track import RunTracker, Sink, catalogue, now_s
from treadle.track.wandb import WandbRun, WandbSink

__all__ = ["Events", "open_tracker"]


class Events:
    """The events of a run, written from outside the loop: by the driver, or where the tracker is closing.

    Args:
        writer: names who writes; two at a time have two names.
    """

    def __init__(self, blobs: Blobs, run: str, attempt: int, *, writer: str) -> None:
        self._journal = Journal(blobs, f"runs/{run}/events.jsonl", writer=writer)
        self._attempt = attempt

    @property
    def journal(self) -> Journal:
        return self._journal

    def tell(self, event: str, /, **facts: Any) -> None:
        self._journal.append({"schema": 1, "attempt": self._attempt, "time": now_s(), "event": event, **facts})

    def close(self) -> None:
        self._journal.close()


def open_tracker(
    blobs: Blobs, run: str, attempt: int, spec: JobSpec, plan: Plan, *, code: dict[str, Any], sinks: Sequence[Sink] = ()
) -> RunTracker:
    """The tracker of rank 0; `sinks` are shown a copy too."""
    names = catalogue(spec.task)
    writer = f"rank0-a{attempt}"
    events = Events(blobs, run, attempt, writer=writer)
    shown = list(sinks)
    if spec.track.wandb is not WandbMode.disabled:
        told = WandbRun(
            run_id=run,
            job=spec.name,
            project=spec.track.project,
            entity=spec.track.entity,
            folder=wandb_folder(blobs, run),
            config={"spec": wire.encode(spec), "plan": wire.encode(plan), "code": code},
            attempt=attempt,
        )
        shown.append(
            WandbSink(
                told,
                mode=spec.track.wandb,
                catalogue=names,
                # Comes from the sink's own thread, also while the tracker closes and waits for it: past the tracker.
                notice=lambda line: events.tell("notice", text=line),
                api_key_present=has_wandb_key(),
                request_stop=lambda: _request_stop(blobs, run),
            )
        )
    metrics = Journal(blobs, f"runs/{run}/metrics.jsonl", writer=writer)
    return RunTracker(metrics=metrics, events=events.journal, sinks=shown, attempt=attempt, catalogue=names)


def _request_stop(blobs: Blobs, run: str) -> None:
    Runs(blobs).request(run, RequestKind.stop, "stopped in W&B")
