"""Layers of diffusion transformers: two streams that attend to each other, or one of both together.

Each stream is normalized without weights, then scaled and shifted by what a product makes of the time embedding, and
what is added to it is gated by that too:

    normed = norm(x) * (1 + scale) + shift
    x = x + gate * f(normed)

Source: Peebles and Xie 2022, https://arxiv.org/abs/2212.09748; Esser et al. 2024, https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dsi.containers import MapCall, PairContainer
from dsi.policy import Refusal, Slot

# the largest fp16 number, at which layers of this dtype cut off what they return
FP16_MAX = 65504.0
# diffusers' choice of an attention that is no module's own
DISPATCH = "diffusers.models.attention_dispatch"


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift; x [B, S, C], shift and scale [1 or B, C]."""
    if scale.shape[0] == 1:
        # the same for every row: the norm's own weight and bias, in one pass
        return F.layer_norm(x, x.shape[-1:], scale[0] + 1, shift[0], norm.eps)
    normed = F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    return torch.addcmul(shift[:, None], normed, scale[:, None] + 1)


def gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """x + gate * change; x and change [B, S, C], gate [1 or B, C]."""
    return torch.addcmul(x, gate[:, None], change)


def turned(x: Tensor, terms: Tensor | None) -> Tensor:
    """x [B, S, heads, d] with its dimensions 2i and 2i + 1 rotated, in fp32; terms complex64 [S, 1, d / 2]."""
    if terms is None:
        return x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * terms).flatten(-2).to(x.dtype)


