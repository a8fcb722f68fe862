"""Attention of many queries over their keys, for inference (forward only).

    out = softmax(scale * q k^T, over the keys that a query sees) v

One program per block of queries, head and batch row; it walks along the keys with a running softmax, so that no score
is ever stored. Blocks that every query sees in full are taken without checks; the edge, the diagonal and whatever a
mask covers with them. With fewer queries than keys the causal order is that of a continued text: the last query sees
every key. Query heads of a group read the same keys. Strides are free but for the last axis, so q, k and v may be views
of one fused projection. Work: 4 * B * heads * S * T * head_dim operations, causal half of them. No atomics: same input,
same output.

Casting: scores and softmax in fp32, base 2; the weights are rounded to the dtype for the product with v, as in
FlashAttention; one rounding at the end. fp32 is multiplied as fp32, not as TF32.

A query that sees nothing gives 0. Keys and values that no query sees must be numbers: they are multiplied by 0.

Source: Dao 2023, https://arxiv.org/abs/2307.08691; Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.operands import check_devices, check_dtypes, check_rows_contiguous, shapes
from dsi_kernels.tuned import device_facts, launch_config

MAX_HEAD_DIM = 256
# values of the setting `choice`: what torch picks, this op, or one backend of torch's by name
TORCH, OWN, CUDNN, FLASH, EFFICIENT = 1, 2, 3, 4, 5
# a bucket holds the lengths up to a power of two, from the first to the last
FIRST_BUCKET, LAST_BUCKET = 64, 16384


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    _, heads, S, head_dim = q.shape
    T, group = k.shape[2], heads // k.shape[1]
    live = torch.ones(1, 1, S, T, dtype=torch.bool, device=q.device)
    live = live.tril(T - S) if causal else live
    live = live if mask is None else live & mask
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    # a row of -inf alone becomes NaN in the softmax, and 0 here
    weights = scores.masked_fill(~live, -math.inf).softmax(-1).masked_fill(~live, 0.0)
    return (weights @ v).to(q.dtype).transpose(1, 2).contiguous()


@triton.jit
def _walk(
    q, k_ptr, v_ptr, mask_ptr, s, top, z, acc, lo, hi, S, T, k_t, v_t, mask_s, mask_t, scale,
    CAUSAL: tl.constexpr, CHECKED: tl.constexpr, KEY_MASK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(top, z, acc) after the keys lo <= t < hi: largest score, sum of the weights, weighted sum of the values."""
    d = tl.arange(0, BLOCK_D)
    for t0 in tl.range(lo, hi, BLOCK_T, num_stages=STAGES):
        t = t0 + tl.arange(0, BLOCK_T)
        there = t < T if CHECKED else t < t0 + BLOCK_T
        # int64 before the multiply: 128k positions of a fused projection of 12288 rows pass 2**31 elements
        at = t.to(tl.int64)
        inside = there[None, :] & (d < HEAD_DIM)[:, None]
        k = tl.load(k_ptr + (at * k_t)[None, :] + d[:, None], mask=inside, other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        if CHECKED:
            live = there[None, :]
            if CAUSAL:
                live = live & (t[None, :] <= (s + T - S)[:, None])
            if mask_ptr is not None:
                if KEY_MASK:
                    live = live & (tl.load(mask_ptr + at * mask_t, mask=there, other=0) != 0)[None, :]
                else:
                    row = s.to(tl.int64) * mask_s
                    seen = there[None, :] & (s < S)[:, None]
                    live = live & (tl.load(mask_ptr + row[:, None] + (at * mask_t)[None, :], mask=seen, other=0) != 0)
            score = tl.where(live, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, axis=1))
        # -inf - -inf is NaN: with nothing seen yet, measure from 0
        base = tl.where(new == float("-inf"), 0.0, new)
        p, kept = tl.exp2(score - base[:, None]), tl.exp2(top - base)
        z = z * kept + tl.sum(p, axis=1)
        inside = there[:, None] & (d < HEAD_DIM)[None, :]
        v = tl.load(v_ptr + (at * v_t)[:, None] + d[None, :], mask=inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
        top = new
    return top, z, acc


@triton.jit
def _reach(block, S, T, CAUSAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr):
    """(full, hi): a block of queries sees keys below hi; those below full, whole blocks, by every one of them."""
    # no block of queries beyond the row has keys
    hi = tl.where(block * BLOCK_S < S, T, 0)
    full = T
    if CAUSAL:
        hi = tl.minimum(hi, tl.maximum(block * BLOCK_S + BLOCK_S + T - S, 0))
        full = tl.minimum(T, tl.maximum(block * BLOCK_S + 1 + T - S, 0))
    return tl.minimum(full // BLOCK_T * BLOCK_T, hi), hi


# what changes with every batch is no reason to compile again
@triton.jit(do_not_specialize=["S", "T"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, starts_ptr, out_ptr, S, T, scale, group,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, mask_b, mask_s, mask_t, out_b, out_h, out_s,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, S, heads, HEAD_DIM]; with starts_ptr the rows follow one another in one sequence of tokens."""
    begin(PDL)
    block, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if CAUSAL:
        # the blocks with the most keys begin first
        block = tl.num_programs(0) - 1 - block
    first = tl.cast(0, tl.int64)
    if starts_ptr is not None:
        first = tl.load(starts_ptr + b).to(tl.int64)
        S = (tl.load(starts_ptr + b + 1).to(tl.int64) - first).to(tl.int32)
        T = S
    S, T, scale = tl.cast(S, tl.int32), tl.cast(T, tl.int32), tl.cast(scale, tl.float32)
    s, d = block * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    inside = (s < S)[:, None] & (d < HEAD_DIM)[None, :]
    rows = first + s.to(tl.int64)
    q = tl.load(q_ptr + b * q_b + h * q_h + (rows * q_s)[:, None] + d[None, :], mask=inside, other=0.0)
    k_ptr += b * k_b + h // group * k_h + first * k_t
    v_ptr += b * v_b + h // group * v_h + first * v_t
    full, hi = _reach(block, S, T, CAUSAL, BLOCK_S, BLOCK_T)
    if mask_ptr is not None:
        mask_ptr += b * mask_b
        full = full * 0
    top, z = tl.full([BLOCK_S], float("-inf"), tl.float32), tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    if mask_ptr is None:
        top, z, acc = _walk(
            q, k_ptr, v_ptr, mask_ptr, s, top, z, acc, 0, full, S, T, k_t, v_t, mask_s, mask_t, scale,
            CAUSAL, False, KEY_MASK, HEAD_DIM, BLOCK_T, BLOCK_D, STAGES,
        )  # fmt: skip
    top, z, acc = _walk(
        q, k_ptr, v_ptr, mask_ptr, s, top, z, acc, full, hi, S, T, k_t, v_t, mask_s, mask_t, scale,
        CAUSAL, True, KEY_MASK, HEAD_DIM, BLOCK_T, BLOCK_D, STAGES,
    )  # fmt: skip

    # nothing attended to: 0 / 1
    out = (acc / tl.where(z == 0.0, 1.0, z)[:, None]).to(q.dtype)
    tl.store(out_ptr + b * out_b + h * out_h + (rows * out_s)[:, None] + d[None, :], out, mask=inside)


def attention_config(length: int, head_dim: int, *, causal: bool, masked: bool, like: Tensor) -> Mapping[str, int]:
    """The tuned settings for so many keys, `choice` among them: TORCH, OWN, CUDNN, FLASH or EFFICIENT.

    Args:
        length: keys a row, the longest.
        head_dim: size of a head.
        causal, masked: what limits a query.
        like: a tensor of the dtype, on the device.
    """
    bucket = min(max(FIRST_BUCKET, 1 << (length - 1).bit_length() if length else 1), LAST_BUCKET)
    seen = "mask" if masked else "causal" if causal else "all"
    shape = f"head_dim={head_dim},length={bucket},sees={seen},bytes={like.element_size()}"
    return launch_config("attention", shape, device_facts(like.device)[0])


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> None:
    """A ValueError where these heads cannot be computed together."""
    if not kv_heads or not heads or heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads do not divide among {kv_heads} KV heads")
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim {q.shape[-1]} is not from 1 to {MAX_HEAD_DIM}")
    check_dtypes(op, q=q, k=k, v=v)
    check_rows_contiguous(op, q=q, k=k, v=v)


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """A ValueError, in the name of `op`, where these operands make no attention."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: {shapes(q=q, k=k, v=v)} must be [B, heads, S, head_dim], then twice [B, kv_heads, T, head_dim]"
        )
    check_heads(op, q, k, v, q.shape[1], k.shape[1])
    if mask is not None:
        B, S, T = q.shape[0], q.shape[2], k.shape[2]
        if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[2] not in (1, S) or mask.shape[1::2] != (1, T):
            raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}; [{B} or 1, 1, {S} or 1, {T}] is needed")
        if mask.dtype != torch.bool:
            raise ValueError(f"{op}: mask is {mask.dtype}; bool, True to attend, is needed")
    check_devices(op, q=q, k=k, v=v, mask=mask)


def launch_of(
    q: Tensor, k: Tensor, mask: Tensor | None, grid: tuple[int, int, int], strides: tuple[int, ...], *,
    causal: bool, scale: float | None, config: Mapping[str, int],
) -> Launch:  # fmt: skip
    """What is called with q, k, v, mask, starts, out, queries and keys.

    grid: (longest row, heads, B); strides: of q, k and v by batch row, head and token, then out's.
    """
    longest, heads, B = grid
    head_dim, kv_heads = q.shape[-1], k.shape[1]
    # tl.dot wants 16 rows, columns and terms, or more
    block_s = min(config["block_s"], max(16, triton.next_power_of_2(longest)))
    mask_strides, by_key = (0, 0, 0), True
    if mask is not None:
        by_row = mask.stride(2) * (mask.shape[2] > 1)
        mask_strides, by_key = (mask.stride(0) * (mask.shape[0] > 1), by_row, mask.stride(3)), by_row == 0
    factor = (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    block_d = max(16, triton.next_power_of_2(head_dim))
    options = {"num_warps": config["num_warps"], **launch_options(q.device)}
    # block_s to stages in the kernel's order
    blocks = (block_s, config["block_t"], block_d, config["stages"])
    constants = (causal, by_key, head_dim, *blocks, options.pop("PDL"))
    fixed = (factor, heads // kv_heads, *strides[:9], *mask_strides, *strides[9:], *constants)
    return Launch(_attention_kernel, (triton.cdiv(longest, block_s), heads, B), fixed, options)


_LAUNCHES: Launches[Launch] = Launches()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """The queries attended to the keys that they see.

    Args:
        q: [B, heads, S, head_dim], fp16, bf16 or fp32, last axis contiguous, other strides free.
        k, v: [B, kv_heads, T, head_dim], same dtype; heads is a multiple of kv_heads, head_dim any up to 256.
        mask: bool [B or 1, 1, S or 1, T], True to attend, any strides; or None.
        causal: query s sees the keys up to s + T - S; with a mask, of those the ones that it lets through.
        scale: multiplies the scores; None for head_dim ** -0.5.
        config: all settings of tuned/attention/default.json, in the place of the tuned ones.

    Returns:
        [B, S, heads, head_dim], contiguous, in q's dtype; 0 where there is nothing to attend to.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    B, heads, S, head_dim = q.shape

    def make() -> Launch:
        check_attention("attention", q, k, v, mask)
        found = config
        if found is None:
            found = attention_config(k.shape[2], head_dim, causal=causal, masked=mask is not None, like=q)
        width = heads * head_dim
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], S * width, head_dim, width)
        return launch_of(q, k, mask, (S, heads, B), strides, causal=causal, scale=scale, config=found)

    settings = None if config is None else tuple(config.items())
    launch = _LAUNCHES.get((causal, scale, settings, SWITCH.get(), kind_of(q, k, v, mask)), make)
    out = torch.empty((B, S, heads, head_dim), dtype=q.dtype, device=q.device)
    launch(q, k, v, mask, None, out, S, k.shape[2])
    return out
