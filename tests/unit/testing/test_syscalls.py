"""Children die at the call that was meant and nowhere else, and see the errors that were injected."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from treadle.errors import ConfigError, InternalError
from treadle.testing import CHANGES, Call, Victims

SCRIPT = Path(__file__).with_name("syscall_victims.py")


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    try:
        with Victims(SCRIPT) as found:
            found.run("refuse")
            yield found
    except ConfigError as error:
        pytest.skip(error.message)


def test_a_trace_has_every_call_in_order_and_what_was_said(victims: Victims, tmp_path: Path) -> None:
    outcome = victims.run("write_twice", str(tmp_path))
    assert (outcome.status, outcome.said, outcome.error) == (0, ["one", "two"], None)
    each = ["openat", "write", "fsync", "close", "write"]  # the last one is what it said
    assert [call.name for call in outcome.calls] == each * 2
    assert outcome.calls[5].strings() == [bytes(tmp_path / "two")]
    assert (outcome.calls[6].number, outcome.calls[6].strings(), outcome.calls[6].result) == (3, [b"two"], 3)


def test_a_child_is_killed_at_each_of_them_and_that_call_has_not_happened(victims: Victims, tmp_path: Path) -> None:
    calls = victims.run("write_twice", str(tmp_path / "missing")).calls
    assert [call.error for call in calls] == ["ENOENT", ""]
    (tmp_path / "whole").mkdir()
    for i, call in enumerate(victims.run("write_twice", str(tmp_path / "whole")).calls):
        folder = tmp_path / str(i)
        folder.mkdir()
        outcome = victims.kill(call, "write_twice", str(folder))
        assert outcome.status == -signal.SIGKILL
        assert outcome.said == ["one"] * (i >= 5)
        assert {path.name: path.read_text() for path in folder.iterdir()} == (
            ({"one": "one" if i >= 2 else ""} if i else {}) | ({"two": "two" if i >= 7 else ""} if i >= 6 else {})
        )


def test_a_kill_that_never_came_is_an_error(victims: Victims, tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="expected a kill"):
        victims.kill(Call(name="fsync", number=3, arguments=""), "write_twice", str(tmp_path))
    with pytest.raises(InternalError, match="no such call"):
        victims.fail(Call(name="fsync", number=3, arguments=""), "EIO", "write_twice", str(tmp_path))


@pytest.mark.parametrize(("error", "words"), [("EIO", "Input/output"), ("ENOSPC", "No space"), ("EDQUOT", "quota")])
def test_an_error_is_seen(victims: Victims, tmp_path: Path, error: str, words: str) -> None:
    call = Call(name="fsync", number=2, arguments="")
    outcome = victims.fail(call, error, "write_twice", str(tmp_path))
    assert (outcome.status, outcome.said) == (1, ["one"])
    assert outcome.error is not None
    assert outcome.error[0] == "OSError"
    assert words in outcome.error[1]


def test_an_exception_of_the_child_is_told(victims: Victims) -> None:
    outcome = victims.run("refuse", names=CHANGES)
    assert (outcome.status, outcome.error) == (1, ("ValueError", "no"))


def test_without_strace_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="strace") as refused:
        Victims(SCRIPT)
    assert "apt-get" in refused.value.hint
