"""A step's attention in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsi_kernels._step_operands import HeadNorm, StepAlibi, StepRope
from dsi_kernels.positions import positions_reference


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
