"""The JSON forms: canonical bytes, closed families, and records that refuse what they are not."""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle import wire
from treadle.errors import ConfigError, IntegrityError
from treadle.spec import (
    AdamWSpec,
    AugmentSpec,
    BatchSpec,
    CheckpointSpec,
    ClassifySpec,
    ColumnsSpec,
    CtcSpec,
    DataSpec,
    GruSpec,
    JobSpec,
    LanguageSpec,
    Leak,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    ModelSpec,
    OptimSpec,
    Pooling,
    RmsPropSpec,
    RnnSpec,
    SgdSpec,
    SplitBy,
    SplitSpec,
    StoreSpec,
    TagSpec,
    TargetPer,
    TaskSpec,
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def job(**changes: Any) -> JobSpec:
    spec = JobSpec(
        name="toy",
        task=CtcSpec(frames_per_step=2),
        model=LstmSpec(),
        data=DataSpec(name="toy", sha256={"a.txt": "00"}, allow_leaks=[Leak.entity]),
        optim=AdamWSpec(),
        store=StoreSpec(uri="/nowhere"),
        columns=ColumnsSpec(inputs=["hr"]),
    )
    return dataclasses.replace(spec, **changes)


@given(values)
def test_canonical_json_comes_back_and_has_one_form(value):
    data = wire.canonical(value)
    assert wire.parse_json(data, where="x") == value
    assert wire.canonical(json.loads(data)) == data


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_does_not_count(value):
    assert wire.digest(dict(reversed(value.items()))) == wire.digest(value)


def test_a_digest_of_bytes_is_of_the_bytes():
    assert wire.digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert wire.digest(b"{}") == wire.digest({})
    assert wire.digest(memoryview(b"ab")) == wire.digest(b"ab")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]])
def test_what_json_cannot_say_is_not_written(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        wire.canonical(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 1}', "duplicate key"),
        ('{"b": {"a": 1, "a": 2}}', "duplicate key"),
        ("NaN", "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1e999", "too large"),
        ("-1e999", "too large"),
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[1,]", "Illegal trailing|Expecting value"),
        (b"\xff\xfe\x00", "codec|Expecting"),
        ("[" * 200_000, "recursion"),
        ("9" * 5000, "integer string conversion"),
    ],
)
def test_text_that_is_not_such_json_is_refused_by_place(text, words):
    with pytest.raises(IntegrityError, match=rf"^there: not readable as JSON \(.*({words})"):
        wire.parse_json(text, where="there")


@pytest.mark.parametrize("name", ["a", "0", "a-b", "x" * 63, "run-20260101-000000-ab12"])
def test_names(name):
    assert wire.check_name("run", name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "../a", "x" * 64, "a\n", "ä"])
def test_names_that_are_none(name):
    with pytest.raises(ConfigError, match=r"^run: got"):
        wire.check_name("run", name)


MODELS = [
    RnnSpec(),
    LstmSpec(bidirectional=True),
    GruSpec(dropout=0.5),
    MinGruSpec(norm=True),
    MinLstmSpec(expansion=1.5),
]
TASKS = [
    CtcSpec(label_name="phone"),
    ClassifySpec(pooling=Pooling.last),
    LanguageSpec(tied=True),
    TagSpec(label_smoothing=0.1),
]
OPTIMS = [AdamWSpec(clip_norm=None), SgdSpec(momentum=0.0), RmsPropSpec(alpha=0.9)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("optim", OPTIMS)
def test_a_job_of_any_variants_survives_the_wire(model, task, optim):
    spec = job(
        model=model,
        task=task,
        optim=optim,
        batch=BatchSpec(lanes=3, max_slots="8k"),
        columns=ColumnsSpec(inputs=["hr"], lower={"hr": 0.5}, target_per=TargetPer.frame),
        split=SplitSpec(by=SplitBy.time, test=0.2, train_rows=7),
        augment=AugmentSpec(crop=0.1),
    )
    again = wire.unrecord(JobSpec, wire.record("job", 1, spec), kind="job", schema=1, where="x")
    assert again == spec
    assert again.digest == spec.digest
    assert [type(part) for part in (again.model, again.task, again.optim)] == [type(model), type(task), type(optim)]


def variants(base):
    """The classes below `base` that a job can name: those with a `kind` of their own."""
    for cls in base.__subclasses__():
        if "kind" in vars(cls):
            yield cls
        yield from variants(cls)


def test_every_variant_is_tried_here():
    tried = {type(part) for part in (*MODELS, *TASKS, *OPTIMS)}
    assert tried == {cls for base in (ModelSpec, TaskSpec, OptimSpec) for cls in variants(base)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(extra=1), r"unknown fields \['extra'\] for JobSpec"),
        (lambda v: v.pop("name"), r"missing fields \['name'\] for JobSpec"),
        (lambda v: v["model"].update(kind="transformer"), r"model\.kind: got 'transformer', expected one of .*'gru'"),
        (lambda v: v["model"].pop("kind"), r"model\.kind: got None"),
        (lambda v: v["model"].update(kind=["lstm"]), r"model\.kind: got \['lstm'\]"),
        (lambda v: v["model"].update(hidden_size="8"), r"model\.hidden_size: got str, expected int"),
        (lambda v: v["model"].update(hidden_size=8.0), r"model\.hidden_size: got float, expected int"),
        (lambda v: v["model"].update(hidden_size=True), r"model\.hidden_size: got bool, expected int"),
        (lambda v: v["model"].update(bidirectional=1), r"model\.bidirectional: got int, expected bool"),
        (lambda v: v["model"].update(dropout=True), r"model\.dropout: got bool, expected float"),
        (lambda v: v.update(model=[]), r"model: got list, expected dict"),
        (lambda v: v.update(model=None), r"model: got NoneType"),
        (lambda v: v["data"].update(sha256=[]), r"data\.sha256: got list, expected dict"),
        (lambda v: v["data"]["sha256"].update({"b": 1}), r"data\.sha256\.b: got int, expected str"),
        (
            lambda v: v["data"].update(allow_leaks=["entitty"]),
            r"data\.allow_leaks\[0\]: got 'entitty', expected one of",
        ),
        (lambda v: v["columns"]["inputs"].append(1), r"columns\.inputs\[1\]: got int, expected str"),
        (lambda v: v["columns"]["lower"].update(hr="0"), r"columns\.lower\.hr: got str, expected float"),
        (lambda v: v["batch"].update(max_slots=512), r"batch\.max_slots: got int, expected str"),
        (lambda v: v["batch"].update(slots=512), r"unknown fields \['slots'\] for BatchSpec"),
        (lambda v: v["split"].update(fold=9), r"split\.fold: got 9, expected below"),
        (lambda v: v["split"].update(valid="Infinity"), r"not a JobSpec \(cannot convert float infinity"),
        (lambda v: v["optim"].update(lr=10**400), r"not a JobSpec \(int too large"),
        (lambda v: v["data"].update(name="../x"), r"data\.name: got '\.\./x'"),
        (
            lambda v: v["precision"].update(mode="fp8"),
            r"precision\.mode: got 'fp8', expected one of \['auto', 'bf16', 'fp16', 'fp32'\]",
        ),
        (lambda v: v["checkpoint"].update(every="soon"), r"duration: got 'soon'"),
    ],
)
def test_a_job_of_another_form_is_refused(change, words):
    value = wire.encode(job())
    change(value)
    with pytest.raises(IntegrityError, match=words):
        wire.decode(JobSpec, value, where="spec")


