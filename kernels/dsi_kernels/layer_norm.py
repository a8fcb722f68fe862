"""LayerNorm of the last axis, for inference (forward only).

    y = (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps) * weight + bias

One program per row, whole row in registers, so D <= 65536 / itemsize, and the variance takes two passes over registers
instead of E[x^2] - E[x]^2, which cancels where the mean is large. Reads x once and writes y once:
2 * T * D * itemsize bytes, memory bound.

Casting follows torch.nn.functional.layer_norm: everything in fp32, weight and bias too, and one rounding at the end.

Source: Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._pdl import begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, check_row, shapes

MAX_ROW_BYTES = 65536


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    w = None if weight is None else weight.float()
    b = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], w, b, eps).to(x.dtype)


@triton.jit
def standardize(h, inside, D, eps) -> tl.tensor:
    """A row less its mean, over its standard deviation; fp32, zeros outside."""
    mean = tl.sum(h, axis=0) / D
    h = tl.where(inside, h - mean, 0.0)
    return h * tl.rsqrt(tl.sum(h * h, axis=0) / D + tl.cast(eps, tl.float32))


@triton.jit
def scale_and_shift(h, w_ptr, b_ptr, cols, inside) -> tl.tensor:
    """h times weight plus bias in fp32; either pointer may be None."""
    if w_ptr is not None:
        h = h * tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        h = h + tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    return h


@triton.jit
def _layer_norm_kernel(x_ptr, w_ptr, b_ptr, y_ptr, D, eps, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    # int64 before the multiply: T * D passes 2**31 at 512k tokens of width 4096
    row = tl.program_id(0).to(tl.int64) * D
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D

    x = tl.load(x_ptr + row + cols, mask=inside, other=0.0)
    h = standardize(x.to(tl.float32), inside, D, eps)
    h = scale_and_shift(h, w_ptr, b_ptr, cols, inside)
    tl.store(y_ptr + row + cols, h.to(x.dtype), mask=inside)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """The last axis with mean 0 and variance 1, times weight, plus bias.

    Args:
        x: [..., D], fp16, bf16 or fp32, contiguous.
        weight, bias: [D], same dtype; None leaves out the multiply, the add.
        eps: added to the variance; the square of x's unit.

    Returns:
        [..., D], in x's dtype. x is not modified.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    check_row("layer_norm", "x", x, MAX_ROW_BYTES)
    D = x.shape[-1]
    if any(p is not None and p.shape != (D,) for p in (weight, bias)):
        raise ValueError(f"layer_norm: {shapes(x=x, weight=weight, bias=bias)} must be [..., D], [D] and [D]")
    check_dtypes("layer_norm", x=x, weight=weight, bias=bias)
    check_contiguous("layer_norm", x=x, weight=weight, bias=bias)
    check_devices("layer_norm", x=x, weight=weight, bias=bias)

    y = torch.empty_like(x)
    if rows := x.numel() // D:
        block = triton.next_power_of_2(D)
        warps = min(max(block // 256, 1), 16)
        with torch.cuda.device_of(x):
            _layer_norm_kernel[(rows,)](
                x, weight, bias, y, D, eps, BLOCK_D=block, num_warps=warps, **launch_options(x.device)
            )
    return y
