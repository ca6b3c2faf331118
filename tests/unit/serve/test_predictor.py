"""Loading a version, and that an answer does not depend on its neighbours."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import string

import pytest
import torch
from served_models import KINDS, MAX_LENGTH, load, register

from treadle.errors import IntegrityError, NotFoundError
from treadle.serve.predictor import Predictor
from treadle.spec import ServeSpec
from treadle.store import Blobs
from treadle.store.models import ModelDraft
from treadle.store.registry import Registry
from treadle.testing import MemoryBlobs


@pytest.fixture
def blobs() -> Blobs:
    return MemoryBlobs()


def some_inputs(name: str, count: int) -> list:
    rng = random.Random(count)
    lengths = [rng.randint(1, MAX_LENGTH) for _ in range(count)]
    if name == "g2p":
        return ["".join(rng.choices(string.ascii_lowercase, k=n)) for n in lengths]
    if name == "syllables":
        return [rng.choices(["ka", "ta", "na"], k=n) for n in lengths]
    return [[[rng.gauss(0, 3) for _ in range(3)] for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("name", KINDS)
def test_batched_answers_are_those_of_one_at_a_time(blobs, name):
    predictor = load(blobs, name)
    rows = predictor.validate(some_inputs(name, 40))
    batched = predictor.predict(rows)
    single = [predictor.predict([row])[0] for row in rows]
    assert [output.labels for output in batched] == [output.labels for output in single]
    for one, other in zip(batched, single, strict=True):
        assert math.isclose(one.confidence, other.confidence, abs_tol=1e-5)
    assert len({output.labels for output in batched}) > 1, "the model says the same to everything"
    assert len({round(output.confidence, 4) for output in batched}) > 10


def test_what_serving_answers_is_what_training_would(blobs):
    """Frames are scaled as in training: unscaled ones give another answer."""
    predictor = load(blobs, "motion")
    (row,) = predictor.validate([[[3.0, -1.5, 2.0]]])
    network = predictor._network
    scaled = torch.tensor([[[(3.0 - 1) / 2, (-1.5 + 2) / 0.25, (2.0 - 0.5) / 1]]])
    with torch.no_grad():
        expected = network(scaled, torch.tensor([1])).softmax(-1).max()
    assert predictor.predict([row])[0].confidence == pytest.approx(float(expected), abs=1e-6)


def test_huge_numbers_do_not_reach_the_neighbours(blobs):
    predictor = load(blobs, "motion")
    inputs = some_inputs("motion", 5)
    rows = predictor.validate([*inputs, [[3e37, -3e37, 3e37]] * MAX_LENGTH])
    alone = predictor.predict(rows[:5])
    beside = predictor.predict(rows)[:5]
    assert [o.labels for o in alone] == [o.labels for o in beside]
    assert [o.confidence for o in alone] == pytest.approx([o.confidence for o in beside], abs=1e-5)


def test_outputs_as_json(blobs):
    predictor = load(blobs, "motion")
    answer = predictor.predict(predictor.validate([[[1.0, 2.0, 3.0]]]))[0]
    assert answer.to_json() == {
        "label": answer.label,
        "labels": [answer.label],
        "confidence": round(answer.confidence, 6),
    }
    spelled = load(blobs, "g2p")
    assert set(spelled.predict(spelled.validate(["cat"]))[0].to_json()) == {"labels", "confidence"}


def test_no_rows_no_answers(blobs):
    assert load(blobs, "g2p").predict([]) == []


def test_nothing_is_recorded_for_gradients(blobs):
    predictor = load(blobs, "g2p")
    assert not predictor._network.training
    seen = []
    predictor._network.register_forward_hook(
        lambda module, args, out: seen.append((out.requires_grad, out.is_inference()))
    )
    predictor.predict(predictor.validate(["cat"]))
    assert seen == [(False, True)]
    assert torch.get_num_threads() == 1


def test_limits_may_be_given(blobs):
    register(blobs, "g2p", max_rows=7)
    assert Predictor.load(blobs, "g2p").serve.max_rows == 7
    assert Predictor.load(blobs, "g2p", serve=ServeSpec(max_rows=3)).serve.max_rows == 3


def test_the_card_is_json_with_what_callers_need(blobs):
    version = register(blobs, "g2p")
    predictor = Predictor.load(blobs, "g2p")
    predictor.version = dataclasses.replace(version, metrics={"accuracy": 0.75, "loss": math.nan})
    card = json.loads(json.dumps(predictor.card, allow_nan=False))
    assert card["labels"] == list("ABCDEFGH")
    assert card["signature"] == {"input_kind": "tokens", "input_size": 28, "num_labels": 8, "max_length": MAX_LENGTH}
    assert (card["model"], card["version"], card["digest"]) == ("g2p", 1, version.digest)
    assert card["metrics"] == {"accuracy": 0.75, "loss": None}
    assert predictor.validate(card["example"]["inputs"])


def test_an_unknown_model_or_alias(blobs):
    register(blobs, "g2p")
    for ref in ("g2q@production", "g2p@staging", "g2p@9"):
        with pytest.raises(NotFoundError):
            Predictor.load(blobs, ref)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_changed_file_is_not_loaded(blobs, file):
    version = register(blobs, "g2p")
    key = version.files[file].key
    data = bytearray(blobs.get(key))
    data[len(data) // 2] ^= 1
    blobs.put(key, bytes(data))
    with pytest.raises(IntegrityError):
        Predictor.load(blobs, "g2p@production")


def test_a_signature_that_is_not_the_models(blobs):
    version = register(blobs, "g2p")
    draft = {name: getattr(version, name) for name in ("name", "run", "files", "spec_digest", "data_digest")}
    other = Registry(blobs).register(ModelDraft(**draft, signature={**version.signature, "num_labels": 3}))
    with pytest.raises(IntegrityError, match=r"the signature in config\.json"):
        Predictor.load(blobs, str(other))
