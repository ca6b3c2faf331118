"""A network to S3 that refuses, breaks off, hangs, is slow, cuts and flips (F8, F9)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from fault_victims import RUN, files_at, open_run

from treadle.data.blocks import decode_block
from treadle.errors import IntegrityError, TransientError
from treadle.store import AttemptEnd, AttemptStatus, Backend, Blobs, Journal, Runs, read_journal
from treadle.store.dev import DevServer
from treadle.store.s3 import S3Blobs, S3Options
from treadle.testing import Fault, FaultProxy, Rule

pytestmark = pytest.mark.s3
T = TypeVar("T")
CKPT_FILES = r"/ckpt/.*(safetensors|bin)"


class Place:
    """One prefix of a bucket, reached directly and through a proxy."""

    def __init__(self, server: DevServer, open_later: ExitStack) -> None:
        self.server = server
        self.prefix = f"faults/{uuid.uuid4().hex}"
        self.direct = S3Blobs(server.bucket, self.prefix, server.options())
        self.open_later = open_later
        self.proxies: list[FaultProxy] = []

    def through(self, *rules: Rule, seed: int = 0, **options: Any) -> S3Blobs:
        proxy = self.open_later.enter_context(FaultProxy(self.server.endpoint, *rules, seed=seed))
        self.proxies.append(proxy)
        chosen = S3Options(access_key=self.server.access_key, secret_key=self.server.secret_key, **options)
        return S3Blobs(self.server.bucket, self.prefix, replace(chosen, endpoint=proxy.url))

    @property
    def num_done(self) -> int:
        return sum(proxy.done.total() for proxy in self.proxies)


@pytest.fixture
def place(s3_server: DevServer) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(s3_server, stack)


def live(blobs: Blobs, num_updates: int, *, may_fail: bool = False) -> int:
    """What a run does with its store, and how many saves failed; the last update is saved whatever it takes."""
    runs = Runs(blobs)
    record = outlast(lambda: runs.create(b"{}", b"{}", job="toy", backend=Backend.ray, run=RUN), may_fail)
    attempt = outlast(lambda: runs.claim_attempt(record.run, Backend.ray), may_fail)
    num_failed = 0
    with Journal(blobs, f"runs/{RUN}/metrics.jsonl", writer="rank0", interval_s=0.05) as rows:
        checkpoints = open_run(blobs, attempt)
        for update in range(1, num_updates + 1):
            rows.append({"update": update})
            while True:
                try:
                    checkpoints.commit(update, files_at(update), {"update": update})
                    break
                except TransientError:
                    num_failed += 1
                    assert may_fail
                    if update < num_updates:
                        break
            outlast(lambda update=update: runs.beat(RUN, attempt, {"update": update}), may_fail)
        assert rows.close(120), rows.last_error
    end = AttemptEnd(status=AttemptStatus.finished, update=num_updates)
    outlast(lambda: runs.end_attempt(RUN, attempt, end), may_fail)
    return num_failed


def outlast(act: Callable[[], T], may_fail: bool) -> T:
    """What `act` gives, tried again while it may fail."""
    while True:
        try:
            return act()
        except TransientError:
            assert may_fail


def check_lived(blobs: Blobs, num_updates: int) -> None:
    """Nothing of it is lost, and nothing is there twice."""
    found = open_run(blobs, 0).restore()
    assert found is not None
    assert (found[0].update, found[1]) == (num_updates, files_at(num_updates))
    assert len(blobs.children(f"runs/{RUN}/ckpt")) == min(2, num_updates)
    assert [row["update"] for row in read_journal(blobs, f"runs/{RUN}/metrics.jsonl")] == [*range(1, num_updates + 1)]
    (summary,) = Runs(blobs).list()
    assert (summary.run, summary.number, summary.attempt, summary.update) == (RUN, 1, 1, num_updates)


NETWORKS: dict[str, tuple[tuple[Rule, ...], dict[str, Any]]] = {
    "503, 3 in 10": ((Rule(fault=Fault.refuse, share=0.3),), {}),
    "503, 6 in 10": ((Rule(fault=Fault.refuse, share=0.6),), {}),
    "409 of conditional writes, 3 in 10": ((Rule(fault=Fault.conflict, share=0.3, header="if-"),), {}),
    "reset, 3 in 10": ((Rule(fault=Fault.reset, share=0.3),), {}),
    "replies lost, 2 in 10": ((Rule(fault=Fault.lose_reply, share=0.2),), {}),
    "hang, 1 in 10": ((Rule(fault=Fault.hang, share=0.1),), {"read_timeout_s": 0.5}),
    "slow, 100 kB/s": ((Rule(fault=Fault.slow, bytes_per_s=100_000),), {}),
    "all of it": (
        tuple(Rule(fault=f, share=0.06) for f in (Fault.refuse, Fault.reset, Fault.lose_reply, Fault.hang, Fault.slow)),
        {"read_timeout_s": 0.5},
    ),
}
MAY_FAIL = {"503, 6 in 10", "all of it"}  # nine tries of 6 in 10 all fail for one request in a hundred
IN_FAST = {"503, 3 in 10": 1, "replies lost, 2 in 10": 1, "slow, 100 kB/s": 1}
IN_FULL = {"503, 3 in 10": 2, "503, 6 in 10": 1}  # adaptive retries: some 20 s a save, and minutes
MOST_IN_FAST = 2  # boto3 slows its client down after each: a save at 3 in 10 takes half a minute


@pytest.mark.fault(8, "a run over a bad network")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_outlives_a_bad_network(place: Place, matrix, choose: Callable[..., int], name: str) -> None:
    num_updates = choose(IN_FAST.get(name, 0), IN_FULL.get(name, 4))
    if not num_updates:
        pytest.skip("in full runs only")
    rules, options = NETWORKS[name]
    if choose(True, False):
        rules = tuple(replace(rule, most=MOST_IN_FAST if rule.fault is Fault.refuse else None) for rule in rules)
    num_failed = live(place.through(*rules, seed=1, **options), num_updates, may_fail=name in MAY_FAIL)
    check_lived(place.direct, num_updates)
    saves = f"{num_failed} of {num_updates + num_failed} saves failed"
    matrix.note(injected=place.num_done, seen=f"{name}: {saves}, nothing lost or twice")


@pytest.mark.fault(8, "S3 goes away and comes back")
def test_a_commit_without_s3_fails_soon_and_the_next_succeeds(place: Place, matrix) -> None:
    blobs = place.through(attempts=2, read_timeout_s=0.5)
    checkpoints = open_run(blobs, 1)
    checkpoints.commit(1, files_at(1), {})
    kinds = [Fault.refuse, Fault.reset, Fault.hang]
    for update, fault in enumerate(kinds, 2):
        place.proxies[0].rules = (Rule(fault=fault),)
        with pytest.raises(TransientError):
            checkpoints.commit(update, files_at(update), {})
        found = open_run(place.direct, 0).restore()
        assert found is not None
        assert found[1] == files_at(1)
    place.proxies[0].rules = ()
    checkpoints.commit(9, files_at(9), {})
    found = open_run(place.direct, 0).restore()
    assert found is not None
    assert found[1] == files_at(9)
    matrix.note(injected=place.num_done, seen="away: TransientError, old state kept, next save succeeds")


@pytest.mark.fault(8, "S3 goes away in the middle of a commit")
def test_a_commit_that_breaks_off_anywhere_leaves_the_old_state(place: Place, matrix, points) -> None:
    blobs = place.through(attempts=1)
    checkpoints = open_run(blobs, 1)
    checkpoints.commit(1, files_at(1), {})
    seen = place.proxies[0].num_passed
    checkpoints.commit(2, files_at(2), {})
    num_requests = place.proxies[0].num_passed - seen
    acknowledged = 2
    for update, first in enumerate(points(range(1, num_requests + 1), 4), 3):
        place.proxies[0].rules = (Rule(fault=Fault.refuse, first=first),)
        try:
            checkpoints.commit(update, files_at(update), {})
            acknowledged = update  # what came after the swap is only cleaning
        except TransientError:
            pass
        place.proxies[0].rules = ()
        found = open_run(place.direct, 0).restore()
        assert found is not None
        assert found[0].update in (acknowledged, update), first
        assert found[1] == files_at(found[0].update)
        acknowledged = found[0].update
    matrix.note(injected=place.num_done, seen="away in mid-commit: old or new state, never between")


# F9


@pytest.mark.fault(9, "bits flipped and bodies cut on the way down")
def test_what_is_read_is_right_or_refused(place: Place, matrix, choose) -> None:
    checkpoints = open_run(place.direct, 1)
    for update in (1, 2):
        checkpoints.commit(update, files_at(update), {})
    counts = {"right": 0, "refused": 0}
    for seed in range(choose(4, 60)):
        fault = (Fault.flip_reply, Fault.cut_reply)[seed % 2]
        share = 0.5 if seed % 4 < 2 else 0.9
        blobs = place.through(Rule(fault=fault, methods=frozenset({"GET"}), share=share), seed=seed, attempts=2)
        try:
            found = open_run(blobs, 0).restore()
        except (IntegrityError, TransientError):
            counts["refused"] += 1
            continue
        assert found is not None
        assert found[1] == files_at(found[0].update)
        counts["right"] += 1
        for entry in place.direct.list(f"runs/{RUN}/ckpt"):  # the next round reads them again
            if entry.key.endswith("quarantine.json"):
                place.direct.delete(entry.key)
    matrix.note(
        injected=place.num_done, seen=f"GET: {counts['right']} read right, {counts['refused']} refused, 0 wrong"
    )


@pytest.mark.fault(9, "the newest checkpoint always arrives damaged")
def test_a_checkpoint_that_cannot_be_read_is_walked_past(place: Place, matrix) -> None:
    checkpoints = open_run(place.direct, 1)
    checkpoints.commit(1, files_at(1), {})
    newest = checkpoints.commit(2, files_at(2), {})
    rule = Rule(fault=Fault.flip_reply, methods=frozenset({"GET"}), path=f"{newest.prefix}/model")
    found = open_run(place.through(rule), 0).restore()
    assert found is not None
    assert found[1] == files_at(1)
    assert place.direct.head(f"{newest.prefix}/quarantine.json") is not None
    matrix.note(injected=place.num_done, seen="GET, for ever: older checkpoint restored, quarantine recorded")


@pytest.mark.fault(9, "bits flipped in what is read in ranges")
def test_a_range_has_its_own_digest(place: Place, matrix, choose, built_rows) -> None:
    manifest = built_rows(place.direct)
    blocks = manifest.header.blocks
    whole = [place.direct.get(b.key, offset=b.offset, size=b.size) for b in blocks]
    num_damaged = 0
    for seed in range(choose(2, 40)):
        blobs = place.through(Rule(fault=Fault.flip_reply, methods=frozenset({"GET"}), share=0.5), seed=seed)
        for block, right in zip(blocks, whole, strict=True):
            seen = blobs.get(block.key, offset=block.offset, size=block.size)
            if seen == right:
                decode_block(seen, block, manifest.header.content)
                continue
            num_damaged += 1
            with pytest.raises(IntegrityError):
                decode_block(seen, block, manifest.header.content)
    assert num_damaged
    matrix.note(injected=place.num_done, seen=f"ranged GET: {num_damaged} of {num_damaged} damaged blocks refused")


@pytest.mark.fault(9, "bits flipped and replies lost on the way up")
def test_what_was_acknowledged_is_what_was_sent(place: Place, matrix, choose) -> None:
    rule = Rule(fault=Fault.flip_request, methods=frozenset({"PUT"}), share=0.3)
    blobs = place.through(rule, seed=3)
    acknowledged, refused = 0, 0
    checkpoints = open_run(blobs, 1)
    for update in range(1, choose(3, 20) + 1):
        try:
            checkpoints.commit(update, files_at(update), {"update": update})
            acknowledged = update
        except (IntegrityError, TransientError):
            refused += 1
        if acknowledged:
            found = open_run(place.direct, 0).restore()
            assert found is not None
            assert found[0].update >= acknowledged
            assert found[1] == files_at(found[0].update)
    assert acknowledged
    matrix.note(injected=place.num_done, seen=f"PUT: every acknowledged state right, {refused} commits refused")


@pytest.mark.fault(9, "every file arrives damaged on the way up")
def test_a_way_up_that_always_damages_is_refused(place: Place, matrix) -> None:
    open_run(place.direct, 1).commit(1, files_at(1), {})
    rule = Rule(fault=Fault.flip_request, methods=frozenset({"PUT"}), path=CKPT_FILES)
    with pytest.raises((IntegrityError, TransientError)):
        open_run(place.through(rule, attempts=3), 2).commit(2, files_at(2), {})
    found = open_run(place.direct, 0).restore()
    assert found is not None
    assert found[1] == files_at(1)
    matrix.note(injected=place.num_done, seen="PUT, for ever: refused, old state kept")


@pytest.fixture
def built_rows() -> Callable[[Blobs], Any]:
    """Builds a small data set in a place, in several blocks."""
    from treadle.data.build.pipeline import Means, build_rows
    from treadle.data.draft import Draft, Labels, Row, Tokens
    from treadle.spec import DataSpec

    rows = [Row(entity=f"e{i}", inputs=list("abc" * (1 + i % 5)), target="xy"[i % 2]) for i in range(300)]

    def build(blobs: Blobs) -> Any:
        draft = Draft(rows=rows, inputs=Tokens(), target=Labels(), licence="none")
        means = Means(run_bytes=4000, shard_bytes=3000, block_bytes=700)
        return build_rows(draft, DataSpec(name="toy"), blobs, recipe="r", means=means)[1]

    return build
