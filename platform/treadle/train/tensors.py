"""Tensors out of the bytes of a safetensors file, and many of them at once."""

from __future__ import annotations

from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from treadle.errors import IntegrityError

__all__ = ["listed", "local", "read_tensors"]

listed: Any = torch
"""torch and its operations over lists of tensors (`_foreach_*`), which its types leave out."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over the ranks; any other as it is. The same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read_tensors(data: bytes, *, where: str) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        IntegrityError: not safetensors.
    """
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise IntegrityError(f"{where}: not readable as safetensors ({error})") from None
