"""Whoever locks a folder of the scratch shelf has it alone, though its last owner may be deleting it meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from treadle.data.build.scratch import Scratch, claim
from treadle.errors import ConflictError
from treadle.store.local import LocalBlobs

BUILD = "b" * 64


def claims_again_and_again(store: str, until: float) -> None:
    """Claims one folder, and fails if a file that it wrote there is changed or lost before it lets go."""
    blobs, mark = LocalBlobs(Path(store)), str(os.getpid()).encode()
    done = 0
    while time.monotonic() < until:
        with contextlib.suppress(ConflictError), claim(blobs, "d", BUILD, once=False) as folder:
            scratch = Scratch(blobs, folder)
            assert sorted(blobs.local_path(folder).rglob("run-*")) == []
            for number in range(30):
                scratch.write(f"run-{number}", [mark])
            time.sleep(0.0005)
            for number in range(30):
                assert scratch.read(f"run-{number}") == mark
            done += 1
    assert done


@pytest.mark.parametrize("num", [3])
def test_processes_that_claim_one_folder_never_have_it_together(num, tmp_path):
    context = multiprocessing.get_context("fork")
    until = time.monotonic() + 2
    runs = [context.Process(target=claims_again_and_again, args=(str(tmp_path), until)) for _ in range(num)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * num
    assert not (tmp_path / "data" / "d" / "building").exists()


def test_a_lock_on_a_folder_that_was_deleted_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    blobs, flock = LocalBlobs(tmp_path), fcntl.flock
    first = claim(blobs, "d", BUILD, once=False)
    waiting = [first]

    def late(file, how):
        """What the owner does between another's opening of the lock and its locking."""
        if waiting:
            waiting.pop().__exit__(None, None, None)
        flock(file, how)

    first.__enter__()
    monkeypatch.setattr(fcntl, "flock", late)
    with claim(blobs, "d", BUILD, once=False) as folder:
        Scratch(blobs, folder).write("run", [b"x"])
        with pytest.raises(ConflictError), claim(blobs, "d", BUILD, once=False):
            pass
        assert Scratch(blobs, folder).read("run") == b"x"
