"""Owned copies of everything that moves, taken while the next forward and backward pass run.

A copy lies in memory the way its file does (safetensors: a header, then the tensors end to end), so that writing it
needs no second copy. The buffers are made once and used again for every snapshot: one times the state in host memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from treadle.errors import InternalError

__all__ = ["Snapshot"]

# What safetensors calls each format, in the order in which it lays tensors out: wider items first, so that all of
# them lie at multiples of their size.
_FORMATS = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_FORMATS)}
# numpy copies bits: it knows no bfloat16, and one of its threads is enough (see `_copy_on_host`).
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXPONENT = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
_CHECKED = 1 << 20

Form = tuple[tuple[str, torch.dtype, torch.Size], ...]


class Snapshot:
    """Owned copies of tensors, taken beside the work that reads them.

    `begin` starts a copy and returns at once; `join` comes before anything changes the sources, which is the next
    optimizer step or an evaluation that puts other weights in; `contents` gives the bytes of the files, until the next
    `begin`. Whoever reads them must have finished before: there is one set of buffers.

    On CUDA the copy runs on a stream of its own into pinned memory, and `join` makes the current stream wait, not the
    host.

    Cost: one times the state in host memory; the copy goes at the speed of memory, on one thread.
    """

    def __init__(self) -> None:
        self.waited_s = 0.0
        """Time that the last `join` waited."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="treadle-snapshot")
        self._images: dict[str, _Image] = {}
        self._copy: Future[None] | None = None
        self._is_joined = True
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    def begin(self, sources: Mapping[str, Mapping[str, Tensor]], *, inline: Collection[str] = ()) -> None:
        """Start copying.

        Args:
            sources: tensors by file and by name; they may be read but not changed until `join`.
            inline: names of tensors that a forward pass changes. They are cloned here, so they should be small.

        Raises:
            InternalError: the copy before this one was not joined.
        """
        if not self._is_joined:
            raise InternalError("snapshot: got begin twice, expected join between")
        held = {
            file: {name: tensor.clone() if name in inline else tensor for name, tensor in tensors.items()}
            for file, tensors in sources.items()
        }
        self._done = ready = None
        if any(tensor.is_cuda for tensors in held.values() for tensor in tensors.values()):
            ready, self._done = torch.cuda.Event(), torch.cuda.Event()
            ready.record()
            self._stream = self._stream or torch.cuda.Stream()
        self._is_joined, self.waited_s = False, 0.0
        self._copy = self._pool.submit(self._run, held, ready)

    def join(self) -> None:
        """Return when the sources may be changed; at once where nothing is being copied.

        Raises:
            Exception: what the copy raised.
        """
        if self._is_joined or self._copy is None:
            return
        started = time.monotonic()
        self._is_joined = True
        try:
            self._copy.result()
        finally:
            self.waited_s = time.monotonic() - started
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def contents(self) -> dict[str, memoryview]:
        """The bytes of each file; waits for the copy. Any thread may ask.

        Raises:
            Exception: what the copy raised.
        """
        self._settle()
        return {file: image.bytes_N.numpy().data for file, image in self._images.items()}

    def nonfinite(self) -> list[str]:
        """`file: name` of every copied tensor that holds a NaN or an infinity; waits for the copy."""
        self._settle()
        return [
            f"{file}: {name}"
            for file, image in self._images.items()
            for name, tensor in image.tensors.items()
            if not _is_finite(tensor)
        ]

    def close(self) -> None:
        """End the thread, after the copy in flight."""
        self._pool.shutdown(wait=True)

    def _settle(self) -> None:
        if self._copy is not None:
            self._copy.result()
        if self._done is not None:
            self._done.synchronize()

    def _run(self, sources: dict[str, dict[str, Tensor]], ready: torch.cuda.Event | None) -> None:
        images: dict[str, _Image] = {}
        for file, tensors in sources.items():
            form = _form(tensors)
            before = self._images.get(file)
            fits = before is not None and before.form == form
            images[file] = before if before is not None and fits else _Image(file, form, pinned=ready is not None)
        self._images = images
        pairs = [(images[file].tensors[name], source) for file in sources for name, source in sources[file].items()]
        _copy_on_host([(copy, source) for copy, source in pairs if not source.is_cuda])
        if ready is not None:
            assert self._stream is not None
            assert self._done is not None
            with torch.cuda.stream(self._stream), torch.no_grad():
                self._stream.wait_event(ready)
                for copy, source in pairs:
                    if source.is_cuda:
                        copy.copy_(source, non_blocking=True)
                        source.record_stream(self._stream)  # its memory is not given away before it was read
                self._done.record(self._stream)


class _Image:
    """The bytes of one safetensors file, and each tensor as a view of them."""

    def __init__(self, file: str, form: Form, *, pinned: bool) -> None:
        self.form = form
        if unknown := [f"{name} ({dtype})" for name, dtype, _ in form if dtype not in _FORMATS]:
            raise InternalError(f"{file}: got {', '.join(unknown[:5])}, expected formats that safetensors has")
        ordered = sorted(form, key=lambda item: (_RANK[item[1]], item[0]))
        spans, end = {}, 0
        for name, dtype, shape in ordered:
            spans[name] = (end, end + dtype.itemsize * shape.numel())
            end = spans[name][1]
        header = _header(ordered, spans)
        self.bytes_N = torch.empty(len(header) + end, dtype=torch.uint8, pin_memory=pinned)
        self.bytes_N.numpy()[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        data_N = self.bytes_N[len(header) :]
        self.tensors = {
            name: data_N[spans[name][0] : spans[name][1]].view(dtype).view(shape) for name, dtype, shape in form
        }


def _form(tensors: Mapping[str, Tensor]) -> Form:
    return tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())


def _header(ordered: list[tuple[str, torch.dtype, torch.Size]], spans: Mapping[str, tuple[int, int]]) -> bytes:
    """The header as safetensors writes it, byte for byte."""
    fields = {
        name: {"dtype": _FORMATS[dtype], "shape": list(shape), "data_offsets": list(spans[name])}
        for name, dtype, shape in ordered
    }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy_on_host(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second into its first.

    By numpy, which lets the interpreter go while it copies and takes one thread. torch's copy would start a team of
    threads of its own beside the one that is computing, and limiting it (torch.set_num_threads) limits MKL for all.
    """
    for copy, source in pairs:
        np.copyto(_bits(copy), _bits(source))


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.detach().view(_BITS[tensor.element_size()]).numpy()


def _is_finite(tensor: Tensor) -> bool:
    """Whether no item is NaN or infinite. One thread, no temporary of the tensor's size."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if (exponent := _EXPONENT.get(tensor.dtype)) is not None:
        bits = _bits(tensor).reshape(-1)
        parts = (bits[start : start + _CHECKED] for start in range(0, bits.size, _CHECKED))
        return not any(bool(((part & exponent) == exponent).any()) for part in parts)
    values = tensor.numpy()
    with np.errstate(invalid="ignore"):  # a NaN is what is looked for; min and max hand it on
        return bool(np.isfinite(values.min()) and np.isfinite(values.max()))
