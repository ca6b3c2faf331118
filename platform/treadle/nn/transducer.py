"""The RNN-transducer's loss: minus the log-probability of label rows, summed over every alignment.

Shape letters: B rows, T time steps, U label positions (a row of n labels has n + 1: position u has given
u labels), V classes (the blank, 0, and labels 1 to V - 1), D features, E the two edges that leave a
cell (blank, label), S = T + U - 1 anti-diagonals, C time steps of a chunk.

A cell (t, u) is left by a blank, to the next time step, or by the next label, to the next position. All
cells of one anti-diagonal t + u depend on the one before it only, so the sums over alignments take S
steps whatever U is. The lattice has no class axis, so it can afford float64: in fp32 the gradient's
error grows with the loss (tests/bench/transducer.py prints both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from treadle.errors import ConfigError, DataError
from treadle.nn.checks import refuse
from treadle.nn.losses import BLANK
from treadle.nn.rows import Lengths

__all__ = ["read_labels", "transducer_loss_from_joint", "transducer_loss_sum"]

# Not -inf, whose differences are NaN, and far below what a path of real edges can reach (fp32 scores
# of 3e38 over 1e5 edges), so that no closed path outweighs an open one.
_CLOSED = -1e200

# Numbers of the class axis held at once beside logits and their gradient: 1 to 2 MB stay in a CPU's cache.
_PIECE_CPU, _PIECE_DEVICE = 2**19, 2**25


def transducer_loss_sum(
    logits_BTUV: Tensor, targets_BU: Tensor, frame_lengths: Lengths, target_lengths: Lengths
) -> Tensor:
    """Negative log-likelihood of the targets, summed over rows, in fp32 (float64 beside float64).

    Source: Graves 2012, arXiv 1211.3711, sections 2.4 and 2.5.

    Args:
        logits_BTUV: scores before the softmax of every label position at every time step, any float
            format. What stands beyond a row's lengths is neither read nor given a gradient.
        targets_BU: labels from 1, [B, U - 1]; what stands beyond a row's labels is not read. They are
            checked where they stand on the CPU.
        frame_lengths: frames of each row, 1 to T, on the CPU. A row may have fewer frames than labels.
        target_lengths: labels of each row, 0 to U - 1, on the CPU.

    Returns:
        A scalar; infinite where scores of -inf leave a row no alignment. It is differentiable once.

    Raises:
        ConfigError: shapes that do not fit, or lengths on a device.
        DataError: a length out of range or a label that is no class or the blank; the message names row
            and position.

    Cost: 1 to 3 times a log_softmax of the logits and its backward pass on the CPU, 4 S small operations
    on [B, U] among it (tests/bench/transducer.py). Memory: the gradient of the logits, about 56 bytes a cell
    while the loss is computed, 8 a cell until the backward pass.
    Accuracy: gradients within 1e-6 of float64's at a loss of 5,000, from fp32 logits
    (tests/unit/nn/test_transducer.py).
    """
    if logits_BTUV.ndim != 4 or not logits_BTUV.is_floating_point():
        seen = f"{logits_BTUV.dtype} of shape {tuple(logits_BTUV.shape)}"
        raise ConfigError(f"logits_BTUV: got {seen}, expected floats (rows, time steps, labels + 1, classes)")
    num_rows, num_steps, num_positions, _ = logits_BTUV.shape
    shape_BTU = (num_rows, num_steps, num_positions)
    grid = _Grid.of(targets_BU, frame_lengths, target_lengths, shape_BTU, logits_BTUV.device)
    scores_EBTU = _edge_scores(logits_BTUV, grid, slice(None))
    return _AlignmentLoss.apply(scores_EBTU, grid)  # type: ignore[no-any-return]


def transducer_loss_from_joint(
    encoder_BTD: Tensor,
    predictor_BUD: Tensor,
    joint: Callable[[Tensor, Tensor], Tensor],
    targets_BU: Tensor,
    frame_lengths: Lengths,
    target_lengths: Lengths,
    *,
    chunk_frames: int = 32,
) -> Tensor:
    """`transducer_loss_sum` of `joint(encoder_BTD, predictor_BUD)`, of which only a chunk exists at a time.

    The joint runs once forward, keeping two scores a cell, and again, chunk by chunk, backward.

    Args:
        encoder_BTD: the encoder's output; what stands beyond a row's frames is not read.
        predictor_BUD: the prediction network's output, one more than there are labels.
        joint: gives logits [B, chunk_frames, U, V] from a chunk of `encoder_BTD` and `predictor_BUD`; its
            parameters get their gradients. Each time step must be scored on its own.
        targets_BU: as `transducer_loss_sum` takes them, and the lengths too.
        chunk_frames: time steps scored at once.

    Returns:
        The same scalar.

    Raises:
        ConfigError, DataError: as `transducer_loss_sum` does.

    Cost: one more forward of the joint. Memory: logits and their gradient for `chunk_frames` time steps
    in place of T.
    """
    shapes = (tuple(encoder_BTD.shape), tuple(predictor_BUD.shape))
    if [len(shape) for shape in shapes] != [3, 3] or shapes[0][0] != shapes[1][0] or chunk_frames < 1:
        seen = f"shapes {shapes[0]} and {shapes[1]}, chunk_frames {chunk_frames}"
        raise ConfigError(f"encoder_BTD, predictor_BUD: got {seen}, expected [B, T, D], [B, U, D] and at least 1")
    (num_rows, num_steps, _), (_, num_positions, _) = shapes
    shape_BTU = (num_rows, num_steps, num_positions)
    grid = _Grid.of(targets_BU, frame_lengths, target_lengths, shape_BTU, encoder_BTD.device)
    # Left as they are, a NaN beyond a row's lengths would reach the joint's weights as 0 * NaN.
    encoder_BTD = encoder_BTD.masked_fill(~grid.valid_BTU[:, :, :1], 0.0)
    predictor_BUD = predictor_BUD.masked_fill(~grid.valid_BTU[:, 0, :, None], 0.0)

    def chunk_scores(encoder_BCD: Tensor, predictor_BUD: Tensor, start: int) -> Tensor:
        logits_BCUV = joint(encoder_BCD, predictor_BUD)
        expected = (*encoder_BCD.shape[:2], num_positions)
        if logits_BCUV.shape[:-1] != expected:
            raise ConfigError(f"joint: got shape {tuple(logits_BCUV.shape)}, expected {(*expected, 'classes')}")
        return _edge_scores(logits_BCUV, grid, slice(start, start + encoder_BCD.shape[1]))

    scores = [
        checkpoint(chunk_scores, chunk_BCD, predictor_BUD, index * chunk_frames, use_reentrant=False)
        for index, chunk_BCD in enumerate(encoder_BTD.split(chunk_frames, dim=1))
    ]
    return _AlignmentLoss.apply(torch.cat(scores, dim=2), grid)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Which cells belong to the rows' lattices, and which label leaves each position; on the device.

    Args:
        next_BU: the label that leaves a position; the blank where there is none.
        labels_B: labels of each row.
        valid_BTU: True on the cells of a row's lattice.
        open_EBTU: True on the edges of a row's lattice.
        past_SBU: True at the last label position from the time step after the last on.
        is_full: whether every cell is known to be valid.
        targets_BU: as they were given, and `target_lengths` beside them, to name a label that is no class.
    """

    next_BU: Tensor
    labels_B: Tensor
    valid_BTU: Tensor
    open_EBTU: Tensor
    past_SBU: Tensor
    is_full: bool
    targets_BU: Tensor
    target_lengths: Lengths

    @classmethod
    def of(
        cls,
        targets_BU: Tensor,
        frame_lengths: Lengths,
        target_lengths: Lengths,
        shape_BTU: tuple[int, int, int],
        device: torch.device,
    ) -> _Grid:
        num_rows, num_steps, num_positions = shape_BTU
        if 0 in shape_BTU:
            raise DataError(f"batch: got shape {shape_BTU}, expected at least one row, time step and label position")
        if targets_BU.shape != (num_rows, num_positions - 1):
            expected = f"({num_rows}, {num_positions - 1}), one less than label positions"
            raise ConfigError(f"targets_BU: got shape {tuple(targets_BU.shape)}, expected {expected}")
        next_BU = functional.pad(_to(read_labels(targets_BU, target_lengths), device), (0, 1), value=BLANK)
        frames = _host_lengths("frame_lengths", frame_lengths, num_rows, 1, num_steps)
        labels = _host_lengths("target_lengths", target_lengths, num_rows, 0, num_positions - 1)
        frames_B, labels_B = (_to(torch.tensor(lengths), device) for lengths in (frames, labels))
        step_T, position_U, diagonal_S = (
            torch.arange(size, device=device) for size in (num_steps, num_positions, num_steps + num_positions - 1)
        )
        has_next_BU = position_U < labels_B[:, None]
        on_time_BT1 = (step_T < frames_B[:, None])[..., None]
        valid_BTU = on_time_BT1 & (position_U <= labels_B[:, None])[:, None]
        past_SB = diagonal_S[:, None] >= frames_B + labels_B
        return cls(
            next_BU=next_BU,
            labels_B=labels_B,
            valid_BTU=valid_BTU,
            open_EBTU=torch.stack((valid_BTU, on_time_BT1 & has_next_BU[:, None])),
            past_SBU=past_SB[..., None] & (position_U == labels_B[:, None]),
            is_full=min(frames) == num_steps and min(labels) == num_positions - 1,
            targets_BU=targets_BU,
            target_lengths=target_lengths,
        )


