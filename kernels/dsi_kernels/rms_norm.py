"""RMSNorm of the last axis, for inference (forward only).

    y = x * rsqrt(mean(x^2) + eps) * weight

One program per row, whole row in registers, so D <= 65536 / itemsize. Reads x once and writes y once:
2 * T * D * itemsize bytes, memory bound.

Casting follows transformers' LlamaRMSNorm: statistics in fp32, the normalised row is cast back to the input dtype
*before* the weight multiply, which rounds a second time.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, check_row, shapes

MAX_ROW_BYTES = 65536


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


@triton.jit
def _rms_norm_kernel(x_ptr, w_ptr, y_ptr, D, eps, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    # int64 before the multiply: T * D passes 2**31 at 512k tokens of width 4096
    row = tl.program_id(0).to(tl.int64) * D
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D

    x = tl.load(x_ptr + row + cols, mask=inside, other=0.0)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0)
    h = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=0) / D + tl.cast(eps, tl.float32))
    # the product of two halves is exact in fp32, so this rounds as a multiply in their own dtype does
    y = w.to(tl.float32) * (h * rstd).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row + cols, y.to(x.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The last axis divided by its root mean square, times weight.

    Args:
        x: [..., D], fp16, bf16 or fp32, contiguous.
        weight: [D], same dtype.
        eps: added to the mean square; dimensionless.

    Returns:
        [..., D], in x's dtype. x is not modified.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    key = (eps, SWITCH.get(), kind_of(x, weight))
    launch = _LAUNCHES.get(key, lambda: _launch(x, weight, eps))
    y = torch.empty_like(x)
    launch(x, weight, y)
    return y


_LAUNCHES: Launches[Launch] = Launches()


def _launch(x: Tensor, weight: Tensor, eps: float) -> Launch:
    check_row("rms_norm", "x", x, MAX_ROW_BYTES)
    D = x.shape[-1]
    if weight.shape != (D,):
        raise ValueError(f"rms_norm: {shapes(x=x, weight=weight)} must be [..., D] and [D]")
    check_dtypes("rms_norm", x=x, weight=weight)
    check_contiguous("rms_norm", x=x, weight=weight)
    check_devices("rms_norm", x=x, weight=weight)

    block, options = triton.next_power_of_2(D), launch_options(x.device)
    fixed = (D, eps, block, options.pop("PDL"))
    warps = min(max(block // 256, 1), 16)
    return Launch(_rms_norm_kernel, (x.numel() // D,), fixed, {"num_warps": warps, **options})
