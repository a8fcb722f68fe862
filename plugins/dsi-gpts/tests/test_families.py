"""The conformance kit over every family and every form that its config may ask for."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import BloomConfig, FalconConfig, GPTJConfig, GPTNeoXConfig

from dsi.testing import PolicyConformance

TOKENS = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class TestGPTNeoX(PolicyConformance):
    policy = "gpt_neox:gpt_neox"
    settings: ClassVar[dict[str, Any]] = {}

    def tiny_config(self):
        # a quarter of each head is rotated
        return GPTNeoXConfig(
            **TOKENS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            **self.settings,
        )


class TestGPTNeoXInSequence(TestGPTNeoX):
    settings: ClassVar[dict[str, Any]] = {
        "use_parallel_residual": False,
        "attention_bias": False,
        "rotary_pct": 1.0,
        "hidden_act": "gelu_fast",
    }


class TestGPTJ(PolicyConformance):
    policy = "gptj:gptj"

    def tiny_config(self):
        return GPTJConfig(**TOKENS, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_inner=48)


class TestBloom(PolicyConformance):
    policy = "bloom:bloom"
    settings: ClassVar[dict[str, Any]] = {}

    def tiny_config(self):
        # six heads: their slopes come from two powers
        return BloomConfig(**TOKENS, hidden_size=48, n_layer=2, n_head=6, **self.settings)


class TestBloomResidualBehindNorms(TestBloom):
    settings: ClassVar[dict[str, Any]] = {"apply_residual_connection_post_layernorm": True}


class _Falcon(PolicyConformance):
    settings: ClassVar[dict[str, Any]] = {}

    def tiny_config(self):
        return FalconConfig(
            **TOKENS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_hidden_size=48,
            max_position_embeddings=64,
            **self.settings,
        )


class TestFalconGroups(_Falcon):
    policy = "falcon:two-norms"
    settings: ClassVar[dict[str, Any]] = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}


class TestFalconGroupsAlibi(_Falcon):
    policy = "falcon:two-norms-alibi"
    settings: ClassVar[dict[str, Any]] = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True}


class TestFalconOneKVHead(_Falcon):
    policy = "falcon:one-norm"


class TestFalconOneNormAlibi(_Falcon):
    policy = "falcon:one-norm-alibi"
    settings: ClassVar[dict[str, Any]] = {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "alibi": True,
    }


class TestFalconInSequence(_Falcon):
    policy = "falcon:sequential"
    settings: ClassVar[dict[str, Any]] = {"parallel_attn": False, "multi_query": False, "bias": True}


class TestFalconInSequenceAlibi(_Falcon):
    policy = "falcon:sequential-alibi"
    settings: ClassVar[dict[str, Any]] = {"parallel_attn": False, "multi_query": False, "alibi": True}
