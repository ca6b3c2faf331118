"""The labels that a transducer gives: greedy, by beam search, and while frames still arrive.

Shape letters: B rows, T time steps, D features, J width of the joint, V classes, N hypotheses.

All decoders allow `max_symbols` labels at a time step. A beam of 1 is greedy search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treadle.errors import ConfigError
from treadle.nn.cell import State
from treadle.nn.losses import BLANK
from treadle.nn.rows import Lengths
from treadle.nn.transducer_model import Transducer

__all__ = ["Hypothesis", "StreamingDecoder", "transducer_beam", "transducer_greedy"]


@dataclass(frozen=True)
class Hypothesis:
    """Labels and the log-probability of the alignments found for them, which is no more than that of all."""

    labels: tuple[int, ...]
    log_prob: float


@torch.no_grad()
def transducer_greedy(
    model: Transducer, x_BTD: Tensor, frame_lengths: Lengths, *, max_symbols: int = 10
) -> list[list[int]]:
    """The labels of each row when the likeliest class is taken at every turn.

    Args:
        model: in evaluation mode.
        x_BTD: frames; what stands beyond a row's frames is not read.
        frame_lengths: frames of each row, on the CPU.
        max_symbols: labels a time step may give.

    Raises:
        ConfigError: a model in training mode.
    """
    _check(model, beam=1, max_symbols=max_symbols)
    encoder_BTJ, lengths = model.encode(x_BTD, frame_lengths)
    lengths_B = torch.tensor(lengths, device=x_BTD.device)
    predictor_BJ, state = model.predict_step(lengths_B.new_full((len(lengths),), BLANK), None)
    labels: list[list[int]] = [[] for _ in lengths]
    for step, encoder_BJ in enumerate(encoder_BTJ.unbind(1)):
        going_B = step < lengths_B
        for _ in range(max_symbols):
            best_B = model.joint.score(encoder_BJ, predictor_BJ).argmax(-1)
            going_B = going_B & (best_B != BLANK)
            rows_N = going_B.nonzero()[:, 0]
            if len(rows_N) == 0:
                break
            given_N = best_B[rows_N]
            for row, label in zip(rows_N.tolist(), given_N.tolist(), strict=True):
                labels[row].append(label)
            after_NJ, after = model.predict_step(given_N, _at(state, rows_N))
            predictor_BJ = predictor_BJ.index_copy(0, rows_N, after_NJ)
            state = {name: part.index_copy(1, rows_N, after[name]) for name, part in state.items()}
    return labels


@torch.no_grad()
def transducer_beam(
    model: Transducer, x_BTD: Tensor, frame_lengths: Lengths, *, beam: int = 4, max_symbols: int = 10
) -> list[list[Hypothesis]]:
    """Up to `beam` label rows for each row, the likeliest first.

    Time step by time step: each hypothesis takes the blank and, as long as that would be among the `beam`
    likeliest, grows by a label. Alignments of equal labels are added up.

    Source: Graves 2012, arXiv 1211.3711, algorithm 1, with this order of expansion.

    Args:
        model: in evaluation mode.
        x_BTD: frames; what stands beyond a row's frames is not read.
        frame_lengths: frames of each row, on the CPU.
        beam: hypotheses kept.
        max_symbols: labels a time step may give.

    Raises:
        ConfigError: a model in training mode, or no place in the beam.
    """
    _check(model, beam=beam, max_symbols=max_symbols)
    encoder_BTJ, lengths = model.encode(x_BTD, frame_lengths)
    found: list[list[Hypothesis]] = []
    for encoder_TJ, length in zip(encoder_BTJ, lengths, strict=True):
        hypotheses = _Beam.empty(model)
        for encoder_J in encoder_TJ[:length]:
            hypotheses = hypotheses.after(encoder_J, model, beam, max_symbols)
        found.append(hypotheses.ranked())
    return found


class StreamingDecoder:
    """The labels of one row whose frames arrive in pieces of any size.

    The encoder takes one time step at a time, so how the frames are cut changes no bit of the result.

    Args:
        model: in evaluation mode, with an encoder that reads in one direction.
        beam: hypotheses kept; with more than one, labels already given may still change.
        max_symbols: labels a time step may give.

    Raises:
        ConfigError: a bidirectional encoder, a model in training mode, or no place in the beam.
    """

    def __init__(self, model: Transducer, *, beam: int = 1, max_symbols: int = 10) -> None:
        _check(model, beam=beam, max_symbols=max_symbols)
        if model.encoder.bidirectional:
            raise ConfigError("model: got a bidirectional encoder, expected one that reads in one direction")
        self.model = model
        self.beam = beam
        self.max_symbols = max_symbols
        weight = next(model.parameters())
        self._pending_TD = weight.new_zeros((0, model.encoder.input_size // model.time_reduction))
        with torch.no_grad():
            self._encoder_state = model.encoder.initial_state(1)
            self._hypotheses = _Beam.empty(model)

    @torch.no_grad()
    def feed(self, frames_TD: Tensor) -> list[int]:
        """The labels of all frames so far; those that wait for a full group of `time_reduction` are not yet read.

        Raises:
            ConfigError: frames of another shape.
        """
        if frames_TD.ndim != 2 or frames_TD.shape[1] != self._pending_TD.shape[1]:
            expected = f"(time steps, {self._pending_TD.shape[1]})"
            raise ConfigError(f"frames_TD: got shape {tuple(frames_TD.shape)}, expected {expected}")
        frames_TD = torch.cat((self._pending_TD.to(frames_TD), frames_TD))
        num_read = len(frames_TD) - len(frames_TD) % self.model.time_reduction
        self._pending_TD = frames_TD[num_read:].clone()  # not a view that keeps all of them
        self._encoder_state, self._hypotheses = self._read(frames_TD[:num_read])
        return self.labels

    @torch.no_grad()
    def labels_at_end(self) -> list[int]:
        """The labels if no frame follows: frames that wait for a full group are read with zeros after them."""
        return list(self._read(self._pending_TD)[1].ranked()[0].labels)

    @property
    def labels(self) -> list[int]:
        """The likeliest labels so far."""
        return list(self._hypotheses.ranked()[0].labels)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs: tensors, and "labels", a list of lists of integers."""
        encoder = {f"encoder.{name}": part.contiguous() for name, part in self._encoder_state.items()}
        return encoder | self._hypotheses.to_dict() | {"pending": self._pending_TD}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, in this or another process.

        Raises:
            ConfigError: not the state of such a decoder.
        """
        expected = self.state()
        if state.keys() != expected.keys():
            raise ConfigError(f"state: got {sorted(state)}, expected {sorted(expected)}")
        self._encoder_state = {name: state[f"encoder.{name}"] for name in self._encoder_state}
        self._hypotheses = _Beam.of_dict(state)
        self._pending_TD = state["pending"]

    def _read(self, frames_TD: Tensor) -> tuple[State, _Beam]:
        """The state of the encoder and the hypotheses after these frames."""
        model, encoder_state, hypotheses = self.model, self._encoder_state, self._hypotheses
        for x_1D in model.side_by_side(frames_TD[None]).unbind(1):
            h_1H, encoder_state = model.encoder.step(x_1D, encoder_state)
            encoder_J = model.from_encoder(h_1H)[0]
            hypotheses = hypotheses.after(encoder_J, model, self.beam, self.max_symbols)
        return encoder_state, hypotheses


_Done = dict[tuple[int, ...], tuple[float, int]]
"""Labels of hypotheses that have taken the blank, their log-probability, and where they were met."""

_Grown = tuple[float, int, int]
"""A hypothesis to grow: its log-probability with one more label, its place, the label."""


@dataclass(frozen=True, kw_only=True)
class _Beam:
    """Hypotheses between two time steps, the likeliest first; never modified.

    Args:
        labels: of each hypothesis.
        log_probs: of each.
        predictor_NJ: what the prediction network says after those labels.
        state: its state.
    """

    labels: list[tuple[int, ...]]
    log_probs: list[float]
    predictor_NJ: Tensor
    state: State

    @classmethod
    def empty(cls, model: Transducer) -> _Beam:
        """No labels, for certain."""
        start_N = torch.full((1,), BLANK, device=model.embedding.weight.device)
        predictor_NJ, state = model.predict_step(start_N, None)
        return cls(labels=[()], log_probs=[0.0], predictor_NJ=predictor_NJ, state=state)

    def ranked(self) -> list[Hypothesis]:
        return [Hypothesis(labels, log_prob) for labels, log_prob in zip(self.labels, self.log_probs, strict=True)]

    def after(self, encoder_J: Tensor, model: Transducer, width: int, max_symbols: int) -> _Beam:
        """The `width` likeliest after one more time step."""
        met: list[_Beam] = []  # by how many labels they have grown at this time step
        done: _Done = {}
        growing = self
        for num_symbols in range(max_symbols + 1):
            log_p_NV = model.joint.score(encoder_J, growing.predictor_NJ).double().log_softmax(-1)
            first = sum(len(earlier.labels) for earlier in met)
            met.append(growing)
            for place, log_blank in enumerate(log_p_NV[:, BLANK].tolist()):
                labels, log_prob = growing.labels[place], growing.log_probs[place] + log_blank
                known, _ = done.get(labels, (-math.inf, 0))
                done[labels] = (_log_add(known, log_prob), first + place)
            grown = growing.grown(log_p_NV, width) if num_symbols < max_symbols else []
            done, grown = _compete(done, grown, width)
            if not grown:
                break
            growing = growing.advanced(grown, model)
        return _Beam.of_places(met, dict(sorted(done.items(), key=lambda item: -item[1][0])[:width]))

    def grown(self, log_p_NV: Tensor, width: int) -> list[_Grown]:
        """The `width` likeliest ways to add a label."""
        log_probs_N = torch.tensor(self.log_probs, dtype=log_p_NV.dtype, device=log_p_NV.device)
        num_labels = log_p_NV.shape[1] - 1
        log_p_M = (log_probs_N[:, None] + log_p_NV[:, BLANK + 1 :]).flatten()
        values, indices = log_p_M.topk(min(width, len(log_p_M)))
        pairs = zip(values.tolist(), indices.tolist(), strict=True)
        return [(value, index // num_labels, index % num_labels + BLANK + 1) for value, index in pairs]

    def advanced(self, grown: list[_Grown], model: Transducer) -> _Beam:
        """The hypotheses with one more label each."""
        log_probs, places, labels = zip(*grown, strict=True)
        places_N, labels_N = torch.tensor((places, labels), device=self.predictor_NJ.device)
        predictor_NJ, state = model.predict_step(labels_N, _at(self.state, places_N))
        prefixes = [(*self.labels[place], label) for place, label in zip(places, labels, strict=True)]
        return _Beam(labels=prefixes, log_probs=list(log_probs), predictor_NJ=predictor_NJ, state=state)

    @classmethod
    def of_places(cls, met: list[_Beam], done: _Done) -> _Beam:
        """The hypotheses that are done, with what is known of them where they were met."""
        places_N = torch.tensor([place for _, place in done.values()], device=met[0].predictor_NJ.device)
        state = {name: torch.cat([beam.state[name] for beam in met], dim=1) for name in met[0].state}
        return cls(
            labels=list(done),
            log_probs=[log_prob for log_prob, _ in done.values()],
            predictor_NJ=torch.cat([beam.predictor_NJ for beam in met]).index_select(0, places_N),
            state=_at(state, places_N),
        )

    def to_dict(self) -> dict[str, Any]:
        state = {f"predictor.{name}": part for name, part in self.state.items()}
        log_probs_N = torch.tensor(self.log_probs, dtype=torch.float64)
        labels = [list(labels) for labels in self.labels]
        return state | {"labels": labels, "log_probs": log_probs_N, "predicted": self.predictor_NJ}

    @classmethod
    def of_dict(cls, saved: dict[str, Any]) -> _Beam:
        """The inverse of `to_dict`; what else `saved` holds is left alone."""
        prefix = "predictor."
        return cls(
            labels=[tuple(labels) for labels in saved["labels"]],
            log_probs=saved["log_probs"].tolist(),
            predictor_NJ=saved["predicted"],
            state={name.removeprefix(prefix): part for name, part in saved.items() if name.startswith(prefix)},
        )


def _compete(done: _Done, grown: list[_Grown], width: int) -> tuple[_Done, list[_Grown]]:
    """What is done, and of what has grown that which is among the `width` likeliest of both.

    Of equals the one that is done wins, as the blank comes first in an argmax.
    """
    ranked = sorted(
        [(-log_prob, 0, labels) for labels, (log_prob, _) in done.items()]
        + [(-way[0], 1, index) for index, way in enumerate(grown)]
    )[:width]
    kept = [grown[index] for _, is_grown, index in ranked if is_grown and isinstance(index, int)]
    # Growing hypotheses have yet to pay for a blank, so dropping those that have paid would favour long rows:
    # on random models a beam of 8 then found less likely labels than one of 4 does so. A single hypothesis has
    # to choose, though: that is greedy search.
    return ({} if width == 1 and kept else done), kept


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _at(state: State, rows_N: Tensor) -> State:
    return {name: part.index_select(1, rows_N) for name, part in state.items()}


def _check(model: Transducer, *, beam: int, max_symbols: int) -> None:
    if model.training:
        raise ConfigError("model: got one in training mode, expected model.eval()")
    if beam < 1 or max_symbols < 1:
        raise ConfigError(f"beam, max_symbols: got {beam}, {max_symbols}, expected 1 or more")
