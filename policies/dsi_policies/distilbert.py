"""DistilBERT: BERT's computation, half the layers, other names.

Source: Sanh et al. 2019, https://arxiv.org/abs/1910.01108.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Attr, Block, Concat, Config, Const, Context, Linear, Norm, Policy, hookimpl

DSI_API = (1, 0)

DISTILBERT = Policy(
    name="distilbert",
    requires=("transformers>=5.6",),
    context=Context(),
    blocks=[
        Block(
            layer="transformers.models.distilbert.modeling_distilbert:TransformerBlock",
            container="dsi.containers:EncoderLayer",
            slots={
                "qkv": Concat("attention.q_lin", "attention.k_lin", "attention.v_lin", split="column"),
                "out": Linear("attention.out_lin", split="row"),
                "norm_attn": Norm("sa_layer_norm"),
                "up": Linear("ffn.lin1", split="column"),
                "down": Linear("ffn.lin2", split="row"),
                "norm_mlp": Norm("output_layer_norm"),
            },
            facts={
                "heads": Attr("attention.n_heads"),
                "kv_heads": Attr("attention.n_heads"),
                "head_dim": Attr("attention.attention_head_size"),
                "scale": Attr("attention.scaling"),
                "activation": Config("activation"),
                "pre_norm": Const(False),
                "causal": Const(False),
            },
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(DISTILBERT)
