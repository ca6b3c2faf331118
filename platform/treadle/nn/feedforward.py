"""The feed-forward layer that stands between recurrent or attention layers. Any leading shape, D features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """up, GELU, down, on normalised (RMS) input, frame by frame; the caller adds the residual.

    Args:
        width: features D in and out.
        expansion: hidden features, in widths.
        dropout: share of hidden and of output values zeroed while training.
    """

    def __init__(self, width: int, expansion: float, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = max(1, round(width * expansion))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Explicitly in the weights' format: beside bf16 inputs torch warns and leaves its fused kernel.
        hidden = functional.gelu(self.up(self.norm(x.to(self.norm.weight.dtype))))
        return self.dropout(self.down(self.dropout(hidden))).to(x.dtype)
