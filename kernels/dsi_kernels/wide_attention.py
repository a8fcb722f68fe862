"""Attention of heads too wide for one program, through two library products, for inference (forward only).

    e   = exp(scale * q k^T - its row's largest)                            scores in fp32, e in the dtype
    out = e v / sum(e)

An autoencoder's middle has one head of 512 over thousands of pixels. A program of `attention` would hold 64 queries and
their sums alone; here a chunk of the queries, all heads of them, is two products of a library and a pass between. Work:
4 * B * heads * S * T * head_dim operations, and 12 bytes a score.

Casting: scores and softmax in fp32; the weights, no more than 1, are rounded to the dtype for the product with v, as in
FlashAttention, summed in fp32, and divided before the one rounding at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsi_kernels._pdl import begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.attention import attention_reference
from dsi_kernels.operands import check_devices, check_dtypes, check_rows_contiguous, shapes

# keys that a program holds the scores of
MAX_KEYS = 32768
# of one chunk's scores
SCORES_BYTES = 1 << 28


def wide_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    return attention_reference(q, k, v, scale=scale)


@triton.jit(do_not_specialize=["scale"])
def _weights_kernel(s_ptr, e_ptr, z_ptr, T, scale, BLOCK_T: tl.constexpr, PDL: tl.constexpr):
    """e [rows, T], and z [rows], its sums as it is rounded; scale is to base 2."""
    begin(PDL)
    # int64 before the multiply: a row of every head may be more than a chunk is meant to be
    row, t = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_T)
    inside = t < T
    score = tl.load(s_ptr + row * T + t, mask=inside, other=float("-inf")) * tl.cast(scale, tl.float32)
    e = tl.exp2(score - tl.max(score, axis=0)).to(e_ptr.dtype.element_ty)
    tl.store(e_ptr + row * T + t, e, mask=inside)
    tl.store(z_ptr + row, tl.sum(e.to(tl.float32), axis=0))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, in float32."""
    # rounded to the dtype, scores would lose what the softmax magnifies
    if not a.is_cuda or a.dtype is torch.float32:
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32)


def wide_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The queries attended to all keys.

    Args:
        q: [B, heads, S, head_dim], fp16, bf16 or fp32, its last axis contiguous.
        k, v: [B, heads, T, head_dim], as q, T from 1 to MAX_KEYS.
        scale: multiplies the scores; head_dim ** -0.5 unless told.

    Returns:
        [B, S, heads, head_dim], in q's dtype.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape != (*q.shape[:2], k.shape[2], q.shape[3]):
        raise ValueError(f"wide_attention: {shapes(q=q, k=k, v=v)} must be [B, heads, S or T, head_dim]")
    if not 1 <= k.shape[2] <= MAX_KEYS:
        raise ValueError(f"wide_attention: {k.shape[2]} keys are not from 1 to {MAX_KEYS}")
    check_dtypes("wide_attention", q=q, k=k, v=v)
    check_rows_contiguous("wide_attention", q=q, k=k, v=v)
    check_devices("wide_attention", q=q, k=k, v=v)
    B, heads, S, head_dim = q.shape
    T = k.shape[2]
    out = torch.empty((B, S, heads, head_dim), dtype=q.dtype, device=q.device)
    scale = head_dim**-0.5 if scale is None else scale
    rows = max(1, SCORES_BYTES // (4 * T * max(B * heads, 1)))
    k, v = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    for first in range(0, S, rows):
        part = q[:, :, first : first + rows]
        weighted, z = _weighted(part.flatten(0, 1), k, v, float(scale))
        share = out[:, first : first + rows].transpose(1, 2)
        torch.div(weighted.view(part.shape), z.view(*part.shape[:3], 1), out=share)
    return out


def _weighted(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """e v in fp32, and the sums of e."""
    score = _product(q, k)
    e = torch.empty(score.shape, dtype=q.dtype, device=q.device)
    z = torch.empty(score.shape[:2], dtype=torch.float32, device=q.device)
    T = score.shape[2]
    block, factor = triton.next_power_of_2(T), scale * math.log2(math.e)
    options = launch_options(q.device) | {"num_warps": min(max(block // 512, 1), 16)}
    if z.numel():
        with torch.cuda.device_of(q):
            _weights_kernel[(z.numel(),)](score, e, z, T, factor, BLOCK_T=block, **options)
    return _product(e, v), z