def test_whole_numbers_are_floats_where_floats_are_asked():
    value = wire.encode(job())
    value["optim"]["lr"] = 1
    again = wire.decode(JobSpec, value)
    assert again.optim.lr == 1.0
    assert isinstance(again.optim.lr, float)
    found = wire.decode(Leaf, {"name": "nan", "pair": [1, "inf"], "many": ["Infinity", "-Infinity", "NaN", 1, 0.5]})
    assert (found.name, found.pair[1]) == ("nan", "inf")
    assert [str(value) for value in found.many] == ["inf", "-inf", "nan", "1.0", "0.5"]
    assert wire.decode(CheckpointSpec, {"every_updates": None}) == CheckpointSpec()


class Colour(enum.Enum):
    red = "red"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    name: str
    pair: tuple[int, str]
    many: tuple[float, ...] = ()
    colour: Colour = Colour.red
    any: Any = None


@dataclass(frozen=True, kw_only=True)
class Tree:
    leaves: list[Leaf] = field(default_factory=list)
    by_name: dict[str, tuple[Leaf, ...]] = field(default_factory=dict)
    maybe: Leaf | None = None


@dataclass(frozen=True, kw_only=True)
class Tagged:
    kind: ClassVar[str] = "tagged"
    size: int


@dataclass(frozen=True, kw_only=True)
class OwnKind:
    kind: str


leaves = st.builds(
    Leaf,
    name=st.text(),
    pair=st.tuples(st.integers(), st.text()),
    many=st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
    any=values,
)


@given(
    st.builds(
        Tree,
        leaves=st.lists(leaves, max_size=3),
        by_name=st.dictionaries(st.text(), st.lists(leaves, max_size=2).map(tuple), max_size=2),
        maybe=st.none() | leaves,
    )
)
def test_nested_values_come_back_with_their_types(tree):
    assert wire.decode(Tree, json.loads(wire.canonical(wire.encode(tree)))) == tree


@pytest.mark.parametrize(
    "value",
    [
        {"name": "a", "pair": "ab"},
        {"name": "a", "pair": [1, 2]},
        {"name": "a", "pair": [1]},
        {"name": "a", "pair": [1, "b", "c"]},
        {"name": "a", "pair": ["1", "2"]},
        {"name": "a", "pair": [1, "b"], "many": {"0": 1}},
        {"name": "a", "pair": [1, "b"], "many": ["1"]},
        {"name": "a", "pair": [1, "b"], "colour": "blue"},
        {"name": None, "pair": [1, "b"]},
        "leaf",
        None,
        7,
    ],
)
def test_values_of_another_form_are_refused(value):
    with pytest.raises(IntegrityError):
        wire.decode(Leaf, value, where="leaf")


def test_a_kind_that_is_a_field_is_a_field():
    assert wire.encode(OwnKind(kind="x")) == {"kind": "x"}
    assert wire.decode(OwnKind, {"kind": "x"}) == OwnKind(kind="x")
    assert wire.decode(Tagged, wire.encode(Tagged(size=1))) == Tagged(size=1)


def test_records_say_what_they_are():
    data = wire.record("leaf", 3, Leaf(name="a", pair=(1, "b")))
    assert wire.unrecord(Leaf, data, kind="leaf", schema=3, where="x") == Leaf(name="a", pair=(1, "b"))
    with pytest.raises(IntegrityError, match="x: not a record of kind 'tree'"):
        wire.unrecord(Leaf, data, kind="tree", schema=3, where="x")
    with pytest.raises(IntegrityError, match="x: got schema 3, expected 4") as refused:
        wire.unrecord(Leaf, data, kind="leaf", schema=4, where="x")
    assert refused.value.hint
    for body in (b"[]", b"null", b'{"record":"leaf","schema":3}', data[:-2]):
        with pytest.raises(IntegrityError):
            wire.unrecord(Leaf, body, kind="leaf", schema=3, where="x")
