"""A preallocated cache is a dynamic cache to everybody who looks, and writes in place."""

from __future__ import annotations

import copy
import io
import random

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dsi.containers.ops import Heads
from dsi.errors import InputError
from dsi.runtime import PreallocatedCache, PreallocatedLayer, buffers, kv_cache
from dsi.runtime.sliding_window import PreallocatedSlidingLayer
from tests.support.models import tiny_config

HEADS, WIDTH = 2, 3


@pytest.fixture(autouse=True)
def born_nan(monkeypatch):
    """Memory that nobody wrote shows in whatever is read from it."""
    original = buffers.empty_as
    for module in (buffers, kv_cache):
        monkeypatch.setattr(module, "empty_as", lambda like, capacity: original(like, capacity).fill_(float("nan")))


def new(batch, length=1):
    return torch.randn(batch, HEADS, length, WIDTH), torch.randn(batch, HEADS, length, WIDTH)


def assert_same(one, other):
    assert one.get_seq_length() == other.get_seq_length()
    assert one.get_mask_sizes(4) == other.get_mask_sizes(4)
    if other.get_seq_length():
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


# --- a dynamic layer, whatever is done to it ----------------------------------------------------------------------


def _assign(layer, change):
    layer.keys, layer.values = change(layer.keys), change(layer.values)


def _pickled(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _operations(rng, rows):
    """(operation on a layer giving the layer to go on with, rows afterwards)."""
    order = torch.tensor([rng.randrange(rows) for _ in range(rows)])
    kept = torch.tensor(sorted(rng.sample(range(rows), rng.randint(1, rows))))
    cut = rng.randint(0, 3)
    return [
        (lambda layer: layer.crop(-cut), rows),
        (lambda layer: layer.reorder_cache(order), rows),
        (lambda layer: layer.reorder_cache(kept), len(kept)),
        (lambda layer: layer.batch_select_indices(kept), len(kept)),
        (lambda layer: layer.batch_repeat_interleave(2), 2 * rows if rows < 5 else None),
        (lambda layer: copy.deepcopy(layer), rows),
        (_pickled, rows),
        (lambda layer: _assign(layer, lambda x: x * 2), rows),
        (lambda layer: _assign(layer, lambda x: x[:, :, :-1]), rows),
        (lambda layer: (layer.offload(), layer.prefetch())[0], rows),
    ]


@pytest.mark.parametrize("seed", range(30))
def test_any_sequence_of_operations(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ours, stock, rows = PreallocatedLayer(capacity=rng.choice([1, 4, 64])), DynamicLayer(), 3
    for _ in range(60):
        if rng.random() < 0.5 or stock.get_seq_length() < 4:
            keys, values = new(rows, rng.randint(1, 5))
            for one, other in zip(ours.update(keys, values), stock.update(keys, values), strict=True):
                assert torch.equal(one, other)
        elif rng.random() < 0.05:
            ours.reset()
            stock.reset()
            rows = rng.randint(1, 3)
        else:
            operation, after = rng.choice([found for found in _operations(rng, rows) if found[1]])
            ours, stock = operation(ours) or ours, operation(stock) or stock
            rows = after
        assert_same(ours, stock)


def test_crop_takes_negative_counts_alone():
    layer = PreallocatedLayer()
    layer.crop(-1)
    layer.append(*new(1, 4))
    with pytest.raises(ValueError, match="not supported"):
        layer.crop(2)
    layer.crop(-9)
    assert layer.get_seq_length() == 0
    layer.append(*new(1, 2))
    assert layer.get_seq_length() == 2


# --- memory -------------------------------------------------------------------------------------------------------


def test_appending_moves_nothing_until_it_is_full_and_then_doubles():
    layer = PreallocatedLayer(capacity=8)
    seen = []
    for _ in range(40):
        keys, values = layer.append(*new(2))
        seen.append((layer.capacity, keys.data_ptr(), values.data_ptr()))
        assert keys.shape == values.shape == (2, HEADS, len(seen), WIDTH)
    assert [capacity for capacity, *_ in seen] == [8] * 8 + [16] * 8 + [32] * 16 + [64] * 8
    assert len(set(seen)) == 4


def test_a_prompt_longer_than_the_room():
    layer = PreallocatedLayer(capacity=4)
    layer.append(*new(1, 9))
    assert (layer.get_seq_length(), layer.capacity) == (9, 9)


def test_a_layer_shows_what_it_holds():
    layer = PreallocatedLayer(capacity=8)
    assert layer.keys is layer.values is None
    keys, _ = layer.append(*new(1, 3))
    assert layer.keys is keys
    assert repr(layer) == "PreallocatedLayer(length=3, capacity=8)"


def test_reordering_stays_in_place():
    layer = PreallocatedLayer()
    layer.append(*new(3, 4))
    before, expected = layer.keys.data_ptr(), layer.keys[[2, 0, 0]].clone()
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert layer.keys.data_ptr() == before
    assert torch.equal(layer.keys, expected)


def test_offloading_lets_go_of_the_buffers():
    layer = PreallocatedLayer()
    layer.append(*new(2, 4))
    layer.offload()
    assert (layer.capacity, layer.get_seq_length()) == (0, 4)
    layer.prefetch()
    assert layer.append(*new(2, 1))[0].shape[2] == 5


def test_reset_keeps_the_memory_for_the_next_text():
    layer = PreallocatedLayer()
    layer.append(*new(2, 4))
    before = layer.keys.data_ptr()
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.append(*new(2, 2))[0].data_ptr() == before
    layer.reset()
    # another batch size is another text
    assert layer.append(*new(3, 2))[0].shape[0] == 3


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("after", ["append", "crop", "reorder"])
def test_tensors_that_were_assigned_are_not_written_to(after, length):
    given = new(2, 6)
    kept = [tensor.clone() for tensor in given]
    layer = PreallocatedLayer()
    layer.append(*new(2, 1))
    layer.keys, layer.values = given
    layer.append(*new(2, length))
    # room for more: the next appends copy nothing
    assert layer.capacity == kv_cache.FIRST_CAPACITY
    if after == "crop":
        layer.crop(-3)
    elif after == "reorder":
        layer.reorder_cache(torch.tensor([1, 0]))
    layer.append(*new(2, 1))
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))


