"""What is left of a Ray cluster whose process was killed."""

from __future__ import annotations

import os
import subprocess
import sys

from treadle.cluster import _OWNER, _PREFIX, _sweep


def test_folders_of_the_dead_are_removed_and_no_others(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owners = {"dead": str(dead.pid), "alive": str(os.getpid()), "odd": "?", "none": None}
    for name, owner in owners.items():
        folder = tmp_path / f"{_PREFIX}{name}"
        folder.mkdir()
        (folder / "log").write_text("x")
        if owner is not None:
            (folder / _OWNER).write_text(owner)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / _OWNER).write_text(str(dead.pid))
    _sweep(tmp_path)
    assert not (tmp_path / f"{_PREFIX}dead").exists()
    kept = [tmp_path / f"{_PREFIX}{name}" for name in ("alive", "odd", "none")]
    assert all(path.exists() for path in [*kept, tmp_path / "other"])
