"""The engine answers everyone with their own answer, sheds load, and keeps nothing of who left."""

from __future__ import annotations

import asyncio
import math
import random
import string
import threading

import pytest
from served_models import MAX_LENGTH, load

from treadle.errors import InternalError, OverloadError, RequestError
from treadle.serve.engine import Engine
from treadle.serve.predictor import Output, Predictor
from treadle.testing import MemoryBlobs


class Held:
    """A model whose batches wait until they are let go, and that fails on rows of some lengths."""

    def __init__(self, predictor: Predictor, *, fails_at: frozenset[int] = frozenset()) -> None:
        self.predictor = predictor
        self.fails_at = fails_at
        self.gate = threading.Event()
        self.running = threading.Event()
        self.batches: list[list[int]] = []

    def predict(self, rows):
        self.running.set()
        self.gate.wait(20)
        self.batches.append([row.length for row in rows])
        if self.fails_at & {row.length for row in rows}:
            raise FloatingPointError("planted")
        return self.predictor.predict(rows)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return load(MemoryBlobs(), "g2p", batch_slots=64, max_queue_slots=100)


@pytest.fixture
def held(predictor):
    model = Held(predictor)
    engine = Engine(predictor, model=model)
    yield engine, model
    model.gate.set()
    engine.close()


def words(lengths, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(string.ascii_lowercase, k=n)) for n in lengths]


async def first_running(engine, model, inputs):
    """A request whose batch is on the model now."""
    task = asyncio.create_task(engine.answer(inputs))
    await asyncio.to_thread(model.running.wait, 10)
    return task


def test_rows_gather_while_the_model_runs(held):
    engine, model = held

    async def scenario():
        first = await first_running(engine, model, ["abc"])
        others = [asyncio.create_task(engine.answer([word])) for word in words([8, 8, 8, 1])]
        while engine.stats()["waiting_rows"] < 4:
            await asyncio.sleep(0.001)
        model.gate.set()
        return await asyncio.gather(first, *others)

    assert len(asyncio.run(scenario())) == 5
    assert model.batches == [[3], [8, 8, 8], [1]]
    stats = engine.stats()
    assert (stats["requests"], stats["rows"], stats["batches"]) == (5, 5, 3)
    assert (stats["frames"], stats["slots"], stats["fill"]) == (28, 28, 1.0)


def test_one_request_may_span_batches(held, predictor):
    engine, model = held
    model.gate.set()
    inputs = words([1, 20, 2, 21, 1, 22])
    outputs = asyncio.run(engine.answer(inputs))
    expected = [predictor.predict(predictor.validate([word]))[0] for word in inputs]
    assert [output.labels for output in outputs] == [output.labels for output in expected]
    assert len(model.batches) > 1


def test_too_much_waiting_is_refused_and_says_when_to_come_back(held):
    engine, model = held

    async def scenario():
        first = await first_running(engine, model, words([MAX_LENGTH]))
        second = asyncio.create_task(engine.answer(words([MAX_LENGTH] * 4)))
        while not engine.stats()["waiting_rows"]:
            await asyncio.sleep(0.001)
        with pytest.raises(OverloadError) as caught:
            await engine.answer(words([5]))
        assert caught.value.context["retry_after_s"] >= 1
        assert engine.stats()["waiting_slots"] == 4 * MAX_LENGTH
        model.gate.set()
        await asyncio.gather(first, second)
        assert len(await engine.answer(words([5]))) == 1

    asyncio.run(scenario())


def test_a_cancelled_request_leaves_nothing_behind(held):
    engine, model = held

    async def scenario():
        first = await first_running(engine, model, words([3]))
        waiting = asyncio.create_task(engine.answer(words([4, 5, 6])))
        while engine.stats()["waiting_rows"] < 3:
            await asyncio.sleep(0.001)
        waiting.cancel()
        first.cancel()
        await asyncio.gather(waiting, first, return_exceptions=True)
        assert engine.stats()["waiting_rows"] == engine.stats()["waiting_slots"] == 0
        model.gate.set()
        assert len(await engine.answer(words([7]))) == 1

    asyncio.run(scenario())
    assert model.batches == [[3], [7]]


def test_a_row_that_breaks_the_model_does_not_take_its_neighbours_along(predictor, caplog):
    model = Held(predictor, fails_at=frozenset({8}))
    engine = Engine(predictor, model=model)

    async def scenario():
        first = await first_running(engine, model, ["abc"])
        bad = asyncio.create_task(engine.answer(words([8, 7])))
        good = asyncio.create_task(engine.answer(words([7, 7])))
        while engine.stats()["waiting_rows"] < 4:
            await asyncio.sleep(0.001)
        model.gate.set()
        return await asyncio.gather(first, bad, good, return_exceptions=True)

    try:
        first, bad, good = asyncio.run(scenario())
    finally:
        engine.close()
    assert len(first) == 1
    assert len(good) == 2
    assert isinstance(bad, InternalError)
    assert "planted" not in str(bad), "what went wrong inside is for the log"
    assert "planted" in caplog.text
    assert [7, 7, 7, 8] in model.batches


class Lost:
    """A network in which rows of three time steps overflow."""

    def predict(self, rows):
        return [Output(labels=("A",), confidence=math.nan if row.length == 3 else 0.5) for row in rows]


def test_overflow_inside_the_network_is_the_senders_error(predictor):
    engine = Engine(predictor, model=Lost())
    try:
        with pytest.raises(RequestError, match=r"inputs\[1\]: got numbers in which the network overflows"):
            asyncio.run(engine.answer(["a", "abc"]))
        assert len(asyncio.run(engine.answer(["a"]))) == 1
    finally:
        engine.close()


def test_closing_answers_what_waits_and_refuses_what_comes(predictor):
    model = Held(predictor)
    engine = Engine(predictor, model=model)

    async def scenario():
        first = await first_running(engine, model, words([3]))
        waiting = asyncio.create_task(engine.answer(words([4])))
        while not engine.stats()["waiting_rows"]:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        while engine.is_alive:
            await asyncio.sleep(0.001)
        with pytest.raises(OverloadError):
            await engine.answer(words([5]))
        model.gate.set()
        await closing
        return await asyncio.gather(first, waiting)

    assert [len(answer) for answer in asyncio.run(scenario())] == [1, 1]
    assert not engine._thread.is_alive()
    engine.close()


def test_several_event_loops_share_an_engine(predictor):
    engine = Engine(predictor)
    inputs = words(range(1, 9))
    expected = [predictor.predict(predictor.validate([word]))[0].labels for word in inputs]
    found: dict[int, list] = {}

    def client(number):
        async def ask():
            return [(await engine.answer([word]))[0].labels for word in inputs]

        found[number] = asyncio.run(ask())

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    engine.close()
    assert list(found.values()) == [expected] * 4
