"""What people put around generate: caches of their own, streamers, tokenizers, pipelines, threads, copies."""

from __future__ import annotations

import copy
import functools
import string
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import dsi
from dsi.containers import Container
from dsi.runtime import INSTANCE_OVERRIDES, PreallocatedCache, PreallocatedLayer, generate
from tests.runtime.pairs import Pair, check, counted_steps, make_pair, outcome, shared_pair
from tests.support.models import VOCAB

NEW = 8
TOKENS = ("<0>", "<1>", "<2>", "<3>", *string.ascii_letters, *string.digits, "_")
assert len(TOKENS) == VOCAB


@pytest.fixture(params=["gpt2", "opt", "llama"])
def pair(request):
    return shared_pair(request.param)


@pytest.fixture(scope="module")
def llama():
    return shared_pair("llama")


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(TOKENS)}, merges=[]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=TOKENS[0], eos_token=TOKENS[2])


# --- caches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "ragged"])
@pytest.mark.parametrize(
    ("mode", "whole"),
    [({}, True), ({}, False), ({"do_sample": True}, True), ({"do_sample": True}, False), ({"num_beams": 2}, True)],
    ids=str,
)
def test_going_on_from_a_returned_cache(pair, pad, whole, mode):
    texts = []
    for model in (pair.stock, pair.fused):
        inputs = pair.inputs(2, 6, pad)
        first = outcome(model, **inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        cache, text = first.past_key_values, first.sequences
        assert cache.get_seq_length() == 6 + NEW - 1
        mask = inputs.get("attention_mask", torch.ones(2, 6, dtype=torch.long))
        text = torch.cat([text, torch.full((2, 3), 7)], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, NEW + 3)], dim=1)
        if mode.get("num_beams"):
            cache.batch_repeat_interleave(2)
        ids = text if whole else text[:, 6 + NEW - 1 :]
        second = outcome(model, input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, **mode)
        texts.append(second.tolist())
    assert texts[0] == texts[1]
    assert type(cache) is PreallocatedCache
    assert pair.route.fast is ("num_beams" not in mode)


@pytest.mark.parametrize("configured", [False, True])
def test_a_dynamic_cache_of_the_callers(pair, configured):
    inputs = pair.inputs(2, 6, "left")
    caches = []
    for model in (pair.stock, pair.fused):
        cache = DynamicCache(config=model.config) if configured else DynamicCache()
        first = outcome(model, **inputs, past_key_values=cache, max_new_tokens=NEW)
        assert cache.get_seq_length() == 6 + NEW - 1
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW, dtype=torch.long)], dim=1)
        second = outcome(model, input_ids=first, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW)
        caches.append((cache, second.tolist()))
    assert pair.route.fast
    (stock, expected), (ours, given) = caches
    assert given == expected
    assert [type(layer) for layer in ours.layers] == [PreallocatedLayer] * 2
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-5)


def test_a_cache_filled_by_a_forward(pair):
    ids = pair.inputs(2, 9)["input_ids"]
    texts = []
    for model in (pair.stock, pair.fused):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :5], past_key_values=cache)
        kept = copy.deepcopy(cache)
        texts.append(outcome(model, input_ids=ids, past_key_values=cache, max_new_tokens=NEW).tolist())
        # a prompt that is cached once and used again
        texts.append(outcome(model, input_ids=ids, past_key_values=copy.deepcopy(kept), max_new_tokens=NEW).tolist())
        assert kept.get_seq_length() == 5
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert pair.route.fast


def test_a_static_cache_of_the_callers(pair):
    texts = []
    for model in (pair.stock, pair.fused):
        cache = StaticCache(config=model.config, max_cache_len=40)
        texts.append(outcome(model, **pair.inputs(2, 6, "left"), past_key_values=cache, max_new_tokens=NEW).tolist())
    assert texts[0] == texts[1]
    assert pair.route.reason == "a StaticCache is given"


