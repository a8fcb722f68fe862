"""Token for token: what an injected model generates is what the stock model generates, in every mode."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from tests.runtime.pairs import check, counted_steps, make_pair, outcome, shared_pair
from tests.support.models import FIRST_WORD, ROPE_TYPES, VOCAB

FAMILIES = ("gpt2", "opt", "opt_post_norm", "llama", "llama_mha")
NEW = 10


@pytest.fixture(params=FAMILIES)
def pair(request):
    return shared_pair(request.param)


@pytest.fixture(scope="module")
def llama():
    return shared_pair("llama")


# --- greedy and sampling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "left", "ragged"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(pair, batch, pad):
    check(pair, **pair.inputs(batch, 7, pad), max_new_tokens=NEW)


@pytest.mark.parametrize("pad", [None, "ragged"])
def test_sampling_draws_the_same_tokens(pair, pad):
    for seed in range(3):
        check(pair, seed=seed, **pair.inputs(3, 7, pad, seed), max_new_tokens=NEW, do_sample=True)


@pytest.mark.parametrize("do_sample", [False, True])
def test_nothing_but_the_tokens_is_returned(pair, do_sample):
    call = {**pair.inputs(2, 7, "left"), "do_sample": do_sample, "max_new_tokens": NEW}
    given = outcome(pair.fused, **call)
    assert pair.route.fast
    assert given.tolist() == outcome(pair.stock, **call).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_a_16_bit_model_are_float32(dtype):
    pair = make_pair("gpt2", dtype=dtype)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    results = [outcome(model, **pair.inputs(), max_new_tokens=4, **wanted) for model in (pair.stock, pair.fused)]
    assert pair.route.fast
    for result in results:
        assert {tensor.dtype for tensor in (*result.scores, *result.logits)} == {torch.float32}


def test_num_return_sequences(pair):
    result = check(
        pair, **pair.inputs(2, 7, "left"), max_new_tokens=NEW, do_sample=True, num_return_sequences=3, temperature=1.3
    )
    assert len(result) == 6


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("pad", [None, "ragged"])
def test_every_rope_type(rope_type, pad):
    pair = shared_pair(f"llama_{rope_type}")
    # past half of the positions, where dynamic and longrope change; dynamic's config counts only that half
    new = 20 if rope_type == "dynamic" else 45
    check(pair, **pair.inputs(2, 10, pad), max_new_tokens=new)


def test_one_prompt_token_and_one_new_token(pair):
    for batch in (1, 2):
        expected = outcome(pair.stock, **pair.inputs(batch, 1), max_new_tokens=1)
        assert outcome(pair.fused, **pair.inputs(batch, 1), max_new_tokens=1).tolist() == expected.tolist()
        assert pair.route.fast
    check(pair, **pair.inputs(1, 1), max_new_tokens=NEW)


def test_no_prompt_starts_from_bos(llama):
    check(llama, max_new_tokens=NEW)


def test_arguments_by_position(llama):
    ids = llama.inputs()["input_ids"]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=5)
    torch.manual_seed(0)
    expected = llama.stock.generate(ids, config)
    torch.manual_seed(0)
    assert llama.fused.generate(ids, config).tolist() == expected.tolist()
    assert llama.route.fast
    with pytest.raises(TypeError, match="inputs"):
        llama.fused.generate(ids, inputs=ids)


def test_to_the_last_position_of_the_context(pair):
    check(pair, **pair.inputs(2, 10, "left"), max_length=64)


def test_right_padding_and_holes_in_the_mask(pair):
    inputs = pair.inputs(3, 7, "right")
    inputs["attention_mask"][2, 3] = 0
    check(pair, **inputs, max_new_tokens=NEW)


def test_position_ids_of_the_callers_own(llama):
    inputs = llama.inputs(2, 6)
    for position_ids in (torch.arange(3, 9).expand(2, 6), torch.tensor([[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 20]])):
        check(llama, **inputs, position_ids=position_ids, max_new_tokens=NEW)


def test_int32_ids(llama):
    ids = llama.inputs()["input_ids"].int()
    check(llama, input_ids=ids, max_new_tokens=NEW)


# --- processors and criteria --------------------------------------------------------------------------------------


class Favour(LogitsProcessor):
    """Raises one token, more so the longer the text: it sees scores and the whole history."""

    def __call__(self, input_ids, scores):
        assert scores.dtype == torch.float32
        scores = scores.clone()
        scores[:, FIRST_WORD + int(input_ids.sum()) % 11] += input_ids.shape[1]
        return scores


class StopByText(StoppingCriteria):
    """Ends row i when i + 3 tokens follow the prompt, and says so that once: rows end at different steps."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] == 7 + 3 + torch.arange(len(input_ids))


