"""GPT-NeoX (Pythia, Dolly, StableLM-alpha): LayerNorm, fused projections with each head's q, k and v together.

Rotary embedding turns a part of each head. Attention and MLP read the same hidden states or follow one another, as the
config says.

Source: Black et al. 2022, https://arxiv.org/abs/2204.06745.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Attr, Block, Call, CausalLM, Config, Const, Linear, Norm, Packed, Policy, Rotary, hookimpl

DSI_API = (1, 1)

GPT_NEOX = Policy(
    name="gpt_neox",
    requires=("transformers>=5.17",),
    blocks=[
        Block(
            layer="transformers.models.gpt_neox.modeling_gpt_neox:GPTNeoXLayer",
            container="dsi.containers:DecoderLayer",
            call=Call(cache="layer_past", rope="position_embeddings"),
            slots={
                "norm_attn": Norm("input_layernorm"),
                "qkv": Packed("attention.query_key_value", layout="head_interleaved", split="column"),
                "out": Linear("attention.dense", split="row"),
                "norm_mlp": Norm("post_attention_layernorm"),
                "up": Linear("mlp.dense_h_to_4h", split="column"),
                "down": Linear("mlp.dense_4h_to_h", split="row"),
            },
            facts={
                "heads": Config("num_attention_heads"),
                "kv_heads": Config("num_attention_heads"),
                "head_dim": Attr("attention.head_size"),
                "scale": Attr("attention.scaling"),
                "layer_idx": Attr("attention.layer_idx"),
                "activation": Config("hidden_act"),
                "pre_norm": Const(True),
                "parallel": Attr("use_parallel_residual"),
                "causal": Const(True),
            },
        )
    ],
    models=[
        CausalLM(
            model="transformers.models.gpt_neox.modeling_gpt_neox:GPTNeoXForCausalLM",
            embed="gpt_neox.embed_in",
            rotary=Rotary(path="gpt_neox.rotary_emb", static_when=("default", "linear", "llama3", "yarn")),
            layers="gpt_neox.layers",
            norm=Norm("gpt_neox.final_layer_norm"),
            head="lm_head",
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(GPT_NEOX)
