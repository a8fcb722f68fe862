"""Times in milliseconds with their phases, a table by layer, and nothing left on the model afterwards."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch
from torch import nn

import dsi
from dsi.profiling import ModelTime
from tests.core.twins import LARGE, twins
from tests.support import difference, fingerprint, inputs_for, tiny
from tests.support.models import LAYERS

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")


def hooks(model):
    return sum(len(getattr(module, table)) for module in model.modules() for table in HOOKS)


def timed(family="llama", **overrides):
    engine = dsi.init_inference(tiny(family, **overrides))
    engine.profile_model_time()
    return engine


def phases(times):
    return [time.phase for time in times]


# --- model_times --------------------------------------------------------------------------------------------------


def test_every_forward_in_milliseconds():
    engine = timed()
    start = time.perf_counter()
    for _ in range(3):
        engine(**inputs_for("llama"))
    wall = (time.perf_counter() - start) * 1e3
    times = engine.model_times()
    assert phases(times) == ["forward"] * 3
    assert all(isinstance(one, float) and isinstance(one, ModelTime) and one > 0 for one in times)
    # the handle's own checks are not the model's time
    assert 0.3 * wall < sum(times) <= wall
    assert repr(times[0]) == f"{float(times[0]):.3f} ms forward"


def slow_down(model, seconds):
    model.lm_head.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_the_unit_is_the_millisecond():
    engine = timed()
    slow_down(engine.module, 0.05)
    engine(**inputs_for("llama"))
    assert 50 <= engine.model_times()[0] < 500


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("pad", [None, "left"])
def test_prefill_and_decode_of_the_fast_loop(family, pad):
    engine = timed(family)
    engine.generate(**inputs_for(family, 2, 5, pad), max_new_tokens=6, do_sample=False)
    assert engine.module._dsi.last_route.fast
    assert phases(engine.model_times()) == ["prefill", *["decode"] * 5]


@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"use_cache": False}, {"output_attentions": True}])
def test_prefill_and_decode_of_transformers_loop(mode):
    engine = timed(attention="eager")
    extra = {"return_dict_in_generate": True} if "output_attentions" in mode else {}
    engine.generate(**inputs_for("llama", 1, 5), max_new_tokens=6, do_sample=False, **mode, **extra)
    assert not engine.module._dsi.last_route.fast
    assert phases(engine.model_times()) == ["prefill", *["decode"] * 5]


def test_each_generation_has_a_prefill():
    engine = timed()
    for new in (1, 3, 2):
        engine.generate(**inputs_for("llama", 1, 4), max_new_tokens=new, do_sample=False)
    engine.generate(**inputs_for("llama", 1, 4), max_new_tokens=2, num_beams=2)
    engine(**inputs_for("llama"))
    wanted = ["prefill"] + ["prefill", "decode", "decode"] + ["prefill", "decode"] * 2 + ["forward"]
    assert phases(engine.model_times()) == wanted


def test_a_prompt_in_pieces():
    engine = timed()
    engine.generate(**inputs_for("llama", 1, 8), max_new_tokens=2, do_sample=False, prefill_chunk_size=4)
    found = phases(engine.model_times())
    assert found[0] == "prefill"
    assert found[-1] == "decode"


@pytest.mark.parametrize("fast", [True, False])
def test_times_add_up_to_the_wall_clock(fast):
    engine = timed(**LARGE["llama"])
    inputs = inputs_for("llama", 2, 16)
    mode = {} if fast else {"num_beams": 2}
    engine.generate(**inputs, max_new_tokens=16, do_sample=False, **mode)
    engine.model_times()
    start = time.perf_counter()
    engine.generate(**inputs, max_new_tokens=16, do_sample=False, **mode)
    wall = (time.perf_counter() - start) * 1e3
    total = sum(engine.model_times())
    # the rest is choosing tokens and bookkeeping
    assert 0.5 * wall < total <= wall


def test_reading_clears():
    engine = timed()
    engine(**inputs_for("llama"))
    assert len(engine.model_times()) == 1
    assert engine.model_times() == []
    engine(**inputs_for("llama"))
    assert len(engine.model_times()) == 1


def test_the_models_own_calls_count_too():
    engine = timed()
    engine.module(**inputs_for("llama"))
    engine.module.generate(**inputs_for("llama", 1, 3), max_new_tokens=2, do_sample=False)
    assert phases(engine.model_times()) == ["forward", "prefill", "decode"]


def test_without_profiling_it_is_an_error():
    engine = dsi.init_inference(tiny("llama"))
    with pytest.raises(dsi.ProfilingError, match=r"not being recorded\n.*profile_model_time\(\)"):
        engine.model_times()
    engine.profile_model_time()
    engine.stop_profile()
    with pytest.raises(dsi.ProfilingError):
        engine.model_times()
    engine.stop_profile()


def test_starting_twice_times_once():
    engine = timed()
    engine.profile_model_time()
    engine.profile_model_time(use_cuda_events=False)
    engine(**inputs_for("llama"))
    assert len(engine.model_times()) == 1
    engine.stop_profile()
    engine.profile_model_time()
    engine(**inputs_for("llama"))
    assert len(engine.model_times()) == 1


@pytest.mark.parametrize("stop", ["stop_profile", "restore"])
def test_no_hooks_are_left(stop):
    model = tiny("llama")
    model(**inputs_for("llama"))
    before = fingerprint(model), hooks(model)
    engine = dsi.init_inference(model)
    engine.profile_model_time()
    engine(**inputs_for("llama"))
    engine.generate(**inputs_for("llama"), max_new_tokens=2)
    getattr(engine, stop)()
    assert hooks(model) == before[1]
    assert getattr(model, "_dsi", None) is None or model._dsi.timer is None
    engine.restore()
    assert difference(before[0], fingerprint(model)) == []


def test_a_forward_that_raises_is_not_in_the_way():
    engine = timed()
    for _ in range(3):
        with pytest.raises(TypeError):
            engine.module(no_such_argument=torch.ones(1), input_ids=[1])
        with pytest.raises(IndexError):
            engine.module(input_ids=torch.tensor([[10**6]]))
    # no clock is left running
    assert engine._timer._starts() == []
    engine(**inputs_for("llama"))
    times = engine.model_times()
    assert times[-1].phase == "forward"
    assert max(times) < 5000
    engine.generate(**inputs_for("llama", 1, 3), max_new_tokens=2, do_sample=False)
    assert phases(engine.model_times()) == ["prefill", "decode"]


def test_threads_are_told_apart():
    engine = timed()
    slow_down(engine.module, 0.02)
    threads = [threading.Thread(target=lambda: engine(**inputs_for("llama", 1, 3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = engine.model_times()
    assert len(times) == 4
    # one that had started another's clock would be near zero or twice as long
    assert all(one >= 20 for one in times)


def calls_of(function):
    """How many Python and C functions one call of `function` runs: the same on a busy machine as on an idle one."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    function()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_timing_costs_little():
    engine = dsi.init_inference(tiny("llama"))
    inputs = inputs_for("llama", 1, 3)
    plain = calls_of(lambda: engine.module(**inputs))
    engine.profile_model_time()
    watched = calls_of(lambda: engine.module(**inputs))
    # two hooks, two looks at the clock, and torch's own way to call hooks; about 10 us
    assert plain > 400
    assert watched - plain <= 60