def read_labels(targets_BU: Tensor, target_lengths: Lengths, num_classes: int | None = None) -> Tensor:
    """Targets with the blank wherever there is no label of a row, int64.

    Args:
        targets_BU: labels from 1, padded with anything.
        target_lengths: labels of each row, on the CPU.
        num_classes: labels and the blank; where given, targets on the CPU are checked.

    Raises:
        ConfigError: targets of another shape or kind.
        DataError: a length out of range, or a label that is no class or the blank; the message names its place.
    """
    if targets_BU.ndim != 2 or targets_BU.is_floating_point():
        seen = f"{targets_BU.dtype} of shape {tuple(targets_BU.shape)}"
        raise ConfigError(f"targets_BU: got {seen}, expected whole numbers (rows, labels)")
    num_rows, most = targets_BU.shape
    lengths = _host_lengths("target_lengths", target_lengths, num_rows, 0, most)
    lengths_B = _to(torch.tensor(lengths, dtype=torch.int64), targets_BU.device)
    given_BU = torch.arange(most, device=targets_BU.device) < lengths_B[:, None]
    if num_classes is not None:
        rule = f"a label from 1 to {num_classes - 1} ({BLANK} is the blank)"
        refuse("targets_BU", targets_BU, lambda x_BU: given_BU & ((x_BU <= BLANK) | (x_BU >= num_classes)), rule)
    return targets_BU.to(torch.int64).masked_fill(~given_BU, BLANK)


