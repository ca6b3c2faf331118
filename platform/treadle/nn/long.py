"""Training on rows of any length in memory that was planned: a row goes through the model in chunks of frames.

Shape letters: B rows, T time steps, D features.

`train_in_chunks` gives the gradients of the whole row from two passes, keeping one chunk's activations and the state
at every chunk's start, or truncated gradients from one pass. `checkpointed` does the like for one layer inside an
ordinary graph. Which chunk fits, `treadle.nn.footprint` says beforehand.

A state is a tensor, None, or dicts, tuples and lists of states. Whatever a loss needs of earlier chunks belongs in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from treadle.errors import ConfigError

__all__ = ["ChunkRun", "TrainedRow", "checkpointed", "state_tensors", "train_in_chunks"]

ChunkRun = Callable[[int, Any], tuple[Tensor | None, Any]]
"""Runs one chunk: (index, state before it) -> (its loss, summed, or None where it has none; state after it).

It fetches its own frames, so that a row may stay on disk. It is called twice for most chunks and must do the same
both times: it may draw from torch's generators, which are set back for it, but change nothing it is given.
"""


@dataclass(frozen=True, kw_only=True)
class TrainedRow:
    """What `train_in_chunks` gives beside the gradients.

    Args:
        loss_sum: of all chunks, detached.
        state: after the last chunk, detached.
    """

    loss_sum: Tensor
    state: Any


def train_in_chunks(
    run: ChunkRun, num_chunks: int, state: Any = None, *, exact: bool = True, overlap: int = 0
) -> TrainedRow:
    """Add the gradients of a long row to the `grad` of every leaf, chunk by chunk.

    Exact: a first pass without gradients keeps the state at the start of every chunk; a second one, from the last
    chunk to the first, runs each chunk again and goes back through it from its loss and from the gradient of the
    state it handed on. Truncated: one pass; no gradient goes back further than `overlap` chunks before its loss.

    Where ranks sum gradients in hooks, those must rest until all chunks are done (DDP: `no_sync`).

    Args:
        run: runs one chunk; put autocast inside it. Losses are added up, so divide each by what the whole is
            divided by.
        num_chunks: 1 or more.
        state: before the first chunk. Where its tensors require gradients, these get theirs too.
        exact: gradients of the whole row, else truncated ones.
        overlap: chunks run again before each chunk so that its loss reaches further back; truncated only.

    Returns:
        The sum of the losses and the state at the end.

    Raises:
        ConfigError: no chunk, an overlap for exact gradients, a loss that is not one number, or no gradient at all.

    Cost: exact, one more forward pass than the whole row, less the last chunk; truncated, 1 + overlap forward
    passes. Memory: one chunk's activations (truncated: 1 + overlap chunks'), and, exact, the state, and where the
    model draws random numbers the generator's (5 kB), of every chunk.

    Accuracy: equal to the whole row's gradients but for the order of additions
    (test_long.py::test_exact_chunks_equal_the_whole).
    """
    if num_chunks < 1 or overlap < 0 or (exact and overlap):
        seen = f"{num_chunks} chunks with an overlap of {overlap}" + (" and exact" if exact else "")
        raise ConfigError(f"num_chunks: got {seen}, expected 1 or more, and an overlap of 0 or more, 0 for exact")
    first = _mapped(lambda part: part.detach().requires_grad_(part.requires_grad), state)
    with torch.enable_grad():
        trained = _exact(run, num_chunks, first) if exact else _truncated(run, num_chunks, first, overlap)
    given = [(whole, leaf.grad) for whole, leaf in zip(state_tensors(state), state_tensors(first), strict=True)]
    _go_back([(whole, grad) for whole, grad in given if grad is not None])
    return trained


def _exact(run: ChunkRun, num_chunks: int, first: Any) -> TrainedRow:
    befores, generators, state = [first], [_generator_states(None)], first
    with torch.no_grad():
        for index in range(num_chunks - 1):
            _, state = run(index, state)
            state = _mapped(_kept, state)
            befores.append(_mapped(_leaf, state))
            generators.append(_generator_states(generators[-1]))
    total = _Total()
    grads = None
    end, generator_after = None, generators[-1]
    for index in reversed(range(num_chunks)):
        before = befores.pop()
        _set_generators(generators.pop())
        after = _run_and_go_back(run, index, before, grads, total)
        if index == num_chunks - 1:
            end, generator_after = after, _generator_states(None)
        grads = [leaf.grad for leaf in state_tensors(before)]
    _set_generators(generator_after)
    return total.outcome(end)


def _run_and_go_back(run: ChunkRun, index: int, before: Any, grads: list[Tensor | None] | None, total: _Total) -> Any:
    """One chunk and its backward pass; gives the state after it. No graph outlives the call."""
    loss, after = run(index, before)
    roots = total.add(loss)
    if grads is not None:
        ends = state_tensors(after)
        if len(grads) != len(ends):
            raise ConfigError(f"run: got a state of {len(ends)} tensors after chunk {index}, expected {len(grads)}")
        roots += [(end, grad) for end, grad in zip(ends, grads, strict=True) if grad is not None]
    total.reached |= _go_back(roots)
    return _mapped(_kept, after)


def _truncated(run: ChunkRun, num_chunks: int, first: Any, overlap: int) -> TrainedRow:
    past: deque[tuple[Any, list[Tensor]]] = deque(maxlen=overlap + 1)
    state, total = first, _Total()
    for index in range(num_chunks):
        past.append((state, _generator_states(past[-1][1] if past else None)))
        loss, after = None, past[0][0]
        for place, (_, generators) in enumerate(past, index + 1 - len(past)):
            _set_generators(generators)
            loss, after = run(place, after)
        total.reached |= _go_back(total.add(loss))
        state = _mapped(_kept, after)
        del loss, after  # the graph, before the next chunk builds its own
    return total.outcome(state)


class _Total:
    """The sum of the losses so far, and whether any of them had a way back."""

    def __init__(self) -> None:
        self.reached = False
        self._loss: Tensor | None = None

    def add(self, loss: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """The root of the backward pass that the loss is, if there is one."""
        if loss is None:
            return []
        if loss.numel() != 1:
            raise ConfigError(f"run: got a loss of shape {tuple(loss.shape)}, expected its sum, one number")
        value = loss.detach().reshape(())
        self._loss = value.clone() if self._loss is None else self._loss.add_(value)
        return [(loss, None)]

    def outcome(self, state: Any) -> TrainedRow:
        if self._loss is None or not self.reached:
            seen = "no loss from any chunk" if self._loss is None else "losses that nothing to be learned has part in"
            raise ConfigError(f"run: got {seen}, expected a gradient")
        return TrainedRow(loss_sum=self._loss, state=state)


def _go_back(roots: list[tuple[Tensor, Tensor | None]]) -> bool:
    """Backward from the roots that have a way back; whether there was one."""
    roots = [(root, grad) for root, grad in roots if root.requires_grad]
    if roots:
        torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
    return bool(roots)


def _mapped(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The state with `function` of each tensor."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: _mapped(function, part) for name, part in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_make"):  # a named tuple
        return state._make(_mapped(function, part) for part in state)  # type: ignore[attr-defined]
    if isinstance(state, tuple | list):
        return type(state)(_mapped(function, part) for part in state)
    if state is None:
        return None
    raise ConfigError(
        f"state: got a {type(state).__name__}, expected tensors, None, and dicts, tuples and lists of them"
    )


def state_tensors(state: Any) -> list[Tensor]:
    """The tensors of a state, always in the same order."""
    found: list[Tensor] = []

    def note(part: Tensor) -> Tensor:
        found.append(part)
        return part

    _mapped(note, state)
    return found


def _kept(part: Tensor) -> Tensor:
    """`part` without its graph, and without the larger tensor that it may be a view of."""
    part = part.detach()
    return part.clone() if part.untyped_storage().nbytes() > part.numel() * part.element_size() else part


def _leaf(part: Tensor) -> Tensor:
    return part.detach().requires_grad_(part.is_floating_point() or part.is_complex())


def _generator_states(previous: list[Tensor] | None) -> list[Tensor]:
    """Where torch's generators stand; the very list that was given where they have not moved since."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    same = previous is not None and all(torch.equal(*pair) for pair in zip(previous, states, strict=False))
    return previous if same and previous is not None and len(previous) == len(states) else states


def _set_generators(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def checkpointed(
    layer: Callable[[Tensor, Any], tuple[Tensor, Any]], x_BTD: Tensor, state: Any = None, *, chunk: int
) -> tuple[Tensor, Any]:
    """What `layer(x_BTD, state)` gives, keeping of each chunk only its input and state for the backward pass.

    Args:
        layer: a layer over padded rows that carries a state, such as a `RecurrentStack` in one direction.
        x_BTD: rows without padding.
        state: before the first frame.
        chunk: time steps that are run, and in the backward pass run again, at once.

    Cost: one more forward pass. Saved: x, the output and T / chunk states.
    """
    if chunk < 1:
        raise ConfigError(f"chunk: got {chunk}, expected 1 or more time steps")
    outputs: list[Tensor] = []
    for piece_BTD in x_BTD.split(chunk, dim=1):
        y_BTD, state = checkpoint(layer, piece_BTD, state, use_reentrant=False)
        outputs.append(y_BTD)
    return torch.cat(outputs, dim=1), state
