"""What is known about a run, as values; `treadle.store.runs` reads and writes them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from treadle.store.sealed import stamp

__all__ = [
    "Attempt",
    "AttemptEnd",
    "AttemptStatus",
    "Backend",
    "Beat",
    "Request",
    "RequestKind",
    "RunRecord",
    "RunState",
    "RunStatus",
    "RunSummary",
]


class Backend(enum.Enum):
    """Where an attempt runs. inline: in the calling process, without Ray."""

    inline = "inline"
    local = "local"
    ray = "ray"


class AttemptStatus(enum.Enum):
    """How an attempt ended; all but finished can be resumed.

    stopped: asked to leave. preempted: its machine goes away. lost: it said nothing any more; somebody else wrote that.
    """

    finished = "finished"
    stopped = "stopped"
    preempted = "preempted"
    failed = "failed"
    lost = "lost"


class RunState(enum.Enum):
    """queued: no attempt yet. running: an attempt without an end. unreadable: its record is damaged."""

    queued = "queued"
    running = "running"
    finished = "finished"
    stopped = "stopped"
    preempted = "preempted"
    failed = "failed"
    lost = "lost"
    unreadable = "unreadable"


class RequestKind(enum.Enum):
    """stop: commit and end. checkpoint: commit and go on. drain: commit now, and again just before the time is up."""

    stop = "stop"
    checkpoint = "checkpoint"
    drain = "drain"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What was submitted.

    Args:
        run: run id.
        job: name of the job.
        number: place among the runs of this store, by submission; it orders them.
        created_at: UTC, for people.
        spec_digest: sha256 of spec.json as stored.
        plan_digest: sha256 of plan.json as stored.
        backend: where it was submitted to.
        store: address of the store.
        info: further facts of the submission (versions, addresses, data digest), JSON.
    """

    run: str
    job: str
    number: int
    created_at: str
    spec_digest: str
    plan_digest: str
    backend: Backend
    store: str
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AttemptEnd:
    """How an attempt ended.

    Args:
        status: finished, stopped or failed.
        exit_code: of the process.
        error: the error as `TreadleError.to_json` gives it, or None.
        update: last committed update.
        metrics: last known values by name; may hold NaN.
        model_version: the version of the job's model that it registered, or None.
        ended_at: UTC, for people.
    """

    status: AttemptStatus
    exit_code: int = 0
    error: dict[str, Any] | None = None
    update: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    model_version: int | None = None
    ended_at: str = field(default_factory=stamp)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", {name: float(value) for name, value in self.metrics.items()})


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run; `end` is None while it lives, or when it was lost."""

    attempt: int
    backend: Backend
    started_at: str
    info: dict[str, Any]
    nonce: str
    end: AttemptEnd | None = None


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of life. Two looks that see the same `token` saw no life between them."""

    token: str
    payload: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Where a run stands: its state, its last attempt (0: none), how that ended, its last beat."""

    state: RunState
    attempt: int = 0
    end: AttemptEnd | None = None
    beat: Beat | None = None

    @property
    def update(self) -> int:
        """The last update known."""
        if self.end is not None:
            return self.end.update
        seen = self.beat.payload.get("update", 0) if self.beat else 0
        return seen if isinstance(seen, int) else 0


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One line of a list of runs."""

    run: str
    job: str
    number: int = 0
    created_at: str = ""
    backend: Backend | None = None
    state: RunState = RunState.unreadable
    attempt: int = 0
    update: int = 0
    model_version: int | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A wish to the attempt named in it; any other attempt leaves it alone.

    Args:
        within_s: how long there is from when it is seen; for `drain`.
    """

    seq: int
    kind: RequestKind
    reason: str
    attempt: int
    created_at: str
    nonce: str
    within_s: float | None = None
