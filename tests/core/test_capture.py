"""What callers see of a layer besides its result: recorded states, hooks, training, autocast, gradients, compile."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import dsi
from tests.core.twins import (
    FP32,
    Twins,
    assert_same_bits,
    assert_twins,
    containers,
    distance,
    twins,
    twins_of,
)
from tests.support import FAMILIES, difference, fingerprint, inputs_for, tiny
from tests.support.models import LAYERS

FEW = ("bert", "roberta", "distilbert", "clip_text", "clip_vision", "gpt2", "opt", "opt_post_norm", "llama")


def states(output):
    return [getattr(output, name, None) for name in ("hidden_states", "attentions")]


def count(found):
    return None if found is None else len(found)


# --- hidden states and attentions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "asked before"])
@pytest.mark.parametrize("family", FEW)
def test_hidden_states(family, before, attention):
    stock = tiny(family, attention=attention)
    inputs = inputs_for(family, 2, 6, "ragged")
    if before:
        # the first request leaves hooks on the layers, for good
        stock(**inputs, output_hidden_states=True)
    pair = twins_of(stock)
    for _ in range(2):
        wanted = assert_twins(pair, **inputs, output_hidden_states=True)
        assert len(wanted.hidden_states) == LAYERS + 1
    assert_twins(pair, **inputs)


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "asked before"])
@pytest.mark.parametrize("family", FEW)
def test_attentions(family, before):
    stock = tiny(family, attention="eager")
    inputs = inputs_for(family, 2, 6, "ragged")
    if before:
        stock(**inputs, output_attentions=True)
    pair = twins_of(stock)
    for _ in range(2):
        wanted = assert_twins(pair, fused=False, **inputs, output_attentions=True, output_hidden_states=True)
        assert len(wanted.attentions) == LAYERS
        # afterwards the fast path is back
        assert_twins(pair, **inputs)


@pytest.mark.parametrize("family", FEW)
def test_attentions_without_eager_are_as_missing_as_in_stock(family):
    pair = twins(family)
    inputs = inputs_for(family, 2, 6)
    with torch.no_grad():
        found, wanted = (model(**inputs, output_attentions=True) for model in (pair.model, pair.stock))
    assert [count(one) for one in states(found)] == [count(one) for one in states(wanted)]
    assert distance(found, wanted) <= FP32


@pytest.mark.parametrize("family", FEW)
def test_asked_for_in_the_config(family):
    stock = tiny(family, attention="eager")
    stock.config.output_hidden_states = True
    pair = twins_of(stock)
    inputs = inputs_for(family, 2, 6, "ragged")
    assert len(assert_twins(pair, **inputs).hidden_states) == LAYERS + 1
    for model in (pair.stock, pair.model):
        model.config.output_attentions = True
    assert len(assert_twins(pair, fused=False, **inputs).attentions) == LAYERS
    for model in (pair.stock, pair.model):
        model.config.output_attentions = model.config.output_hidden_states = False
    assert_twins(pair, **inputs)


def test_a_subset_of_the_hidden_states():
    pair = twins("llama")
    inputs = inputs_for("llama", 2, 6)
    with torch.no_grad():
        found, wanted = (model(**inputs, output_hidden_states=[1]).hidden_states for model in (pair.model, pair.stock))
    assert [one is None for one in found] == [one is None for one in wanted]
    assert distance([one for one in found if one is not None], [one for one in wanted if one is not None]) <= FP32


def test_asked_for_after_injection_and_again_after_restore():
    pair = twins("bert", attention="eager")
    inputs = inputs_for("bert", 2, 6)
    assert_twins(pair, fused=False, **inputs, output_attentions=True, output_hidden_states=True)
    pair.engine.restore()
    with torch.no_grad():
        found = pair.model(**inputs, output_attentions=True, output_hidden_states=True)
        wanted = pair.stock(**inputs, output_attentions=True, output_hidden_states=True)
    assert [count(one) for one in states(found)] == [LAYERS + 1, LAYERS]
    assert_same_bits(found, wanted)


def test_clip_records_both_towers():
    pair = twins("clip")
    wanted = assert_twins(pair, **inputs_for("clip", 2, 6), output_hidden_states=True)
    assert len(wanted.text_model_output.hidden_states) == len(wanted.vision_model_output.hidden_states) == LAYERS + 1


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_generate_records_states(family):
    pair = twins(family, attention="eager")
    outputs = [
        model.generate(
            **inputs_for(family, 2, 5, "left"),
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_hidden_states=True,
            output_attentions=True,
        )
        for model in (pair.model, pair.stock)
    ]
    found, wanted = outputs
    assert torch.equal(found.sequences, wanted.sequences)
    assert distance(found.hidden_states, wanted.hidden_states) <= FP32
    assert distance(found.attentions, wanted.attentions) <= FP32
    assert len(found.attentions) == 4


# --- hooks --------------------------------------------------------------------------------------------------------


def last_layer(model):
    return model.model.layers[1]


def test_a_forward_hook_on_a_layer_survives():
    stock = tiny("llama")
    seen = []
    handle = last_layer(stock).register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    engine = dsi.init_inference(stock)
    assert len(engine.plan.blocks) == LAYERS
    with torch.no_grad():
        stock(**inputs_for("llama", 2, 5))
    assert len(seen) == 1
    assert seen[0][0].shape == seen[0][1].shape == (2, 5, 32)
    handle.remove()
    stock(**inputs_for("llama", 2, 5))
    assert len(seen) == 1


def test_hooks_may_change_what_goes_in_and_out():
    def hooked(model):
        layer = last_layer(model)
        layer.register_forward_pre_hook(lambda _module, args: (args[0] * 2, *args[1:]))
        layer.register_forward_pre_hook(lambda _m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
        layer.register_forward_hook(lambda _module, _args, output: output * 3)
        return model

    plain = tiny("llama")
    pair = twins_of(hooked(tiny("llama")))
    inputs = inputs_for("llama", 2, 5, "left")
    wanted = assert_twins(pair, **inputs)
    assert distance(plain(**inputs).logits, wanted.logits) > 1e-3


def test_a_hook_set_on_an_optimized_layer_runs_and_is_gone_with_its_handle():
    model = tiny("llama")
    before = fingerprint(model)
    with dsi.init_inference(model):
        calls = []
        handle = last_layer(model).register_forward_hook(lambda *_: calls.append(1))
        model(**inputs_for("llama"))
        assert calls == [1]
        handle.remove()
    assert difference(before, fingerprint(model)) == []


def test_a_hook_set_on_an_optimized_layer_is_still_there_after_restore():
    model = tiny("llama")
    calls = []
    with dsi.init_inference(model):
        last_layer(model).register_forward_hook(lambda *_: calls.append(1))
    model(**inputs_for("llama"))
    assert calls == [1]


INNER = {
    "forward hook": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("register", INNER.values(), ids=INNER)
@pytest.mark.parametrize("inner", ["self_attn", "self_attn.q_proj", "mlp.act_fn"])
def test_a_hook_inside_a_layer_leaves_the_layer_alone(inner, register):
    stock = tiny("llama")
    register(last_layer(stock).get_submodule(inner))
    pair = twins_of(stock)
    left = [entry for entry in pair.engine.plan.left if entry.reason.code != "no_policy"]
    assert [(entry.path, entry.reason.code) for entry in left] == [("model.layers.1", "hook_present")]
    assert inner in left[0].reason.text
    assert_twins(pair, **inputs_for("llama", 2, 5))
    tokens = [
        model.generate(**inputs_for("llama", 2, 5), max_new_tokens=4, do_sample=False)
        for model in (pair.model, pair.stock)
    ]
    assert torch.equal(*tokens)


def test_transformers_own_recorders_inside_a_layer_do_not_count_as_hooks():
    stock = tiny("llama", attention="eager")
    stock(**inputs_for("llama"), output_attentions=True)
    assert last_layer(stock).self_attn._forward_hooks
    assert len(twins_of(stock).containers) == LAYERS


def test_a_replaced_forward_leaves_the_layer_alone():
    model = tiny("llama")
    attention = last_layer(model).self_attn
    attention.forward = attention.forward
    plan = dsi.plan(model)
    reasons = {entry.path: entry.reason for entry in plan.left}
    assert reasons["model.layers.1"].code == "patched_forward"
    assert "self_attn" in reasons["model.layers.1"].text


# --- training, gradients, autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_training_mode_computes_what_stock_does_with_the_same_dropout(family):
    dropout = {
        "bert": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
        "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
        "llama": {"attention_dropout": 0.5},
    }
    pair = twins(family, **dropout[family])
    inputs = inputs_for(family, 2, 6, "ragged")
    outputs = []
    for model in (pair.stock, pair.model):
        model.train()
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(model(**inputs))
    assert_same_bits(*outputs)
    assert pair.stock_calls == LAYERS
    assert not pair.fused_calls
    pair.model.eval()
    pair.stock.eval()
    assert_twins(pair, **inputs)


def test_training_mode_reaches_the_modules_that_stock_runs():
    pair = twins("llama")
    pair.model.train()
    assert all(module.training for layer in pair.containers for module in layer.original.modules())
    pair.model.eval()
    assert not any(module.training for layer in pair.containers for module in layer.original.modules())
    pair.model.train()
    pair.model.eval()
    pair.engine.restore()
    assert not any(module.training for module in pair.model.modules())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_are_refused_by_name_not_lost(family, mode):
    pair = twins(family)
    getattr(pair.model, mode)()
    output = pair.model(**inputs_for(family, 2, 5))[0]
    assert output.requires_grad
    with pytest.raises(dsi.DsiError, match=r"restore\(\)"):
        output.sum().backward()
    # nothing was half done
    assert all(p.grad is None for name, p in pair.model.named_parameters() if "embed" in name)


def test_after_restore_gradients_are_those_of_stock():
    pair = twins("llama")
    inputs = inputs_for("llama", 2, 5)
    pair.model(**inputs)
    pair.engine.restore()
    for model in (pair.model, pair.stock):
        model.train()
        model(**inputs).logits.sum().backward()
    for (name, one), other in zip(pair.model.named_parameters(), pair.stock.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_autocast_runs_the_stock_layer(family):
    pair = twins(family)
    inputs = inputs_for(family, 2, 6, "ragged")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = pair.model(**inputs), pair.stock(**inputs)
    assert_same_bits(found, wanted)
    assert pair.stock_calls == LAYERS
    assert_twins(pair, **inputs)


def test_a_forward_that_fails_in_the_stock_path_leaves_the_layer_usable():
    pair = twins("llama", attention="eager")
    inputs = inputs_for("llama", 2, 5)
    # a mask that does not fit, with attentions wanted
    wrong = torch.zeros(2, 1, 3, 3)
    with pytest.raises(RuntimeError):
        pair.model(**inputs, attention_mask=wrong, output_attentions=True)
    assert all(p.numel() == 0 for layer in pair.containers for p in (layer.original.self_attn.q_proj.weight,))
    assert_twins(pair, **inputs)
    assert_twins(pair, fused=False, **inputs, output_attentions=True)


def test_inference_mode():
    pair = twins("llama")
    inputs = inputs_for("llama", 2, 5)
    with torch.inference_mode():
        assert distance(pair.model(**inputs), pair.stock(**inputs)) <= FP32
    assert_twins(pair, **inputs)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_made_and_taken_back_in_inference_mode(dtype):
    model = tiny("llama_mha")
    before = fingerprint(model)
    other = tiny("llama_mha", seed=1)
    with torch.inference_mode():
        engine = dsi.init_inference(model, dtype=dtype, keep_original="host")
    model(**inputs_for("llama"))
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(other.state_dict())
    model.load_state_dict(state)
    with torch.inference_mode():
        engine.restore()
    if dtype is None:
        assert difference(before, fingerprint(model)) == []
    # what inference mode makes can never be trained or written to outside of it
    assert not any(p.is_inference() for p in model.parameters())
    model.train()
    model(**inputs_for("llama")).logits.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- torch.compile ------------------------------------------------------------------------------------------------


def test_compile_on_top_computes_the_same():
    pair = twins("llama")
    inputs = inputs_for("llama", 2, 6, "ragged")
    compiled = torch.compile(pair.model, backend="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            assert distance(compiled(**inputs), pair.stock(**inputs)) <= FP32
    assert_twins(pair, **inputs)


@pytest.mark.parametrize("when", ["before", "after"])
def test_compile_in_place_computes_the_same(when):
    pair = Twins(tiny("llama"), tiny("llama"), None)
    inputs = inputs_for("llama", 2, 6, "ragged")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if when == "before":
            pair.model.compile(backend="eager")
            pair.model(**inputs)
        engine = dsi.init_inference(pair.model)
        if when == "after":
            pair.model.compile(backend="eager")
        for _ in range(2):
            assert distance(pair.model(**inputs), pair.stock(**inputs)) <= FP32
        assert pair.fused_calls
        engine.restore()
        assert distance(pair.model(**inputs), pair.stock(**inputs)) <= FP32


def test_the_compiled_call_of_generate_is_forgotten_and_comes_back():
    model = tiny("llama")
    compiled = model.get_compiled_call(transformers.CompileConfig(backend="eager"))
    assert model._compiled_call is compiled
    engine = dsi.init_inference(model)
    # it was made of the layers of before
    assert "_compiled_call" not in vars(model)
    engine.restore()
    assert model._compiled_call is compiled


def test_every_family_keeps_its_class_names():
    for family in FAMILIES:
        pair = twins(family)
        for layer in pair.containers:
            cls = type(layer)
            original = type(layer.original)
            assert isinstance(layer, original)
            assert isinstance(layer, nn.Module)
            assert (cls.__name__, cls.__module__, cls.__qualname__) == (
                original.__name__,
                original.__module__,
                original.__qualname__,
            )


def test_the_stock_class_is_not_touched():
    cls = type(tiny("llama").model.layers[0])
    before = dict(vars(cls))
    pair = twins("llama")
    pair.model(**inputs_for("llama"))
    pair.engine.restore()
    assert dict(vars(cls)) == before
    other = tiny("llama")
    assert type(other.model.layers[0]) is cls
    assert not containers(other)
    assert copy.copy(cls) is cls
