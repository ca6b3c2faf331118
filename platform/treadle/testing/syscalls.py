"""Death and errors at any system call, by strace.

A signal that strace injects arrives when the call is entered: a killed call has not happened. What is killed in the
middle of a call cannot be told from one or the other side of it, as far as a file system keeps its own rules.

Two traps. `-e trace=none` disables every injection without a word, so the calls are always traced too. And strace
counts the calls of each name and each thread apart, so a place is (name, number), and of several threads the first
one to get there is met: a function whose every call is to be a place does its work on one thread.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from treadle.errors import ConfigError, InternalError

__all__ = ["CHANGES", "LOOKS", "Call", "Outcome", "Victims"]

CHANGES = (
    *("openat", "creat", "write", "pwrite64", "writev", "ftruncate", "fallocate", "sendfile", "copy_file_range"),
    *("fsync", "fdatasync", "sync_file_range", "close", "flock", "utimensat", "chmod", "fchmod", "fchmodat"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"),
)
"""Calls after which a file system or its locks may be another than before."""
LOOKS = (
    *("read", "pread64", "lseek", "stat", "lstat", "fstat", "newfstatat", "statx", "access", "faccessat"),
    *("readlink", "readlinkat", "getdents64", "ioctl", "fcntl", "getcwd"),
)
"""Calls that change nothing; death at one of them is death at the change after it."""

_BEGUN = re.compile(r"(\d+)\s+(\w+)\((.*)")
_RESUMED = re.compile(r"(\d+)\s+<\.\.\. (\w+) resumed>(.*)")
_UNFINISHED = " <unfinished ...>"
_RESULT = re.compile(r"\)\s+= (-?\d+|0x[0-9a-f]+|\?)(?: (E[A-Z0-9]+))?.*$")
_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Call:
    """One system call.

    Args:
        name: of the call.
        number: its place among the calls of that name by its thread, from 1.
        arguments: as strace writes them, strings in hexadecimal.
        result: what it returned; -1 where it failed or never returned.
        error: the errno by name, or "".
        thread: 0 for the first thread that made one, and so on.
    """

    name: str
    number: int
    arguments: str
    result: int = -1
    error: str = ""
    thread: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.number}"

    def strings(self) -> list[bytes]:
        """The string arguments."""
        return [
            bytes.fromhex(text.replace(r"\x", "")) for text in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', self.arguments)
        ]

    def plain(self) -> list[str]:
        """The arguments, each string as `""`."""
        return [part.strip() for part in re.sub(r'"(?:\\x[0-9a-f]{2})*"', '""', self.arguments).split(",")]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a child ended.

    Args:
        status: its exit code; negative: the signal that killed it.
        said: what it passed to `say`, in order, before it ended.
        error: class and message of the exception that ended it, or None.
        calls: its system calls in the order in which they ended; closing a file counts from its begin.
    """

    status: int
    said: list[Any] = field(default_factory=list)
    error: tuple[str, str] | None = None
    calls: tuple[Call, ...] = ()


