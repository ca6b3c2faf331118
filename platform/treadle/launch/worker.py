"""What every rank runs: read the frozen job, build the run, train, and on rank 0 keep the result.

Imports stand inside the functions: the driver sends `train_rank` to processes in which torch has
not been imported yet, and whose thread count must be set first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from treadle.data import Manifest
    from treadle.launch.assemble import Surroundings
    from treadle.spec import JobSpec
    from treadle.store import Blobs, Checkpoints, Runs
    from treadle.track import RunTracker
    from treadle.train import Evaluation, Outcome, TrainState, World

__all__ = ["Assignment", "train_rank"]

POLL_S = 0.5
GIVE_UP_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a rank must know to find the rest: JSON-ready, no secrets.

    Args:
        store: address of the store. run, attempt: which one.
        code: git commit and dirty flag of the submitter's source.
    """

    store: str
    run: str
    attempt: int
    code: dict[str, Any]


def train_rank(assignment: Assignment, world: World) -> dict[str, Any]:
    """Train one rank to the end; rank 0 registers the model. Returns a JSON-ready summary.

    Raises:
        TreadleError: bad data, divergence, a damaged checkpoint, or a newer attempt that took over.
    """
    import torch

    from treadle.launch.assemble import Surroundings, assemble
    from treadle.launch.records import read_job
    from treadle.store import Checkpoints, Runs, open_blobs
    from treadle.track import NullTracker
    from treadle.train import fit

    blobs = open_blobs(assignment.store)
    runs = Runs(blobs)
    spec, plan = read_job(runs, assignment.run)
    torch.set_num_threads(spec.cluster.cpus_per_worker)
    checkpoints = Checkpoints(
        blobs,
        assignment.run,
        attempt=assignment.attempt,
        keep_last=spec.checkpoint.keep_last,
        spec_digest=plan.spec_digest,
        data_digest=plan.data_digest,
    )
    with world.first() as is_first:
        if is_first:
            checkpoints.acquire()
    tracker = _tracker(assignment, blobs, spec, plan) if is_first else None
    control = _Mailbox(runs, assignment) if is_first else None
    saver = _Saver(checkpoints, spec, tracker) if is_first else None
    try:
        around = Surroundings(
            blobs=blobs,
            run=assignment.run,
            spec=spec,
            plan=plan,
            world=world,
            checkpoints=checkpoints,
            saver=saver or _NoSaver(),
            control=control or _NoMailbox(),
            track=tracker or NullTracker(),
        )
        run, manifest, reader = assemble(around)
        with reader:
            outcome = fit(run)
        summary = {"status": outcome.status, "update": outcome.state.update, "metrics": {}, "model_version": None}
        if tracker is not None and outcome.status == "finished":
            summary |= _keep_model(around, assignment, run.network, manifest, outcome)
            tracker.event("registered", model=spec.name, version=summary["model_version"])
        if tracker is not None:
            tracker.close(outcome.status)
    except BaseException as error:
        if saver is not None:
            saver.close()  # a commit in flight still belongs to the record
        if tracker is not None:
            tracker.event("error", kind=type(error).__name__, message=str(error)[:2000])
            tracker.close("failed")
        raise
    else:
        return summary
    finally:
        for part in (control, saver):
            if part is not None:
                part.close()


def _tracker(assignment: Assignment, blobs: Blobs, spec: JobSpec, plan: Any) -> RunTracker:
    from treadle import wire
    from treadle.launch.surroundings import has_wandb_key, wandb_folder
    from treadle.spec import WandbMode
    from treadle.store import Journal
    from treadle.track import RunTracker, catalogue, now_s
    from treadle.track.wandb import WandbRun, WandbSink

    folder = f"runs/{assignment.run}"
    writer = f"rank0-a{assignment.attempt}"
    names = catalogue(spec.task)
    sinks: list[WandbSink] = []
    events = Journal(blobs, f"{folder}/events.jsonl", writer=writer)

    def notice(line: str) -> None:
        # Comes from the sink's own thread, also while the tracker closes and waits for it: past the tracker.
        events.append({"schema": 1, "attempt": assignment.attempt, "time": now_s(), "event": "notice", "text": line})

    if spec.track.wandb is not WandbMode.disabled:
        told = WandbRun(
            run_id=assignment.run,
            job=spec.name,
            project=spec.track.project,
            entity=spec.track.entity,
            folder=wandb_folder(blobs, assignment.run),
            config={"spec": wire.encode(spec), "plan": wire.encode(plan), "code": assignment.code},
            attempt=assignment.attempt,
        )
        sinks.append(
            WandbSink(
                told,
                mode=spec.track.wandb,
                catalogue=names,
                notice=notice,
                api_key_present=has_wandb_key(),
                request_stop=lambda: _request_stop(blobs, assignment.run),
            )
        )
    metrics = Journal(blobs, f"{folder}/metrics.jsonl", writer=writer)
    return RunTracker(metrics=metrics, events=events, sinks=sinks, attempt=assignment.attempt, catalogue=names)


def _request_stop(blobs: Blobs, run: str) -> None:
    from treadle.store import RequestKind, Runs

    Runs(blobs).request(run, RequestKind.stop, "stopped in W&B")


