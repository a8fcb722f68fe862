"""What a hostile review broke: each stays mended."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import dsi
from tests.core.twins import FP32, distance, twins
from tests.support import inputs_for, tiny

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def test_another_attention_implementation_set_later_is_obeyed():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def halved(*args, **kwargs):
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return output * 0.5, weights

    AttentionInterface.register("halved", halved)
    pair = twins("llama")
    for model in (pair.stock, pair.model):
        model.set_attn_implementation("halved")
    batch = inputs_for("llama", batch=1)
    with torch.no_grad():
        assert distance(pair.model(**batch), pair.stock(**batch)) <= FP32
    assert torch.equal(pair.engine.generate(**batch, **GREEDY), pair.stock.generate(**batch, **GREEDY))
    assert not pair.model._dsi.last_route.fast
    pair.model.set_attn_implementation("sdpa")
    pair.engine.generate(**batch, **GREEDY)
    assert pair.model._dsi.last_route.fast


def test_restore_fills_the_parameters_that_torch_put_in_the_place_of_the_first_ones():
    pair = twins("llama")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        pair.model.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    pair.engine.restore()
    assert all(parameter.numel() for parameter in pair.model.parameters())
    for name, value in pair.stock.half().state_dict().items():
        assert torch.equal(pair.model.state_dict()[name], value), name


def test_restore_after_layers_were_dropped():
    pair = twins("llama")
    for model in (pair.stock, pair.model):
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
    pair.engine.restore()
    with torch.no_grad():
        assert distance(pair.model(**inputs_for("llama")), pair.stock(**inputs_for("llama"))) == 0


def test_restore_keeps_the_order_and_the_layers_that_the_user_put_in():
    pair = twins("llama")
    own = copy.deepcopy(tiny("llama", seed=3).model.layers[1])
    for model in (pair.stock, pair.model):
        layers = model.model.layers
        layers[0], layers[1] = layers[1], copy.deepcopy(own)
    pair.engine.restore()
    # two layers of one index would share a place in a cache
    batch = {**inputs_for("llama"), "use_cache": False}
    with torch.no_grad():
        assert distance(pair.model(**batch), pair.stock(**batch)) == 0


@pytest.mark.parametrize("inner_first", [True, False])
def test_two_engines_on_parts_of_one_model_are_refused(inner_first):
    model = tiny("llama")
    first, second = (model.model, model) if inner_first else (model, model.model)
    engine = dsi.init_inference(first)
    with pytest.raises(dsi.InjectionError, match="optimized already"):
        dsi.init_inference(second, dtype="bfloat16", keep_original="host")
    engine.restore()
    dsi.init_inference(second).restore()


def test_a_plain_state_dict_can_be_saved_by_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    pair = twins("llama")
    save_file({name: value.clone() for name, value in pair.stock.state_dict().items()}, tmp_path / "stock")
    assert all(value.is_contiguous() for value in pair.model.state_dict().values())
    save_file({name: value.clone() for name, value in pair.model.state_dict().items()}, tmp_path / "ours")
    stock, ours = load_file(tmp_path / "stock"), load_file(tmp_path / "ours")
    assert all(torch.equal(ours[name], value) for name, value in stock.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_context_smaller_than_what_must_fit_is_refused(family):
    with pytest.raises(dsi.ConfigError, match="min_out_tokens: 2000"):
        dsi.init_inference(tiny(family), min_out_tokens=2000)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_max_out_tokens_bounds_a_forward_too(family):
    engine = dsi.init_inference(tiny(family), max_out_tokens=4)
    engine(**inputs_for(family, seq=4))
    with pytest.raises(dsi.InputError, match="context is 4"):
        engine(**inputs_for(family, seq=5))


def test_restore_from_inside_a_generate_is_refused():
    pair = twins("llama")

    class Restores(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            pair.engine.restore()

    with pytest.raises(dsi.RestoreError, match="is running"):
        pair.engine.generate(
            **inputs_for("llama"), **GREEDY, stopping_criteria=transformers.StoppingCriteriaList([Restores()])
        )
    assert torch.equal(
        pair.engine.generate(**inputs_for("llama"), **GREEDY), pair.stock.generate(**inputs_for("llama"), **GREEDY)
    )
    pair.engine.restore()


def test_load_state_dict_that_would_assign_another_dtype_says_so():
    pair = twins("llama")
    weights = {name: value.bfloat16() for name, value in pair.stock.state_dict().items()}
    with pytest.raises(RuntimeError, match="assign=True"):
        pair.model.load_state_dict(weights, assign=True)


def test_restore_from_inside_a_generate_without_a_prompt_is_refused():
    pair = twins("llama")

    class Restores(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            pair.engine.restore()

    criteria = transformers.StoppingCriteriaList([Restores()])
    with pytest.raises(dsi.RestoreError, match="is running"):
        pair.engine.generate(max_new_tokens=4, stopping_criteria=criteria)
    pair.engine.restore()


def test_a_generate_that_was_bound_before_the_restore_is_stocks():
    pair = twins("llama")
    generate = pair.model.generate
    pair.engine.restore()
    batch = inputs_for("llama")
    assert torch.equal(generate(**batch, **GREEDY), pair.stock.generate(**batch, **GREEDY))


def test_a_last_norm_of_another_dtype_promotes_as_in_stock():
    pair = twins("llama", dtype=torch.bfloat16)
    for model in (pair.stock, pair.model):
        model.model.norm.float()
        model.lm_head.float()
    batch = inputs_for("llama")
    assert torch.equal(pair.model.generate(**batch, **GREEDY), pair.stock.generate(**batch, **GREEDY))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_double_precision_stays_double(family):
    pair = twins(family)
    for model in (pair.stock, pair.model):
        model.double()
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    found, wanted = (model.generate(**inputs_for(family), **settings).logits[-1] for model in (pair.model, pair.stock))
    # generate hands logits out as float32
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