class Victims:
    """Children that run functions of one script, each from a process that has imported it; a context manager.

    Args:
        script: a Python file; its functions take `say`, which tells this process a JSON value, and JSON arguments.
        environment: of the children; None: that of this process.

    Raises:
        ConfigError: there is no strace, or it may not trace.

    Cost: a child takes about 0.05 s, and every system call of it twice its usual time.
    """

    def __init__(self, script: Path, environment: Mapping[str, str] | None = None) -> None:
        program = shutil.which("strace")
        if program is None:
            raise ConfigError("strace: got no such program on PATH, expected one", hint="apt-get install strace")
        self._strace = program
        self._folder = tempfile.TemporaryDirectory(prefix="treadle-victims-")
        self._zygote = subprocess.Popen(
            [sys.executable, "-P", "-m", "treadle.testing.zygote", str(script)],
            env=None if environment is None else dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.close()
        self._zygote.wait(_TIMEOUT_S)
        self._zygote.stdout.close()
        self._folder.cleanup()

    def run(
        self, function: str, *arguments: Any, names: Sequence[str] = CHANGES, inject: Sequence[str] = ()
    ) -> Outcome:
        """What one child did.

        Args:
            function: its name in the script.
            arguments: JSON.
            names: calls that are traced.
            inject: values of strace's option `-e inject=`.
        """
        self._ask({"function": function, "arguments": list(arguments)})
        pid = self._tell()["pid"]
        trace = Path(self._folder.name) / "trace"
        traced = ",".join(f"?{name}" for name in names)  # "?": no complaint where this processor lacks it
        options = [word for value in inject for word in ("-e", f"inject={value}")]
        command = [self._strace, "-f", "-xx", "-s", str(1 << 24), "-o", str(trace), "-e", f"trace={traced}"]
        tracer = subprocess.Popen(
            [*command, "-e", "signal=none", *options, "-p", str(pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert tracer.stderr is not None
        first = tracer.stderr.readline()
        self._ask("go")
        ended = self._tell()
        said = tracer.communicate(timeout=_TIMEOUT_S)[1]
        if "attached" not in first:
            raise ConfigError(
                f"strace: got {(first + said).strip()!r}, expected to trace a child", hint="CAP_SYS_PTRACE"
            )
        lines = ended["lines"]
        error = next(((line["error"], line["message"]) for line in lines if "error" in line), None)
        return Outcome(
            status=ended["status"],
            said=[line["said"] for line in lines if "said" in line],
            error=error,
            calls=_calls(trace.read_text(encoding="ascii")),
        )

    def kill(self, call: Call, function: str, *arguments: Any) -> Outcome:
        """What a child did that was killed as it entered `call`.

        Raises:
            InternalError: it was not killed: the call never came.
        """
        inject = f"{call.name}:signal=SIGKILL:when={call.number}"
        outcome = self.run(function, *arguments, names=[call.name], inject=[inject])
        if outcome.status != -signal.SIGKILL:
            raise InternalError(f"{function} at {call}: ended with {outcome.status} {outcome.error}, expected a kill")
        return outcome

    def fail(self, call: Call, error: str, function: str, *arguments: Any, always: bool = False) -> Outcome:
        """What a child did whose `call`, and with `always` every later one of that name, answered `error`.

        Raises:
            InternalError: the call never came.
        """
        inject = f"{call.name}:error={error}:when={call.number}{'+' if always else ''}"
        outcome = self.run(function, *arguments, names=[call.name], inject=[inject])
        if not any(seen.number == call.number and seen.error == error for seen in outcome.calls):
            raise InternalError(f"{function} at {call}: no such call was made, expected one that answers {error}")
        return outcome

    def _ask(self, value: Any) -> None:
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(value) + "\n")
        self._zygote.stdin.flush()

    def _tell(self) -> dict[str, Any]:
        assert self._zygote.stdout is not None
        line = self._zygote.stdout.readline()
        if not line:
            raise InternalError(f"the process that starts children ended with {self._zygote.wait(_TIMEOUT_S)}")
        return json.loads(line)


def _calls(text: str) -> tuple[Call, ...]:
    seen: Counter[tuple[str, str]] = Counter()
    threads: dict[str, int] = {}
    begun: dict[tuple[str, str], tuple[int, str]] = {}
    places: dict[tuple[str, str], int] = {}
    found: list[Call | None] = []
    for line in text.splitlines():
        if match := _BEGUN.fullmatch(line):
            pid, name, rest = match.groups()
            threads.setdefault(pid, len(threads))
            seen[pid, name] += 1
            # A number that is closed may be given to another thread's file before the closing is reported.
            places[pid, name] = len(found)
            if rest.endswith(_UNFINISHED):
                begun[pid, name] = seen[pid, name], rest.removesuffix(_UNFINISHED)
                if name == "close":
                    found.append(None)
                continue
            number = seen[pid, name]
        elif match := _RESUMED.fullmatch(line):
            pid, name, rest = match.groups()
            if (pid, name) not in begun:  # it began before the tracer came
                continue
            number, start = begun.pop((pid, name))
            rest = start + rest
        else:
            continue
        call = _call(name, number, rest, threads[pid])
        place = places[pid, name]
        if name == "close" and place < len(found) and found[place] is None:
            found[place] = call
        else:
            found.append(call)
    for (pid, name), (number, rest) in begun.items():  # never ended
        found.append(_call(name, number, rest, threads[pid]))
    return tuple(call for call in found if call is not None)


def _call(name: str, number: int, text: str, thread: int) -> Call:
    result = _RESULT.search(text)
    return Call(
        name=name,
        number=number,
        arguments=text[: result.start()] if result else text,
        result=int(result[1], 0) if result and result[1] != "?" else -1,
        error=(result[2] or "") if result else "",
        thread=thread,
    )
