"""What ranks are started with."""

from __future__ import annotations

import pytest

from treadle.launch.group import _worker_environment
from treadle.spec import ClusterSpec

SEGMENTS = "expandable_segments:True"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def test_devices_grow_their_segments() -> None:
    assert _worker_environment(ClusterSpec(gpus_per_worker=1))["PYTORCH_ALLOC_CONF"] == SEGMENTS
    assert set(_worker_environment(ClusterSpec(cpus_per_worker=3))) == {"OMP_NUM_THREADS", "WANDB_ERROR_REPORTING"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_was_set_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert SEGMENTS not in _worker_environment(ClusterSpec(gpus_per_worker=1)).values()
