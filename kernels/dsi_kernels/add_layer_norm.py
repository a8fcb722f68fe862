"""Residual add fused with LayerNorm, and with the bias of the linear before it, for inference (forward only).

    residual' = x + x_bias + residual                                       (one rounding to the input dtype)
    y         = (residual' - mean) * rsqrt(var + eps) * weight + bias

One program per row, whole row in registers, so D <= 65536 / itemsize. Reads x and residual once, writes both outputs
once: 4 * T * D * itemsize bytes, 3 where the sum is not wanted, memory bound.

The sum is rounded once and normalised as rounded. A linear that leaves its bias to this op rounds its product instead
of its product plus bias, so there are as many roundings as in the stock layer. The norm is that of layer_norm.py.

Source: Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._pdl import begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.layer_norm import layer_norm_reference, scale_and_shift, standardize
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, check_row, shapes

MAX_ROW_BYTES = 65536


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    h = x.float() if x_bias is None else x.float() + x_bias.float()
    residual = (h + residual.float()).to(x.dtype)
    return layer_norm_reference(residual, weight, bias, eps), residual


@triton.jit
def _add_layer_norm_kernel(
    x_ptr, r_ptr, xb_ptr, w_ptr, b_ptr, y_ptr, r_out_ptr, D, eps, BLOCK_D: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    begin(PDL)
    # int64 before the multiply: T * D passes 2**31 at 512k tokens of width 4096
    row = tl.program_id(0).to(tl.int64) * D
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D

    x = tl.load(x_ptr + row + cols, mask=inside, other=0.0)
    r = tl.load(r_ptr + row + cols, mask=inside, other=0.0)
    h = x.to(tl.float32)
    if xb_ptr is not None:
        h = h + tl.load(xb_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    r = (h + r.to(tl.float32)).to(x.dtype)
    if r_out_ptr is not None:
        tl.store(r_out_ptr + row + cols, r, mask=inside)

    h = standardize(r.to(tl.float32), inside, D, eps)
    h = scale_and_shift(h, w_ptr, b_ptr, cols, inside)
    tl.store(y_ptr + row + cols, h.to(x.dtype), mask=inside)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    x_bias: Tensor | None = None,
    *,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The layer-normalised sum of x, x_bias and residual, and the sum.

    Args:
        x, residual: [..., D], fp16, bf16 or fp32, contiguous.
        weight, bias: [D], same dtype; None leaves out the multiply, the add.
        eps: added to the variance; the square of x's unit.
        x_bias: [D], same dtype, added to every row of x first; None for none.
        keep_sum: the sum is wanted too.

    Returns:
        (y, residual'): both [..., D], in x's dtype; None for a sum that is not wanted. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    check_row("add_layer_norm", "x", x, MAX_ROW_BYTES)
    D = x.shape[-1]
    operands = {"x": x, "residual": residual, "weight": weight, "bias": bias, "x_bias": x_bias}
    if x.shape != residual.shape or any(p is not None and p.shape != (D,) for p in (weight, bias, x_bias)):
        raise ValueError(f"add_layer_norm: {shapes(**operands)} must be [..., D] twice, then [D]")
    check_dtypes("add_layer_norm", **operands)
    check_contiguous("add_layer_norm", **operands)
    check_devices("add_layer_norm", **operands)

    y, residual_out = torch.empty_like(x), torch.empty_like(x) if keep_sum else None
    if rows := x.numel() // D:
        block = triton.next_power_of_2(D)
        warps = min(max(block // 256, 1), 16)
        with torch.cuda.device_of(x):
            _add_layer_norm_kernel[(rows,)](
                x,
                residual,
                x_bias,
                weight,
                bias,
                y,
                residual_out,
                D,
                eps,
                BLOCK_D=block,
                num_warps=warps,
                **launch_options(x.device),
            )
    return y, residual_out
