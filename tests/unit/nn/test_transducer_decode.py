"""Greedy, beam and streaming search against loops over every label row and every alignment.

Shape letters: B rows, T time steps, D features, U label positions, V classes.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from treadle.errors import ConfigError
from treadle.nn import GRU, LSTM, RNN, MinGRU, MinLSTM
from treadle.nn.stack import RecurrentStack
from treadle.nn.transducer_decode import StreamingDecoder, transducer_beam, transducer_greedy
from treadle.nn.transducer_model import Joint, Transducer

NUM_CLASSES, FEATURES, LONGEST = 5, 3, 11
FRAMES = [11, 3, 7, 1, 10]


def build(
    seed: int = 0,
    *,
    encoder: type[RecurrentStack] = LSTM,
    num_classes: int = NUM_CLASSES,
    time_reduction: int = 1,
    **options: Any,
) -> Transducer:
    """An untrained model whose scores differ enough to give rows of some labels."""
    model = Transducer(
        encoder(FEATURES * time_reduction, 6, 2, **options),
        GRU(4, 6),
        Joint(16, num_classes),
        time_reduction=time_reduction,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 1.2, generator=generator)
        model.joint.linear.bias.zero_()[0] = 3.0
        model.embedding.weight[0] = 0.0
    return model.double().eval()


def frames(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(len(FRAMES), LONGEST, FEATURES, dtype=torch.float64, generator=generator)


def scores_after(model: Transducer, encoder_TJ: Tensor, labels: list[int]) -> Tensor:
    """log p_TV after the labels, without any carried state."""
    predictor_BUJ = model.predict(torch.tensor([labels], dtype=torch.int64), [len(labels)])
    return model.joint(encoder_TJ[None], predictor_BUJ[:, -1:])[0, :, 0].log_softmax(-1)


def greedy_loop(model: Transducer, x_TD: Tensor, max_symbols: int) -> list[int]:
    encoder_BTJ, (num_steps,) = model.encode(x_TD[None], [len(x_TD)])
    labels: list[int] = []
    for step in range(num_steps):
        for _ in range(max_symbols):
            best = int(scores_after(model, encoder_BTJ[0], labels)[step].argmax())
            if best == 0:
                break
            labels.append(best)
    return labels


@pytest.mark.parametrize("time_reduction", [1, 2, 3])
@pytest.mark.parametrize("max_symbols", [1, 2, 5])
@torch.no_grad()
def test_greedy_takes_the_likeliest_class_at_every_turn(time_reduction: int, max_symbols: int) -> None:
    num_labels, num_turns = 0, 0
    for seed in range(4):
        model, x_BTD = build(seed, time_reduction=time_reduction), frames(seed)
        expected = [greedy_loop(model, x_TD[:n], max_symbols) for x_TD, n in zip(x_BTD, FRAMES, strict=True)]
        for row, num_frames in enumerate(FRAMES):
            x_BTD[row, num_frames:] = torch.nan
        assert transducer_greedy(model, x_BTD, FRAMES, max_symbols=max_symbols) == expected
        num_labels += sum(map(len, expected))
        num_turns += max_symbols * sum(model.encoded_lengths(FRAMES))
    assert 0.1 < num_labels / num_turns < 0.9  # neither blanks alone nor labels alone


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    model, x_BTD = build(seed), frames(seed)
    found = transducer_beam(model, x_BTD, FRAMES, beam=1, max_symbols=3)
    assert [list(best.labels) for (best,) in found] == transducer_greedy(model, x_BTD, FRAMES, max_symbols=3)


def log_prob_of(model: Transducer, x_TD: Tensor, labels: tuple[int, ...], max_symbols: int) -> float:
    """The log-probability of all alignments of the labels, with so many labels a time step at most."""
    targets_BU = torch.tensor([labels], dtype=torch.int64)
    logits_BTUV = model(x_TD[None], [len(x_TD)], targets_BU, [len(labels)])
    log_p = logits_BTUV[0].log_softmax(-1).tolist()
    ways = []
    for counts in itertools.product(range(max_symbols + 1), repeat=len(log_p)):
        if sum(counts) != len(labels):
            continue
        way, given = 0.0, 0
        for step, count in enumerate(counts):
            way += sum(log_p[step][u][labels[u]] for u in range(given, given + count)) + log_p[step][given + count][0]
            given += count
        ways.append(math.exp(way))
    return math.log(math.fsum(ways)) if ways else -math.inf


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_a_wide_beam_finds_what_an_exhaustive_search_finds(seed: int) -> None:
    model, x_TD, max_symbols = build(seed, num_classes=3), frames(seed)[0, :3], 2
    rows: list[tuple[int, ...]] = [
        labels for n in range(3 * max_symbols + 1) for labels in itertools.product((1, 2), repeat=n)
    ]
    every = {labels: log_prob_of(model, x_TD, labels, max_symbols) for labels in rows}
    ((*found,),) = transducer_beam(model, x_TD[None], [3], beam=1000, max_symbols=max_symbols)
    assert found[0].labels == max(every, key=every.__getitem__)
    assert {hypothesis.labels for hypothesis in found} == every.keys()
    assert [hypothesis.log_prob for hypothesis in found] == pytest.approx([every[h.labels] for h in found], abs=1e-9)
    assert math.fsum(math.exp(h.log_prob) for h in found) <= 1.0


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_with_room_for_every_label_the_probability_is_the_loss(seed: int) -> None:
    model, x_BTD = build(seed, num_classes=3), frames(seed)[:1, :2]
    (found,) = transducer_beam(model, x_BTD, [2], beam=1000, max_symbols=6)
    checked = [hypothesis for hypothesis in found[:20] if len(hypothesis.labels) <= 6]
    assert checked
    for hypothesis in checked:
        targets_BU = torch.tensor([hypothesis.labels], dtype=torch.int64)
        loss = model.loss_sum(x_BTD, [2], targets_BU, [len(hypothesis.labels)]).item()
        assert hypothesis.log_prob == pytest.approx(-loss, abs=1e-6)


@pytest.mark.parametrize("beam", [2, 4, 8])
@torch.no_grad()
def test_a_beam_holds_the_likeliest_first_and_none_twice(beam: int) -> None:
    model, x_BTD = build(), frames()
    for row, found in enumerate(transducer_beam(model, x_BTD, FRAMES, beam=beam, max_symbols=3)):
        assert len(found) == beam
        assert len({hypothesis.labels for hypothesis in found}) == beam
        log_probs = [hypothesis.log_prob for hypothesis in found]
        assert log_probs == sorted(log_probs, reverse=True)
        for hypothesis in found:
            targets_BU, num_labels = torch.tensor([hypothesis.labels], dtype=torch.int64), len(hypothesis.labels)
            loss = model.loss_sum(x_BTD[row, None, : FRAMES[row]], [FRAMES[row]], targets_BU, [num_labels])
            assert hypothesis.log_prob <= -loss.item() + 1e-9


@torch.no_grad()
def test_a_wider_beam_finds_likelier_labels() -> None:
    """Not so row by row, but in sum over some rows; it fails where hypotheses that took the blank are dropped."""
    sums = dict.fromkeys((1, 2, 4, 8), 0.0)
    for seed in range(6):
        model, x_BTD = build(seed), frames(seed)
        for beam in sums:
            best = [found[0].labels for found in transducer_beam(model, x_BTD, FRAMES, beam=beam, max_symbols=4)]
            targets_BU = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in best], True)
            sums[beam] += model.loss_sum(x_BTD, FRAMES, targets_BU, [len(row) for row in best]).item()
    assert sums[8] < sums[4] < sums[2] < sums[1], sums


@pytest.mark.parametrize("encoder", [RNN, GRU, LSTM, MinGRU, MinLSTM])
@pytest.mark.parametrize("beam", [1, 3])
def test_a_stream_gives_what_the_whole_gives(encoder: type[RecurrentStack], beam: int) -> None:
    model, x_BTD = build(encoder=encoder), frames()
    whole = [found[0] for found in transducer_beam(model, x_BTD, FRAMES, beam=beam, max_symbols=3)]
    assert any(best.labels for best in whole)
    for row, num_frames in enumerate(FRAMES):
        bits = []
        for sizes in ([num_frames], [1] * num_frames, [0, num_frames // 2, num_frames - num_frames // 2, 0]):
            decoder = StreamingDecoder(model, beam=beam, max_symbols=3)
            given = [decoder.feed(piece_TD) for piece_TD in x_BTD[row, :num_frames].split(sizes)]
            assert given[-1] == decoder.labels == decoder.labels_at_end() == list(whole[row].labels)
            bits.append(decoder.state()["log_probs"])
        assert all(torch.equal(log_probs, bits[0]) for log_probs in bits)
        assert bits[0][0].item() == pytest.approx(whole[row].log_prob, abs=1e-9)


@pytest.mark.parametrize("time_reduction", [2, 4])
def test_a_stream_of_grouped_frames(time_reduction: int) -> None:
    num_labels = 0
    for seed, (row, num_frames) in itertools.product(range(3), enumerate(FRAMES)):
        model, x_BTD = build(seed, time_reduction=time_reduction), frames(seed)
        (whole,) = transducer_greedy(model, x_BTD[row, None, :num_frames], [num_frames])
        full = num_frames - num_frames % time_reduction
        num_labels += len(whole)
        for size in (1, 3, 5):
            decoder = StreamingDecoder(model)
            for piece_TD in x_BTD[row, :num_frames].split(size):
                decoder.feed(piece_TD)
            assert decoder.labels_at_end() == whole
            assert decoder.labels_at_end() == whole  # asking changes nothing
            if full:
                assert decoder.labels == transducer_greedy(model, x_BTD[row, None, :full], [full])[0]
    assert num_labels > 10


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_stream_goes_on_from_a_saved_state(cut: int) -> None:
    model, x_TD = build(time_reduction=2, conv_size=3), frames()[0]
    decoder = StreamingDecoder(model, beam=3)
    decoder.feed(x_TD[:cut])
    state = decoder.state()
    labels = json.dumps(state.pop("labels"))
    tensors = safetensors.torch.load(safetensors.torch.save(state))
    decoder.feed(x_TD[cut:])
    other = StreamingDecoder(model, beam=3)
    other.feed(x_TD[5:])  # whatever it held is forgotten
    other.restore({**tensors, "labels": json.loads(labels)})
    other.feed(x_TD[cut:])
    assert other.labels_at_end() == decoder.labels_at_end()
    for name, part in decoder.state().items():
        again = other.state()[name]
        assert torch.equal(again, part) if isinstance(part, Tensor) else again == part, name


def test_a_state_is_a_value_that_feeding_does_not_change() -> None:
    model, x_TD = build(), frames()[0]
    decoder = StreamingDecoder(model, beam=3)
    decoder.feed(x_TD[:5])
    state = decoder.state()
    copy = {name: part.clone() if isinstance(part, Tensor) else [*part] for name, part in state.items()}
    first = decoder.feed(x_TD[5:])
    for name, part in copy.items():
        assert torch.equal(part, state[name]) if isinstance(part, Tensor) else part == state[name], name
    decoder.restore(state)
    assert decoder.feed(x_TD[5:]) == first


def test_nothing_fed_gives_nothing() -> None:
    decoder = StreamingDecoder(build(), beam=2)
    assert decoder.labels == decoder.labels_at_end() == decoder.feed(frames()[0, :0]) == []


def test_refuses_what_does_not_fit() -> None:
    model, x_BTD = build(), frames()
    with pytest.raises(ConfigError, match="bidirectional encoder"):
        StreamingDecoder(build(bidirectional=True))
    with pytest.raises(ConfigError, match="beam, max_symbols: got 0, 10"):
        transducer_beam(model, x_BTD, FRAMES, beam=0)
    with pytest.raises(ConfigError, match="beam, max_symbols: got 1, 0"):
        transducer_greedy(model, x_BTD, FRAMES, max_symbols=0)
    with pytest.raises(ConfigError, match=r"frames_TD: got shape \(4, 2\), expected \(time steps, 3\)"):
        StreamingDecoder(model).feed(torch.zeros(4, 2))
    decoder = StreamingDecoder(model)
    with pytest.raises(ConfigError, match="state: got"):
        decoder.restore({"labels": [[]]})
    for decode in (transducer_greedy, transducer_beam):
        with pytest.raises(ConfigError, match=r"expected model.eval\(\)"):
            decode(model.train(), x_BTD, FRAMES)
