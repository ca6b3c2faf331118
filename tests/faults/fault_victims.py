"""What children do while they are traced, killed, lied to, or live by another clock.

    python fault_victims.py FUNCTION [ARGUMENT ...]

calls one of them and prints each value that it says as a line of JSON; arguments are JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treadle.errors import TreadleError
from treadle.store import (
    AttemptEnd,
    AttemptStatus,
    Backend,
    Blobs,
    Checkpoints,
    Code,
    Journal,
    ModelDraft,
    ModelFile,
    Registry,
    Runs,
    open_blobs,
    transfers,
)
from treadle.store.audit import AuditEvent, AuditLog
from treadle.store.sealed import checksum

Say = Callable[[Any], None]
RUN = "toy-20260101-000000-abcd"


def nothing(say: Say) -> None:
    pass


def files_at(update: int) -> dict[str, bytes]:
    """The state after `update`: unlike that of any other."""
    return {"model.safetensors": bytes([update % 256]) * 3000, "optim/rank0.bin": b"seed %d " % update * 50}


def open_run(blobs: Blobs, attempt: int, keep_last: int = 2) -> Checkpoints:
    return Checkpoints(blobs, RUN, attempt=attempt, keep_last=keep_last, spec_digest="s" * 64, data_digest="d" * 64)


class OneThread:
    """In place of a pool: strace counts the calls of each thread apart, and only those of one have places."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.map = map

    def __enter__(self) -> OneThread:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def commit_on_one_thread(say: Say, root: str, attempt: int, first: int, last: int) -> None:
    """As `commit`; the same calls, the files of a checkpoint one after the other."""
    transfers.ThreadPoolExecutor = OneThread
    commit(say, root, attempt, first, last)


def commit(say: Say, root: str, attempt: int, first: int, last: int) -> None:
    """Commits the states `first` to `last`, and says each update when it is safe."""
    checkpoints = open_run(open_blobs(root), attempt)
    checkpoints.acquire()
    for update in range(first, last + 1):
        checkpoints.commit(update, files_at(update), {"update": update})
        say(update)


def commit_through_errors(say: Say, root: str, first: int, last: int) -> None:
    """As `commit`, but goes on after an error and says its class instead."""
    transfers.ThreadPoolExecutor = OneThread
    checkpoints = open_run(open_blobs(root), 1)
    for update in range(first, last + 1):
        try:
            checkpoints.commit(update, files_at(update), {"update": update})
        except TreadleError as error:
            say({"error": type(error).__name__, "message": error.message, "update": update})
        else:
            say(update)


def commit_unflushed(say: Say, root: str, attempt: int, first: int, last: int) -> None:
    """A control: nothing is flushed."""
    os.fsync = lambda _: None
    commit(say, root, attempt, first, last)


def commit_in_place(say: Say, root: str, first: int, last: int) -> None:
    """A control: one file, opened for writing again and again."""
    path = Path(root, "state")
    path.parent.mkdir(exist_ok=True)
    for update in range(first, last + 1):
        with path.open("wb") as file:
            file.write(files_at(update)["model.safetensors"])
            file.flush()
            os.fsync(file.fileno())
        say(update)


def register(blobs: Blobs, count: int) -> None:
    """Versions 1 to `count` of the model "toy"."""
    for n in range(1, count + 1):
        data = b"weights %d " % n * 40
        blobs.put(f"runs/toy-{n}/model.safetensors", data)
        file = ModelFile(key=f"runs/toy-{n}/model.safetensors", size_bytes=len(data), xxh3_128=checksum(data))
        Registry(blobs).register(
            ModelDraft(
                name="toy",
                run=f"toy-{n}",
                files={"model.safetensors": file},
                signature={"input_size": 3},
                spec_digest="s" * 64,
                data_digest="d" * 64,
                code=Code(git="abc", dirty=False),
                metrics={"val/accuracy": 0.5},
            )
        )


def promote(say: Say, root: str, *versions: int) -> None:
    """Promotes each, and says it when it is done."""
    registry = Registry(open_blobs(root))
    for version in versions:
        say(registry.promote("toy", version, actor="ada", reason="test").after)


def append(say: Say, root: str, count: int) -> None:
    """Appends events to an audit log, and says the number of each."""
    log = AuditLog(open_blobs(root), "models/toy/audit")
    for n in range(count):
        draft = AuditEvent(
            follows=0, name="toy", alias="test", action="promote", before=None, after=n, actor="ada", reason=""
        )
        say(log.append(draft)[0].seq)


def journal(say: Say, root: str, count: int) -> None:
    """Writes rows and says those that are flushed."""
    with Journal(open_blobs(root), "runs/toy/metrics.jsonl", writer="w") as rows:
        for number in range(count):
            rows.append({"update": number})
            if rows.flush():
                say(number)


def live(say: Say, root: str, name: str, update: int) -> None:
    """What a run does, in turn with processes that have other clocks."""
    blobs = open_blobs(root)
    runs = Runs(blobs)
    record = runs.create(b"{}", b"{}", job="toy", backend=Backend.inline, run=f"toy-{name}")
    attempt = runs.claim_attempt(record.run, Backend.inline)
    runs.beat(record.run, attempt, {"update": update})
    with Journal(blobs, "runs/toy/events.jsonl", writer=name) as events:
        events.append({"update": update, "by": name})
    checkpoints = open_run(blobs, update)  # each a later attempt of one run
    checkpoints.acquire()
    checkpoints.commit(update, files_at(update), {"update": update})
    runs.end_attempt(record.run, attempt, AttemptEnd(status=AttemptStatus.finished, update=update))
    say({"number": record.number, "created_at": record.created_at})


def main() -> None:
    function, *arguments = sys.argv[1:]
    globals()[function](lambda value: print(json.dumps(value), flush=True), *map(json.loads, arguments))


if __name__ == "__main__":
    main()
