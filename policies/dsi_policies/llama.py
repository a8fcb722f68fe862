"""LLaMA: pre-norm decoder layers with RMSNorm, gated SiLU and grouped kv heads.

Rotary terms arrive from the model, so every rope type fits.

Source: Touvron et al. 2023, https://arxiv.org/abs/2302.13971.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import (
    Attr,
    Block,
    Call,
    CausalLM,
    Concat,
    Config,
    Const,
    Linear,
    Norm,
    Policy,
    Rotary,
    hookimpl,
)

DSI_API = (1, 0)

_RMS = "transformers.models.llama.modeling_llama:LlamaRMSNorm"

LLAMA = Policy(
    name="llama",
    requires=("transformers>=5.6",),
    blocks=[
        Block(
            layer="transformers.models.llama.modeling_llama:LlamaDecoderLayer",
            container="dsi.containers:DecoderLayer",
            call=Call(rope="position_embeddings"),
            slots={
                "norm_attn": Norm("input_layernorm", kind="rms", eps="variance_epsilon", cls=_RMS),
                "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="column"),
                "out": Linear("self_attn.o_proj", split="row"),
                "norm_mlp": Norm("post_attention_layernorm", kind="rms", eps="variance_epsilon", cls=_RMS),
                "gate_up": Concat("mlp.gate_proj", "mlp.up_proj", split="column"),
                "down": Linear("mlp.down_proj", split="row"),
            },
            facts={
                "heads": Config("num_attention_heads"),
                "kv_heads": Config("num_key_value_heads"),
                "head_dim": Attr("self_attn.head_dim"),
                "scale": Attr("self_attn.scaling"),
                "layer_idx": Attr("self_attn.layer_idx"),
                "activation": Config("hidden_act"),
                "pre_norm": Const(True),
                "causal": Const(True),
            },
        )
    ],
    models=[
        CausalLM(
            model="transformers.models.llama.modeling_llama:LlamaForCausalLM",
            embed="model.embed_tokens",
            rotary=Rotary(path="model.rotary_emb", static_when=("default", "linear", "llama3", "yarn")),
            layers="model.layers",
            norm=Norm("model.norm", kind="rms", eps="variance_epsilon", cls=_RMS),
            head="lm_head",
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(LLAMA)