def test_a_cache_that_the_inputs_do_not_continue(llama):
    ids = llama.inputs(1, 6)["input_ids"]
    texts = []
    for model in (llama.stock, llama.fused):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        # nothing of the prompt is new
        texts.append(outcome(model, input_ids=ids, past_key_values=cache, max_new_tokens=NEW).tolist())
    assert texts[0] == texts[1]
    assert llama.route.reason == "6 positions in the cache, 6 given, and a mask of 6"


def test_the_default_cache_of_every_mode_is_preallocated(llama):
    for mode in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        given = outcome(
            llama.fused, **llama.inputs(1, 6), **mode, max_new_tokens=NEW, return_dict_in_generate=True
        ).past_key_values
        assert type(given) is PreallocatedCache
        assert [type(layer) for layer in given.layers] == [PreallocatedLayer] * 2


# --- streamers and tokenizers -------------------------------------------------------------------------------------


class Recorder(BaseStreamer):
    """Everything that a streamer is told."""

    def __init__(self):
        self.told = []

    def put(self, value):
        self.told.append(value.tolist())

    def end(self):
        self.told.append("end")


@pytest.mark.parametrize("batch", [1, 2])
def test_a_streamer_is_told_the_same(pair, batch):
    told = []
    for model in (pair.stock, pair.fused):
        recorder = Recorder()
        outcome(model, **pair.inputs(batch, 5), max_new_tokens=NEW, do_sample=True, streamer=recorder)
        told.append(recorder.told)
    assert pair.route.fast
    assert told[0] == told[1]
    assert len(told[1]) == 1 + NEW + 1


def test_a_text_streamer_in_another_thread(llama, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, timeout=30)
    inputs = llama.inputs(1, 5)
    worker = threading.Thread(
        target=llama.fused.generate, kwargs={**inputs, "max_new_tokens": NEW, "streamer": streamer}
    )
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text == tokenizer.decode(llama.stock.generate(**inputs, max_new_tokens=NEW)[0])


def test_a_streamer_beside_beams_is_refused_as_stock_does(llama):
    for model in (llama.stock, llama.fused):
        with pytest.raises(ValueError, match="streamer"):
            model.generate(**llama.inputs(1, 5), num_beams=2, streamer=Recorder(), max_new_tokens=3)


def test_stop_strings(pair, tokenizer):
    inputs = pair.inputs(2, 6)
    free = outcome(pair.stock, **inputs, max_new_tokens=NEW)[:, 6:]
    # a token, and two in a row
    stop = [TOKENS[free[0, 2]], TOKENS[free[1, 3]] + TOKENS[free[1, 4]]]
    before = sum(module.stock_calls for module in pair.fused.modules() if isinstance(module, Container))
    given = check(pair, **inputs, max_new_tokens=NEW, stop_strings=stop, tokenizer=tokenizer)
    assert given.shape[1] < 6 + NEW
    # to a layer a tokenizer is an argument that it does not know
    assert sum(module.stock_calls for module in pair.fused.modules() if isinstance(module, Container)) == before
    check(pair, fast=False, **inputs, max_new_tokens=NEW, stop_strings=stop, tokenizer=tokenizer, num_beams=2)
    with pytest.raises(ValueError, match="tokenizer"):
        pair.fused.generate(**inputs, stop_strings=stop, max_new_tokens=3)


@pytest.fixture(scope="module")
def pyllama(pyllama_path):
    stock = AutoModelForCausalLM.from_pretrained(pyllama_path, dtype=torch.float32).eval()
    fused = copy.deepcopy(stock)
    dsi.init_inference(fused)
    return Pair("llama", stock, fused), AutoTokenizer.from_pretrained(pyllama_path)


TEXTS = [
    "def add(a, b):\n    return",
    "import os\n\n\nclass Reader:\n    def __init__(self, path):\n",
    "for i in range(",
]


