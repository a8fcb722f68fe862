"""An optimized model reads and writes checkpoints as if nothing had happened, and survives what people do to models."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
import transformers
from torch import nn

import dsi
from tests.core.twins import (
    FP32,
    LARGE,
    assert_same_bits,
    assert_twins,
    containers,
    distance,
    linears,
    twins,
)
from tests.support import CAUSAL, FAMILIES, cases, inputs_for, tiny
from tests.support.models import VOCAB

SOME = ("bert", "distilbert", "clip", "gpt2", "opt_post_norm", "llama", "llama_mha")


def assert_same_state(found, wanted):
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


def generated(model, family, **kwargs):
    return model.generate(**inputs_for(family, 2, 5, "left"), max_new_tokens=5, do_sample=False, **kwargs)


# --- state_dict ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head"), cases())
def test_state_dict_is_stocks(family, head):
    pair = twins(family, head)
    assert_same_state(pair.model.state_dict(), pair.stock.state_dict())


@pytest.mark.parametrize("family", LARGE)
def test_state_dict_of_packed_weights_is_stocks(family):
    pair = twins(family, **LARGE[family])
    assert_same_state(pair.model.state_dict(), pair.stock.state_dict())
    prefixed = pair.model.state_dict(prefix="outer.", keep_vars=True)
    assert list(prefixed) == list(pair.stock.state_dict(prefix="outer."))


def test_state_dict_of_a_layer_alone():
    pair = twins("llama")
    assert_same_state(pair.model.model.layers[1].state_dict(), pair.stock.model.layers[1].state_dict())


def test_state_dict_after_a_cast_is_the_cast_of_stocks():
    pair = twins("gpt2", config={"dtype": "bfloat16"})
    assert_same_state(
        pair.model.state_dict(), {name: t.to(torch.bfloat16) for name, t in pair.stock.state_dict().items()}
    )


def test_the_names_of_parameters_outside_the_layers_stay():
    pair = twins("llama")
    found, wanted = (dict(model.named_parameters()) for model in (pair.model, pair.stock))
    assert {name for name in wanted if ".layers." not in name} == {name for name in found if ".layers." not in name}


@pytest.mark.parametrize("family", SOME)
def test_load_state_dict_takes_stock_checkpoints(family):
    pair = twins(family)
    other = tiny(family, seed=1)
    result = pair.model.load_state_dict(other.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    pair.stock.load_state_dict(other.state_dict())
    assert_same_state(pair.model.state_dict(), other.state_dict())
    assert_twins(pair, **inputs_for(family, 2, 6))


@pytest.mark.parametrize("family", LARGE)
def test_load_state_dict_into_packed_weights(family):
    pair = twins(family, **LARGE[family])
    other = tiny(family, seed=1, **LARGE[family])
    pair.model.load_state_dict(other.state_dict())
    pair.stock.load_state_dict(other.state_dict())
    assert {linear.form for linear in linears(pair.model)} == {"packed"}
    assert_twins(pair, **inputs_for(family, 2, 6))


def test_load_state_dict_casts_to_the_dtype_that_is_there():
    pair = twins("llama")
    half = {name: tensor.half() for name, tensor in tiny("llama", seed=1).state_dict().items()}
    for model in (pair.model, pair.stock):
        model.load_state_dict(half)
    assert_same_state(pair.model.state_dict(), pair.stock.state_dict())


def test_load_state_dict_into_a_layer_alone():
    pair = twins("llama")
    other = tiny("llama", seed=1).model.layers[0].state_dict()
    for model in (pair.model, pair.stock):
        model.model.layers[1].load_state_dict(other)
    assert_twins(pair, **inputs_for("llama", 2, 6))


def _drop(state):
    del state["model.layers.0.self_attn.k_proj.weight"]
    del state["model.layers.1.input_layernorm.weight"]


def _add(state):
    state["model.layers.0.self_attn.k_proj.extra"] = torch.ones(1)
    state["model.layers.1.extra.weight"] = torch.ones(1)
    state["extra"] = torch.ones(1)


def _both(state):
    _drop(state)
    _add(state)


FAULTS = {"missing": _drop, "unexpected": _add, "both": _both}


@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_keys_that_do_not_fit_are_told_as_in_stock(change):
    pair = twins("llama")
    state = tiny("llama", seed=1).state_dict()
    change(state)
    words = []
    for model in (pair.stock, pair.model):
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for LlamaForCausalLM") as raised:
            model.load_state_dict(state)
        words.append(sorted(str(raised.value).replace(",", "").split()))
    assert words[0] == words[1]
    results = [model.load_state_dict(state, strict=False) for model in (pair.stock, pair.model)]
    assert sorted(results[0].missing_keys) == sorted(results[1].missing_keys)
    assert sorted(results[0].unexpected_keys) == sorted(results[1].unexpected_keys)
    # what was there was loaded, what was missing stayed
    assert_same_state(pair.model.state_dict(), pair.stock.state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_a_wrong_shape_is_told_as_in_stock(name, strict):
    pair = twins("llama")
    state = tiny("llama", seed=1).state_dict()
    state[name] = torch.zeros(3, 3)
    errors = []
    for model in (pair.stock, pair.model):
        with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(name)}") as raised:
            model.load_state_dict(state, strict=strict)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    # all the rest was loaded
    assert_same_state(pair.model.state_dict(), pair.stock.state_dict())
    assert_twins(pair, **inputs_for("llama", 2, 5))


# --- save and reload ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("family", LARGE)
def test_save_pretrained_is_read_by_stock_bit_for_bit(family, large, tmp_path):
    pair = twins(family, **(LARGE[family] if large else {}))
    pair.model.save_pretrained(tmp_path)
    reloaded, info = type(pair.stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_same_state(reloaded.state_dict(), pair.stock.state_dict())
    assert type(reloaded) is type(pair.stock)
    assert not containers(reloaded)
    # and the optimized model runs on
    assert_twins(pair, **inputs_for(family, 2, 5))


@pytest.mark.parametrize("family", [name for name in SOME if name not in LARGE])
def test_save_pretrained_of_the_others(family, tmp_path):
    pair = twins(family)
    pair.model.save_pretrained(tmp_path)
    assert_same_state(type(pair.stock).from_pretrained(tmp_path).state_dict(), pair.stock.state_dict())


def test_what_is_saved_is_the_same_file_that_stock_saves(tmp_path):
    pair = twins("gpt2")
    pair.stock.save_pretrained(tmp_path / "stock")
    pair.model.save_pretrained(tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name


def test_a_cast_model_is_saved_in_its_new_dtype(tmp_path):
    pair = twins("llama", config={"dtype": "bfloat16"})
    pair.model.save_pretrained(tmp_path)
    reloaded = type(pair.stock).from_pretrained(tmp_path, dtype="auto")
    assert reloaded.dtype is torch.bfloat16
    assert_same_state(reloaded.state_dict(), pair.model.state_dict())


# --- copies -------------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("family", SOME)
def test_copies_run_and_are_their_own(family, duplicate):
    pair = twins(family)
    inputs = inputs_for(family, 2, 6)
    with torch.no_grad():
        wanted = pair.model(**inputs)
        other = duplicate(pair.model)
        assert_same_bits(other(**inputs), wanted)
        assert len(containers(other)) == len(pair.containers)
        assert containers(other)[0].fused_calls > 0
        assert_same_state(other.state_dict(), pair.stock.state_dict())
        ours = {p.data_ptr() for p in pair.model.parameters() if not p.is_mkldnn}
        assert not ours & {p.data_ptr() for p in other.parameters()}
        if family in CAUSAL:
            assert torch.equal(generated(other, family), generated(pair.stock, family))
            assert other._dsi is not pair.model._dsi
            assert other._dsi.runner.model is other
        # changing the copy changes the copy alone
        for parameter in other.parameters():
            parameter.zero_()
        assert_same_bits(pair.model(**inputs), wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_of_packed_models_stay_packed(duplicate):
    pair = twins("llama", **LARGE["llama"])
    other = duplicate(pair.model)
    assert {linear.form for linear in linears(other)} == {"packed"}
    inputs = inputs_for("llama", 2, 6)
    with torch.no_grad():
        assert_same_bits(other(**inputs), pair.model(**inputs))


def test_a_copy_keeps_shared_parts_shared():
    pair = twins("llama_mha")
    other = copy.deepcopy(pair.model)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    layer = containers(other)[0]
    assert layer.norm_attn.weight is layer.original.input_layernorm.weight
    assert layer.original._forward_hooks is layer._forward_hooks


def test_a_copy_can_take_the_stock_path():
    pair = twins("bert", attention="eager")
    other = copy.deepcopy(pair.model)
    inputs = inputs_for("bert", 2, 6, "ragged")
    with torch.no_grad():
        found, wanted = (model(**inputs, output_attentions=True) for model in (other, pair.stock))
    assert distance(found, wanted) <= FP32


def test_the_original_can_be_restored_beside_its_copy():
    pair = twins("llama")
    inputs = inputs_for("llama", 2, 6)
    with torch.no_grad():
        wanted = pair.model(**inputs)
        other = copy.deepcopy(pair.model)
        pair.engine.restore()
        assert_same_bits(other(**inputs), wanted)
        assert_same_bits(pair.model(**inputs), pair.stock(**inputs))


# --- embeddings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "llama_mha"])
def test_tie_weights(family):
    pair = twins(family)
    tied = pair.stock.config.tie_word_embeddings
    for model in (pair.stock, pair.model):
        model.tie_weights()
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert_twins(pair, **inputs_for(family, 2, 5))
    assert torch.equal(generated(pair.model, family), generated(pair.stock, family))


@pytest.mark.parametrize("size", [VOCAB + 9, VOCAB - 20])
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama", "llama_mha"])
def test_resize_token_embeddings(family, size):
    pair = twins(family, "BertForMaskedLM" if family == "bert" else None)
    for model in (pair.stock, pair.model):
        torch.manual_seed(0)
        model.resize_token_embeddings(size, mean_resizing=False)
        if model.can_generate():
            # a random new row must not end a text
            model.generation_config.eos_token_id = None
    ids = torch.tensor([[5, 6, size - 1], [size - 2, 7, 8]])
    assert_twins(pair, input_ids=ids)
    assert_same_state(pair.model.state_dict(), pair.stock.state_dict())
    if family in CAUSAL:
        tokens = [
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
            for model in (pair.model, pair.stock)
        ]
        assert torch.equal(*tokens)
        # the handle knows the new range
        pair.engine.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    pair.engine(input_ids=ids)
    with pytest.raises(dsi.InputError, match=rf"0\.\.{size - 1}"):
        pair.engine(input_ids=ids + 2)
    pair.engine.restore()
    assert_same_state(pair.model.state_dict(), pair.stock.state_dict())


def test_another_embedding_altogether():
    pair = twins("llama")
    for model in (pair.stock, pair.model):
        torch.manual_seed(0)
        model.set_input_embeddings(nn.Embedding(30, 32))
    ids = torch.tensor([[5, 6, 29]])
    assert_twins(pair, input_ids=ids)
    assert torch.equal(
        *(
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
            for model in (pair.model, pair.stock)
        )
    )


# --- casts, sizes, the rest of nn.Module --------------------------------------------------------------------------

CASTS = {
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "float": lambda model: model.float(),
    "to cpu": lambda model: model.to("cpu"),
    "there and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama"])
def test_casts_by_the_user(family, cast):
    pair = twins(family)
    for model in (pair.stock, pair.model):
        assert cast(model) is model
    assert pair.model.dtype is pair.stock.dtype
    assert_same_state(pair.model.state_dict(), pair.stock.state_dict())
    narrow = pair.model.dtype in (torch.float16, torch.bfloat16)
    tolerance = 8 * torch.finfo(pair.model.dtype).eps if narrow else FP32
    assert_twins(pair, **inputs_for(family, 2, 6), tolerance=tolerance)
    assert {linear.weight.dtype for linear in linears(pair.model)} == {pair.stock.dtype}


@pytest.mark.parametrize("family", SOME)
def test_sizes_are_stocks(family):
    pair = twins(family)
    assert pair.model.num_parameters() == pair.stock.num_parameters()
    assert pair.model.get_memory_footprint() == pair.stock.get_memory_footprint()
    assert sum(p.numel() for p in pair.model.parameters()) == sum(p.numel() for p in pair.stock.parameters())
    assert pair.model.device == pair.stock.device


@pytest.mark.parametrize("family", LARGE)
def test_sizes_of_packed_models_are_stocks(family):
    pair = twins(family, **LARGE[family])
    assert pair.model.num_parameters() == pair.stock.num_parameters()
    assert pair.model.get_memory_footprint() == pair.stock.get_memory_footprint()


def test_it_is_still_what_it_was():
    pair = twins("llama")
    assert type(pair.model) is type(pair.stock)
    assert isinstance(pair.model, transformers.PreTrainedModel)
    assert pair.model.config.to_dict() == pair.stock.config.to_dict()
    assert pair.model.generation_config.to_dict() == pair.stock.generation_config.to_dict()
    assert pair.engine.module is pair.model
    assert type(pair.model.model.layers) is nn.ModuleList
    assert len(pair.model.model.layers[:1]) == 1


def test_apply_zero_grad_and_requires_grad():
    pair = twins("llama")
    seen = []
    pair.model.apply(seen.append)
    assert set(pair.containers) <= set(seen)
    pair.model.zero_grad()
    pair.model.requires_grad_(False)
    assert not pair.model(**inputs_for("llama")).logits.requires_grad
    assert_twins(pair, **inputs_for("llama"))


def test_an_attribute_of_the_stock_layer_is_read_through_and_a_weight_is_not():
    pair = twins("llama")
    layer = pair.containers[0]
    assert layer.hidden_size == 32
    with pytest.raises(AttributeError, match=r"has no 'self_attn': its weights are fused; engine.restore\(\)"):
        _ = layer.self_attn
    assert not hasattr(layer, "no_such_thing")


def test_repr_names_the_container():
    pair = twins("llama")
    text = repr(pair.model)
    assert "LlamaDecoderLayer[dsi DecoderLayer]" in text
    assert "FusedLinear(32 -> 128, form=columns" in text
    for family in FAMILIES:
        assert "dsi" in repr(twins(family).model)