def _host_lengths(name: str, lengths: Lengths, num_rows: int, least: int, most: int) -> list[int]:
    if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
        raise ConfigError(
            f"{name}: got a tensor on {lengths.device}, expected one on the CPU",
            hint="keep lengths on the host; reading them back would stall the device",
        )
    host: list[int] = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if len(host) != num_rows:
        raise ConfigError(f"{name}: got {len(host)} lengths, expected {num_rows}, one a row")
    for row, length in enumerate(host):
        if not least <= length <= most:
            raise DataError(f"{name}[{row}]: got {length}, expected {least} to {most}")
    return host


def _to(part: Tensor, device: torch.device) -> Tensor:
    # A copy from memory that is not pinned waits for the device.
    pinned = part.pin_memory() if device.type == "cuda" and part.device.type == "cpu" else part
    return pinned.to(device, non_blocking=True)


def _edge_scores(logits_BTUV: Tensor, grid: _Grid, steps: slice) -> Tensor:
    """log p(blank) and log p(next label) of every cell of the given time steps; no sense beyond a row's lengths."""
    read_labels(grid.targets_BU, grid.target_lengths, logits_BTUV.shape[-1])
    valid_BTU = None if grid.is_full else grid.valid_BTU[:, steps]
    return _EdgeScores.apply(logits_BTUV, grid.next_BU, valid_BTU)  # type: ignore[no-any-return]


