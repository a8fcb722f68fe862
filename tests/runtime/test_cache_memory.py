"""One memory for keys and values: which texts share it, what stays captured, and who has it in the end.

The capture is the stand-in of `test_graph_steps`; addresses, views and their owners are the real thing.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from dsi.runtime import fast_loop, graph_pool, step_forward, step_graph
from dsi.runtime.cache_memory import place_of
from dsi.runtime.decode import DecodeRunner
from dsi.runtime.kv_cache import PreallocatedCache, PreallocatedLayer
from tests.runtime.test_graph_steps import GREEDY, Nothing, Pair, graphs, llama, windowed  # noqa: F401
from tests.support.models import inputs_for, tiny

# as it is: the fixture takes its place
LET_GO = step_graph.GraphLayer.let_go


@pytest.fixture
def no_spare(monkeypatch: Any) -> None:
    """Nothing is kept beside the largest block."""
    monkeypatch.setattr(graph_pool, "SPARE_BYTES", 0)
    monkeypatch.setattr(graph_pool, "SPARE", 1 << 40)


def turns(pair: Pair, rows: tuple[int, ...], **arguments: Any) -> None:
    for turn, batch in enumerate(rows):
        pair.check(inputs_for("llama", batch, 6, "left" if turn % 3 == 2 else None, seed=turn), **arguments)


def held(pair: Pair) -> list[int]:
    return [block.nbytes for block in pair.ours._dsi.graphs._blocks]


def check_tidy(pair: Pair) -> None:
    """Nobody has memory that is lent to nobody; each number of rows has one view, and no graph writes elsewhere."""
    pool = pair.ours._dsi.graphs
    views = [(rows, view, block) for block in pool._blocks for rows, view in block.views.items()]
    assert not any(block.lent for block in pool._blocks)
    assert all(block.views for block in pool._blocks)
    assert len({rows for rows, _, _ in views}) == len(views)
    for rows, view, block in views:
        place = place_of(view)
        assert (place.rows, place.addresses) == (rows, block.addresses)
        assert rows * max(place.capacities) <= block.positions
    held = {place_of(view) for _, view, _ in views}
    assert {place for _, place in pool._graphs} | {place for place, _ in pool.prompts._graphs.values()} <= held


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rows_that_alternate_are_captured_once(family, graphs):  # noqa: F811
    pair = Pair(tiny(family))
    for batch in (1, 32):
        pair.check(inputs_for(family, batch, 6))
    before, made = held(pair), len(graphs)
    for turn, batch in enumerate((1, 32, 1, 32, 1)):
        pair.check(inputs_for(family, batch, 6, seed=turn))
    assert (len(graphs), held(pair)) == (made, before)
    assert made == 2


def test_the_largest_memory_is_everybodys(graphs, no_spare):  # noqa: F811
    """The smaller ones went as the larger came: each of their sizes is captured once more, and then no more."""
    pair = llama()
    for batch in (1, 8, 32, 1, 8):
        pair.check(inputs_for("llama", batch, 6))
    (block,) = pair.ours._dsi.graphs._blocks
    assert sorted(block.views) == [1, 8, 32]
    assert len({place_of(view).addresses for view in block.views.values()}) == 1
    assert len(graphs) == 5
    before = held(pair)
    for turn, batch in enumerate((1, 8, 32, 8, 1, 32)):
        pair.check(inputs_for("llama", batch, 6, seed=turn))
    assert (len(graphs), held(pair)) == (5, before)


def test_more_rows_than_ever_before_fit_where_their_positions_do(graphs, no_spare):  # noqa: F811
    pair = llama(max_position_embeddings=2048)
    pair.check(inputs_for("llama", 1, 500))
    before = held(pair)
    turns(pair, (3, 8, 3, 8))
    assert held(pair) == before
    check_tidy(pair)


@pytest.mark.parametrize("spare", [0, 1 << 15, 1 << 26])
def test_texts_of_any_shape_leave_it_tidy(spare, graphs, tight, monkeypatch):  # noqa: F811
    monkeypatch.setattr(graph_pool, "SPARE_BYTES", spare)
    monkeypatch.setattr(graph_pool, "SPARE", 1 << 40)
    pair = llama(max_position_embeddings=512)
    for turn, (batch, length, new) in enumerate(
        ((1, 6, 5), (1, 30, 60), (4, 6, 5), (1, 100, 9), (4, 40, 40), (2, 6, 80), (1, 6, 5), (7, 9, 30), (2, 150, 9))
    ):
        pair.check(inputs_for("llama", batch, length, seed=turn), max_new_tokens=new)
        check_tidy(pair)


@pytest.mark.parametrize("pad", [None, "left"])
def test_windows_share_too(pad, graphs, no_spare):  # noqa: F811
    pair = windowed()
    for turn, (batch, length) in enumerate(((4, 13), (1, 9), (2, 13), (4, 5), (1, 13))):
        given = {name: x.clamp(max=66) for name, x in inputs_for("llama", batch, length, pad, seed=turn).items()}
        pair.check(given)
    assert len(pair.ours._dsi.graphs._blocks) == 1
    assert len(graphs) == 3


def test_beams_share_too(graphs, no_spare):  # noqa: F811
    pair = llama()
    turns(pair, (8,))
    before = held(pair)
    for turn in range(3):
        pair.check(inputs_for("llama", 2, 6, seed=turn), num_beams=4)
        pair.check(inputs_for("llama", 3, 6, seed=turn), num_beams=2)
        turns(pair, (8, 1))
    assert held(pair) == before
    # 8 rows with ends and without, 6 without, 1; each with padding and without where it came
    assert len(graphs) <= 6


# --- while it is somebody's ------------------------------------------------------------------------------------


class Asks(StoppingCriteria):
    """Generates, once, within a text."""

    def __init__(self, ask: Any) -> None:
        self.ask, self.found = ask, []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if not self.found:
            self.found.append(self.ask())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("inner", [1, 2, 5])
def test_a_call_within_a_call_has_its_own(inner, graphs, no_spare):  # noqa: F811
    pair = llama()
    turns(pair, (5, 2))
    given, asked = inputs_for("llama", 2, 6), inputs_for("llama", inner, 5, seed=8)
    for _ in range(2):
        asks = Asks(lambda: pair.ours.generate(**asked, **GREEDY))
        outer = pair.ours.generate(**given, **GREEDY, stopping_criteria=StoppingCriteriaList([asks]))
        assert torch.equal(outer, pair.stock.generate(**given, **GREEDY))
        assert torch.equal(asks.found[0], pair.stock.generate(**asked, **GREEDY))
        pool = pair.ours._dsi.graphs
        assert not any(block.lent for block in pool._blocks)
        # what the inner one had goes: the largest serves both from now on
        assert len(pool._blocks) == 1
        check_tidy(pair)
    turns(pair, (5, 2, 1))


def test_the_next_text_waits_for_the_last(graphs, monkeypatch):  # noqa: F811
    """It may come on another stream, with a graph of its own."""
    pair, told = llama(), []
    turns(pair, (8, 1))
    monkeypatch.setattr(Nothing, "record", lambda self, stream=None: told.append(("written", self)))
    monkeypatch.setattr(Nothing, "wait_event", lambda self, event: told.append(("waited", event)))
    for rows in (8, 1):
        (done,) = (block._done for block in pair.ours._dsi.graphs._blocks if rows in block.views)
        told.clear()
        turns(pair, (rows,))
        about = [what for what, event in told if event is done]
        assert about == ["waited", "written"]
        # before the prompt as after the last step
        assert (told[0], told[-1]) == (("waited", done), ("written", done))


class Leaves:
    """A streamer whose reader goes away."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise BrokenPipeError("nobody reads")

    def end(self) -> None: ...


