"""conf/ and jobs/ are found in a checkout and inside an installed package alike."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.errors import ConfigError
from treadle.spec import places

CODE = """
from treadle.spec.compose import compose_job
from treadle.spec.places import conf_folder, list_jobs
print(conf_folder())
print(*list_jobs())
print(compose_job("g2p", ["model=minlstm"], default_store="/s").model.kind)
"""


def test_a_checkout(root: Path) -> None:
    assert places.conf_folder() == root / "conf"
    assert places.find_job("g2p") == root / "jobs" / "g2p"
    assert {"model", "optim", "task"} <= set(places.list_groups())
    assert set(places.list_options("optim")) == {"adamw", "rmsprop", "sgd"}


def test_a_wheel(root: Path, tmp_path: Path) -> None:
    package = tmp_path / "site" / "treadle"
    shutil.copytree(root / "platform" / "treadle" / "spec", package / "spec")
    for name in ("__init__.py", "errors.py", "units.py", "wire.py"):
        shutil.copy(root / "platform" / "treadle" / name, package)
    shutil.copytree(root / "conf", package / "_conf")
    shutil.copytree(root / "jobs", package / "_jobs")
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    conf, jobs, kind = done.stdout.splitlines()
    assert conf == str(package / "_conf")
    assert {"g2p", "vowels"} <= set(jobs.split())
    assert kind == "minlstm"


def test_jobs_of_the_current_folder_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("g2p", "mine"):
        (tmp_path / "jobs" / name).mkdir(parents=True)
        (tmp_path / "jobs" / name / "job.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert {"g2p", "mine", "vowels"} <= set(places.list_jobs())
    assert places.find_job("g2p") == tmp_path / "jobs" / "g2p"


@pytest.mark.parametrize("job", ["", "g2pp", "no/such/folder", ".", "conf"])
def test_no_such_job(job: str) -> None:
    with pytest.raises(ConfigError, match=r"expected one of .*g2p.*, or a folder"):
        places.find_job(job)


def test_paths_are_short_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert places.short_path(tmp_path / "a" / "b") == "a/b"
    assert places.short_path(Path("/elsewhere/b")) == "/elsewhere/b"
