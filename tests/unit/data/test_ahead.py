"""Work done ahead by a thread that never stays behind."""

from __future__ import annotations

import itertools
import threading

import pytest

from treadle.data.load.ahead import ahead


def loaders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "treadle-loader"]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_no_thread_stays_however_many_items_are_taken(taken: int) -> None:
    items = ahead(lambda: iter(range(5)))
    assert list(itertools.islice(items, taken)) == list(range(taken))
    items.close()  # type: ignore[attr-defined]
    assert not loaders()


def test_it_is_at_most_so_many_items_ahead() -> None:
    made = []

    def counted():
        for i in range(100):
            made.append(i)
            yield i

    items = ahead(counted, depth=2)
    assert [next(items) for _ in range(10)] == list(range(10))
    threading.Event().wait(0.05)
    assert len(made) <= 10 + 2 + 1
    assert list(items) == list(range(10, 100))
    assert not loaders()


def test_an_error_is_raised_where_the_item_was_wanted() -> None:
    def broken():
        yield 1
        raise KeyError("lost")

    items = ahead(broken)
    assert next(items) == 1
    with pytest.raises(KeyError, match="lost"):
        next(items)
    assert not loaders()