def test_a_text_that_breaks_off_gives_its_memory_back(graphs):  # noqa: F811
    pair, given = llama(), inputs_for("llama", 2, 6)
    turns(pair, (2, 1))
    made, before = len(graphs), held(pair)
    for after in (2, 5):
        with pytest.raises(BrokenPipeError):
            pair.ours.generate(**given, **GREEDY, streamer=Leaves(after))
        turns(pair, (2, 1))
    # a text that is streamed is watched for its end as any other
    assert (len(graphs), held(pair)) == (made, before)


def test_results_that_have_the_cache_are_copies(graphs):  # noqa: F811
    """The graph stays, and what was returned stays what it was."""
    pair, settings = llama(), {"return_dict_in_generate": True, "output_logits": True}
    first = pair.check(inputs_for("llama", 2, 6), **settings)
    made = len(graphs)
    kept = [layer.keys.clone() for layer in first.past_key_values.layers]
    # not even a text that there is room for in what was returned
    pair.check(inputs_for("llama", 2, 6, seed=1), max_new_tokens=4)
    for turn in range(3):
        pair.check(inputs_for("llama", 2, 6, seed=turn), **settings)
        turns(pair, (1, 3))
    assert all(torch.equal(one, layer.keys) for one, layer in zip(kept, first.past_key_values.layers, strict=True))
    # one for two rows, and one for each other number
    assert (made, len(graphs)) == (1, 3)
    # no more memory than the text has
    layer = first.past_key_values.layers[0]
    assert layer.capacity == layer.get_seq_length() == first.sequences.shape[1] - 1
    assert layer.buffers()[0].untyped_storage().nbytes() == layer.keys.nbytes
    more = torch.cat([first.sequences, torch.full((2, 1), 9)], 1)
    wanted = pair.stock.generate(more, **GREEDY)
    assert torch.equal(pair.ours.generate(more, past_key_values=first.past_key_values, **GREEDY), wanted)


