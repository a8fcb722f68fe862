"""A decode step gives the logits of the model's own forward, and knows when it must not be taken."""

from __future__ import annotations

import copy
import functools
import io

import attrs
import pytest
import torch
from torch import nn

import dsi
from dsi.errors import PolicyError
from dsi.policy import CausalLM, Norm, Positions, Rotary
from dsi.runtime import DecodeRunner, PreallocatedCache, decode, rope_table
from tests.runtime.pairs import check, counted_steps, make_pair, shared_pair
from tests.support.models import CAUSAL, ROPE_TYPES

FAMILIES = tuple(family for family in CAUSAL if family != "llama_dynamic")


def prefilled(model, ids):
    cache = PreallocatedCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_are_the_models_own(family, rows):
    pair = shared_pair(family)
    ids = pair.inputs(rows, 40)["input_ids"]
    cache, stock = prefilled(pair.fused, ids[:, :5]), prefilled(pair.stock, ids[:, :5])
    step = pair.fused._dsi.runner.bind(40)
    for at in range(5, 40):
        # an int for all rows, or a tensor of one position a row
        position = at if at % 2 else torch.full((rows, 1), at)
        with torch.no_grad():
            given = step(ids[:, at : at + 1], position, cache.layers, None)
            expected = pair.stock(ids[:, at : at + 1], past_key_values=stock).logits[:, -1]
        assert given.dtype == torch.float32
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 40


def test_a_layer_knows_the_norm_after_it():
    runner = shared_pair("llama").fused._dsi.runner
    layers, decoders = runner.containers(), runner.bind(8).decoders
    known = [getattr(decoder, "keywords", {}).get("following") for decoder in decoders]
    # before the head, a norm of its own
    assert known[:-1] == [layer.norm_attn for layer in layers[1:]]
    assert known[-1].weight is runner._at(runner.parts.norm.path).weight


def test_a_mask_hides_positions():
    pair = shared_pair("llama")
    ids = pair.inputs(2, 8)["input_ids"]
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    stock, ours = prefilled(pair.stock, ids[:, :7]), prefilled(pair.fused, ids[:, :7])
    with torch.no_grad():
        expected = pair.stock(
            ids[:, 7:], attention_mask=mask, past_key_values=stock, position_ids=torch.tensor([[4], [7]])
        ).logits[:, -1]
        given = pair.fused._dsi.runner.bind(8)(
            ids[:, 7:], torch.tensor([[4], [7]]), ours.layers, mask.bool()[:, None, None]
        )
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_16_bits_the_error_is_no_larger_than_stock(family, dtype):
    pair = make_pair(family, dtype=dtype)
    exact = copy.deepcopy(pair.stock).float()
    ids = pair.inputs(4, 20)["input_ids"]
    errors = []
    for model in (pair.stock, pair.fused):
        cache = prefilled(model, ids[:, :-1])
        with torch.no_grad():
            reference = exact(ids).logits[:, -1]
            if model is pair.fused:
                logits = model._dsi.runner.bind(20)(ids[:, -1:], 19, cache.layers, None)
                assert logits.dtype == torch.float32
            else:
                logits = model(ids[:, -1:], past_key_values=cache).logits[:, -1].float()
        errors.append((logits - reference).norm() / reference.norm())
    stock, ours = errors
    # four rows of 67 logits: the ratio itself is uncertain by some ten percent
    assert ours <= 1.2 * stock + 1e-4


