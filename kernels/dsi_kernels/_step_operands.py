"""What a step's attention is given beside q, k and v, and what is asked of it all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsi_kernels.decode_attention import MAX_GROUP, MAX_GROUP_TILE, MAX_HEAD_DIM, block_sizes
from dsi_kernels.operands import check_devices, check_dtypes, check_rows_contiguous, shapes

ROUNDED = {"": 0, "bfloat16": 1, "float16": 2}


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


def check_shapes(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, kv_heads: int) -> None:
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


def check_rope(qkv: Tensor, rope: StepRope | None, head_dim: int) -> None:
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


def check_options(qkv: Tensor, norm: HeadNorm | None, mask: Tensor | None, head_dim: int) -> None:
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


def check_places(
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


def check_operand_devices(
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
