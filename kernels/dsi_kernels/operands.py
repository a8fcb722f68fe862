"""What a launcher checks of its operands before it touches memory. Each refusal is a ValueError naming op and operand.

An operand that is None was left out by the caller, and passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._triton import INTERPRETED, require_triton

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_dtypes(op: str, **operands: Tensor | None) -> None:
    """All of one floating dtype that the kernels know: fp16, bf16 or fp32."""
    found = {name: t.dtype for name, t in operands.items() if t is not None}
    first = next(iter(found.values()))
    if first not in FLOATS:
        raise ValueError(f"{op}: {next(iter(found))} is {first}; float16, bfloat16 and float32 will do")
    if any(dtype != first for dtype in found.values()):
        raise ValueError(f"{op}: dtypes differ: " + ", ".join(f"{name} {dtype}" for name, dtype in found.items()))


def check_devices(op: str, **operands: Tensor | None) -> None:
    """All on one device, and on one that a kernel runs on."""
    require_triton(op)
    found = {name: t.device for name, t in operands.items() if t is not None}
    first = next(iter(found.values()))
    if any(device != first for device in found.values()):
        raise ValueError(f"{op}: devices differ: " + ", ".join(f"{name} {device}" for name, device in found.items()))
    if first.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{op}: {next(iter(found))} is on {first}; the kernel runs on CUDA, {op}_reference on any device "
            "(TRITON_INTERPRET=1 before the first import of triton runs the kernel slowly on a CPU, for tests)"
        )


def check_contiguous(op: str, **operands: Tensor | None) -> None:
    """Each one dense, in the order of its axes."""
    for name, t in operands.items():
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, has shape {tuple(t.shape)}, stride {t.stride()}")


def check_rows_contiguous(op: str, **operands: Tensor | None) -> None:
    """Each one dense along its last axis; the other strides are free."""
    for name, t in operands.items():
        if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last axis of {name} must be contiguous, has shape {tuple(t.shape)}, stride {t.stride()}"
            )


def check_row(op: str, name: str, t: Tensor, max_bytes: int) -> None:
    """A row, the last axis, that exists and that one program can hold."""
    if t.ndim == 0 or t.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; a last axis of one element or more is needed")
    if t.shape[-1] * t.element_size() > max_bytes:
        raise ValueError(f"{op}: a row of {t.shape[-1]} x {t.dtype} exceeds {max_bytes} bytes")


def shapes(**operands: Tensor | None) -> str:
    """The operands' shapes for a message: "x (2, 64) and weight (32,)"."""
    known = [f"{name} {tuple(t.shape)}" for name, t in operands.items() if t is not None]
    return " and ".join(filter(None, [", ".join(known[:-1]), known[-1]]))
