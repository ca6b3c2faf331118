"""Which number format a matrix product runs in under autocast.

A CPU without bf16 arithmetic runs a bf16 product in a slow loop: 38 times slower than fp32 on one with AVX2 only.
There, layers keep the products in fp32 and only store what they give out in bf16.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["low_precision_where_fast", "stored_dtype", "without_autocast"]


@functools.cache
def _cpu_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels of `dtype` for this CPU."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,  # noqa: SLF001
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,  # noqa: SLF001
    }
    return bool(supported[dtype]()) if dtype in supported else True


def stored_dtype(x: Tensor) -> torch.dtype:
    """The format of a layer's values beside input `x`: that of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off for the device of `x`; costs nothing where it is off anyway, which single steps notice."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


_NOTHING = contextlib.nullcontext()


def low_precision_where_fast(x: Tensor) -> contextlib.AbstractContextManager[torch.dtype]:
    """Within it, autocast is off where this machine has no arithmetic in its format.

    Gives the format to put inputs of matrix products in.
    """
    device = x.device.type
    if device == "cpu" and torch.is_autocast_enabled(device) and not _cpu_has(torch.get_autocast_dtype(device)):
        return _fp32_products(device)
    return contextlib.nullcontext(x.dtype)


@contextlib.contextmanager
def _fp32_products(device: str) -> Iterator[torch.dtype]:
    with torch.autocast(device, enabled=False):
        yield torch.float32
