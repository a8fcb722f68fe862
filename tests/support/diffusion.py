"""Tiny diffusion models with hostile weights, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from dsi.testing.hostile import make_hostile_

TEXT = 24
"""Width of the embeddings that a UNet attends to."""

FORMS: dict[str, dict[str, Any]] = {
    # as in SD 1.x: products in and out are convolutions, and the head size varies
    "sd1": {},
    # as in SD 2.x
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
    # as in SDXL
    "sdxl": {
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT,
    },
    # residual blocks that change the size, divide their sums, and get an activated time
    "resnets": {
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_scale_factor": 2.0,
        "time_embedding_act_fn": "silu",
        "resnet_skip_time_act": True,
    },
}


def hostile(model: nn.Module, seed: int = 0) -> Any:
    """The model in evaluation mode, with noise on every parameter and an epsilon of its own for every norm."""
    norms = [(module, "eps") for module in model.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)]
    make_hostile_(model, seed=seed, norms=norms)
    return model.eval()


def tiny_unet(form: str = "sd1", seed: int = 0, **options: Any) -> Any:
    """A UNet of two levels; `options` override its config."""
    base: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": TEXT,
        "norm_num_groups": 4,
    }
    torch.manual_seed(seed)
    return hostile(UNet2DConditionModel(**{**base, **FORMS[form], **options}), seed)


def tiny_vae(seed: int = 0, **options: Any) -> Any:
    """An autoencoder of two levels; `options` override its config."""
    base: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    torch.manual_seed(seed)
    return hostile(AutoencoderKL(**{**base, **options}), seed)


def unet_inputs(unet: Any, batch: int = 2, height: int = 8, width: int = 8, seed: int = 0) -> dict[str, Any]:
    """Arguments of a UNet's forward, as a pipeline gives them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(unet.dtype)

    given: dict[str, Any] = {
        "sample": noise(batch, unet.config.in_channels, height, width),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": noise(batch, 5, TEXT),
        "return_dict": False,
    }
    if unet.config.addition_embed_type == "text_time":
        given["added_cond_kwargs"] = {"text_embeds": noise(batch, TEXT), "time_ids": noise(batch, 6)}
    return given


def share(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
