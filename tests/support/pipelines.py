"""Tiny diffusers pipelines with hostile weights: no hub, no files.

pipe = text_to_image()                        StableDiffusionPipeline, DDIM
pipe = text_to_image(safety=True)             with a safety checker
pipe = text_to_image_xl()                     StableDiffusionXLPipeline, Euler
pictures, latents = paint(pipe, steps=2)      pictures, and the latents after each step
pictures, latents = paint(pipe, image=picture(2), strength=0.8)
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

VOCAB, HIDDEN, POSITIONS, SIZE = 60, 32, 16, 16


def hostile(model: nn.Module, seed: int = 0) -> Any:
    """Weights under which a lost bias, norm or residual shows: matrices keep the scale of what they multiply, vectors
    are off their neutral values.
    """
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=drawn)
            if parameter.dim() < 2:
                # what is drawn at the start is less than a half
                parameter.copy_(parameter.round() + 0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def unet(**settings: Any) -> Any:
    """Of two levels, one of which attends to a text."""
    given = {
        "sample_size": SIZE // 2,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": HIDDEN,
        "norm_num_groups": 4,
    }
    return hostile(diffusers.UNet2DConditionModel(**{**given, **settings}), 1)


def controlnet() -> Any:
    """What goes beside `unet()`."""
    return hostile(
        diffusers.ControlNetModel(
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=HIDDEN,
            norm_num_groups=4,
            conditioning_embedding_out_channels=(4, 8),
        ),
        2,
    )


def vae(**settings: Any) -> Any:
    """Halves the sides of a picture."""
    given = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": SIZE,
    }
    return hostile(diffusers.AutoencoderKL(**{**given, **settings}), 3)


def text_encoder(*, projects: bool = False) -> Any:
    """CLIP's, with a projection or without."""
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        projection_dim=HIDDEN,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return hostile(kind(config), 4 + projects)


def tokenizer() -> Any:
    """CLIP's, over single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<unk>", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        unk_token="<unk>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=POSITIONS,
    )


def safety_checker() -> Any:
    """One that finds nothing: its thresholds are beyond what a cosine reaches."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    tower = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=tower, vision_config={**tower, "image_size": SIZE, "patch_size": 8}, projection_dim=HIDDEN
    )
    model = hostile(StableDiffusionSafetyChecker(config), 6)
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        getattr(model, name).data.fill_(2.0)
    return model


_OWN: dict[str, dict[str, Any]] = {
    # what is cut off makes a small difference a large one
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "DDPMScheduler": {"clip_sample": False, "steps_offset": 1},
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
}


def schedule(name: str) -> Any:
    """A scheduler of diffusers, set as checkpoints of latent diffusion set it."""
    given = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return getattr(diffusers, name)(**{**given, **_OWN.get(name, {})})


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_to_image(kind: str = "StableDiffusionPipeline", *, safety: bool = False, **parts: Any) -> Any:
    """A pipeline of the first generation; `parts` are in the place of its components or beside them."""
    extractor = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    given = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": schedule("DDIMScheduler"),
        "safety_checker": safety_checker() if safety else None,
        "feature_extractor": extractor if safety else None,
        "requires_safety_checker": safety,
    }
    return _quiet(getattr(diffusers, kind)(**{**given, **parts}))


def text_to_image_xl() -> Any:
    """A pipeline of the second: two text encoders, added conditions."""
    denoiser = unet(
        cross_attention_dim=2 * HIDDEN,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + HIDDEN,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return _quiet(
        diffusers.StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(projects=True),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=denoiser,
            scheduler=schedule("EulerDiscreteScheduler"),
            add_watermarker=False,
        )
    )


def picture(rows: int = 1, seed: int = 0, size: int = SIZE, channels: int = 3) -> Tensor:
    """Random pixels between 0 and 1."""
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(seed))


def paint(
    pipe: Any, prompt: Any = "a cat", *, steps: int = 2, seed: int = 0, **given: Any
) -> tuple[Tensor, list[Tensor]]:
    """Pictures, and the latents after each step."""
    latents: list[Tensor] = []

    def keep(_: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        latents.append(state["latents"].clone())
        return {}

    if not {"image", "height"} & given.keys():
        given |= {"height": SIZE, "width": SIZE}
    found = pipe(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        callback_on_step_end=keep,
        **given,
    )
    return found.images, latents