def test_a_large_head_goes_through_onednn(monkeypatch):
    pair = shared_pair("gpt2")
    shapes = []
    product = decode._onednn

    def counted(x, weight, bias):
        shapes.append(tuple(weight.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(decode, "HEAD_FROM", dict.fromkeys((False, True), 67 * 32))
    monkeypatch.setattr(decode, "_onednn", counted)
    check(pair, **pair.inputs(), max_new_tokens=5)
    assert shapes == [(67, 32)] * 4
    monkeypatch.setattr(decode, "HEAD_FROM", dict.fromkeys((False, True), 67 * 32 + 1))
    check(pair, **pair.inputs(), max_new_tokens=5)
    assert len(shapes) == 4


# --- building -----------------------------------------------------------------------------------------------------

PARTS = CausalLM(
    model="any",
    embed="model.embed_tokens",
    layers="model.layers",
    head="lm_head",
    norm=Norm(
        "model.norm", kind="rms", eps="variance_epsilon", cls="transformers.models.llama.modeling_llama:LlamaRMSNorm"
    ),
    rotary=Rotary(path="model.rotary_emb", static_when={"default"}),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed": "model.wte"}, "LlamaForCausalLM has no 'model.wte': 'wte' is missing on LlamaModel"),
        ({"layers": "decoder.layers"}, "'decoder' is missing on LlamaForCausalLM"),
        ({"head": "head"}, "no 'head'"),
        ({"project_in": "model.project_in"}, "no 'model.project_in'"),
        ({"project_out": "model.project_out"}, "no 'model.project_out'"),
        ({"positions": Positions(path="model.wpe")}, "no 'model.wpe'"),
        ({"rotary": Rotary(path="model.rotary")}, "no 'model.rotary'"),
        ({"norm": Norm("model.final")}, "no 'model.final'"),
        (
            {"norm": Norm("model.norm")},
            "model.norm: the policy expects torch.nn.*LayerNorm .* the model has .*LlamaRMSNorm",
        ),
        ({"norm": attrs.evolve(PARTS.norm, eps="eps")}, "with an attribute 'eps'"),
    ],
)
def test_a_policy_that_does_not_fit(change, message):
    with pytest.raises(PolicyError, match=message):
        DecodeRunner.build(shared_pair("llama").fused, attrs.evolve(PARTS, **change))


def test_parts_that_the_model_sets_to_none():
    pair = shared_pair("opt")
    runner = pair.fused._dsi.runner
    assert pair.stock.model.decoder.project_in is None
    assert runner.parts.project_in
    assert runner.learned_positions == 64
    assert shared_pair("llama").fused._dsi.runner.learned_positions is None


# --- obstacles ----------------------------------------------------------------------------------------------------


def _hook(*args):
    return None


def _hooked(path):
    return lambda model: model.get_submodule(path).register_forward_hook(_hook)


def _patch(model):
    inner = model.model.norm.forward
    model.model.norm.forward = lambda x: inner(x) * 1.5


OBSTACLES = {
    "hook on the model": (_hooked(""), "it has forward hooks"),
    "hook on the base": (_hooked("model"), "model.embed_tokens: it has forward hooks|it has forward hooks"),
    "hook on the norm": (_hooked("model.norm"), "model.norm: it has forward hooks"),
    "hook on a layer": (_hooked("model.layers.1"), "model.layers.1: it has forward hooks"),
    "hook before": (lambda m: m.lm_head.register_forward_pre_hook(_hook), "lm_head: it has forward hooks"),
    "another forward": (_patch, "model.norm: its forward is replaced"),
    "training": (lambda m: m.train(), "the model is in training mode"),
    "a layer in training": (lambda m: m.model.layers[1].train(), "model.layers.1: the model is in training mode"),
    "a stock layer": (
        lambda m: m.model.layers.__setitem__(0, shared_pair("llama").stock.model.layers[0]),
        "model.layers.0: LlamaDecoderLayer has no decode step",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_stands_in_the_way_takes_the_stock_loop(name):
    change, reason = OBSTACLES[name]
    pair = make_pair("llama", attention_dropout=0.0)
    for model in (pair.stock, pair.fused):
        change(model)
    check(pair, fast=False, **pair.inputs(2, 7, "left"), max_new_tokens=6)
    assert any(part in pair.route.reason for part in reason.split("|"))


def test_user_hooks_see_every_token():
    pair = make_pair("gpt2")
    seen = []
    handle = pair.fused.register_forward_hook(lambda *args: seen.append(1))
    pair.fused.generate(**pair.inputs(), max_new_tokens=6)
    assert len(seen) == 6
    handle.remove()
    check(pair, **pair.inputs(), max_new_tokens=6)


def test_hooks_of_all_modules_and_autocast():
    pair = shared_pair("llama")
    handle = nn.modules.module.register_module_forward_hook(_hook)
    try:
        check(pair, fast=False, **pair.inputs(), max_new_tokens=4)
    finally:
        handle.remove()
    with torch.autocast("cpu"):
        assert pair.fused._dsi.runner.obstacle() == "autocast is on"
    assert pair.fused._dsi.runner.obstacle() == ""


def test_timing_hooks_are_no_obstacle():
    pair = make_pair("llama")
    engine = dsi.init_inference(make_pair("llama").stock)
    engine.profile_model_time()
    with counted_steps() as steps:
        expected = pair.stock.generate(**pair.inputs(1, 6), max_new_tokens=5)
        assert engine.generate(**pair.inputs(1, 6), max_new_tokens=5).tolist() == expected.tolist()
    assert len(steps) == 4
    assert [time.phase for time in engine.model_times()] == ["prefill", "decode", "decode", "decode", "decode"]


# --- the model changes between calls ------------------------------------------------------------------------------


def test_weights_are_looked_up_anew():
    pair = make_pair("gpt2")
    check(pair, **pair.inputs(), max_new_tokens=5)
    for model in (pair.stock, pair.fused):
        torch.manual_seed(1)
        model.resize_token_embeddings(90)
        model.transformer.wpe.weight.data.mul_(1.5)
        model.transformer.ln_f.weight = nn.Parameter(torch.rand(32) + 0.5)
    check(pair, **pair.inputs(), max_new_tokens=8)


def test_casting_there_and_back():
    pair = make_pair("llama")
    check(pair, **pair.inputs(), max_new_tokens=5)
    for model in (pair.stock, pair.fused):
        model.to(torch.bfloat16)
        model.generate(**pair.inputs(), max_new_tokens=5)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    for _ in range(2):
        for model in (pair.stock, pair.fused):
            model.to(torch.float32)
        # the rotary frequencies lost bits on the way: with a table of the old ones it would be another model
        check(pair, **pair.inputs(3, 8), max_new_tokens=40, **wanted)
        for model in (pair.stock, pair.fused):
            model.model.rotary_emb.inv_freq.mul_(1.01)
            model.to(torch.bfloat16)


class Louder(nn.Embedding):
    """An embedding of another class: not only its weights count."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


class Mirror(nn.Linear):
    """A head of another class."""

    def forward(self, x):
        return -super().forward(x)


def test_parts_of_other_classes_are_called(monkeypatch):
    monkeypatch.setattr(decode, "HEAD_FROM", dict.fromkeys((False, True), 1))
    pair = make_pair("llama")
    for model in (pair.stock, pair.fused):
        louder, mirror = Louder(67, 32), Mirror(32, 67, bias=False)
        louder.weight, mirror.weight = model.model.embed_tokens.weight, model.lm_head.weight
        model.model.embed_tokens, model.lm_head = louder.eval(), mirror.eval()
    check(pair, **pair.inputs(2, 6, "left"), max_new_tokens=8)


def test_a_renormalizing_embedding_is_called():
    pair = make_pair("llama")
    for model in (pair.stock, pair.fused):
        model.model.embed_tokens.max_norm = 1.0
    check(pair, **pair.inputs(), max_new_tokens=8)


def test_a_biased_head():
    pair = make_pair("llama")
    for model in (pair.stock, pair.fused):
        model.lm_head.bias = nn.Parameter(torch.linspace(-4, 4, 67))
    check(pair, **pair.inputs(), max_new_tokens=8)


def test_fewer_layers():
    pair = make_pair("llama", num_hidden_layers=3)
    for model in (pair.stock, pair.fused):
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
    check(pair, **pair.inputs(), max_new_tokens=6)
    for model in (pair.stock, pair.fused):
        model.config.num_hidden_layers = 1
    # the model's own forward leaves the second layer out
    check(pair, fast=False, **pair.inputs(), max_new_tokens=6)
    assert pair.route.reason == "the cache has 1 layers"


# --- rotary terms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_terms_that_depend_on_more_than_the_position_are_asked_for_at_each_step(rope_type):
    pair = make_pair(f"llama_{rope_type}")
    calls = []
    forward = type(pair.fused.model.rotary_emb).forward

    def counted(x, position_ids):
        calls.append(tuple(position_ids.shape))
        return forward(pair.fused.model.rotary_emb, x, position_ids)

    # counted looks like dsi's own to the runner, which would otherwise see a module that somebody replaced
    counted.__module__ = "dsi.test"
    pair.fused.model.rotary_emb.forward = counted
    check(pair, **pair.inputs(1, 6), max_new_tokens=10)
    prompt, *rest = calls
    assert prompt == (1, 6)
    if rope_type in ("dynamic", "longrope"):
        assert rest == [(1, 1)] * 9
    else:
        assert rest == [(1, rope_table.FIRST_POSITIONS)]


def test_the_table_grows_and_is_kept(monkeypatch):
    monkeypatch.setattr(rope_table, "FIRST_POSITIONS", 4)
    pair = make_pair("llama")
    calls = []
    terms = rope_table._terms
    monkeypatch.setattr(rope_table, "_terms", lambda *args, **how: calls.append(args[2]) or terms(*args, **how))
    check(pair, **pair.inputs(1, 3), max_new_tokens=30)
    assert calls == [4, 8, 16, 32]
    check(pair, **pair.inputs(3, 6, "ragged"), max_new_tokens=20)
    assert calls == [4, 8, 16, 32]
    check(pair, **pair.inputs(3, 8, "ragged"), max_new_tokens=40)
    assert calls == [4, 8, 16, 32, 64]


def test_a_table_made_in_inference_mode_serves_outside_of_it():
    pair = make_pair("llama")
    with torch.inference_mode():
        check(pair, **pair.inputs(), max_new_tokens=5)
    check(pair, **pair.inputs(3, 6, "ragged"), max_new_tokens=5)


# --- copies -------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_model_runs_the_copys_weights():
    pair = make_pair("llama")
    check(pair, **pair.inputs(), max_new_tokens=4)
    copied = copy.deepcopy(pair.fused)
    assert copied._dsi.runner.model is copied
    for model in (copied, pair.stock):
        model.model.norm.weight.data.mul_(torch.linspace(-2, 2, 32))
    check(attrs.evolve(pair, fused=copied), **pair.inputs(), max_new_tokens=8)


def test_a_pickled_model_runs():
    pair = make_pair("llama")
    check(pair, **pair.inputs(), max_new_tokens=4)
    buffer = io.BytesIO()
    torch.save(pair.fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded.generate, functools.partial)
    check(attrs.evolve(pair, fused=loaded), **pair.inputs(), max_new_tokens=4)
