"""The operations of a decode step, one position a row, through dsi_kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsi.containers.launches import IN_GRAPH, torch_wins
from dsi.containers.ops import AtenOps, Biased, HeadNorms, Heads, NormOp, Rope
from dsi.containers.triton_products import linear_product, norm_arguments, product_of, sum_product


class TritonStepOps(AtenOps):
    """dsi_kernels where one covers the operation of a step; the rest is torch's."""

    def norm_project(self, norm: NormOp, linear: Any, x: Tensor) -> Tensor:
        if (product := linear_product(linear, x, norm)) is None:
            return super().norm_project(norm, linear, x)
        return product(x, linear.weight, linear.bias, **norm_arguments(norm))

    def norm_product(self, norm: NormOp, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (product := product_of(x, weight, norm)) is None:
            return super().norm_product(norm, x, weight, bias)
        return product(x, weight, bias, **norm_arguments(norm))

    def norm_expand(self, norm: NormOp, linear: Any, x: Tensor, kind: str, gated: bool) -> Tensor:
        if (product := linear_product(linear, x, norm)) is None:
            return super().norm_expand(norm, linear, x, kind, gated)
        return product(x, linear.weight, linear.bias, **norm_arguments(norm), kind=kind, gated=gated)

    def add_expand(
        self, out: Any, x: Tensor, residual: Tensor, norm: NormOp, linear: Any, kind: str, gated: bool
    ) -> tuple[Tensor, Tensor]:
        if (product := sum_product(out, x, residual, norm)) is None:
            return super().add_expand(out, x, residual, norm, linear, kind, gated)
        normed, total = product(x, out.weight, out.bias, residual, norm.kind, norm.weight, norm.bias, norm.eps)
        return self.gate(linear, normed, kind) if gated else self.activate(linear, normed, kind), total

    def project(self, linear: Any, x: Tensor) -> Tensor:
        if (product := linear_product(linear, x)) is None:
            return super().project(linear, x)
        return product(x, linear.weight, linear.bias)

    def project_add(self, linear: Any, x: Tensor, residual: Tensor) -> Tensor:
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