def test_real_weights(pyllama):
    pair, tokenizer = pyllama
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True).to("cpu")
    inputs.pop("token_type_ids", None)
    check(pair, **inputs, max_new_tokens=48)
    check(pair, **inputs, max_new_tokens=48, do_sample=True, top_p=0.9, temperature=0.8)
    check(pair, **inputs, max_new_tokens=24, stop_strings=["\n\n"], tokenizer=tokenizer)


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}])
def test_a_text_generation_pipeline(pyllama, settings):
    pair, tokenizer = pyllama
    texts = []
    for model in (pair.stock, pair.fused):
        run = pipeline("text-generation", model=model, tokenizer=tokenizer)
        torch.manual_seed(0)
        texts.append(run(TEXTS, max_new_tokens=12, batch_size=2, **settings))
    assert texts[0] == texts[1]
    assert pair.route.fast is ("num_beams" not in settings)


# --- one model, several callers -----------------------------------------------------------------------------------


def test_eight_threads_give_what_one_gives(pair):
    calls = [{**pair.inputs(1 + seed % 3, 4 + seed, "left", seed), "max_new_tokens": NEW} for seed in range(8)]
    for index in (2, 5):
        calls[index]["num_beams"] = 2
    expected = [pair.stock.generate(**call).tolist() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            given = list(pool.map(lambda call: pair.fused.generate(**call).tolist(), calls))
            assert given == expected


class Asker(LogitsProcessor):
    """Generates with the same model, in the middle of a generation."""

    def __init__(self, model):
        self.model, self.routes = model, []

    def __call__(self, input_ids, scores):
        inner = self.model.generate(input_ids[:1, -2:], max_new_tokens=2)
        scores = scores.clone()
        scores[:, inner[0, -1]] += 20.0
        return scores


def test_a_generation_within_a_generation(pair):
    texts = []
    for model in (pair.stock, pair.fused):
        processors = LogitsProcessorList([Asker(model)])
        with counted_steps() as steps:
            texts.append(outcome(model, **pair.inputs(2, 5), max_new_tokens=NEW, logits_processor=processors).tolist())
    assert texts[0] == texts[1]
    assert len(steps) == NEW - 1 + NEW
    assert pair.fused._dsi.prompt is None


def test_an_error_within_leaves_the_model_usable(llama):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        llama.fused.generate(**llama.inputs(), logits_processor=LogitsProcessorList([Broken()]), max_new_tokens=3)
    assert llama.fused._dsi.prompt is None
    assert llama.fused._dsi.lock.acquire(blocking=False)
    llama.fused._dsi.lock.release()
    check(llama, **llama.inputs(), max_new_tokens=3)


def test_the_class_is_untouched(llama):
    for name, function in INSTANCE_OVERRIDES.items():
        installed = llama.fused.__dict__[name]
        assert isinstance(installed, functools.partial)
        assert installed.func is function
        assert name not in llama.stock.__dict__
    assert llama.fused.generate.func is generate
    # called past the instance it is stock's, with dsi's cache
    inputs = llama.inputs(1, 5)
    given = type(llama.fused).generate(llama.fused, **inputs, max_new_tokens=4)
    assert given.tolist() == llama.stock.generate(**inputs, max_new_tokens=4).tolist()


def test_a_copied_session_has_a_lock_of_its_own(llama):
    copied = copy.deepcopy(llama.fused)
    session = copied._dsi
    assert session is not llama.fused._dsi
    assert session.lock is not llama.fused._dsi.lock
    assert copied.generate.args[0] is copied
    with llama.fused._dsi.lock, ThreadPoolExecutor(1) as pool:
        given = pool.submit(copied.generate, **llama.inputs(1, 5), max_new_tokens=4).result(timeout=30)
    assert given.tolist() == llama.stock.generate(**llama.inputs(1, 5), max_new_tokens=4).tolist()


def test_restore_gives_stock_generate_back():
    pair = make_pair("gpt2")
    model = copy.deepcopy(pair.stock)
    engine = dsi.init_inference(model)
    check(Pair("gpt2", pair.stock, model), **pair.inputs(), max_new_tokens=4)
    engine.restore()
    assert not {"_dsi", *INSTANCE_OVERRIDES} & model.__dict__.keys()
    with counted_steps() as steps:
        model.generate(**pair.inputs(), max_new_tokens=4)
    assert not steps
