"""The gated scan of the CPU: scan.c, compiled on this machine when it is first needed.

Shape letters: S rows, H hidden, G = H * gates of the form, N frames of all rows laid end to end.

One direct call of the C compiler takes seconds and needs neither torch's headers nor a build tool, and the object
fits the processor it runs on. Objects are kept in a cache folder, each with a record of what its self-check said; an
image that carries the folder needs no compiler. Where no object can be had, `load` gives None and `status` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch  # before any object is loaded: it brings the OpenMP runtime that the object then shares
from torch import Tensor

__all__ = ["Kernel", "NativeStatus", "backward", "find", "forward", "load", "status", "supports"]

SOURCE = Path(__file__).with_name("scan.c")
COMPILERS = ("cc", "gcc", "clang")
# No -ffast-math, nor any part of it that changes results: NaN must come out, and an object linked with it would
# turn denormals off in the whole process.
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# The first that the compiler takes: fitted to this processor, any processor, no OpenMP runtime to be had.
ATTEMPTS = (("-march=native", "-mprefer-vector-width=512", "-fopenmp"), ("-fopenmp",), ("-fopenmp-simd",))
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NativeStatus:
    """Whether the compiled scan is used.

    Args:
        available: False where the plain torch loop takes its place.
        detail: compiler and object, or why there is none.
    """

    available: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A loaded object.

    Args:
        path: where it lies.
        built: compiler and flags.
        library: its functions.
    """

    path: Path
    built: str
    library: ctypes.CDLL


def supports(dtype: torch.dtype) -> bool:
    """True where the compiled scan can be had and computes in `dtype`."""
    return dtype in _DTYPES and load() is not None


def load() -> Kernel | None:
    """The compiled scan, built if need be; None where it cannot be had.

    Cost: a compilation the first time on a machine; milliseconds once a process after that.
    """
    return _found()[0]


def status() -> NativeStatus:
    """Whether the compiled scan is used, and why."""
    kernel, detail = _found()
    return NativeStatus(available=kernel is not None, detail=detail)


