"""What every rank runs: read the frozen job, build the run, train, and on rank 0 keep the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from treadle.errors import PreemptedError
from treadle.launch.assemble import Surroundings, assemble
from treadle.launch.keep import keep_model
from treadle.launch.mailbox import Mailbox, NoMailbox
from treadle.launch.pulse import Pulse
from treadle.launch.records import Assignment, read_job
from treadle.launch.saver import NoSaver, Saver
from treadle.launch.tracking import open_tracker
from treadle.nn import build_network
from treadle.store import Checkpoints, Runs, open_blobs
from treadle.track import NullTracker, RunTracker, Sink
from treadle.train import Outcome, Run, World, fit
from treadle.train.level import level
from treadle.train.sharding import is_sharded, unsharded
from treadle.train.world import PeerLost

__all__ = ["Peers", "train_rank"]


class Peers:
    """The other ranks as one rank knows them.

    Args:
        rank: of this process. pulse: where it shows that it lives.
        is_fresh: all ranks start together, from the newest checkpoint; else this one replaces a lost one, and the
            others hold their state.
    """

    def __init__(self, *, rank: int = 0, pulse: Pulse | None = None, is_fresh: bool = True) -> None:
        self.rank = rank
        self.pulse = pulse
        self.is_fresh = is_fresh

    @property
    def size(self) -> int:
        return 1

    def meet_again(self, update: int) -> None:
        """Leave a group that lost a rank, or none; return in the next one.

        Raises:
            PeerLost: a rank was lost while they met.
        """
        raise AssertionError("a rank without others has lost none")


def train_rank(
    assignment: Assignment, world: World, *, peers: Peers | None = None, sinks: Sequence[Sink] = ()
) -> dict[str, Any]:
    """Train one rank to the end; rank 0 registers the model. Returns a JSON-ready summary.

    Args:
        world: of the ranks that start together; of this one alone where it replaces another.
        sinks: who is shown what rank 0 logs.

    Raises:
        TreadleError: bad data, divergence, a damaged checkpoint, or a newer attempt that took over.
    """
    blobs = open_blobs(assignment.store)
    spec, plan = read_job(Runs(blobs), assignment.run)
    torch.set_num_threads(spec.cluster.cpus_per_worker)
    peers = peers or Peers(rank=world.rank)
    checkpoints = Checkpoints(
        blobs,
        assignment.run,
        attempt=assignment.attempt,
        keep_last=spec.checkpoint.keep_last,
        spec_digest=plan.spec_digest,
        data_digest=plan.data_digest,
    )
    if peers.rank == 0:
        checkpoints.acquire()
    world.sum([0.0])  # nobody reads a checkpoint that a process before us may still replace
    around = Surroundings(
        blobs=blobs,
        run=assignment.run,
        attempt=assignment.attempt,
        spec=spec,
        plan=plan,
        world=world,
        checkpoints=checkpoints,
        saver=NoSaver(),
        control=NoMailbox(),
        track=NullTracker(),
    )
    if peers.rank:
        return _trained(around, assignment, peers)
    tracker = open_tracker(
        blobs, assignment.run, assignment.attempt, spec, plan, code=assignment.code, sinks=[*sinks, *_shown(peers)]
    )
    with _closing(tracker), contextlib.ExitStack() as closing:
        saver = closing.enter_context(contextlib.closing(Saver(checkpoints, spec, tracker)))
        mailbox = Mailbox(Runs(blobs), assignment.run, assignment.attempt, saver)
        closing.enter_context(contextlib.closing(mailbox))
        summary = _trained(replace(around, saver=saver, control=mailbox, track=tracker), assignment, peers)
        if summary["status"] == "stopped" and mailbox.is_drained:
            summary["status"] = "preempted"
        tracker.close(summary["status"])
    return summary


def _trained(around: Surroundings, assignment: Assignment, peers: Peers) -> dict[str, Any]:
    run, manifest, reader = assemble(around)
    if peers.pulse is not None:
        run.reached.pulse = peers.pulse
        around.world.on_phase = peers.pulse.meet
        peers.pulse.at(run.start.update)
    with reader:
        outcome = _fit(run, peers)
        summary = {"status": outcome.status, "update": outcome.state.update, "metrics": {}, "model_version": None}
        network = run.network
        if outcome.status == "finished":
            spec, plan = around.spec, around.plan
            network = unsharded(network, lambda: build_network(spec.model, spec.task, plan.signature))  # of all ranks
        if peers.rank == 0 and outcome.status == "finished":
            summary |= keep_model(around, assignment.code, network, manifest, outcome)
            around.track.event("registered", model=around.spec.name, version=summary["model_version"])
    return summary


def _fit(run: Run, peers: Peers) -> Outcome:
    """The loop, left and entered again where a rank is lost; the others bring their state along."""
    is_together = peers.is_fresh
    while True:
        try:
            if not is_together:
                run = _joined(run, peers)
                is_together = True
            return fit(run)
        except PeerLost as error:
            if is_sharded(run.network):
                raise  # a part of the weights is lost, too
            # Only its words: its frames hold the loop, and with it the thread that reads.
            words, is_lost = error.message, is_together
        is_together = False
        state = run.reached.state or run.start
        run.checkpoints.join()
        if is_lost:
            run.track.event("rank_lost", update=state.update, message=words)
        run = replace(run, start=state)


def _joined(run: Run, peers: Peers) -> Run:
    """`run` in the group of all ranks as soon as that is there, at the state of the rank that is furthest.

    Raises:
        PeerLost: it broke before that; nothing has changed.
    """
    peers.meet_again(run.start.update)
    run.world.rejoin(peers.rank, peers.size)
    state = level(run)
    run.reached.at(state)
    run.track.event("rejoined", update=state.update)
    return replace(run, start=state)


def _shown(peers: Peers) -> list[Sink]:
    return [] if peers.pulse is None else [_CommitSink(peers.pulse)]


@dataclass(frozen=True)
class _CommitSink:
    """Shows commits in the pulse: losses count from the newest checkpoint on."""

    pulse: Pulse

    def log(self, update: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        if name == "checkpoint":
            self.pulse.commit(int(facts["update"]))

    def close(self, outcome: str) -> None: ...


@contextlib.contextmanager
def _closing(tracker: RunTracker) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        tracker.event("error", kind=type(error).__name__, message=str(error)[:2000])
        tracker.close("preempted" if isinstance(error, PreemptedError) else "failed")
        raise
