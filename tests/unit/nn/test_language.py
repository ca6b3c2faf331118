"""The head of a language model: its softmaxes, and a loss that holds few scores at once."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.errors import ConfigError, DataError
from treadle.nn.language import LanguageModelHead, Softmax

WORDS, SIZE = 20, 16
every_softmax = pytest.mark.parametrize("softmax", ["full", "tied", "projected", "adaptive"])


def make_head(softmax: str, chunk_frames: int | None = None) -> LanguageModelHead:
    torch.manual_seed(0)
    if softmax == "adaptive":
        return LanguageModelHead(SIZE, WORDS, "adaptive", cutoffs=(5, 12), chunk_frames=chunk_frames)
    if softmax == "full":
        return LanguageModelHead(SIZE, WORDS, chunk_frames=chunk_frames)
    embedding = nn.Embedding(WORDS, SIZE if softmax == "tied" else 4)
    return LanguageModelHead(SIZE, WORDS, "tied", embedding=embedding, chunk_frames=chunk_frames)


def make_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    targets_N = torch.randint(0, WORDS, (23,))
    targets_N[[3, 7, 22]] = -1
    return torch.randn(23, SIZE), targets_N


def parameters_of(head: LanguageModelHead) -> list[Tensor]:
    return [*head.parameters(), *(embedding.weight for embedding in head._tied)]


@every_softmax
def test_loss_is_of_the_log_probabilities(softmax: str) -> None:
    head, (h_NH, targets_N) = make_head(softmax), make_batch()
    log_probs_NV = head.log_probs(h_NH)
    assert log_probs_NV.dtype == torch.float32
    torch.testing.assert_close(log_probs_NV.exp().sum(-1), torch.ones(23), rtol=1e-5, atol=0)
    torch.testing.assert_close(head(h_NH).log_softmax(-1), log_probs_NV, rtol=1e-5, atol=1e-6)
    expected = -sum(log_probs_NV[n, k].item() for n, k in enumerate(targets_N.tolist()) if k != -1)
    assert head.loss_sum(h_NH, targets_N).item() == pytest.approx(expected, rel=1e-5)
    shaped = h_NH[:22].view(2, 11, SIZE)
    assert torch.equal(head.log_probs(shaped).view(22, WORDS), head.log_probs(h_NH[:22]))
    torch.testing.assert_close(
        head.loss_sum(shaped, targets_N[:22].view(2, 11)), head.loss_sum(h_NH[:22], targets_N[:22])
    )


@every_softmax
@pytest.mark.parametrize("chunk_frames", [1, 5, 22])
def test_chunks_change_nothing(softmax: str, chunk_frames: int) -> None:
    whole, parts = make_head(softmax), make_head(softmax, chunk_frames=chunk_frames)
    values_NH, targets_N = make_batch()

    def run(head: LanguageModelHead) -> list[Tensor]:
        h_NH = values_NH.clone().requires_grad_()
        loss = head.loss_sum(h_NH, targets_N)
        return [loss.detach(), *torch.autograd.grad(loss, [h_NH, *parameters_of(head)])]

    first = run(whole)
    for expected, got in zip(first, run(parts), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item()))
    with torch.no_grad():
        assert parts.loss_sum(values_NH, targets_N).item() == pytest.approx(first[0].item(), rel=1e-6)


@every_softmax
def test_gradients(softmax: str) -> None:
    head, (h_NH, targets_N) = make_head(softmax, chunk_frames=3).double(), make_batch()
    for embedding in head._tied:
        embedding.double()
    h_NH = h_NH[:7].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head.loss_sum(x, targets_N[:7]), h_NH)


class _Held(TorchDispatchMode):
    """Notes the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
        return result


def test_no_more_than_a_chunk_of_scores_is_held() -> None:
    head = LanguageModelHead(2, 50, chunk_frames=10)
    h_NH, targets_N = torch.randn(300, 2, requires_grad=True), torch.randint(0, 50, (300,))
    saved = 0

    def count(x: Tensor) -> Tensor:
        nonlocal saved
        saved += x.numel() if x.shape[-1:] == (50,) else 0
        return x

    with _Held() as held, torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        loss = head.loss_sum(h_NH, targets_N)
        loss.backward()
    assert held.largest <= 600  # the frames themselves, 300 * 2; a chunk of scores is 10 * 50
    assert saved == 0  # between the passes


def test_default_chunk_is_64_mib() -> None:
    assert LanguageModelHead(1, 50_000).chunk_frames == 335
    assert make_head("full").chunk_frames * WORDS * 4 <= 1 << 26


def test_adaptive_of_one_cluster_is_a_softmax() -> None:
    # One word behind the head: its cluster is that word, so the head's own scores are those of a full softmax.
    torch.manual_seed(0)
    head, (h_NH, targets_N) = LanguageModelHead(SIZE, WORDS, Softmax.adaptive, cutoffs=[WORDS - 1]), make_batch()
    expected = head.adaptive.head(h_NH).log_softmax(-1)
    torch.testing.assert_close(head.log_probs(h_NH), expected, rtol=1e-6, atol=1e-6)
    kept = targets_N != -1
    loss = -expected[kept].gather(1, targets_N[kept, None]).sum()
    torch.testing.assert_close(head.loss_sum(h_NH, targets_N), loss, rtol=1e-6, atol=0)


