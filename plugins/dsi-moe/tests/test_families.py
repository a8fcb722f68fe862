"""Every family of this package, held to dsi's conformance kit."""

from __future__ import annotations

from transformers import MixtralConfig, Qwen3MoeConfig

from dsi.testing import PolicyConformance
from dsi_moe.mixtral import MIXTRAL
from dsi_moe.qwen3_moe import QWEN3_MOE

# sizes that differ, fewer kv heads than heads, head_dim not hidden_size / heads
SIZE = {
    "vocab_size": 67,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class TestMixtral(PolicyConformance):
    policy = MIXTRAL

    def tiny_config(self):
        return MixtralConfig(**SIZE, num_local_experts=4, sliding_window=6)


class TestQwen3Moe(PolicyConformance):
    policy = QWEN3_MOE

    def tiny_config(self):
        # a plain MLP in the first layer, experts in the second
        return Qwen3MoeConfig(**SIZE, num_experts=4, moe_intermediate_size=24, mlp_only_layers=[0], attention_bias=True)
