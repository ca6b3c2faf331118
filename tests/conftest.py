"""Settings that every test shares."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from treadle.store.dev import DevServer

# The machine that runs the tests may be busy: how long an example takes says nothing about it.
settings.register_profile("treadle", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("treadle")

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# Files with tests that start a Ray cluster. Two clusters at once are too many for a small machine.
CLUSTERS = {
    path.name for path in Path(__file__).parent.rglob("test_*.py") if "pytest.mark.ray" in path.read_text("utf-8")
}
LONG = ("integration", "learning")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no process waits for the other at the end."""
    items.sort(key=lambda item: (item.path.name not in CLUSTERS, *(part not in item.path.parts for part in LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With `-n 2`, a file's tests run in one process, and all files of CLUSTERS in the same."""
    from xdist.scheduler import LoadScopeScheduling  # an extra: `make test` has it, a plain `pytest` does without

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "clusters" if path.rpartition("/")[2] in CLUSTERS else path

    config.option.loadscopereorder = False  # ours is the order of time, not of numbers
    return ByFile(config, log)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # A tiny LSTM runs 16 to 49 times slower with two threads on a busy two-core machine.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Runs a script whose processes are ranks that meet over gloo: `run_ranks(script, *words)`."""

    def run(script: Path, *words: object, timeout_s: float = 110) -> None:
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "error", str(script), *map(str, words)],
            env=os.environ | threads,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels are kept for the whole session, whatever its processes: building them takes seconds."""
    folder = tmp_path_factory.getbasetemp()
    kernels = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "kernels"
    kernels.mkdir(exist_ok=True)
    return kernels


@pytest.fixture(autouse=True)
def _private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_cache: Path) -> None:
    """No test reads or writes the user's own store, W&B settings or Ray token."""
    cache = tmp_path / "home" / ".cache" / "treadle"
    cache.mkdir(parents=True)
    (cache / "kernels").symlink_to(kernel_cache)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TREADLE_STORE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    """A real S3 server for the whole session; tests write below a prefix of their own.

    `monkeypatch.setenv` what `environment()` gives, or pass what `options()` gives.
    """
    from treadle.store.dev import dev_server  # boto3 takes 0.4 s, and most tests need no S3

    with dev_server(tmp_path_factory.mktemp("s3")) as server:
        yield server
