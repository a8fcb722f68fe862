"""Bias add fused with an activation, for inference (forward only).

    y = act(x + bias)

One program per row and block of 1024 columns. Reads x once and writes y once: 2 * T * I * itemsize bytes,
memory bound.

Casting follows a linear layer and its activation: x + bias is rounded to the input dtype, as the linear's output is;
the activation of that is computed in fp32 and rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._pdl import begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.activations import activate, activate_reference, check_kind, rounded_kind
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, check_row, shapes

BLOCK = 1024
# the second axis of a CUDA grid has 65535 places
MAX_ROW_BYTES = 65535 * BLOCK * 2


def bias_activation_reference(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    return activate_reference(x if bias is None else x + bias, kind)


@triton.jit
def _bias_activation_kernel(x_ptr, b_ptr, y_ptr, D, KIND: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    # int64 before the multiply: T * I passes 2**31 at 128k tokens of width 16384
    row = tl.program_id(0).to(tl.int64) * D
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D

    x = tl.load(x_ptr + row + cols, mask=inside, other=0.0)
    h = x.to(tl.float32)
    if b_ptr is not None:
        h = h + tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        h = h.to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row + cols, activate(h, KIND).to(x.dtype), mask=inside)


def bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The activation of x plus bias.

    Args:
        x: [..., I], fp16, bf16 or fp32, contiguous.
        bias: [I], same dtype, or None.
        kind: one of dsi_kernels.KINDS.

    Returns:
        [..., I], in x's dtype. x is not modified.

    Raises:
        ValueError: shapes, dtypes, layout, devices or kind do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    check_kind("bias_activation", kind)
    check_row("bias_activation", "x", x, MAX_ROW_BYTES)
    D = x.shape[-1]
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias_activation: {shapes(x=x, bias=bias)} must be [..., I] and [I]")
    check_dtypes("bias_activation", x=x, bias=bias)
    check_contiguous("bias_activation", x=x, bias=bias)
    check_devices("bias_activation", x=x, bias=bias)

    y = torch.empty_like(x)
    if rows := x.numel() // D:
        block = min(BLOCK, triton.next_power_of_2(D))
        with torch.cuda.device_of(x):
            _bias_activation_kernel[(rows, triton.cdiv(D, block))](
                x, bias, y, D, KIND=rounded_kind(kind, x.dtype), BLOCK_D=block, **launch_options(x.device)
            )
    return y
