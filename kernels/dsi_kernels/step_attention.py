"""The attention of a decode step in one launch: head norms, rotary embedding, cache write, split context, merge.

    q, k = rope(norm(q)), rope(norm(k));  k_cache[start], v_cache[start] = k, v
    out  = softmax(bias + cap(scale * q k^T), over the earlier tokens seen and the new one) v

One program per batch row, KV head and split of the context; the query heads of a group share it, so that K and V are
read once: 2 * B * kv_heads * length * head_dim * itemsize bytes, memory bound. Every program turns the queries of its
group itself. The new token's k and v are the softmax's initial state in split 0, out of registers, and split 0 writes
them to the cache: no program reads what another one of the launch writes there, whatever their order.

Splits are counted by the host from the capacity and cut by the device from the length that it reads, min_split tokens
or more each, so one CUDA graph serves every length; programs without tokens end at once. One live split writes the
output. Several leave (m, z, acc) in fp32, and the program that draws the last ticket (an integer atomic with release
and acquire at the scope of the device, after a barrier of its program's threads) adds them up, in the order of the
splits whoever it is, and puts the ticket back to 0: same input, same output, bit for bit.

With programmatic dependent launch the first tiles of K and V, the mask, the position and the tables are loaded before
the wait. All of them were written before the graph was launched: a graph holds one step, of which this launch alone
writes to these buffers, and at slots that are not read; the counters move on in the step's last kernel. qkv, scratch
and tickets are touched after the wait.

Casting: norm and rotation in fp32 with one rounding of q and k to the dtype; scores and softmax in fp32, base 2. A
group of two or more goes through tl.dot, which takes the weights rounded to the dtype (fp32 stays fp32, not TF32). One
rounding at the end. Position biases are rounded as the model that has them rounds them.

A token whose mask is False, the new one included, is not attended to, and may hold anything. A start beyond the cache
is not written. Nothing to attend to gives 0.

Longer than 500 lines: one launch has the parts of four, and each is checked and has its reference.

Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; Su et al. 2021,
https://arxiv.org/abs/2104.09864; Press et al. 2022, https://arxiv.org/abs/2108.12409.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsi_kernels._pdl import launch_dependents, launch_options, wait
from dsi_kernels._triton import tl, triton
from dsi_kernels.decode_attention import MAX_GROUP, MAX_GROUP_TILE, MAX_HEAD_DIM, MAX_SPLITS, block_sizes
from dsi_kernels.operands import check_devices, check_dtypes, check_rows_contiguous, shapes
from dsi_kernels.positions import position_stride, positions_reference, read_position
from dsi_kernels.tuned import device_facts, launch_config

LOG2E = math.log2(math.e)
ROUNDED = {"": 0, "bfloat16": 1, "float16": 2}
# fp32 elements that the merging program adds up at a time
MERGE_TILE = 8192


class StepRope(NamedTuple):
    """Rotary terms of the new tokens.

    Args:
        cos, sin: [1 or B, 1, rotary_dim] of the positions at hand; or with `at` [1, N, rotary_dim] of all positions.
        pairs: dimensions 2i and 2i + 1 turn together, not i and i + rotary_dim / 2.
        at: int64 [B or 1, 1], the rows of cos and sin; or None.
    """

    cos: Tensor
    sin: Tensor
    pairs: bool = False
    at: Tensor | None = None


class HeadNorm(NamedTuple):
    """A norm over each head of q, and one over each head of k: "rms" or "layer", (x' * (weight + offset)) + bias."""

    kind: str
    q_weight: Tensor | None
    k_weight: Tensor | None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    eps: float = 1e-6
    offset: float = 0.0


class StepAlibi(NamedTuple):
    """Position biases: slope * place of the key, rounded as the model does, times scale.

    Args:
        slopes: float32 [heads].
        places: int64 [B or 1, T], each key's place; None for its position.
        rounded: dtype that places and products are rounded to, "bfloat16", "float16" or "".
        scale: multiplies the biases, which are of qkv's dtype by then.
    """

    slopes: Tensor
    places: Tensor | None = None
    rounded: str = ""
    scale: float = 1.0


def _normed_reference(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, norm: HeadNorm) -> Tensor:
    """x [B, heads, head_dim], fp32."""
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    y = y if weight is None else y * (weight.float() + norm.offset)
    return y if bias is None else y + bias.float()


def _turned_reference(x: Tensor, rope: StepRope) -> Tensor:
    """x [B, heads, head_dim], fp32."""
    cos, sin = (t if rope.at is None else t[0][rope.at] for t in (rope.cos.float(), rope.sin.float()))
    h, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if rope.pairs:
        other = torch.stack((-h[..., 1::2], h[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = h.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
    return torch.cat((h * cos + other * sin, rest), dim=-1)


def _bias_reference(alibi: StepAlibi, width: int, dtype: torch.dtype) -> Tensor:
    """[B or 1, heads, width], fp32."""
    places = torch.arange(width, device=alibi.slopes.device)[None] if alibi.places is None else alibi.places[:, :width]
    bias = alibi.slopes[:, None] * places[:, None].float()
    if alibi.rounded:
        to = getattr(torch, alibi.rounded)
        bias = (alibi.slopes[:, None] * places[:, None].to(to).float()).to(to)
    bias = bias.to(dtype)
    return (bias * alibi.scale if alibi.scale != 1.0 else bias).float()


def _seen_reference(
    length: Tensor, width: int, mask: Tensor | None, window: int | None, *, ring: bool
) -> tuple[Tensor, Tensor]:
    """(position of each slot [B, width], whether it is attended to); `length` earlier tokens are there."""
    slots, n = torch.arange(width, device=length.device)[None], length[:, None]
    at = n - 1 - (n - 1 - slots) % width if ring else slots.expand(len(length), width)
    seen = (at >= 0) & (at < n) & (at > n - (2**31 if window is None else window))
    if mask is not None:
        rows = mask[:, 0, 0].expand(len(length), -1)
        seen &= rows.gather(1, at.clamp(0, rows.shape[1] - 1)) & (at < rows.shape[1])
    return at, seen


def step_attention_reference(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int | Tensor,
    heads: int,
    kv_heads: int,
    *,
    rope: StepRope | None = None,
    norm: HeadNorm | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: StepAlibi | None = None,
    window: int | None = None,
    ring: bool = False,
) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    B, _, width, head_dim = k_cache.shape
    q, k, v = qkv.view(B, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    wide = [q.float(), k.float()]
    if norm is not None:
        sides = ((norm.q_weight, norm.q_bias), (norm.k_weight, norm.k_bias))
        wide = [_normed_reference(x, norm.kind, *side, norm) for x, side in zip(wide, sides, strict=True)]
    if rope is not None:
        wide = [_turned_reference(x, rope) for x in wide]
    q, k = (x.to(qkv.dtype) for x in wide)

    group, repeat = heads // kv_heads, k_cache.shape[1] // kv_heads
    length = positions_reference(start, B, qkv.device)
    at, seen = _seen_reference(length, width, mask, window, ring=ring)
    new = torch.ones_like(seen[:, :1]) if mask is None else mask[:, 0, 0].expand(B, -1).gather(1, length[:, None])
    live = torch.cat((seen, new), 1)[:, None]
    keys, values = (torch.cat((c[:, ::repeat], x[:, :, None]), 2) for c, x in ((k_cache, k), (v_cache, v)))
    keys, values = (t.float().repeat_interleave(group, 1) for t in (keys, values))
    scores = (q.float()[:, :, None] @ keys.mT)[:, :, 0] * (head_dim**-0.5 if scale is None else scale)
    scores = scores if softcap is None else (scores / softcap).tanh() * softcap
    if alibi is not None:
        everywhere = torch.cat((at.clamp(min=0), length[:, None]), 1)[:, None]
        bias = _bias_reference(alibi, int(everywhere.max()) + 1, qkv.dtype).expand(B, -1, -1)
        scores = scores + bias.gather(2, everywhere.expand(B, heads, -1))
    # a row of -inf alone becomes NaN in the softmax, and 0 here; so do values that nobody attends to
    weights = scores.masked_fill(~live, -math.inf).softmax(-1).masked_fill(~live, 0.0)
    out = (weights[:, :, None] @ values.masked_fill(~live[..., None], 0.0))[:, :, 0].to(qkv.dtype).reshape(B, -1)

    slot = length % width if ring else length
    rows = (slot < width).nonzero()[:, 0]
    for cache, x in ((k_cache, k), (v_cache, v)):
        cache[rows, :, slot[rows]] = x[rows].repeat_interleave(repeat, 1)
    return out


@triton.jit
def _affine(x, w_ptr, b_ptr, at, inside, offset):
    """x * (w[at] + offset) + b[at]."""
    if w_ptr is not None:
        x *= (tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32) + offset)[None, :]
    if b_ptr is not None:
        x += tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _heads(
    ptr, offsets, live, w_ptr, b_ptr, cos_ptr, sin_ptr, eps, offset,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Heads at ptr + offsets, normed and turned: fp32 [rows, BLOCK_D], zeros in rows that are not live."""
    d = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    x = tl.load(ptr + offsets[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    mean, rstd = 0.0, 1.0
    if NORM == "layer":
        mean = (tl.sum(x, axis=1) / HEAD_DIM)[:, None]
    if NORM != "":
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / HEAD_DIM + eps)[:, None]
        y = _affine((x - mean) * rstd, w_ptr, b_ptr, d, d < HEAD_DIM, offset)
    else:
        y = x
    if ROTARY > 0:
        if PAIRS:
            first, partner = d % 2 == 0, d ^ 1
        else:
            first = d < ROTARY // 2
            partner = tl.where(first, d + ROTARY // 2, d - ROTARY // 2)
        turned = d < ROTARY
        other = tl.load(ptr + offsets[:, None] + partner[None, :], mask=inside & turned[None, :], other=0.0)
        other = other.to(tl.float32)
        if NORM != "":
            other = _affine((other - mean) * rstd, w_ptr, b_ptr, partner, turned, offset)
        other = tl.where(first[None, :], -other, other)
        cos = tl.load(cos_ptr + d, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + d, mask=turned, other=0.0).to(tl.float32)
        y = y * cos[None, :] + other * sin[None, :]
    return tl.where(inside, y, 0.0)


@triton.jit
def _round(x, ROUND: tl.constexpr):
    if ROUND == 1:
        x = x.to(tl.bfloat16).to(tl.float32)
    elif ROUND == 2:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _bias(slope, places_ptr, at, live, alibi_scale, ROUND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    """Of keys at positions `at`, in base 2; slope broadcasts with at."""
    if places_ptr is not None:
        at = tl.load(places_ptr + at, mask=live, other=0)
    bias = _round(_round(slope * _round(at.to(tl.float32), ROUND), ROUND), DTYPE)
    if SCALED:
        bias = _round(bias * alibi_scale, DTYPE)
    return bias * 1.4426950408889634


@triton.jit
def _capped(s, cap, CAPPED: tl.constexpr):
    """cap * tanh(s); as it is without a cap."""
    if CAPPED:
        # 1 - 2 / (e^2x + 1) loses what is small beside 1: there the series will do
        s2 = s * s
        small = s * (1.0 - s2 * (0.3333333333333333 - s2 * (0.13333333333333333 - s2 * 0.05396825396825397)))
        large = 2.0 * tl.sigmoid(2.0 * s) - 1.0
        s = tl.where(tl.abs(s) < 0.1, small, large) * cap
    return s


@triton.jit
def _tile(
    k_ptr, v_ptr, mask_ptr, t, k_t, v_t, mask_t, hi, n, oldest, capacity,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """(k, v, position of each slot, whether it is attended to) of slots t."""
    d = tl.arange(0, BLOCK_D)
    live = t < hi
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + (t.to(tl.int64) * k_t)[:, None] + d[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + (t.to(tl.int64) * v_t)[:, None] + d[None, :], mask=inside, other=0.0)
    at = t
    if RING:
        at = n - 1 - (n - 1 - t) % capacity
        live = live & (at >= oldest)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + at.to(tl.int64) * mask_t, mask=live, other=0) != 0)
    return k, v, at, live


@triton.jit
def _fold(
    q, k, v, at, live, slope, places_ptr, scale, cap, alibi_scale, m, z, acc,
    CAPPED: tl.constexpr, ROUND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr, ALIBI: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The softmax (m, z, acc) with a tile more.

    A single head keeps a softmax for every row of the tile, so that nothing is exchanged between rows, and thereby
    between warps, before the end.
    """
    if GROUP:
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        alive = live[None, :]
        at = at[None, :]
    else:
        s = tl.sum(q * k.to(tl.float32), axis=1) * scale
        alive = live
    s = _capped(s, cap, CAPPED)
    if ALIBI:
        s += _bias(slope, places_ptr, at, alive, alibi_scale, ROUND, DTYPE, SCALED)
    s = tl.where(alive, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, axis=1)) if GROUP else tl.maximum(m, s)
    # -inf - -inf is NaN: with nothing seen yet, measure from 0
    base = tl.where(top == float("-inf"), 0.0, top)
    kept = tl.exp2(m - base)
    # what is not attended to may be anything
    v = tl.where(live[:, None], v, 0.0)
    if GROUP:
        p = tl.exp2(s - base[:, None])
        z = z * kept + tl.sum(p, axis=1)
        acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    else:
        p = tl.exp2(s - base)
        z = z * kept + p
        acc = acc * kept[:, None] + p[:, None] * v.to(tl.float32)
    return top, z, acc


@triton.jit
def _merge(
    m_ptr, z_ptr, acc_ptr, out_ptr, row, group, live, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, MOST: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The splits of a group's heads, whose first is `row`, added up in their order."""
    g, d, s = tl.arange(0, HEADS), tl.arange(0, BLOCK_D), tl.arange(0, MOST)
    first = (row + g) * splits
    # past the L1 cache, which does not see other multiprocessors' writes
    there = (g < group)[:, None] & (s < live)[None, :]
    m = tl.load(m_ptr + first[:, None] + s[None, :], mask=there, other=float("-inf"), cache_modifier=".cg")
    z = tl.load(z_ptr + first[:, None] + s[None, :], mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(m, axis=1)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(z * tl.exp2(m - base[:, None]), axis=1)
    out = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for s0 in tl.range(0, live, BLOCK_S):
        # names of their own: these are narrower than those above, and a loop's names keep their types
        part = s0 + tl.arange(0, BLOCK_S)
        at = first[:, None] + part[None, :]
        mine = (g < group)[:, None] & (part < live)[None, :]
        share = tl.load(m_ptr + at, mask=mine, other=float("-inf"), cache_modifier=".cg")
        share = tl.exp2(share - base[:, None])
        inside = mine[:, :, None] & (d < HEAD_DIM)[None, None, :]
        where = acc_ptr + (at * HEAD_DIM)[:, :, None] + d[None, None, :]
        out += tl.sum(tl.load(where, mask=inside, other=0.0, cache_modifier=".cg") * share[:, :, None], axis=1)
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    whole = (g < group)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptr + ((row + g) * HEAD_DIM)[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=whole)


@triton.jit
def _stretch(
    start, b, split, splits, min_split, width, capacity, window,
    START_STRIDE: tl.constexpr, BLOCK_T: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """(earlier tokens, first position seen, first slot and end of this split, splits that have tokens, or 1)."""
    n = tl.minimum(tl.maximum(read_position(start, b, START_STRIDE), 0), 2147483646)
    oldest = tl.maximum(n - window + 1, 0).to(tl.int32)
    if RING:
        # a position is what the mask knows, a slot what the cache holds
        n = n.to(tl.int32)
        end, begin = tl.minimum(n, capacity), n * 0
    else:
        n = tl.minimum(n, capacity).to(tl.int32)
        end, begin = tl.minimum(n, width), oldest
    count = tl.maximum(end - begin, 0)
    step = tl.maximum(tl.cdiv(tl.cdiv(count, splits), BLOCK_T) * BLOCK_T, min_split)
    lo = begin + split * step
    return n, oldest, lo, tl.minimum(lo + step, end), tl.maximum(tl.cdiv(count, step), 1)


@triton.jit
def _slopes(slopes_ptr, h, group, g, GROUP: tl.constexpr):
    """The slopes of a KV head's query heads, [heads, 1]; of one, a scalar; 0 where there are none."""
    slope = 0.0
    if slopes_ptr is not None:
        if GROUP:
            slope = tl.load(slopes_ptr + h * group + g, mask=g < group, other=0.0)[:, None]
        else:
            slope = tl.load(slopes_ptr + h)
    return slope


@triton.jit
def _queries(
    ptr, r, g, group, w_ptr, b_ptr, cos_ptr, sin_ptr, eps, offset, DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The queries of a KV head, rounded to the dtype: [BLOCK_G, BLOCK_D], or one, in fp32, for every row of K.

    A single row of it would settle the layout of the whole loop, at one column a thread (Triton 3.6 for sm_90), and
    make every score a sum over four warps.
    """
    if GROUP:
        q = _heads(
            ptr, g * HEAD_DIM, g < group, w_ptr, b_ptr, cos_ptr, sin_ptr, eps, offset,
            HEAD_DIM, ROTARY, PAIRS, NORM, BLOCK_D,
        ).to(DTYPE)  # fmt: skip
    else:
        q = _heads(
            ptr, r * 0, r >= 0, w_ptr, b_ptr, cos_ptr, sin_ptr, eps, offset, HEAD_DIM, ROTARY, PAIRS, NORM, BLOCK_D
        ).to(DTYPE).to(tl.float32)  # fmt: skip
    return q


@triton.jit
def _write(
    k_ptr, v_ptr, k_new, v_new, place, one, capacity, k_h, k_t, v_h, v_t,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RING: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """The new token to its slot of the cache; not where that is beyond it."""
    d = tl.arange(0, BLOCK_D)
    slot = place % capacity if RING else place
    # int64 by name: a scalar takes the type of the block that it is added to
    at = one.to(tl.int64) * 0 + slot
    fits = (one & (at >= 0) & (at < capacity))[:, None] & (d < HEAD_DIM)[None, :]
    for copy in range(REPEAT):
        tl.store(k_ptr + copy * k_h + (at * k_t)[:, None] + d[None, :], k_new, mask=fits)
        tl.store(v_ptr + copy * v_h + (at * v_t)[:, None] + d[None, :], v_new, mask=fits)


@triton.jit
def _begun(
    q, k_new, v_new, place, row, mask_ptr, slope, places_ptr, width, scale, cap, alibi_scale, mask_t,
    CAPPED: tl.constexpr, ROUND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr, ALIBI: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The softmax (m, z, acc) of the new token alone; of one head, in row 0."""
    s = _capped(tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale, cap, CAPPED)
    seen = row >= 0 if GROUP else row == 0
    at = row.to(tl.int64) * 0 + place
    if mask_ptr is not None:
        seen = seen & (tl.load(mask_ptr + at * mask_t, mask=seen & (at < width), other=0) != 0)
    if ALIBI:
        if GROUP:
            s += tl.sum(_bias(slope, places_ptr, at[:, None], seen[:, None], alibi_scale, ROUND, DTYPE, SCALED), 1)
        else:
            s += _bias(slope, places_ptr, at, seen, alibi_scale, ROUND, DTYPE, SCALED)
    acc = tl.where(seen[:, None], v_new.to(tl.float32), 0.0) + tl.zeros_like(q).to(tl.float32)
    return tl.where(seen, s, float("-inf")), tl.where(seen, 1.0, 0.0), acc


@triton.jit
def _leave(
    m, z, acc, m_ptr, z_ptr, acc_ptr, ticket_ptr, out_ptr, row, group, split, splits, live_splits,
    HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, MOST: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The output of the group whose first head is `row`: from one split, or from all, by whoever ends last."""
    if BLOCK_G == 1:
        top = tl.max(m, axis=0)
        share = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
        acc = tl.sum(acc * share[:, None], axis=0)[None, :]
        m, z = top + tl.zeros([1], tl.float32), tl.sum(z * share, axis=0) + tl.zeros([1], tl.float32)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = (g < group)[:, None] & (d < HEAD_DIM)[None, :]
    if live_splits == 1:
        # nothing attended to: 0 / 1
        out = acc / tl.where(z == 0.0, 1.0, z)[:, None]
        at = out_ptr + ((row + g) * HEAD_DIM)[:, None] + d[None, :]
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
    elif m_ptr is not None:
        part = (row + g) * splits + split
        tl.store(m_ptr + part, m, mask=g < group)
        tl.store(z_ptr + part, z, mask=g < group)
        tl.store(acc_ptr + (part * HEAD_DIM)[:, None] + d[None, :], acc, mask=inside)
        # every thread's stores come before the one thread's ticket, and every thread's loads after it
        tl.debug_barrier()
        ticket = tl.atomic_add(ticket_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        if ticket == live_splits - 1:
            tl.store(ticket_ptr + tl.program_id(0), 0)
            _merge(
                m_ptr, z_ptr, acc_ptr, out_ptr, row, group, live_splits, splits,
                HEAD_DIM, BLOCK_D, HEADS, MOST, BLOCK_S,
            )  # fmt: skip


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        wait()


@triton.jit
def _open(PDL: tl.constexpr):
    if PDL:
        launch_dependents()


# what grows with every token is no reason to compile again
@triton.jit(do_not_specialize=["start", "width", "splits", "min_split", "window", "mask_b", "places_b"])
def _step_attention_kernel(  # noqa: PLR0915 - a prologue, a loop and an epilogue
    qkv_ptr, k_ptr, v_ptr, out_ptr, m_ptr, z_ptr, acc_ptr, ticket_ptr, cos_ptr, sin_ptr, at_ptr,
    q_w_ptr, k_w_ptr, q_b_ptr, k_b_ptr, mask_ptr, slopes_ptr, places_ptr,
    start, width, capacity, splits, min_split, window, scale, cap, eps, offset, alibi_scale, kv_heads, group,
    qkv_b, k_b, k_h, k_t, v_b, v_h, v_t, cos_b, cos_t, sin_b, sin_t, mask_b, mask_t, places_b,
    START_STRIDE: tl.constexpr, AT_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    PAIRS: tl.constexpr, NORM: tl.constexpr, CAPPED: tl.constexpr, RING: tl.constexpr, REPEAT: tl.constexpr,
    ROUND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, MOST: tl.constexpr,
    BLOCK_S: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _open(PDL)
    GROUP: tl.constexpr = BLOCK_G > 1
    ALIBI: tl.constexpr = slopes_ptr is not None
    ROWS: tl.constexpr = BLOCK_G if BLOCK_G > 1 else BLOCK_T
    # int64 before a stride multiplies: a cache of 128k tokens passes 2**31 elements at batch 32
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    h = (tl.program_id(0) % kv_heads).to(tl.int64)
    split = tl.program_id(1)
    scale, cap, alibi_scale = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32), tl.cast(alibi_scale, tl.float32)
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)

    n, oldest, lo, hi, live_splits = _stretch(
        start, b, split, splits, min_split, width, capacity, window, START_STRIDE, BLOCK_T, RING
    )
    # as every kernel that was launched so must, it waits, and ends then, having touched nothing
    if split >= live_splits:
        _wait(PDL)
        return

    k_ptr += b * k_b + h * REPEAT * k_h
    v_ptr += b * v_b + h * REPEAT * v_h
    if mask_ptr is not None:
        mask_ptr += b * mask_b
    if places_ptr is not None:
        places_ptr += b * places_b
    if ROTARY > 0:
        at = b * 0
        if at_ptr is not None:
            at = tl.load(at_ptr + b * AT_STRIDE)
        cos_ptr += b * cos_b + at * cos_t
        sin_ptr += b * sin_b + at * sin_t
    g, d, r = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    slope = _slopes(slopes_ptr, h, group, g, GROUP)
    k, v, at, live = _tile(
        k_ptr, v_ptr, mask_ptr, lo + r, k_t, v_t, mask_t, hi, n, oldest, capacity, HEAD_DIM, BLOCK_D, RING
    )
    _wait(PDL)

    row_ptr = qkv_ptr + b * qkv_b
    q = _queries(
        row_ptr + h * group * HEAD_DIM, r, g, group, q_w_ptr, q_b_ptr, cos_ptr, sin_ptr, eps, offset, k.dtype,
        HEAD_DIM, ROTARY, PAIRS, NORM, BLOCK_D, GROUP,
    )  # fmt: skip
    m, z = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if split == 0:
        fresh = tl.arange(0, 1) if GROUP else r
        k_new_ptr = row_ptr + (kv_heads * group + h) * HEAD_DIM
        k_new = _heads(
            k_new_ptr, fresh * 0, fresh == 0, k_w_ptr, k_b_ptr, cos_ptr, sin_ptr, eps, offset,
            HEAD_DIM, ROTARY, PAIRS, NORM, BLOCK_D,
        ).to(k.dtype)  # fmt: skip
        inside = (fresh == 0)[:, None] & (d < HEAD_DIM)[None, :]
        at_v = k_new_ptr + kv_heads * HEAD_DIM + (fresh * 0)[:, None] + d[None, :]
        v_new = tl.load(at_v, mask=inside, other=0.0)
        place = read_position(start, b, START_STRIDE)
        _write(
            k_ptr, v_ptr, k_new, v_new, place, fresh == 0, capacity, k_h, k_t, v_h, v_t, HEAD_DIM, BLOCK_D, RING, REPEAT
        )
        m, z, acc = _begun(
            q, k_new, v_new, place, g if GROUP else r, mask_ptr, slope, places_ptr, width, scale, cap, alibi_scale,
            mask_t, CAPPED, ROUND, DTYPE, SCALED, ALIBI, GROUP,
        )  # fmt: skip

    m, z, acc = _fold(
        q, k, v, at, live, slope, places_ptr, scale, cap, alibi_scale, m, z, acc,
        CAPPED, ROUND, DTYPE, SCALED, ALIBI, GROUP,
    )  # fmt: skip
    for t0 in tl.range(lo + BLOCK_T, hi, BLOCK_T, num_stages=STAGES):
        k, v, at, live = _tile(
            k_ptr, v_ptr, mask_ptr, t0 + r, k_t, v_t, mask_t, hi, n, oldest, capacity, HEAD_DIM, BLOCK_D, RING
        )
        m, z, acc = _fold(
            q, k, v, at, live, slope, places_ptr, scale, cap, alibi_scale, m, z, acc,
            CAPPED, ROUND, DTYPE, SCALED, ALIBI, GROUP,
        )  # fmt: skip
    _leave(
        m, z, acc, m_ptr, z_ptr, acc_ptr, ticket_ptr, out_ptr, (b * kv_heads + h) * group, group, split, splits,
        live_splits, HEAD_DIM, BLOCK_G, BLOCK_D, HEADS, MOST, BLOCK_S,
    )  # fmt: skip


def _check_shapes(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, kv_heads: int) -> None:
    op = "step_attention"
    if qkv.ndim != 2 or k_cache.ndim != 4 or k_cache.shape != v_cache.shape or k_cache.shape[0] != qkv.shape[0]:
        raise ValueError(
            f"{op}: {shapes(qkv=qkv, k_cache=k_cache, v_cache=v_cache)} must be [B, rows], then twice "
            "[B, kv_heads, capacity, head_dim]"
        )
    if kv_heads < 1 or heads % kv_heads or not 1 <= heads // kv_heads <= MAX_GROUP:
        raise ValueError(f"{op}: {heads} query heads are not 1 to {MAX_GROUP} for each of {kv_heads} KV heads")
    head_dim, group = k_cache.shape[3], heads // kv_heads
    if k_cache.shape[1] not in (kv_heads, heads):
        raise ValueError(
            f"{op}: the cache has {k_cache.shape[1]} heads; {kv_heads}, or {heads} where they are repeated, will do"
        )
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim {head_dim} is not from 1 to {MAX_HEAD_DIM}")
    if qkv.shape[1] != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(f"{op}: qkv has rows of {qkv.shape[1]}; {(heads + 2 * kv_heads) * head_dim} are needed")
    block_g, block_d = block_sizes(group, head_dim)
    if block_g * block_d > MAX_GROUP_TILE:
        raise ValueError(
            f"{op}: {group} query heads to a KV head, of head_dim {head_dim}, are {block_g} x {block_d} padded; up to "
            f"{MAX_GROUP_TILE} elements will do"
        )


def _check_rope(qkv: Tensor, rope: StepRope | None, head_dim: int) -> None:
    if rope is None:
        return
    op, cos, sin, at, B = "step_attention", rope.cos, rope.sin, rope.at, qkv.shape[0]
    rows = (1,) if at is not None else (1, B)
    if cos.ndim != 3 or cos.shape != sin.shape or cos.shape[0] not in rows or (at is None and cos.shape[1] != 1):
        raise ValueError(
            f"{op}: {shapes(cos=cos, sin=sin)} must both be [{B} or 1, 1, rotary_dim], or with at [1, N, ..]"
        )
    if cos.shape[2] % 2 or not 0 < cos.shape[2] <= head_dim:
        raise ValueError(f"{op}: rotary_dim {cos.shape[2]} must be even, from 2 to head_dim {head_dim}")
    if cos.dtype != sin.dtype or cos.dtype not in (qkv.dtype, torch.float32):
        raise ValueError(f"{op}: cos is {cos.dtype}, sin {sin.dtype}; both {qkv.dtype} or both float32 will do")
    if at is not None and (at.dtype != torch.int64 or at.shape not in ((B, 1), (1, 1))):
        raise ValueError(f"{op}: at is {at.dtype} {tuple(at.shape)}; int64 [{B} or 1, 1] is needed")
    check_rows_contiguous(op, cos=cos, sin=sin)


def _check_options(qkv: Tensor, norm: HeadNorm | None, mask: Tensor | None, head_dim: int) -> None:
    op, B = "step_attention", qkv.shape[0]
    if norm is not None and norm.kind not in ("rms", "layer"):
        raise ValueError(f"{op}: norm {norm.kind!r} is unknown; 'rms' or 'layer' will do")
    for name, t in ({} if norm is None else norm._asdict()).items():
        if isinstance(t, Tensor) and (t.shape != (head_dim,) or not t.is_contiguous()):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; ({head_dim},), contiguous, is needed")
    if mask is None:
        return
    if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[1:3] != (1, 1) or mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask is {mask.dtype} {tuple(mask.shape)}; bool [{B} or 1, 1, 1, T] is needed")


def _check_places(
    qkv: Tensor, capacity: int, heads: int, alibi: StepAlibi | None, window: int | None, *, ring: bool
) -> None:
    op, B = "step_attention", qkv.shape[0]
    if window is not None and window < 1:
        raise ValueError(f"{op}: window {window} is not 1 or more")
    if ring and not 1 <= (window or 0) <= capacity:
        raise ValueError(f"{op}: a ring of {capacity} slots needs a window from 1 to {capacity}, not {window}")
    if alibi is None:
        return
    if alibi.rounded not in ROUNDED:
        raise ValueError(f"{op}: rounded {alibi.rounded!r} is unknown; one of {', '.join(map(repr, ROUNDED))} will do")
    if alibi.slopes.shape != (heads,) or alibi.slopes.dtype != torch.float32 or not alibi.slopes.is_contiguous():
        raise ValueError(
            f"{op}: slopes are {alibi.slopes.dtype} {tuple(alibi.slopes.shape)}; float32 [{heads}] is needed"
        )
    places = alibi.places
    if places is not None and (places.dtype != torch.int64 or places.ndim != 2 or places.shape[0] not in (1, B)):
        raise ValueError(f"{op}: places are {places.dtype} {tuple(places.shape)}; int64 [{B} or 1, T] is needed")
    check_rows_contiguous(op, places=places)


def _check_devices(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor | None, *records: StepRope | HeadNorm | StepAlibi | None
) -> None:
    op, operands = "step_attention", {"qkv": qkv, "k_cache": k_cache, "v_cache": v_cache}
    check_dtypes(op, **operands)
    check_rows_contiguous(op, **operands)
    more = {
        name: t
        for record in records
        if record is not None
        for name, t in record._asdict().items()
        if isinstance(t, Tensor)
    }
    check_devices(op, **operands, mask=mask, **more)


def count_splits(programs: int, width: int, sms: int, *, min_split: int, programs_per_sm: int) -> int:
    """Into how many parts a context of up to width tokens is split, where there are so many programs without.

    As many as keep the device at programs_per_sm programs for each multiprocessor or below, of min_split tokens each.
    """
    return max(1, min(sms * programs_per_sm // max(programs, 1), -(-width // min_split), MAX_SPLITS))


def step_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int | Tensor,
    heads: int,
    kv_heads: int,
    *,
    rope: StepRope | None = None,
    norm: HeadNorm | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: StepAlibi | None = None,
    window: int | None = None,
    ring: bool = False,
    tickets: Tensor | None = None,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """Each row's new token attended to the earlier ones and itself; its k and v are in the caches afterwards.

    Args:
        qkv: [B, (heads + 2 kv_heads) * head_dim], fp16, bf16 or fp32: all q heads, all k, all v.
        k_cache, v_cache: [B, kv_heads, capacity, head_dim], qkv's dtype, last axis contiguous; or with `heads` heads,
            each KV head repeated for its group. Written in place.
        start: earlier tokens, and where the new one stands: an int, or an int32 or int64 tensor [] or [B].
        heads, kv_heads: heads is kv_heads times a group of up to 128; head_dim is any up to 256; the two padded to
            powers of two multiply to 16384 or less.
        rope: rotary terms; None leaves q and k as they are.
        norm: over the heads of q and k, before the rotation.
        mask: bool [B or 1, 1, 1, T], True to attend, T > start; or None. By position, also in a ring.
        scale: multiplies the scores; None for head_dim ** -0.5.
        softcap: c of c * tanh(scores / c), or None.
        alibi: position biases.
        window: how many positions a token sees, itself included; None for all before it.
        ring: position p stands at slot p % capacity, and capacity >= window: the new token takes the place of one that
            it does not see.
        tickets: int32 [B * kv_heads] zeros, zeros again afterwards, used by no launch beside this one; None for new
            ones, which takes a launch.
        config: all settings of tuned/step_attention/default.json, in the place of the tuned ones.

    Returns:
        [B, heads * head_dim] in qkv's dtype; 0 where there is nothing to attend to.

    Raises:
        ValueError: shapes, dtypes, layout, devices or an int start do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    _check_shapes(qkv, k_cache, v_cache, heads, kv_heads)
    B, head_dim, capacity = qkv.shape[0], k_cache.shape[3], k_cache.shape[2]
    _check_rope(qkv, rope, head_dim)
    _check_options(qkv, norm, mask, head_dim)
    _check_places(qkv, capacity, heads, alibi, window, ring=ring)
    _check_devices(qkv, k_cache, v_cache, mask, rope, norm, alibi)
    limit = min(capacity, mask.shape[3] if mask is not None else capacity)
    if isinstance(start, int) and (start < 0 or (not ring and start >= limit)):
        raise ValueError(
            f"step_attention: start {start} is not from 0 to {limit - 1}, below the cache's and mask's width"
        )
    if tickets is not None and (tickets.dtype != torch.int32 or tickets.shape != (B * kv_heads,)):
        raise ValueError(f"step_attention: tickets are {tickets.dtype} {tuple(tickets.shape)}; int32 [{B * kv_heads}]")
    stride = position_stride("step_attention", "start", start, B, qkv.device)
    if not B:
        return qkv.new_empty(0, heads * head_dim)
    options = {
        "scale": head_dim**-0.5 if scale is None else scale, "softcap": softcap, "window": window, "ring": ring,
        "tickets": tickets, "config": config,
    }  # fmt: skip
    return _launch(qkv, k_cache, v_cache, start, stride, heads, kv_heads, rope, norm, mask, alibi, options)


def _settings(
    qkv: Tensor, head_dim: int, group: int, config: Mapping[str, int] | None
) -> tuple[Mapping[str, int], int]:
    """(launch settings, multiprocessors)."""
    name, sms = device_facts(qkv.device)
    if config is None:
        config = launch_config("step_attention", f"head_dim={head_dim},group={group},bytes={qkv.element_size()}", name)
    return config, sms


def _blocks(group: int, head_dim: int, itemsize: int, splits: int, config: Mapping[str, int]) -> dict[str, int]:
    block_g, block_d = block_sizes(group, head_dim)
    heads, most = triton.next_power_of_2(group), triton.next_power_of_2(splits)
    return {
        "BLOCK_G": block_g,
        "BLOCK_D": block_d,
        "BLOCK_T": min(128, max(16, config["tile_bytes"] // (block_d * itemsize))),
        "HEADS": heads,
        "MOST": most,
        "BLOCK_S": max(1, min(most, MERGE_TILE // (heads * block_d))),
        "STAGES": config["stages"],
        # a thread keeps 32 elements of acc, or fewer
        "num_warps": min(16, max(config["num_warps"], block_g * block_d // 1024)),
    }


def _rope_arguments(qkv: Tensor, rope: StepRope | None) -> tuple[dict[str, Any], list[int]]:
    """(pointers and constants, strides)."""
    if rope is None:
        return {"cos_ptr": None, "sin_ptr": None, "at_ptr": None, "AT_STRIDE": 0, "ROTARY": 0, "PAIRS": False}, [0] * 4
    cos, sin, pairs, at = rope
    strides = [x for t in (cos, sin) for x in (t.stride(0) * (t.shape[0] > 1), t.stride(1))]
    at_stride = 0 if at is None or at.shape[0] == 1 else at.stride(0)
    constants = {"AT_STRIDE": at_stride, "ROTARY": cos.shape[-1], "PAIRS": pairs}
    return {"cos_ptr": cos, "sin_ptr": sin, "at_ptr": at, **constants}, strides


def _norm_arguments(norm: HeadNorm | None) -> dict[str, Any]:
    if norm is None:
        norm = HeadNorm("", None, None)
    pointers = {"q_w_ptr": norm.q_weight, "k_w_ptr": norm.k_weight, "q_b_ptr": norm.q_bias, "k_b_ptr": norm.k_bias}
    return {**pointers, "eps": float(norm.eps), "offset": float(norm.offset), "NORM": norm.kind}


def _alibi_arguments(qkv: Tensor, alibi: StepAlibi | None) -> dict[str, Any]:
    dtype = {torch.bfloat16: 1, torch.float16: 2}.get(qkv.dtype, 0)
    if alibi is None:
        none = dict.fromkeys(("slopes_ptr", "places_ptr"))
        return {**none, "alibi_scale": 1.0, "places_b": 0, "ROUND": 0, "DTYPE": dtype, "SCALED": False}
    places = alibi.places
    return {
        "slopes_ptr": alibi.slopes, "places_ptr": places, "alibi_scale": float(alibi.scale),
        "places_b": 0 if places is None or places.shape[0] == 1 else places.stride(0),
        "ROUND": ROUNDED[alibi.rounded], "DTYPE": dtype, "SCALED": alibi.scale != 1.0,
    }  # fmt: skip


def _launch(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int | Tensor,
    start_stride: int,
    heads: int,
    kv_heads: int,
    rope: StepRope | None,
    norm: HeadNorm | None,
    mask: Tensor | None,
    alibi: StepAlibi | None,
    options: dict[str, Any],
) -> Tensor:
    (B, cache_heads, capacity, head_dim), group = k_cache.shape, heads // kv_heads
    config, sms = _settings(qkv, head_dim, group, options["config"])
    width = capacity if mask is None else min(capacity, mask.shape[3])
    window, cap, ring = options["window"], options["softcap"], options["ring"]
    reach = width if window is None else min(width, window)
    reach = min(reach, start + 1) if isinstance(start, int) else reach
    limits = {key: config[key] for key in ("min_split", "programs_per_sm")}
    splits = count_splits(B * kv_heads, reach, sms, **limits)

    out = torch.empty((B, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    m = z = acc = tickets = None
    if splits > 1:
        parts = torch.empty(B * heads * splits * (head_dim + 2), dtype=torch.float32, device=qkv.device)
        acc, m, z = parts.split([B * heads * splits * head_dim, B * heads * splits, B * heads * splits])
        tickets = options["tickets"]
        if tickets is None:
            tickets = torch.zeros(B * kv_heads, dtype=torch.int32, device=qkv.device)
    rope_given, rope_strides = _rope_arguments(qkv, rope)
    mask_strides = (0, 0) if mask is None else (mask.stride(0) * (mask.shape[0] > 1), mask.stride(3))
    with torch.cuda.device_of(qkv):
        _step_attention_kernel[(B * kv_heads, splits)](
            qkv, k_cache, v_cache, out, m, z, acc, tickets,
            # of a ring, the mask's width: it goes by positions
            mask_ptr=mask, start=start, width=mask.shape[3] if ring and mask is not None else width,
            capacity=capacity, splits=splits, min_split=config["min_split"],
            window=2**30 if window is None else window,
            # without a cap base 2 is in the scale, with one it is in the cap
            scale=options["scale"] * LOG2E if cap is None else options["scale"] / cap,
            cap=1.0 if cap is None else cap * LOG2E,
            kv_heads=kv_heads, group=group, qkv_b=qkv.stride(0),
            k_b=k_cache.stride(0), k_h=k_cache.stride(1), k_t=k_cache.stride(2),
            v_b=v_cache.stride(0), v_h=v_cache.stride(1), v_t=v_cache.stride(2),
            cos_b=rope_strides[0], cos_t=rope_strides[1], sin_b=rope_strides[2], sin_t=rope_strides[3],
            mask_b=mask_strides[0], mask_t=mask_strides[1],
            START_STRIDE=start_stride, HEAD_DIM=head_dim, CAPPED=cap is not None, RING=ring,
            REPEAT=cache_heads // kv_heads,
            **rope_given, **_norm_arguments(norm), **_alibi_arguments(qkv, alibi),
            **_blocks(group, head_dim, qkv.element_size(), splits, config), **launch_options(qkv.device),
        )  # fmt: skip
    return out