def test_a_large_cache_that_is_returned_takes_the_memory_along(graphs, no_spare):  # noqa: F811
    pair = llama(max_position_embeddings=512)
    first = pair.check(inputs_for("llama", 2, 90), return_dict_in_generate=True)
    kept = first.past_key_values.layers[0].keys.clone()
    assert held(pair) == []
    assert not pair.ours._dsi.graphs._graphs
    turns(pair, (2, 1))
    assert torch.equal(first.past_key_values.layers[0].keys, kept)


def test_a_short_text_in_much_room_is_copied(graphs, no_spare):  # noqa: F811
    """By what is filled of it: 17 positions of 128."""
    pair = llama()
    for turn in range(3):
        pair.check(inputs_for("llama", 2, 6, seed=turn), return_dict_in_generate=True)
    assert len(graphs) == len(held(pair)) == 1


def test_a_small_view_of_large_memory_is_copied(graphs, no_spare):  # noqa: F811
    pair = llama()
    turns(pair, (32,))
    before = held(pair)
    first = pair.check(inputs_for("llama", 1, 6), return_dict_in_generate=True)
    kept, made = first.past_key_values.layers[0].keys.clone(), len(graphs)
    turns(pair, (32, 1))
    assert (len(graphs), held(pair)) == (made, before)
    assert torch.equal(first.past_key_values.layers[0].keys, kept)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}], ids=str)
def test_results_of_beams_stay_what_they_are(arguments, graphs):  # noqa: F811
    pair = llama()
    first = pair.check(inputs_for("llama", 1, 6), return_dict_in_generate=True, **arguments)
    kept = first.past_key_values.layers[1].values.clone()
    pair.check(inputs_for("llama", 1, 7, seed=3), **arguments)
    assert torch.equal(first.past_key_values.layers[1].values, kept)


