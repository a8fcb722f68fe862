"""GPT-J: attention and MLP read one norm, and each layer has a rotary table, which turns neighbouring dimensions.

Source: Wang and Komatsuzaki 2021, https://github.com/kingoflolz/mesh-transformer-jax.
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
    Context,
    Inverse,
    Linear,
    Norm,
    Policy,
    RotaryTable,
    hookimpl,
)

DSI_API = (1, 1)

GPTJ = Policy(
    name="gptj",
    requires=("transformers>=5.17",),
    # one more than the rotary tables have rows is an index out of range
    context=Context(),
    blocks=[
        Block(
            layer="transformers.models.gptj.modeling_gptj:GPTJBlock",
            container="dsi.containers:DecoderLayer",
            call=Call(
                cache="layer_past",
                rope=RotaryTable(path="attn.embed_positions"),
                returns="tuple",
                attention=("eager",),
            ),
            slots={
                "norm_attn": Norm("ln_1"),
                "qkv": Concat("attn.q_proj", "attn.k_proj", "attn.v_proj", split="column"),
                "out": Linear("attn.out_proj", split="row"),
                "up": Linear("mlp.fc_in", split="column"),
                "down": Linear("mlp.fc_out", split="row"),
            },
            facts={
                "heads": Attr("attn.num_attention_heads"),
                "kv_heads": Attr("attn.num_attention_heads"),
                "head_dim": Attr("attn.head_dim"),
                "scale": Inverse(Attr("attn.scale_attn")),
                "layer_idx": Attr("attn.layer_idx"),
                "activation": Config("activation_function"),
                "pre_norm": Const(True),
                "parallel": Const(True),
                "rope_pairs": Const(True),
                # eager attention adds the mask that it is given, and nothing else
                "causal": Const(False),
            },
        )
    ],
    models=[
        CausalLM(
            model="transformers.models.gptj.modeling_gptj:GPTJForCausalLM",
            embed="transformer.wte",
            layers="transformer.h",
            norm=Norm("transformer.ln_f"),
            head="lm_head",
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(GPTJ)