# --- profile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "clip"])
def test_the_table_by_layer(family):
    pair = twins(family, **LARGE.get(family, {}))
    inputs = inputs_for(family, 2, 16)
    pair.engine.profile(**inputs)
    profile = pair.engine.profile(**inputs)
    rows = {row.path: row for row in profile.rows}
    for block in pair.engine.plan.blocks:
        row = rows[block.path]
        assert row.calls == 1
        assert row.milliseconds > 0
        assert row.bytes == block.bytes_after
        assert "[dsi " in row.name
    # modules do not overlap, so their times add up to less than the whole
    assert 0.3 * profile.total < sum(row.milliseconds for row in profile.rows) <= profile.total
    assert sum(row.bytes for row in profile.rows) <= sum(p.nbytes for p in pair.stock.parameters()) * 1.5


def test_the_table_as_text():
    engine = dsi.init_inference(tiny("llama"))
    profile = engine.profile(inputs_for("llama"))
    table = str(profile)
    assert table == profile.table()
    head, *rows = table.splitlines()
    assert head.split() == ["layer", "calls", "ms", "share", "weights", "GB/s", "class"]
    for path in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head", "between"):
        assert any(row.startswith(path) for row in rows), path
    assert rows[-1].startswith("whole forward")
    shares = [float(row.split("%")[0].split()[-1]) for row in rows[:-1]]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_profile_takes_a_dict_or_keywords():
    engine = dsi.init_inference(tiny("llama"))
    inputs = inputs_for("llama")
    for profile in (engine.profile(inputs), engine.profile(**inputs), engine.profile(inputs["input_ids"])):
        assert [row.path for row in profile.rows if "layers" in row.path] == [
            f"model.layers.{n}" for n in range(LAYERS)
        ]


def test_profile_works_on_a_restored_model():
    engine = dsi.init_inference(tiny("llama"))
    engine.restore()
    rows = engine.profile(**inputs_for("llama")).rows
    assert any(row.path == "model.layers.0.self_attn.q_proj" for row in rows)


@pytest.mark.parametrize("fails", [False, True])
def test_profile_leaves_no_hooks(fails):
    model = tiny("llama")
    engine = dsi.init_inference(model)
    before = fingerprint(model), hooks(model)
    if fails:
        with pytest.raises(IndexError):
            engine.profile(input_ids=torch.tensor([[10**6]]))
        with pytest.raises(RuntimeError):
            # fails inside of a layer, past several clocks
            engine.profile(inputs_embeds=torch.ones(1, 2, 32), attention_mask=torch.ones(1, 1, 5, 9, dtype=torch.bool))
    else:
        engine.profile(**inputs_for("llama"))
    assert difference(before[0], fingerprint(model)) == []
    assert hooks(model) == before[1]
    assert engine.profile(**inputs_for("llama")).total > 0


def test_profile_and_model_times_together():
    engine = timed()
    engine.profile(**inputs_for("llama"))
    assert phases(engine.model_times()) == ["forward"]


def test_a_module_that_is_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny("bert")

        def forward(self, **inputs):
            return self.bert(inputs_embeds=self.bert(**inputs).last_hidden_state)

    engine = dsi.init_inference(Twice().eval())
    rows = {row.path: row for row in engine.profile(**inputs_for("bert")).rows}
    assert rows["bert.encoder.layer.0"].calls == 2


def test_a_module_that_stands_in_two_places_is_measured_once():
    model = tiny("llama")
    model.also = nn.ModuleDict({"norm": model.model.norm})
    engine = dsi.init_inference(model)
    profile = engine.profile(**inputs_for("llama"))
    assert [row.path for row in profile.rows if "norm" in row.path] == ["model.norm"]
    assert profile.rows[-1].calls == 1
