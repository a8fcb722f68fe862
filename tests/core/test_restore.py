"""The way back: bit for bit, any number of times, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

import dsi
from tests.core.twins import LARGE, assert_same_bits, containers, distance, twins
from tests.support import FAMILIES, difference, fingerprint, inputs_for, tiny

HOST = {"keep_original": "host"}


def run(model, family, **kwargs):
    with torch.no_grad():
        return model(**inputs_for(family, 2, 6, "ragged"), **kwargs)


def settled(family, head=None, **overrides):
    """A model that has run once, with its fingerprint and output."""
    model = tiny(family, head, **overrides)
    output = run(model, family)
    return model, fingerprint(model), output


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_the_original_back(family, dtype):
    model, before, output = settled(family)
    engine = dsi.init_inference(model, dtype=dtype, keep_original="host" if dtype else None)
    assert containers(model)
    inputs = inputs_for(family, 2, 6)
    with torch.no_grad():
        model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    assert engine.restore() is model
    assert difference(before, fingerprint(model)) == []
    assert_same_bits(run(model, family), output)


@pytest.mark.parametrize("family", LARGE)
def test_restore_of_packed_weights(family):
    model, before, output = settled(family, **LARGE[family])
    dsi.init_inference(model).restore()
    assert difference(before, fingerprint(model)) == []
    assert_same_bits(run(model, family), output)


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_restore_of_a_cast_that_loses_nothing(source):
    model = tiny("llama_mha", dtype=source)
    # a NaN is no number, but it has bits
    model.model.layers[0].mlp.up_proj.weight.data[0, :2] = torch.tensor([torch.nan, torch.inf], dtype=source)
    before = fingerprint(model)
    engine = dsi.init_inference(model, dtype="float32")
    assert engine.plan.restorable
    assert model.dtype is torch.float32
    engine.restore()
    assert difference(before, fingerprint(model)) == []


def test_restore_of_hard_values():
    model = tiny("gpt2")
    hard = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-40, 65520.0, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 1.00390625]
    )
    for parameter in model.parameters():
        parameter.data.view(-1)[: min(hard.numel(), parameter.numel())] = hard[: parameter.numel()]
    before = fingerprint(model)
    for dtype in ("float16", "bfloat16"):
        dsi.init_inference(model, dtype=dtype, **HOST).restore()
        assert difference(before, fingerprint(model)) == []


def test_parameters_of_any_layout_come_back():
    model = tiny("llama")
    layer = model.model.layers[0]
    for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
        linear.weight.data = linear.weight.data.t().contiguous().t()
    layer.self_attn.k_proj.weight.requires_grad_(False)
    before = fingerprint(model)
    for dtype in (None, "bfloat16"):
        dsi.init_inference(model, dtype=dtype, **HOST).restore()
        assert difference(before, fingerprint(model)) == []


def test_a_second_restore_does_nothing():
    model, before, _ = settled("llama")
    engine = dsi.init_inference(model)
    engine.restore()
    engine.restore()
    assert not engine.active
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize(("family", "config"), [("llama_mha", {}), ("gpt2", {"dtype": "bfloat16", **HOST})])
def test_a_hundred_times(family, config):
    model, before, output = settled(family)
    counts = []
    for cycle in range(100):
        engine = dsi.init_inference(model, config)
        if cycle % 10 == 0:
            model.generate(**inputs_for(family, 1, 3), max_new_tokens=2)
        engine.restore()
        if cycle % 20 == 19:
            assert difference(before, fingerprint(model)) == []
            del engine
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert_same_bits(run(model, family), output)
    # a plateau: what the first cycles left (caches, lazy imports) stays, no cycle adds to it
    assert counts[-1] - counts[1] <= 10


def test_the_with_statement():
    model, before, output = settled("llama")
    with dsi.init_inference(model) as engine:
        assert engine.active
        assert distance(run(model, "llama"), output) <= 1e-5
    assert difference(before, fingerprint(model)) == []
    with pytest.raises(KeyError, match="from inside"), dsi.init_inference(model):
        raise KeyError("from inside")
    assert difference(before, fingerprint(model)) == []


# --- casts that lose bits -----------------------------------------------------------------------------------------


def test_a_lossy_cast_refuses_by_name():
    model = tiny("llama")
    engine = dsi.init_inference(model, dtype="bfloat16")
    assert not engine.plan.restorable
    assert any('keep_original="host"' in note for note in engine.plan.notes)
    injected = fingerprint(model)
    with pytest.raises(dsi.RestoreError, match=r'float32 -> torch.bfloat16 cannot be undone.*\n.*keep_original="host"'):
        engine.restore()
    assert engine.active
    assert difference(injected, fingerprint(model)) == []
    run(model, "llama")


def test_the_with_statement_refuses_a_lossy_cast_at_its_beginning():
    engine = dsi.init_inference(tiny("llama"), dtype="bfloat16")
    with pytest.raises(dsi.RestoreError, match="the end of this block could not undo the cast"), engine:
        pytest.fail("the block ran")


def test_a_refused_restore_does_not_stop_a_profile():
    engine = dsi.init_inference(tiny("llama"), dtype="bfloat16")
    engine.profile_model_time()
    with pytest.raises(dsi.RestoreError):
        engine.restore()
    engine(**inputs_for("llama"))
    assert len(engine.model_times()) == 1


MIXED = {
    "layers in bf16, the rest in fp32": (torch.float32, torch.bfloat16),
    "layers in fp32, the rest in bf16": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize(("rest", "layers"), MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_model_of_two_dtypes(rest, layers, dtype):
    model = tiny("llama", dtype=rest)
    model.model.layers.to(layers)
    before = fingerprint(model)
    engine = dsi.init_inference(model, dtype=dtype)
    wanted = {getattr(torch, dtype)} if dtype else {rest, layers}
    assert {p.dtype for p in model.parameters()} == wanted
    # nobody asked for a cast of the layers, and nobody was told that bits would be lost
    assert {linear.weight.dtype for linear in containers(model)[0].children() if hasattr(linear, "form")} == (
        wanted if dtype else {layers}
    )
    assert engine.plan.restorable is (dtype != "bfloat16")
    if engine.plan.restorable:
        engine.restore()
        assert difference(before, fingerprint(model)) == []
    else:
        with pytest.raises(dsi.RestoreError, match=r"float32 -> torch\.bfloat16"):
            engine.restore()


@pytest.mark.parametrize(("rest", "layers"), MIXED.values(), ids=MIXED)
def test_a_model_of_two_dtypes_with_its_bits_kept(rest, layers):
    model = tiny("llama", dtype=rest)
    model.model.layers.to(layers)
    before = fingerprint(model)
    for dtype in ("bfloat16", "float16", "float32"):
        dsi.init_inference(model, dtype=dtype, **HOST).restore()
        assert difference(before, fingerprint(model)) == []


def test_a_float64_parameter_beside_the_layers():
    model = tiny("llama")
    model.model.norm.double()
    before = fingerprint(model)
    engine = dsi.init_inference(model, dtype="float32")
    assert not engine.plan.restorable
    with pytest.raises(dsi.RestoreError, match=r"float64 -> torch\.float32"):
        engine.restore()
    model = tiny("llama")
    model.model.norm.double()
    before = fingerprint(model)
    dsi.init_inference(model, dtype="float32", **HOST).restore()
    assert difference(before, fingerprint(model)) == []


# --- what the user did meanwhile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama_mha"])
def test_after_a_cast_by_the_user_the_original_is_cast_too(family, target):
    model, stock = tiny(family), tiny(family)
    engine = dsi.init_inference(model)
    model.to(target)
    run(model, family)
    engine.restore()
    stock.to(target)
    assert difference(fingerprint(stock, identity=False), fingerprint(model, identity=False)) == []
    assert_same_bits(run(model, family), run(stock, family))


def test_after_a_cast_by_dsi_and_another_by_the_user():
    model, stock = tiny("llama"), tiny("llama")
    engine = dsi.init_inference(model, dtype="bfloat16", **HOST)
    model.half()
    engine.restore()
    for parameter in stock.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    stock.half()
    assert difference(fingerprint(stock, identity=False), fingerprint(model, identity=False)) == []


@pytest.mark.parametrize("config", [{}, {"dtype": "bfloat16", **HOST}, {"dtype": "float16", **HOST}])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama_mha"])
def test_weights_loaded_meanwhile_are_what_comes_back(family, config):
    model, other = tiny(family), tiny(family, seed=1)
    engine = dsi.init_inference(model, config)
    model.load_state_dict(other.state_dict())
    engine.restore()
    dtype = getattr(torch, config["dtype"]) if config else torch.float32
    for (name, found), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        # what the cast lost was of the old weights
        assert torch.equal(found, wanted.to(dtype).float()), name


def test_weights_loaded_in_part_are_what_comes_back_in_part():
    model, stock, other = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    engine = dsi.init_inference(model, dtype="bfloat16", **HOST)
    names = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight")
    model.load_state_dict({name: other.state_dict()[name] for name in names}, strict=False)
    engine.restore()
    for name, found in model.state_dict().items():
        wanted = other.state_dict()[name].bfloat16().float() if name in names else stock.state_dict()[name]
        assert torch.equal(found, wanted), name


def test_ties_are_kept_through_everything():
    model = tiny("llama_mha")
    embedding, head = model.model.embed_tokens, model.lm_head
    assert embedding.weight is head.weight
    for config in ({}, {"dtype": "bfloat16", **HOST}):
        engine = dsi.init_inference(model, config)
        assert embedding.weight is head.weight
        engine.restore()
        assert embedding.weight is head.weight


# --- several engines ----------------------------------------------------------------------------------------------


def test_a_second_init_is_refused_by_name():
    model = tiny("llama")
    engine = dsi.init_inference(model)
    injected = fingerprint(model)
    with pytest.raises(dsi.InjectionError, match=r"LlamaForCausalLM is optimized already\n.*restore\(\)"):
        dsi.init_inference(model)
    assert difference(injected, fingerprint(model)) == []
    engine.restore()
    dsi.init_inference(model).restore()


def test_a_restored_engine_is_a_plain_handle():
    pair = twins("llama")
    pair.engine.restore()
    inputs = inputs_for("llama", 2, 5)
    assert_same_bits(pair.engine(**inputs), pair.stock(**inputs))
    assert torch.equal(
        pair.engine.generate(**inputs, max_new_tokens=4, do_sample=False),
        pair.stock.generate(**inputs, max_new_tokens=4, do_sample=False),
    )
    assert pair.engine.config is pair.model.config
    assert repr(pair.engine) == "InferenceEngine(LlamaForCausalLM, restored)"
    assert pair.engine.profile(**inputs).total > 0


def test_three_engines_interleaved_equal_three_alone():
    families = ("llama", "llama_mha", "gpt2")

    def steps(family, seed):
        model = tiny(family, seed=seed)
        engine = dsi.init_inference(model)
        inputs = inputs_for(family, 2, 5, "left", seed=seed)
        yield engine(**inputs).logits
        yield engine.generate(**inputs, max_new_tokens=4, do_sample=False)
        yield engine(**inputs_for(family, 3, 9)).logits
        engine.restore()
        yield engine(**inputs).logits

    alone = [list(steps(family, seed)) for seed, family in enumerate(families)]
    together = list(zip(*(steps(family, seed) for seed, family in enumerate(families)), strict=True))
    for step, results in enumerate(together):
        for index, result in enumerate(results):
            assert torch.equal(result, alone[index][step])


def test_two_models_that_share_their_embedding():
    one, other = tiny("llama"), tiny("llama", seed=1)
    other.model.embed_tokens = one.model.embed_tokens
    before = fingerprint(one), fingerprint(other)
    first, second = dsi.init_inference(one), dsi.init_inference(other)
    first.restore()
    second.restore()
    assert difference(before[0], fingerprint(one)) == []
    assert difference(before[1], fingerprint(other)) == []


# --- nothing is left behind ---------------------------------------------------------------------------------------


def references(model):
    found = [weakref.ref(model), *(weakref.ref(module) for module in model.modules())]
    return found + [weakref.ref(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize("restore", [False, True])
def test_everything_dies_with_the_engine(restore):
    model = tiny("llama")
    engine = dsi.init_inference(model)
    model.generate(**inputs_for("llama"), max_new_tokens=3)
    engine.profile(**inputs_for("llama"))
    alive = references(model)
    if restore:
        engine.restore()
        alive += references(model)
    del engine, model
    gc.collect()
    assert [ref() for ref in alive if ref() is not None] == []


def test_a_restored_model_dies_without_the_garbage_collector():
    model = tiny("llama")
    gc.collect()
    gc.disable()
    try:
        stock = weakref.ref(copy.deepcopy(model).model.layers[0].mlp.up_proj.weight)
        assert stock() is None, "the stock model itself has cycles; the test shows nothing"
        engine = dsi.init_inference(model)
        engine.restore()
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        del engine, model
        assert weight() is None
    finally:
        gc.enable()


def test_a_restored_engine_holds_no_fused_weights():
    model = tiny("llama")
    engine = dsi.init_inference(model)
    fused = [weakref.ref(parameter) for layer in containers(model) for parameter in layer.qkv.parameters()]
    engine.restore()
    gc.collect()
    assert [ref() for ref in fused] == [None] * len(fused)


def test_restore_waits_for_a_generation_in_another_thread():
    model = tiny("llama")
    engine = dsi.init_inference(model)
    inputs = inputs_for("llama")
    wanted = engine.generate(**inputs, max_new_tokens=40, do_sample=False)
    started, active, tokens = threading.Event(), [], []

    def note(_ids, scores):
        active.append(engine.active and len(containers(model)) == 2)
        started.set()
        return scores

    def work():
        tokens.append(engine.generate(**inputs, max_new_tokens=40, do_sample=False, logits_processor=[note]))

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    engine.restore()
    thread.join(30)
    assert active == [True] * 40
    assert torch.equal(tokens[0], wanted)
    assert not containers(model)