class _EdgeScores(torch.autograd.Function):
    """[2, B, T, U], in fp32 or wider. Nothing of the logits' size is kept but the logits."""

    @staticmethod
    def forward(ctx: Any, logits_BTUV: Tensor, next_BU: Tensor, valid_BTU: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits_BTUV, next_BU, valid_BTU)
        dtype = torch.promote_types(logits_BTUV.dtype, torch.float32)
        scores_EBTU = logits_BTUV.new_empty((2, *logits_BTUV.shape[:3]), dtype=dtype)
        for rows, steps in _pieces(logits_BTUV):
            log_p = torch.log_softmax(logits_BTUV[rows, steps], dim=-1, dtype=dtype)
            scores_EBTU[0, rows, steps] = log_p[..., BLANK]
            scores_EBTU[1, rows, steps] = log_p.gather(-1, _label_index(next_BU[rows], log_p))[..., 0]
        return scores_EBTU

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _refuse_second_order()
        (grad_EBTU,) = grads
        logits_BTUV, next_BU, valid_BTU = ctx.saved_tensors
        dlogits_BTUV = logits_BTUV.new_empty(logits_BTUV.shape)  # contiguous, whatever the logits are
        dtype = grad_EBTU.dtype
        in_place = dtype == dlogits_BTUV.dtype
        for rows, steps in _pieces(logits_BTUV):
            grad_blank, grad_label = grad_EBTU[:, rows, steps].unbind(0)
            # d log p(k) / d logits is one at k minus the softmax; the product with it is written over the softmax.
            piece = dlogits_BTUV[rows, steps] if in_place else logits_BTUV.new_empty(0, dtype=dtype)
            torch.softmax(logits_BTUV[rows, steps], -1, dtype, out=piece)
            piece.mul_(-(grad_blank + grad_label)[..., None])
            piece[..., BLANK] += grad_blank
            piece.scatter_add_(-1, _label_index(next_BU[rows], piece), grad_label[..., None])
            if valid_BTU is not None:
                _zero_cells(piece, ~valid_BTU[rows, steps])
            if not in_place:
                dlogits_BTUV[rows, steps] = piece
        return dlogits_BTUV, None, None


