"""Large new tensors in host memory.

Filling new memory takes longer than copying, page by page. numpy asks the system for huge pages, and torch does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

_LARGE_BYTES = 4 << 20


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor, row-major; never an inference tensor, which no other thread could fill."""
    num_bytes = prod(shape) * dtype.itemsize
    with torch.inference_mode(mode=False):
        if num_bytes < _LARGE_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.from_numpy(np.empty(num_bytes, np.uint8)).view(dtype).view(tuple(shape))


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor of any device."""
    return empty(tensor.shape, tensor.dtype).copy_(tensor.detach())
