"""The operations of a decode step, one position a row, through dsi_kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsi.containers.launches import IN_GRAPH, torch_wins
from dsi.containers.ops import AtenOps, Biased, HeadNorms, Heads, NormOp, Rope
from dsi.containers.triton_products import linear_product, norm_arguments, product_of, sum_product


class TritonStepOps(AtenOps):
    """dsi_kernels where one covers the operation of a step; the rest is torch's."""

    def norm_project(self, norm: NormOp, linear: Any, x: Tensor) -> Tensor:
        if (normed := _norm_taken(norm, x)) is not None:
            return self.project(linear, normed)
        if (product := linear_product(linear, x, norm)) is None:
            return super().norm_project(norm, linear, x)
        return product(x, linear.weight, linear.bias, **norm_arguments(norm))

    def norm_product(self, norm: NormOp, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (normed := _norm_taken(norm, x)) is not None:
            product = product_of(normed, weight)
            return F.linear(normed, weight, bias) if product is None else product(normed, weight, bias)
        if (product := product_of(x, weight, norm)) is None:
            return super().norm_product(norm, x, weight, bias)
        return product(x, weight, bias, **norm_arguments(norm))

    def norm_expand(self, norm: NormOp, linear: Any, x: Tensor, kind: str, gated: bool) -> Tensor:
        if (normed := _norm_taken(norm, x)) is not None:
            return self.gate(linear, normed, kind) if gated else self.activate(linear, normed, kind)
        if (product := linear_product(linear, x, norm)) is None:
            return super().norm_expand(norm, linear, x, kind, gated)
        return product(x, linear.weight, linear.bias, **norm_arguments(norm), kind=kind, gated=gated)

    def project(self, linear: Any, x: Tensor) -> Tensor:
        if (product := linear_product(linear, x)) is None:
            return super().project(linear, x)
        return product(x, linear.weight, linear.bias)

    def project_add(self, linear: Any, x: Tensor, residual: Tensor, following: NormOp | None = None) -> Tensor:
        if following is not None and (both := sum_product(linear, x, residual, following)) is not None:
            return _with_norm(following, *both(x, linear.weight, linear.bias, residual, *_norm_of(following)))
        product = linear_product(linear, x)
        if product is None or not residual.is_contiguous():
            return super().project_add(linear, x, residual)
        return product(x, linear.weight, linear.bias, residual=residual)

    def activate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        if (product := linear_product(linear, x)) is None:
            return super().activate(linear, x, kind)
        return product(x, linear.weight, linear.bias, kind=kind)

    def gate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        if (product := linear_product(linear, x)) is None:
            return super().gate(linear, x, kind)
        return product(x, linear.weight, linear.bias, kind=kind, gated=True)

    def append(
        self, qkv: Tensor, shape: Heads, rope: Rope | None, kv: Any, norms: HeadNorms = None, repeat: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        import dsi_kernels

        if norms is not None or repeat > 1 or (rope is not None and rope.pairs) or torch_wins(qkv):
            return super().append(qkv, shape, rope, kv, norms, repeat)
        start, k, v = kv.reserve(qkv.shape[0], shape, 1, qkv)
        cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
        q = dsi_kernels.rope_kv_write(qkv.unsqueeze(1), cos, sin, k, v, start, *shape)
        return q, *kv.visible()

    def step_attention(
        self,
        qkv: Tensor,
        shape: Heads,
        rope: Rope | None,
        kv: Any,
        mask: Tensor | Biased | None,
        scale: float,
        softcap: float | None = None,
        norms: HeadNorms = None,
        repeat: int = 1,
        window: int | None = None,
    ) -> Tensor:
        if not IN_GRAPH.get() or not kernels_take(shape) or _additive(mask) or not _alike(norms):
            rope = None if rope is None else rope.taken()
            return super().step_attention(qkv, shape, rope, kv, mask, scale, softcap, norms, repeat, window)
        import dsi_kernels

        start, k, v = kv.reserve(qkv.shape[0], shape, 1, qkv)
        heads, kv_heads, _ = shape
        mask, alibi = (mask.mask, _alibi(mask)) if isinstance(mask, Biased) else (mask, None)
        return dsi_kernels.step_attention(
            qkv, k, v, start, heads, kv_heads, rope=_step_rope(rope), norm=_head_norm(norms), mask=mask, scale=scale,
            softcap=softcap, alibi=alibi, window=window, ring=kv.ring, tickets=kv.tickets[: qkv.shape[0] * kv_heads],
            reach=kv.reach,
        )  # fmt: skip

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None = None,
        filled: Tensor | None = None,
    ) -> Tensor:
        import dsi_kernels

        biased = mask is not None and mask.dtype is not torch.bool
        if softcap is not None or biased or torch_wins(k):
            return super().decode(q, k, v, mask, scale, softcap, filled)
        out = dsi_kernels.decode_attention(q, k, v, k.shape[2] if filled is None else filled, mask, scale)
        return out.reshape(q.shape[0], -1)


# what a sum's norm came to goes with the tensor, from a layer to the next one, and with it
_NORMED = "dsi_normed"


def _with_norm(norm: NormOp, normed: Tensor, total: Tensor) -> Tensor:
    """The sum, which knows what it comes to under the norm."""
    total.__dict__[_NORMED] = (norm, normed)
    return total


def _norm_taken(norm: NormOp, total: Tensor) -> Tensor | None:
    """norm(total) where it was taken with the sum, else None."""
    known, normed = total.__dict__.get(_NORMED, (None, None))
    return normed if known is norm else None


def _norm_of(norm: NormOp) -> tuple[Any, ...]:
    return norm.kind, norm.weight, norm.bias, norm.eps


def _additive(mask: Tensor | Biased | None) -> bool:
    return isinstance(mask, Tensor) and mask.dtype is not torch.bool


def _alibi(biased: Biased) -> Any:
    from dsi_kernels.step_attention import StepAlibi

    rounded = "" if biased.rounded is None else str(biased.rounded).removeprefix("torch.")
    return StepAlibi(biased.slopes, biased.places, rounded, biased.scale)


def _alike(norms: HeadNorms) -> bool:
    """Whether one kind of norm, with one eps and offset, stands over the heads of q and of k."""
    return norms is None or len({(norm.kind, norm.eps, norm.offset) for norm in norms}) == 1


def _step_rope(rope: Rope | None) -> Any:
    from dsi_kernels.step_attention import StepRope

    return None if rope is None else StepRope(rope.cos, rope.sin, rope.pairs, rope.at)


def _head_norm(norms: HeadNorms) -> Any:
    from dsi_kernels.step_attention import HeadNorm

    if norms is None:
        return None
    q, k = norms
    return HeadNorm(q.kind, q.weight, k.weight, q.bias, k.bias, q.eps, q.offset)


def kernels_take(shape: Heads) -> bool:
    """Whether the decode attention kernel takes heads of this number and size."""
    from dsi_kernels.decode_attention import MAX_GROUP, MAX_GROUP_TILE, MAX_HEAD_DIM, block_sizes

    group = shape.heads // shape.kv_heads
    if group > MAX_GROUP or shape.head_dim > MAX_HEAD_DIM:
        return False
    rows, columns = block_sizes(group, shape.head_dim)
    return rows * columns <= MAX_GROUP_TILE
