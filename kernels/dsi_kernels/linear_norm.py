"""A linear layer, the residual and the norm after it, for the tokens of a whole forward (forward only).

    s = x W^T + b + residual                    (one rounding to the input dtype)
    y = norm(s)                                 layer or rms

Two kernels. The product of `linear_fused` leaves its sums, in fp32 and in `splits` parts of K where there are several;
the second adds the parts up in a fixed order, then bias and residual, and normalises the row: the reduction of a cut K
costs no launch. One program per row, whole row in registers, so N <= 65536 / itemsize.

Casting: everything up to s in fp32, one rounding; s is normalised as rounded, with layer_norm.py's and rms_norm.py's
casts.

Source: Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450; Zhang & Sennrich 2019,
https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dsi_kernels._pdl import launch_dependents, launch_options, wait
from dsi_kernels._triton import tl, triton
from dsi_kernels.layer_norm import layer_norm_reference, standardize
from dsi_kernels.linear_fused import check_product, linear_config, multiply, sum_parts
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, check_row
from dsi_kernels.rms_norm import rms_norm_reference

MAX_ROW_BYTES = 65536
NORMS = ("layer", "rms")


def linear_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What the kernels must compute, in plain torch. The tests' oracle and the CPU path."""
    h = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    total = (h + residual.float()).to(x.dtype)
    if norm == "layer":
        return layer_norm_reference(total, norm_weight, norm_bias, eps), total
    assert norm_weight is not None, "the rms norm has a weight"
    return rms_norm_reference(total, norm_weight, eps), total


@triton.jit
def _parameter(ptr, cols, inside, OTHER: tl.constexpr, BLOCK_D: tl.constexpr) -> tl.tensor:
    """A row of parameters in fp32, or OTHER everywhere where there is none."""
    if ptr is None:
        row = tl.full([BLOCK_D], OTHER, tl.float32)
    else:
        row = tl.load(ptr + cols, mask=inside, other=0.0).to(tl.float32)
    return row


@triton.jit
def _sum_norm_kernel(
    p_ptr, b_ptr, r_ptr, g_ptr, c_ptr, y_ptr, s_ptr, M, D, eps,
    NORM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # int64 before the multiply: T * D passes 2**31 at 512k tokens of width 4096
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    at = row * D + cols
    if PDL:
        launch_dependents()
    bias = _parameter(b_ptr, cols, inside, 0.0, BLOCK_D)
    gamma = _parameter(g_ptr, cols, inside, 1.0, BLOCK_D)
    beta = _parameter(c_ptr, cols, inside, 0.0, BLOCK_D)
    if PDL:
        wait()

    r = tl.load(r_ptr + at, mask=inside, other=0.0)
    h = sum_parts(p_ptr, row, cols, inside, M, D, SPLITS, BLOCK_D) + bias
    s = (h + r.to(tl.float32)).to(r.dtype)
    if s_ptr is not None:
        tl.store(s_ptr + at, s, mask=inside)

    h = s.to(tl.float32)
    if NORM == "layer":
        h = standardize(h, inside, D, eps) * gamma + beta
    else:
        h = h * tl.rsqrt(tl.sum(h * h, axis=0) / D + tl.cast(eps, tl.float32))
        # the product of two halves is exact in fp32, so this rounds as a multiply in their own dtype does
        h = h.to(r.dtype).to(tl.float32) * gamma
    tl.store(y_ptr + at, h.to(r.dtype), mask=inside)


def check_norm(op: str, residual: Tensor, norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    """Raises ValueError, in the name of `op`, where a norm does not fit the rows that it is taken over."""
    if norm not in NORMS:
        raise ValueError(f"{op}: norm {norm!r} is unknown; one of {', '.join(NORMS)} will do")
    if norm == "rms" and (norm_weight is None or norm_bias is not None):
        raise ValueError(f"{op}: the rms norm has a weight, and no bias")
    check_row(op, "residual", residual, MAX_ROW_BYTES)
    for name, t in {"norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        if t is not None and t.shape != residual.shape[-1:]:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; {tuple(residual.shape[-1:])} is needed")
    check_dtypes(op, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    check_contiguous(op, norm_weight=norm_weight, norm_bias=norm_bias)
    check_devices(op, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)


def linear_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: bool = True,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The norm of the product plus bias and residual, and that sum.

    Args:
        x: [..., K], fp16, bf16 or fp32, contiguous.
        weight: [N, K], same dtype, contiguous.
        bias: [N], or None.
        residual: [..., N], contiguous.
        norm: "layer" or "rms".
        norm_weight, norm_bias: [N] or None; rms needs a weight and has no bias.
        eps: added to the variance or mean square.
        keep_sum: the sum is wanted too.
        config: all settings of tuned/linear_fused/default.json, in the place of the tuned ones.

    Returns:
        (y, s): both [..., N], in x's dtype; s None where it is not wanted. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout, devices or norm do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    wanted = check_product("linear_norm", x, weight, bias, residual)
    check_norm("linear_norm", residual, norm, norm_weight, norm_bias)
    sizes = linear_config(x, weight, "norm") if config is None else config
    if not residual.numel():
        return torch.empty_like(residual), torch.empty_like(residual) if keep_sum else None
    N, splits = wanted[-1], sizes["splits"]
    parts = torch.empty((splits, residual.numel() // N, N), dtype=torch.float32, device=x.device)
    multiply(x, weight, None, None, parts, sizes)
    return sum_norm(parts, bias, residual, norm, norm_weight, norm_bias, eps, keep_sum=keep_sum)


def sum_norm(
    parts: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """As `linear_norm`, of a product's parts, float32 [splits, M, N]; its caller has checked the operands."""
    splits, M, N = parts.shape
    y, total = torch.empty_like(residual), torch.empty_like(residual) if keep_sum else None
    block = triton.next_power_of_2(N)
    with torch.cuda.device_of(parts):
        _sum_norm_kernel[(M,)](
            parts, bias, residual, norm_weight, norm_bias, y, total, M, N, eps, NORM=norm, SPLITS=splits,
            BLOCK_D=block, num_warps=min(max(block // 256, 1), 16), **launch_options(parts.device),
        )  # fmt: skip
    return y, total
