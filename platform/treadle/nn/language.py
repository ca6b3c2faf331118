"""The head of a language model: what comes after each frame, over vocabularies large and small.

Shape letters: N frames, H outputs of the stack, E width of the embedding, V words of the vocabulary.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from treadle.errors import ConfigError
from treadle.nn.checks import IGNORED, check_at_least, check_classes, check_rising, member
from treadle.nn.gates import state_dtype
from treadle.nn.rows import Rows

__all__ = ["LanguageModelHead", "Softmax"]

_CHUNK_VALUES = 1 << 24
"""Scores held at once: 64 MiB of fp32."""


class Softmax(enum.Enum):
    """How words get their probabilities."""

    full = "full"
    """A linear layer and a softmax over the vocabulary."""
    tied = "tied"
    """The same with the embedding's own vectors as the weights (Press and Wolf 2017, arXiv 1608.05859)."""
    adaptive = "adaptive"
    """Frequent words first, clusters of rarer ones behind narrower layers (Grave et al. 2017, arXiv 1609.04309)."""


class LanguageModelHead(nn.Module):
    """Scores of the next word at every frame.

    Args:
        input_size: outputs of the stack, H.
        vocabulary_size: V. For the adaptive softmax the words must be numbered from the most frequent on.
        softmax: full, tied or adaptive.
        embedding: for tied, the embedding whose weights to share. It stays a part of the network that holds it: this
            head neither moves it nor saves it a second time. Scores are divided by the square root of its width
            (Raffel et al. 2020, arXiv 1910.10683), without which torch's standard embedding starts at scores of
            that size instead of 1.
        cutoffs: for adaptive, the rising numbers of words at which each further cluster begins.
        chunk_frames: frames whose scores are held at once while the loss is computed; as many as give 64 MiB of
            fp32 where None.

    Raises:
        ConfigError: options that do not fit the softmax, or sizes that do not fit.
    """

    frames_per_step = 1

    def __init__(
        self,
        input_size: int,
        vocabulary_size: int,
        softmax: Softmax | str = Softmax.full,
        *,
        embedding: nn.Embedding | None = None,
        cutoffs: Sequence[int] = (),
        chunk_frames: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least("vocabulary_size", vocabulary_size, 1)
        self.softmax = member(Softmax, "softmax", softmax)
        self.vocabulary_size = vocabulary_size
        self.chunk_frames = max(1, _CHUNK_VALUES // vocabulary_size) if chunk_frames is None else chunk_frames
        check_at_least("chunk_frames", self.chunk_frames, 1)
        _check_options(self.softmax, vocabulary_size, embedding, cutoffs)
        # The layer of each further cluster is 4 times narrower, down to none at all, which torch would build.
        if input_size < 4 ** len(cutoffs):
            most = (input_size.bit_length() - 1) // 2
            raise ConfigError(f"cutoffs: got {len(cutoffs)} for {input_size} features, expected {most} or fewer")
        self._tied: tuple[nn.Embedding, ...] = ()  # a tuple, so that the embedding does not become a part of this
        if self.softmax is Softmax.adaptive:
            self.adaptive = nn.AdaptiveLogSoftmaxWithLoss(input_size, vocabulary_size, list(cutoffs))
        elif embedding is not None:
            width = embedding.embedding_dim
            self._tied = (embedding,)
            self.project = nn.Identity() if width == input_size else nn.Linear(input_size, width, bias=False)
            self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        else:
            self.linear = nn.Linear(input_size, vocabulary_size)

    def forward(self, h_NH: Tensor, rows: Rows | None = None) -> Tensor:
        """Scores whose softmax is the distribution of the next word, [..., V] from [..., H]."""
        del rows
        if self.softmax is Softmax.adaptive:
            return self.log_probs(h_NH)
        if not self._tied:
            return self.linear(h_NH)
        weight_VE = self._tied[0].weight
        return functional.linear(self.project(h_NH) / math.sqrt(weight_VE.shape[1]), weight_VE, self.bias)

    def log_probs(self, h_NH: Tensor) -> Tensor:
        """Log-probabilities of the next word, [..., V] from [..., H], in fp32 (fp64 beside fp64)."""
        if self.softmax is Softmax.adaptive:
            with torch.autocast(h_NH.device.type, enabled=False):
                flat_NH = h_NH.flatten(0, -2).to(self.adaptive.head.weight.dtype)
                log_probs_NV = self.adaptive.log_prob(flat_NH).view(*h_NH.shape[:-1], self.vocabulary_size)
            return log_probs_NV.to(state_dtype(log_probs_NV.dtype))
        logits_NV = self(h_NH)
        return logits_NV.to(state_dtype(logits_NV.dtype)).log_softmax(-1)

    def loss_sum(self, h_NH: Tensor, targets_N: Tensor) -> Tensor:
        """Negative log-likelihood of the next words, summed over frames, in fp32 (fp64 beside fp64).

        Args:
            h_NH: [..., H], outputs of the stack.
            targets_N: [...], the word after each frame; IGNORED (-1) leaves a frame out.

        Raises:
            ConfigError: shapes that do not fit.
            DataError: a word that does not exist; the message names place and value.

        Cost: beyond one chunk of frames the scores are computed again in the backward pass, a third more arithmetic;
        no more than a chunk of them is ever held. The adaptive softmax waits for the device, and runs in
        the weights' own format even under autocast, which torch's module does not bear.
        """
        check_classes("targets_N", targets_N, (*h_NH.shape[:-1], self.vocabulary_size), ignored=IGNORED)
        h_NH, targets_N = h_NH.flatten(0, -2), targets_N.flatten()
        chunks = list(zip(h_NH.split(self.chunk_frames), targets_N.split(self.chunk_frames), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            sums = [self._chunk_loss(*chunk) for chunk in chunks]
        else:
            sums = [
                checkpoint(self._chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
            ]
        return torch.stack([*sums, self._zero(h_NH)]).sum()

    def _chunk_loss(self, h_NH: Tensor, targets_N: Tensor) -> Tensor:
        if self.softmax is Softmax.adaptive:
            with torch.autocast(h_NH.device.type, enabled=False):
                kept_N = targets_N != IGNORED
                log_probs_N = self.adaptive(h_NH.to(self.adaptive.head.weight.dtype)[kept_N], targets_N[kept_N]).output
            return -log_probs_N.to(state_dtype(log_probs_N.dtype)).sum()
        logits_NV = self(h_NH)
        logits_NV = logits_NV.to(state_dtype(logits_NV.dtype))
        return functional.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=IGNORED)

    def _zero(self, h_NH: Tensor) -> Tensor:
        """0 that every parameter takes part in: a batch without rare words must still give their clusters a gradient,
        or ranks of a data-parallel group wait for one another.
        """
        zero = h_NH.new_zeros((), dtype=state_dtype(h_NH.dtype))
        if self.softmax is not Softmax.adaptive:
            return zero
        return zero + sum(parameter[:0].sum() for parameter in self.adaptive.parameters())


def _check_options(
    softmax: Softmax, vocabulary_size: int, embedding: nn.Embedding | None, cutoffs: Sequence[int]
) -> None:
    if (softmax is Softmax.tied) != (embedding is not None):
        rule = (
            "the embedding whose weights to share" if softmax is Softmax.tied else f"none for softmax={softmax.value!r}"
        )
        raise ConfigError(f"embedding: got {embedding}, expected {rule}")
    if embedding is not None and embedding.num_embeddings != vocabulary_size:
        raise ConfigError(f"embedding: got {embedding.num_embeddings} vectors, expected {vocabulary_size}, one a word")
    if softmax is Softmax.adaptive:
        rule = f"rising numbers of words from 1 to {vocabulary_size - 1}"
        check_rising("cutoffs", cutoffs, rule, low=1, high=vocabulary_size - 1)
    elif cutoffs:
        raise ConfigError(f"cutoffs: got {tuple(cutoffs)}, expected none for softmax={softmax.value!r}")