def test_another_number_of_rows_is_an_error_and_changes_nothing():
    layer = PreallocatedLayer()
    layer.append(*new(2, 3))
    # one row would be copied into both, silently
    for rows in (1, 3):
        with pytest.raises(InputError, match=f"holds 2 rows and {rows} were given"):
            layer.append(*new(rows))
    assert layer.get_seq_length() == 3


def test_room_for_a_kernel_to_write_to():
    layer, like = PreallocatedLayer(capacity=4), torch.empty(1, dtype=torch.bfloat16)
    start, keys, values = layer.reserve(2, Heads(4, HEADS, WIDTH), 3, like)
    assert (start, keys.shape, values.dtype) == (0, (2, HEADS, 4, WIDTH), torch.bfloat16)
    keys[:, :, :3] = 1
    start, grown, _ = layer.reserve(2, Heads(4, HEADS, WIDTH), 2, like)
    assert (start, grown.shape[2], layer.get_seq_length()) == (3, 8, 5)
    assert torch.equal(grown[:, :, :3], torch.ones(2, HEADS, 3, WIDTH, dtype=torch.bfloat16))
    assert layer.keys.shape[2] == 5


# --- autograd and inference mode ----------------------------------------------------------------------------------


def test_gradients_pass_as_through_a_dynamic_layer():
    gradients = []
    for layer in (PreallocatedLayer(), DynamicLayer()):
        torch.manual_seed(0)
        first, second, third = (
            torch.randn(1, HEADS, 2, WIDTH, requires_grad=tracked) for tracked in (True, False, True)
        )
        # each step's keys and values are kept for the way back, as attention keeps them
        products = [torch.mul(*layer.update(new, 2 * new)).sum(-2) for new in (first, second, third)]
        sum(product.mul(weight).sum() for weight, product in enumerate(products, 1)).backward()
        gradients.append((first.grad, third.grad))
    for ours, stock in zip(*gradients, strict=True):
        assert torch.equal(ours, stock)


def test_what_inference_mode_made_goes_on_outside_of_it():
    ours, stock = PreallocatedLayer(), DynamicLayer()
    with torch.inference_mode():
        first = new(2, 4)
        ours.update(*first)
        stock.update(*first)
    for step in range(3):
        keys, values = new(2)
        ours.update(keys, values)
        stock.update(keys, values)
        if step == 1:
            ours.reorder_cache(torch.tensor([1, 0]))
            stock.reorder_cache(torch.tensor([1, 0]))
        assert_same(ours, stock)
    ours.reset()
    ours.update(*new(2, 4))


def test_what_was_made_outside_of_inference_mode_goes_on_inside():
    ours, stock = PreallocatedLayer(), DynamicLayer()
    for step in range(9):
        with torch.inference_mode(step % 3 == 1):
            keys, values = new(2, step)
            ours.update(keys, values)
            stock.update(keys, values)
            assert_same(ours, stock)


