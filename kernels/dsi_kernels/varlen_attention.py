"""Attention within rows of different lengths that follow one another without padding, for inference (forward only).

The kernel of attention.py, where row b holds the tokens cu_seqlens[b] to cu_seqlens[b + 1]; a query sees the keys of
its own row. The lengths are read on the device: one CUDA graph serves all that fit. Work: 4 * heads * head_dim times
the sum of the squared lengths. Casting is attention.py's.

Source: Dao 2023, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsi_kernels.attention import attention_config, attention_reference, check_heads, launch_of
from dsi_kernels.operands import check_contiguous, check_devices, shapes


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """What the kernel must compute, in plain torch; 0 for tokens of no row. The tests' oracle and the CPU path."""
    out = q.new_zeros(q.shape)
    bounds: list[int] = cu_seqlens.tolist()
    for index, last in enumerate(bounds[1:]):
        first = bounds[index]
        row = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
        out[first:last] = attention_reference(*row, causal=causal, scale=scale)[0]
    return out.flatten(1)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    scale: float | None = None,
    causal: bool = False,
    *,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """Every token attended to those of its own row.

    Args:
        q: [T, heads, head_dim], fp16, bf16 or fp32, last axis contiguous, other strides free.
        k, v: [T, kv_heads, head_dim], same dtype; heads is a multiple of kv_heads, head_dim any up to 256.
        cu_seqlens: int32 [B + 1], ascending from 0 to at most T; a row may be empty.
        max_len: the longest row, or more; a longer one is computed in part.
        scale: multiplies the scores; None for head_dim ** -0.5.
        causal: a query sees its row up to itself.
        config: all settings of tuned/attention/default.json, in the place of the tuned ones.

    Returns:
        [T, heads * head_dim], contiguous, in q's dtype; tokens beyond the last row hold anything.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    op = "varlen_attention"
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"{op}: {shapes(q=q, k=k, v=v)} must be [T, heads, head_dim], then twice [T, kv_heads, ..]")
    check_heads(op, q, k, v, q.shape[1], k.shape[1])
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{op}: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; int32 [B + 1] is needed")
    if max_len < 1:
        raise ValueError(f"{op}: max_len is {max_len}; 1 or more is needed")
    check_contiguous(op, cu_seqlens=cu_seqlens)
    check_devices(op, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    tokens, heads, head_dim = q.shape
    out = torch.empty((tokens, heads * head_dim), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    if config is None:
        config = attention_config(max_len, head_dim, causal=causal, masked=False, like=q)
    strides = (*_strides(q), *_strides(k), *_strides(v), 0, head_dim, out.stride(0))
    grid = (max_len, heads, cu_seqlens.shape[0] - 1)
    launch = launch_of(q, k, None, grid, strides, causal=causal, scale=scale, config=config)
    launch(q, k, v, None, cu_seqlens, out, q.shape[0], k.shape[0])
    return out


def _strides(x: Tensor) -> tuple[int, int, int]:
    """By batch row, which there is none of, head and token."""
    return 0, x.stride(1), x.stride(0)
