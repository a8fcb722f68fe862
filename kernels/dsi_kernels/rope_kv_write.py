"""Rotary embedding of packed q|k|v rows, fused with the write of k and v into the cache, for inference (forward only).

    q'               = q * cos + rotate_half(q) * sin         (first rotary_dim of head_dim; the rest is copied)
    k_cache[start+s] = k * cos + rotate_half(k) * sin
    v_cache[start+s] = v

with rotate_half(x) = [-x2, x1] for x = [x1, x2], the halves of rotary_dim. One program per token and block of heads;
reads qkv once, writes q, k and v once: 2 * T * (heads + 2 kv_heads) * head_dim * itemsize bytes, memory bound.

Casting: products and sum in fp32, one rounding. transformers' apply_rotary_pos_emb evaluates the same formula in the
model dtype and rounds three times; the one rounding lies nearer to the exact result in fp16 and bf16, and is equal to
it to within an fp32 rounding in fp32. cos and sin are taken in the dtype they come in, the model's or fp32.

`start` may lie on the device. A position outside the cache is not written, and nothing says so: whoever counts
positions on the device checks the limits on the host.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; half layout as in transformers' LLaMA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._triton import tl, triton
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, check_rows_contiguous, shapes
from dsi_kernels.positions import position_stride, positions_reference, read_position

# elements a program holds where there are tokens enough to fill the device; not measured
TILE = 2048
# from here on a program takes several heads of its token; below, one
MANY_TOKENS = 64


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, heads, head_dim] with its first rotary_dim rotated, in fp32 with one rounding."""
    rotary = cos.shape[-1]
    h, cos, sin = x[..., :rotary].float(), cos.float().unsqueeze(2), sin.float().unsqueeze(2)
    turned = torch.cat((-h[..., rotary // 2 :], h[..., : rotary // 2]), dim=-1)
    return torch.cat(((h * cos + turned * sin).to(x.dtype), x[..., rotary:]), dim=-1)


def rope_kv_write_reference(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int | Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path.

    One difference: a device position outside the cache is an IndexError here, and dropped by the kernel.
    """
    B, S, _ = qkv.shape
    q, k, v = qkv.view(B, S, -1, head_dim).split((heads, kv_heads, kv_heads), dim=2)
    if cos is not None and sin is not None:
        q, k = _rotate_reference(q, cos, sin), _rotate_reference(k, cos, sin)
    rows = torch.arange(B, device=qkv.device)[:, None]
    columns = positions_reference(start, B, qkv.device)[:, None] + torch.arange(S, device=qkv.device)
    k_cache[rows, :, columns] = k
    v_cache[rows, :, columns] = v
    return q.transpose(1, 2).contiguous()


@triton.jit
def _rotated(
    x, row_ptr, slot, inside, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr
):
    """x as fp32 with its first ROTARY columns rotated; the other half of each pair is read again, out of the L1."""
    d = tl.arange(0, BLOCK_D)
    turned = d < ROTARY
    partner = tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
    other = tl.load(row_ptr + slot[:, None] * HEAD_DIM + partner[None, :], mask=inside & turned[None, :], other=0.0)
    other = tl.where((d < ROTARY // 2)[None, :], -other.to(tl.float32), other.to(tl.float32))
    cos = tl.load(cos_ptr + d, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + d, mask=turned, other=0.0).to(tl.float32)
    return x.to(tl.float32) * cos[None, :] + other * sin[None, :]


@triton.jit(do_not_specialize=["start", "capacity"])
def _rope_kv_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, start, S, capacity, heads, kv_heads,
    cos_b, cos_s, sin_b, sin_s, k_b, k_h, k_t, v_b, v_h, v_t,
    START_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64 before a stride multiplies: a cache of 128k tokens passes 2**31 elements at batch 32
    token = tl.program_id(0)
    b, s = (token // S).to(tl.int64), (token % S).to(tl.int64)
    slots = heads + 2 * kv_heads
    slot = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (slot < slots)[:, None] & (d < HEAD_DIM)[None, :]

    row_ptr = qkv_ptr + token.to(tl.int64) * slots * HEAD_DIM
    x = tl.load(row_ptr + slot[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    if ROTARY > 0:
        at_cos, at_sin = cos_ptr + b * cos_b + s * cos_s, sin_ptr + b * sin_b + s * sin_s
        y = _rotated(x, row_ptr, slot, inside, at_cos, at_sin, HEAD_DIM, ROTARY, BLOCK_D).to(x.dtype)
        x = tl.where((slot < heads + kv_heads)[:, None], y, x)

    is_q = inside & (slot < heads)[:, None]
    tl.store(q_ptr + (((b * S + s) * heads + slot) * HEAD_DIM)[:, None] + d[None, :], x, mask=is_q)
    # one a slot: the interpreter mistypes what a comparison of two scalars gives
    t = read_position(start, b, START_STRIDE) + s + tl.zeros([BLOCK_H], tl.int64)
    fits = (t >= 0) & (t < capacity)
    k_slot, v_slot = slot - heads, slot - heads - kv_heads
    is_k = inside & (fits & (k_slot >= 0) & (v_slot < 0))[:, None]
    tl.store(k_ptr + (b * k_b + k_slot * k_h + t * k_t)[:, None] + d[None, :], x, mask=is_k)
    is_v = inside & (fits & (v_slot >= 0))[:, None]
    tl.store(v_ptr + (b * v_b + v_slot * v_h + t * v_t)[:, None] + d[None, :], x, mask=is_v)


def check_rope_kv_write(
    op: str, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, k_cache: Tensor, v_cache: Tensor,
    heads: int, kv_heads: int, head_dim: int,
) -> int:  # fmt: skip
    """The number of columns to rotate, 0 without cos and sin; a ValueError where operands do not fit."""
    _check_qkv_and_caches(op, qkv, k_cache, v_cache, heads, kv_heads, head_dim)
    rotary = _check_rope(op, qkv, cos, sin, head_dim)
    check_devices(op, qkv=qkv, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
    return rotary


def _check_qkv_and_caches(
    op: str, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, kv_heads: int, head_dim: int
) -> None:
    if min(heads, kv_heads, head_dim) < 1:
        raise ValueError(f"{op}: heads={heads}, kv_heads={kv_heads} and head_dim={head_dim} must be 1 or more")
    width = (heads + 2 * kv_heads) * head_dim
    if qkv.ndim != 3 or qkv.shape[-1] != width:
        raise ValueError(
            f"{op}: qkv has shape {tuple(qkv.shape)}; [B, S, {width}] is (heads + 2 kv_heads) * head_dim "
            f"for heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}"
        )
    expected = (qkv.shape[0], kv_heads, k_cache.shape[-2] if k_cache.ndim == 4 else 0, head_dim)
    if k_cache.shape != expected or v_cache.shape != expected:
        raise ValueError(
            f"{op}: {shapes(k_cache=k_cache, v_cache=v_cache)} must both be "
            f"[B={qkv.shape[0]}, kv_heads={kv_heads}, capacity, head_dim={head_dim}]"
        )
    check_dtypes(op, qkv=qkv, k_cache=k_cache, v_cache=v_cache)
    check_rows_contiguous(op, k_cache=k_cache, v_cache=v_cache)


def _check_rope(op: str, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, head_dim: int) -> int:
    """The number of columns to rotate, 0 without cos and sin."""
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError(f"{op}: cos and sin come together; {'cos' if cos is None else 'sin'} is None alone")
        return 0
    B, S, _ = qkv.shape
    rotary = cos.shape[-1] if cos.ndim else 0
    if cos.shape != sin.shape or cos.ndim != 3 or cos.shape[0] not in (1, B) or cos.shape[1] != S:
        raise ValueError(f"{op}: {shapes(cos=cos, sin=sin)} must both be [{B} or 1, {S}, rotary_dim]")
    if rotary % 2 or not 0 < rotary <= head_dim:
        raise ValueError(f"{op}: rotary_dim {rotary} of cos and sin must be even, from 2 to head_dim {head_dim}")
    if cos.dtype != sin.dtype or cos.dtype not in (qkv.dtype, torch.float32):
        raise ValueError(
            f"{op}: cos is {cos.dtype}, sin {sin.dtype}; both {qkv.dtype}, as qkv, or both float32 will do"
        )
    check_rows_contiguous(op, cos=cos, sin=sin)
    return rotary


def rope_kv_write(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int | Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Tensor:
    """The rotated queries; the rotated keys and the values are in the caches afterwards, at start .. start + S.

    Args:
        qkv: [B, S, (heads + 2 kv_heads) * head_dim], fp16, bf16 or fp32, contiguous: all q heads, all k, all v.
        cos, sin: [B or 1, S, rotary_dim], rotary_dim even and at most head_dim, in qkv's dtype or fp32, each row
            contiguous; None for both leaves q and k as they are.
        k_cache, v_cache: [B, kv_heads, capacity, head_dim], qkv's dtype, last axis contiguous. Written in place.
        start: position of the first new token in the cache: an int, or an int32 or int64 tensor [] or [B].
        heads, kv_heads, head_dim: how a row of qkv divides.

    Returns:
        [B, heads, S, head_dim], in memory [B, S, heads, head_dim], in qkv's dtype: attention gives its result in the
        order of its queries, and the layer after it wants the tokens' rows. qkv is not modified.

    Raises:
        ValueError: shapes, dtypes, layout, devices or an int start do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    at = kind_of(start if isinstance(start, Tensor) else None)
    key = (heads, kv_heads, head_dim, kind_of(qkv, cos, sin, k_cache, v_cache), at)
    launch = _LAUNCHES.get(key, lambda: _launch(qkv, cos, sin, k_cache, v_cache, start, heads, kv_heads, head_dim))
    B, S, _ = qkv.shape
    if isinstance(start, int) and not 0 <= start <= k_cache.shape[2] - S:
        raise ValueError(
            f"rope_kv_write: {S} tokens from start={start} on do not fit a cache of capacity {k_cache.shape[2]}"
        )
    q = torch.empty((B, S, heads, head_dim), dtype=qkv.dtype, device=qkv.device).transpose(1, 2)
    launch(qkv, cos, sin, q, k_cache, v_cache, start)
    return q


_LAUNCHES: Launches[Launch] = Launches()


def _launch(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, k_cache: Tensor, v_cache: Tensor, start: int | Tensor,
    heads: int, kv_heads: int, head_dim: int,
) -> Launch:  # fmt: skip
    op = "rope_kv_write"
    rotary = check_rope_kv_write(op, qkv, cos, sin, k_cache, v_cache, heads, kv_heads, head_dim)
    check_contiguous(op, qkv=qkv)
    B, S, _ = qkv.shape
    stride = position_stride("rope_kv_write", "start", start, B, qkv.device)
    tokens, slots, block_d = B * S, heads + 2 * kv_heads, triton.next_power_of_2(head_dim)
    block_h = 1 if tokens < MANY_TOKENS else min(triton.next_power_of_2(slots), max(1, TILE // block_d))
    # a batch stride of 0 reads the one row of cos for every row of the batch
    turns = (0, 0) if cos is None or sin is None else (cos.stride(0) * (cos.shape[0] > 1), cos.stride(1))
    more = (0, 0) if cos is None or sin is None else (sin.stride(0) * (sin.shape[0] > 1), sin.stride(1))
    strides = (*turns, *more, *k_cache.stride()[:3], *v_cache.stride()[:3])
    fixed = (S, k_cache.shape[2], heads, kv_heads, *strides, stride, head_dim, rotary, block_h, block_d)
    grid, warps = (tokens, triton.cdiv(slots, block_h)), 4 if block_h > 1 else 1
    return Launch(_rope_kv_write_kernel, grid, fixed, {"num_warps": warps})
