"""Residual add fused with RMSNorm, for inference (forward only).

    residual' = x + residual                                  (input dtype)
    y         = residual' * rsqrt(mean(residual'^2) + eps) * weight

One program per row, whole row in registers, so D <= 65536 / itemsize. Reads x and residual once, writes both outputs
once: 4 * T * D * itemsize bytes, memory bound.

Casting follows a LLaMA layer: the sum is rounded to the input dtype and normalised as rounded; statistics in fp32; the
normalised row is cast back to the input dtype *before* the weight multiply.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, check_row, shapes
from dsi_kernels.rms_norm import rms_norm_reference

MAX_ROW_BYTES = 65536


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    residual = x + residual
    return rms_norm_reference(residual, weight, eps), residual


@triton.jit
def _add_rms_norm_kernel(x_ptr, r_ptr, w_ptr, y_ptr, r_out_ptr, D, eps, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    # int64 before the multiply: T * D passes 2**31 at 512k tokens of width 4096
    row = tl.program_id(0).to(tl.int64) * D
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D

    x = tl.load(x_ptr + row + cols, mask=inside, other=0.0)
    r = tl.load(r_ptr + row + cols, mask=inside, other=0.0)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0)
    r = (x.to(tl.float32) + r.to(tl.float32)).to(x.dtype)
    tl.store(r_out_ptr + row + cols, r, mask=inside)

    h = r.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=0) / D + tl.cast(eps, tl.float32))
    # the product of two halves is exact in fp32, so this rounds as a multiply in their own dtype does
    y = w.to(tl.float32) * (h * rstd).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row + cols, y.to(x.dtype), mask=inside)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The RMS-normalised sum of x and residual, and the sum.

    Args:
        x, residual: [..., D], fp16, bf16 or fp32, contiguous.
        weight: [D], same dtype.
        eps: added to the mean square; dimensionless.

    Returns:
        (y, residual'): both [..., D], in x's dtype. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    key = (eps, SWITCH.get(), kind_of(x, residual, weight))
    launch = _LAUNCHES.get(key, lambda: _launch(x, residual, weight, eps))
    y, residual_out = torch.empty_like(x), torch.empty_like(x)
    launch(x, residual, weight, y, residual_out)
    return y, residual_out


_LAUNCHES: Launches[Launch] = Launches()


def _launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Launch:
    check_row("add_rms_norm", "x", x, MAX_ROW_BYTES)
    D = x.shape[-1]
    if x.shape != residual.shape or weight.shape != (D,):
        raise ValueError(
            f"add_rms_norm: {shapes(x=x, residual=residual, weight=weight)} must be [..., D], [..., D] and [D]"
        )
    check_dtypes("add_rms_norm", x=x, residual=residual, weight=weight)
    check_contiguous("add_rms_norm", x=x, residual=residual, weight=weight)
    check_devices("add_rms_norm", x=x, residual=residual, weight=weight)

    block, options = triton.next_power_of_2(D), launch_options(x.device)
    fixed = (D, eps, block, options.pop("PDL"))
    warps = min(max(block // 256, 1), 16)
    return Launch(_add_rms_norm_kernel, (x.numel() // D,), fixed, {"num_warps": warps, **options})
