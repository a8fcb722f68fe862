"""Containers of transformer layers: how a call of a layer of hidden states [B, S, H] is understood."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsi.containers.ops import NormOp, Rope
from dsi.containers.packing import AROUND, Texts
from dsi.containers.stand_in import NoGradients, StandIn, fused_class, parked
from dsi.policy import RotaryTable


class LayerCall(NamedTuple):
    """One call of a layer, understood.

    Args:
        hidden: [B, S, H].
        mask: what to attend to: None, or bool or additive [B, 1 or heads, S, T].
        cache: what keys and values go through, or None.
        rope: rotary terms of the positions, or None.
        causal: what a missing mask means.
        bias: added to the scaled scores, [B * heads, 1, T], or None.
        packed: hidden is [1, tokens, H] of texts without their padding, which this tells apart; or None.
    """

    hidden: Tensor
    mask: Tensor | None
    cache: Any
    rope: Rope | None
    causal: bool
    bias: Tensor | None = None
    packed: Texts | None = None


class Container(StandIn):
    """Base of the containers of transformer layers; they implement `run`."""

    # --- calls ------------------------------------------------------------------------------------------------

    def run(self, call: LayerCall) -> Tensor:
        """The fused computation: hidden states [B, S, H] after the layer."""
        raise NotImplementedError

    def packs(self, call: LayerCall) -> bool:
        """Whether `run` could take this call without its padding, whatever its mask."""
        return False

    def _run(self, call: LayerCall) -> Tensor:
        who = AROUND.get()
        return self.run(call) if who is None else who.run(self, call)

    def _returned(self, output: Any) -> Any:
        return (output, None) if self.call.returns == "tuple" else output

    def _understand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
        """The call in the container's terms, or None where only the original knows what it means."""
        if self.training or len(args) > len(self.positional) or not self._plain_context() or self.foreign_attention():
            return None
        if self.neutral and self.changed():
            return None
        given = dict(zip(self.positional, args, strict=False))
        given.update(kwargs)
        call = self.call
        rope_name = call.rope.positions if isinstance(call.rope, RotaryTable) else call.rope
        hidden = given.pop(self.positional[0], None)
        mask, cache, rope, bias = (given.pop(name, None) for name in (call.mask, call.cache, rope_name, call.bias))
        causal = given.pop("is_causal", None)
        if any(value is not None for name, value in given.items() if not self._free(name, value)):
            return None
        if not (self._fits(hidden, mask, cache) and self._fits_positions(hidden, rope, bias)):
            return None
        causal = self.facts["causal"] if causal is None else bool(causal)
        return LayerCall(hidden, mask, cache, self._terms(rope), causal, bias)

    def _terms(self, rope: Any) -> Rope | None:
        """Rotary terms of what the call gave: (cos, sin), or positions."""
        if rope is None:
            return None
        if isinstance(self.call.rope, RotaryTable):
            return self.rope_at(rope)
        cos, sin = rope
        return Rope.of(cos, sin, self.rope_pairs)

    @property
    def rope_pairs(self) -> bool:
        """Whether neighbouring dimensions turn together."""
        return bool(self.facts.get("rope_pairs", False))

    def rope_rows(self) -> Tensor | None:
        """The stock layer's own rotary table, [positions, rotary_dim]; None where it has none."""
        if not isinstance(self.call.rope, RotaryTable):
            return None
        found: Any = self.original
        for name in self.call.rope.path.split("."):
            found = getattr(found, name)
        rows: Tensor = found
        return rows

    def rope_at(self, positions: Tensor) -> Rope:
        """Terms from the layer's own table, at positions [1 or B, S]."""
        rows = self.rope_rows()
        assert rows is not None, "the layer has no rotary table"
        return Rope.from_rows(torch.nn.functional.embedding(positions, rows).to(self.dtype), self.rope_pairs)

    def foreign_attention(self) -> str:
        """The model's attention implementation where it is none that the fused path stands for, else ""."""
        name = getattr(self.model_config, "_attn_implementation", None)
        return "" if name is None or name in self.call.attention else str(name)

    def _free(self, name: str, value: Any) -> bool:
        # hidden states are recorded by hooks on the layer, whoever computes them
        return name in self.call.free or name == "output_hidden_states" or (name == "output_attentions" and not value)

    def _fits(self, hidden: Any, mask: Any, cache: Any) -> bool:
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.dtype is not self.dtype or not hidden.numel():
            return False
        if mask is not None and not (
            isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype in (torch.bool, hidden.dtype)
        ):
            return False
        return cache is None or self._takes_cache(cache)

    def _fits_positions(self, hidden: Tensor, rope: Any, bias: Any) -> bool:
        """The layer learns the positions the way that the policy says."""
        if (rope is not None) != bool(self.call.rope) or (bias is not None) != bool(self.call.bias):
            return False
        if isinstance(self.call.rope, RotaryTable):
            rows, length = hidden.shape[:2]
            if not isinstance(rope, Tensor) or rope.shape not in ((1, length), (rows, length)):
                return False
        return bias is None or self._takes_bias(hidden, bias)

    def _takes_bias(self, hidden: Tensor, bias: Any) -> bool:
        return False

    def _takes_cache(self, cache: Any) -> bool:
        return False


__all__ = ["Container", "LayerCall", "NoGradients", "NormOp", "fused_class", "parked"]