def test_adaptive_gives_every_parameter_a_gradient() -> None:
    head, (h_NH, _) = make_head("adaptive"), make_batch()
    head.loss_sum(h_NH, torch.zeros(23, dtype=torch.int64)).backward()  # frequent words only
    assert all(parameter.grad is not None for parameter in head.parameters())
    loss = head.loss_sum(h_NH, torch.full((23,), -1))
    assert loss.item() == 0.0
    loss.backward()


@every_softmax
def test_autocast_keeps_the_answer(softmax: str) -> None:
    head, (h_NH, targets_N) = make_head(softmax, chunk_frames=9), make_batch()
    expected = head.loss_sum(h_NH, targets_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss_sum(h_NH.bfloat16(), targets_N)
        assert head.log_probs(h_NH.bfloat16()).dtype == torch.float32
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    loss.backward()
    assert all(parameter.grad is not None for parameter in parameters_of(head))


@every_softmax
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extremes_are_finite(softmax: str, size: float) -> None:
    head, (h_NH, targets_N) = make_head(softmax), make_batch()
    h_NH = (size * h_NH).requires_grad_()
    loss = head.loss_sum(h_NH, targets_N)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, h_NH)[0].isfinite().all()


class _Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.head = LanguageModelHead(SIZE, WORDS, "tied", embedding=self.embedding)


@pytest.mark.parametrize("width", [SIZE, 4])
def test_tied_weights_are_one_tensor(width: int) -> None:
    torch.manual_seed(0)
    model, (h_NH, targets_N) = _Model(width), make_batch()
    names = ["embedding.weight", "head.bias", *(["head.project.weight"] if width == 4 else [])]
    assert list(model.state_dict()) == names
    projected = h_NH if width == SIZE else h_NH @ model.head.project.weight.T  # type: ignore[operator]
    expected = projected @ model.embedding.weight.T / math.sqrt(width)
    torch.testing.assert_close(model.head(h_NH), expected, rtol=1e-5, atol=1e-6)
    model.head.loss_sum(h_NH, targets_N).backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.any()
    # The tie outlives a copy, a change of format and the loading of weights.
    other = copy.deepcopy(model).double()
    assert other.head._tied[0] is other.embedding
    assert other.head(h_NH.double()).dtype == torch.float64
    with torch.no_grad():
        other.embedding.weight.zero_()
    assert not other.head(h_NH.double()).any()
    assert model.head(h_NH).any()
    other.load_state_dict(model.double().state_dict(), assign=True)
    assert torch.equal(other.head(h_NH.double()), model.head(h_NH.double()))


@pytest.mark.parametrize("width", [64, 256])
def test_tied_scores_start_small(width: int) -> None:
    torch.manual_seed(0)
    head = LanguageModelHead(width, 500, "tied", embedding=nn.Embedding(500, width))
    h_NH = torch.randn(200, width).tanh()
    loss = head.loss_sum(h_NH, torch.randint(0, 500, (200,))) / 200
    assert loss.item() == pytest.approx(math.log(500), abs=0.5)  # unscaled: 30 and more


def test_refusals() -> None:
    head, (h_NH, targets_N) = make_head("full"), make_batch()
    targets_N[4] = WORDS
    for bad in (head, make_head("adaptive")):
        with pytest.raises(DataError, match=r"targets_N\[4\]: got 20, expected 0 to 19, or -1 to leave it out"):
            bad.loss_sum(h_NH, targets_N)
    with pytest.raises(ConfigError, match=r"targets_N: got shape \(22,\)"):
        head.loss_sum(h_NH, targets_N[1:])
    embedding = nn.Embedding(WORDS, SIZE)
    with pytest.raises(ConfigError, match=r"softmax: got 'adaptve', expected one of .* did you mean 'adaptive'\?"):
        LanguageModelHead(SIZE, WORDS, "adaptve")
    with pytest.raises(ConfigError, match="embedding: got None, expected the embedding whose weights to share"):
        LanguageModelHead(SIZE, WORDS, "tied")
    with pytest.raises(ConfigError, match=r"embedding: got .*, expected none for softmax='full'"):
        LanguageModelHead(SIZE, WORDS, embedding=embedding)
    with pytest.raises(ConfigError, match="embedding: got 20 vectors, expected 21, one a word"):
        LanguageModelHead(SIZE, 21, "tied", embedding=embedding)
    for cutoffs in ((), (0, 5), (5, 5), (5, WORDS)):
        with pytest.raises(ConfigError, match=r"cutoffs: got .*, expected rising numbers of words from 1 to 19"):
            LanguageModelHead(SIZE, WORDS, "adaptive", cutoffs=cutoffs)
    with pytest.raises(ConfigError, match="cutoffs: got"):
        LanguageModelHead(SIZE, WORDS, cutoffs=(5,))
    with pytest.raises(ConfigError, match="cutoffs: got 2 for 15 features, expected 1 or fewer"):
        LanguageModelHead(15, WORDS, "adaptive", cutoffs=(5, 12))
    with pytest.raises(ConfigError, match="chunk_frames: got 0"):
        LanguageModelHead(SIZE, WORDS, chunk_frames=0)
