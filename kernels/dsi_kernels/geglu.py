"""First half of a row times the gelu of its second half, as diffusers' GEGLU has it, for inference (forward only).

    value, gate = x[..., :I], x[..., I:]
    y           = value * gelu(gate)

One program per tile of 2048 elements, 256 of a row. Reads x once and writes y once: 3 * T * I * itemsize bytes, memory
bound.

Casting follows `hidden_states * F.gelu(gate)`: the gelu is computed in fp32 and rounded to the input dtype, the product
is rounded again.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.activations import activate, activate_reference, rounded_kind
from dsi_kernels.add_map import channel_block
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, check_row

BLOCK, COLUMNS = 2048, 256
# the second axis of a CUDA grid has 65535 places
MAX_ROW_BYTES = 65535 * 16 * 2


def geglu_reference(x: Tensor) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    value, gate = x.chunk(2, dim=-1)
    return value * activate_reference(gate, "gelu")


@triton.jit
def _geglu_kernel(
    x_ptr, y_ptr, rows, D, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr
):
    begin(PDL)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = (row < rows)[:, None] & (cols < D)[None, :]
    # int64 before the multiply: T * 2 I passes 2**31 at 128k pixels of width 16384
    at = row.to(tl.int64)[:, None] * D
    value = tl.load(x_ptr + 2 * at + cols[None, :], mask=live, other=0.0)
    gate = tl.load(x_ptr + 2 * at + D + cols[None, :], mask=live, other=0.0)
    a = activate(gate.to(tl.float32), KIND).to(gate.dtype)
    # the product of two halves is exact in fp32, so this rounds as a multiply in their own dtype does
    y = value.to(tl.float32) * a.to(tl.float32)
    tl.store(y_ptr + at + cols[None, :], y.to(gate.dtype), mask=live)


def geglu(x: Tensor) -> Tensor:
    """The first half of the last axis, times the gelu of the second half.

    Args:
        x: [..., 2 I], fp16, bf16 or fp32, contiguous: what is gated, then the gate.

    Returns:
        [..., I], in x's dtype. x is not modified.

    Raises:
        ValueError: shape, dtype, layout or device does not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    launch = _LAUNCHES.get((kind_of(x), SWITCH.get()), lambda: _launch(x))
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    launch(x, y)
    return y


_LAUNCHES: Launches[Launch] = Launches()


def _launch(x: Tensor) -> Launch:
    check_row("geglu", "x", x, MAX_ROW_BYTES)
    if x.shape[-1] % 2:
        raise ValueError(f"geglu: x {tuple(x.shape)} must be [..., 2 I]; its last axis is odd")
    check_dtypes("geglu", x=x)
    check_contiguous("geglu", x=x)
    check_devices("geglu", x=x)

    D, options = x.shape[-1] // 2, launch_options(x.device)
    rows, block_d = x.numel() // (2 * D), channel_block(D, COLUMNS)
    block_n = BLOCK // block_d
    fixed = (rows, D, rounded_kind("gelu", x.dtype), block_n, block_d, options.pop("PDL"))
    return Launch(_geglu_kernel, (triton.cdiv(rows, block_n), triton.cdiv(D, block_d)), fixed, options)
