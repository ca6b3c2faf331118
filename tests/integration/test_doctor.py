"""What `treadle doctor` says of the compiled scan, where there is a compiler and where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def findings(home: Path, path: str) -> dict[str, dict[str, str]]:
    environment = {**os.environ, "HOME": str(home), "PATH": path, "TREADLE_STORE": str(home / "store")}
    command = [sys.executable, "-m", "treadle", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_without_a_compiler_the_loop_is_named_and_nothing_fails(tmp_path: Path) -> None:
    found = findings(tmp_path, "")["min-cell kernel cpu"]
    assert found["status"] == "note"
    assert "loop of torch operations" in found["seen"]
    assert found["remedy"] == "install a C compiler (cc)"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_with_a_compiler_the_kernel_is_built_once(tmp_path: Path) -> None:
    path = os.environ["PATH"]
    assert findings(tmp_path, path)["min-cell kernel cpu"]["status"] == "ok"
    built = {file: file.stat().st_mtime_ns for file in (tmp_path / ".cache").rglob("*.so")}
    assert built
    assert findings(tmp_path, path)["min-cell kernel cpu"]["status"] == "ok"
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / ".cache").rglob("*.so")} == built
