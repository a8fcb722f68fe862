"""The families in plugins/ in every variant of their configs: what the kit does not know to ask."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import dsi
from dsi.containers import Container
from dsi.runtime import PreallocatedCache
from tests.plugins.families import EXPERTS, SHORT, SIZE, VARIANTS, layers, pair_of, shared_pair
from tests.runtime.pairs import assert_same, check, outcome

FP32 = 1e-5
# past the window, and past a quarter of it that is padded
LENGTH = 14
NEW = 12
PADS = [None, "left", "right", "ragged"]


@pytest.fixture(params=VARIANTS)
def name(request):
    return request.param


@pytest.fixture
def pair(name):
    return shared_pair(name)


def close(found, wanted):
    assert float((found - wanted).abs().max()) <= FP32 * float(wanted.abs().max())


@torch.no_grad()
def in_pieces(model, inputs, cache, sizes=(5, 4, 1, 1, 3)):
    """Logits of a prompt that is fed in pieces."""
    ids, mask, found, past = inputs["input_ids"], inputs.get("attention_mask"), [], 0
    for size in sizes:
        given = {} if mask is None else {"attention_mask": mask[:, : past + size]}
        output = model(input_ids=ids[:, past : past + size], past_key_values=cache, use_cache=True, **given)
        cache, past = output.past_key_values, past + size
        found.append(output.logits)
    return torch.cat(found, dim=1)


# --- forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", PADS)
def test_forward(pair, pad):
    before = sum(layer.stock_calls for layer in layers(pair.fused))
    for batch in (1, 3):
        inputs = pair.inputs(batch, LENGTH, pad)
        for use_cache in (True, False):
            with torch.no_grad():
                close(*(model(**inputs, use_cache=use_cache).logits for model in (pair.fused, pair.stock)))
    assert sum(layer.stock_calls for layer in layers(pair.fused)) == before


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("made", ["by the model", "by the config", "without a config", "by dsi"])
def test_a_prompt_in_pieces(pair, made, pad):
    config, inputs = pair.stock.config, pair.inputs(3, LENGTH, pad)

    def cache(ours):
        if made == "by the model":
            return None
        if made == "without a config":
            return DynamicCache()
        return PreallocatedCache(config=config) if ours and made == "by dsi" else DynamicCache(config=config)

    close(in_pieces(pair.fused, inputs, cache(True)), in_pieces(pair.stock, inputs, cache(False)))


# --- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "left", "ragged"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_search_in_dsi_s_loop(pair, batch, pad):
    check(pair, **pair.inputs(batch, LENGTH, pad), max_new_tokens=NEW, do_sample=False)


def test_sampling_in_dsi_s_loop(pair):
    check(pair, **pair.inputs(2, LENGTH, "left"), max_new_tokens=NEW, do_sample=True, top_k=20)


def test_beams(pair):
    check(pair, fast=False, **pair.inputs(2, LENGTH, "left"), max_new_tokens=NEW, do_sample=False, num_beams=3)


def test_right_padding_and_a_prompt_of_one_token(pair):
    check(pair, **pair.inputs(2, LENGTH, "right"), max_new_tokens=4, do_sample=False)
    check(pair, **pair.inputs(2, 1), max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("mode", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
def test_what_only_stock_s_loop_does(pair, mode):
    check(pair, fast=False, **pair.inputs(2, LENGTH, "left"), max_new_tokens=NEW, do_sample=False, **mode)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "gemma2" not in name])
def test_eager_attention(name):
    pair = pair_of(name)
    for model in (pair.stock, pair.fused):
        model.set_attn_implementation("eager")
    check(pair, **pair.inputs(2, LENGTH, "left"), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForSequenceClassification"])
def test_other_heads(name, head):
    pair = pair_of(name, head=head)
    for pad in (None, "left"):
        with torch.no_grad():
            close(*(model(**pair.inputs(3, LENGTH, pad))[0] for model in (pair.fused, pair.stock)))
    assert sum(isinstance(module, Container) for module in pair.fused.modules()) == SIZE["num_hidden_layers"]


# --- weights ------------------------------------------------------------------------------------------------------


def test_weights_come_back(name):
    variant = VARIANTS[name]
    model = variant.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = dsi.init_inference(model, injection_policy=variant.policy, dtype="bf16", keep_original="host", strict=True)
    assert list(model.state_dict()) == list(before)
    engine.restore()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- what a family alone has --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_bidirectional_attention_is_refused(name):
    model = VARIANTS[name].model(use_bidirectional_attention=True)
    plan = dsi.plan(model, injection_policy=VARIANTS[name].policy)
    assert "use_bidirectional_attention=True is not implemented" in str(plan)
    with pytest.raises(dsi.UnsupportedModelError, match="use_bidirectional_attention"):
        dsi.init_inference(model, injection_policy=VARIANTS[name].policy, strict=True)


def test_a_text_that_outgrows_the_short_rope_takes_transformers_loop():
    pair = shared_pair("phi3, longrope")
    inputs = pair.inputs(1, LENGTH)
    # the last token is not fed: one more than the short positions fits
    check(pair, **inputs, max_new_tokens=SHORT - LENGTH + 1, do_sample=False)
    check(pair, fast=False, **inputs, max_new_tokens=SHORT - LENGTH + 8, do_sample=False)
    assert pair.route.reason == f"the model's own prepare_inputs_for_generation does more from {SHORT + 1} positions on"
    check(pair, fast=False, **pair.inputs(2, SHORT + 4, "left"), max_new_tokens=4, do_sample=False)


def test_a_cap_that_is_taken_out_of_the_config_is_out_of_the_loop():
    pair = pair_of("gemma2")
    for model in (pair.stock, pair.fused):
        model.config.final_logit_softcapping = None
    check(pair, **pair.inputs(2, LENGTH), max_new_tokens=NEW, do_sample=False)


def test_a_window_that_the_config_gets_later_is_not_overlooked():
    pair = pair_of("mistral, full")
    for model in (pair.stock, pair.fused):
        model.config.sliding_window = 5
    found = [
        outcome(model, **pair.inputs(2, LENGTH), max_new_tokens=NEW, do_sample=False)
        for model in (pair.stock, pair.fused)
    ]
    assert_same(*found)
    assert pair.route.reason == "layer 0 sees all positions, and its cache keeps 5 positions"


# --- experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_router_logits_and_hidden_states_are_recorded(name):
    pair = shared_pair(name)
    wanted, found = (
        model(**pair.inputs(2, LENGTH, "left"), output_router_logits=True, output_hidden_states=True)
        for model in (pair.stock, pair.fused)
    )
    assert len(found.router_logits) == len(wanted.router_logits) > 0
    assert len(found.hidden_states) == len(wanted.hidden_states)
    for one, other in zip(
        (*found.router_logits, *found.hidden_states), (*wanted.router_logits, *wanted.hidden_states), strict=True
    ):
        close(one, other)
    close(found.aux_loss, wanted.aux_loss)


@pytest.mark.parametrize("name", EXPERTS)
def test_every_token_goes_to_the_experts_that_stock_chooses(name):
    pair = pair_of(name)
    wanted, found = (_choices_of(model) for model in (pair.stock, pair.fused))
    check(pair, **pair.inputs(3, LENGTH, "left"), max_new_tokens=NEW, do_sample=False)
    assert found == wanted != []


def _choices_of(model):
    """A list that grows with what the routers of a model choose from now on."""
    choices = []
    for layer in layers(model):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _module, _inputs, output: choices.append(output[2].tolist()))
    return choices


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_kept_as_they_are(name):
    pair = pair_of(name)
    for stock, layer in zip(layers(pair.stock), layers(pair.fused), strict=True):
        assert type(layer.mlp) is type(stock.mlp)
        assert layer.fused_calls == layer.stock_calls == 0
    names = [name for name, _ in pair.fused.named_parameters() if ".mlp." in name]
    assert names == [name for name, _ in pair.stock.named_parameters() if ".mlp." in name]
