"""What users of other inference libraries ran into, each a test that carries the number of its thread.

`ds` is DeepSpeed, `mii` DeepSpeed-MII, `sf` stable-fast; the threads are listed in docs and notes by these numbers.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import re
import threading
import time
import warnings

import pytest
import torch
from torch import nn

import dsi
from dsi import errors
from dsi.inject import Journal
from tests.core.twins import (
    FP32,
    LARGE,
    assert_same_bits,
    assert_twins,
    distance,
    held,
    linears,
    one_layer,
    twins,
)
from tests.support import CAUSAL, difference, fingerprint, inputs_for, tiny
from tests.support.models import POSITIONS, VOCAB

DECODERS = ("gpt2", "opt", "opt_post_norm", "llama")


def generated(model, inputs, new=5, **kwargs):
    return model.generate(**inputs, max_new_tokens=new, **{"do_sample": False, **kwargs})


def shifted(inputs, by, family_pad=0):
    """The same rows with `by` padded positions before them."""
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    pad = torch.full((ids.shape[0], by), family_pad)
    return {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([torch.zeros_like(pad), mask], 1)}


# --- padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_ds1466_padding_mask(family):
    """Padding changed what the real tokens gave."""
    pair = twins(family)
    plain = inputs_for(family, 2, 6)
    padded = shifted(plain, 4, 1 if family == "opt" else 0)
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = pair.model(**plain).logits
        found = pair.model(**padded, position_ids=positions).logits[:, 4:]
    assert distance(found, wanted) <= FP32
    assert torch.equal(generated(pair.model, plain)[:, 6:], generated(pair.model, padded)[:, 10:])
    assert torch.equal(generated(pair.model, padded), generated(pair.stock, padded))


@pytest.mark.parametrize("family", ["bert", "distilbert", "clip_text"])
def test_ds3960_padding_on_the_right(family):
    """The attention mask was ignored by injected encoders."""
    pair = twins(family)
    inputs = inputs_for(family, 2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([inputs["input_ids"], torch.full((2, 3), 7)], 1),
        "attention_mask": torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], 1),
    }
    with torch.no_grad():
        wanted = pair.model(**inputs).last_hidden_state
        found = pair.model(**padded).last_hidden_state[:, :6]
        unmasked = pair.model(input_ids=padded["input_ids"]).last_hidden_state[:, :6]
    assert distance(found, wanted) <= FP32
    if family != "clip_text":
        assert distance(unmasked, wanted) > 1e-3


# --- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_ds2506_ds1363_ds2452_text_is_stocks(family):
    """Injected models wrote garbage."""
    pair = twins(family)
    for batch, pad in ((1, None), (3, "left"), (2, "right"), (3, "ragged")):
        inputs = inputs_for(family, batch, 6, pad)
        assert torch.equal(generated(pair.engine, inputs, 8), generated(pair.stock, inputs, 8))


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("family", DECODERS)
def test_ds2506_beam_search(family, beams):
    """num_beams > 1 was not implemented."""
    pair = twins(family)
    for pad in (None, "left"):
        inputs = inputs_for(family, 2, 6, pad)
        found, wanted = (
            generated(model, inputs, num_beams=beams, num_return_sequences=2) for model in (pair.model, pair.stock)
        )
        assert torch.equal(found, wanted)
    assert pair.fused_calls > 0


@pytest.mark.parametrize("family", DECODERS)
def test_ds1950_sampling_with_a_seed(family):
    """The same seed gave other tokens."""
    pair = twins(family)
    inputs = inputs_for(family, 3, 5, "left")
    runs = []
    for model in (pair.model, pair.model, pair.stock):
        torch.manual_seed(11)
        runs.append(generated(model, inputs, 8, do_sample=True, temperature=1.3))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    torch.manual_seed(12)
    assert not torch.equal(generated(pair.model, inputs, 8, do_sample=True, temperature=1.3), runs[0])


LONG = {
    "gpt2": {"n_positions": 1200},
    "opt": {"max_position_embeddings": 1200},
    "llama": {"max_position_embeddings": 1200},
}


@pytest.mark.parametrize("family", LONG)
def test_ds2062_more_than_1024_tokens(family):
    """The workspace held 1024 tokens; one more was illegal access or garbage (also 2300, 2357, 2485, 2740, 3758)."""
    pair = twins(family, **one_layer(family), **LONG[family])
    inputs = inputs_for(family, 1, 1020)
    found = generated(pair.engine, inputs, 12)
    assert found.shape == (1, 1032)
    assert torch.equal(found, generated(pair.stock, inputs, 12))
    # and the default is the model's own maximum
    assert generated(pair.engine, inputs_for(family, 1, 1199), 1).shape == (1, 1200)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_ds2062_one_token_too_many_is_an_error_before_anything_runs(family):
    """Only `input_ids=` and only the prompt were checked."""
    pair = twins(family)
    inputs = inputs_for(family, 1, POSITIONS - 4)
    calls = pair.fused_calls
    for run in (
        lambda: pair.engine.generate(**inputs, max_new_tokens=5),
        lambda: pair.engine.generate(inputs["input_ids"], max_new_tokens=5),
        lambda: pair.engine.generate(inputs=inputs["input_ids"], max_length=POSITIONS + 1),
        lambda: pair.model.generate(**inputs, max_new_tokens=5),
    ):
        with pytest.raises(dsi.InputError, match=f"context is {POSITIONS}"):
            run()
    assert pair.fused_calls == calls
    assert torch.equal(generated(pair.engine, inputs, 4), generated(pair.stock, inputs, 4))


def test_ds2357_the_limit_can_be_set_lower():
    engine = dsi.init_inference(tiny("llama"), max_out_tokens=20)
    generated(engine, inputs_for("llama", 1, 10), 10)
    with pytest.raises(dsi.InputError, match="context is 20"):
        generated(engine, inputs_for("llama", 1, 10), 11)


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_ds2572_ds2896_mii132_a_new_shape_every_call(family):
    """What was captured for one shape was run for another (also 2717, 2458)."""
    pair = twins(family)
    for batch, length in ((1, 1), (4, 3), (2, 17), (1, 9), (7, 2), (1, 1), (2, 17)):
        assert_twins(pair, **inputs_for(family, batch, length, "ragged" if length > 1 else None))


def test_ds2717_a_new_image_size():
    pair = twins("clip_vision")
    for size in (16, 24, 32, 16):
        assert_twins(pair, pixel_values=torch.randn(2, 3, size, size), interpolate_pos_encoding=size != 16)


# --- configuration ------------------------------------------------------------------------------------------------

REFUSED = {
    "ds8330": ({"enable_cuda_graph": True, "replace_with_kernel_inject": True}, "enable_cuda_graph"),
    "ds5247": ({"quant": {"enabled": True, "weight": {"num_bits": 6}}}, "quant"),
    "ds2956": ({"dtype": "int8"}, "int8"),
    "ds2865": ({"quant": {"enabled": True}}, "quant"),
    "ds3634": ({"tensor_parallel": {"tp_size": 3}}, "tp_size"),
    "ds1192": ({"mp_size": 2}, "mp_size|tp_size"),
    "ds2876": ({"moe": True}, "moe"),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED)
def test_an_option_that_cannot_be_had_is_refused_before_anything_changes(config, words):
    """Accepted first and aborted late, or accepted and without any effect."""
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises((dsi.ConfigError, dsi.UnsupportedModelError), match=words):
        dsi.init_inference(model, config)
    assert difference(before, fingerprint(model)) == []


# --- engines ------------------------------------------------------------------------------------------------------


def test_ds4384_a_second_engine_in_the_process():
    """The second one broke the first through state of the class."""
    inputs = inputs_for("llama", 2, 6, "left")
    one, other = twins("llama"), twins("llama", seed=1, num_key_value_heads=1)
    wanted = generated(one.stock, inputs), generated(other.stock, inputs)
    for _ in range(2):
        assert torch.equal(generated(one.engine, inputs), wanted[0])
        assert torch.equal(generated(other.engine, inputs), wanted[1])
    one.engine.restore()
    assert torch.equal(generated(other.engine, inputs), wanted[1])


def test_ds1694_an_engine_can_be_saved(tmp_path):
    """Saving an initialised engine failed, or wrote what nobody could load."""
    pair = twins("gpt2", dtype=torch.bfloat16)
    pair.engine.save_pretrained(tmp_path)
    reloaded = type(pair.stock).from_pretrained(tmp_path, dtype="auto")
    assert reloaded.dtype is torch.bfloat16
    assert_same_bits(reloaded(**inputs_for("gpt2")), pair.stock(**inputs_for("gpt2")))


def test_ds2578_memory_at_init():
    """Every weight was there twice."""
    model = tiny("llama", **LARGE["llama"])
    layer = max(block.bytes_before for block in dsi.plan(model).blocks)
    before, most = held(), []
    with pytest.MonkeyPatch.context() as patch:
        do = Journal.do

        def watched(journal, step):
            most.append(held(collect=False))
            do(journal, step)

        patch.setattr(Journal, "do", watched)
        dsi.init_inference(model)
    assert max(most) - before <= 0.7 * layer
    assert held() - before <= 0.01 * layer


def test_ds2923_ds1788_memory_falls_by_what_was_asked():
    """No memory was saved, and nobody said so."""
    model = tiny("llama", **LARGE["llama"])
    before = model.get_memory_footprint()
    engine = dsi.init_inference(model, dtype="float16")
    assert model.get_memory_footprint() <= 0.51 * before
    assert sum(b.bytes_after for b in engine.plan.blocks) * 2 == sum(b.bytes_before for b in engine.plan.blocks)


class Pipeline:
    """Like a diffusers pipeline: no module itself, but full of them."""

    def __init__(self):
        self.text_encoder, self.unet = tiny("clip_text"), nn.Sequential(nn.Conv2d(3, 3, 1))


def test_ds2968_ds2942_ds5067_ds2702_a_pipeline_is_no_model():
    """'StableDiffusionPipeline' object has no attribute 'children'."""
    pipe = Pipeline()
    with pytest.raises(dsi.UnsupportedModelError, match=r"got .*Pipeline\n.*a component, e\.g\. pipe\.text_encoder"):
        dsi.init_inference(pipe)
    assert len(dsi.init_inference(pipe.text_encoder).plan.blocks) == 2
    with pytest.warns(UserWarning, match="dsi replaced nothing: no_policy"):
        dsi.init_inference(pipe.unet)


def test_ds3513_times_are_milliseconds():
    """Seconds in one mode and milliseconds in the other."""
    engine = dsi.init_inference(tiny("llama"))
    for events in (True, False):
        engine.profile_model_time(use_cuda_events=events)
        handle = engine.module.lm_head.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        engine(**inputs_for("llama"))
        handle.remove()
        assert 20 <= engine.model_times()[0] < 10_000
        engine.stop_profile()


@pytest.mark.parametrize("large", [False, True], ids=["plain", "packed"])
def test_sf75_sf91_sf104_new_weights_take_effect(large):
    """A LoRA that was merged after the optimization changed nothing."""
    pair = twins("llama", **(LARGE["llama"] if large else {}))
    inputs = inputs_for("llama", 2, 6)
    before = assert_twins(pair, **inputs)
    name = "model.layers.0.self_attn.v_proj.weight"
    change = 0.5 * torch.randn_like(pair.stock.state_dict()[name])
    for model in (pair.stock, pair.model):
        state = model.state_dict()
        model.load_state_dict({name: state[name] + change}, strict=False)
    assert distance(assert_twins(pair, **inputs), before) > 1e-2
    assert torch.equal(generated(pair.model, inputs), generated(pair.stock, inputs))


def test_nothing_replaced_is_never_silent():
    """An optimization that did nothing looked like one that did."""
    with pytest.warns(UserWarning, match="dsi replaced nothing"):
        dsi.init_inference(tiny("bert").train())
    with pytest.raises(dsi.UnsupportedModelError, match=r"call model\.eval\(\) first"):
        dsi.init_inference(tiny("bert").train(), strict=True)


def test_init_and_generate_say_nothing(capfd):
    """Ten lines of log for an import, and prints in the hot path."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("bert", "gpt2", "llama"):
            engine = dsi.init_inference(tiny(family), dtype="bfloat16", keep_original="host")
            engine(**inputs_for(family))
            if family != "bert":
                generated(engine, inputs_for(family, 2, 5, "left"))
            engine.restore()
    assert capfd.readouterr() == ("", "")
    assert root.handlers == handlers


