"""Attention over the pixels of a map, and to a context beside it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from dsi.containers.linear import FusedLinear
from dsi.containers.map_base import MapCall, MapContainer, as_map, pixels
from dsi.containers.ops import NormOp
from dsi.policy import Refusal, Slot


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, heads, S, d] of [B, S, heads * d], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _divides(width: Any, heads: Any, kv_width: Any) -> Refusal | None:
    if not all(isinstance(n, int) and n > 0 for n in (width, heads)) or width % heads:
        return Refusal(reason=f"{width!r} channels do not divide into {heads!r} heads")
    if kv_width != width:
        return Refusal(reason=f"keys of {kv_width!r} channels to queries of {width}")
    return None


class SpatialTransformer(MapContainer):
    """norm, a product in, transformer layers over the pixels, a product out, and the sum with what came in.

    The layers are kept, and replaced on their own. They are called as the stock layer calls them: with the map's pixels
    [B, H * W, C], and the inputs under the names of their arguments.

    Inputs:
        context: what the layers attend to, [B, T, E], or None.
        context_mask: added to the scores, [B, 1, T], or None.
    """

    SLOTS = MappingProxyType({"norm": True, "proj_in": True, "transformer_blocks": True, "proj_out": True})
    INPUTS = frozenset({"context", "context_mask"})

    norm: NormOp
    proj_in: FusedLinear
    proj_out: FusedLinear

    def takes(self, hidden: Tensor, inputs: Mapping[str, Any]) -> bool:
        mask = inputs.get("context_mask")
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 3)

    def run(self, call: MapCall) -> Tensor:
        ops, x = self.ops, call.hidden
        hidden = ops.project(self.proj_in, pixels(ops.group_norm(self.norm, x)))
        given = {argument: call.inputs[name] for name, argument in self.call.inputs.items()}
        layers: Any = self._modules["transformer_blocks"]
        for layer in layers:
            hidden = layer(hidden, **given)
        return as_map(ops.project_add(self.proj_out, hidden, pixels(x)), x)


class CrossTransformerBlock(MapContainer):
    """A pre-norm transformer layer: attention among positions, attention to a context, a gated feed-forward.

    Inputs:
        context: what the second attention is to, [B, T, E].
        context_mask: added to its scores, [B, 1, T], or None.

    Facts:
        heads, width: of the first attention; kv_width: channels of its keys.
        cross_heads, cross_width, cross_kv_width: of the second.
    """

    SLOTS = MappingProxyType(
        {
            "norm_self": True,
            "qkv": True,
            "out": True,
            "norm_cross": True,
            "cross_q": True,
            "cross_kv": True,
            "cross_out": True,
            "norm_mlp": True,
            "up": True,
            "down": True,
        }
    )
    FACTS = frozenset({"heads", "width", "kv_width", "cross_heads", "cross_width", "cross_kv_width"})
    INPUTS = frozenset({"context", "context_mask"})
    DIMENSIONS = 3

    norm_self: NormOp
    norm_cross: NormOp
    norm_mlp: NormOp
    qkv: FusedLinear
    out: FusedLinear
    cross_q: FusedLinear
    cross_kv: FusedLinear
    cross_out: FusedLinear
    up: FusedLinear
    down: FusedLinear

    @classmethod
    def check(cls, facts: Mapping[str, Any], slots: Mapping[str, Slot]) -> Refusal | None:
        return _divides(facts["width"], facts["heads"], facts["kv_width"]) or _divides(
            facts["cross_width"], facts["cross_heads"], facts["cross_kv_width"]
        )

    def finish(self) -> None:
        super().finish()
        facts = self.facts
        self.heads, self.cross_heads = facts["heads"], facts["cross_heads"]
        self.scale = (facts["width"] // self.heads) ** -0.5
        self.cross_scale = (facts["cross_width"] // self.cross_heads) ** -0.5

    def takes(self, hidden: Tensor, inputs: Mapping[str, Any]) -> bool:
        context, mask, rows = inputs.get("context"), inputs.get("context_mask"), hidden.shape[0]
        if not isinstance(context, Tensor) or context.dim() != 3 or context.dtype is not self.dtype:
            return False
        if context.shape[0] != rows or not context.shape[1]:
            return False
        if mask is None:
            return True
        return (
            isinstance(mask, Tensor)
            and mask.dtype is self.dtype
            and mask.dim() == 3
            and mask.shape[0] in (1, rows)
            and mask.shape[1:] == (1, context.shape[1])
        )

    def run(self, call: MapCall) -> Tensor:
        ops, hidden = self.ops, call.hidden
        q, k, v = ops.project(self.qkv, ops.norm(self.norm_self, hidden)).chunk(3, dim=-1)
        heads = self.heads
        seen = ops.attend(_heads(q, heads), _heads(k, heads), _heads(v, heads), None, False, self.scale)
        normed, hidden = ops.project_norm(self.out, seen, hidden, self.norm_cross)
        seen = self._cross(normed, call)
        normed, hidden = ops.project_norm(self.cross_out, seen, hidden, self.norm_mlp)
        return ops.project_add(self.down, ops.geglu(self.up, normed), hidden)

    def _cross(self, normed: Tensor, call: MapCall) -> Tensor:
        ops, heads, mask = self.ops, self.cross_heads, call.inputs.get("context_mask")
        q = ops.project(self.cross_q, normed)
        k, v = self.cross_kv.forward(call.inputs["context"]).chunk(2, dim=-1)
        mask = None if mask is None else mask[:, None]
        return ops.attend(_heads(q, heads), _heads(k, heads), _heads(v, heads), mask, False, self.cross_scale)


class ImageAttention(MapContainer):
    """norm, attention among the pixels of a map, and the sum with what came in.

    Facts:
        heads, width, kv_width: of the attention.
        divisor: of the sum.
    """

    SLOTS = MappingProxyType({"norm": True, "qkv": True, "out": True})
    FACTS = frozenset({"heads", "width", "kv_width", "divisor"})

    norm: NormOp
    qkv: FusedLinear
    out: FusedLinear

    @classmethod
    def check(cls, facts: Mapping[str, Any], slots: Mapping[str, Slot]) -> Refusal | None:
        return _divides(facts["width"], facts["heads"], facts["kv_width"])

    def finish(self) -> None:
        super().finish()
        self.heads, self.divisor = self.facts["heads"], float(self.facts["divisor"])
        self.scale = (self.facts["width"] // self.heads) ** -0.5

    def run(self, call: MapCall) -> Tensor:
        ops, x, heads = self.ops, call.hidden, self.heads
        q, k, v = ops.project(self.qkv, pixels(ops.group_norm(self.norm, x))).chunk(3, dim=-1)
        seen = ops.attend(_heads(q, heads), _heads(k, heads), _heads(v, heads), None, False, self.scale)
        total = ops.project_add(self.out, seen, pixels(x))
        return as_map(total if self.divisor == 1.0 else total / self.divisor, x)
