"""Which waiting rows share the next forward pass. Pure: no clock, no threads, no torch.

A batch costs rows x longest row, so its rows should be of like length; but rows must also not wait
for ever until their like turns up. Both hold when each batch is grown around the row that has
waited longest: that row always leaves, its neighbours in length fill the batch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from treadle.errors import OverloadError

__all__ = ["Batcher", "Measured"]

_LEAST_FILL = 0.8  # of a batch's slots; below it, padding costs more than a second forward pass


class Measured(Protocol):
    """Something of a length."""

    @property
    def length(self) -> int:
        """Time steps, 1 or more."""
        ...


RowT = TypeVar("RowT", bound=Measured)


class Batcher(Generic[RowT]):
    """Rows that wait, and the choice of those that go next. Calls must not overlap.

    A row that finds n older ones waiting is in one of the next n + 1 batches.

    Args:
        max_queue_slots: time steps that may wait.

    Cost: a batch of B among n waiting rows takes O(log n + B) comparisons.
    """

    def __init__(self, *, max_queue_slots: int) -> None:
        self.max_queue_slots = max_queue_slots
        self.queued_slots = 0
        self._next_ticket = 0
        self._rows: dict[int, RowT] = {}  # by ticket, oldest first
        self._by_length: list[tuple[int, int]] = []  # (length, ticket), sorted

    def __len__(self) -> int:
        return len(self._rows)

    def offer(self, rows: Sequence[RowT]) -> range:
        """Let `rows` wait, all of them or none; returns their tickets.

        Raises:
            OverloadError: more time steps would wait than may.
        """
        slots = sum(row.length for row in rows)
        if self.queued_slots + slots > self.max_queue_slots:
            raise OverloadError(
                f"queue: got {slots} time steps while {self.queued_slots} wait, "
                f"expected at most {self.max_queue_slots} together",
                hint="send it again after the time in Retry-After",
            )
        tickets = range(self._next_ticket, self._next_ticket + len(rows))
        self._next_ticket = tickets.stop
        self.queued_slots += slots
        for ticket, row in zip(tickets, rows, strict=True):
            self._rows[ticket] = row
            insort(self._by_length, (row.length, ticket))
        return tickets

    def withdraw(self, tickets: Iterable[int]) -> int:
        """Forget the rows that nobody waits for any more; returns how many still waited."""
        known = [ticket for ticket in tickets if ticket in self._rows]
        for ticket in known:
            length = self._rows.pop(ticket).length
            del self._by_length[bisect_left(self._by_length, (length, ticket))]
            self.queued_slots -= length
        return len(known)

    def take(self, budget_slots: int) -> list[RowT]:
        """The rows of the next batch, shortest first: rows x longest <= `budget_slots`.

        A row that alone is longer than the budget goes alone.
        """
        if not self._rows:
            return []
        first, last = self._window(budget_slots)
        chosen = self._by_length[first:last]
        del self._by_length[first:last]
        self.queued_slots -= sum(length for length, _ in chosen)
        return [self._rows.pop(ticket) for _, ticket in chosen]

    def _window(self, budget_slots: int) -> tuple[int, int]:
        """[first, last) in `_by_length`, grown around the oldest row, nearer lengths first."""
        oldest = next(iter(self._rows))
        length = frames = longest = self._rows[oldest].length
        first = bisect_left(self._by_length, (length, oldest))
        last = first + 1
        shorter = self._by_length[first - 1][0] if first else None
        longer = self._by_length[last][0] if last < len(self._by_length) else None
        while shorter is not None or longer is not None:
            goes_up = shorter is None or (longer is not None and longer - length <= length - shorter)
            added = longer if goes_up else shorter
            assert added is not None
            slots = (last - first + 1) * max(longest, added)
            fits = slots <= budget_slots and frames + added >= _LEAST_FILL * slots
            if fits:
                longest, frames = max(longest, added), frames + added
                first, last = (first, last + 1) if goes_up else (first - 1, last)
            # A side ends at its first row that does not fit: those beyond it are further off still.
            if goes_up:
                longer = self._by_length[last][0] if fits and last < len(self._by_length) else None
            else:
                shorter = self._by_length[first - 1][0] if fits and first else None
        return first, last
