"""Keys, ranges and the generated reference agree with the spec classes."""

from __future__ import annotations

import dataclasses
import enum
import json
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, MultipleOf
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter, ValidationError

from treadle.errors import did_you_mean, nearest
from treadle.spec import JobSpec, ModelSpec, job
from treadle.spec.places import list_groups, list_options
from treadle.spec.reference import config_markdown, describe_option
from treadle.spec.schema import FieldDoc, fields_of, job_keys, show, suggest_key, variants_of


def _adapters() -> list[tuple[FieldDoc, TypeAdapter[Any]]]:
    """pydantic's own reading of the annotation of every key with numbers or text."""
    found = []
    for name, node in fields_of(JobSpec).items():
        for cls in [*variants_of(node.value_type).values(), node.value_type] if node.is_node else [JobSpec]:
            hints = typing.get_type_hints(cls, include_extras=True)
            for field, doc in fields_of(cls, name if node.is_node else "").items():
                if doc.value_type in (int, float, str):
                    adapter = TypeAdapter(hints[field], config=ConfigDict(allow_inf_nan=False, strict=True))
                    found.append((doc, adapter))
    return found


ADAPTERS = _adapters()


@given(data=st.data())
def test_bounds_agree_with_pydantic(data: st.DataObject) -> None:
    doc, adapter = data.draw(st.sampled_from(ADAPTERS))
    edges = [
        b
        for bound in doc.bounds
        for v in dataclasses.astuple(bound)
        if isinstance(v, int | float)
        for b in (v - 1, v, v + 1)
    ]
    numbers = st.sampled_from([0, 1, *edges]) | st.integers()
    kinds = {int: numbers, float: numbers.map(float) | st.floats(), str: st.text(max_size=2)}
    value = data.draw(kinds[doc.value_type] | st.none())
    try:
        adapter.validate_python(value)
        accepted = True
    except ValidationError:
        accepted = False
    assert doc.accepts(value) == accepted


def test_every_key_is_described_and_every_enumeration_converts() -> None:
    assert [key for key, doc in job_keys().items() if not doc.description.endswith(".")] == []
    for item in vars(job).values():
        if isinstance(item, type) and issubclass(item, enum.Enum):
            assert all(member.name == member.value for member in item)


def test_keys_cover_every_field_of_every_variant() -> None:
    keys = job_keys()
    assert keys["model.normalize_gates"].variants == ("minlstm",)
    assert keys["model.hidden_size"].variants == ()
    assert (keys["model.hidden_size"].type, keys["model.hidden_size"].range) == ("int", ">= 1, <= 16384")
    assert keys["optim.clip_norm"].type == "float or null"
    assert keys["optim.schedule"].choices == ("constant", "linear", "cosine", "inverse_sqrt", "plateau")
    assert keys["data.name"].required
    assert not keys["data.limit"].required
    assert "_target_" not in keys
    fields = {f.name for cls in variants_of(ModelSpec).values() for f in dataclasses.fields(cls)}
    assert {key.split(".")[1] for key in keys if key.startswith("model.")} == fields


def test_a_constraint_without_a_check_is_an_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Odd:
        size: Annotated[int, Ge(1), MultipleOf(8)] = 8

    Odd.__annotations__["size"] = Annotated[int, Ge(1), MultipleOf(8)]
    with pytest.raises(TypeError, match="MultipleOf"):
        fields_of(Odd)


def test_reference_is_up_to_date(root: Path) -> None:
    written = (root / "conf" / "README.md").read_text("utf-8")
    assert written == config_markdown(), "run: python -m treadle.spec.reference > conf/README.md"


def test_reference_names_every_key_and_option() -> None:
    text = config_markdown()
    assert [key for key in job_keys() if f"| `{key}` |" not in text] == []
    for group in list_groups():
        for option, path in list_options(group).items():
            assert describe_option(path).endswith("."), path
            assert f"| `{group}={option}` |" in text


def test_values_are_shown_short_and_without_secrets() -> None:
    assert show(None) == "null"
    assert show(True) == "true"
    assert show("x" * 100).endswith("...")
    assert "hunter2" not in show("s3://me:hunter2@host")
    assert json.loads(show(3)) == 3


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("hidden", job_keys(), ("model.hidden_size",)),
        ("optm.lr", job_keys(), ("optim.lr",)),
        ("seed", job_keys(), ("split.seed", "train.seed")),
        ("train.sede", job_keys(), ("train.seed",)),
        ("GRU", ["gru", "lstm"], ("gru",)),
        ("min-gru", ["gru", "mingru"], ("mingru",)),
        ("zebra", job_keys(), ()),
        ("", job_keys(), ()),
        ("x", [], ()),
    ],
)
def test_nearest(word: str, known: Any, expected: tuple[str, ...]) -> None:
    assert nearest(word, known) == expected


def test_did_you_mean_reads_as_a_question() -> None:
    assert did_you_mean("lstn", ["lstm"]) == " - did you mean 'lstm'?"
    assert did_you_mean("seed", job_keys()) == " - did you mean 'split.seed' or 'train.seed'?"
    assert did_you_mean("zebra", ["lstm"]) == ""
    assert suggest_key("optimizer.learning_rate", job_keys()) == " - did you mean 'optim.lr'?"


@given(st.text(max_size=12), st.lists(st.text(max_size=8), max_size=6))
def test_nearest_names_known_words_only(word: str, known: list[str]) -> None:
    found = nearest(word, known)
    assert set(found) <= set(known)
    assert len(found) <= 3
    if word in known and word.strip():
        assert word in found or len(found) == 3
