"""Messages over real sockets, and what comes of those that are torn, strange or endless."""

from __future__ import annotations

import json
import select
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.launch.lines import Lines


@pytest.fixture
def ends():
    """A raw socket and the lines at its other end."""
    raw, other = socket.socketpair()
    lines = Lines(other)
    yield raw, lines
    raw.close()
    lines.close()


def test_what_is_sent_comes_out_in_order():
    first, second = Lines.pair()
    assert first.send("a", number=1, text="ü\n\u2028", nothing=None, many=[1.5, float("inf")])
    assert first.send("b")
    got = []
    while len(got) < 2:
        got += second.receive()
    assert got == [
        {"kind": "a", "number": 1, "text": "ü\n\u2028", "nothing": None, "many": [1.5, float("inf")]},
        {"kind": "b"},
    ]
    first.close()
    assert second.receive() == []
    assert not second.is_open
    assert not second.send("c")
    second.close()
    assert not second.send("c")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    facts=st.lists(st.dictionaries(st.sampled_from(["x", "y", "zoo"]), json_values), max_size=5),
    cuts=st.lists(st.integers(1, 40), min_size=1),
)
def test_however_the_bytes_are_torn_the_messages_are_whole(facts, cuts):
    raw, other = socket.socketpair()
    lines = Lines(other)
    data = b"".join(json.dumps({"kind": "m", **fact}).encode() + b"\n" for fact in facts)
    got, place, number = [], 0, 0
    while place < len(data):
        step = cuts[number % len(cuts)]
        raw.sendall(data[place : place + step])
        got += lines.receive()
        place, number = place + step, number + 1
    raw.close()
    lines.close()
    assert got == [{"kind": "m", **fact} for fact in facts]


@pytest.mark.parametrize(
    "garbage",
    [
        b"not json\n",
        b"\xff\xfe\x00\n",
        b"[1, 2]\n",
        b'{"no": "kind"}\n',
        b'{"kind": 3}\n',
        b"\n\n\n",
        b"1" * 5000 + b"\n",
        b"[" * 20_000 + b"\n",
        b'{"kind":"torn",\n',
    ],
    ids=lambda data: repr(data[:16]),
)
def test_garbage_is_left_out(ends, garbage):
    raw, lines = ends
    raw.sendall(garbage + b'{"kind":"good"}\n')
    got = []
    while not got:
        got = lines.receive()
    assert got == [{"kind": "good"}]
    assert lines.is_open


def test_a_torn_message_of_a_closed_end_is_dropped(ends):
    raw, lines = ends
    raw.sendall(b'{"kind":"whole"}\n{"kind":"to')
    raw.close()
    assert lines.receive() == [{"kind": "whole"}]
    assert lines.receive() == []
    assert not lines.is_open


def test_a_reset_counts_as_closed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        raw = socket.create_connection(server.getsockname())
        lines = Lines(server.accept()[0])
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    assert lines.receive() == []
    assert not lines.is_open
    lines.close()


def test_a_stranger_cannot_make_it_keep_much():
    raw, other = socket.socketpair()
    lines = Lines(other, most_bytes=100_000)
    sender = threading.Thread(target=lambda: [raw.send(b"x" * 50_000) for _ in range(3)])
    sender.start()
    while lines.is_open:
        assert lines.receive() == []
    lines.close()
    raw.close()
    sender.join()


def test_a_trusted_message_may_be_large_and_takes_time_in_proportion():
    first, other = socket.socketpair()
    sender, lines = Lines(first), Lines(other, most_bytes=1000)
    lines.trust()

    def seconds(size):
        started = time.perf_counter()
        thread = threading.Thread(target=sender.send, args=("big",), kwargs={"text": "x" * size})
        thread.start()
        got = []
        while not got:
            got = lines.receive()
        thread.join()
        assert len(got[0]["text"]) == size
        return time.perf_counter() - started

    seconds(1 << 20)
    small, large = (min(seconds(size) for _ in range(3)) for size in (2 << 20, 16 << 20))
    assert large < 40 * small  # 8 times the bytes: 8 times the time, and not 64 times
    sender.close()
    lines.close()


def test_two_threads_do_not_tear_small_messages():
    first, second = Lines.pair()
    threads = [threading.Thread(target=lambda n=n: [first.send("m", of=n) for _ in range(500)]) for n in range(2)]
    for thread in threads:
        thread.start()
    got = []
    while len(got) < 1000:
        assert select.select([second], [], [], 10)[0]
        got += second.receive()
    for thread in threads:
        thread.join()
    assert sorted(message["of"] for message in got) == [0] * 500 + [1] * 500
    first.close()
    second.close()


def test_a_connection_over_a_network_is_watched_by_the_kernel():
    with socket.create_server(("127.0.0.1", 0)) as server:
        lines = Lines(socket.create_connection(server.getsockname()))
        other = server.accept()[0]
    with socket.socket(fileno=socket.dup(lines.fileno())) as same:
        assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
            idle, every, times = (
                same.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + every * times <= 20
    lines.close()
    other.close()
