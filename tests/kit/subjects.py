"""What the mutants are mutants of: whole policies, and tiny configs on which every check sees."""

from __future__ import annotations

from typing import Any

import attrs
import transformers

from dsi.policy import Norm, Policy
from dsi_policies.bert import BERT
from dsi_policies.gpt2 import GPT2
from dsi_policies.llama import LLAMA
from dsi_policies.opt import OPT
from dsi_policies.unet import UNET
from dsi_policies.vae import VAE
from tests.support.models import tiny_config

MISTRAL_MODULE = "transformers.models.mistral.modeling_mistral:"
# longer than any text of the other checks, so that what a window does shows in the check of windows alone
WINDOW = 17


def mistral() -> Policy:
    """LLaMA's policy over the classes of an architecture with sliding windows."""

    def renamed(slot: Any) -> Any:
        return attrs.evolve(slot, cls=MISTRAL_MODULE + "MistralRMSNorm") if isinstance(slot, Norm) else slot

    block, parts = LLAMA.blocks[0], LLAMA.models[0]
    return attrs.evolve(
        LLAMA,
        name="mistral",
        blocks=[
            attrs.evolve(
                block,
                layer=MISTRAL_MODULE + "MistralDecoderLayer",
                slots={place: renamed(slot) for place, slot in block.slots.items()},
            )
        ],
        models=[
            attrs.evolve(parts, model=MISTRAL_MODULE + "MistralForCausalLM", norm=renamed(parts.norm)),
        ],
    )


def llama_config() -> Any:
    """Eight heads over four kv heads, head_dim of its own, every bias on."""
    return tiny_config("llama", num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True)


def mistral_config() -> Any:
    """As LLaMA's, without biases, with a window."""
    return transformers.MistralConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        sliding_window=WINDOW,
        pad_token_id=0,
    )


def unet_settings() -> dict[str, Any]:
    """Two levels, one with attention, a context of a width of its own."""
    return {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }


def vae_settings() -> dict[str, Any]:
    """Two levels, and attention in the middle."""
    return {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }


SUBJECTS: dict[str, tuple[Any, Any]] = {
    "llama": (lambda: LLAMA, llama_config),
    "mistral": (mistral, mistral_config),
    "gpt2": (lambda: GPT2, lambda: tiny_config("gpt2", n_head=8)),
    "opt": (lambda: OPT, lambda: tiny_config("opt", num_attention_heads=8)),
    "unet": (lambda: UNET, unet_settings),
    "vae": (lambda: VAE, vae_settings),
    "bert": (lambda: BERT, lambda: tiny_config("bert", num_attention_heads=8)),
}
"""Name -> (the whole policy, its config)."""
