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
import re
import shutil
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
# turn denormals off in the whole process. Everything that is worth it is inlined by hand, so -O3 gives nothing.
FLAGS = ("-O2", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Without these gcc works out exp of the clamps' constants and blends it in, a third more instructions; and it makes
# a second vector loop of half the width for what is left of H, half the compile time.
GCC = ("-fno-thread-jumps", "-fno-tree-pre", "--param=vect-epilogues-nomask=0")
WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
# The first that the compiler takes. OpenMP is gcc's only: clang would bring a second runtime beside torch's.
ATTEMPTS = (
    ("-march=native", *WIDE, *GCC, "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-fopenmp",),
    ("-fopenmp-simd",),
)
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
        built: by which compiler, for which processor.
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

# Run on every new object, without torch, whose import takes a second: every format, form and candidate, and a number
# of channels that no vector divides.
SELF_CHECK = """
import ctypes, itertools, math, struct, sys
scan = ctypes.CDLL(sys.argv[1])
H, T = 37, 3
sigmoid = lambda v: 1 / (1 + math.exp(-v))
candidates = (lambda v: v + 0.5 if v >= 0 else sigmoid(v), math.tanh, lambda v: v)
bits = lambda v: struct.unpack("<I", struct.pack("<f", v))[0] >> 16
value = lambda b: struct.unpack("<f", struct.pack("<I", b << 16))[0]
same = lambda v: v
f4, f8 = ctypes.c_float, ctypes.c_double
formats = ((f4, f4, same, same, 1e-5), (ctypes.c_uint16, f4, bits, value, 2e-2), (f8, f8, same, same, 1e-12))
for (dtype, form, which) in itertools.product(range(3), range(3), range(3)):
    stored, real, store, load, close = formats[dtype]
    G = (2 if form == 0 else 3) * H
    pre = (stored * (T * G))(*(store(3 * math.sin(1 + 7 * i)) for i in range(T * G)))
    ones, h0, dh0, last = ((real * H)(*[v] * H) for v in (1.0, 0.25, 0.0, 0.0))
    h, zeros, dpre = (stored * (T * H))(), (stored * (T * H))(), (stored * (T * G))()
    offsets = (ctypes.c_int64 * 2)(0, T)
    tensors = (pre, h0, offsets, None, None, None, h, last, zeros, ones, dpre, dh0, None, None, None)
    addresses = (0 if tensor is None else ctypes.addressof(tensor) for tensor in tensors)
    words = (ctypes.c_int64 * 22)(*addresses, 1, H, dtype, form, which, 0, 1)
    scan.treadle_scan_forward(words)
    scan.treadle_scan_backward(words)
    for j in range(H):
        state, slope = 0.25, 1.0
        for t in range(T):
            *shares, x = (load(pre[t * G + k * H + j]) for k in range(G // H))
            shares = [sigmoid(v) for v in shares]
            keep, take = (1 - shares[0], shares[0]) if form == 0 else shares
            if form == 1:
                keep, take = keep / (keep + take), take / (keep + take)
            state, slope = keep * state + take * candidates[which](x), slope * keep
            assert abs(load(h[t * H + j]) - state) < close, "wrong state"
        assert abs(last[j] - state) < close and abs(dh0[j] - slope) < close, "wrong last state or gradient"
    assert all(math.isfinite(load(v)) for v in dpre), "a gradient is not finite"
"""


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


def find(
    folders: Sequence[Path], compilers: Sequence[str], source: Path = SOURCE, check: str = SELF_CHECK
) -> tuple[Kernel | None, str]:
    """A kernel from the first folder that holds or takes one, and which it is, or why there is none.

    Args:
        folders: where objects are kept, the preferred one first.
        compilers: names looked up on PATH, the preferred one first.
        source: what is compiled.
        check: Python that fails if the object, whose path is its argument, does not compute what it should.
    """
    if os.name != "posix":
        return None, "objects are only built on POSIX systems"
    reasons: list[str] = []
    for folder in folders:
        try:
            kernel = _kernel_in(folder, compilers, source, check)
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


def _kernel_in(folder: Path, compilers: Sequence[str], source: Path, check: str) -> Kernel:
    """The kernel that `folder` holds, or a new one that it then holds."""
    stem = f"{source.stem}-{_digest(*_texts(source), check.encode(), platform.machine().encode(), _cpu_flags())}"
    compiler = _compiler(compilers)
    if compiler is None:
        # An object built elsewhere for the same processor and source: whatever compiler made it.
        for record in sorted(folder.glob(f"{stem}-*.json")):
            with contextlib.suppress(_UnavailableError, OSError, ValueError):
                return _recorded(record)
        raise _UnavailableError(f"no C compiler on PATH ({', '.join(compilers)})")
    path, version = compiler
    record = folder / f"{stem}-{_digest(version.encode(), repr((FLAGS, ATTEMPTS)).encode())}.json"
    with contextlib.suppress(FileNotFoundError, _StaleError):
        return _recorded(record)
    _make_private(folder)
    _build(path, version, source, record, check)
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


def _build(compiler: str, version: str, source: Path, record: Path, check: str) -> None:
    """Compile, check, and record the outcome. Several processes may do so at once: each file appears whole."""
    with _temporary(record.parent, ".so") as built:
        suits = _compile(compiler, version, source, built)
        fault = _fault(built, check)
        digest = _digest(built.read_bytes())
        path = record.with_name(f"{record.stem}-{digest}.so")
        entry = {"built": f"{version}, {suits}", "object": path.name, "digest": digest, "fault": fault}
        if not fault:
            built.replace(path)
    with _temporary(record.parent, ".json") as written:
        written.write_text(json.dumps(entry), encoding="utf-8")
        written.replace(record)


def _compile(compiler: str, version: str, source: Path, target: Path) -> str:
    """Compile `source` into `target` with the first flags that the compiler takes; say what it then suits."""
    said = ""
    for attempt in ATTEMPTS:
        if "-fopenmp" in attempt and "clang" in version:
            continue
        command = [compiler, *FLAGS, *attempt, "-o", str(target), str(source), "-lm"]
        outcome = _run(command)
        if outcome.returncode == 0:
            suits = "for this processor" if "-march=native" in attempt else "for any processor"
            return suits if "-fopenmp" in attempt else f"{suits}, one thread"
        said = said or outcome.stderr.strip()
    raise _UnavailableError(f"{compiler} does not compile {source.name}: {' '.join(said.split())[:200]}")


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
