"""A small model of the classes that a config describes, with weights at which every parameter matters.

Sizes are set by common attribute names, and so that no two of them are equal; everything else is as the config says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import nn

from dsi.errors import UnsupportedModelError
from dsi.testing.configs import HIDDEN, LAYERS, SIZES, VOCABULARY
from dsi.testing.hostile import make_hostile_
from dsi.testing.inputs import Reads

# beside the kit's sizes: embeddings narrower than the layers, so that projections around them show, and windows in some
# layers, where the architecture has them
_FIRST = MappingProxyType(
    {**SIZES, "word_embed_proj_dim": HIDDEN // 2, "use_sliding_window": True, "max_window_layers": 1}
)
_SECOND_SIZES = {HIDDEN: 48, HIDDEN // 2: 24, LAYERS: 3, 96: 80, 8: 6, 4: 3, 16: 24}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers")
_SECOND_NAMES = (
    *("hidden_size", "n_embd", "d_model", "dim", "projection_dim", "word_embed_proj_dim", "intermediate_size"),
    *("n_inner", "ffn_dim", "hidden_dim", *_LAYER_COUNTS, "num_attention_heads", "n_head", "n_heads"),
    *("num_key_value_heads", "num_kv_heads", "head_dim"),
)
SECOND: Mapping[str, Any] = MappingProxyType(
    {name: _SECOND_SIZES.get(value, value) if name in _SECOND_NAMES else value for name, value in _FIRST.items()}
)
"""Other sizes by the same names: what holds for both is no coincidence."""

FIRST: Mapping[str, Any] = _FIRST
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")


def settings_of(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the class of `config`: what it says, with small sizes.

    Args:
        config: of the model to be drafted, of any size.
        sizes: attribute -> value, for those that the config has.
    """
    given = vars(config)
    inner = getattr(type(config), "sub_configs", {})
    plain = {k: copy.deepcopy(v) for k, v in given.items() if not k.startswith("_") and k not in inner}
    layers = next((given[name] for name in _LAYER_COUNTS if isinstance(given.get(name), int)), None)
    settings = {name: _cut(value, layers, sizes) for name, value in plain.items() if name not in ("dtype",)}
    settings |= {name: value for name, value in sizes.items() if name in given}
    if isinstance(settings.get("rope_parameters"), dict):
        settings["rope_parameters"] = _plain_rope(settings["rope_parameters"])
    if "layer_types" in settings and settings.get("use_sliding_window"):
        # made anew of the window's settings
        settings["layer_types"] = None
    vocabulary = settings.get("vocab_size", VOCABULARY)
    for index, name in enumerate(_TOKENS):
        token = settings.get(name)
        if isinstance(token, int) and token >= vocabulary:
            settings[name] = index
    for name in inner:
        settings[name] = settings_of(getattr(config, name), sizes)
    return settings


def _cut(value: Any, layers: int | None, sizes: Mapping[str, Any]) -> Any:
    """A list with an entry for each layer, for as many as there will be."""
    count = sizes[_LAYER_COUNTS[0]]
    return value[:count] if isinstance(value, list) and layers is not None and len(value) == layers else value


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters that fit every head size; what is rotated arrives from the model, whatever its type."""
    if any(isinstance(value, list) for value in parameters.values()):
        kept: dict[str, Any] = {
            name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters
        }
        return {"rope_type": "default", **kept}
    return parameters


@attrs.frozen(eq=False)
class Species:
    """What small models are built of.

    Args:
        model_class: the class of the model.
        config_class: of its config.
        config: as given, of any size.
        epsilons: (model) -> every norm with the name of its epsilon's attribute, so that each gets its own.
    """

    model_class: type
    config_class: type
    config: Any
    epsilons: Callable[[nn.Module], Iterable[tuple[nn.Module, str]]]

    @classmethod
    def of(cls, skeleton: Any, epsilons: Callable[[nn.Module], Iterable[tuple[nn.Module, str]]]) -> Species:
        """Of the classes of a model."""
        return cls(type(skeleton), type(skeleton.config), skeleton.config, epsilons)

    def specimen(
        self,
        sizes: Mapping[str, Any] = FIRST,
        *,
        changes: Mapping[str, Any] | None = None,
        inside: str = "",
        attention: str = "",
    ) -> Specimen:
        """A small model.

        Args:
            sizes: `FIRST` or `SECOND`.
            changes: settings beside the sizes.
            inside: the name of the inner config that they belong to; "" for the config itself.
            attention: the attention implementation; "" for transformers' choice.

        Raises:
            UnsupportedModelError: transformers cannot build it.
        """
        settings = settings_of(self.config, sizes)
        (settings[inside] if inside else settings).update(changes or {})
        try:
            return Specimen(self._build(settings, attention))
        # whatever a config or a constructor raises on values that do not fit together
        except Exception as error:
            raise UnsupportedModelError(
                f"no small {self.model_class.__name__} can be built: {type(error).__name__}: {error}"
            ) from error

    def _build(self, settings: dict[str, Any], attention: str) -> Any:
        config: Any = self.config_class(**settings)
        if attention:
            config._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = self.model_class(config).eval()
        make_hostile_(model, seed=0, norms=self.epsilons(model))
        model = model.float()
        if model.can_generate():
            model.generation_config.eos_token_id = None
            pad = config.get_text_config().pad_token_id
            model.generation_config.pad_token_id = 0 if pad is None else pad
        return model


@attrs.frozen(eq=False)
class Specimen:
    """A small model, which nobody changes: those who do take a `copy`."""

    model: Any

    @property
    def reads(self) -> Reads:
        """What the model reads."""
        return Reads.of(self.model)

    @property
    def decodes(self) -> bool:
        """It generates, and its layers may keep a cache."""
        return bool(self.model.can_generate())

    def copy(self) -> Any:
        """An equal model."""
        return copy.deepcopy(self.model)
