"""A tiny config for a policy of which nothing but the layer classes is known: small, asymmetric sizes set by attribute.

No size is four times another, heads are twice the kv heads, and head_dim is not hidden_size / heads where the config
lets one say so.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from dsi.errors import ConfigError
from dsi.policy import Policy

HEADS = 8
HIDDEN = 64
INNER = 96
LAYERS = 2
VOCABULARY = 67
POSITIONS = 64
WINDOW = 6

# attribute -> value; a config is given those that it has
SIZES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "projection_dim", "word_embed_proj_dim"), HIDDEN),
        **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "moe_intermediate_size"), INNER),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), LAYERS),
        **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), HEADS),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), HEADS // 2),
        **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "seq_length"), POSITIONS),
        "vocab_size": VOCABULARY,
        "head_dim": 2 * HIDDEN // HEADS,
        # a part of the smallest head_dim that these sizes give
        "rotary_dim": 4,
        "sliding_window": WINDOW,
        "image_size": 16,
        "patch_size": 8,
        **dict.fromkeys(("num_local_experts", "num_experts"), 4),
        "num_experts_per_tok": 2,
    }
)
# the same for models that take their settings one by one, of two levels: attribute -> value
MAP_SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
    }
)
# switches that every config has say nothing of the layers
_COMMON = frozenset(
    {"return_dict", "output_hidden_states", "output_attentions", "use_cache", "is_encoder_decoder", "is_decoder"}
)
MOST_SWITCHES = 3
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def tiny_config(policy: Policy) -> Any:
    """A tiny config of the architecture whose layers a policy claims, of a variant that it takes.

    Where the policy refuses the variant that is the default, switches of the config are turned, as few as will do. Of a
    policy whose blocks name the models that they are inside of, it is a dict of that model's arguments.

    Raises:
        ConfigError: the module of its layers belongs to no config, or transformers refuses the sizes.
    """
    if any(block.inside for block in policy.blocks):
        return _map_settings(whole_class(policy))
    cls = config_class(policy)
    try:
        return _variant(policy, cls, _settings(cls))
    # each config class checks its own fields, and raises whatever its checks raise
    except Exception as error:
        raise ConfigError(
            [f"{cls.__name__}: no tiny config of it can be guessed ({type(error).__name__}: {error}); write a test"]
        ) from error


def _variant(policy: Policy, cls: Any, settings: dict[str, Any]) -> Any:
    plain = cls(**settings)
    if policy.supports(plain) is None:
        return plain
    switches = [name for name, value in vars(plain).items() if isinstance(value, bool) and name not in _COMMON]
    for count in range(1, MOST_SWITCHES + 1):
        for names in itertools.combinations(switches, count):
            turned = cls(**settings, **{name: not getattr(plain, name) for name in names})
            if policy.supports(turned) is None:
                return turned
    # the check tells why it is refused
    return plain


def whole_class(policy: Policy) -> type:
    """The first class that the policy's blocks name in `inside` and that is a model by itself.

    Raises:
        ConfigError: there is none.
    """
    for name in (name for block in policy.blocks for name in block.inside):
        module, _, attribute = name.partition(":")
        found: type = getattr(importlib.import_module(module), attribute)
        if hasattr(found, "from_pretrained"):
            return found
    raise ConfigError(["model_class: no block of the policy is inside a model that has from_pretrained(); name one"])


def _map_settings(cls: type) -> dict[str, Any]:
    """Arguments of a model of maps: of every list of its levels' classes the first and the last."""
    settings: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in MAP_SIZES:
            settings[name] = MAP_SIZES[name]
        elif name in ("down_block_types", "up_block_types"):
            settings[name] = (parameter.default[0], parameter.default[-1])
    return settings


def config_class(policy: Policy) -> type:
    """The config class of the architecture: its model's, else the one of the package that holds the layer.

    Raises:
        ConfigError: there is none.
    """
    for causal in policy.models:
        module, _, name = causal.model.partition(":")
        found: type = getattr(importlib.import_module(module), name).config_class
        return found
    layer = policy.blocks[0].layer
    package = layer.partition(":")[0].rpartition(".")[0]
    configs = list(_configs_of(package))
    if not configs:
        raise ConfigError([f"{layer}: transformers has no model whose config is in {package}; write a test"])
    # the whole before its towers
    return max(configs, key=lambda cls: len(getattr(cls, "sub_configs", ())))


def _configs_of(package: str) -> Iterator[type]:
    """Config classes of a package that one of transformers' models is built from."""
    from transformers import MODEL_MAPPING

    for cls in MODEL_MAPPING:
        if cls.__module__.rpartition(".")[0] == package:
            yield cls


def _settings(cls: Any) -> dict[str, Any]:
    """Arguments for a config class and the configs inside it."""
    plain = cls()
    settings: dict[str, Any] = {name: value for name, value in SIZES.items() if name in vars(plain)}
    vocabulary = settings.get("vocab_size", VOCABULARY)
    for index, name in enumerate(_TOKENS):
        # a token beyond the tiny vocabulary cannot be embedded
        token = vars(plain).get(name)
        if isinstance(token, int) and token >= vocabulary:
            settings[name] = index
    for name, inner in getattr(cls, "sub_configs", {}).items():
        settings[name] = _settings(inner)
    return settings
