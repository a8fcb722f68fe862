"""Token positions that a kernel reads: a Python int, or integers on the device, so one CUDA graph serves all steps.

A position is an int, an int32 or int64 tensor [] for the whole batch, or one [B] with a position a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._triton import tl, triton

INTEGERS = (torch.int32, torch.int64)


def position_stride(op: str, name: str, value: int | Tensor, batch: int, device: torch.device) -> int:
    """How far apart two rows' positions lie, as read_position takes it: -1 for an int, 0 for one tensor element.

    Raises:
        ValueError: the tensor is not of integers, not [] or [batch], or not on the device.
    """
    if isinstance(value, int):
        return -1
    if value.dtype not in INTEGERS:
        raise ValueError(f"{op}: {name} is {value.dtype}; an int, or a tensor of int32 or int64, will do")
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != batch):
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; () or ({batch},), one a row, will do")
    if value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, the other operands on {device}")
    return value.stride(0) if value.ndim else 0


def positions_reference(value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """The same as a tensor [batch] of int64."""
    return torch.as_tensor(value, dtype=torch.int64, device=device).expand(batch)


@triton.jit
def read_position(value, row, STRIDE: tl.constexpr) -> tl.tensor:
    """The position of a batch row, int64; STRIDE is position_stride's."""
    # a cast of the load's result alone: which of the two it is, is decided when the kernel is compiled
    if STRIDE >= 0:
        value = tl.load(value + row.to(tl.int64) * STRIDE)
    return tl.cast(value, tl.int64)
