"""The matrix of faults leaves no row out and calls nothing green that is not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def plugin(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("fault_matrix", root / "tests" / "faults" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fault_matrix", module)  # its dataclasses look there
        spec.loader.exec_module(module)
    return module


def reports(
    name: str, row: int, outcome: str, *facts: tuple[str, object], reason: str = "", xfail: str = ""
) -> list[Any]:
    """What pytest reports of one test."""
    found = []
    for when in ("setup", "call", "teardown"):
        seen = outcome if when == "call" else "passed"
        report = SimpleNamespace(
            nodeid=f"tests/faults/test_x.py::{name}",
            user_properties=[("fault", [row, "what"]), *facts],
            duration=0.5,
            when=when,
            longrepr=("file", 1, reason),
            **{kind: kind == seen for kind in ("passed", "failed", "skipped")},
        )
        if xfail and when == "call":
            report.wasxfail = xfail
        found.append(report)
    return found


def test_every_row_shows(plugin: Any) -> None:
    facts = [("injected", 3), ("seen", "well"), ("injected", 4), ("seen", "well"), ("seen", "too")]
    rows = plugin.gather(
        [
            *reports("a", 8, "passed", *facts),
            *reports("b", 9, "failed", ("injected", 1)),
            *reports("c", 9, "passed", ("injected", 1)),
            *reports("d", 10, "skipped", reason="no strace"),
            *reports("e", 16, "skipped", xfail="a defect"),
            *reports("f", 16, "passed"),
        ]
    )
    assert sorted(rows) == list(range(1, 26))
    assert rows[1].verdict() == "no test"
    assert (rows[8].verdict(), rows[8].injected, list(rows[8].seen), rows[8].seconds) == (
        "green, 1 tests",
        7,
        ["well", "too"],
        1.5,
    )
    assert rows[9].verdict() == "**RED**: b"
    assert rows[10].verdict() == "1 skipped (no strace)"
    assert rows[16].verdict() == "**known defect**: a defect"


def test_a_test_that_passes_and_then_fails_to_end_is_red(plugin: Any) -> None:
    told = reports("a", 8, "passed", ("injected", 1))
    told[-1].passed, told[-1].failed = False, True
    assert plugin.gather(told)[8].verdict() == "**RED**: a"
