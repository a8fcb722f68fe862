"""Flux: layers of two streams, then layers of both as one sequence, with rotary embedding over text and image.

Source: the layers of https://github.com/black-forest-labs/flux, as diffusers has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsi.policy import Attr, Block, Call, Concat, Const, Container, Linear, Norm, Policy, hookimpl
from dsi_mmdit.streams import feed_forward, joint_slots

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


FLUX = Policy(
    name="flux",
    requires=("diffusers>=0.42",),
    blocks=[
        Block(
            layer=f"{_MODULE}FluxTransformerBlock",
            container="flux:joint",
            slots=joint_slots(head_norm),
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
