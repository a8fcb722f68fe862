"""The choice between the two loops: settings merged as transformers does, and every doubt answered with stock's."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, QuantizedCache, StaticCache
from transformers.generation import GenerationMixin

from dsi.runtime import Route, Session
from dsi.runtime.route import _SHARED_SETTINGS, Settings, cache_reason, choose_route
from tests.runtime.pairs import make_pair, shared_pair


@pytest.fixture(scope="module")
def fused():
    return shared_pair("llama").fused


def route(fused, **given):
    return choose_route(fused, fused._dsi, given)


# --- settings -----------------------------------------------------------------------------------------------------

LAYERS = (
    {},
    {"num_beams": 3},
    {"num_beams": 1, "do_sample": True, "top_k": 5},
    {"num_beams": None, "penalty_alpha": 0.6, "use_cache": False},
    {"guidance_scale": 1.5, "output_attentions": True, "cache_implementation": "static"},
)


@pytest.mark.parametrize(("own", "config", "arguments"), list(itertools.product(LAYERS, (None, *LAYERS), LAYERS)))
def test_settings_are_merged_as_transformers_does(own, config, arguments, monkeypatch):
    model = shared_pair("llama").stock
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**own))
    given = dict(arguments)
    if config is not None:
        given["generation_config"] = GenerationConfig(**config)
    merged, _ = model._prepare_generation_config(given.get("generation_config"), **arguments)
    settings, defaults = Settings(model, given), GenerationConfig._get_default_generation_params()
    for name in set().union(*LAYERS):
        value = settings.get(name)
        asked = name in arguments
        assert (defaults.get(name) if value is None and not asked else value) == getattr(merged, name), name


def test_every_field_is_either_shared_or_looked_at():
    # what a newer transformers adds is neither: then the stock loop runs until somebody has thought about it
    fields = set(vars(GenerationConfig()))
    looked_at = {
        "num_beams", "num_beam_groups", "guidance_scale", "use_cache", "cache_implementation", "output_attentions",
        "output_hidden_states", "token_healing", "use_mtp", "compile_config", "dola_layers", "force_words_ids",
        "assistant_early_exit", "prefill_chunk_size", "constraints", "prompt_lookup_num_tokens", "penalty_alpha",
    }  # fmt: skip
    assert fields - _SHARED_SETTINGS == looked_at


BLOCKING = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "guidance_scale": 1.5,
    "use_cache": False,
    "cache_implementation": "static",
    "output_attentions": True,
    "output_hidden_states": True,
    "token_healing": True,
    "use_mtp": True,
    "compile_config": object(),
    "dola_layers": "low",
    "force_words_ids": [[1]],
    "assistant_early_exit": 1,
    "prefill_chunk_size": 4,
    "constraints": [object()],
    "prompt_lookup_num_tokens": 2,
    "penalty_alpha": 0.6,
}


@pytest.mark.parametrize("name", BLOCKING)
def test_settings_of_other_modes(name, fused):
    assert route(fused, **{name: BLOCKING[name]}) == Route(False, f"{name}={BLOCKING[name]!r}")
    config = GenerationConfig()
    setattr(config, name, BLOCKING[name])
    assert not route(fused, generation_config=config).fast
    # what the call says counts more
    assert route(fused, generation_config=config, **{name: None}).fast


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_beams": 1, "use_cache": True, "guidance_scale": 1.0, "output_attentions": False},
        {"cache_implementation": "dynamic"},
        {"do_sample": True, "temperature": 0.5, "top_k": 4},
        {"penalty_alpha": 0.6, "do_sample": True},
        {"penalty_alpha": 0.6, "top_k": 1},
        {"penalty_alpha": 0.0},
        {"attention_mask": None, "token_type_ids": None, "assistant_model": None},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"tokenizer": object(), "stop_strings": ["x"], "streamer": object()},
    ],
    ids="+".join,
)
def test_settings_of_the_own_loop(given, fused):
    assert route(fused, **given) == Route(True, "")


def test_notes_in_a_generation_config_are_nobodys_business(monkeypatch, fused):
    config = GenerationConfig(top_k=3)
    config.chat_format = "chatml"
    monkeypatch.setattr(fused, "generation_config", config)
    assert route(fused).fast


def test_a_field_that_nobody_thought_about(monkeypatch, fused):
    config = GenerationConfig()
    config.quantum_beams = 3
    monkeypatch.setattr("dsi.runtime.route._fields", lambda: {**vars(GenerationConfig()), "quantum_beams": 1})
    assert route(fused, generation_config=config).reason == "quantum_beams=3"
    config.quantum_beams = 1
    assert route(fused, generation_config=config).fast


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "assistant_model",
        "assistant_tokenizer",
        "custom_generate",
        "negative_prompt_ids",
        "token_type_ids",
        "pixel_values",
    ],
)
def test_arguments_of_other_modes(name, fused):
    assert route(fused, **{name: object()}) == Route(False, f"argument {name}")


def test_other_ranks_and_other_devices(fused):
    assert route(fused, synced_gpus=True).reason == "ranks may have to wait for each other"
    ids = torch.zeros(1, 3, dtype=torch.long, device="meta")
    assert route(fused, inputs=ids).reason == "inputs are on meta, the model on cpu"


# --- caches -------------------------------------------------------------------------------------------------------


class OwnCache(DynamicCache):
    """Somebody's own idea of a cache."""


def test_caches(fused):
    config = fused.config
    assert cache_reason(None) == cache_reason(DynamicCache()) == cache_reason(DynamicCache(config=config)) == ""
    assert cache_reason(StaticCache(config=config, max_cache_len=9)) == "a StaticCache is given"
    assert cache_reason(OwnCache()) == "a OwnCache is given"
    sliding = DynamicCache(config=config)
    sliding.layers[1] = object()
    assert cache_reason(sliding) == "the cache has a object"
    offloaded = types.SimpleNamespace(layers=[], offloading=True)
    assert cache_reason(offloaded) == "a SimpleNamespace is given"
    assert QuantizedCache not in DynamicCache.__mro__
    assert route(fused, past_key_values=DynamicCache(), inputs_embeds=torch.zeros(1, 2, 32)).reason == (
        "inputs_embeds beside a cache"
    )


# --- models -------------------------------------------------------------------------------------------------------


class OwnInputs(LlamaForCausalLM):
    """A model class that changes a step of the loop."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)


def test_a_class_with_a_loop_of_its_own():
    pair = make_pair("llama")
    pair.fused.__class__ = OwnInputs
    assert route(pair.fused).reason == "the model's class has a prepare_inputs_for_generation of its own"


def test_without_a_runner(fused):
    given = Session(runner=None, reason="the policy has no CausalLM for it")
    assert choose_route(fused, given, {}) == Route(False, "the policy has no CausalLM for it")
    assert choose_route(fused, Session(), {}).reason == "the model has no decode runner"
