"""The model of a disk ends where the real one does, and loses exactly what was not flushed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from treadle.errors import ConfigError, InternalError
from treadle.testing import Call, Disk, Lost, Victims, said_in

SCRIPT = Path(__file__).with_name("syscall_victims.py")


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    try:
        with Victims(SCRIPT) as found:
            found.run("refuse")
            yield found
    except ConfigError as error:
        pytest.skip(error.message)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_with_everything_flushed_the_model_is_what_is_there(victims: Victims, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "before").write_bytes(b"old")
    disk = Disk(root)
    calls = victims.run("change_names", str(root)).calls
    for call in calls:
        disk.apply(call)
    for node in (disk._top, *_folders(disk._top)):
        node.flush()
    assert tree(disk.write(tmp_path / "model", Lost.names)) == tree(root)
    assert tree(root) == {
        "a": None,
        "a/grown": b"0123",
        "b": None,
        "b/c": None,
        "b/moved": b"x" * 10,
        "before": b"old",
        "holes": b"abXYef",
        "journal": b"one\ntwo\n",
    }


def _folders(folder):
    for child in folder.entries.values():
        if hasattr(child, "flush"):
            yield child
            yield from _folders(child)


def losses(victims: Victims, tmp_path: Path, *flushes: str) -> set[tuple[str, str]]:
    """(what was lost, what is there instead) over all power cuts that lost something that was called safe."""
    root = tmp_path / "root"
    disk = Disk(root)  # before the calls: what is there counts as flushed
    calls = victims.run("keep_carelessly", str(root), *flushes).calls
    found = set()
    (tmp_path / "cuts").mkdir()
    for end, call in enumerate(calls, 1):
        disk.apply(call)
        said = said_in(calls[:end])
        for lost in Lost:
            left = disk.write(tmp_path / "cuts" / f"{end}-{lost.name}", lost, seed=end) / "value"
            value = left.read_text() if left.is_file() else "missing"
            if said and value not in (said[-1], "new" * 10):
                found.add((lost.name, value))
    return found


def test_what_was_flushed_survives_and_each_missing_flush_shows(victims: Victims, tmp_path: Path) -> None:
    for name in ("all", "no bytes", "no name", "no root"):
        (tmp_path / name).mkdir()
    assert losses(victims, tmp_path / "all", "above", "bytes", "name") == set()
    assert ("bytes", "") in losses(victims, tmp_path / "no bytes", "above", "name")
    assert ("names", "missing") in losses(victims, tmp_path / "no name", "above", "bytes")
    assert ("everything", "missing") in losses(victims, tmp_path / "no root", "bytes", "name")


def test_a_call_that_is_not_known_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="sendfile"):
        Disk(tmp_path).apply(Call(name="sendfile", number=1, arguments="3, 4, NULL, 10", result=10))
    Disk(tmp_path).apply(Call(name="sendfile", number=1, arguments="3, 4, NULL, 10", result=-1, error="EINVAL"))
