"""BERT: post-norm encoder layers, erf or tanh GELU, learned positions outside the layer.

Source: Devlin et al. 2018, https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsi.policy import Attr, Block, Concat, Config, Const, Context, Linear, Norm, Policy, Refusal, hookimpl

DSI_API = (1, 0)


def supports(config: Any) -> Refusal | None:
    """Encoders only: as a decoder the layer keeps a cache and may attend to another model."""
    if config.is_decoder or config.add_cross_attention:
        return Refusal(
            reason=f"is_decoder={config.is_decoder}, add_cross_attention={config.add_cross_attention}: "
            "only the encoder is implemented",
            hint="load the model without is_decoder",
        )
    return None


def encoder_block(layer: str) -> Block:
    """The block of a layer class that is built like BERT's."""
    return Block(
        layer=layer,
        container="dsi.containers:EncoderLayer",
        slots={
            "qkv": Concat("attention.self.query", "attention.self.key", "attention.self.value", split="column"),
            "out": Linear("attention.output.dense", split="row"),
            "norm_attn": Norm("attention.output.LayerNorm"),
            "up": Linear("intermediate.dense", split="column"),
            "down": Linear("output.dense", split="row"),
            "norm_mlp": Norm("output.LayerNorm"),
        },
        facts={
            "heads": Attr("attention.self.num_attention_heads"),
            "kv_heads": Attr("attention.self.num_attention_heads"),
            "head_dim": Attr("attention.self.attention_head_size"),
            "scale": Attr("attention.self.scaling"),
            "activation": Config("hidden_act"),
            "pre_norm": Const(False),
            "causal": Const(False),
        },
    )


BERT = Policy(
    name="bert",
    requires=("transformers>=5.6",),
    context=Context(),
    supports=supports,
    blocks=[encoder_block("transformers.models.bert.modeling_bert:BertLayer")],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(BERT)