def test_a_caller_may_come_again_with_a_cache(graphs):  # noqa: F811
    """Nine turns of 14 tokens: a graph for each capacity that the cache takes by doubling."""
    pair, ids, cache = llama(max_position_embeddings=512), inputs_for("llama", 1, 6)["input_ids"], DynamicCache()
    for turn in range(9):
        wanted = pair.stock.generate(ids, **GREEDY)
        assert torch.equal(pair.ours.generate(ids, **GREEDY, past_key_values=cache), wanted)
        assert pair.ours._dsi.last_route.graph
        ids = torch.cat([wanted, torch.tensor([[turn + 3, turn + 9]])], 1)
    assert len(graphs) == 4


def test_caches_that_callers_bring_leave_the_others_their_graphs(graphs):  # noqa: F811
    pair, brought = llama(), []
    turns(pair, (1, 2))
    for turn in range(2 * graph_pool.GRAPHS):
        given, cache = inputs_for("llama", 1, 6, seed=turn), DynamicCache()
        assert torch.equal(
            pair.ours.generate(**given, **GREEDY, past_key_values=cache), pair.stock.generate(**given, **GREEDY)
        )
        brought.append(cache)
    assert len(pair.ours._dsi.graphs._graphs) <= 2 + graph_pool.BROUGHT
    made = len(graphs)
    turns(pair, (1, 2))
    assert len(graphs) == made


def test_a_graph_holds_no_cache(graphs, monkeypatch):  # noqa: F811
    pair, cache = llama(), DynamicCache()
    monkeypatch.setattr(step_graph.GraphLayer, "let_go", LET_GO)
    # the stand-in has nothing to run anew: no step is taken
    monkeypatch.setattr(step_graph.StepGraph, "replay", lambda self: torch.zeros(1, 67))
    pair.ours.generate(**inputs_for("llama", 1, 6), max_new_tokens=5, past_key_values=cache)
    assert pair.ours._dsi.last_route.graph
    memory = [weakref.ref(layer) for layer in cache.layers]
    storages = [buffer.untyped_storage()._weak_ref() for layer in cache.layers for buffer in layer.buffers()]
    assert not any(map(torch.UntypedStorage._expired, storages))
    del cache
    gc.collect()
    assert len(pair.ours._dsi.graphs._graphs) == 1
    assert [one() for one in memory] == [None] * len(memory)
    assert all(map(torch.UntypedStorage._expired, storages))


# --- growth ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tight(monkeypatch: Any) -> None:
    """A cache has room for no more than was asked for, and for four tokens at first."""
    for module in (fast_loop, sys.modules["dsi.runtime.generate"]):
        monkeypatch.setattr(module, "RESERVE", 4)
    monkeypatch.setattr(graph_pool, "ROUNDED_TO", 1)


def test_a_text_grows_within_the_memory(graphs, no_spare, tight):  # noqa: F811
    pair = llama(max_position_embeddings=512)
    turns(pair, (8, 8))
    before, made = held(pair), len(graphs)
    # 8 rows of 16 positions: a row alone may have 128
    pair.check(inputs_for("llama", 1, 6), max_new_tokens=60)
    assert held(pair) == before
    turns(pair, (8,))
    # the view of 16 positions, and those it was cut anew for
    assert made < len(graphs) <= made + 4
    made = len(graphs)
    pair.check(inputs_for("llama", 1, 6, seed=2), max_new_tokens=60)
    assert (len(graphs), held(pair)) == (made, before)


def test_a_text_that_grows_out_of_the_memory_takes_its_place(graphs, no_spare, tight):  # noqa: F811
    pair = llama(max_position_embeddings=512)
    turns(pair, (2, 1))
    small = weakref.ref(pair.ours._dsi.graphs._blocks[0]._flat[0][0])
    pair.check(inputs_for("llama", 1, 6), max_new_tokens=60)
    graphs.clear()
    gc.collect()
    assert small() is None
    assert len(held(pair)) == 1
    turns(pair, (2, 1, 2))


