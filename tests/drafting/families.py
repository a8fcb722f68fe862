"""The architectures that are drafted, by the transformers class of a model and the settings of its config."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers

_EXPERTS = {"num_hidden_layers": 2}

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama": ("LlamaForCausalLM", {}),
        "gpt2": ("GPT2LMHeadModel", {}),
        "opt": ("OPTForCausalLM", {}),
        "bert": ("BertModel", {}),
        "roberta": ("RobertaModel", {}),
        "distilbert": ("DistilBertModel", {}),
        "clip, text": ("CLIPTextModel", {}),
        "clip, vision": ("CLIPVisionModel", {}),
        "clip": ("CLIPModel", {}),
        "mistral": ("MistralForCausalLM", {}),
        "qwen2": ("Qwen2ForCausalLM", {}),
        "qwen3": ("Qwen3ForCausalLM", {}),
        "phi3": ("Phi3ForCausalLM", {}),
        "gemma": ("GemmaForCausalLM", {}),
        "gemma2": ("Gemma2ForCausalLM", {}),
        "gpt_neox": ("GPTNeoXForCausalLM", {}),
        "bloom": ("BloomForCausalLM", {}),
        "falcon": ("FalconForCausalLM", {}),
        "gptj": ("GPTJForCausalLM", {}),
        "mixtral": ("MixtralForCausalLM", _EXPERTS),
        "qwen3_moe": ("Qwen3MoeForCausalLM", _EXPERTS),
    }
)
"""Name -> (model class, settings of its config where its full size is too much even for the meta device)."""


def skeleton(name: str) -> Any:
    """A model of full size without weights."""
    model, settings = FAMILIES[name]
    cls = getattr(transformers, model)
    with torch.device("meta"):
        return cls(cls.config_class(**settings)).eval()
