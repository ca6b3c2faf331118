"""From what a request holds to rows a network can read, or a message that says where it is wrong.

Nothing is guessed or converted: a number as text, a boolean, a symbol that training never saw are
refused, because each of them would get an answer that looks like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.data import Preprocessing
from treadle.errors import RequestError, did_you_mean
from treadle.spec import ServeSpec, Signature

__all__ = ["Encoded", "Reader"]

_SHOWN = 16  # characters of an unknown symbol that a message repeats
_LISTED = 40  # known symbols that a hint lists
_SEARCHED = 256  # known symbols that are compared with an unknown one, at 20 us each
_NAMES = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """One row as `collate_inputs` takes it: symbol ids [T], or frames laid end to end [T x D]."""

    values: NDArray[Any]
    length: int


class Reader:
    """Reads the inputs of one model.

    Args:
        signature, preprocessing: the model's.
        serve: limits. A row longer than a batch may be, or than the queue, is refused too.
    """

    def __init__(self, signature: Signature, preprocessing: Preprocessing, serve: ServeSpec) -> None:
        self._max_rows = serve.max_rows
        self._max_slots = serve.max_queue_slots
        limits = [(signature.max_length, "the model's longest"), (serve.batch_slots, "serve.batch_slots")]
        limits.append((serve.max_queue_slots, "serve.max_queue_slots"))
        self.max_length, self._limit_name = min(limits, key=lambda limit: limit[0])
        # Id 0 stands for what training did not know; nobody can ask for it.
        self._symbols = {symbol: i for i, symbol in enumerate(preprocessing.symbols) if i}
        self.takes_text = bool(self._symbols) and all(len(symbol) == 1 for symbol in self._symbols)
        self._width = len(preprocessing.channels)
        self._mean = np.array(preprocessing.mean, np.float32)
        self._deviation = np.array(preprocessing.deviation, np.float32)

    @property
    def expected(self) -> str:
        """What one input is, for people."""
        if self._width:
            return f"a list of 1 to {self.max_length} time steps, each a list of {self._width} numbers"
        kinds = "a text, or a list of symbols," if self.takes_text else "a list of symbols"
        return f"{kinds} of 1 to {self.max_length} time steps"

    @property
    def example(self) -> Any:
        """An input that is accepted."""
        if self._width:
            return [[round(float(value), 3) for value in self._mean]] * min(2, self.max_length)
        letters = [symbol for symbol in self._symbols if symbol.isalnum()] or list(self._symbols)
        some = letters[: min(4, self.max_length)]
        return "".join(some) if self.takes_text else some

    def read(self, inputs: Any) -> list[Encoded]:
        """The rows of a request.

        Raises:
            RequestError: 422 for what the model cannot take, 413 for more than one request may hold.
        """
        if type(inputs) is not list:
            raise RequestError(f"inputs: got {_kind(inputs)}, expected a list; each input is {self.expected}")
        if not 1 <= len(inputs) <= self._max_rows:
            raise RequestError(f"inputs: got {len(inputs)}, expected 1 to {self._max_rows} (serve.max_rows)")
        read = self._read_frames if self._width else self._read_symbols
        rows = [read(value, f"inputs[{i}]") for i, value in enumerate(inputs)]
        if (slots := sum(row.length for row in rows)) > self._max_slots:
            raise RequestError(
                f"inputs: got {slots} time steps, expected at most {self._max_slots} (serve.max_queue_slots)",
                hint="send fewer inputs at a time",
                status=413,
            )
        return rows

    def _check_length(self, length: int, place: str) -> None:
        if not 1 <= length <= self.max_length:
            raise RequestError(
                f"{place}: got {length} time steps, expected 1 to {self.max_length} ({self._limit_name})"
            )

    def _read_symbols(self, value: Any, place: str) -> Encoded:
        if type(value) is not list and not (type(value) is str and self.takes_text):
            raise RequestError(f"{place}: got {_kind(value)}, expected {self.expected}")
        self._check_length(len(value), place)
        try:
            ids = [self._symbols[symbol] for symbol in value]
        except (KeyError, TypeError):
            raise self._unknown(value, place) from None
        return Encoded(values=np.array(ids, np.int32), length=len(ids))

    def _unknown(self, value: Sequence[Any], place: str) -> RequestError:
        step, symbol = next(
            (step, symbol)
            for step, symbol in enumerate(value)
            if type(symbol) is not str or symbol not in self._symbols
        )
        if type(symbol) is not str:
            return RequestError(f"{place}[{step}]: got {_kind(symbol)}, expected a symbol, as text")
        is_short = len(symbol) <= _SHOWN
        shown = repr(symbol) if is_short else f"{symbol[:_SHOWN]!r}..."
        near = did_you_mean(symbol, self._symbols) if is_short and len(self._symbols) <= _SEARCHED else ""
        return RequestError(
            f"{place}[{step}]: got symbol {shown}, expected one of the {len(self._symbols)} that the model knows{near}",
            hint="it knows "
            + " ".join(list(self._symbols)[:_LISTED])
            + (" ..." if len(self._symbols) > _LISTED else ""),
        )

    def _read_frames(self, value: Any, place: str) -> Encoded:
        if type(value) is not list:
            raise RequestError(f"{place}: got {_kind(value)}, expected {self.expected}")
        self._check_length(len(value), place)
        for step, frame in enumerate(value):
            if type(frame) is not list or len(frame) != self._width:
                seen = f"{len(frame)} numbers" if type(frame) is list else _kind(frame)
                raise RequestError(f"{place}[{step}]: got {seen}, expected a list of {self._width} numbers")
        if not set(map(type, chain.from_iterable(value))) <= {int, float}:
            raise self._not_numbers(value, place)
        try:
            frames_TD = np.array(value, np.float64)
        except OverflowError:  # a whole number beyond 1e308
            raise self._too_large(place) from None
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (frames_TD.astype(np.float32) - self._mean) / self._deviation
        if not np.isfinite(scaled).all():
            step, channel = (int(i) for i in np.argwhere(~np.isfinite(scaled))[0])
            raise self._too_large(f"{place}[{step}][{channel}]")
        return Encoded(values=frames_TD.astype(np.float32).reshape(-1), length=len(value))

    def _not_numbers(self, value: list[list[Any]], place: str) -> RequestError:
        step, channel, seen = next(
            (step, channel, seen)
            for step, frame in enumerate(value)
            for channel, seen in enumerate(frame)
            if type(seen) not in (int, float)
        )
        return RequestError(f"{place}[{step}][{channel}]: got {_kind(seen)}, expected a number")

    def _too_large(self, place: str) -> RequestError:
        return RequestError(f"{place}: got a number that is not finite in 32 bits, expected a finite one")


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), "something else")
