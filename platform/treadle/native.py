"""C sources of the package, compiled on this machine when they are first needed.

One direct call of the C compiler takes seconds and needs no build tool, and the object fits the processor it runs on.
Objects are kept in a cache folder, each with a record of what its self-check said; an image that carries the folder
needs no compiler. Where no object can be had, callers do without.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COMPILERS", "PARALLEL", "SERIAL", "Kernel", "NativeStatus", "find", "folders"]

COMPILERS = ("cc", "gcc", "clang")
# No -ffast-math, nor any part of it that changes results: NaN must come out, and an object linked with it would
# turn denormals off in the whole process. Everything that is worth it is inlined by hand, so -O3 gives nothing.
FLAGS = ("-O2", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Without these gcc works out exp of the clamps' constants and blends it in, a third more instructions; and it makes
# a second vector loop of half the width for what is left of H, half the compile time.
GCC = ("-fno-thread-jumps", "-fno-tree-pre", "--param=vect-epilogues-nomask=0")
WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
PARALLEL = (
    ("-march=native", *WIDE, *GCC, "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-fopenmp",),
    ("-fopenmp-simd",),
)
"""Flags of sources that run on several threads; the first that the compiler takes. OpenMP is gcc's only: clang would
bring a second runtime beside torch's."""
SERIAL = (("-march=native", "-fopenmp-simd"), ("-fopenmp-simd",), ())
"""Flags of sources that run on the thread of their caller: these load no OpenMP runtime, so that torch may load its own
later."""