def _allowed(batch_id, input_ids):
    return [token for token in range(VOCAB) if (token + batch_id + len(input_ids)) % 3]


PROCESSORS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.1},
    "top_h": {"top_h": 0.5},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05},
    "eta_cutoff": {"eta_cutoff": 0.3},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 6.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(FIRST_WORD, 40)]},
    "min_length": {"min_length": 16, "eos_token_id": list(range(FIRST_WORD, 40))},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": list(range(FIRST_WORD, 40))},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 11},
    "suppress_tokens": {"suppress_tokens": list(range(FIRST_WORD, 30))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(FIRST_WORD, 60))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 12},
    "sequence_bias": {"sequence_bias": {(13,): 9.0, (13, 14): 9.0}},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="lefthash")},
    "renormalize_logits": {"renormalize_logits": True, "top_k": 4},
    "remove_invalid_values": {"remove_invalid_values": True},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": _allowed},
    "logits_processor": {"logits_processor": LogitsProcessorList([Favour()])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([StopByText()])},
    "max_time": {"max_time": 1000.0},
    "many": {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
SAMPLING_ONLY = {
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "renormalize_logits",
}  # fmt: skip
# nothing to remove, time enough, and a prompt too long for a first token to be forced
NO_EFFECT = {"remove_invalid_values", "max_time", "forced_bos_token_id"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_and_criterion(name, family):
    pair = shared_pair(family)
    inputs = pair.inputs(3, 7, "ragged")
    shows = False
    for do_sample in (True,) if name in SAMPLING_ONLY else (True, False):
        given = check(pair, **inputs, **PROCESSORS[name], do_sample=do_sample, max_new_tokens=NEW)
        plain = outcome(pair.stock, **inputs, do_sample=do_sample, max_new_tokens=NEW)
        shows |= given.tolist() != plain.tolist()
    assert shows is (name not in NO_EFFECT)


def test_the_first_token_can_be_forced(pair):
    given = check(pair, **pair.inputs(2, 1), forced_bos_token_id=9, max_new_tokens=NEW)
    assert given[:, 1].tolist() == [9, 9]


def test_settings_of_the_models_own_generation_config():
    pair = make_pair("llama")
    for model in (pair.stock, pair.fused):
        model.generation_config.update(do_sample=True, temperature=0.6, top_k=7, max_new_tokens=NEW, eos_token_id=20)
    check(pair, **pair.inputs())
    check(pair, **pair.inputs(), generation_config=GenerationConfig(top_k=3, eos_token_id=None))


def test_rows_end_at_different_steps(pair):
    # ends that come within the text, at a step of its own for each row
    free = outcome(pair.stock, **pair.inputs(4, 6), max_new_tokens=NEW)[:, 6:]
    ends = sorted({int(free[0, 2]), int(free[1, 5])})
    for eos in (ends, ends[0]):
        given = check(pair, **pair.inputs(4, 6), max_new_tokens=NEW, eos_token_id=eos)
        padded = (given == pair.stock.generation_config.pad_token_id).any(-1)
        assert padded.any()
        assert not padded.all()


def test_everything_ends_early(llama):
    free = outcome(llama.stock, **llama.inputs(1, 6), max_new_tokens=NEW)[0, 6:]
    given = check(llama, **llama.inputs(1, 6), max_new_tokens=NEW, eos_token_id=int(free[3]))
    assert given.shape[1] < 6 + NEW


def test_the_end_token_pads_where_no_other_does():
    pair = make_pair("gpt2")
    free = outcome(pair.stock, **pair.inputs(3, 6), max_new_tokens=NEW)[:, 6:]
    for model in (pair.stock, pair.fused):
        model.generation_config.pad_token_id = None
    check(pair, **pair.inputs(3, 6), max_new_tokens=NEW, eos_token_id=int(free[0, 2]))


def test_max_time_stops_after_one_token(llama):
    given = outcome(llama.fused, **llama.inputs(1, 6), max_new_tokens=NEW, max_time=0.0)
    assert llama.route.fast
    assert given.shape == (1, 7)


# --- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_and_logits(pair, do_sample):
    given = check(
        pair,
        **pair.inputs(2, 7, "left"),
        max_new_tokens=NEW,
        do_sample=do_sample,
        top_k=9,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert len(given.scores) == len(given.logits) == NEW
    assert given.attentions is given.hidden_states is None


def test_a_bare_result(llama):
    given = check(llama, **llama.inputs(), max_new_tokens=NEW, return_dict_in_generate=True)
    assert given.scores is given.logits is None
    # the last token was never fed
    assert given.past_key_values.get_seq_length() == 8 + NEW - 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hidden_states_and_attentions_take_the_stock_loop(family):
    pair = make_pair(family, attention="eager")
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    given = check(pair, fast=False, **pair.inputs(2, 7, "left"), max_new_tokens=4, **wanted)
    assert len(given.hidden_states) == len(given.attentions) == 4
    # the recorders that this installed stand in nobody's way
    check(pair, **pair.inputs(2, 7, "left"), max_new_tokens=NEW)


# --- embeddings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "left"])
def test_embeddings_for_a_prompt(pair, pad):
    inputs = pair.inputs(2, 7, pad)
    ids = inputs.pop("input_ids")
    embeds = pair.stock.get_input_embeddings()(ids).detach()
    given = check(pair, inputs_embeds=embeds, **inputs, max_new_tokens=NEW)
    assert given.shape == (2, NEW)
    beside = check(pair, inputs_embeds=embeds, input_ids=ids, **inputs, max_new_tokens=NEW, repetition_penalty=1.5)
    assert beside.shape == (2, 7 + NEW)


# --- other modes: transformers' own loop over the injected layers -------------------------------------------------

OTHER_MODES = {
    "beams 2": {"num_beams": 2},
    "beams 4": {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True, "eos_token_id": [20, 21, 22, 23, 24]},
    "beams to the end": {"num_beams": 3, "early_stopping": "never", "eos_token_id": [20, 21, 22, 23, 24]},
    "beam sample": {"num_beams": 3, "do_sample": True, "top_k": 9},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 1.7},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "hidden states": {"return_dict_in_generate": True, "output_hidden_states": True},
}


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("name", OTHER_MODES)
def test_other_modes(name, family):
    pair = shared_pair(family)
    one_row = name in ("prompt lookup", "guidance")
    inputs = pair.inputs(1 if one_row else 2, 7, None if one_row else "left")
    given = {**inputs, **OTHER_MODES[name], "max_new_tokens": NEW}
    check(pair, fast=False, **given)
    assert pair.route.reason


def test_the_own_loop_is_back_after_another_mode(llama):
    outcome(llama.fused, **llama.inputs(), num_beams=2, max_new_tokens=4)
    check(llama, **llama.inputs(), max_new_tokens=4)


@pytest.mark.parametrize("injected", ["main", "assistant", "both"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_model(injected, do_sample):
    main, assistant = shared_pair("llama"), shared_pair("llama_mha")
    inputs = main.inputs(1, 7)
    settings = {"max_new_tokens": 16, "do_sample": do_sample, "eos_token_id": 2}

    expected = outcome(main.stock, assistant_model=assistant.stock, **inputs, **settings)
    model = main.stock if injected == "assistant" else main.fused
    helper = assistant.stock if injected == "main" else assistant.fused
    with counted_steps() as steps:
        given = outcome(model, assistant_model=helper, **inputs, **settings)
    assert given.tolist() == expected.tolist()
    # the assistant's own calls are plain generation
    assert bool(steps) is (injected != "main")


def test_a_loop_of_the_callers_own(llama):
    def first_token_only(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return model(input_ids, past_key_values=model_kwargs["past_key_values"]).logits[:, -1].argmax(-1)

    expected = llama.stock.generate(**llama.inputs(), custom_generate=first_token_only, max_new_tokens=NEW)
    given = llama.fused.generate(**llama.inputs(), custom_generate=first_token_only, max_new_tokens=NEW)
    assert given.tolist() == expected.tolist()
    assert llama.route.reason == "argument custom_generate"


def test_continuous_batching(llama):
    prompts = [row.tolist()[: 3 + index] for index, row in enumerate(llama.inputs(3, 8)["input_ids"])]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    # by default it fills the machine's memory with pages
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)

    def texts(model):
        results = copy.deepcopy(model).generate_batch(
            prompts, generation_config=config, continuous_batching_config=small, progress_bar=False
        )
        return {tuple(r.prompt_ids): list(r.generated_tokens) for r in results.values()}

    given = texts(llama.fused)
    assert given == texts(llama.stock)
    assert [len(text) for text in given.values()] == [6, 6, 6]