def _keep_model(
    around: Surroundings, assignment: Assignment, network: nn.Module, manifest: Manifest, outcome: Outcome
) -> dict[str, Any]:
    """Write the model's files below the run and register them; registering copies nothing."""
    from treadle import wire
    from treadle.launch.card import model_card
    from treadle.launch.surroundings import environment_digest
    from treadle.store import Code, ModelDraft, ModelFile, Registry
    from treadle.train import ModelConfig, export_network

    spec, blobs, header, preprocessing = around.spec, around.blobs, manifest.header, manifest.preprocessing
    signature = preprocessing.signature(header.max_length)
    config = ModelConfig(
        name=spec.name,
        model=spec.model,
        task=spec.task,
        signature=signature,
        preprocessing=preprocessing,
        serve=spec.serve,
    )
    metrics = {f"test/{name}": value for name, value in outcome.test.metrics.items()} if outcome.test else {}
    files = export_network(network, config)
    files["eval.json"] = _evaluation_json(outcome.test, preprocessing.labels)
    files["card.md"] = model_card(spec, header, metrics, assignment.run).encode()
    folder = f"runs/{assignment.run}/model-a{assignment.attempt}"
    kept = {}
    for name, data in files.items():
        blobs.put(f"{folder}/{name}", data)
        kept[name] = ModelFile.of(f"{folder}/{name}", data)
    version = Registry(blobs).register(
        ModelDraft(
            name=spec.name,
            run=assignment.run,
            files=kept,
            signature=wire.encode(signature),
            spec_digest=spec.digest,
            data_digest=around.plan.data_digest,
            code=Code(**assignment.code),
            environment_digest=environment_digest(),
            metrics=metrics,
            card=f"{folder}/card.md",
        )
    )
    return {"metrics": metrics, "model_version": version.version}


def _evaluation_json(evaluation: Evaluation | None, labels: tuple[str, ...]) -> bytes:
    from treadle import wire

    body = wire.encode(evaluation) if evaluation is not None else None
    return wire.canonical({"schema": 1, "labels": list(labels), "test": body})


class _Saver:
    """Commits states one at a time on a thread of its own; the loop only hands over owned copies.

    A store that is away for a while costs checkpoints, not the run: the next state replaces the one
    that could not be committed, until GIVE_UP_S have passed without any.
    """

    def __init__(self, checkpoints: Checkpoints, spec: JobSpec, tracker: RunTracker | None) -> None:
        self._checkpoints = checkpoints
        self._spec = spec.checkpoint
        self._tracker = tracker
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="treadle-saver")
        self._pending: Future[Any] | None = None
        self._saved_at = self._committed_at = time.monotonic()
        self._saved_update = -1  # none by this attempt
        self._counted_from: int | None = None

    def is_due(self, state: TrainState) -> bool:
        if self._pending is not None and not self._pending.done():
            return False  # one commit in flight; the next state is newer anyway
        self._settle()
        if self._counted_from is None:
            self._counted_from = state.update
        every = self._spec.every_updates
        # At multiples of `every`, whatever was resumed from; later where a commit was in flight at one.
        by_count = every is not None and (state.update + 1) // every > self._counted_from // every
        return by_count or time.monotonic() - self._saved_at >= self._spec.every_s

    def save(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None:
        if state.update == self._saved_update:
            return
        self._settle()
        self._saved_update = self._counted_from = state.update
        self._saved_at = time.monotonic()
        self._pending = self._pool.submit(self._commit, state, tensors)

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _settle(self) -> None:
        """Take note of the last commit; raise what cannot be mended by the next one."""
        from treadle.errors import TransientError

        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
                self._committed_at = time.monotonic()
        except TransientError as error:
            if time.monotonic() - self._committed_at > GIVE_UP_S:
                raise
            self._saved_update = -1
            if self._tracker is not None:
                self._tracker.event("checkpoint_failed", message=str(error)[:2000])

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _commit(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None:
        from treadle.train import pack

        self._checkpoints.commit(state.update, pack(tensors), state.to_json())
        if self._tracker is not None:
            self._tracker.event("checkpoint", update=state.update, epoch=state.epoch)


class _NoSaver:
    """For ranks above 0."""

    def is_due(self, state: TrainState) -> bool:
        return False

    def save(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None: ...

    def wait(self) -> None: ...


class _Mailbox:
    """What people ask of this attempt, read from the store by a thread; the loop only reads flags."""

    def __init__(self, runs: Runs, assignment: Assignment) -> None:
        self._runs = runs
        self._assignment = assignment
        self._seen = 0
        self._stop = threading.Event()
        self._checkpoint = threading.Event()
        self._closed = threading.Event()
        self._thread = _start(self._watch, "treadle-mailbox")

    def wants_stop(self) -> bool:
        return self._stop.is_set()

    def wants_checkpoint(self) -> bool:
        if not self._checkpoint.is_set():
            return False
        self._checkpoint.clear()  # only what was seen: a wish that arrives meanwhile stays
        return True

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        from treadle.errors import TreadleError
        from treadle.store import RequestKind

        while not self._closed.wait(POLL_S):
            try:
                found = self._runs.requests(self._assignment.run, after=self._seen, attempt=self._assignment.attempt)
            except TreadleError:
                continue  # the store is away for a moment; the wish stays there
            for request in found:
                self._seen = max(self._seen, request.seq)
                (self._stop if request.kind is RequestKind.stop else self._checkpoint).set()


class _NoMailbox:
    """For ranks above 0, which hear of wishes through rank 0."""

    def wants_stop(self) -> bool:
        return False

    def wants_checkpoint(self) -> bool:
        return False


def _start(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
