"""A program whose children start with everything imported: `python -m treadle.testing.zygote SCRIPT`.

For each line of standard input, a JSON object with `function` and `arguments`, it forks a child, tells its pid, and at
the next line ("go") lets it call that function of SCRIPT with `say` and the arguments. Then it tells how the child
ended and all that it said. A child that waits has no thread and is in `select`, so that a tracer that attaches counts
only calls of the function.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PR_SET_PTRACER = 0x59616D61


def _load(script: Path) -> Any:
    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    return module


def _allow_tracer() -> None:
    """Where Yama lets only ancestors trace a process, any process of this user may trace this one."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)


def _live(function: Callable[..., Any], arguments: list[Any], go: int, said: int) -> None:
    """The whole life of a child."""

    def say(value: Any) -> None:
        os.write(said, json.dumps({"said": value}).encode() + b"\n")

    _allow_tracer()
    os.write(said, b'{"ready":true}\n')
    select.select([go], [], [])
    try:
        function(say, *arguments)
    except BaseException as error:  # the parent tells what it was
        os.write(said, json.dumps({"error": type(error).__name__, "message": str(error)}).encode() + b"\n")
        os._exit(1)
    os._exit(0)


def _serve(module: Any, request: dict[str, Any]) -> None:
    go_read, go_write = os.pipe()
    said_read, said_write = os.pipe()
    child = os.fork()
    if not child:
        os.close(go_write)
        os.close(said_read)
        _live(getattr(module, request["function"]), request["arguments"], go_read, said_write)
    os.close(go_read)
    os.close(said_write)
    with os.fdopen(said_read, "rb") as said:
        assert b"ready" in said.readline()
        _print({"pid": child})
        sys.stdin.readline()
        os.write(go_write, b"!")
        os.close(go_write)
        lines = [json.loads(line) for line in said if line.endswith(b"\n")]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _print({"status": status, "lines": lines})


def _print(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    module = _load(Path(sys.argv[1]).resolve())
    _print({"ready": True})
    for line in sys.stdin:
        _serve(module, json.loads(line))


if __name__ == "__main__":
    main()
