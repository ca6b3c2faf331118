"""The RNN-transducer: an encoder of frames, a prediction network over the labels so far, and their joint.

Shape letters: B rows, T time steps, D features, U label positions (one more than labels), J width of the joint,
V classes (the blank, 0, and labels 1 to V - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.errors import ConfigError
from treadle.nn.cell import State
from treadle.nn.losses import BLANK
from treadle.nn.rows import Lengths, Rows
from treadle.nn.stack import RecurrentStack
from treadle.nn.transducer import read_labels, transducer_loss_from_joint, transducer_loss_sum

__all__ = ["Joint", "Transducer"]


class Joint(nn.Module):
    """Scores of the classes from what encoder and prediction network say: linear(tanh(encoder + predictor)).

    Source: Graves et al. 2013, arXiv 1303.5778, on RNN transducers.

    Args:
        hidden_size: width of what is added up, J.
        num_classes: labels and the blank, V.
    """

    def __init__(self, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigError(f"num_classes: got {num_classes}, expected the blank and at least one label")
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.linear = nn.Linear(hidden_size, num_classes)

    def forward(self, encoder_BTJ: Tensor, predictor_BUJ: Tensor) -> Tensor:
        """logits_BTUV, every time step with every label position."""
        return self.score(encoder_BTJ[:, :, None], predictor_BUJ[:, None])

    def score(self, encoder_J: Tensor, predictor_J: Tensor) -> Tensor:
        """Scores [..., V] of pairs whose leading shapes broadcast."""
        return self.linear(torch.tanh(encoder_J + predictor_J))


class Transducer(nn.Module):
    """Labels of frames without an alignment, any number of labels at a time step.

    Source: Graves 2012, arXiv 1211.3711.

    Args:
        encoder: reads the frames; in one direction where decoding is to follow a stream.
        predictor: reads the labels so far, as vectors of its `input_size` that are learned here, after a vector
            of zeros that stands for none. In one direction.
        joint: scores.
        time_reduction: time steps that the encoder reads as one, side by side: its `input_size` is that many
            times the features of a frame. Rows are filled up with zeros.

    Raises:
        ConfigError: a predictor in two directions, or sizes that do not fit.
    """

    def __init__(
        self, encoder: RecurrentStack, predictor: RecurrentStack, joint: Joint, *, time_reduction: int = 1
    ) -> None:
        super().__init__()
        if predictor.bidirectional:
            raise ConfigError(
                "predictor: got a bidirectional stack, expected one direction: labels to come are unknown"
            )
        if not (encoder.batch_first and predictor.batch_first):
            raise ConfigError("encoder, predictor: got batch_first=False, expected True")
        if time_reduction < 1 or encoder.input_size % time_reduction:
            rule = f"1 or more, and a divisor of the encoder's input_size, {encoder.input_size}"
            raise ConfigError(f"time_reduction: got {time_reduction}, expected {rule}")
        self.encoder = encoder
        self.predictor = predictor
        self.joint = joint
        self.time_reduction = time_reduction
        self.embedding = nn.Embedding(joint.num_classes, predictor.input_size, padding_idx=BLANK)
        self.from_encoder = nn.Linear(encoder.output_size, joint.hidden_size)
        self.from_predictor = nn.Linear(predictor.output_size, joint.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, frame_lengths: Lengths, targets_BU: Tensor, target_lengths: Lengths) -> Tensor:
        """logits_BTUV of all label positions, over the encoder's time steps (`encoded_lengths`).

        Args:
            x_BTD: frames; what stands beyond a row's frames is not read.
            frame_lengths: frames of each row, on the CPU.
            targets_BU: labels from 1, [B, U - 1]; what stands beyond a row's labels is not read.
            target_lengths: labels of each row, on the CPU.
        """
        encoder_BTJ, _ = self.encode(x_BTD, frame_lengths)
        return self.joint(encoder_BTJ, self.predict(targets_BU, target_lengths))

    def loss_sum(
        self,
        x_BTD: Tensor,
        frame_lengths: Lengths,
        targets_BU: Tensor,
        target_lengths: Lengths,
        *,
        chunk_frames: int | None = None,
    ) -> Tensor:
        """Negative log-likelihood of the targets, summed over rows; see `transducer_loss_sum`.

        Args:
            x_BTD: frames; what stands beyond a row's frames is not read.
            frame_lengths: frames of each row, on the CPU.
            targets_BU: labels from 1, [B, U - 1]; what stands beyond a row's labels is not read.
            target_lengths: labels of each row, on the CPU.
            chunk_frames: the encoder's time steps scored at once, for less memory; all where None.

        Raises:
            ConfigError: shapes that do not fit.
            DataError: a length or a label out of range; the message names row and position.
        """
        encoder_BTJ, encoded_lengths = self.encode(x_BTD, frame_lengths)
        predictor_BUJ = self.predict(targets_BU, target_lengths)
        if chunk_frames is None:
            logits_BTUV = self.joint(encoder_BTJ, predictor_BUJ)
            return transducer_loss_sum(logits_BTUV, targets_BU, encoded_lengths, target_lengths)
        return transducer_loss_from_joint(
            encoder_BTJ,
            predictor_BUJ,
            self.joint,
            targets_BU,
            encoded_lengths,
            target_lengths,
            chunk_frames=chunk_frames,
        )

    def encode(self, x_BTD: Tensor, frame_lengths: Lengths) -> tuple[Tensor, list[int]]:
        """What the encoder gives the joint, [B, T / time_reduction, J], and the time steps of each row."""
        if self.time_reduction > 1:
            rows = Rows.of_lengths(frame_lengths, device=x_BTD.device, padded=(x_BTD.shape[0], x_BTD.shape[1]))
            x_BTD = self.side_by_side(rows.zeroed(x_BTD))
        lengths = self.encoded_lengths(frame_lengths)
        h_BTH, _ = self.encoder(x_BTD, lengths=lengths, final_state=False)
        return self.from_encoder(h_BTH), lengths

    def encoded_lengths(self, frame_lengths: Lengths) -> list[int]:
        """Time steps of the encoder for rows of so many frames."""
        return [-(-int(length) // self.time_reduction) for length in frame_lengths]

    def side_by_side(self, x_BTD: Tensor) -> Tensor:
        """`time_reduction` frames in one, [B, T / k, k D], with zeros after the last."""
        missing = -x_BTD.shape[1] % self.time_reduction
        return functional.pad(x_BTD, (0, 0, 0, missing)).unflatten(1, (-1, self.time_reduction)).flatten(2)

    def predict(self, targets_BU: Tensor, target_lengths: Lengths) -> Tensor:
        """What the prediction network gives the joint before the first label and after each, [B, U, J]."""
        labels_BU = read_labels(targets_BU, target_lengths, self.joint.num_classes)
        given_BU = functional.pad(labels_BU, (1, 0), value=BLANK).to(self.embedding.weight.device)
        h_BUH, _ = self.predictor(self.embedding(given_BU), final_state=False)
        return self.from_predictor(h_BUH)

    def predict_step(self, labels_B: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The same after one more label [B, J], the blank before the first, and the predictor's state after it."""
        h_BH, state = self.predictor.step(self.embedding(labels_B), state)
        return self.from_predictor(h_BH), state
