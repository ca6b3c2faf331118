"""Memory of a build does not grow with the values of its rows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

MOST_MB = 512


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark, which writes a source and builds it in a process of its own."""
    path = Path(__file__).parent.parent / "bench" / "data_build.py"
    spec = importlib.util.spec_from_file_location("data_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is read from /proc")
def test_memory_does_not_grow_with_the_rows(bench, tmp_path):
    peaks = []
    for gb in (0.25, 0.5):
        bench.write_source(tmp_path / "source.arrow", gb)
        # How far one thread runs ahead of the other moves a peak by 60 MB either way; what grows would always be there.
        peaks.append(min(bench.peak_mb(tmp_path / "source.arrow", tmp_path / "store") for _ in range(4)))
    assert max(peaks) < MOST_MB
    assert peaks[1] < peaks[0] + 60, peaks
    assert (tmp_path / "source.arrow").stat().st_size > 500 << 20
