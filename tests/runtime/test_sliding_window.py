"""A cache layer with a sliding window is transformers' own to everybody who looks, and writes in place."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import dsi
from dsi.containers.ops import Heads
from dsi.errors import InputError
from dsi.policy import Attr, Block, Call, CausalLM, Concat, Config, Const, Linear, Norm, Policy, Rotary
from dsi.runtime import PreallocatedCache, buffers, sliding_window
from dsi.runtime.sliding_window import PreallocatedSlidingLayer
from tests.runtime.pairs import Pair, assert_same, check, outcome
from tests.support.models import make_hostile_

HEADS, WIDTH, WINDOW = 2, 3, 5


@pytest.fixture(autouse=True)
def born_nan(monkeypatch):
    """Memory that nobody wrote shows in whatever is read from it."""
    original = buffers.empty_as
    for module in (buffers, sliding_window):
        monkeypatch.setattr(module, "empty_as", lambda like, capacity: original(like, capacity).fill_(float("nan")))


def new(batch, length=1):
    return torch.randn(batch, HEADS, length, WIDTH), torch.randn(batch, HEADS, length, WIDTH)


def assert_same_layer(one, other):
    assert one.get_seq_length() == other.get_seq_length()
    assert one.get_mask_sizes(4) == other.get_mask_sizes(4)
    if other.get_seq_length():
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


# --- the layer ----------------------------------------------------------------------------------------------------


def _operations(rng, layer, rows):
    """(operation on a layer giving the layer to go on with, rows afterwards)."""
    order = torch.tensor([rng.randrange(rows) for _ in range(rows)])
    kept = torch.tensor(sorted(rng.sample(range(rows), rng.randint(1, rows))))

    def record(layer):
        layer.activate_past_recording()

    def forget(layer):
        layer.crop(0)
        layer.record_past = False

    yield lambda layer: layer.reorder_cache(order), rows
    yield lambda layer: layer.batch_select_indices(kept), len(kept)
    yield lambda layer: copy.deepcopy(layer), rows
    yield lambda layer: (layer.offload(), layer.prefetch())[0], rows
    if rows < 5:
        yield lambda layer: layer.batch_repeat_interleave(2), 2 * rows
    if layer.record_past:
        yield forget, rows
    elif layer.get_seq_length() < WINDOW:
        yield lambda layer: layer.crop(-1), rows
    else:
        yield record, rows


@pytest.mark.parametrize("seed", range(30))
def test_any_sequence_of_operations(seed, monkeypatch):
    # little room, so that it is used up
    monkeypatch.setattr(sliding_window, "SLACK", (1, 2))
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ours = PreallocatedSlidingLayer(WINDOW, capacity=rng.choice([1, 4, 64]))
    stock, rows = DynamicSlidingWindowLayer(WINDOW), 3
    for _ in range(80):
        if rng.random() < 0.7 or stock.get_seq_length() < 2:
            keys, values = new(rows, rng.choice([1, 1, 1, 1, 2, 7]))
            for one, other in zip(ours.update(keys, values), stock.update(keys, values), strict=True):
                assert torch.equal(one, other)
        elif rng.random() < 0.05:
            ours.reset()
            stock.reset()
            rows = rng.randint(1, 3)
        else:
            operation, rows = rng.choice(list(_operations(rng, stock, rows)))
            ours, stock = operation(ours) or ours, operation(stock) or stock
        assert_same_layer(ours, stock)


def test_appending_copies_one_position_until_the_room_is_used_up(monkeypatch):
    monkeypatch.setattr(sliding_window, "SLACK", (1, 4))
    layer = PreallocatedSlidingLayer(4, capacity=100)
    seen = [layer.append(*new(1))[0].untyped_storage().data_ptr() for _ in range(40)]
    # buffers of 3 + 4 positions: every fifth append moves the 3 that are held
    assert sum(one != other for one, other in itertools.pairwise(seen)) == (40 - 7) // 4 + 1


def test_what_was_shown_is_never_written_to():
    layer = PreallocatedSlidingLayer(3, capacity=100)
    shown = []
    for _ in range(300):
        keys, _ = layer.append(*new(1))
        shown.append((keys, keys.clone()))
    assert all(torch.equal(keys, kept) for keys, kept in shown)


def test_a_kernel_writes_where_it_was_told():
    ours, stock = PreallocatedSlidingLayer(3), DynamicSlidingWindowLayer(3)
    for _ in range(8):
        keys, values = new(2)
        start, key_buffer, value_buffer = ours.reserve(2, Heads(4, HEADS, WIDTH), 1, keys)
        key_buffer.narrow(2, start, 1).copy_(keys)
        value_buffer.narrow(2, start, 1).copy_(values)
        for one, other in zip(ours.visible(), stock.update(keys, values), strict=True):
            assert torch.equal(one, other)
        assert_same_layer(ours, stock)


def test_the_part_of_a_mask_that_the_next_position_sees():
    layer = PreallocatedSlidingLayer(3)
    mask = torch.arange(20).view(1, 1, 1, 20)
    found = []
    for length in range(1, 7):
        found.append(layer.seen(mask[..., :length]).flatten().tolist())
        layer.append(*new(1))
    assert found == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_another_number_of_rows_is_refused():
    layer = PreallocatedSlidingLayer(3)
    layer.append(*new(2))
    with pytest.raises(InputError, match="it holds 2 rows and 3 were given"):
        layer.append(*new(3))


def test_gradients_flow_as_through_stock():
    layer = PreallocatedSlidingLayer(4)
    keys, values = (tensor.requires_grad_() for tensor in new(1))
    layer.append(*new(1))
    with torch.enable_grad():
        layer.append(keys, values)[0].sum().backward()
    assert keys.grad is not None


def test_buffers_of_inference_mode_are_not_written_to_after_it():
    layer = PreallocatedSlidingLayer(4)
    with torch.inference_mode():
        layer.append(*new(1))
        layer.append(*new(1))
    assert layer.append(*new(1))[0].shape[2] == 3


def test_repr():
    assert repr(PreallocatedSlidingLayer(4)) == "PreallocatedSlidingLayer(length=0, window=4)"


# --- models whose layers have windows -----------------------------------------------------------------------------

_MODULE = "transformers.models.qwen2.modeling_qwen2:"
_RMS = {"kind": "rms", "eps": "variance_epsilon", "cls": _MODULE + "Qwen2RMSNorm"}


WINDOW_FACT = {"window": Attr("self_attn.sliding_window")}


def policy(**facts):
    """Full and sliding layers in one model; without a fact `window` as an author may forget it."""
    block = Block(
        layer=_MODULE + "Qwen2DecoderLayer",
        container="dsi.containers:DecoderLayer",
        call=Call(rope="position_embeddings"),
        slots={
            "norm_attn": Norm("input_layernorm", **_RMS),
            "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "out": Linear("self_attn.o_proj"),
            "norm_mlp": Norm("post_attention_layernorm", **_RMS),
            "gate_up": Concat("mlp.gate_proj", "mlp.up_proj"),
            "down": Linear("mlp.down_proj"),
        },
        facts={
            "heads": Config("num_attention_heads"),
            "kv_heads": Config("num_key_value_heads"),
            "head_dim": Attr("self_attn.head_dim"),
            "scale": Attr("self_attn.scaling"),
            "layer_idx": Attr("self_attn.layer_idx"),
            "activation": Config("hidden_act"),
            "pre_norm": Const(True),
            "causal": Const(True),
            **facts,
        },
    )
    parts = CausalLM(
        model=_MODULE + "Qwen2ForCausalLM",
        embed="model.embed_tokens",
        layers="model.layers",
        norm=Norm("model.norm", **_RMS),
        head="lm_head",
        rotary=Rotary(path="model.rotary_emb", static_when=("default",)),
    )
    return Policy(name="windowed", blocks=[block], models=[parts])


def windowed_pair(*, positions=6, **facts):
    config = transformers.Qwen2Config(
        vocab_size=67,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        use_sliding_window=True,
        sliding_window=positions,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        pad_token_id=0,
        eos_token_id=None,
    )
    stock = transformers.Qwen2ForCausalLM(config).eval()
    make_hostile_(stock)
    fused = copy.deepcopy(stock)
    dsi.init_inference(fused, injection_policy=policy(**facts), strict=True)
    return Pair("llama", stock, fused)


@pytest.fixture(scope="module")
def pair():
    return windowed_pair(**WINDOW_FACT)


@pytest.mark.parametrize("pad", [None, "left", "ragged"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", [1, 4, 6, 17])
def test_the_fast_loop_past_the_window(pair, seq, batch, pad):
    check(pair, **pair.inputs(batch, seq, pad), max_new_tokens=20, do_sample=False)


def test_sampling_past_the_window(pair):
    check(pair, **pair.inputs(2, 9, "left"), max_new_tokens=20, do_sample=True, top_k=20)


def test_beams_take_stock_s_loop_over_our_cache(pair):
    check(pair, fast=False, **pair.inputs(2, 9, "left"), max_new_tokens=12, num_beams=3, do_sample=False)


def test_assisted_generation_rolls_back(pair):
    check(pair, fast=False, **pair.inputs(1, 9), max_new_tokens=12, prompt_lookup_num_tokens=3, do_sample=False)


def test_a_text_goes_on_in_its_cache(pair):
    """A conversation: two calls of `generate` on one cache that knows the config."""
    found = []
    for model in (pair.stock, pair.fused):
        cache = DynamicCache(config=model.config)
        first = outcome(model, **pair.inputs(2, 9), max_new_tokens=4, do_sample=False, past_key_values=cache)
        found.append(outcome(model, input_ids=first, max_new_tokens=16, do_sample=False, past_key_values=cache))
    assert pair.route.fast, pair.route.reason
    assert_same(*found)
    assert {type(layer).__name__ for layer in cache.layers} == {"PreallocatedLayer", "PreallocatedSlidingLayer"}


@pytest.mark.parametrize("cache", [DynamicCache, PreallocatedCache])
def test_a_cache_that_keeps_everything_is_read_by_stock_s_loop(pair, cache):
    # it knows no config: the window is in the model's masks alone
    found = [
        outcome(model, **pair.inputs(2, 9), max_new_tokens=12, do_sample=False, past_key_values=made())
        for model, made in ((pair.stock, DynamicCache), (pair.fused, cache))
    ]
    assert pair.route.reason == "layer 0 sees 6 positions, and its cache keeps all positions"
    assert_same(*found)


@pytest.mark.parametrize("cache", [None, DynamicCache])
def test_a_policy_that_forgot_the_window_takes_stock_s_loop(cache):
    pair = windowed_pair()
    given = {} if cache is None else {"past_key_values": cache()}
    check(pair, fast=False, **pair.inputs(2, 9), max_new_tokens=12, do_sample=False, **given)
    assert pair.route.reason == "layer 0 sees all positions, and its cache keeps 6 positions"


def test_a_window_of_one_takes_stock_s_loop():
    pair = windowed_pair(positions=1, **WINDOW_FACT)
    outcome(pair.fused, **pair.inputs(1, 3), max_new_tokens=2, do_sample=False)
    assert pair.route.reason == "a sliding window of 1"


def test_a_cache_that_may_roll_back_takes_stock_s_loop(pair):
    cache = DynamicCache(config=pair.fused.config)
    for layer in cache.layers:
        if layer.is_sliding:
            layer.activate_past_recording()
    outcome(pair.fused, **pair.inputs(1, 9), max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert pair.route.reason == "the cache keeps its past for a rollback"


def test_our_cache_is_in_order_of_the_config(pair):
    cache = PreallocatedCache(config=pair.fused.config)
    assert sliding_window.windows(cache) == sliding_window.windows_of(pair.fused.config) == (6, None, 6)
    chunks = pair.inputs(2, 14)["input_ids"].split((5, 4, 1, 1, 3), dim=1)
    with torch.no_grad():
        found = torch.cat([pair.fused(input_ids=ids, past_key_values=cache).logits for ids in chunks], dim=1)
        wanted = pair.stock(**pair.inputs(2, 14)).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
