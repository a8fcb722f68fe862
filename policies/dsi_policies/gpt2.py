"""GPT-2: pre-norm decoder layers over Conv1D weights ([in, out]), learned positions, tanh GELU.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsi.policy import (
    Attr,
    Block,
    CausalLM,
    Config,
    Const,
    Context,
    Linear,
    Norm,
    Packed,
    Policy,
    Positions,
    Refusal,
    hookimpl,
)

DSI_API = (1, 0)


def supports(config: Any) -> Refusal | None:
    """No cross attention, and attention scores in the model's own dtype."""
    if config.add_cross_attention:
        return Refusal(reason="add_cross_attention=True is not implemented")
    if config.reorder_and_upcast_attn:
        return Refusal(reason="reorder_and_upcast_attn=True is not implemented")
    return None


GPT2 = Policy(
    name="gpt2",
    requires=("transformers>=5.6",),
    context=Context(),
    supports=supports,
    blocks=[
        Block(
            layer="transformers.models.gpt2.modeling_gpt2:GPT2Block",
            container="dsi.containers:DecoderLayer",
            slots={
                "norm_attn": Norm("ln_1"),
                "qkv": Packed("attn.c_attn", layout="thirds", split="column", transposed=True),
                "out": Linear("attn.c_proj", split="row", transposed=True),
                "norm_mlp": Norm("ln_2"),
                "up": Linear("mlp.c_fc", split="column", transposed=True),
                "down": Linear("mlp.c_proj", split="row", transposed=True),
            },
            facts={
                "heads": Attr("attn.num_heads"),
                "kv_heads": Attr("attn.num_heads"),
                "head_dim": Attr("attn.head_dim"),
                "scale": Attr("attn.scaling"),
                "layer_idx": Attr("attn.layer_idx"),
                "activation": Config("activation_function"),
                "pre_norm": Const(True),
                "causal": Const(True),
            },
        )
    ],
    models=[
        CausalLM(
            model="transformers.models.gpt2.modeling_gpt2:GPT2LMHeadModel",
            embed="transformer.wte",
            positions=Positions(path="transformer.wpe"),
            layers="transformer.h",
            norm=Norm("transformer.ln_f"),
            head="lm_head",
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(GPT2)
