"""Rows that `append` took are read back: after a kill, a torn line, a failing store."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError
from treadle.store.blobs import Blobs
from treadle.store.journal import Journal, follow, read_journal
from treadle.store.local import LocalBlobs
from treadle.testing import FaultBlobs, MemoryBlobs

KEY = "runs/toy/metrics.jsonl"

UNTIMED = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(params=["memory", "local"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return MemoryBlobs() if request.param == "memory" else LocalBlobs(tmp_path / "store")


def rows(first: int, last: int, **more: object) -> list[dict[str, object]]:
    return [{"update": n, **more} for n in range(first, last + 1)]


def write(blobs: Blobs, writer: str, new: list[dict[str, object]]) -> None:
    with Journal(blobs, KEY, writer=writer) as journal:
        for row in new:
            journal.append(row)


def test_rows_come_back_in_order(blobs: Blobs) -> None:
    assert read_journal(blobs, KEY) == []
    write(blobs, "a1", rows(1, 5, text="zwölf\n\u2028 ☃"))
    assert read_journal(blobs, KEY) == rows(1, 5, text="zwölf\n\u2028 ☃")


def test_a_second_writer_of_the_same_name_continues(blobs: Blobs) -> None:
    for _ in range(3):
        write(blobs, "a1", [{"text": "start"}])  # equal bytes: still three rows
    assert read_journal(blobs, KEY) == [{"text": "start"}] * 3


def test_flush_makes_rows_visible_to_others(blobs: Blobs) -> None:
    with Journal(blobs, KEY, writer="a1", interval_s=60) as journal:
        journal.append({"update": 1})
        assert journal.flush(10)
        assert journal.num_unsaved == 0
        assert read_journal(blobs, KEY) == rows(1, 1)
        journal.append({"update": 2})
        assert journal.flush(10)
        assert read_journal(blobs, KEY) == rows(1, 2)


def test_a_local_row_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    with Journal(blobs, KEY, writer="a1") as journal:
        for n in range(1, 4):
            journal.append({"update": n})
            assert (blobs.local_path(KEY)).read_bytes().splitlines()[-1] == b'{"update":%d}' % n


def test_rows_gather_in_shards_about_one_an_interval() -> None:
    store = MemoryBlobs()
    with Journal(store, KEY, writer="a1", interval_s=60) as journal:
        for row in rows(1, 500):
            journal.append(row)
        assert journal.flush(10)
        for row in rows(501, 900):
            journal.append(row)
    assert store.children(KEY) == ["a1-000001", "a1-000002"]
    assert read_journal(store, KEY) == rows(1, 900)


def test_the_thread_uploads_without_being_asked() -> None:
    store = MemoryBlobs()
    with Journal(store, KEY, writer="a1", interval_s=0.01) as journal:
        journal.append({"update": 1})
        reader, polled = follow(store, KEY), threading.Event()
        for _ in range(500):
            if reader.poll() == rows(1, 1):
                break
            polled.wait(0.01)
        else:
            pytest.fail("nothing arrived in 5 s")


def test_non_finite_numbers_are_spelled_and_marked(blobs: Blobs) -> None:
    write(blobs, "a1", [{"metrics": {"loss": math.nan, "lr": 0.1}, "list": [math.inf, -math.inf]}, {"loss": 1.0}])
    first, second = read_journal(blobs, KEY)
    assert first == {"metrics": {"loss": "NaN", "lr": 0.1}, "list": ["Infinity", "-Infinity"], "nonfinite": True}
    assert math.isnan(float(first["metrics"]["loss"]))
    assert "nonfinite" not in second


def test_output_that_is_no_utf8_survives(blobs: Blobs) -> None:
    text = b"caf\xe9 ok".decode("utf-8", "surrogateescape")
    write(blobs, "driver", [{"time": 1.5, "who": "driver", "text": text}])
    assert read_journal(blobs, KEY)[0]["text"] == text


def test_what_is_not_json_is_the_callers_error_and_costs_no_other_row(blobs: Blobs) -> None:
    with Journal(blobs, KEY, writer="a1") as journal:
        journal.append({"update": 1})
        with pytest.raises(TypeError):
            journal.append({"update": object()})
        journal.append({"update": 2})
    with pytest.raises(ValueError, match="closed"):
        journal.append({"update": 3})
    assert read_journal(blobs, KEY) == rows(1, 2)


@pytest.mark.parametrize("writer", ["", "a/b", "..", "A", "x_y"])
def test_a_writer_has_a_plain_name(writer: str) -> None:
    with pytest.raises(ConfigError):
        Journal(MemoryBlobs(), KEY, writer=writer)


@UNTIMED
@given(cut=st.integers(1, 60))
def test_a_torn_tail_costs_its_own_row_only(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    blobs = LocalBlobs(tmp_path_factory.mktemp("torn"))
    write(blobs, "a1", rows(1, 3, pad="x" * 80))
    path = blobs.local_path(KEY)
    path.write_bytes(path.read_bytes()[: -cut - 1])  # without the newline and `cut` bytes before it
    assert read_journal(blobs, KEY) == rows(1, 2, pad="x" * 80)
    write(blobs, "a2", rows(4, 5))
    assert read_journal(blobs, KEY) == rows(1, 2, pad="x" * 80) + rows(4, 5)


def test_follow_gives_each_row_once(blobs: Blobs) -> None:
    reader = follow(blobs, KEY)
    assert reader.poll() == []
    write(blobs, "a1", rows(1, 3))
    assert reader.poll() == rows(1, 3)
    assert reader.poll() == []
    write(blobs, "a2", rows(4, 4))
    assert reader.poll() == rows(4, 4)
    assert follow(blobs, KEY).poll() == rows(1, 4)


def test_follow_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    write(blobs, "a1", rows(1, 1))
    reader, path = follow(blobs, KEY), blobs.local_path(KEY)
    with path.open("ab") as file:
        file.write(b'{"update":2}')
    assert reader.poll() == rows(1, 1)
    assert reader.poll() == []
    with path.open("ab") as file:
        file.write(b"\n")
    assert reader.poll() == rows(2, 2)


def test_writers_do_not_mix_their_lines(blobs: Blobs) -> None:
    def work(writer: str) -> None:
        write(blobs, writer, rows(1, 200, who=writer, pad="y" * 200))

    threads = [threading.Thread(target=work, args=(f"rank{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_journal(blobs, KEY)
    assert len(found) == 8 * 200
    for n in range(8):
        assert [row["update"] for row in found if row["who"] == f"rank{n}"] == list(range(1, 201))


def test_threads_may_share_a_journal(blobs: Blobs) -> None:
    with Journal(blobs, KEY, writer="a1") as journal:

        def work(who: int) -> None:
            for n in range(100):
                journal.append({"who": who, "n": n})

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = read_journal(blobs, KEY)
    assert len(found) == 800
    assert all([row["n"] for row in found if row["who"] == who] == list(range(100)) for who in range(8))


def test_a_failing_store_delays_rows_and_loses_none() -> None:
    store = MemoryBlobs()
    faulty = FaultBlobs(store, refuse=2)
    with Journal(faulty, KEY, writer="a1", interval_s=0.001) as journal:
        for row in rows(1, 50):
            journal.append(row)
        assert not journal.flush(0.01)
        assert journal.num_unsaved > 0
        assert "refused write" in journal.last_error
    assert read_journal(store, KEY) == rows(1, 50)
    assert (journal.num_unsaved, journal.last_error) == (0, "")


def test_a_lost_reply_does_not_repeat_a_shard() -> None:
    store = MemoryBlobs()
    write(FaultBlobs(store, lose_reply=1), "a1", rows(1, 5))
    assert read_journal(store, KEY) == rows(1, 5)


def test_a_store_that_never_answers_is_reported_at_the_end() -> None:
    journal = Journal(FaultBlobs(MemoryBlobs(), refuse=10**9), KEY, writer="a1", interval_s=0.001)
    journal.append({"update": 1})
    assert not journal.close(0.05)
    assert journal.num_unsaved == 1


def test_a_full_disk_delays_rows_and_loses_none(tmp_path: Path) -> None:
    """The file may not grow beyond a limit (as on a full disk), then the limit is lifted."""
    code = f"""