def test_a_text_without_graphs_may_grow_out_of_the_memory(graphs, no_spare, tight, monkeypatch):  # noqa: F811
    pair = llama(max_position_embeddings=512)
    turns(pair, (1, 1))
    given = inputs_for("llama", 1, 6, seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(DecodeRunner, "graph_obstacle", lambda self: "not today")
        settings = {**GREEDY, "max_new_tokens": 60}
        assert torch.equal(pair.ours.generate(**given, **settings), pair.stock.generate(**given, **settings))
    turns(pair, (1, 1))
    check_tidy(pair)


def test_memory_that_is_outgrown_goes_layer_by_layer(graphs, no_spare, tight, monkeypatch):  # noqa: F811
    """The peak of growing is one layer's, not all of them twice."""
    pair, alive = llama(max_position_embeddings=512), []
    turns(pair, (1,))
    block = pair.ours._dsi.graphs._blocks[0]
    old = [flat[0].untyped_storage()._weak_ref() for flat in block._flat]
    del block
    make_room = PreallocatedLayer.make_room

    def watched(self: PreallocatedLayer, positions: int) -> None:
        make_room(self, positions)
        # as the fixture would hold
        graphs.clear()
        gc.collect()
        alive.append(sum(not torch.UntypedStorage._expired(one) for one in old))

    monkeypatch.setattr(PreallocatedLayer, "make_room", watched)
    pair.check(inputs_for("llama", 1, 6), max_new_tokens=40)
    assert alive[-1] == 0
    assert len(old) - 1 in alive


def test_idle_memory_goes_where_a_text_finds_none(graphs, tight, monkeypatch):  # noqa: F811
    pair = llama(max_position_embeddings=512)
    turns(pair, (1, 8))
    grow, failed = PreallocatedLayer._grow, []

    def short(self: PreallocatedLayer, needed: int) -> None:
        if len(held(pair)) > 1 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("9 GiB")
        grow(self, needed)

    monkeypatch.setattr(PreallocatedLayer, "_grow", short)
    pair.check(inputs_for("llama", 3, 6), max_new_tokens=40)
    assert failed
    # the text's own
    assert len(held(pair)) == 1


def test_idle_memory_goes_where_a_graph_finds_none(graphs, monkeypatch):  # noqa: F811
    pair = llama()
    turns(pair, (1,))
    captured = step_graph.StepGraph._captured

    def short(self: Any, pool: Any) -> Any:
        if len(held(pair)) == 1 and self.key.batch == 32:
            raise torch.OutOfMemoryError("9 GiB")
        return captured(self, pool)

    monkeypatch.setattr(step_graph.StepGraph, "_captured", short)
    turns(pair, (32,))
    (block,) = pair.ours._dsi.graphs._blocks
    assert list(block.views) == [32]


def test_memory_of_inference_mode_is_everybodys(graphs):  # noqa: F811
    pair = llama()
    with torch.inference_mode():
        turns(pair, (2, 1))
    turns(pair, (2, 1))
    with torch.inference_mode():
        turns(pair, (2, 1))
    assert len(graphs) == 2


# --- plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returned", [False, True])
def test_a_model_that_was_cast_has_other_memory(returned, graphs, no_spare):  # noqa: F811
    pair = llama()
    turns(pair, (2, 1))
    before = weakref.ref(pair.ours._dsi.graphs._blocks[0]._flat[0][0])
    for model in (pair.stock, pair.ours):
        model.double()
    turns(pair, (2,), return_dict_in_generate=returned)
    graphs.clear()
    gc.collect()
    assert before() is None
    turns(pair, (2, 2, 2))
    # with padding and without
    assert len(graphs) <= 2
    check_tidy(pair)


def test_what_work_is_divided_by_is_the_texts_own(graphs):  # noqa: F811
    """Whatever was before it: a longer text, more rows, a memory of another size."""
    given, reaches = inputs_for("llama", 2, 6), []
    for before in ((), ((2, 400),), ((32, 6), (1, 300))):
        pair = llama(max_position_embeddings=2048)
        for rows, length in before:
            pair.check(inputs_for("llama", rows, length))
        graphs.clear()
        for _ in range(2):
            pair.check(given)
        (graph,) = graphs
        reaches.append({layer.reach for layer in graph.layers})
    assert reaches == [{256}] * 3


def test_a_short_text_after_a_long_one_has_its_own_graph(graphs):  # noqa: F811
    pair = llama(max_position_embeddings=2048)
    for _ in range(2):
        for length in (6, 300, 700):
            pair.check(inputs_for("llama", 1, length))
    # the memory of the first two was too small for the third
    assert [graph.layers[0].reach for graph in graphs] == [256, 512, 768, 256, 512]
    for length in (700, 6, 300):
        pair.check(inputs_for("llama", 1, length))
    assert len(graphs) == 5


@torch.no_grad()
def test_a_text_longer_than_anybody_had_said(graphs, monkeypatch):  # noqa: F811
    """A loop that goes on beyond what it announced."""
    monkeypatch.setattr(graph_pool, "ROUNDED_TO", 8)
    pair = llama()
    steps = step_forward.step_forward(pair.ours, pair.ours._dsi, {})
    steps.slots = 12
    ids, found = torch.arange(5, 35)[None], []
    for forward in (steps, pair.stock):
        cache = PreallocatedCache(capacity=64)
        logits = [forward(input_ids=ids[:, :9], past_key_values=cache).logits[:, -1:]]
        for at in range(9, 29):
            given = {"input_ids": ids[:, at : at + 1], "attention_mask": torch.ones(1, at + 1, dtype=torch.int64)}
            logits.append(forward(**given, past_key_values=cache).logits[:, -1:])
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found)
    assert steps.taken == 20
    assert [graph.capacity for graph in graphs] == [16, 24, 32]


