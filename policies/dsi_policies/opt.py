"""OPT: decoder layers, pre-norm or (350m) post-norm, with learned positions that have an offset of two.

The 350m model has projections around its layers, for embeddings narrower than the hidden states.

Source: Zhang et al. 2022, https://arxiv.org/abs/2205.01068.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import (
    Attr,
    Block,
    CausalLM,
    Concat,
    Config,
    Const,
    Context,
    Linear,
    Norm,
    Policy,
    Positions,
    hookimpl,
)

DSI_API = (1, 0)

OPT = Policy(
    name="opt",
    requires=("transformers>=5.6",),
    context=Context(),
    blocks=[
        Block(
            layer="transformers.models.opt.modeling_opt:OPTDecoderLayer",
            container="dsi.containers:DecoderLayer",
            slots={
                "norm_attn": Norm("self_attn_layer_norm"),
                "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="column"),
                "out": Linear("self_attn.out_proj", split="row"),
                "norm_mlp": Norm("final_layer_norm"),
                "up": Linear("fc1", split="column"),
                "down": Linear("fc2", split="row"),
            },
            facts={
                "heads": Attr("self_attn.num_heads"),
                "kv_heads": Attr("self_attn.num_heads"),
                "head_dim": Attr("self_attn.head_dim"),
                "scale": Attr("self_attn.scaling"),
                "layer_idx": Attr("self_attn.layer_idx"),
                "activation": Config("activation_function"),
                "pre_norm": Attr("do_layer_norm_before"),
                "causal": Const(True),
            },
        )
    ],
    models=[
        CausalLM(
            model="transformers.models.opt.modeling_opt:OPTForCausalLM",
            embed="model.decoder.embed_tokens",
            project_in="model.decoder.project_in",
            positions=Positions(path="model.decoder.embed_positions", offset=2),
            layers="model.decoder.layers",
            norm=Norm("model.decoder.final_layer_norm"),
            project_out="model.decoder.project_out",
            head="lm_head",
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(OPT)
