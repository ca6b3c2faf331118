"""Times of a column, counted exactly: of today's, float64 keeps 0.3 us as days, and 256 ns as nanoseconds since 1970.

Numbers are times as they are; dates, timestamps and text that holds one are days since 1970-01-01 UTC, a time without
a zone taken as UTC.

Shape letters: N times of all rows laid end to end, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle.data.sources.arrays import compute, element_type, is_list, is_text, plain, texts
from treadle.errors import DataError
from treadle.spec import ColumnsSpec

__all__ = ["Clock", "clock_of", "clocks_of"]

_DAY = {"us": 86_400 * 10**6, "ns": 86_400 * 10**9}
_ZONES = (None, "UTC")
_Wrong = NDArray[np.bool_] | None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What the times of a column are counted in. Picklable.

    Args:
        type: microseconds or nanoseconds since 1970 UTC, int64, decimals, or float64, which alone is not exact.
    """

    type: pa.DataType

    @property
    def is_calendar(self) -> bool:
        return pa.types.is_timestamp(self.type)

    @property
    def ticks(self) -> int:
        """Counts in a day, of a calendar; else in 1."""
        if self.is_calendar:
            return _DAY[self.type.unit]
        return 10**self.type.scale if pa.types.is_decimal(self.type) else 1

    def count(self, array: Any, place: str, first: str) -> tuple[Any, _Wrong]:
        """Times as int64 or float64, null where there is none, and which text is no time.

        Args:
            place: the column, for messages. first: the file that the clock was taken from.

        Raises:
            DataError: times of another kind, or that this clock cannot hold.
        """
        array, wrong = plain(array), None
        self.check(array.type, place, first)
        try:
            if is_text(array.type):
                array, wrong = _parsed(texts(array))
            return self._counted(array), wrong
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{place}: got {array.type} that {self.type} cannot hold ({error}), expected times as in {first}",
                hint="write all files with one schema",
            ) from None

    def check(self, type_: pa.DataType, place: str, first: str) -> None:
        """Nothing, if such times are of the same kind.

        Raises:
            DataError: numbers beside a calendar, whose unit nobody knows.
        """
        if clock_of(type_).is_calendar is not self.is_calendar:
            rule = "dates or timestamps" if self.is_calendar else "numbers"
            raise DataError(
                f"{place}: got {type_}, expected {rule}, as in {first}", hint="write all files with one schema"
            )

    def times(self, counts: Any) -> NDArray[np.float64]:
        """Counts in days or in 1, NaN for null: equal times of two units stay equal, and -0.0 is 0.0."""
        if pa.types.is_floating(counts.type):
            return counts.fill_null(np.nan).to_numpy(zero_copy_only=False) + 0.0
        counted_N = counts.fill_null(0).to_numpy(zero_copy_only=False)
        if self.ticks == 1:
            times_N = counted_N.astype(np.float64)
        else:
            rest_N = np.fmod(counted_N, self.ticks)
            times_N = (counted_N - rest_N) // self.ticks + rest_N / self.ticks
        if counts.null_count:
            times_N[counts.is_null().to_numpy(zero_copy_only=False)] = np.nan
        return times_N

    def gaps(self, counts: Any, starts_R: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Time since the frame before, 0 at the starts of rows, of counts that do not fall; None if they are floats."""
        if pa.types.is_floating(counts.type):
            return None
        counted_N = counts.fill_null(0).to_numpy(zero_copy_only=False)
        gaps_N = np.diff(counted_N, prepend=counted_N[:1]).view(np.uint64)  # int64 may not hold one
        gaps_N[starts_R[starts_R < len(gaps_N)]] = 0
        return (gaps_N / self.ticks).astype(np.float32)

    def _counted(self, array: Any) -> Any:
        types = pa.types
        if self.is_calendar:
            zone = array.type.tz if types.is_timestamp(array.type) else None
            return array.cast(pa.timestamp(self.type.unit, zone)).cast(pa.int64())
        if types.is_floating(array.type) and not types.is_floating(self.type):
            if types.is_decimal(self.type):
                raise pa.ArrowInvalid("it may round them")
            array = compute.if_else(compute.is_nan(array), None, array)
        array = array.cast(self.type)
        return _unscaled(array) if types.is_decimal(self.type) else array


def clock_of(type_: pa.DataType) -> Clock:
    """The clock that holds all times of a type, and those of coarser ones."""
    types = pa.types
    if types.is_timestamp(type_) or types.is_date(type_) or is_text(type_):
        is_fine = types.is_timestamp(type_) and type_.unit == "ns"
        return Clock(type=pa.timestamp("ns" if is_fine else "us"))
    if types.is_decimal(type_):
        return Clock(type=pa.decimal128(38, max(0, type_.scale)))
    return Clock(type=pa.float64() if types.is_floating(type_) else pa.int64())


def clocks_of(spec: ColumnsSpec, schema: pa.Schema) -> Mapping[str, Clock]:
    """The clocks of `times` and `time`, where there are such columns."""
    columns = {key: schema.field(name).type for key in ("times", "time") if (name := getattr(spec, key))}
    return {key: clock_of(element_type(type_) if is_list(type_) else type_) for key, type_ in columns.items()}


def _unscaled(array: Any) -> Any:
    """Decimals as whole numbers of their last digit."""
    low_high = np.frombuffer(array.buffers()[1] or b"", "<i8").reshape(-1, 2)[array.offset : array.offset + len(array)]
    null_N = array.is_null().to_numpy(zero_copy_only=False)
    low, high = low_high[:, 0], low_high[:, 1]
    if ((high != low >> 63) & ~null_N).any():
        raise pa.ArrowInvalid("more than 18 digits")
    return pa.array(low, mask=null_N)


def _parsed(array: pa.StringArray) -> tuple[Any, _Wrong]:
    for zone in _ZONES:
        try:
            return array.cast(pa.timestamp("us", zone)), None
        except pa.ArrowInvalid:
            continue
    found = pa.array([_time_of(text) for text in array], pa.int64())
    wrong = (found.is_null().to_numpy(zero_copy_only=False)) & array.is_valid().to_numpy(zero_copy_only=False)
    return found.cast(pa.timestamp("us")), wrong if wrong.any() else None


def _time_of(text: Any) -> int | None:
    for zone in _ZONES:
        try:
            return text.cast(pa.timestamp("us", zone)).value
        except pa.ArrowInvalid:
            continue
    return None
