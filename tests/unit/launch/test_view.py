"""What a plan says of the model."""

from __future__ import annotations

from treadle.launch.view import _chosen
from treadle.spec import Candidate, GruSpec, MinLstmSpec


def test_layers_are_named_where_they_are_not_as_by_default() -> None:
    assert _chosen(GruSpec(hidden_size=64, num_layers=3, bidirectional=True)) == ""
    model = MinLstmSpec(norm=True, residual=True, conv_size=4, candidate=Candidate.tanh, normalize_gates=False)
    assert _chosen(model) == "residual, norm, conv_size 4, candidate tanh, normalize_gates False"
