"""Flux: layers of two streams, then layers of both as one sequence, with rotary embedding over text and image.

Source: the layers of https://github.com/black-forest-labs/flux, as diffusers has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsi.policy import Attr, Block, Call, Concat, Const, Container, Linear, Norm, Policy, hookimpl

DSI_API = (1, 2)

_MODULE = "diffusers.models.transformers.transformer_flux:"

CALL = Call(
    inputs={"context": "encoder_hidden_states", "time": "temb", "rope": "image_rotary_emb"},
    returns="pair",
)
# with a backend of its own the attention is another than torch's
PLAIN: dict[str, Any] = {
    "attn.processor.__class__.__name__": "FluxAttnProcessor",
    "attn.processor._attention_backend": None,
    "attn.processor._parallel_config": None,
    "attn.fused_projections": False,
}


def head_norm(path: str) -> Norm:
    """torch's norm over the heads."""
    return Norm(path, kind="rms", cls="torch.nn.modules.normalization:RMSNorm")


def feed_forward(name: str) -> dict[str, Any]:
    """What a feed-forward must be like."""
    return {f"{name}.net.0.__class__.__name__": "GELU", f"{name}.net.0.approximate": "tanh"}


FLUX = Policy(
    name="flux",
    requires=("diffusers>=0.42",),
    blocks=[
        Block(
            layer=f"{_MODULE}FluxTransformerBlock",
            container="flux:joint",
            slots={
                "modulation": Concat("norm1.linear", "norm1_context.linear"),
                "norm_attn": Norm("norm1.norm"),
                "norm_attn_context": Norm("norm1_context.norm"),
                "qkv": Concat("attn.to_q", "attn.to_k", "attn.to_v"),
                "qkv_context": Concat("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "q_norm": head_norm("attn.norm_q"),
                "k_norm": head_norm("attn.norm_k"),
                "q_norm_context": head_norm("attn.norm_added_q"),
                "k_norm_context": head_norm("attn.norm_added_k"),
                "out": Linear("attn.to_out.0"),
                "out_context": Linear("attn.to_add_out"),
                "norm_mlp": Norm("norm2"),
                "up": Linear("ff.net.0.proj"),
                "down": Linear("ff.net.2"),
                "norm_mlp_context": Norm("norm2_context"),
                "up_context": Linear("ff_context.net.0.proj"),
                "down_context": Linear("ff_context.net.2"),
            },
            facts={
                "heads": Attr("attn.heads"),
                "context_first": Const(True),
                "limited": Const(True),
                "dispatched": Const(True),
            },
            call=CALL,
            neutral={**PLAIN, **feed_forward("ff"), **feed_forward("ff_context")},
        ),
        Block(
            layer=f"{_MODULE}FluxSingleTransformerBlock",
            container="flux:single",
            slots={
                "modulation": Linear("norm.linear"),
                "norm": Norm("norm.norm"),
                "qkv": Concat("attn.to_q", "attn.to_k", "attn.to_v"),
                "q_norm": head_norm("attn.norm_q"),
                "k_norm": head_norm("attn.norm_k"),
                "up": Linear("proj_mlp"),
                "out": Linear("proj_out"),
            },
            facts={"heads": Attr("attn.heads"), "dispatched": Const(True)},
            call=CALL,
            neutral={**PLAIN, "act_mlp.__class__.__name__": "GELU", "act_mlp.approximate": "tanh"},
        ),
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(FLUX)


@hookimpl
def dsi_register_containers(register: Callable[[Container], None]) -> None:
    """Register the family's containers."""
    register(Container(name="joint", impl="dsi_mmdit.containers:JointBlock"))
    register(Container(name="single", impl="dsi_mmdit.containers:SingleBlock"))
