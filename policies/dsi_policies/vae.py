"""The autoencoder of latent diffusion: its attention, and the ends of its encoder and decoder.

Its residual blocks and changes of size are the UNet's. Source: Rombach et al. 2021, https://arxiv.org/abs/2112.10752.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Attr, Block, Call, Concat, Conv, Entries, Linear, Norm, Policy, hookimpl
from dsi_policies.unet import plain_attention

DSI_API = (1, 2)

_PARTS = "diffusers.models.autoencoders.vae"
ENDS = (f"{_PARTS}:Encoder", f"{_PARTS}:Decoder")
MODEL = "diffusers.models.autoencoders.autoencoder_kl:AutoencoderKL"

VAE = Policy(
    name="vae",
    requires=("diffusers>=0.42",),
    # pipelines call encode and decode, which may go tile by tile
    entries=[Entries(model=MODEL, parts=("encoder", "decoder"))],
    blocks=[
        Block(
            layer="diffusers.models.attention_processor:Attention",
            container="dsi.containers:ImageAttention",
            slots={
                "norm": Norm("group_norm", kind="group"),
                "qkv": Concat("to_q", "to_k", "to_v"),
                "out": Linear("to_out.0"),
            },
            facts={
                "heads": Attr("heads"),
                "width": Attr("inner_dim"),
                "kv_width": Attr("inner_kv_dim"),
                "divisor": Attr("rescale_output_factor"),
            },
            call=Call(),
            inside=("diffusers.models.unets.unet_2d_blocks:UNetMidBlock2D",),
            neutral=plain_attention("", residual_connection=True, group_norm=..., rescale_output_factor=...),
        ),
        Block(
            layer="torch.nn.modules.conv:Conv2d",
            container="dsi.containers:MapConv",
            slots={"conv": Conv("")},
            inside=(*ENDS, MODEL),
        ),
        Block(
            layer="torch.nn.modules.normalization:GroupNorm",
            container="dsi.containers:MapNorm",
            slots={"norm": Norm("", kind="group")},
            inside=ENDS,
        ),
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(VAE)
