"""Errors: they cross processes whole, and say what machines branch on."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import treadle.errors as module
from treadle.errors import (
    ConfigError,
    InternalError,
    OverloadError,
    RequestError,
    TransientError,
    TreadleError,
    did_you_mean,
    error_from_json,
    nearest,
)

CLASSES = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, TreadleError)]
LEAVES = [cls for cls in CLASSES if cls is not TreadleError]


def made(cls):
    more = {"status": 413} if cls is RequestError else {}
    return cls("x: got 1, expected 2", hint="x=2", **more, rows=[1, 2], where={"a": None})


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_pickle_with_all_their_fields(cls):
    error = made(cls)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (again.message, again.hint, again.context) == (error.message, error.hint, error.context)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize("cls", LEAVES)
def test_errors_survive_json(cls):
    error = made(cls)
    again = error_from_json(json.loads(json.dumps(error.to_json())))
    assert type(again) is cls
    assert again.to_json() == error.to_json()


def test_an_unknown_error_is_internal():
    again = error_from_json({"error": "KeyboardInterrupt", "message": "m"})
    assert type(again) is InternalError
    assert str(again) == "m"
    assert error_from_json({}).exit_code == 70


def test_every_error_is_public():
    assert {cls.__name__ for cls in CLASSES} <= set(module.__all__)


def test_exit_codes_tell_the_reactions_apart():
    codes = {cls.__name__: cls.exit_code for cls in LEAVES}
    assert codes == {
        "ConfigError": 2,
        "InfeasibleError": 3,
        "DataError": 4,
        "DivergenceError": 5,
        "IntegrityError": 6,
        "ConflictError": 7,
        "NotFoundError": 8,
        "RequestError": 2,
        "TransientError": 75,
        "OverloadError": 75,
        "PreemptedError": 76,
        "InternalError": 70,
    }
    assert {cls.__name__ for cls in LEAVES if cls.retry} == {"TransientError", "OverloadError", "PreemptedError"}


def test_families():
    assert issubclass(OverloadError, TransientError)
    with pytest.raises(ConfigError):
        raise module.InfeasibleError("no place")


def test_the_hint_is_a_line_of_its_own():
    assert str(ConfigError("a", hint="b")) == "a\nhint: b"
    assert str(ConfigError("a")) == "a"


def test_a_request_error_has_a_status():
    assert RequestError("m").status == 422
    assert made(RequestError).status == 413
    assert made(RequestError).to_json()["context"]["status"] == 413


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("model.hiden_size", " - did you mean 'model.hidden_size'?"),
        ("hidden-size", " - did you mean 'model.hidden_size'?"),
        ("optm.lr", " - did you mean 'optim.lr'?"),
        ("LR", " - did you mean 'optim.lr'?"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_did_you_mean(word, found):
    assert did_you_mean(word, ["model.hidden_size", "optim.lr", "train.epochs"]) == found


def test_nothing_known_is_nothing_near():
    assert nearest("x", []) == ()


@given(st.text(max_size=12), st.lists(st.text(max_size=12), max_size=6))
def test_nearest_gives_known_words_and_finds_the_word_itself(word, known):
    found = nearest(word, known)
    assert set(found) <= set(known)
    assert len(found) <= 3
    if word.strip() and word in known:
        assert word in nearest(word, known, at_least=0.0)
