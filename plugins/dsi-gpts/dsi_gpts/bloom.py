"""BLOOM: position biases (ALiBi) in the place of position embeddings, and a norm over the embeddings.

The model makes the biases of the attention mask and hands them to every layer.

Source: BigScience Workshop 2022, https://arxiv.org/abs/2211.05100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsi.policy import (
    Alibi,
    Attr,
    Block,
    Call,
    CausalLM,
    Const,
    Linear,
    Norm,
    Packed,
    Policy,
    Refusal,
    hookimpl,
)

DSI_API = (1, 1)


def supports(config: Any) -> Refusal | None:
    """Products in one piece: cut in `pretraining_tp` pieces, the layer leaves out the bias of its projections."""
    if config.slow_but_exact and config.pretraining_tp > 1:
        return Refusal(
            reason=f"slow_but_exact=True with pretraining_tp={config.pretraining_tp} is not implemented",
            hint="set slow_but_exact=False",
        )
    return None


BLOOM = Policy(
    name="bloom",
    requires=("transformers>=5.17",),
    supports=supports,
    blocks=[
        Block(
            layer="transformers.models.bloom.modeling_bloom:BloomBlock",
            container="dsi.containers:DecoderLayer",
            call=Call(cache="layer_past", bias="alibi", returns="tuple", attention=("eager",)),
            slots={
                "norm_attn": Norm("input_layernorm"),
                "qkv": Packed("self_attention.query_key_value", layout="head_interleaved", split="column"),
                "out": Linear("self_attention.dense", split="row"),
                "norm_mlp": Norm("post_attention_layernorm"),
                "up": Linear("mlp.dense_h_to_4h", split="column"),
                "down": Linear("mlp.dense_4h_to_h", split="row"),
            },
            facts={
                "heads": Attr("self_attention.num_heads"),
                "kv_heads": Attr("self_attention.num_heads"),
                "head_dim": Attr("self_attention.head_dim"),
                "scale": Attr("self_attention.inv_norm_factor"),
                "layer_idx": Attr("self_attention.layer_idx"),
                # a function of its own, which no config names
                "activation": Const("gelu_pytorch_tanh"),
                "pre_norm": Const(True),
                "add_to_normed": Attr("apply_residual_connection_post_layernorm"),
                "biased": Const(True),
                # eager attention adds the mask that it is given, and nothing else
                "causal": Const(False),
            },
        )
    ],
    models=[
        CausalLM(
            model="transformers.models.bloom.modeling_bloom:BloomForCausalLM",
            embed="transformer.word_embeddings",
            embed_norm=Norm("transformer.word_embeddings_layernorm"),
            alibi=Alibi(),
            layers="transformer.h",
            norm=Norm("transformer.ln_f"),
            head="lm_head",
            context="",
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(BLOOM)
