"""Stable Diffusion 3 and 3.5: joint attention of text and image, in some layers an attention of the image alone beside.

Source: Esser et al. 2024, https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsi.policy import Attr, Block, Call, Concat, Const, Container, Linear, Norm, Policy, hookimpl
from dsi_mmdit.streams import feed_forward, joint_slots

DSI_API = (1, 2)


def head_norm(path: str) -> Norm:
    """diffusers' norm over the heads."""
    return Norm(path, kind="rms", cls="diffusers.models.normalization:RMSNorm")


def plain(name: str) -> dict[str, Any]:
    """What an attention must be like; of one that is None nothing is asked."""
    return {
        f"{name}.processor.__class__.__name__": "JointAttnProcessor2_0",
        f"{name}.fused_projections": False,
    }


SD3 = Policy(
    name="sd3",
    requires=("diffusers>=0.42",),
    blocks=[
        Block(
            layer="diffusers.models.attention:JointTransformerBlock",
            container="sd3:joint",
            slots={
                **joint_slots(head_norm),
                "qkv_dual": Concat("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "q_norm_dual": head_norm("attn2.norm_q"),
                "k_norm_dual": head_norm("attn2.norm_k"),
                "out_dual": Linear("attn2.to_out.0"),
            },
            facts={
                "heads": Attr("attn.heads"),
                "context_first": Const(False),
                "last": Attr("context_pre_only"),
                "dual": Attr("use_dual_attention"),
            },
            call=Call(inputs={"context": "encoder_hidden_states", "time": "temb"}, returns="pair"),
            neutral={
                "_chunk_size": None,
                **plain("attn"),
                **plain("attn2"),
                **feed_forward("ff"),
                **feed_forward("ff_context"),
            },
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(SD3)


@hookimpl
def dsi_register_containers(register: Callable[[Container], None]) -> None:
    """Register the family's container."""
    register(Container(name="joint", impl="dsi_mmdit.containers:JointBlock"))