def _pieces(x_BTUV: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and time steps to work on at once."""
    num_rows, num_steps, num_positions, num_classes = x_BTUV.shape
    numbers = _PIECE_CPU if x_BTUV.device.type == "cpu" else _PIECE_DEVICE
    steps = max(1, numbers // (num_positions * num_classes))
    rows = max(1, steps // num_steps)
    for row in range(0, num_rows, rows):
        for step in range(0, num_steps, steps):
            yield slice(row, row + rows), slice(step, step + steps)


def _label_index(next_BU: Tensor, piece_BTUV: Tensor) -> Tensor:
    return next_BU[:, None, :, None].expand(*piece_BTUV.shape[:3], 1)


def _zero_cells(x_BTUV: Tensor, where_BTU: Tensor) -> None:
    """Zeros, whatever stood there (NaN too)."""
    if x_BTUV.device.type == "cpu":  # masked_fill_ over the class axis takes as long as the softmax here
        x_BTUV.view(-1, x_BTUV.shape[-1]).index_fill_(0, where_BTU.flatten().nonzero()[:, 0], 0.0)
    else:
        x_BTUV.masked_fill_(where_BTU[..., None], 0.0)


class _AlignmentLoss(torch.autograd.Function):
    """Minus the log of the summed probability of all alignments, from the scores of the edges.

    The gradient makes no sense beyond a row's lengths; `_EdgeScores` takes none from there.
    """

    @staticmethod
    def forward(ctx: Any, scores_EBTU: Tensor, grid: _Grid) -> Tensor:
        edges_SEBU = _skewed(scores_EBTU.detach(), grid)
        alpha_SBU = _forward_sums(edges_SEBU)
        log_p_B = alpha_SBU[-1].gather(1, grid.labels_B[:, None])[:, 0]
        impossible_B = log_p_B < _CLOSED / 2  # only closed edges lead to the end
        if ctx.needs_input_grad[0]:
            shares_SEBU = _add_backward_sums(edges_SEBU, grid)
            shares_SEBU += (alpha_SBU[:-1] - log_p_B.masked_fill(impossible_B, torch.nan)[:, None])[:, None]
            # Scores of 1e30 round by 1e14: a share above 1 would be exp of that.
            shares_EBTU = _cells(shares_SEBU.clamp_(max=0.0).exp_(), scores_EBTU.shape[2])
            ctx.save_for_backward(shares_EBTU.to(scores_EBTU.dtype))
        return -log_p_B.masked_fill(impossible_B, -torch.inf).sum().to(scores_EBTU.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        _refuse_second_order()
        (shares_EBTU,) = ctx.saved_tensors  # of the probability of all alignments: those that take this edge
        return shares_EBTU * -grads[0], None


def _refuse_second_order() -> None:
    # torch's once_differentiable stays silent, and a second derivative zero, where only the scores need one.
    if torch.is_grad_enabled():
        raise ConfigError("create_graph: got True, expected False: the transducer's loss is differentiable once")


def _cells(x_SEBU: Tensor, num_steps: int) -> Tensor:
    """The cells of an anti-diagonal tensor by time step: a view [2, B, T, U]."""
    _, _, num_rows, num_positions = x_SEBU.shape
    diagonal, edge, row, position = x_SEBU.stride()
    return x_SEBU.as_strided(
        (2, num_rows, num_steps, num_positions), (edge, row, diagonal, diagonal + position), x_SEBU.storage_offset()
    )


def _skewed(scores_EBTU: Tensor, grid: _Grid) -> Tensor:
    """Edges by the anti-diagonal that they leave, closed where no row has them.

    From the end of a row on, a free edge leads along its last position, so that every row's sum
    arrives at the last anti-diagonal.
    """
    _, num_rows, num_steps, num_positions = scores_EBTU.shape
    shape = (num_steps + num_positions - 1, 2, num_rows, num_positions)
    edges_SEBU = scores_EBTU.new_full(shape, _CLOSED, dtype=torch.float64)
    cells_EBTU = _cells(edges_SEBU, num_steps)
    cells_EBTU.copy_(scores_EBTU).masked_fill_(~grid.open_EBTU, _CLOSED)
    edges_SEBU[:, 0].masked_fill_(grid.past_SBU, 0.0)
    return edges_SEBU


def _forward_sums(edges_SEBU: Tensor) -> Tensor:
    """alpha [S + 1, B, U]: the log-probability of reaching a cell, from the first.

    Source: Graves 2012, section 2.4, the forward variables.
    """
    num_diagonals, _, num_rows, num_positions = edges_SEBU.shape
    alpha_SBU = edges_SEBU.new_full((num_diagonals + 1, num_rows, num_positions), _CLOSED)
    alpha_SBU[0, :, 0] = 0.0
    # Blanks arrive at the position that they leave, labels one further on: the view writes them there.
    width = num_positions + 1
    arriving = edges_SEBU.new_full((2, num_rows, width), _CLOSED)
    leaving_EBU = arriving.as_strided((2, num_rows, num_positions), (num_rows * width + 1, width, 1))
    blank_BU, label_BU = arriving[..., :-1].unbind(0)
    diagonals = alpha_SBU.unbind(0)
    for edges_EBU, before_BU, after_BU in zip(edges_SEBU.unbind(0), diagonals[:-1], diagonals[1:], strict=True):
        torch.add(edges_EBU, before_BU, out=leaving_EBU)
        torch.logaddexp(blank_BU, label_BU, out=after_BU)
    return alpha_SBU


def _add_backward_sums(edges_SEBU: Tensor, grid: _Grid) -> Tensor:
    """Edges plus beta of where they lead, in place: the log-probability of ending through an edge from its cell.

    Source: Graves 2012, section 2.4, the backward variables.
    """
    _, _, num_rows, num_positions = edges_SEBU.shape
    width = num_positions + 1
    beta = edges_SEBU.new_full((num_rows, width), _CLOSED)
    beta.scatter_(1, grid.labels_B[:, None], 0.0)
    ahead_EBU = beta.as_strided((2, num_rows, num_positions), (1, width, 1))
    beta_BU = beta[:, :-1]
    edges, blanks, labels = edges_SEBU.unbind(0), edges_SEBU[:, 0].unbind(0), edges_SEBU[:, 1].unbind(0)
    for edges_EBU, blank_BU, label_BU in zip(reversed(edges), reversed(blanks), reversed(labels), strict=True):
        edges_EBU.add_(ahead_EBU)
        torch.logaddexp(blank_BU, label_BU, out=beta_BU)
    return edges_SEBU
