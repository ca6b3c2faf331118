"""Arrow columns as numpy arrays: without a copy where there is nothing to change, and right for slices and nulls.

Shape letters: R rows, N elements of all rows laid end to end, D numbers of an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from treadle.data.chunk import used_names

__all__ = [
    "compute",
    "element_type",
    "encode",
    "flat_lists",
    "is_list",
    "is_number",
    "is_text",
    "is_time",
    "is_whole",
    "names_things",
    "numbers",
    "plain",
    "side_by_side",
    "texts",
    "vectors",
]

compute: Any = pyarrow.compute
"""Its functions are made while it is imported, so that type checkers do not know them."""

_TILE_ROWS = 2048


def plain(array: Any) -> Any:
    """What lies under an extension type, and lists of every kind as list, large list or fixed-size list."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if isinstance(array, pa.ExtensionArray):
        return plain(array.storage)
    if pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type):
        return _as_lists(array)
    return array


def _as_lists(views: Any) -> Any:
    """List views as lists. A cast of them by pyarrow 26 loses rows (tests/unit/data/test_sources.py)."""
    lengths_R = compute.list_value_length(views).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths_R, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), views.flatten(), mask=views.is_null())


def plain_type(type_: pa.DataType) -> pa.DataType:
    return plain_type(type_.storage_type) if isinstance(type_, pa.BaseExtensionType) else type_


def is_list(type_: pa.DataType) -> bool:
    types, type_ = pa.types, plain_type(type_)
    listed = types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
    return listed or types.is_list_view(type_) or types.is_large_list_view(type_)


def element_type(type_: pa.DataType) -> pa.DataType:
    """Of a list's elements, dictionaries opened."""
    inner = plain_type(plain_type(type_).value_type)
    return inner.value_type if pa.types.is_dictionary(inner) else inner


def is_text(type_: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(type_):
        return is_text(type_.value_type)
    return types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)


def is_whole(type_: pa.DataType) -> bool:
    """Whole numbers and booleans: names of things as good as text."""
    if pa.types.is_dictionary(type_):
        return is_whole(type_.value_type)
    return pa.types.is_integer(type_) or pa.types.is_boolean(type_)


def names_things(type_: pa.DataType) -> bool:
    """Text, and what is as good as text."""
    return is_text(type_) or is_whole(type_)


def is_number(type_: pa.DataType) -> bool:
    types = pa.types
    return types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_) or types.is_boolean(type_)


def is_time(type_: pa.DataType) -> bool:
    """Numbers, timestamps, dates, and text that may hold one."""
    return is_number(type_) or pa.types.is_timestamp(type_) or pa.types.is_date(type_) or is_text(type_)


def flat_lists(array: Any) -> tuple[NDArray[np.int64], Any]:
    """The length of each list (0 where there is none) and their elements, laid end to end, as a view.

    `.values` of a slice is of the whole array; `.flatten()` is of the slice, and leaves out what lies under nulls.
    """
    array = plain(array)
    lengths_R = compute.list_value_length(array)
    if array.null_count:
        lengths_R = lengths_R.fill_null(0)
    return lengths_R.to_numpy(zero_copy_only=False).astype(np.int64), plain(array.flatten())


def numbers(array: Any, dtype: Any = np.float32) -> NDArray[Any]:
    """Numbers of any type; null becomes NaN. A view if nothing changes."""
    array = plain(array)
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    elif pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    elif pa.types.is_null(array.type):
        array = array.cast(pa.float32())
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and complained of
        return array.to_numpy(zero_copy_only=False).astype(dtype, copy=False)


def side_by_side(columns: Sequence[Any]) -> NDArray[np.float32]:
    """Columns of N numbers as [N, D]. Copied in tiles that stay in the cache."""
    if len(columns) == 1:
        return numbers(columns[0])[:, None]
    arrays = [_unchanged(column) for column in columns]
    out_ND = np.empty((len(arrays[0]), len(arrays)), np.float32)
    with np.errstate(over="ignore"):
        for start in range(0, len(out_ND), _TILE_ROWS):
            tile = out_ND[start : start + _TILE_ROWS]
            for d, array in enumerate(arrays):
                tile[:, d] = array[start : start + _TILE_ROWS]
    return out_ND


def _unchanged(array: Any) -> NDArray[Any]:
    """Numbers in the type they have, as a view; float32 where that is not one of numpy."""
    array = plain(array)
    if (pa.types.is_floating(array.type) or pa.types.is_integer(array.type)) and not array.null_count:
        return array.to_numpy()
    return numbers(array)


def vectors(array: Any, width: int) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Lists of `width` numbers as [N, D]; NaN where there is none or one of another length; and which these are."""
    array = plain(array)
    lengths_N, flat = flat_lists(array)
    if not array.null_count and (not len(lengths_N) or (lengths_N.min() == lengths_N.max() == width)):
        return numbers(flat).reshape(-1, width), None
    there_N = array.is_valid().to_numpy(zero_copy_only=False)
    wrong_N = there_N & (lengths_N != width)
    good_N = there_N & ~wrong_N
    if wrong_N.any():
        _, flat = flat_lists(array.filter(pa.array(good_N)))
    out_ND = np.full((len(array), width), np.nan, np.float32)
    out_ND[good_N] = numbers(flat).reshape(-1, width)
    return out_ND, wrong_N if wrong_N.any() else None


def encode(array: Any) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Text or whole numbers as places among their distinct names; -1 for null."""
    array = plain(array)
    if not isinstance(array, pa.DictionaryArray):
        array = array.dictionary_encode()
    indices = array.indices.fill_null(-1) if array.indices.null_count else array.indices
    names = array.dictionary.cast(pa.string()).to_pylist()
    ids = indices.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    if None in names:
        null = names.index(None)
        ids = np.where(ids == null, -1, ids).astype(np.int32)
        names[null] = ""
    return used_names(ids, tuple(names))  # a dictionary may be larger than what is used of it


def texts(array: Any) -> pa.StringArray:
    """Text or whole numbers as text."""
    array = plain(array)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        return array.cast(pa.string())
    except pa.ArrowInvalid:  # its place in more than 2 GiB of large text: of its own it is less
        return array.take(pa.array(np.arange(len(array)))).cast(pa.string())
