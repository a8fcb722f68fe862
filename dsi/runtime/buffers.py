"""The memory behind a cache layer: tensors [B, heads, capacity, head_dim] of which the first positions are filled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# positions that a fresh layer has room for when nobody said how many will come
FIRST_CAPACITY = 64


def moved(buffer: Tensor, length: int, capacity: int) -> Tensor:
    """A new buffer with the first `length` positions of `buffer`."""
    new = empty_as(buffer, capacity)
    new.narrow(2, 0, length).copy_(buffer.narrow(2, 0, length))
    return new


def empty_as(like: Tensor, capacity: int) -> Tensor:
    """A buffer of the rows, heads, head size, dtype and device of `like`, with nothing in it."""
    batch, heads, _, width = like.shape
    # one that inference mode made could not be written to outside, as a capture does
    with torch.inference_mode(False):
        return torch.empty(batch, heads, capacity, width, dtype=like.dtype, device=like.device)


def cut(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """The start of flat memory as a buffer of this shape."""
    return flat[: math.prod(shape)].view(*shape)