@dataclass(frozen=True, kw_only=True)
class NativeStatus:
    """Whether a compiled source is used.

    Args:
        available: False where slower code takes its place.
        detail: compiler and object, or why there is none.
    """

    available: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A loaded object.

    Args:
        path: where it lies.
        built: by which compiler, for which processor.
        library: its functions; calls release the interpreter lock.
    """

    path: Path
    built: str
    library: ctypes.CDLL


class _UnavailableError(Exception):
    """Why a folder gives no object."""


class _StaleError(_UnavailableError):
    """A record whose object is not, or no longer, what it says."""


def find(
    places: Sequence[Path],
    compilers: Sequence[str],
    source: Path,
    check: str,
    attempts: Sequence[Sequence[str]] = PARALLEL,
) -> tuple[Kernel | None, str]:
    """A kernel from the first folder that holds or takes one, and which it is, or why there is none.

    Args:
        places: folders where objects are kept, the preferred one first.
        compilers: names looked up on PATH, the preferred one first.
        source: what is compiled.
        check: Python that fails if the object, whose path is its argument, does not compute what it should.
        attempts: flags beside the usual ones; the first that the compiler takes.
    """
    if os.name != "posix":
        return None, "objects are only built on POSIX systems"
    reasons: list[str] = []
    for folder in places:
        try:
            kernel = _kernel_in(folder, compilers, source, check, attempts)
        except (_UnavailableError, OSError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
        else:
            return kernel, f"{kernel.built}, {kernel.path}"
    return None, "; ".join(dict.fromkeys(reasons)) or "no folder to keep objects in"


def folders() -> list[Path]:
    """The user's cache, then a folder of the user's own among the temporary files."""
    found: list[Path] = []
    with contextlib.suppress(RuntimeError):  # a user without a home
        found.append(Path.home() / ".cache" / "treadle" / "kernels")
    if os.name == "posix":
        found.append(Path(tempfile.gettempdir()) / f"treadle-kernels-{os.getuid()}")
    return found


def _kernel_in(
    folder: Path, compilers: Sequence[str], source: Path, check: str, attempts: Sequence[Sequence[str]]
) -> Kernel:
    """The kernel that `folder` holds, or a new one that it then holds."""
    stem = f"{source.stem}-{_digest(*_texts(source), check.encode(), platform.machine().encode(), _cpu_flags())}"
    compiler = _compiler(compilers)
    if compiler is None:
        # An object built elsewhere for the same processor and source: whatever compiler made it.
        for record in sorted(folder.glob(f"{stem}-*.json")):
            with contextlib.suppress(_UnavailableError, OSError, ValueError):
                return _recorded(record)
        raise _UnavailableError(f"no C compiler on PATH ({', '.join(compilers)})")
    record = folder / f"{stem}-{_digest(compiler[1].encode(), repr((FLAGS, attempts)).encode())}.json"
    with contextlib.suppress(FileNotFoundError, _StaleError):
        return _recorded(record)
    _make_private(folder)
    _build(compiler, _Task(source, check, attempts), record)
    return _recorded(record)


def _recorded(record: Path) -> Kernel:
    """The object that `record` speaks of."""
    _check_owner(record.parent)
    try:
        entry = json.loads(record.read_bytes())
        built, name, digest, fault = (str(entry[key]) for key in ("built", "object", "digest", "fault"))
    except (ValueError, KeyError, TypeError) as error:
        raise _StaleError(f"{record}: not a record") from error
    if fault:
        raise _UnavailableError(fault)
    path = record.with_name(name)
    # Loading a truncated object kills the process: compare before.
    if not path.is_file() or _digest(path.read_bytes()) != digest:
        raise _StaleError(f"{path}: not what was built")
    return Kernel(path=path, built=built, library=ctypes.CDLL(str(path)))


@dataclass(frozen=True)
class _Task:
    """What is built: from what, tried by what, with which flags."""

    source: Path
    check: str
    attempts: Sequence[Sequence[str]]


def _build(compiler: tuple[str, str], task: _Task, record: Path) -> None:
    """Compile, check, and record the outcome. Several processes may do so at once: each file appears whole."""
    with _temporary(record.parent, ".so") as built:
        suits = _compile(compiler, task, built)
        fault = _fault(built, task.check)
        digest = _digest(built.read_bytes())
        path = record.with_name(f"{record.stem}-{digest}.so")
        entry = {"built": f"{compiler[1]}, {suits}", "object": path.name, "digest": digest, "fault": fault}
        if not fault:
            built.replace(path)
    with _temporary(record.parent, ".json") as written:
        written.write_text(json.dumps(entry), encoding="utf-8")
        written.replace(record)


def _compile(compiler: tuple[str, str], task: _Task, target: Path) -> str:
    """Compile into `target` with the first flags that the compiler takes; say what it then suits."""
    (path, version), said = compiler, ""
    for attempt in task.attempts:
        if "-fopenmp" in attempt and "clang" in version:
            continue
        command = [path, *FLAGS, *attempt, "-o", str(target), str(task.source), "-lm"]
        outcome = _run(command)
        if outcome.returncode == 0:
            suits = "for this processor" if "-march=native" in attempt else "for any processor"
            return suits if "-fopenmp" in attempt else f"{suits}, one thread"
        said = said or outcome.stderr.strip()
    raise _UnavailableError(f"{path} does not compile {task.source.name}: {' '.join(said.split())[:200]}")


def _fault(path: Path, check: str) -> str:
    """What is wrong with an object, or "": tried in a process of its own, which an illegal instruction may kill."""
    outcome = _run([sys.executable, "-I", "-S", "-c", check, str(path)])
    if outcome.returncode == 0:
        return ""
    reason = f"signal {-outcome.returncode}" if outcome.returncode < 0 else outcome.stderr.strip().split("\n")[-1]
    return f"the self-check of the compiled object failed: {reason[:200]}"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )


def _compiler(names: Sequence[str]) -> tuple[str, str] | None:
    """Path and version of the first compiler on PATH that answers."""
    for path in filter(None, map(shutil.which, names)):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            outcome = _run([path, "--version"])
            if outcome.returncode == 0 and outcome.stdout:
                return path, outcome.stdout.split("\n")[0]
    return None


def _texts(source: Path) -> list[bytes]:
    """A source and all that it includes from beside it."""
    texts: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in texts:
            texts[path] = path.read_bytes()
            included = re.findall(rb'^#include "(.+)"', texts[path], re.MULTILINE)
            waiting += [path.with_name(name.decode()) for name in included]
    return list(texts.values())


def _cpu_flags() -> bytes:
    """What the processor can do: an object for another set would die of an illegal instruction."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_bytes().splitlines():
            if line.startswith((b"flags", b"Features")):
                return b" ".join(sorted(line.partition(b":")[2].split()))
    return platform.processor().encode()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)


def _check_owner(folder: Path) -> None:
    """What is loaded runs as this user: nobody else may have put it there."""
    found, trusted = folder.stat(), (0, os.getuid())
    if found.st_uid not in trusted or folder.lstat().st_uid not in trusted or found.st_mode & 0o022:
        raise _UnavailableError(f"{folder}: others may write there")


@contextlib.contextmanager
def _temporary(folder: Path, suffix: str) -> Iterator[Path]:
    """A new file of this process in `folder`, gone at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".building-", suffix=suffix)
    os.close(handle)
    path = Path(name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
