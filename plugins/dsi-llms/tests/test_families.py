"""Every family of this package, held to dsi's conformance kit."""

from __future__ import annotations

from transformers import Gemma2Config, GemmaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from dsi.testing import PolicyConformance
from dsi_llms.gemma import GEMMA
from dsi_llms.gemma2 import GEMMA2
from dsi_llms.mistral import MISTRAL
from dsi_llms.phi3 import PHI3
from dsi_llms.qwen2 import QWEN2
from dsi_llms.qwen3 import QWEN3

# sizes that differ, fewer kv heads than heads, four ranks' worth of both
SIZE = {
    "vocab_size": 67,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# not hidden_size / heads
HEAD_DIM = {"head_dim": 12}
SECOND_LAYER_SLIDES = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


class TestMistral(PolicyConformance):
    policy = MISTRAL

    def tiny_config(self):
        return MistralConfig(**SIZE, **HEAD_DIM, sliding_window=6)


class TestQwen2(PolicyConformance):
    policy = QWEN2

    def tiny_config(self):
        return Qwen2Config(**SIZE, **SECOND_LAYER_SLIDES)


class TestQwen3(PolicyConformance):
    policy = QWEN3

    def tiny_config(self):
        return Qwen3Config(**SIZE, **HEAD_DIM, **SECOND_LAYER_SLIDES, attention_bias=True, tie_word_embeddings=True)


class TestPhi3(PolicyConformance):
    policy = PHI3

    def tiny_config(self):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        return Phi3Config(**SIZE, sliding_window=6, rope_parameters=rope)


class TestGemma(PolicyConformance):
    policy = GEMMA

    def tiny_config(self):
        return GemmaConfig(**SIZE, **HEAD_DIM, attention_bias=True)


class TestGemma2(PolicyConformance):
    policy = GEMMA2

    def tiny_config(self):
        # caps so low that a lost one shows
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        settings = {**SIZE, **HEAD_DIM, **caps, "query_pre_attn_scalar": 24, "attention_bias": True}
        return Gemma2Config(**settings, sliding_window=6)
