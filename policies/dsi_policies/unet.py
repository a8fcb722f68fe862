"""The denoising UNet of latent diffusion (SD 1.x, 2.x, SDXL), and the residual blocks that the autoencoder has too.

Sources: Rombach et al. 2021, https://arxiv.org/abs/2112.10752; Podell et al. 2023, https://arxiv.org/abs/2307.01952.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsi.policy import ABSENT, Attr, Block, Call, Concat, Const, Conv, Keep, Linear, Norm, Policy, hookimpl

DSI_API = (1, 2)

MODEL = "diffusers.models.unets.unet_2d_condition:UNet2DConditionModel"
TEXT = {"context": "encoder_hidden_states", "context_mask": "encoder_attention_mask"}


def plain_attention(name: str, **more: Any) -> dict[str, Any]:
    """What an attention module must be like to compute what torch's does, whatever its upcast flags say.

    Args:
        name: the attribute that it is; "" for the layer itself.
        more: further attributes, in the place of these.
    """
    attributes = {
        "processor.__class__.__name__": "AttnProcessor2_0",
        "norm_q": None,
        "norm_k": None,
        "norm_cross": None,
        "spatial_norm": None,
        "group_norm": None,
        "residual_connection": False,
        "rescale_output_factor": 1.0,
        "fused_projections": False,
        "add_k_proj": None,
        **more,
    }
    attributes = {key: value for key, value in attributes.items() if value is not Ellipsis}
    return {f"{name}.{key}" if name else key: value for key, value in attributes.items()}


RESNET = Block(
    layer="diffusers.models.resnet:ResnetBlock2D",
    container="dsi.containers:ResnetBlock",
    slots={
        "norm_in": Norm("norm1", kind="group"),
        "conv_in": Conv("conv1"),
        "time": Linear("time_emb_proj", shared="time"),
        "norm_out": Norm("norm2", kind="group"),
        "conv_out": Conv("conv2"),
        "shortcut": Conv("conv_shortcut"),
    },
    facts={
        "divisor": Attr("output_scale_factor"),
        "time_activation": Const("silu"),
        "skip_time_act": Attr("skip_time_act"),
        "time_norm": Attr("time_embedding_norm"),
        "up": Attr("up"),
        "down": Attr("down"),
    },
    call=Call(inputs={"time": "temb"}),
    neutral={"nonlinearity.__class__.__name__": "SiLU"},
)

DOWN = Block(
    layer="diffusers.models.downsampling:Downsample2D",
    container="dsi.containers:Downsample",
    slots={"conv": Conv("conv")},
    facts={"padding": Attr("padding")},
    neutral={"use_conv": True, "norm": None},
)

UP = Block(
    layer="diffusers.models.upsampling:Upsample2D",
    container="dsi.containers:Upsample",
    slots={"conv": Conv("conv")},
    call=Call(inputs={"size": "output_size"}),
    neutral={"name": "conv", "use_conv": True, "use_conv_transpose": False, "interpolate": True, "norm": None},
)

SPATIAL = Block(
    layer="diffusers.models.transformers.transformer_2d:Transformer2DModel",
    container="dsi.containers:SpatialTransformer",
    slots={
        "norm": Norm("norm", kind="group"),
        "proj_in": Linear("proj_in", cls="linear or 1x1"),
        "transformer_blocks": Keep("transformer_blocks"),
        "proj_out": Linear("proj_out", cls="linear or 1x1"),
    },
    call=Call(inputs=TEXT, returns="single"),
    neutral={"is_input_continuous": True, "caption_projection": ABSENT},
)

TRANSFORMER = Block(
    layer="diffusers.models.attention:BasicTransformerBlock",
    container="dsi.containers:CrossTransformerBlock",
    slots={
        "norm_self": Norm("norm1"),
        "qkv": Concat("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "out": Linear("attn1.to_out.0"),
        "norm_cross": Norm("norm2"),
        "cross_q": Linear("attn2.to_q"),
        "cross_kv": Concat("attn2.to_k", "attn2.to_v", shared="context"),
        "cross_out": Linear("attn2.to_out.0"),
        "norm_mlp": Norm("norm3"),
        "up": Linear("ff.net.0.proj"),
        "down": Linear("ff.net.2"),
    },
    facts={
        "heads": Attr("attn1.heads"),
        "width": Attr("attn1.inner_dim"),
        "kv_width": Attr("attn1.inner_kv_dim"),
        "cross_heads": Attr("attn2.heads"),
        "cross_width": Attr("attn2.inner_dim"),
        "cross_kv_width": Attr("attn2.inner_kv_dim"),
    },
    # the plain layer norm does not ask which step it is
    call=Call(inputs=TEXT, free=("timestep", "class_labels")),
    neutral={
        "norm_type": "layer_norm",
        "pos_embed": None,
        "fuser": ABSENT,
        "only_cross_attention": False,
        "_chunk_size": None,
        "ff.net.0.__class__.__name__": "GEGLU",
        **plain_attention("attn1"),
        **plain_attention("attn2"),
    },
)

UNET = Policy(
    name="unet",
    requires=("diffusers>=0.42",),
    blocks=[
        RESNET,
        DOWN,
        UP,
        SPATIAL,
        TRANSFORMER,
        Block(
            layer="torch.nn.modules.conv:Conv2d",
            container="dsi.containers:MapConv",
            slots={"conv": Conv("")},
            inside=(MODEL,),
        ),
        Block(
            layer="torch.nn.modules.normalization:GroupNorm",
            container="dsi.containers:MapNorm",
            slots={"norm": Norm("", kind="group")},
            inside=(MODEL,),
        ),
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(UNET)