def forward(
    pre_NG: Tensor,
    h0_SH: Tensor,
    offsets: Tensor,
    starts_N: Tensor | None,
    reset_H: Tensor | None,
    decay_NH: Tensor | None,
    form: int,
    candidate: int,
    reverse: bool,
    _max_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """h_NH and the state after each row's last frame; `treadle.nn.loop.forward` says what the arguments are."""
    h_NH = pre_NG.new_empty(pre_NG.shape[0], h0_SH.shape[1])
    last_SH = torch.empty_like(h0_SH)
    tensors = (pre_NG, h0_SH, offsets, starts_N, reset_H, decay_NH, h_NH, last_SH, *(None,) * 7)
    _call("treadle_scan_forward", tensors, form, candidate, reverse)
    return h_NH, last_SH


def backward(
    grad_h_NH: Tensor,
    grad_last_SH: Tensor,
    pre_NG: Tensor,
    h_NH: Tensor,
    h0_SH: Tensor,
    offsets: Tensor,
    starts_N: Tensor | None,
    reset_H: Tensor | None,
    decay_NH: Tensor | None,
    form: int,
    candidate: int,
    reverse: bool,
    _max_length: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dpre_NG, dh0_SH, dreset_H, ddecay_NH), the last two None where there was no such input."""
    dpre_NG, dh0_SH = torch.empty_like(pre_NG), torch.empty_like(h0_SH)
    dreset_SH = None if reset_H is None else torch.empty_like(h0_SH)
    dreset_H = None if reset_H is None else torch.empty_like(reset_H)
    ddecay_NH = None if decay_NH is None else torch.empty_like(decay_NH)
    inputs = (pre_NG, h0_SH, offsets, starts_N, reset_H, decay_NH, h_NH, None, grad_h_NH, grad_last_SH)
    tensors = (*inputs, dpre_NG, dh0_SH, dreset_SH, dreset_H, ddecay_NH)
    _call("treadle_scan_backward", tensors, form, candidate, reverse)
    return dpre_NG, dh0_SH, dreset_H, ddecay_NH


def _call(name: str, tensors: Sequence[Tensor | None], form: int, candidate: int, reverse: bool) -> None:
    kernel = load()
    if kernel is None:
        raise RuntimeError("the compiled scan is not available: ask supports() first")
    pre_NG, h0_SH = tensors[0], tensors[1]
    assert pre_NG is not None
    assert h0_SH is not None
    words = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    words += [*h0_SH.shape, _DTYPES[pre_NG.dtype], form, candidate, int(reverse), torch.get_num_threads()]
    getattr(kernel.library, name)((ctypes.c_int64 * len(words))(*words))


# ---- finding and building ----


class _UnavailableError(Exception):
    """Why a folder gives no object."""


class _StaleError(_UnavailableError):
    """A record whose object is not, or no longer, what it says."""


@functools.cache
def _found() -> tuple[Kernel | None, str]:
    kernel, detail = find(_folders(), COMPILERS)
    if kernel is None:
        _logger.info("the gated scan runs as a plain torch loop: %s", detail)
    return kernel, detail


def find(folders: Sequence[Path], compilers: Sequence[str], source: Path = SOURCE) -> tuple[Kernel | None, str]:
    """A kernel from the first folder that holds or takes one, and which it is, or why there is none.

    Args:
        folders: where objects are kept, the preferred one first.
        compilers: names looked up on PATH, the preferred one first.
        source: what is compiled.
    """
    if os.name != "posix":
        return None, "objects are only built on POSIX systems"
    reasons: list[str] = []
    for folder in folders:
        try:
            kernel = _kernel_in(folder, compilers, source)
        except (_UnavailableError, OSError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
        else:
            return kernel, f"{kernel.built}, {kernel.path}"
    return None, "; ".join(dict.fromkeys(reasons)) or "no folder to keep objects in"


def _folders() -> list[Path]:
    """The user's cache, then a folder of the user's own among the temporary files."""
    folders: list[Path] = []
    with contextlib.suppress(RuntimeError):  # a user without a home
        folders.append(Path.home() / ".cache" / "treadle" / "kernels")
    if os.name == "posix":
        folders.append(Path(tempfile.gettempdir()) / f"treadle-kernels-{os.getuid()}")
    return folders


def _kernel_in(folder: Path, compilers: Sequence[str], source: Path) -> Kernel:
    """The kernel that `folder` holds, or a new one that it then holds."""
    machine = _digest(source.read_bytes(), platform.machine().encode(), _cpu_flags())
    compiler = _compiler(compilers)
    if compiler is None:
        # An object built elsewhere for the same processor and source: whatever compiler made it.
        for record in sorted(folder.glob(f"scan-{machine}-*.json")):
            with contextlib.suppress(_UnavailableError, OSError, ValueError):
                return _recorded(record)
        raise _UnavailableError(f"no C compiler on PATH ({', '.join(compilers)})")
    path, version = compiler
    record = folder / f"scan-{machine}-{_digest(version.encode(), repr((FLAGS, ATTEMPTS)).encode())}.json"
    with contextlib.suppress(FileNotFoundError, _StaleError):
        return _recorded(record)
    _make_private(folder)
    _build(path, version, source, record)
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


def _build(compiler: str, version: str, source: Path, record: Path) -> None:
    """Compile, check, and record the outcome. Several processes may do so at once: each file appears whole."""
    with _temporary(record.parent, ".so") as built:
        flags = _compile(compiler, source, built)
        fault = _fault(built)
        digest = _digest(built.read_bytes())
        path = record.with_name(f"{record.stem}-{digest}.so")
        entry = {"built": f"{version} {flags}", "object": path.name, "digest": digest, "fault": fault}
        if not fault:
            built.replace(path)
    with _temporary(record.parent, ".json") as written:
        written.write_text(json.dumps(entry), encoding="utf-8")
        written.replace(record)


def _compile(compiler: str, source: Path, target: Path) -> str:
    """Compile `source` into `target` with the first flags that the compiler takes; give those."""
    said = ""
    for attempt in ATTEMPTS:
        command = [compiler, *FLAGS, *attempt, "-o", str(target), str(source), "-lm"]
        outcome = _run(command)
        if outcome.returncode == 0:
            return " ".join(attempt)
        said = said or outcome.stderr.strip()
    raise _UnavailableError(f"{compiler} does not compile {source.name}: {' '.join(said.split())[:200]}")


def _fault(path: Path) -> str:
    """What is wrong with an object, or "": tried in a process of its own, which an illegal instruction may kill."""
    outcome = _run([sys.executable, "-I", "-S", "-c", _SELF_CHECK, str(path)])
    if outcome.returncode == 0:
        return ""
    reason = f"signal {-outcome.returncode}" if outcome.returncode < 0 else outcome.stderr.strip().split("\n")[-1]
    return f"the self-check of the compiled scan failed: {reason[:200]}"


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
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
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


# Without torch, whose import takes a second. A channel count of one vector and a rest, every form and candidate.
_SELF_CHECK = """
import ctypes, itertools, math, sys
scan = ctypes.CDLL(sys.argv[1])
H, T = 37, 3
sigmoid = lambda v: 1 / (1 + math.exp(-v))
candidates = (lambda v: v + 0.5 if v >= 0 else sigmoid(v), math.tanh, lambda v: v)
for (dtype, real), form, which in itertools.product(((0, ctypes.c_float), (2, ctypes.c_double)), range(3), range(3)):
    G = (2 if form == 0 else 3) * H
    pre = (real * (T * G))(*(3 * math.sin(1 + 7 * i) for i in range(T * G)))
    ones, h0, dh0, last = ((real * H)(*[v] * H) for v in (1.0, 0.25, 0.0, 0.0))
    h, zeros = (real * (T * H))(), (real * (T * H))()
    dpre = (real * (T * G))()
    offsets = (ctypes.c_int64 * 2)(0, T)
    here = lambda array: 0 if array is None else ctypes.addressof(array)
    tensors = (pre, h0, offsets, None, None, None, h, last, zeros, ones, dpre, dh0, None, None, None)
    words = (ctypes.c_int64 * 22)(*map(here, tensors), 1, H, dtype, form, which, 0, 1)
    assert scan.treadle_scan_forward(words) == 0 and scan.treadle_scan_backward(words) == 0
    for j in range(H):
        state, slope = 0.25, 1.0
        for t in range(T):
            *gates, x = (pre[t * G + k * H + j] for k in range(G // H))
            shares = [sigmoid(v) for v in gates]
            keep, take = (1 - shares[0], shares[0]) if form == 0 else shares
            if form == 1:
                keep, take = keep / (keep + take), take / (keep + take)
            state, slope = keep * state + take * candidates[which](x), slope * keep
            assert abs(h[t * H + j] - state) < 1e-5, "wrong state"
        assert abs(last[j] - state) < 1e-5 and abs(dh0[j] - slope) < 1e-5, "wrong gradient"
    assert all(map(math.isfinite, dpre)), "not finite"
"""
