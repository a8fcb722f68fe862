"""Tiny models that tell their layers the positions in other ways than the families of `tests.support` do.

Their policies come with the plugin package dsi-gpts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.support.models import VOCAB, make_hostile_

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 64,
}
_GROUPS = {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}

KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        # a table in each layer, which turns neighbours
        "table": ("GPTJ", {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_inner": 48}),
        # an argument of biases; six heads are no power of two
        "biases": ("Bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6}),
        # as `biases`, and the residual connections start behind the norms
        "normed sum": ("Bloom", {"hidden_size": 32, "n_layer": 2, "apply_residual_connection_post_layernorm": True}),
        # biases inside the mask, groups of heads
        "biased mask": ("Falcon", {**_FALCON, "alibi": True}),
        # a cache that holds every kv head once for each query head
        "repeated": ("Falcon", _GROUPS),
        "repeated, biased mask": ("Falcon", {**_GROUPS, "alibi": True}),
    }
)


def positioned(kind: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A model with hostile weights in eval mode.

    Args:
        kind: a key of `KINDS`.
        dtype: of the parameters.
        **overrides: arguments of the config.
    """
    prefix, settings = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**{**_TOKENS, **settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    make_hostile_(model)
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def one_layer(kind: str) -> dict[str, int]:
    """Overrides for a model of a single layer."""
    return {"num_hidden_layers" if KINDS[kind][0] == "Falcon" else "n_layer": 1}
