"""CLIP: pre-norm encoder layers of the text tower (causal by the caller's word) and the vision tower.

Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Attr, Block, Concat, Config, Const, Entries, Linear, Norm, Policy, hookimpl

DSI_API = (1, 2)

CLIP = Policy(
    name="clip",
    requires=("transformers>=5.6",),
    # it decides on the host
    entries=[
        Entries(
            model="diffusers.pipelines.stable_diffusion.safety_checker:StableDiffusionSafetyChecker",
            parts=("vision_model",),
        )
    ],
    blocks=[
        Block(
            layer="transformers.models.clip.modeling_clip:CLIPEncoderLayer",
            container="dsi.containers:EncoderLayer",
            slots={
                "norm_attn": Norm("layer_norm1"),
                "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="column"),
                "out": Linear("self_attn.out_proj", split="row"),
                "norm_mlp": Norm("layer_norm2"),
                "up": Linear("mlp.fc1", split="column"),
                "down": Linear("mlp.fc2", split="row"),
            },
            facts={
                "heads": Attr("self_attn.num_heads"),
                "kv_heads": Attr("self_attn.num_heads"),
                "head_dim": Attr("self_attn.head_dim"),
                "scale": Attr("self_attn.scale"),
                "activation": Config("hidden_act"),
                "pre_norm": Const(True),
                # the text tower says is_causal=True with each call
                "causal": Const(False),
            },
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(CLIP)
