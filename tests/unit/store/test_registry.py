"""Versions never change, aliases move for one writer at a time, and every move is on record."""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError, ConflictError, IntegrityError, NotFoundError
from treadle.store.blobs import Blobs, Entry
from treadle.store.checkpoints import Checkpoints
from treadle.store.local import LocalBlobs
from treadle.store.registry import Code, ModelDraft, ModelFile, ModelVersion, Registry
from treadle.store.sealed import checksum, seal, unseal
from treadle.testing import Died, FaultBlobs, MemoryBlobs

WEIGHTS = b"weights " * 40

UNTIMED = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(params=["memory", "local"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return MemoryBlobs() if request.param == "memory" else LocalBlobs(tmp_path / "store")


def draft(blobs: Blobs, n: int = 1, *, name: str = "toy", metrics: dict[str, float] | None = None) -> ModelDraft:
    """A model unlike those with another `n`, its file in the store."""
    data = WEIGHTS + b"%d" % n
    key = f"runs/toy-{n}/model.safetensors"
    blobs.put(key, data)
    return ModelDraft(
        name=name,
        run=f"toy-{n}",
        files={"model.safetensors": ModelFile(key=key, size_bytes=len(data), xxh3_128=checksum(data))},
        signature={"input_size": 3, "num_labels": 2},
        spec_digest="s" * 64,
        data_digest="d" * 64,
        code=Code(git="abc", dirty=True),
        metrics={"val/accuracy": 0.5 + n / 100} if metrics is None else metrics,
    )


def with_versions(blobs: Blobs, count: int) -> Registry:
    registry = Registry(blobs)
    for n in range(1, count + 1):
        registry.register(draft(blobs, n))
    return registry


def production(registry: Registry) -> int:
    return registry.resolve("toy@production").version


def test_a_version_is_read_back_whole(blobs: Blobs) -> None:
    registry = Registry(blobs)
    made = registry.register(draft(blobs))
    assert (made.version, made.run, made.code) == (1, "toy-1", Code(git="abc", dirty=True))
    assert Registry(blobs).versions("toy") == [made]
    assert registry.models() == ["toy"]
    assert registry.read(made, "model.safetensors") == WEIGHTS + b"1"
    assert len(list(blobs.list("models/"))) == 1  # nothing was copied


def test_the_same_content_is_one_version(blobs: Blobs) -> None:
    registry = with_versions(blobs, 3)
    again = registry.register(draft(blobs, 2))
    assert again.version == 2
    assert len(registry.versions("toy")) == 3
    other = registry.register(replace(draft(blobs, 2), metrics={"val/accuracy": 0.1}))
    assert other.version == 4
    assert other.digest != again.digest


@pytest.mark.parametrize("wrong", [{"size_bytes": 3}, {"key": "runs/toy-1/nothing"}])
def test_files_that_are_not_there_cannot_be_registered(blobs: Blobs, wrong: dict[str, object]) -> None:
    model = draft(blobs)
    file = replace(model.files["model.safetensors"], **wrong)
    with pytest.raises(IntegrityError, match=r"toy/model\.safetensors: got"):
        Registry(blobs).register(replace(model, files={"model.safetensors": file}))
    assert Registry(blobs).models() == []
    with pytest.raises(IntegrityError, match="model card"):
        Registry(blobs).register(replace(model, card="runs/toy-1/card.md"))


@pytest.mark.parametrize("name", ["", "../x", "A", "a/b", "a_b", "x" * 64])
def test_models_have_plain_names(name: str) -> None:
    with pytest.raises(ConfigError):
        draft(MemoryBlobs(), name=name)
    with pytest.raises(ConfigError):
        Registry(MemoryBlobs()).resolve(f"{name}@1")


@pytest.mark.parametrize("alias", ["latest", "3", "007", "", "../x", "A", "a/b"])
def test_aliases_that_may_not_be_used(alias: str) -> None:
    registry = with_versions(MemoryBlobs(), 1)
    with pytest.raises(ConfigError):
        registry.promote("toy", 1, alias, actor="ada")
    with pytest.raises(ConfigError):
        registry.rollback("toy", alias, actor="ada")


def test_references(blobs: Blobs) -> None:
    registry = with_versions(blobs, 3)
    registry.promote("toy", 2, actor="ada")
    got = [registry.resolve(ref).version for ref in ("toy", "toy@latest", "toy@1", "toy@3", "toy@production")]
    assert got == [3, 3, 1, 3, 2]
    for ref, said in {
        "tyo": "did you mean 'toy'",
        "toy@9": "from 1 to 3",
        "toy@prod": "(production) - did you mean 'production'",
        "nothing@production": "expected a registered one (toy)",
    }.items():
        with pytest.raises(NotFoundError, match=re.escape(said)):
            registry.resolve(ref)
    with pytest.raises(NotFoundError, match=r"did you mean 'model\.safetensors'"):
        registry.read(registry.resolve("toy"), "model.safetensor")


def test_damage_is_found_when_read_and_before_promotion(blobs: Blobs) -> None:
    registry = with_versions(blobs, 2)
    key = "runs/toy-2/model.safetensors"
    blobs.put(key, WEIGHTS + b"3")
    with pytest.raises(IntegrityError, match=re.escape(key)):
        registry.read(registry.resolve("toy@2"), "model.safetensors")
    with pytest.raises(IntegrityError, match=re.escape(key)):
        registry.promote("toy", 2, actor="ada")
    assert (registry.aliases("toy"), registry.history("toy")) == ({}, [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_version_with_metrics_that_are_no_numbers_stays_where_it_is(blobs: Blobs, value: float) -> None:
    registry = Registry(blobs)
    made = registry.register(draft(blobs, metrics={"loss": value, "fine": 1.0}))
    assert registry.register(draft(blobs, metrics={"loss": value, "fine": 1.0})).version == 1
    assert str(registry.resolve("toy").metrics["loss"]) == str(made.metrics["loss"]) == str(value)
    with pytest.raises(ConfigError, match="metrics loss not finite"):
        registry.promote("toy", 1, actor="ada")


def test_a_version_record_that_was_changed_is_refused(blobs: Blobs) -> None:
    registry = with_versions(blobs, 2)
    first, second = (f"models/toy/versions/{n:06d}.json" for n in (1, 2))
    good = blobs.get(first)
    blobs.put(first, good.replace(b'"val/accuracy":0.51', b'"val/accuracy":0.91'))
    with pytest.raises(IntegrityError, match=re.escape(first)):
        registry.resolve("toy@1")
    assert registry.register(draft(blobs, 3)).version == 3  # and stops nobody
    blobs.put(first, blobs.get(second))
    with pytest.raises(IntegrityError, match=re.escape(first)):
        registry.resolve("toy@1")


def test_promotions_are_recorded(blobs: Blobs) -> None:
    registry = with_versions(blobs, 2)
    first = registry.promote("toy", 1, actor="ada", reason="best so far")
    second = registry.promote("toy", 2, actor="bob")
    assert (first.before, first.after, second.before, second.after) == (None, 1, 1, 2)
    same = registry.promote("toy", 2, actor="bob")  # again: nothing to do, nothing to record
    assert (same.before, same.after, same.seq) == (2, 2, second.seq)
    registry.promote("toy", 1, "candidate", actor="ada")
    assert registry.aliases("toy") == {"candidate": 1, "production": 2}
    events = registry.history("toy")
    assert [(e.seq, e.alias, e.before, e.after, e.actor) for e in events] == [
        (1, "production", None, 1, "ada"),
        (2, "production", 1, 2, "bob"),
        (3, "candidate", None, 1, "ada"),
    ]
    assert events[0].reason == "best so far"
    with pytest.raises(ConfigError, match="actor"):
        registry.promote("toy", 1, actor="")
    with pytest.raises(NotFoundError, match="from 1 to 2"):
        registry.promote("toy", 3, actor="ada")


def test_rollbacks_go_back_one_by_one(blobs: Blobs) -> None:
    registry = with_versions(blobs, 4)
    with pytest.raises(NotFoundError, match="got no version"):
        registry.rollback("toy", actor="ada")
    for version in (1, 2, 3):
        registry.promote("toy", version, actor="ada")
    assert [registry.rollback("toy", actor="bob").after for _ in range(2)] == [2, 1]
    with pytest.raises(NotFoundError, match="version 1, its first"):
        registry.rollback("toy", actor="bob")
    registry.promote("toy", 4, actor="ada")
    registry.promote("toy", 2, actor="ada")
    assert registry.rollback("toy", actor="bob").after == 4
    assert registry.rollback("toy", actor="bob").after == 1
    assert production(registry) == 1
    assert [e.action for e in registry.history("toy")] == ["promote"] * 3 + ["rollback"] * 2 + [
        "promote",
        "promote",
        "rollback",
        "rollback",
    ]


def test_a_rollback_to_damaged_bytes_is_refused(blobs: Blobs) -> None:
    registry = with_versions(blobs, 2)
    registry.promote("toy", 1, actor="ada")
    registry.promote("toy", 2, actor="ada")
    blobs.delete("runs/toy-1/model.safetensors")
    with pytest.raises(IntegrityError, match="toy-1"):
        registry.rollback("toy", actor="ada")
    assert production(registry) == 2


@UNTIMED
@given(st.lists(st.integers(0, 4), max_size=12))
def test_rollback_is_the_top_of_a_pile(moves: list[int]) -> None:
    """0 rolls back, n promotes version n: an alias is what a plain list would be."""
    registry, pile = with_versions(MemoryBlobs(), 4), list[int]()
    for move in moves:
        if move and pile[-1:] != [move]:
            pile.append(move)
        if move:
            registry.promote("toy", move, actor="ada")
        elif len(pile) >= 2:
            pile.pop()
            registry.rollback("toy", actor="ada")
        else:
            with pytest.raises(NotFoundError):
                registry.rollback("toy", actor="ada")
        assert registry.aliases("toy") == ({"production": pile[-1]} if pile else {})
    assert [e.seq for e in registry.alias_history("toy", "production")] == [e.seq for e in registry.history("toy")]


@pytest.mark.parametrize("moment", ["die_before", "die_after"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_death_between_event_and_alias_leaves_an_event_without_effect(moment: str, number: int, action: str) -> None:
    store = MemoryBlobs()
    registry = with_versions(store, 4)
    for version in (1, 2, 3):
        registry.promote("toy", version, actor="ada")
    dying = Registry(FaultBlobs(store, **{moment: number}))
    with pytest.raises(Died):
        dying.promote("toy", 4, actor="eve") if action == "promote" else dying.rollback("toy", actor="eve")
    is_done = (moment, number) == ("die_after", 2)
    target = 4 if action == "promote" else 2
    assert production(registry) == (target if is_done else 3)
    assert len(registry.history("toy")) == (3 if (moment, number) == ("die_before", 1) else 4)

    again = registry.promote("toy", 1, actor="ada")
    assert (again.before, production(registry)) == (target if is_done else 3, 1)
    expected = [1, 2, 3, target, 1] if is_done else [1, 2, 3, 1]
    assert [e.after for e in registry.alias_history("toy", "production")] == expected
    assert registry.rollback("toy", actor="ada").after == (target if is_done else 3)
    registry.history("toy")


def test_lost_replies_are_not_lost_races() -> None:
    for number in range(1, 12):
        store = MemoryBlobs()
        registry = Registry(FaultBlobs(store, lose_reply=number))
        for n in (1, 2, 3):
            assert registry.register(draft(store, n)).version == n
        for n in (1, 2):
            registry.promote("toy", n, actor="ada")
        registry.rollback("toy", actor="ada")
        assert production(registry) == 1
        assert [e.seq for e in registry.history("toy")] == [1, 2, 3]


def test_racing_registrations_get_a_number_each(blobs: Blobs) -> None:
    drafts = [draft(blobs, n % 12) for n in range(16)]  # four contents come twice
    start = threading.Barrier(16)

    def register(model: ModelDraft) -> ModelVersion:
        start.wait()
        return Registry(blobs).register(model)

    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(register, drafts))
    versions = Registry(blobs).versions("toy")
    assert [v.version for v in versions] == list(range(1, 13))
    assert {m.digest: m.version for m in made} == {v.digest: v.version for v in versions}


def test_the_same_content_registered_in_between_is_found() -> None:
    class Raced(MemoryBlobs):
        def create(self, key: str, data: bytes) -> Entry:
            if key.endswith("versions/000001.json") and self.head(key) is None:
                version = unseal(ModelVersion, data, kind="model", where=key)
                self.put(key, seal("model", replace(version, created_at="a moment earlier")))
            return super().create(key, data)

    store = Raced()
    made = Registry(store).register(draft(store))
    assert (made.version, made.created_at) == (1, "a moment earlier")
    assert Registry(store).versions("toy") == [made]


def test_of_racing_promotions_each_is_told_and_all_are_on_record(blobs: Blobs) -> None:
    registry = with_versions(blobs, 12)
    start = threading.Barrier(12)

    def promote(version: int) -> tuple[int, bool]:
        start.wait()
        try:
            Registry(blobs).promote("toy", version, actor=f"user-{version}")
        except ConflictError:
            return version, False
        return version, True

    with ThreadPoolExecutor(12) as pool:
        told = dict(pool.map(promote, range(1, 13)))
    events = registry.history("toy")  # verifies the chain and the alias's hold on it
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert sorted(e.after for e in events) == list(range(1, 13))
    effective = [e.after for e in registry.alias_history("toy", "production")]
    assert sorted(effective) == sorted(version for version, won in told.items() if won)
    assert production(registry) == effective[-1]
    assert registry.aliases("toy") == {"production": effective[-1]}


def test_two_who_saw_the_same_alias_do_not_both_move_it() -> None:
    class Slow(MemoryBlobs):
        """Another promotion gets in between the event and the swap."""

        rival: Callable[[], object] | None = None

        def replace(self, key: str, data: bytes, *, version: str) -> Entry:
            if self.rival:
                rival, self.rival = self.rival, None
                rival()
            return super().replace(key, data, version=version)

    store = Slow()
    registry = with_versions(store, 3)
    registry.promote("toy", 1, actor="ada")
    store.rival = lambda: registry.promote("toy", 3, actor="bob")
    with pytest.raises(ConflictError, match="got version 3, expected version 1"):
        registry.promote("toy", 2, actor="ada")
    assert production(registry) == 3
    assert [e.after for e in registry.alias_history("toy", "production")] == [1, 3]
    assert len(registry.history("toy")) == 3


def _audit(seq: int) -> str:
    return f"models/toy/audit/{seq:012d}.json"


def _edit(blobs: Blobs, seq: int) -> None:
    """Another actor, with the record's own digest made to fit: what a forger would do."""
    event = Registry(blobs).history("toy")[seq - 1]
    blobs.put(_audit(seq), seal("audit", replace(event, actor="mallory")))


def _drop(blobs: Blobs, seq: int) -> None:
    blobs.delete(_audit(seq))


def _swap(blobs: Blobs, seq: int) -> None:
    other = seq - 1 if seq > 1 else 2
    mine, yours = blobs.get(_audit(seq)), blobs.get(_audit(other))
    blobs.put(_audit(seq), yours)
    blobs.put(_audit(other), mine)


def _flip(blobs: Blobs, seq: int) -> None:
    data = bytearray(blobs.get(_audit(seq)))
    data[40] ^= 1
    blobs.put(_audit(seq), bytes(data))


@pytest.mark.parametrize("tamper", [_edit, _drop, _swap, _flip])
@pytest.mark.parametrize("seq", [1, 2, 3, 4])
def test_tampering_with_any_event_is_found(tamper: Callable[[Blobs, int], None], seq: int) -> None:
    store = MemoryBlobs()
    registry = with_versions(store, 2)
    for version in (1, 2, 1, 2):
        registry.promote("toy", version, actor="ada")
    assert len(registry.history("toy")) == 4
    tamper(store, seq)
    with pytest.raises(IntegrityError, match=r"event [1-5]"):
        registry.history("toy")


def test_an_alias_never_has_a_content_twice() -> None:
    store = MemoryBlobs()
    registry, seen = with_versions(store, 2), set[bytes]()
    for version in itertools.islice(itertools.cycle((1, 2)), 8):
        registry.promote("toy", version, actor="ada")
        seen.add(store.get("models/toy/aliases/production.json"))
    assert len(seen) == 8


def test_a_registered_checkpoint_outlives_retention(blobs: Blobs) -> None:
    writer = Checkpoints(blobs, "toy-run", attempt=1, keep_last=1, spec_digest="s", data_digest="d")
    manifest = writer.commit(1, {"model.safetensors": WEIGHTS}, {})
    size_bytes, xxh3_128 = manifest.files["model.safetensors"]
    file = ModelFile(key=manifest.key("model.safetensors"), size_bytes=size_bytes, xxh3_128=xxh3_128)
    registry = Registry(blobs)
    made = registry.register(replace(draft(blobs), files={"model.safetensors": file}))
    for update in (2, 3):
        writer.commit(update, {"model.safetensors": b"later"}, {})
    assert registry.read(made, "model.safetensors") == WEIGHTS
    assert len(blobs.children("runs/toy-run/ckpt")) == 2


@UNTIMED
@given(
    metrics=st.dictionaries(st.text(max_size=6), st.floats(allow_nan=False), max_size=3),
    signature=st.dictionaries(st.text(max_size=6), st.integers() | st.none() | st.text(), max_size=3),
    dirty=st.booleans(),
    card=st.none() | st.text(),
)
def test_a_version_reads_back_as_written(
    metrics: dict[str, float], signature: dict[str, object], dirty: bool, card: str | None
) -> None:
    base = draft(MemoryBlobs())
    made = ModelVersion(
        name="toy",
        run="toy-1",
        files=base.files,
        signature=signature,
        spec_digest="s",
        data_digest="d",
        code=Code(dirty=dirty),
        metrics=metrics,
        card=card,
        version=3,
        digest="x",
        created_at="now",
    )
    found = unseal(ModelVersion, seal("model", made), kind="model", where="here")
    assert found == made
    assert found.content_digest == made.content_digest == replace(made, version=9, created_at="later").content_digest
