"""Which loop a `generate` call takes: dsi's own where it is known to do what transformers' does, else transformers'.

The question is asked of the settings as transformers will merge them, before transformers sees them, and every doubt
is answered with transformers' loop: a field or an argument that is not listed here, a class that changes a step of the
loop, a cache of another kind.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from dsi.runtime.kv_cache import PreallocatedCache, PreallocatedLayer, WindowedLayer
from dsi.runtime.session import Route, Session
from dsi.runtime.sliding_window import PreallocatedSlidingLayer, windows_of

# arguments of generate() and of the model that both loops treat alike
_SHARED_ARGUMENTS = frozenset(
    {
        "inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "logits_to_keep",
        "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer",
        "synced_gpus", "tokenizer",
    }
)  # fmt: skip

# settings that transformers turns into processors, criteria and lengths, or that its sampling loop never reads
_SHARED_SETTINGS = frozenset(
    {
        # lengths and stopping
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "early_stopping",
        # sampling and processors
        "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "sequence_bias", "watermarking_config", "diversity_penalty",
        # results
        "num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate",
        # special tokens
        "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
        # read by other modes alone
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
        "speculation_type", "is_assistant", "cache_config", "max_cache_len", "disable_compile",
        "continuous_batching_config", "low_memory",
        # where the settings come from
        "_from_model_config", "_commit_hash", "transformers_version", "generation_kwargs",
    }
)  # fmt: skip

# settings under which the sampling loop stays the sampling loop only at these values
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "guidance_scale": (1, 1.0),
    "use_cache": (True,),
    "cache_implementation": ("dynamic",),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "token_healing": (False,),
    "use_mtp": (False,),
}

# layers of a cache that dsi's loop writes to, or exchanges for such
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, PreallocatedLayer, PreallocatedSlidingLayer, WindowedLayer)

# steps of the loop that dsi's own does without asking the class
_LOOP_METHODS = (
    "generate", "_sample", "_prefill", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation",
    "_prepare_cache_for_generation", "_extract_generation_mode_kwargs", "_has_unfinished_sequences",
)  # fmt: skip


class Settings:
    """What a call asks for, as transformers merges it: arguments over `generation_config` over the model's own.

    Args:
        model: has a `generation_config`.
        given: arguments of the call by name.
    """

    def __init__(self, model: Any, given: Mapping[str, Any]) -> None:
        self.given = given
        configs = (given.get("generation_config"), model.generation_config)
        self.layers = [config for config in configs if config is not None]

    def get(self, name: str) -> Any:
        """The value in force; None stands for transformers' default."""
        if name in self.given:
            return self.given[name]
        for config in self.layers:
            if (value := getattr(config, name, None)) is not None:
                return value
        return None

    def set_fields(self) -> set[str]:
        """Every field that somebody gave a value."""
        found = {name for name in self.given if name in _fields()}
        for config in self.layers:
            found.update(name for name, value in vars(config).items() if value is not None)
        return found


def choose_route(model: Any, session: Session, given: Mapping[str, Any]) -> Route:
    """dsi's loop for `generate(**given)`, or why not.

    Args:
        model: an injected model.
        session: its session.
        given: arguments of the call by name.
    """
    reason = (
        _runner_reason(session)
        or ("the model is an encoder-decoder" if model.config.is_encoder_decoder else "")
        or _class_reason(type(model), session)
        or _argument_reason(model, given)
        or _setting_reason(Settings(model, given))
        or _brought_cache_reason(model, session, given.get("past_key_values"))
    )
    return Route(not reason, reason)


def _runner_reason(session: Session) -> str:
    if session.runner is None:
        return session.reason or "the model has no decode runner"
    return session.runner.obstacle()


def _class_reason(cls: type, session: Session) -> str:
    assert session.runner is not None
    known = session.runner.own_methods()
    for name in _LOOP_METHODS:
        if name not in known and getattr(cls, name, None) is not getattr(GenerationMixin, name, None):
            return f"the model's class has a {name} of its own"
    return ""


def _argument_reason(model: Any, given: Mapping[str, Any]) -> str:
    for name, value in given.items():
        if value is not None and name not in _SHARED_ARGUMENTS and name not in _fields():
            return f"argument {name}"
    if given.get("synced_gpus") or is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model):
        return "ranks may have to wait for each other"
    for name in ("inputs", "input_ids", "inputs_embeds"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.device != model.device:
            return f"{name} are on {tensor.device}, the model on {model.device}"
    if given.get("inputs_embeds") is not None and given.get("past_key_values") is not None:
        return "inputs_embeds beside a cache"
    return ""


def _setting_reason(settings: Settings) -> str:
    for name in sorted(settings.set_fields() - _SHARED_SETTINGS):
        value = settings.get(name)
        if name not in _fields() or value in (None, _fields()[name], *_NEUTRAL.get(name, ())):
            continue
        if name == "penalty_alpha" and not _contrastive(settings):
            continue
        return f"{name}={value!r}"
    return ""


def _contrastive(settings: Settings) -> bool:
    top_k = settings.get("top_k")
    return not settings.get("do_sample") and settings.get("penalty_alpha") > 0 and (top_k is None or top_k > 1)


def cache_reason(cache: Any) -> str:
    """Why dsi's loop cannot write to this cache, or ""."""
    if cache is None:
        return ""
    if type(cache) not in (DynamicCache, PreallocatedCache) or cache.offloading:
        return f"a {type(cache).__name__} is given"
    return next((reason for layer in cache.layers if (reason := _layer_reason(layer))), "")


def _layer_reason(layer: Any) -> str:
    if type(layer) not in _LAYERS:
        return f"the cache has a {type(layer).__name__}"
    if getattr(layer, "record_past", False):
        return "the cache keeps its past for a rollback"
    # transformers keeps all positions for a window of one
    return "a sliding window of 1" if getattr(layer, "sliding_window", 2) < 2 else ""


def window_reason(wanted: tuple[int | None, ...], kept: tuple[int | None, ...]) -> str:
    """Why layers with these windows cannot read from a cache with those, or ""."""
    kept = kept or (None,) * len(wanted)
    if len(wanted) != len(kept):
        return f"the model has {len(wanted)} layers, and its cache {len(kept)}"
    for index, (one, other) in enumerate(zip(wanted, kept, strict=True)):
        if one != other:
            sees, keeps = (f"{n} positions" if n else "all positions" for n in (one, other))
            return f"layer {index} sees {sees}, and its cache keeps {keeps}"
    return ""


def _brought_cache_reason(model: Any, session: Session, cache: Any) -> str:
    """Beside `cache_reason`: whoever made the cache may not have known the config, so the policy is held to it."""
    assert session.runner is not None
    if cache is None:
        return ""
    return cache_reason(cache) or window_reason(session.runner.windows, windows_of(model.config))


@functools.cache
def _fields() -> Mapping[str, Any]:
    """Fields of this transformers' GenerationConfig with their defaults; what else a config holds no loop reads."""
    return MappingProxyType(vars(GenerationConfig()))
