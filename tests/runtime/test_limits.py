"""Calls that cannot work are refused on the host, in words, and the model serves the next one."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import dsi
from dsi.errors import InputError
from dsi.runtime import check_generation, check_inputs
from tests.runtime.pairs import check, make_pair, shared_pair
from tests.support.models import inputs_for, tiny

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
MASK = torch.ones(2, 3, dtype=torch.long)

BAD_IDS = {
    "a list": ([[5, 6]], "input_ids is a list; use a torch.Tensor"),
    "floats": (IDS.float(), "input_ids are torch.float32; use torch.int64"),
    "bools": (IDS.bool(), "input_ids are torch.bool; use torch.int64"),
    "one text": (IDS[0], r"shape \(3,\); use input_ids\[None\]"),
    "three dimensions": (IDS[None], r"shape \(1, 2, 3\); use \[batch, length\]"),
    "no tokens": (IDS[:, :0], r"shape \(2, 0\): no tokens"),
    "no rows": (IDS[:0], r"shape \(0, 3\): no rows"),
    "negative": (torch.tensor([[5, 6], [7, -100]]), r"input_ids\[1, 1\] is -100; ids must be in 0\.\.66"),
    "too large": (torch.tensor([[5, 67], [7, 8]]), r"input_ids\[0, 1\] is 67; ids must be in 0\.\.66"),
}
BAD_MASKS = {
    "short": (MASK[:, :2], r"attention_mask has shape \[2, 2\], and the input asks for \[2, 3\]"),
    "long": (torch.ones(2, 4), r"attention_mask has shape \[2, 4\], and the input asks for \[2, 3\]"),
    "one row": (MASK[:1], r"attention_mask has shape \[1, 3\], and the input asks for \[2, 3\]"),
    "one dimension": (MASK[0], r"attention_mask has shape \[3\], and the input asks for \[2, 3\]"),
}


@pytest.fixture(scope="module")
def bert():
    return tiny("bert")


@pytest.fixture(scope="module")
def llama():
    return shared_pair("llama")


# --- forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_IDS)
def test_forward_refuses_ids(name, bert):
    ids, message = BAD_IDS[name]
    with pytest.raises(InputError, match="forward: .*" + message):
        check_inputs(bert, (ids,), {}, 67, 64)
    with pytest.raises(InputError, match=message):
        check_inputs(bert, (), {"input_ids": ids}, 67, 64)


@pytest.mark.parametrize("name", BAD_MASKS)
def test_forward_refuses_masks(name, bert):
    mask, message = BAD_MASKS[name]
    with pytest.raises(InputError, match="forward: " + message):
        check_inputs(bert, (IDS, mask), {}, 67, 64)
    with pytest.raises(InputError, match=message):
        check_inputs(bert, (), {"inputs_embeds": torch.randn(2, 3, 8), "attention_mask": mask}, 67, 64)


@pytest.mark.parametrize("named", [False, True])
def test_forward_refuses_what_is_longer_than_the_context(named, bert):
    ids = IDS.repeat(1, 22)
    with pytest.raises(InputError, match="forward: 66 positions, and the context is 65"):
        check_inputs(bert, () if named else (ids,), {"input_ids": ids} if named else {}, 67, 65)
    check_inputs(bert, (ids,), {}, 67, 66)


def test_forward_counts_what_is_cached(llama):
    cache = DynamicCache()
    for index in range(2):
        cache.update(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16), index)
    given = {"input_ids": IDS, "past_key_values": cache}
    with pytest.raises(InputError, match="3 positions after 5 in the cache, and the context is 7"):
        check_inputs(llama.stock, (), given, 67, 7)
    check_inputs(llama.stock, (), {**given, "attention_mask": torch.ones(2, 8)}, 67, 8)
    with pytest.raises(InputError, match=r"asks for \[2, 8\]"):
        check_inputs(llama.stock, (), {**given, "attention_mask": torch.ones(2, 3)}, 67, 8)


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": IDS},
        {"input_ids": IDS.int(), "attention_mask": None},
        {"input_ids": IDS, "attention_mask": MASK.bool()},
        # what only the model itself can judge
        {"input_ids": IDS, "attention_mask": torch.zeros(2, 1, 3, 3)},
        {"input_ids": IDS, "attention_mask": {"full_attention": None}},
        {"inputs_embeds": torch.randn(2, 3, 8)},
        {"input_ids": torch.empty(2, 3, dtype=torch.long, device="meta")},
        {},
    ],
    ids=["ids", "int32", "bool mask", "4D mask", "mask by kind of layer", "embeddings", "meta", "nothing"],
)
def test_forward_passes(given, bert):
    check_inputs(bert, (), given, 67, 64)


def test_forward_without_limits_checks_shapes_alone(bert):
    check_inputs(bert, (IDS + 1000,), {}, None, None)
    with pytest.raises(InputError, match="use input_ids"):
        check_inputs(bert, (IDS[0],), {}, None, None)


def test_a_mask_as_long_as_a_static_cache(llama):
    cache = StaticCache(config=llama.stock.config, max_cache_len=16)
    check_inputs(
        llama.stock, (), {"input_ids": IDS, "past_key_values": cache, "attention_mask": torch.ones(2, 16)}, 67, 64
    )


# --- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_IDS)
def test_generate_refuses_ids(name, llama):
    ids, message = BAD_IDS[name]
    for given in ({"inputs": ids}, {"input_ids": ids}):
        with pytest.raises(InputError, match="generate: .*" + message):
            llama.fused.generate(**given, max_new_tokens=3)
    check(llama, **llama.inputs(), max_new_tokens=3)


@pytest.mark.parametrize("name", BAD_MASKS)
def test_generate_refuses_masks(name, llama):
    mask, message = BAD_MASKS[name]
    with pytest.raises(InputError, match="generate: " + message):
        llama.fused.generate(IDS, attention_mask=mask, max_new_tokens=3)
    check(llama, **llama.inputs(), max_new_tokens=3)


@pytest.mark.parametrize(
    "mode",
    [{}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}],
    ids=str,
)
@pytest.mark.parametrize("length", [{"max_new_tokens": 57}, {"max_length": 65}], ids=str)
def test_prompt_and_new_tokens_must_fit(mode, length, llama):
    inputs = llama.inputs(1, 8)
    with pytest.raises(
        InputError, match="8 prompt tokens and 57 new ones are 65 positions, and the context is 64; set"
    ):
        llama.fused.generate(**inputs, **mode, **length)
    check(llama, **inputs, max_new_tokens=3)


def test_a_prompt_as_long_as_the_context(llama):
    with pytest.raises(InputError, match="shorten the prompt to 63 or fewer"):
        llama.fused.generate(**llama.inputs(1, 64), max_new_tokens=1)


def test_embeddings_count_as_positions(llama):
    embeds = torch.randn(1, 60, 32)
    with pytest.raises(InputError, match="60 prompt tokens and 5 new ones are 65"):
        llama.fused.generate(inputs_embeds=embeds, max_new_tokens=5)
    with pytest.raises(InputError, match=r"attention_mask has shape \[1, 9\], and the input asks for \[1, 60\]"):
        llama.fused.generate(inputs_embeds=embeds, attention_mask=torch.ones(1, 9), max_new_tokens=1)
    check(llama, inputs_embeds=embeds, max_new_tokens=4)


def test_a_continued_text_counts_whole(llama):
    first = llama.fused.generate(**llama.inputs(1, 8), max_new_tokens=40, return_dict_in_generate=True)
    text, cache = first.sequences, first.past_key_values
    with pytest.raises(InputError, match="48 prompt tokens and 17 new ones are 65"):
        llama.fused.generate(text, past_key_values=cache, max_new_tokens=17)
    # the new token alone, beside a mask that spans the text
    with pytest.raises(InputError, match="48 prompt tokens and 17 new ones are 65"):
        llama.fused.generate(
            text[:, -1:], attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=17
        )


def test_max_and_min_out_tokens():
    model = tiny("llama")
    dsi.init_inference(model, max_out_tokens=20, min_out_tokens=6)
    inputs = inputs_for("llama", 1, 14)
    assert model.generate(**inputs, max_new_tokens=6).shape == (1, 20)
    with pytest.raises(InputError, match="14 prompt tokens and 7 new ones are 21 positions, and the context is 20"):
        model.generate(**inputs, max_new_tokens=7)
    # a shorter text is wanted, and room for six tokens was promised
    with pytest.raises(InputError, match="15 prompt tokens and 6 new ones are 21"):
        model.generate(**inputs_for("llama", 1, 15), max_new_tokens=2)
    assert model.generate(**inputs, max_new_tokens=2).shape == (1, 16)


def test_a_context_beyond_the_models_own():
    # rotary positions have no end; a position embedding has, and the plan refuses such a context there
    pair = make_pair("llama")
    model = copy.deepcopy(pair.stock)
    dsi.init_inference(model, max_out_tokens=80)
    inputs = pair.inputs(2, 60, "left")
    assert (
        model.generate(**inputs, max_new_tokens=20).tolist()
        == pair.stock.generate(**inputs, max_new_tokens=20).tolist()
    )


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_position_ids_beyond_the_learned_ones(family):
    pair = shared_pair(family)
    inputs = pair.inputs(1, 3)
    for position_ids in (torch.tensor([[60, 61, 62]]), torch.tensor([[0, 64, 1]]), torch.tensor([[-1, 0, 1]])):
        for mode in ({}, {"num_beams": 2}):
            with pytest.raises(InputError, match="the model has positions 0 to 63"):
                pair.fused.generate(**inputs, **mode, position_ids=position_ids, max_new_tokens=5)
    check(pair, **inputs, position_ids=torch.tensor([[57, 58, 59]]), max_new_tokens=5)


def test_ids_that_resizing_added():
    pair = make_pair("gpt2")
    ids = torch.tensor([[5, 67, 6]])
    with pytest.raises(InputError, match="is 67"):
        pair.fused.generate(ids, max_new_tokens=3)
    for model in (pair.stock, pair.fused):
        torch.manual_seed(0)
        model.resize_token_embeddings(70)
    check(pair, input_ids=ids, max_new_tokens=5)


def test_the_prompt_that_a_call_starts_from():
    assert check_generation({"inputs": IDS}, 67, 64).length == 3
    assert check_generation({}, 67, 64) is None
    with pytest.raises(InputError, match="attention_mask is a list"):
        check_generation({"inputs": IDS, "attention_mask": [[1, 1, 1]]}, 67, 64)
