"""Attention of one new token a row over a KV cache, for inference (forward only): flash-decoding.

    out = softmax(scale * q k^T, over t < length and mask) v

One program per batch row, KV head and split of the context, so that a long context fills the device; the query heads of
a group share a program and K and V are read once for them: 2 * B * kv_heads * length * head_dim * itemsize bytes,
memory bound. A split leaves (m, z, acc) in fp32: its largest score, the sum of its weights, the weighted sum of its
values; a second kernel adds the splits up in a fixed order. No float atomics: same input, same output. Where there is
one split, it writes the output itself.

The splits are counted from what the host knows (an int length, the mask's width or the capacity) and cut from the
length that the device reads, so one CUDA graph serves every length.

Casting: scores and softmax in fp32, base 2. With one query head to a KV head, weights times values is fp32 too. A
group goes through tl.dot, which takes the weights rounded to the dtype (fp32 stays fp32, not TF32); FlashAttention's
own casts. One rounding at the end.

A row with nothing to attend to gives 0. Positions beyond the length are never read; where the mask is False, values may
be anything, NaN included.

Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; Milakov & Gimelshein 2018,
https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dsi_kernels._triton import tl, triton
from dsi_kernels.operands import check_devices, check_dtypes, check_rows_contiguous, shapes
from dsi_kernels.positions import position_stride, positions_reference, read_position
from dsi_kernels.tuned import device_facts, launch_config

MAX_HEAD_DIM = 256
MAX_GROUP = 128
# elements of fp32 that a program accumulates into, padded to powers of two; K and V tiles take their room beside it
MAX_GROUP_TILE = 16384
# the second kernel holds every split of a head at once
MAX_SPLITS = 64


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    B, heads, _, head_dim = q.shape
    width = k_cache.shape[2] if mask is None else min(k_cache.shape[2], mask.shape[-1])
    width = min(width, length) if isinstance(length, int) else width
    live = torch.arange(width, device=q.device) < positions_reference(length, B, q.device)[:, None]
    live = live[:, None, None] if mask is None else live[:, None, None] & mask[..., :width]
    group = heads // k_cache.shape[1]
    k = k_cache[:, :, :width].float().repeat_interleave(group, dim=1)
    v = v_cache[:, :, :width].float().repeat_interleave(group, dim=1)

    scores = q.float() @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    # a row of -inf alone becomes NaN in the softmax, and 0 here; so do values that nobody attends to
    weights = scores.masked_fill(~live, -math.inf).softmax(-1).masked_fill(~live, 0.0)
    return (weights @ v.masked_fill(~live.transpose(-1, -2), 0.0)).to(q.dtype)


@triton.jit
def _tile(ptr, t, stride_t, live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows t of a cache, [BLOCK_T, BLOCK_D], zeros where not live."""
    d = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + (t.to(tl.int64) * stride_t)[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def _attended(mask_ptr, t, mask_t, live):
    """Those of t that are live and that the mask, if there is one, lets through."""
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + t.to(tl.int64) * mask_t, mask=live, other=0) != 0)
    return live