# --- the cache of a model -----------------------------------------------------------------------------------------


def filled(cache, layers=2, rows=2, length=5):
    for index in range(layers):
        cache.update(*new(rows, length), index)
    return cache


def test_to_transformers_it_is_a_dynamic_cache():
    cache = filled(PreallocatedCache(config=tiny_config("llama")))
    assert isinstance(cache, DynamicCache)
    assert not cache.is_compileable
    assert cache.is_initialized
    assert cache.is_croppable
    assert cache.is_sliding == [False, False]
    assert len(cache) == 2
    assert cache.get_seq_length() == 5
    assert cache.get_max_length() == -1
    assert cache.get_mask_sizes(3, 0) == (8, 0)
    assert [(keys.shape[2], values.shape[2], window) for keys, values, window in cache] == [(5, 5, None)] * 2
    cache.activate_past_recording()
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    cache.reorder_cache(torch.tensor([0, 0, 2]))
    assert [(layer.keys.shape[0], layer.get_seq_length()) for layer in cache.layers] == [(3, 3)] * 2
    cache.reset()
    assert cache.get_seq_length() == 0


def test_layers_appear_on_first_use():
    cache = PreallocatedCache(capacity=32)
    assert (len(cache), cache.get_seq_length(), cache.get_mask_sizes(3, 0)) == (0, 0, (3, 0))
    filled(cache, layers=3)
    assert [type(layer) for layer in cache.layers] == [PreallocatedLayer] * 3
    assert cache.layers[0].capacity == 32


def test_made_ready_ahead_of_use():
    cache = PreallocatedCache(config=tiny_config("llama"))
    cache.early_initialization(2, HEADS, WIDTH, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    assert filled(cache).get_seq_length() == 5


def test_from_the_tensors_of_another_cache():
    cache = filled(PreallocatedCache())
    again = PreallocatedCache(list(cache))
    for one, other in zip(again.layers, cache.layers, strict=True):
        assert type(one) is PreallocatedLayer
        assert_same(one, other)


def test_a_copy_is_independent():
    cache = filled(PreallocatedCache())
    for copied in (copy.deepcopy(cache), _pickled(cache)):
        filled(copied, length=1)
        assert (copied.get_seq_length(), cache.get_seq_length()) == (6, 5)
        assert torch.equal(copied.layers[1].keys[:, :, :5], cache.layers[1].keys)


def test_layers_with_a_window_have_their_own_kind():
    config = tiny_config("llama")
    config.layer_types, config.sliding_window = ["full_attention", "sliding_attention"], 4
    cache = filled(PreallocatedCache(config=config))
    assert [type(layer) for layer in cache.layers] == [PreallocatedLayer, PreallocatedSlidingLayer]


def test_layers_of_other_kinds_stay_what_they_are():
    class Other(DynamicSlidingWindowLayer):
        pass

    cache = DynamicCache()
    cache.layers = [Other(4), DynamicSlidingWindowLayer(1)]
    kv_cache.preallocate_(cache, 16)
    assert [type(layer) for layer in cache.layers] == [Other, DynamicSlidingWindowLayer]


def test_a_cache_takes_the_place_of_another():
    stock = filled(DynamicCache(config=tiny_config("llama")))
    kept = [layer.keys for layer in stock.layers]
    ours = PreallocatedCache.of(stock, 16)
    filled(ours, length=1)
    assert ours.get_seq_length() == 6
    assert all(torch.equal(layer.keys[:, :, :5], keys) for layer, keys in zip(ours.layers, kept, strict=True))


def test_a_dynamic_cache_becomes_preallocated_in_place():
    cache = filled(DynamicCache())
    kept = [layer.keys.clone() for layer in cache.layers]
    shown = [layer.keys for layer in cache.layers]
    kv_cache.preallocate_(cache, 16, layers=3)
    assert [type(layer) for layer in cache.layers] == [PreallocatedLayer] * 3
    filled(cache, length=1, layers=2)
    cache.crop(-3)
    filled(cache, length=1, layers=2)
    for layer, keys, before in zip(cache.layers, kept, shown, strict=False):
        assert torch.equal(layer.keys[:, :, :3], keys[:, :, :3])
        assert torch.equal(before, keys)


def test_a_dynamic_cache_that_was_only_made_ready():
    cache = DynamicCache(config=tiny_config("llama"))
    cache.early_initialization(2, HEADS, WIDTH, torch.float32, torch.device("cpu"))
    kv_cache.preallocate_(cache, 16)
    assert filled(cache).get_seq_length() == 5
