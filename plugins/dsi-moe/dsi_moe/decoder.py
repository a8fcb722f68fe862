"""What these families share: pre-norm decoder layers with RMSNorm and rotary embedding, around an MLP that is kept.

The MLP is a router with its experts, or a plain one: either way it is called as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from dsi.policy import Attr, Call, CausalLM, Concat, Config, Const, Fact, Keep, Linear, Norm, Rotary, Slot

CALL = Call(rope="position_embeddings")

FACTS: Mapping[str, Fact] = {
    "heads": Config("num_attention_heads"),
    "kv_heads": Config("num_key_value_heads"),
    "head_dim": Attr("self_attn.head_dim"),
    "scale": Attr("self_attn.scaling"),
    "layer_idx": Attr("self_attn.layer_idx"),
    "activation": Config("hidden_act"),
    "pre_norm": Const(True),
    "causal": Const(True),
    "window": Config("sliding_window"),
}


@attrs.frozen(kw_only=True)
class Family:
    """Where transformers keeps a family.

    Args:
        module: of transformers.models.
        prefix: of its class names.
    """

    module: str
    prefix: str

    def named(self, cls: str) -> str:
        """ "module:Class" of one of the family's classes."""
        return f"transformers.models.{self.module}.modeling_{self.module}:{self.prefix}{cls}"

    def norm(self, path: str) -> Norm:
        """The family's RMSNorm at `path`."""
        return Norm(path, kind="rms", eps="variance_epsilon", cls=self.named("RMSNorm"))

    def slots(self) -> dict[str, Slot]:
        """Separate projections, a norm before attention and MLP, and the MLP as it is."""
        return {
            "norm_attn": self.norm("input_layernorm"),
            "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="column"),
            "out": Linear("self_attn.o_proj", split="row"),
            "norm_mlp": self.norm("post_attention_layernorm"),
            "mlp": Keep("mlp"),
        }

    def causal_lm(self) -> CausalLM:
        """The language model around the layers."""
        return CausalLM(
            model=self.named("ForCausalLM"),
            embed="model.embed_tokens",
            rotary=Rotary(path="model.rotary_emb", static_when=("default", "linear", "llama3", "yarn")),
            layers="model.layers",
            norm=self.norm("model.norm"),
            head="lm_head",
        )