@triton.jit
def _attend_one(
    q_ptr, k_ptr, v_ptr, mask_ptr, k_t, v_t, mask_t, lo, hi, scale,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(m [1], z [1], acc [1, BLOCK_D]) of one query head over lo <= t < hi.

    Each row of the tile keeps a softmax of its own through the loop, so that nothing is exchanged between rows, and
    thereby between warps, before the end.
    """
    # q once for every row of K: a single row of it would settle the layout of the whole loop, at one column a thread
    # (Triton 3.6 for sm_90), and make every score a sum over four warps
    t = tl.arange(0, BLOCK_T)
    q = _tile(q_ptr, t, 0, t < BLOCK_T, HEAD_DIM, BLOCK_D).to(tl.float32)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for t0 in tl.range(lo, hi, BLOCK_T, num_stages=STAGES):
        t = t0 + tl.arange(0, BLOCK_T)
        k = _tile(k_ptr, t, k_t, t < hi, HEAD_DIM, BLOCK_D).to(tl.float32)
        v = _tile(v_ptr, t, v_t, t < hi, HEAD_DIM, BLOCK_D).to(tl.float32)
        live = _attended(mask_ptr, t, mask_t, t < hi)
        s = tl.where(live, tl.sum(q * k, axis=1) * scale, float("-inf"))
        top = tl.maximum(m, s)
        # -inf - -inf is NaN: with nothing seen yet, measure from 0
        base = tl.where(top == float("-inf"), 0.0, top)
        p, kept = tl.exp2(s - base), tl.exp2(m - base)
        z = z * kept + p
        acc = acc * kept[:, None] + p[:, None] * tl.where(live[:, None], v, 0.0)
        m = top
    top = tl.max(m, axis=0)
    share = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    acc = tl.sum(acc * share[:, None], axis=0)
    one = tl.zeros([1], tl.float32)
    return one + top, one + tl.sum(z * share, axis=0), acc[None, :]


@triton.jit
def _attend_group(
    q_ptr, k_ptr, v_ptr, mask_ptr, q_h, k_t, v_t, mask_t, lo, hi, scale, group,
    HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(m [BLOCK_G], z [BLOCK_G], acc [BLOCK_G, BLOCK_D]) of a group's query heads over lo <= t < hi."""
    g = tl.arange(0, BLOCK_G)
    q = _tile(q_ptr, g, q_h, g < group, HEAD_DIM, BLOCK_D)
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for t0 in tl.range(lo, hi, BLOCK_T, num_stages=STAGES):
        t = t0 + tl.arange(0, BLOCK_T)
        k = _tile(k_ptr, t, k_t, t < hi, HEAD_DIM, BLOCK_D)
        v = _tile(v_ptr, t, v_t, t < hi, HEAD_DIM, BLOCK_D)
        live = _attended(mask_ptr, t, mask_t, t < hi)
        if mask_ptr is not None:
            v = tl.where(live[:, None], v, 0.0)
        s = tl.where(live[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        top = tl.maximum(m, tl.max(s, axis=1))
        # -inf - -inf is NaN: with nothing seen yet, measure from 0
        base = tl.where(top == float("-inf"), 0.0, top)
        p, kept = tl.exp2(s - base[:, None]), tl.exp2(m - base)
        z = z * kept + tl.sum(p, axis=1)
        acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = top
    return m, z, acc


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, mask_ptr, q_h, k_t, v_t, mask_t, lo, hi, scale, group,
    HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if BLOCK_G == 1:
        m, z, acc = _attend_one(
            q_ptr, k_ptr, v_ptr, mask_ptr, k_t, v_t, mask_t, lo, hi, scale, HEAD_DIM, BLOCK_T, BLOCK_D, STAGES
        )
    else:
        m, z, acc = _attend_group(
            q_ptr, k_ptr, v_ptr, mask_ptr, q_h, k_t, v_t, mask_t, lo, hi, scale, group,
            HEAD_DIM, BLOCK_G, BLOCK_T, BLOCK_D, STAGES,
        )  # fmt: skip
    return m, z, acc


# what grows with every token is no reason to compile again
@triton.jit(do_not_specialize=["length", "width", "splits", "mask_b"])
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, m_ptr, z_ptr, acc_ptr, length, width, splits, scale, kv_heads, group,
    q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t, mask_b, mask_t,
    LENGTH_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # int64 before a stride multiplies: a cache of 128k tokens passes 2**31 elements at batch 32
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    h = (tl.program_id(0) % kv_heads).to(tl.int64)
    split = tl.program_id(1)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = (g < group)[:, None] & (d < HEAD_DIM)[None, :]

    # more tokens than the cache or the mask holds are not there to be read
    n = tl.maximum(tl.minimum(read_position(length, b, LENGTH_STRIDE), width), 0).to(tl.int32)
    step = tl.cdiv(tl.cdiv(n, splits), BLOCK_T) * BLOCK_T
    if mask_ptr is not None:
        mask_ptr += b * mask_b
    m, z, acc = _attend(
        q_ptr + b * q_b + h * group * q_h, k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h, mask_ptr,
        q_h, k_t, v_t, mask_t, split * step, tl.minimum(split * step + step, n), tl.cast(scale, tl.float32), group,
        HEAD_DIM, BLOCK_G, BLOCK_T, BLOCK_D, STAGES,
    )  # fmt: skip

    row = (b * kv_heads + h) * group + g
    if m_ptr is None:
        # nothing attended to: 0 / 1
        out = acc / tl.where(z == 0.0, 1.0, z)[:, None]
        tl.store(out_ptr + (row * HEAD_DIM)[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        row = row * splits + split
        tl.store(m_ptr + row, m, mask=g < group)
        tl.store(z_ptr + row, z, mask=g < group)
        tl.store(acc_ptr + (row * HEAD_DIM)[:, None] + d[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _merge_splits_kernel(
    m_ptr, z_ptr, acc_ptr, out_ptr, splits, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    at = row * splits + s
    m = tl.load(m_ptr + at, mask=s < splits, other=float("-inf"))
    z = tl.load(z_ptr + at, mask=s < splits, other=0.0)
    inside = (s < splits)[:, None] & (d < HEAD_DIM)[None, :]
    acc = tl.load(acc_ptr + (at * HEAD_DIM)[:, None] + d[None, :], mask=inside, other=0.0)

    top = tl.max(m, axis=0)
    share = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(z * share, axis=0)
    out = tl.sum(acc * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def block_sizes(group: int, head_dim: int) -> tuple[int, int]:
    """How many query heads and columns a program holds: powers of two that tl.dot takes, or one head without it."""
    # tl.dot wants 16 rows, columns and terms, or more
    return (1 if group == 1 else max(16, 1 << (group - 1).bit_length())), max(16, 1 << (head_dim - 1).bit_length())


def _check_heads(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    op = "decode_attention"
    if q.ndim != 4 or q.shape[2] != 1 or k_cache.ndim != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{op}: {shapes(q=q, k_cache=k_cache, v_cache=v_cache)} must be [B, heads, 1, head_dim], then twice "
            "[B, kv_heads, capacity, head_dim]"
        )
    if k_cache.shape[0] != q.shape[0] or k_cache.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: {shapes(q=q, k_cache=k_cache)} differ in B or in head_dim")
    heads, kv_heads, head_dim = q.shape[1], k_cache.shape[1], q.shape[3]
    if not kv_heads or heads % kv_heads or not 1 <= heads // kv_heads <= MAX_GROUP:
        raise ValueError(f"{op}: {heads} query heads are not 1 to {MAX_GROUP} for each of {kv_heads} KV heads")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim {head_dim} is not from 1 to {MAX_HEAD_DIM}")
    block_g, block_d = block_sizes(heads // kv_heads, head_dim)
    if block_g * block_d > MAX_GROUP_TILE:
        raise ValueError(
            f"{op}: {heads // kv_heads} query heads to a KV head, of head_dim {head_dim}, are {block_g} x {block_d} "
            f"padded; up to {MAX_GROUP_TILE} elements will do"
        )


def _check_mask(q: Tensor, mask: Tensor | None) -> None:
    op, B = "decode_attention", q.shape[0]
    if mask is None:
        return
    if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[1:3] != (1, 1):
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}; [{B} or 1, 1, 1, T] is needed")
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask is {mask.dtype}; bool, True to attend, is needed")


def count_splits(programs: int, width: int, sms: int, *, min_split: int, programs_per_sm: int) -> int:
    """Into how many parts a context of width tokens is split, where there are so many programs without splitting.

    As many as bring the device programs_per_sm programs for each multiprocessor, of min_split tokens or more each.
    """
    return max(1, min(-(-sms * programs_per_sm // programs), width // min_split, MAX_SPLITS))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    splits: int | None = None,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """Each row's new token attended to its first length cached tokens, itself included.

    Args:
        q: [B, heads, 1, head_dim], fp16, bf16 or fp32, last axis contiguous.
        k_cache, v_cache: [B, kv_heads, capacity, head_dim], q's dtype, last axis contiguous. heads is kv_heads times a
            group of up to 128; head_dim is any up to 256; the two padded to powers of two multiply to 16384 or less.
        length: filled tokens: an int, or an int32 or int64 tensor [] or [B]. Beyond capacity, or the mask's width, a
            length on the device counts as that.
        mask: bool [B or 1, 1, 1, T], True to attend, any strides, T >= length; or None.
        scale: multiplies the scores; None for head_dim ** -0.5.
        splits: parts of the context computed apart, up to 64; None for as many as fill the device.
        config: all settings of tuned/decode_attention/default.json, in the place of the tuned ones.

    Returns:
        [B, heads, 1, head_dim], contiguous, in q's dtype; 0 where there is nothing to attend to.

    Raises:
        ValueError: shapes, dtypes, layout, devices, an int length or splits do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    op = "decode_attention"
    _check_heads(q, k_cache, v_cache)
    _check_mask(q, mask)
    check_dtypes(op, q=q, k_cache=k_cache, v_cache=v_cache)
    check_rows_contiguous(op, q=q, k_cache=k_cache, v_cache=v_cache)
    check_devices(op, q=q, k_cache=k_cache, v_cache=v_cache, mask=mask)
    stride = position_stride(op, "length", length, q.shape[0], q.device)
    width = k_cache.shape[2] if mask is None else min(k_cache.shape[2], mask.shape[-1])
    if isinstance(length, int):
        if not 0 <= length <= width:
            raise ValueError(f"{op}: length {length} is not from 0 to {width}, the width of the cache and the mask")
        width = length
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"{op}: splits {splits} is not from 1 to {MAX_SPLITS}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _launch(q, k_cache, v_cache, length, stride, width, mask, scale, splits, config)


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    length_stride: int,
    width: int,
    mask: Tensor | None,
    scale: float,
    splits: int | None,
    config: Mapping[str, int] | None,
) -> Tensor:
    B, heads, _, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    name, sms = device_facts(q.device)
    if config is None:
        config = launch_config("decode_attention", f"head_dim={head_dim},group={group},bytes={q.element_size()}", name)
    out = torch.empty((B, heads, 1, head_dim), dtype=q.dtype, device=q.device)
    if not B:
        return out
    if splits is None:
        limits = {key: config[key] for key in ("min_split", "programs_per_sm")}
        splits = count_splits(B * kv_heads, width, sms, **limits)
    m = z = acc = None
    if splits > 1:
        m, z = torch.empty((2, B * heads, splits), dtype=torch.float32, device=q.device)
        acc = torch.empty((B * heads, splits, head_dim), dtype=torch.float32, device=q.device)

    block_g, block_d = block_sizes(group, head_dim)
    block_t = min(128, max(16, config["tile_bytes"] // (block_d * q.element_size())))
    # a thread keeps 32 elements of acc, or fewer
    warps = min(16, max(config["num_warps"], block_g * block_d // 1024))
    mask_strides = (0, 0) if mask is None else (mask.stride(0) * (mask.shape[0] > 1), mask.stride(3))
    with torch.cuda.device_of(q):
        _decode_attention_kernel[(B * kv_heads, splits)](
            q, k_cache, v_cache, mask, out, m, z, acc, length, width, splits, scale * math.log2(math.e), kv_heads,
            group, q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], *mask_strides,
            LENGTH_STRIDE=length_stride, HEAD_DIM=head_dim, BLOCK_G=block_g, BLOCK_T=block_t, BLOCK_D=block_d,
            STAGES=config["stages"], num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            _merge_splits_kernel[(B * heads,)](
                m, z, acc, out, splits, HEAD_DIM=head_dim, BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=block_d
            )
    return out
