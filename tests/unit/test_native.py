"""How a C source comes to be compiled, kept and loaded, tried on a small one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from treadle import native

SOURCE = "int answer(void) { return 42; }\n"
CHECK = "import ctypes, sys\nassert ctypes.CDLL(sys.argv[1]).answer() == 42, 'wrong answer'"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    if native._compiler(native.COMPILERS) is None:
        pytest.skip("no C compiler here")
    path = tmp_path / "small.c"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kernels"


def found(folder: Path, source: Path, check: str = CHECK) -> native.Kernel:
    kernel, detail = native.find([folder], native.COMPILERS, source, check)
    assert kernel is not None, detail
    assert str(kernel.path) in detail
    return kernel


def reason(folders: Sequence[Path], compilers: Sequence[str], source: Path, check: str = CHECK) -> str:
    kernel, detail = native.find(folders, compilers, source, check)
    assert kernel is None
    return detail


def compiler(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler of this name on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_a_second_look_compiles_nothing(folder: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = found(folder, source)
    assert first.library.answer() == 42
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) == 2
    assert found(folder, source).path == first.path
    assert files == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert tuple(capfd.readouterr()) == ("", "")
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


def test_whatever_the_object_depends_on_gives_another(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def records() -> int:
        found(folder, source)
        return len(list(folder.glob("*.json")))

    assert records() == 1
    source.write_text(SOURCE + "/* changed */\n")
    assert records() == 2
    (source.parent / "part.h").write_text("")
    source.write_text(SOURCE + '#include "part.h"\n')
    assert records() == 3
    (source.parent / "part.h").write_text("/* changed */\n")
    assert records() == 4
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    assert records() == 5
    monkeypatch.setattr(native, "_cpu_flags", lambda: b"another processor")
    assert records() == 6
    path, version = native._compiler(native.COMPILERS) or ("", "")
    monkeypatch.setattr(native, "_compiler", lambda _: (path, version + " patched"))
    assert records() == 7


@pytest.mark.parametrize("kept", ["", SOURCE, "truncated"], ids=["empty", "another file", "truncated"])
def test_a_damaged_object_is_built_anew(folder: Path, source: Path, kept: str) -> None:
    path = found(folder, source).path
    whole = path.read_bytes()
    path.unlink()  # this process still runs the old one: writing into it would pull the pages from under it
    path.write_bytes(whole[:-100] if kept == "truncated" else kept.encode())
    assert found(folder, source).library.answer() == 42
    assert len(list(folder.glob("*.json"))) == 1


@pytest.mark.parametrize("kept", ["", "{", "[]", "{}"])
def test_a_damaged_record_is_written_anew(folder: Path, source: Path, kept: str) -> None:
    found(folder, source)
    (record,) = folder.glob("*.json")
    record.write_text(kept)
    assert found(folder, source).library.answer() == 42
    assert json.loads(record.read_text())["fault"] == ""


@pytest.mark.parametrize(
    ("failure", "said"), [("assert False, 'wrong answer'", "wrong answer"), ("os.kill(os.getpid(), 4)", "signal 4")]
)
def test_a_failed_check_is_remembered(folder: Path, source: Path, tmp_path: Path, failure: str, said: str) -> None:
    log = tmp_path / "log"
    check = f"import os\nopen({str(log)!r}, 'a').write('checked ')\n{failure}"
    for _ in range(2):
        assert said in reason([folder], native.COMPILERS, source, check)
    assert log.read_text() == "checked "


def test_without_a_compiler_there_is_a_reason(folder: Path, source: Path) -> None:
    assert "no C compiler on PATH" in reason([folder], ["no-such-compiler"], source)


def test_a_serial_source_asks_for_no_openmp(folder: Path, source: Path) -> None:
    kernel, detail = native.find([folder], native.COMPILERS, source, CHECK, native.SERIAL)
    assert kernel is not None, detail
    assert kernel.built.endswith("one thread")
    assert b"libgomp" not in kernel.path.read_bytes()
    parallel = found(folder, source)
    assert parallel.path != kernel.path


def test_an_object_of_an_image_needs_no_compiler(folder: Path, source: Path) -> None:
    path = found(folder, source).path
    kernel, _ = native.find([folder], ["no-such-compiler"], source, CHECK)
    assert kernel is not None
    assert kernel.path == path


def test_a_compiler_that_fails_gives_its_words(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(
        tmp_path / "bin", "badcc", 'case "$1" in --version) echo 1.0;; *) echo "no as" >&2; exit 1;; esac', monkeypatch
    )
    assert "does not compile small.c: no as" in reason([folder], ["badcc"], source)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("refused", "version", "built"),
    [
        ("-march=native", "12", "12, for any processor"),
        ("-fopenmp", "12", "12, for this processor, one thread"),
        ("--param*", "9", "9, for this processor"),
        ("-W", "clang 18", "clang 18, for this processor, one thread"),
    ],
)
def test_a_compiler_that_refuses_a_flag_does_without(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, version: str, built: str
) -> None:
    (path, _) = native._compiler(native.COMPILERS) or ("", "")
    refuse = f'for flag; do case "$flag" in {refused}) exit 1;; --version) echo {version}; exit 0;; esac; done'
    compiler(tmp_path / "bin", "oldcc", f'{refuse}\nexec {path} "$@"', monkeypatch)
    kernel, detail = native.find([folder], ["oldcc"], source, CHECK)
    assert kernel is not None, detail
    assert kernel.built == built
    assert kernel.library.answer() == 42


def test_the_next_folder_serves_where_the_first_cannot(folder: Path, source: Path, tmp_path: Path) -> None:
    closed = tmp_path / "file" / "kernels"
    closed.parent.write_text("not a folder")
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert "others may write there" in reason([open_to_all], native.COMPILERS, source)
    assert not list(open_to_all.iterdir())
    kernel, _ = native.find([closed, open_to_all, folder], native.COMPILERS, source, CHECK)
    assert kernel is not None
    assert kernel.path.parent == folder


def test_objects_that_others_may_replace_are_not_loaded(folder: Path, source: Path) -> None:
    found(folder, source)
    folder.chmod(0o777)
    assert "others may write there" in reason([folder], native.COMPILERS, source)


def test_several_may_build_at_once(folder: Path, source: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        kernels = list(pool.map(lambda _: found(folder, source), range(4)))
    assert all(kernel.library.answer() == 42 for kernel in kernels)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".building")]
