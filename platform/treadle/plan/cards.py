"""What planning knows of data and of a place.

Shape letters: N rows of a split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.spec import Signature, TargetKind, TargetPer

__all__ = ["Capacity", "DataCard", "SplitCard"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitCard:
    """The rows of one split, as far as planning needs them.

    Args:
        lengths_N: time steps per row.
        targets_N: targets per row.
        label_frames_N: label frames that a CTC alignment of each row needs: labels plus repeats.
        labels_N: the label of each row where there is one per row, else -1.
        weights_N: what each row counts in the loss.
        num_entities: distinct entities (words, patients, speakers' utterances).
    """

    lengths_N: NDArray[np.int64]
    targets_N: NDArray[np.int64]
    label_frames_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    weights_N: NDArray[np.float32]
    num_entities: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DataCard:
    """A prepared data set, as far as planning needs it."""

    name: str
    digest: str
    signature: Signature
    target: TargetKind
    target_per: TargetPer
    splits: dict[str, SplitCard]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the place offers.

    Args:
        where: its name for messages, such as "this machine" or an address.
        cpus, gpus: whole devices, of all nodes together.
        memory_bytes: of all nodes together, 0 = unknown.
        node_bytes: of the node with the most, which no worker can be above; 0 where there is one node.
    """

    where: str
    cpus: int
    gpus: int
    memory_bytes: int
    node_bytes: int = 0

    @property
    def largest_node_bytes(self) -> int:
        """Memory of the node with the most."""
        return self.node_bytes or self.memory_bytes
