"""What these families share: pre-norm decoder layers with RMSNorm, rotary embedding and a gated MLP.

Each family's file adds what it does in its own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from dsi.policy import Attr, Call, CausalLM, Concat, Config, Const, Fact, Linear, Norm, Rotary, Slot

CALL = Call(rope="position_embeddings")

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rope types of which the terms depend on the position alone."""

FACTS: Mapping[str, Fact] = {
    "heads": Config("num_attention_heads"),
    "kv_heads": Config("num_key_value_heads"),
    "head_dim": Attr("self_attn.head_dim"),
    "scale": Attr("self_attn.scaling"),
    "layer_idx": Attr("self_attn.layer_idx"),
    "activation": Config("hidden_act"),
    "pre_norm": Const(True),
    "causal": Const(True),
}


@attrs.frozen(kw_only=True)
class Family:
    """Where transformers keeps a family, and what its norms look like.

    Args:
        module: of transformers.models.
        prefix: of its class names.
        eps: the norms' attribute.
        offset: added to the norms' weight.
    """

    module: str
    prefix: str
    eps: str = "variance_epsilon"
    offset: float = 0.0

    def named(self, cls: str) -> str:
        """ "module:Class" of one of the family's classes."""
        return f"transformers.models.{self.module}.modeling_{self.module}:{self.prefix}{cls}"

    def norm(self, path: str) -> Norm:
        """The family's RMSNorm at `path`."""
        return Norm(path, kind="rms", eps=self.eps, cls=self.named("RMSNorm"), offset=self.offset)

    def slots(self) -> dict[str, Slot]:
        """Separate projections, and a norm before attention and MLP."""
        return {
            "norm_attn": self.norm("input_layernorm"),
            "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="column"),
            "out": Linear("self_attn.o_proj", split="row"),
            "norm_mlp": self.norm("post_attention_layernorm"),
            "gate_up": Concat("mlp.gate_proj", "mlp.up_proj", split="column"),
            "down": Linear("mlp.down_proj", split="row"),
        }

    def causal_lm(self, **differences: Any) -> CausalLM:
        """The language model around the layers."""
        parts: dict[str, Any] = {
            "model": self.named("ForCausalLM"),
            "embed": "model.embed_tokens",
            "rotary": Rotary(path="model.rotary_emb", static_when=STATIC_ROPE),
            "layers": "model.layers",
            "norm": self.norm("model.norm"),
            "head": "lm_head",
        }
        return CausalLM(**{**parts, **differences})
