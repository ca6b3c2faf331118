"""Builds a data set in children of this process, each killed just before it touches its store for the n-th time.

    python build_victim.py JOB FOLDER NUM_KILLS

A first child lives, into FOLDER/whole. Others die at points spread over all that the first one did, into FOLDER/<n>.
Prints the digest and the points.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from treadle.launch.submit import prepare_data
from treadle.spec import JobSpec
from treadle.spec.compose import compose_job
from treadle.store import open_blobs

CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.utime", "shutil.rmtree"}


def build(spec: JobSpec, job: str, store: str, last: int) -> tuple[int, str]:
    """How often a build touches its store, and its digest; before the touch of number `last` it dies."""
    touched = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in CHANGES and any(isinstance(a, str | os.PathLike) and str(a).startswith(store) for a in arguments):
            touched += 1
            if touched == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    digest, _ = prepare_data(spec, Path(job), open_blobs(store), again=False, progress=lambda *_: None, on_ray=False)
    return touched, digest


def in_child(spec: JobSpec, job: str, store: str, last: int) -> tuple[int, str]:
    """What a child process answers, and "" where it was killed. It starts with all modules loaded, and no thread."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.write(writes, json.dumps(build(spec, job, store, last)).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as answer:
        text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if last:
        assert status == -signal.SIGKILL, f"point {last}: ended with {status}"
        return last, ""
    assert status == 0, f"ended with {status}"
    return tuple(json.loads(text))


def main() -> None:
    job, folder, num_kills = sys.argv[1], os.path.realpath(sys.argv[2]), int(sys.argv[3])
    spec = compose_job(job, [], default_store=folder)
    touched, digest = in_child(spec, job, f"{folder}/whole", 0)
    points = [*sorted(random.Random(0).sample(range(1, touched), num_kills - 1)), touched]
    for point in points:
        in_child(spec, job, f"{folder}/{point}", point)
    print(json.dumps({"digest": digest, "points": points}))


if __name__ == "__main__":
    main()
