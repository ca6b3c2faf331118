"""What training takes in memory, measured on a short chunk, and the chunk of a long row that fits a budget."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.errors import ConfigError, InfeasibleError
from treadle.nn.long import state_tensors

__all__ = ["ChunkPlan", "Footprint", "measure_footprint", "peak_bytes", "plan_chunk"]


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """How a row is cut.

    Args:
        num_frames: frames of the row.
        chunk: frames of a chunk; the last one may be shorter.
        num_chunks: how many there are.
        planned_bytes: what training the row takes.
    """

    num_frames: int
    chunk: int
    num_chunks: int
    planned_bytes: int

    def span(self, index: int) -> slice:
        """The frames of a chunk."""
        return slice(index * self.chunk, min(self.num_frames, (index + 1) * self.chunk))


def plan_chunk(
    budget_bytes: int, bytes_per_frame: float, bytes_per_state: float, num_frames: int, *, fixed_bytes: float = 0.0
) -> ChunkPlan:
    """The fewest chunks, of like length, that exact training fits in: chunk * frame + chunks * state + fixed.

    Args:
        budget_bytes: what may be used.
        bytes_per_frame: taken while a frame's chunk is trained; above 0.
        bytes_per_state: kept for each chunk.
        num_frames: of the row.
        fixed_bytes: taken whatever the length, such as by gradients.

    Raises:
        ConfigError: arguments out of range.
        InfeasibleError: not even the best number of chunks fits; the message has the bytes that would do.
    """
    if num_frames < 1 or not 0 < bytes_per_frame < math.inf or bytes_per_state < 0 or fixed_bytes < 0:
        seen = f"{num_frames} frames of {bytes_per_frame:g} bytes, states of {bytes_per_state:g}, {fixed_bytes:g} fixed"
        raise ConfigError(f"num_frames: got {seen}, expected frames, of some bytes, and nothing negative")
    chunk, least = num_frames, math.inf
    while chunk > 0:  # over the lengths that ceil(num_frames / n) can have: 2 sqrt(num_frames) of them
        num_chunks = -(-num_frames // chunk)
        chunk = -(-num_frames // num_chunks)
        needed = math.ceil(fixed_bytes + bytes_per_state * num_chunks + bytes_per_frame * chunk)
        if needed <= budget_bytes:
            return ChunkPlan(num_frames=num_frames, chunk=chunk, num_chunks=num_chunks, planned_bytes=needed)
        least = min(least, needed)
        chunk -= 1
    raise InfeasibleError(
        f"budget_bytes: got {budget_bytes:,}, expected {least:,} or more for {num_frames:,} frames of "
        f"{bytes_per_frame:,.0f} bytes, a state of {bytes_per_state:,.0f} a chunk and {fixed_bytes:,.0f} fixed",
        hint="a smaller model, fewer rows at once, or truncated gradients, which keep no states",
        needed_bytes=least,
    )


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one chunk takes.

    Args:
        bytes_per_frame: at the peak of its forward and backward pass, for each frame of all rows.
        bytes_per_state: of the state at its end, and of the generator's where random numbers are drawn.
        fixed_bytes: the rest: gradients of the leaves, twice, since a chunk's are made before they are added up.
    """

    bytes_per_frame: float
    bytes_per_state: int
    fixed_bytes: int


def measure_footprint(run: Callable[[int], tuple[Tensor | None, Any]], *, frames: int = 64) -> Footprint:
    """What training a chunk takes, from the peaks of one of `frames` frames and of one twice as long.

    Counted is what tensors take, not what an allocator makes of it. On a CPU, glibc keeps freed blocks under 32 MiB, up
    to three times a small plan (tests/bench/results/long_rows.md), unless MALLOC_MMAP_THRESHOLD_ is set: with 1048576
    a process stays within 1 % of its plan. Nor is the graph itself counted, some hundred bytes an operation: it
    outweighs small tensors where a layer loops over frames. Gradients and generators are as before afterwards.

    Args:
        run: runs a first chunk of so many frames, from a state that requires gradients where the model's does later:
            its loss, summed, or None, and the state after it.
        frames: enough for the frames to outweigh what does not grow with them, such as an attention's window.

    Raises:
        ConfigError: a chunk twice as long that takes no more.

    Cost: three such chunks, forward and backward, at about 30 µs more an operation.
    """
    generator = torch.get_rng_state()
    sizes: dict[str, int] = {}

    def trained(num_frames: int) -> None:
        loss, state = run(num_frames)
        ends = state_tensors(state)
        roots = [part for part in ([] if loss is None else [loss]) + ends if part.requires_grad]
        leaves = _leaves(roots)
        torch.autograd.grad(roots, leaves, [torch.ones_like(root) for root in roots], allow_unused=True)
        sizes["state"] = sum(_num_bytes(part) for part in ends)
        sizes["leaves"] = sum(_num_bytes(leaf) for leaf in leaves)

    trained(frames)  # a first run sets up kernels
    drawn = not torch.equal(generator, torch.get_rng_state())
    short, long = peak_bytes(lambda: trained(frames)), peak_bytes(lambda: trained(2 * frames))
    torch.set_rng_state(generator)
    if long <= short:
        raise ConfigError(
            f"run: got {long:,} bytes for {2 * frames} frames, expected more than for {frames} ({short:,})"
        )
    return Footprint(
        bytes_per_frame=(long - short) / frames,
        bytes_per_state=sizes["state"] + (generator.numel() if drawn else 0),
        fixed_bytes=max(0, 2 * short - long) + sizes["leaves"],
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made within `run()` hold at any time, each storage once."""
    with _Allocations() as allocations:
        run()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Follows storages from the operation that makes them to their end, forward and backward.

    What operations use inside their kernels is not seen; nor is what existed before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # whose argument is what torch.tensor has just made
            self._note((args, kwargs), counted=False)
        results = func(*args, **kwargs)
        self._note(results, counted=True)
        return results

    def _note(self, values: Any, *, counted: bool) -> None:
        if isinstance(values, Tensor):
            self._follow(values.untyped_storage(), counted=counted)
        elif isinstance(values, dict):
            self._note(values.values(), counted=counted)
        elif isinstance(values, Iterable) and not isinstance(values, str):
            for value in values:
                self._note(value, counted=counted)

    def _follow(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        key = storage._cdata  # noqa: SLF001
        if key in self._live:
            return
        size = storage.nbytes() if counted else 0
        self._live[key] = (size, weakref.ref(storage, lambda _: self._forget(key)))
        self._now += size
        self.peak = max(self.peak, self._now)

    def _forget(self, key: int) -> None:
        self._now -= self._live.pop(key)[0]


def _leaves(roots: list[Tensor]) -> list[Tensor]:
    """What gradients of the roots add up in."""
    waiting, seen, leaves = [torch.autograd.graph.get_gradient_edge(root).node for root in roots], set(), []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        waiting += [parent for parent, _ in node.next_functions if parent is not None]
    return leaves


def _num_bytes(part: Tensor) -> int:
    return part.numel() * part.element_size()
