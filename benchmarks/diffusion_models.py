"""Stable Diffusion for the benchmarks: its parts at their real sizes, or tiny ones, with random weights and no hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import diffusers
import torch
import transformers
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


@attrs.frozen(kw_only=True)
class Sizes:
    """One set of parts.

    Args:
        unet, sdxl, vae: settings of `UNet2DConditionModel` and `AutoencoderKL`.
        text: settings of `CLIPTextConfig`.
        latents, sdxl_latents, images: sides of the maps that are measured; of `images` those of the decoded latents.
        steps: of a picture.
        dtype: of the weights.
        device: where they are.
    """

    unet: Mapping[str, Any]
    sdxl: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    latents: int
    sdxl_latents: int
    images: tuple[int, ...]
    steps: int
    dtype: torch.dtype
    device: str


_SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}

REAL = Sizes(
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    sdxl=_SDXL
    | {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
    text={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
    },
    latents=64,
    sdxl_latents=128,
    images=(64, 128),
    steps=50,
    dtype=torch.float16,
    device="cuda",
)

TINY = Sizes(
    unet={
        "sample_size": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    sdxl=_SDXL
    | {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 24,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
    vae={
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 16,
    },
    text={
        "vocab_size": 67,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "projection_dim": 24,
    },
    latents=8,
    sdxl_latents=8,
    images=(8, 12),
    steps=3,
    dtype=torch.float16,
    device="cpu",
)


# --- parts --------------------------------------------------------------------------------------------------------


def made(make: Callable[[], nn.Module], sizes: Sizes) -> Any:
    """What `make` makes, in eval mode where and as `sizes` say; every bias and every norm is off its neutral value."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    try:
        with torch.device(sizes.device):
            part = make().eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return part


def unet_of(sizes: Sizes) -> Any:
    """Stable Diffusion 1.5's denoiser."""
    return made(lambda: diffusers.UNet2DConditionModel(**sizes.unet), sizes)


def sdxl_of(sizes: Sizes) -> Any:
    """Stable Diffusion XL's denoiser."""
    return made(lambda: diffusers.UNet2DConditionModel(**sizes.sdxl), sizes)


def vae_of(sizes: Sizes) -> Any:
    """The autoencoder of both."""
    return made(lambda: diffusers.AutoencoderKL(**sizes.vae), sizes)


def pipeline_of(sizes: Sizes) -> Any:
    """A text-to-image pipeline of the parts of Stable Diffusion 1.5, with a tokenizer of single letters."""
    config = transformers.CLIPTextConfig(**sizes.text, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return pipeline(
        unet=unet_of(sizes), vae=vae_of(sizes), text=made(lambda: transformers.CLIPTextModel(config), sizes)
    )


def pipeline(*, unet: Any, vae: Any, text: Any) -> Any:
    """The pipeline of these parts."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=letters(text.config.max_position_embeddings),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def letters(length: int) -> Any:
    """A CLIP tokenizer whose words are written in single letters, filled up to `length`."""
    signs = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<unk>", "<|startoftext|>", "<|endoftext|>", *signs, *(f"{sign}</w>" for sign in signs)]
    return transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token="<unk>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=length,
    )


# --- what they are given ------------------------------------------------------------------------------------------


def _random(sizes: Sizes, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator(sizes.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=sizes.device, dtype=sizes.dtype)


def denoising(sizes: Sizes, settings: Mapping[str, Any], side: int) -> Inputs:
    """Latents of two rows, a time, a text of each row, and what SDXL wants beside them."""
    tokens = sizes.text["max_position_embeddings"]
    latents = _random(sizes, 2, 4, side, side, seed=1)
    text = _random(sizes, 2, tokens, settings["cross_attention_dim"], seed=2)
    given: Inputs = (latents, torch.tensor(481, device=sizes.device), text)
    if "addition_embed_type" not in settings:
        return given
    times = 6 * settings["addition_time_embed_dim"]
    pooled = _random(sizes, 2, settings["projection_class_embeddings_input_dim"] - times, seed=3)
    ids = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2, device=sizes.device, dtype=sizes.dtype)
    return *given, pooled, ids


def denoise(unet: Any, latents: Tensor, time: Tensor, text: Tensor, *added: Tensor) -> Tensor:
    """One step's prediction, called as pipelines call it."""
    more = {"text_embeds": added[0], "time_ids": added[1]} if added else None
    return unet(latents, time, encoder_hidden_states=text, added_cond_kwargs=more, return_dict=False)[0]


def decoding(sizes: Sizes, side: int) -> Inputs:
    """Latents of one row."""
    return (_random(sizes, 1, 4, side, side, seed=4),)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """The picture of latents, [B, 3, H, W]."""
    return vae.decode(latents, return_dict=False)[0]


def copied(pipe: Any, change: Callable[[nn.Module], Any]) -> Any:
    """A pipeline of copies of the parts, each changed."""
    parts = {name: change(getattr(pipe, name)) for name in ("unet", "vae", "text_encoder")}
    return pipeline(unet=parts["unet"], vae=parts["vae"], text=parts["text_encoder"])


def prompt() -> Mapping[str, Any]:
    """What a pipeline is asked for, beside latents and steps."""
    return MappingProxyType({"prompt": "a horse", "guidance_scale": 7.5, "output_type": "pt"})


@torch.no_grad()
def picture(pipe: Any, latents: Tensor, steps: int, kept: list[Tensor] | None = None) -> Tensor:
    """The picture [1, 3, H, W] that a pipeline paints from these latents.

    Args:
        pipe: what is called.
        latents: of the first step.
        steps: how many.
        kept: is given the latents behind every step.
    """

    def keep(_: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        # the next step of a graph may write over them
        kept.append(state["latents"].clone())
        return state

    more = {} if kept is None else {"callback_on_step_end": keep}
    return pipe(latents=latents.clone(), num_inference_steps=steps, **prompt(), **more).images


def first_latents(sizes: Sizes) -> Tensor:
    """Of a picture."""
    return _random(sizes, 1, 4, sizes.latents, sizes.latents, seed=5)
