"""Tiny models of the families in plugins/, one for each variant that a config can ask for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
import transformers

import dsi
from dsi.policy import Policy
from dsi_llms.gemma import GEMMA
from dsi_llms.gemma2 import GEMMA2
from dsi_llms.mistral import MISTRAL
from dsi_llms.phi3 import PHI3
from dsi_llms.qwen2 import QWEN2
from dsi_llms.qwen3 import QWEN3
from dsi_moe.mixtral import MIXTRAL
from dsi_moe.qwen3_moe import QWEN3_MOE
from tests.runtime.pairs import Pair
from tests.support.models import make_hostile_

WINDOW = 6
SIZE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HEAD_DIM = {"head_dim": 16}
# positions from which on the model's rotary terms are others
SHORT = 28


@attrs.frozen(kw_only=True)
class Variant:
    """A config of a family.

    Args:
        policy: the family's.
        config: the config class, an attribute of transformers.
        settings: beyond `SIZE`.
    """

    policy: Policy
    config: str
    settings: Mapping[str, Any] = attrs.field(converter=lambda given: MappingProxyType(dict(given)), factory=dict)

    def model(self, head: str = "AutoModelForCausalLM", **overrides: Any) -> Any:
        config = getattr(transformers, self.config)(**{**SIZE, **self.settings, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, head).from_config(config).eval()
        make_hostile_(model)
        return model


_EXPERTS = {"num_experts_per_tok": 2}
_MIXED = {"use_sliding_window": True, "sliding_window": WINDOW}
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_NO_CAPS = dict.fromkeys(_CAPS)
_QWEN3_EXPERTS = {**HEAD_DIM, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": SHORT,
}


def _phi3(**rope: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **rope}}


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "mistral": Variant(policy=MISTRAL, config="MistralConfig", settings={**HEAD_DIM, "sliding_window": WINDOW}),
        "mistral, full": Variant(policy=MISTRAL, config="MistralConfig", settings={**HEAD_DIM, "sliding_window": None}),
        "qwen2": Variant(policy=QWEN2, config="Qwen2Config"),
        "qwen2, mixed": Variant(policy=QWEN2, config="Qwen2Config", settings={**_MIXED, "max_window_layers": 1}),
        "qwen3": Variant(policy=QWEN3, config="Qwen3Config", settings=HEAD_DIM),
        "qwen3, mixed, biases, tied": Variant(
            policy=QWEN3,
            config="Qwen3Config",
            settings={
                **HEAD_DIM,
                **_MIXED,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
        ),
        "phi3, partial": Variant(policy=PHI3, config="Phi3Config", settings=_phi3(partial_rotary_factor=0.5)),
        "phi3, window": Variant(policy=PHI3, config="Phi3Config", settings={**_phi3(), "sliding_window": WINDOW}),
        "phi3, longrope": Variant(
            policy=PHI3,
            config="Phi3Config",
            settings={"rope_parameters": _LONGROPE, "original_max_position_embeddings": SHORT},
        ),
        "gemma": Variant(policy=GEMMA, config="GemmaConfig", settings={**HEAD_DIM, "attention_bias": True}),
        "gemma2": Variant(
            policy=GEMMA2,
            config="Gemma2Config",
            settings={**HEAD_DIM, **_CAPS, "sliding_window": WINDOW, "query_pre_attn_scalar": 24},
        ),
        "gemma2, no caps": Variant(
            policy=GEMMA2, config="Gemma2Config", settings={**HEAD_DIM, **_NO_CAPS, "sliding_window": WINDOW}
        ),
        "mixtral": Variant(policy=MIXTRAL, config="MixtralConfig", settings={**_EXPERTS, "num_local_experts": 4}),
        "mixtral, window": Variant(
            policy=MIXTRAL,
            config="MixtralConfig",
            settings={**HEAD_DIM, **_EXPERTS, "num_local_experts": 4, "sliding_window": WINDOW},
        ),
        "qwen3_moe, one plain layer": Variant(
            policy=QWEN3_MOE,
            config="Qwen3MoeConfig",
            settings={**_QWEN3_EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": True},
        ),
        "qwen3_moe, window, biases": Variant(
            policy=QWEN3_MOE, config="Qwen3MoeConfig", settings={**_QWEN3_EXPERTS, **_MIXED, "attention_bias": True}
        ),
    }
)
EXPERTS = [name for name in VARIANTS if name.startswith(("mixtral", "qwen3_moe"))]


def pair_of(name: str, config: Mapping[str, Any] | None = None, **overrides: Any) -> Pair:
    """A stock model and its injected copy."""
    variant = VARIANTS[name]
    stock = variant.model(**overrides)
    fused = copy.deepcopy(stock)
    dsi.init_inference(fused, {"injection_policy": variant.policy, "strict": True, **(config or {})})
    return Pair("llama", stock, fused)


@functools.cache
def shared_pair(name: str) -> Pair:
    """The same models for every test that leaves them as they are."""
    return pair_of(name)


def layers(model: Any) -> list[Any]:
    """The decoder layers of a model."""
    return list(model.model.layers)
