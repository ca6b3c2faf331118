"""Disks that are full, over quota or broken in the middle of a commit (F13)."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from fault_victims import RUN, files_at, open_run

from treadle.errors import ConfigError, TransientError
from treadle.store import Journal, open_blobs, read_journal
from treadle.store.local import LocalBlobs
from treadle.testing import Call, Victims, small_disk

MB = 1 << 20
MAY_FAIL = ("openat", "write", "fsync", "mkdir", "link", "rename", "utimensat", "unlink")


def restored(root: Path) -> int:
    """The update that is restored, its bytes compared; 0 for none."""
    found = open_run(LocalBlobs(root), 0).restore()
    assert found is None or found[1] == files_at(found[0].update)
    return found[0].update if found else 0


@pytest.mark.fault(13, "each system call of a commit answers ENOSPC, EIO, EDQUOT")
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT"])
def test_a_commit_that_meets_an_error_says_so_and_the_next_succeeds(
    victims: Victims, folder: Path, matrix, points, error: str
) -> None:
    first = victims.run("commit_through_errors", str(folder / "whole"), 1, 1).calls
    before = Counter(call.name for call in first)  # what opens the run: its errors are those of update 1
    calls = victims.run("commit_through_errors", str(folder / "second"), 1, 3)
    assert calls.said == [1, 2, 3]
    inside = [c for c in calls.calls if c.name in MAY_FAIL and c.number > before[c.name] and not is_said(c)]
    classes: Counter[str] = Counter()
    tried = points(inside, 6)
    for i, call in enumerate(tried):
        root = folder / str(i)
        outcome = victims.fail(call, error, "commit_through_errors", str(root), 1, 3)
        assert outcome.status == 0, (call, outcome.error)
        told = {said["update"]: said for said in outcome.said if isinstance(said, dict)}
        assert len(told) <= 1, call  # one error, one commit that fails
        for said in told.values():
            classes[said["error"]] += 1
            assert said["error"] == "TransientError", (call, said)
            assert str(root) in said["message"], (call, said)
        acknowledged = max(said for said in outcome.said if isinstance(said, int))
        assert restored(root) in {acknowledged, 3}, call  # an error after the swap: done, and not said
        assert acknowledged == 3 or 3 in told, call
        folders = LocalBlobs(root).children(f"runs/{RUN}/ckpt")
        open_run(LocalBlobs(root), 2).commit(9, files_at(9), {})
        assert restored(root) == 9
        assert len(LocalBlobs(root).children(f"runs/{RUN}/ckpt")) == 2, (call, folders)
        shutil.rmtree(root)
    matrix.note(injected=len(tried), seen=f"{error}: {dict(classes)}, nothing torn, the next save succeeds")


def is_said(call: Call) -> bool:
    return call.name == "write" and any(text.startswith(b'{"') and b'"said"' in text for text in call.strings())


@pytest.mark.fault(13, "the disk stays broken")
def test_while_the_disk_is_broken_the_old_state_stays(victims: Victims, folder: Path, matrix) -> None:
    before = Counter(c.name for c in victims.run("commit_through_errors", str(folder / "one"), 1, 1).calls)
    for error, name in (("EIO", "fsync"), ("ENOSPC", "write")):
        root = folder / name
        call = Call(name=name, number=before[name] + 1, arguments="")
        outcome = victims.fail(call, error, "commit_through_errors", str(root), 1, 4, always=True)
        seen = [said if isinstance(said, int) else said["error"] for said in outcome.said]
        # Nothing can be said any more by a child whose every write fails.
        assert seen == [1, *["TransientError"] * (3 if name == "fsync" else 0)]
        assert restored(root) == 1
        matrix.note(injected=3, seen=f"{error} for ever: old state kept")


@pytest.fixture
def full_disk(tmp_path: Path):
    try:
        with small_disk(tmp_path / "disk", 8 * MB) as found:
            yield found
    except ConfigError as error:
        pytest.skip(error.message)


@pytest.mark.fault(13, "a disk of 8 MB")
def test_a_full_disk_loses_nothing_and_is_mended_by_space(full_disk: Path, matrix) -> None:
    root = full_disk / "store"
    checkpoints = open_run(LocalBlobs(root), 1)
    big = {"model.safetensors": bytes(range(256)) * (4 * MB // 256)}
    (full_disk / "ballast").write_bytes(bytes(3 * MB))
    checkpoints.commit(1, {"model.safetensors": b"small" * 1000}, {})
    num_refused = 0
    for update in (2, 3):
        with pytest.raises(TransientError, match="No space left") as refused:
            checkpoints.commit(update, big | {"more": bytes(MB)}, {})
        assert refused.value.hint == "free some space"
        num_refused += 1
        found = open_run(LocalBlobs(root), 0).restore()
        assert found is not None
        assert found[0].update == 1
        assert len(LocalBlobs(root).children(f"runs/{RUN}/ckpt")) == 1  # it does not keep the space that it took
    assert sum(path.stat().st_size for path in (root / ".treadle" / "tmp").iterdir()) == 0
    (full_disk / "ballast").unlink()
    checkpoints.commit(4, big, {})
    found = open_run(LocalBlobs(root), 0).restore()
    assert found is not None
    assert (found[0].update, found[1]) == (4, big)
    assert len(LocalBlobs(root).children(f"runs/{RUN}/ckpt")) == 2  # what the failed ones left is swept
    matrix.note(injected=num_refused, seen="8 MB: TransientError, old state kept, saves again once there is space")


@pytest.mark.fault(13, "a journal on a full disk")
def test_rows_wait_for_space(full_disk: Path, matrix) -> None:
    blobs = open_blobs(str(full_disk / "store"))
    journal = Journal(blobs, "runs/toy/metrics.jsonl", writer="w")
    journal.append({"update": 0})
    ballast = full_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while shutil.disk_usage(full_disk).free:
            file.write(bytes(4096))
    for update in range(1, 1001):
        journal.append({"update": update, "text": "x" * 100})  # must not raise
    assert journal.num_unsaved > 0
    assert "space" in journal.last_error
    ballast.unlink()
    assert journal.close()
    assert [row["update"] for row in read_journal(blobs, "runs/toy/metrics.jsonl")] == [*range(1001)]
    matrix.note(injected=1, seen="journal: rows wait in memory, all there after")