# --- bad input ----------------------------------------------------------------------------------------------------

BAD = {
    "too large": {"input_ids": torch.tensor([[1, VOCAB]])},
    "negative": {"input_ids": torch.tensor([[1, -1]])},
    "no tokens": {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
    "no rows": {"input_ids": torch.zeros(0, 3, dtype=torch.long)},
    "floats": {"input_ids": torch.ones(1, 3)},
    "one dimension": {"input_ids": torch.ones(3, dtype=torch.long)},
    "a list": {"input_ids": [[1, 2, 3]]},
    "mask too short": {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 2)},
    "mask of other rows": {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(1, 3)},
    "too long": {"input_ids": torch.ones(1, POSITIONS + 1, dtype=torch.long)},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bad_input_is_named_and_the_next_call_is_served(family, bad):
    """One bad prompt ended the process, or the device with it."""
    pair = twins(family)
    good = inputs_for(family, 2, 6, "left")
    wanted = pair.engine(**good)
    # Llama's positions are computed, so its forward takes any length
    if not (family == "llama" and bad is BAD["too long"]):
        with pytest.raises(dsi.InputError):
            pair.engine(**bad)
    with pytest.raises(dsi.InputError):
        pair.engine.generate(**bad, max_new_tokens=2)
    assert_same_bits(pair.engine(**good), wanted)
    assert torch.equal(generated(pair.engine, good), generated(pair.stock, good))


class Interrupt:
    """A streamer that is interrupted at the third token."""

    def __init__(self):
        self.seen = 0

    def put(self, _tokens):
        self.seen += 1
        if self.seen == 3:
            raise KeyboardInterrupt

    def end(self):
        pytest.fail("it was not interrupted")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_interrupted_generation_leaves_nothing_behind(family):
    pair = twins(family)
    inputs = inputs_for(family, 1, 5)
    with pytest.raises(KeyboardInterrupt):
        generated(pair.engine, inputs, 8, streamer=Interrupt())
    assert torch.equal(generated(pair.engine, inputs, 8), generated(pair.stock, inputs, 8))
    pair.engine.restore()
    assert difference(fingerprint(pair.stock, identity=False), fingerprint(pair.model, identity=False)) == []


# --- threads and time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["forward", "generate", "stock path"])
def test_threads_on_one_engine_never_mix(call):
    pair = twins("llama", attention="eager")
    prompts = [inputs_for("llama", 1, 3 + index, seed=index) for index in range(6)]

    def run(model, inputs):
        if call == "generate":
            return generated(model, inputs, 4)
        with torch.no_grad():
            return model(**inputs, output_attentions=call == "stock path").logits

    wanted = [run(pair.engine, inputs) for inputs in prompts]
    wrong = []

    def work(index):
        for _ in range(4):
            if not torch.equal(run(pair.engine, prompts[index]), wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_three_hundred_calls_leave_no_objects_behind():
    """Memory grew from call to call."""
    engine = dsi.init_inference(tiny("llama"))
    counts = []
    for call in range(300):
        inputs = inputs_for("llama", 1 + call % 3, 2 + call % 7, "left")
        engine(**inputs)
        if call % 10 == 0:
            generated(engine, inputs, 3)
        if call % 100 == 99:
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[-1] - counts[0] <= 10


# --- the handle ---------------------------------------------------------------------------------------------------


def test_the_handle_passes_for_the_model():
    """Attributes of the model were gone behind the engine."""
    pair = twins("llama")
    assert pair.engine.config is pair.model.config
    assert pair.engine.device == pair.stock.device
    assert pair.engine.dtype is torch.float32
    assert pair.engine.get_input_embeddings() is pair.model.get_input_embeddings()
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = pair.engine.no_such_attribute
    assert inspect.signature(type(pair.model).forward) == inspect.signature(type(pair.stock).forward)
    assert inspect.signature(pair.model.forward) == inspect.signature(pair.stock.forward)
    assert copy.copy(pair.engine).module is pair.model
    assert repr(pair.engine) == "InferenceEngine(LlamaForCausalLM, 2 layers replaced)"


def test_every_error_of_the_tree_is_raised_by_some_test(root):
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, dsi.DsiError)]
    assert len(classes) > 8
    tests = "\n".join(path.read_text() for path in root.glob("tests/**/test_*.py"))
    missing = [c.__name__ for c in classes if not re.search(rf"raises\(\s*(dsi\.|errors\.)?{c.__name__}\b", tests)]
    assert missing == []
    assert all(c.__doc__ for c in classes)
    assert {c.__name__ for c in classes} <= set(dsi.__all__)


def test_packed_weights_are_what_these_tests_ran_with():
    # the large variants above mean what they say on this machine
    assert {linear.form for linear in linears(twins("llama", **LARGE["llama"]).model)} == {"packed"}