def rotary_terms(rope: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """cos + i sin of every pair of dimensions, complex64 [S, 1, d / 2]; what came in has each twice, [S, d]."""
    if rope is None:
        return None
    cos, sin = rope
    return torch.complex(cos[:, None, ::2], sin[:, None, ::2])


def native_attention() -> bool:
    """Whether layers that leave it to diffusers which attention is computed get torch's own."""
    dispatch = sys.modules.get(DISPATCH)
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return dispatch is None or getattr(registry, "_active_backend", None) == "native"


def limited(x: Tensor) -> Tensor:
    """x, in fp16 within its finite numbers."""
    return x.clamp_(-FP16_MAX, FP16_MAX) if x.dtype is torch.float16 else x


class ModulatedBlock(PairContainer):
    """What the layers have in common: how a call must look like, and heads.

    Inputs:
        context: the text, [B, T, C].
        time: the embedding of time and text, [1 or B, E].
        rope: (cos, sin), fp32 [positions, head size], of the joint sequence; None for no rotation.

    Facts:
        heads: of the attention.
        dispatched: which attention is computed is diffusers' choice at each call.
    """

    FACTS: ClassVar[frozenset[str]] = frozenset({"heads"})
    OPTIONAL_FACTS: ClassVar[Mapping[str, Any]] = MappingProxyType({"dispatched": False})
    INPUTS = frozenset({"context", "time", "rope"})

    @classmethod
    def check(cls, facts: Mapping[str, Any], slots: Mapping[str, Slot]) -> Refusal | None:
        heads = facts["heads"]
        return None if isinstance(heads, int) and heads > 0 else Refusal(reason=f"an attention of {heads!r} heads")

    def finish(self) -> None:
        super().finish()
        self.heads = self.facts["heads"]

    def takes(self, hidden: Tensor, inputs: Mapping[str, Any]) -> bool:
        time, rope = inputs.get("time"), inputs.get("rope")
        if not super().takes(hidden, inputs) or inputs["context"].shape[-1] != hidden.shape[-1]:
            return False
        if not isinstance(time, Tensor) or time.dim() != 2 or time.dtype is not self.dtype:
            return False
        if time.shape[0] not in (1, hidden.shape[0]) or (self.facts["dispatched"] and not native_attention()):
            return False
        return rope is None or self._turns(rope, hidden.shape[1] + inputs["context"].shape[1], hidden)

    def _turns(self, rope: Any, length: int, hidden: Tensor) -> bool:
        """Whether these are terms of every position of a sequence."""
        if not isinstance(rope, tuple | list) or len(rope) != 2 or not all(isinstance(one, Tensor) for one in rope):
            return False
        wanted = (torch.float32, hidden.device)
        return all(one.shape[:-1] == (length,) and (one.dtype, one.device) == wanted for one in rope)

    def split(self, qkv: Tensor, norms: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, S, heads, d] of qkv [B, S, 3 * heads * d], normalized where there are places for that.

        norms: what the names of those places end in.
        """
        own: dict[str, Any] = self._modules
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv.chunk(3, dim=-1))
        q_norm, k_norm = own.get(f"q_norm{norms}"), own.get(f"k_norm{norms}")
        q = q if q_norm is None else self.ops.norm(q_norm, q)
        return q, k if k_norm is None else self.ops.norm(k_norm, k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, terms: Tensor | None = None) -> Tensor:
        """What every position sees of all, [B, S, heads * d]; q, k and v [B, S, heads, d], rotated here."""
        q, k = turned(q, terms), turned(k, terms)
        scale = q.shape[-1] ** -0.5
        return self.ops.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, False, scale)


class JointBlock(ModulatedBlock):
    """Two streams with weights of their own and one attention over both, then a feed-forward for each.

    Places: `modulation` has the rows of the hidden states' own first, then those of the context; those that end in
    `_dual` are of a second attention, of the hidden states alone.

    Facts:
        context_first: the context stands before the hidden states where both attend; else behind.
        last: nothing comes of the context behind the attention.
        dual: there is that second attention.
        limited: in fp16 the context that comes out is cut off at the largest number.
    """

    SLOTS = MappingProxyType(
        {
            "modulation": True,
            "norm_attn": True,
            "norm_attn_context": True,
            "qkv": True,
            "qkv_context": True,
            "q_norm": False,
            "k_norm": False,
            "q_norm_context": False,
            "k_norm_context": False,
            "out": True,
            "out_context": False,
            "qkv_dual": False,
            "q_norm_dual": False,
            "k_norm_dual": False,
            "out_dual": False,
            "norm_mlp": True,
            "up": True,
            "down": True,
            "norm_mlp_context": False,
            "up_context": False,
            "down_context": False,
        }
    )
    FACTS = ModulatedBlock.FACTS | {"context_first"}
    OPTIONAL_FACTS = MappingProxyType({**ModulatedBlock.OPTIONAL_FACTS, "last": False, "dual": False, "limited": False})

    # places, which modules fill
    modulation: Any
    norm_attn: Any
    norm_attn_context: Any
    qkv: Any
    qkv_context: Any
    out: Any
    out_context: Any
    qkv_dual: Any
    out_dual: Any
    norm_mlp: Any
    up: Any
    down: Any
    norm_mlp_context: Any
    up_context: Any
    down_context: Any

    @classmethod
    def check(cls, facts: Mapping[str, Any], slots: Mapping[str, Slot]) -> Refusal | None:
        own = ("out_context", "norm_mlp_context", "up_context", "down_context")
        for fact, wanted, places in (("last", False, own), ("dual", True, ("qkv_dual", "out_dual"))):
            if any((place in slots) is not (bool(facts[fact]) is wanted) for place in places):
                return Refusal(reason=f"{fact}={facts[fact]!r} does not go with the weights of {', '.join(places)}")
        return super().check(facts, slots)

    def finish(self) -> None:
        super().finish()
        self.last, self.dual, self.context_first = (bool(self.facts[x]) for x in ("last", "dual", "context_first"))
        self.own_parts = 9 if self.dual else 6
        self.parts = self.own_parts + (2 if self.last else 6)

    def run(self, call: MapCall) -> tuple[Tensor | None, Tensor]:
        hidden, context = call.hidden, call.inputs["context"]
        parts = self.modulation(F.silu(call.inputs["time"])).chunk(self.parts, dim=-1)
        own, other = parts[: self.own_parts], parts[self.own_parts :]
        # a last layer has its scale first
        shift, scale = reversed(other) if self.last else other[:2]
        normed_context = modulated(self.norm_attn_context, context, shift, scale)
        normed = modulated(self.norm_attn, hidden, own[0], own[1])
        seen, seen_context = self._joint(normed, normed_context, call.inputs.get("rope"))
        total = gated(hidden, own[2], self.out(seen))
        if self.dual:
            second = self.attend(*self.split(self.qkv_dual(modulated(self.norm_attn, hidden, *own[6:8])), "_dual"))
            total = gated(total, own[8], self.out_dual(second))
        hidden = self._feed(total, own[3:6], "")
        if self.last:
            return None, hidden
        context = self._feed(gated(context, other[2], self.out_context(seen_context)), other[3:6], "_context")
        return limited(context) if self.facts["limited"] else context, hidden

    def _joint(self, normed: Tensor, context: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
        """What the hidden states and the context see of both."""
        streams = [self.split(self.qkv(normed)), self.split(self.qkv_context(context), "_context")]
        lengths = [normed.shape[1], context.shape[1]]
        if self.context_first:
            streams, lengths = streams[::-1], lengths[::-1]
        q, k, v = (torch.cat(both, dim=1) for both in zip(*streams, strict=True))
        first, second = self.attend(q, k, v, rotary_terms(rope)).split(lengths, dim=1)
        return (second, first) if self.context_first else (first, second)

    def _feed(self, x: Tensor, parts: Any, stream: str) -> Tensor:
        """The feed-forward of a stream, and what it is added to; parts: its shift, scale and gate."""
        own: dict[str, Any] = self._modules
        shift, scale, gate = parts
        expanded = self.ops.activate(
            own[f"up{stream}"], modulated(own[f"norm_mlp{stream}"], x, shift, scale), "gelu_tanh"
        )
        return gated(x, gate, own[f"down{stream}"](expanded))


class SingleBlock(ModulatedBlock):
    """Both streams as one sequence, the context first: attention beside feed-forward, and one product of both.

    In fp16 what comes out is cut off at the largest number.
    """

    SLOTS = MappingProxyType(
        {"modulation": True, "norm": True, "qkv": True, "q_norm": False, "k_norm": False, "up": True, "out": True}
    )

    modulation: Any
    norm: Any
    qkv: Any
    up: Any
    out: Any

    def run(self, call: MapCall) -> tuple[Tensor, Tensor]:
        context = call.inputs["context"]
        x = torch.cat((context, call.hidden), dim=1)
        shift, scale, gate = self.modulation(F.silu(call.inputs["time"])).chunk(3, dim=-1)
        normed = modulated(self.norm, x, shift, scale)
        seen = self.attend(*self.split(self.qkv(normed)), rotary_terms(call.inputs["rope"]))
        both = torch.cat((seen, self.ops.activate(self.up, normed, "gelu_tanh")), dim=-1)
        x = limited(gated(x, gate, self.out(both)))
        length = context.shape[1]
        return x[:, :length], x[:, length:]
