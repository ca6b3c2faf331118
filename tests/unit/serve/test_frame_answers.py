"""What models with a target for each frame answer: the next symbol of a text, the label of each frame."""

from __future__ import annotations

import pytest
import served_models
from served_models import MOTION, SPELLING, load

from treadle.spec import GruSpec, LanguageSpec, LstmSpec, MinGruSpec, TagSpec
from treadle.testing import MemoryBlobs

MODELS = {
    "letters": (SPELLING, LstmSpec(hidden_size=16, embedding_size=8), LanguageSpec()),
    "tied": (SPELLING, MinGruSpec(hidden_size=16, embedding_size=8), LanguageSpec(tied=True)),
    "steps": (MOTION, GruSpec(hidden_size=8), TagSpec()),
}


@pytest.fixture
def predictor(request, monkeypatch):
    monkeypatch.setitem(served_models.KINDS, request.param, MODELS[request.param])
    return load(MemoryBlobs(), request.param)


@pytest.mark.parametrize("predictor", ["letters", "tied"], indirect=True)
def test_a_text_is_answered_with_its_next_symbol(predictor):
    rows = predictor.validate(["abc", "x", "hello world".replace(" ", "")])
    batched = predictor.predict(rows)
    for row, output in zip(rows, batched, strict=True):
        (alone,) = predictor.predict([row])
        assert (output.labels, output.confidence) == (alone.labels, pytest.approx(alone.confidence, abs=1e-5))
        answer = output.to_json()
        assert answer["label"] == output.labels[0] in SPELLING.symbols[1:]
        assert answer["labels"] == [answer["label"]]
        shares = list(answer["likeliest"].values())
        assert next(iter(answer["likeliest"])) == answer["label"]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.00001
        assert len(shares) == 5
    assert predictor.card["labels"] == list(SPELLING.symbols)


@pytest.mark.parametrize("predictor", ["steps"], indirect=True)
def test_frames_are_answered_with_a_label_each(predictor):
    frames = [[[0.1 * t, -2.0, 0.5 + t] for t in range(n)] for n in (1, 4, 9)]
    outputs = predictor.predict(predictor.validate(frames))
    assert [len(output.labels) for output in outputs] == [1, 4, 9]
    for given, output in zip(frames, outputs, strict=True):
        (alone,) = predictor.predict(predictor.validate([given]))
        assert output.labels == alone.labels
        assert set(output.labels) <= set(MOTION.labels)
        assert set(output.to_json()) == {"labels", "confidence"}