import resource, signal
from pathlib import Path
from treadle.store.journal import Journal
from treadle.store.local import LocalBlobs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
blobs = LocalBlobs(Path({str(tmp_path)!r}))
journal = Journal(blobs, {KEY!r}, writer="a1")
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
for n in range(1, 201):
    journal.append({{"update": n}})
assert journal.num_unsaved > 50 and "large" in journal.last_error, journal.last_error
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert journal.close() and journal.num_unsaved == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert read_journal(LocalBlobs(tmp_path), KEY) == rows(1, 200)


KILLED = """
import sys
from pathlib import Path
from treadle.store.journal import Journal
from treadle.store.local import LocalBlobs
journal = Journal(LocalBlobs(Path(sys.argv[1])), sys.argv[2], writer="a1")
n = 0
while True:
    n += 1
    journal.append({"update": n, "pad": "z" * 100})
    sys.stdout.write(f"{n}\\n")
    sys.stdout.flush()
"""


def test_kill_9_loses_no_appended_row(tmp_path: Path) -> None:
    for kill in range(3):
        root = tmp_path / str(kill)
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(root), KEY], stdout=subprocess.PIPE)
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(200 + 37 * kill)]
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read().splitlines()
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
        last = int(next(line for line in reversed(said) if line.strip()))
        found = [row["update"] for row in read_journal(LocalBlobs(root), KEY)]
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= last >= 200


def test_a_process_that_forgets_to_close_uploads_at_its_exit(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from treadle.store.blobs import Entry
from treadle.store.journal import Journal
from treadle.store.local import LocalBlobs
class Remote(LocalBlobs):
    def local_path(self, key): return None
Journal(Remote(Path({str(tmp_path)!r})), {KEY!r}, writer="a1", interval_s=60).append({{"update": 1}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert read_journal(LocalBlobs(tmp_path), KEY) == rows(1, 1)


@UNTIMED
@given(st.lists(st.dictionaries(st.text(max_size=8), st.text() | st.integers() | st.floats(), max_size=4), max_size=6))
def test_any_row_of_json_comes_back(new: list[dict[str, object]]) -> None:
    store = MemoryBlobs()
    write(store, "a1", new)
    found = read_journal(store, KEY)
    assert len(found) == len(new)
    for row, seen in zip(new, found, strict=True):
        for name, value in row.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            assert seen[name] == value if finite else json.dumps(value) == seen[name]