# --- the end ---------------------------------------------------------------------------------------------------


def test_a_deleted_engine_gives_everything_back(graphs):  # noqa: F811
    pair = llama()
    turns(pair, (1, 8, 1))
    memory = [weakref.ref(flat) for block in pair.ours._dsi.graphs._blocks for pair_ in block._flat for flat in pair_]
    del pair
    graphs.clear()
    gc.collect()
    assert [one() for one in memory] == [None] * len(memory)


# --- layers ----------------------------------------------------------------------------------------------------


def filled(rows: int, length: int, capacity: int) -> tuple[PreallocatedCache, torch.Tensor]:
    cache = PreallocatedCache.of(DynamicCache(), capacity)
    keys = torch.randn(rows, 2, length, 4)
    cache.update(keys, keys + 1, 0)
    return cache, keys


def test_a_layer_spreads_over_the_memory_it_lies_in():
    cache, keys = filled(1, 5, 8)
    (layer,) = cache.layers
    flat = [torch.full((2 * 4 * 32,), float("nan")) for _ in range(2)]
    for part, buffer in zip(flat, layer.buffers(), strict=True):
        part[: buffer.numel()] = buffer.reshape(-1)
    layer.lie_in(flat, [(1, 2, 8, 4)] * 2)
    assert layer.room() == 32
    layer._show()
    for length in (8, 20, 32):
        more = torch.randn(1, 2, length - keys.shape[2], 4)
        keys = torch.cat([keys, more], 2)
        found = layer.append(more, more + 1)
        assert torch.equal(found[0], keys)
        assert torch.equal(found[1], keys + 1)
        assert [buffer.data_ptr() for buffer in layer.buffers()] == [part.data_ptr() for part in flat]
    layer.append(more, more)
    assert layer.room() == layer.capacity == 64
    assert torch.equal(layer.keys[:, :, :32], keys)


def test_a_layer_moves_out():
    cache, keys = filled(2, 5, 8)
    (layer,) = cache.layers
    flat = [buffer.view(-1) for buffer in layer.buffers()]
    layer.lie_in(flat)
    layer.move_out()
    for one in flat:
        one.fill_(float("nan"))
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, keys + 1)
    assert layer.capacity == 5
