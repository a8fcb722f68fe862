"""Decode steps as graphs, with a stand-in for the capture: what is replayed, from which memory, and who owns it.

The stand-in runs the step anew at each replay, so addresses, positions, ends and pools are the real thing, and stale
numbers that a real graph would keep do not show. `tests/gpu/test_decode_graphs.py` has the real capture.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

import dsi
from dsi.runtime import decode, fast_loop, graph_pool, graph_run, step_forward, step_graph
from dsi.runtime.kv_cache import PreallocatedCache, PreallocatedLayer
from tests.support.models import inputs_for, tiny

# as they are: the fixture takes the place of the second
KEPT_OBSTACLE, GRAPH_OBSTACLE = decode._kept_obstacle, decode.DecodeRunner.graph_obstacle
GREEDY = {"max_new_tokens": 12, "do_sample": False}


class Replayed:
    """Stands for a captured graph."""

    def __init__(self, step: step_graph.StepGraph) -> None:
        self.step = step

    def replay(self) -> None:
        self.step.logits = self.step._run()


class Nothing:
    """Stands for events and streams."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        # a prompt's graph is for one that waits for the host
        return 1e9

    def wait_event(self, event: Any) -> None: ...


class Arrived:
    """Tokens that are on the host already."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.host = tokens.reshape(-1).clone()

    def ends(self, ending: Any, streamer: Any) -> bool:
        if streamer is not None:
            streamer.put(self.host.clone())
        return ending.all_ended(self.host)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: Any) -> list[step_graph.StepGraph]:
    """Every step that was captured, newest last."""
    import dsi_kernels

    made: list[step_graph.StepGraph] = []

    def captured(self: step_graph.StepGraph, pool: Any) -> tuple[Any, torch.Tensor]:
        made.append(self)
        with step_graph.graph_kernels():
            return Replayed(self), self._run()

    monkeypatch.setattr(dsi_kernels, "greedy_token", dsi_kernels.greedy_token_reference)
    monkeypatch.setattr(dsi_kernels, "sample_token", dsi_kernels.sample_token_reference)
    monkeypatch.setattr(step_graph.StepGraph, "_captured", captured)
    # what is run anew needs what a graph does not
    monkeypatch.setattr(step_graph.GraphLayer, "let_go", lambda self: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Event", Nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
    monkeypatch.setattr(decode.DecodeRunner, "graph_obstacle", lambda self: "")
    monkeypatch.setattr(fast_loop, "_Arrival", Arrived)
    monkeypatch.setattr(graph_pool, "end_failed_capture", lambda device: None)
    for module in (graph_pool, graph_run):
        monkeypatch.setattr(module, "noise_place", lambda device: torch.get_rng_state())
        monkeypatch.setattr(module, "set_noise_place", lambda device, place: torch.set_rng_state(place))
    return made


class Pair:
    def __init__(self, model: nn.Module) -> None:
        self.stock, self.ours = model, copy.deepcopy(model)
        self.engine = dsi.init_inference(self.ours)
        self.ours._dsi.graphs = graph_pool.GraphPool()

    def check(self, given: dict[str, Any], **arguments: Any) -> Any:
        settings = {**GREEDY, **arguments}
        wanted, found = self.stock.generate(**given, **settings), self.ours.generate(**given, **settings)
        assert torch.equal(*(one if torch.is_tensor(one) else one.sequences for one in (wanted, found)))
        assert self.ours._dsi.last_route.graph, self.ours._dsi.last_route.reason
        return found


def llama(**settings: Any) -> Pair:
    return Pair(tiny("llama", **settings))


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_tokens_are_stocks(family, pad, graphs):
    pair = Pair(tiny(family))
    for turn, batch in enumerate((1, 3, 1, 3)):
        pair.check(inputs_for(family, batch, 6, pad, seed=turn))
    # one for each batch size
    assert len(graphs) == 2


@pytest.mark.parametrize("count", range(4))
def test_ends_anywhere(count):
    pair = llama()
    given = inputs_for("llama", 3, 6, "left")
    free = pair.stock.generate(**given, **GREEDY)
    for model in (pair.stock, pair.ours):
        model.generation_config.pad_token_id = 0
    # the first token of one row, a late one of another
    ends = [int(free[0, 6]), int(free[1, 10]), int(free[2, 8])][:count]
    pair.check(given, eos_token_id=ends or None)
    for row in range(3):
        pair.check({name: x[row : row + 1] for name, x in given.items()}, eos_token_id=ends or None)


@pytest.mark.parametrize("arguments", [{"no_repeat_ngram_size": 2}, {"min_new_tokens": 5}, {"max_time": 9.0}], ids=str)
def test_other_modes_take_a_step_at_a_time(arguments):
    llama().check(inputs_for("llama", 2, 6), **arguments)


SAMPLED = [
    {"top_k": 0},
    {"top_k": 9},
    {"temperature": 0.6, "top_k": 0, "top_p": 0.7},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("arguments", [*SAMPLED, {"top_k": 9, "no_repeat_ngram_size": 2}], ids=str)
def test_sampling_draws_what_stock_draws(arguments, monkeypatch):
    """The same tokens, and after them the same random numbers."""
    pair, steps = llama(), []
    take = graph_run.GraphRun.take
    monkeypatch.setattr(graph_run.GraphRun, "take", lambda self, tokens: [steps.append(1), take(self, tokens)][1])
    for pad, ends in ((None, None), ("left", 3), ("left", 40)):
        given, drawn = inputs_for("llama", 2, 6, pad), []
        stop = None
        for model in (pair.stock, pair.ours):
            torch.manual_seed(3)
            ids = model.generate(**given, **arguments, do_sample=True, max_new_tokens=14, eos_token_id=stop)
            drawn += [ids, torch.rand(1)]
        assert torch.equal(drawn[0], drawn[2])
        assert torch.equal(drawn[1], drawn[3])
        if ends is not None:
            # both rows end early: a step beyond the end is taken, and what it drew given back
            stop, drawn = [int(drawn[0][0, 8]), int(drawn[0][1, 10])], []
            for model in (pair.stock, pair.ours):
                model.generation_config.pad_token_id = 0
                torch.manual_seed(3)
                ids = model.generate(**given, **arguments, do_sample=True, max_new_tokens=14, eos_token_id=stop)
                drawn += [ids, torch.rand(1)]
            assert drawn[0].shape[1] < 20
            assert torch.equal(drawn[0], drawn[2])
            assert torch.equal(drawn[1], drawn[3])
        assert pair.ours._dsi.last_route.graph, pair.ours._dsi.last_route.reason
    # the host chose the tokens only where it had to
    assert bool(steps) is ("no_repeat_ngram_size" in arguments)


@pytest.mark.parametrize("arguments", [{}, {"no_repeat_ngram_size": 2}], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_a_streamer_that_raises_leaves_what_stock_leaves(tokens, arguments):
    pair, given, left = llama(), inputs_for("llama", 1, 6), []

    class Breaks:
        def __init__(self) -> None:
            # the prompt comes first
            self.count = -1

        def put(self, value: Any) -> None:
            self.count += 1
            if self.count == tokens:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    for model in (pair.stock, pair.ours):
        cache = DynamicCache(config=model.config)
        torch.manual_seed(3)
        with pytest.raises(KeyboardInterrupt):
            model.generate(
                **given, **arguments, do_sample=True, max_new_tokens=8, streamer=Breaks(), past_key_values=cache
            )
        left.append((cache.get_seq_length(), cache.layers[1].keys.shape, float(torch.rand(1))))
    assert left[0] == left[1]


def test_other_settings_need_no_other_graph(graphs):
    pair, given = llama(), inputs_for("llama", 2, 6)
    for arguments in SAMPLED[:3]:
        pair.ours.generate(**given, **arguments, do_sample=True, max_new_tokens=8)
        assert pair.ours._dsi.last_route.graph
    assert len(graphs) == 1


@pytest.mark.parametrize("pad", [None, "left"])
def test_a_penalty_on_the_device(pad, monkeypatch):
    monkeypatch.setattr(graph_run.GraphRun, "take", None)
    pair = llama()
    pair.check(inputs_for("llama", 2, 6, pad), repetition_penalty=1.3)


def test_logits_that_are_no_distribution():
    pair, given = llama(), inputs_for("llama", 1, 6)
    pair.ours.generate(**given, do_sample=True, max_new_tokens=8)
    step = decode.Step.logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode.Step, "logits", lambda *args: step(*args) * float("nan"))
        with pytest.raises(RuntimeError, match="probability tensor contains"):
            pair.ours.generate(**given, do_sample=True, max_new_tokens=8)
    pair.check(given)


def test_streamed_sampling_is_chained(monkeypatch):
    monkeypatch.setattr(graph_run.GraphRun, "take", None)
    pair, given, told = llama(), inputs_for("llama", 1, 6), []

    class Told:
        def put(self, value: torch.Tensor) -> None:
            told.extend(value.reshape(-1).tolist())

        def end(self) -> None: ...

    for model in (pair.stock, pair.ours):
        torch.manual_seed(1)
        model.generate(**given, do_sample=True, max_new_tokens=9, streamer=Told())
    assert pair.ours._dsi.last_route.graph
    assert told[: len(told) // 2] == told[len(told) // 2 :]


def test_no_memory_to_grow_is_told_and_the_engine_goes_on(monkeypatch):
    generate = sys.modules["dsi.runtime.generate"]
    for module in (fast_loop, generate):
        monkeypatch.setattr(module, "RESERVE", 4)
    monkeypatch.setattr(graph_pool, "ROUNDED_TO", 1)
    pair, given = llama(), inputs_for("llama", 2, 6)
    grow = PreallocatedLayer._grow

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("9 GiB")

    monkeypatch.setattr(PreallocatedLayer, "_grow", fails)
    with pytest.raises(dsi.CacheMemoryError, match="full at 16 positions, and there is no memory to grow: 9 GiB"):
        pair.ours.generate(**given, max_new_tokens=20, do_sample=False)
    monkeypatch.setattr(PreallocatedLayer, "_grow", grow)
    pair.check(given, max_new_tokens=20)


def test_idle_caches_are_few(monkeypatch):
    monkeypatch.setattr(graph_pool, "SPARE_BYTES", 0)
    pair = llama()
    pool = pair.ours._dsi.graphs
    for rows in (1, 8, 1, 2, 3, 1):
        pair.check(inputs_for("llama", rows, 6))
        sizes = [block.nbytes for block in pool._blocks]
        assert sum(sizes) - max(sizes) <= pool._spare
        # no graph holds on to memory that was let go, or to a view that no text will have
        held = {graph_pool.place_of(view) for block in pool._blocks for view in block.views.values()}
        assert {place for _, place in pool._graphs} <= held


def test_a_text_too_short_for_a_graph_leaves_the_cache_to_the_next(graphs):
    pair = llama()
    pair.check(inputs_for("llama", 1, 7))
    captured = len(graphs)
    pair.ours.generate(**inputs_for("llama", 1, 7), max_new_tokens=1)
    pair.check(inputs_for("llama", 1, 7))
    assert len(graphs) == captured


@pytest.mark.parametrize(
    ("positions", "rows", "grown", "capacity"),
    [
        (1, 1, False, 256),
        (256, 1, False, 256),
        (257, 1, False, 512),
        (9000, 1, False, 9216),
        (20000, 1, False, 20480),
        # 8 rows take 8 times the memory: together no more than 256 positions are too many
        (160, 8, False, 160),
        (161, 8, False, 192),
        (161, 64, False, 176),
        (161, 3, False, 192),
        (161, 8, True, 256),
        (9000, 8, True, 9216),
        (20000, 8, True, 20480),
    ],
)
def test_capacities(positions, rows, grown, capacity):
    assert graph_pool.rounded(positions, rows, grown=grown) == capacity


def test_texts_that_grow_are_captured_a_few_times(graphs):
    """24 turns of 8 rows, each 12 tokens longer than the one before."""
    pair = llama(max_position_embeddings=512)
    for turn in range(24):
        pair.check(inputs_for("llama", 8, 9 + 12 * turn))
    assert len(graphs) <= 3


def test_a_text_outgrows_its_cache(monkeypatch):
    # the package's function has the module's name
    generate = sys.modules["dsi.runtime.generate"]
    for module in (fast_loop, generate):
        monkeypatch.setattr(module, "RESERVE", 4)
    monkeypatch.setattr(graph_pool, "ROUNDED_TO", 1)
    pair = llama()
    for count in (40, 23, 50):
        pair.check(inputs_for("llama", 2, 6, "left"), max_new_tokens=count)
        pair.check(inputs_for("llama", 1, 6), max_new_tokens=count, eos_token_id=[66], pad_token_id=0)


def test_a_cache_that_was_returned_is_the_callers(graphs):
    pair = llama()
    first = pair.check(inputs_for("llama", 2, 6), return_dict_in_generate=True)
    keys = first.past_key_values.layers[0].keys.clone()
    pair.check(inputs_for("llama", 2, 9, seed=4))
    assert torch.equal(first.past_key_values.layers[0].keys, keys)
    more = torch.cat([first.sequences, torch.full((2, 1), 9)], 1)
    wanted = pair.stock.generate(more, **GREEDY)
    assert torch.equal(pair.ours.generate(more, past_key_values=first.past_key_values, **GREEDY), wanted)
    memory = weakref.ref(first.past_key_values.layers[0])
    del first
    graphs.clear()
    gc.collect()
    assert memory() is None


def test_a_cache_that_is_full_gets_room_first(monkeypatch):
    generate = sys.modules["dsi.runtime.generate"]
    for module in (fast_loop, generate):
        monkeypatch.setattr(module, "RESERVE", 0)
    monkeypatch.setattr(graph_pool, "ROUNDED_TO", 1)
    pair = llama()
    # the prompt fills what was set aside to the last position
    pair.check(inputs_for("llama", 1, 9))
    pair.check(inputs_for("llama", 2, 9, "left"))


def test_nothing_unfilled_is_attended_to(monkeypatch):
    """Buffers are born NaN here; attention that reads all of them and masks the rest would spread it."""
    empty = torch.empty

    def poisoned(*sizes: Any, **options: Any) -> torch.Tensor:
        made = empty(*sizes, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    pair = llama()
    monkeypatch.setattr(torch, "empty", poisoned)
    pair.check(inputs_for("llama", 2, 6, "left"))


def test_positions_beyond_the_cache():
    pair = llama(max_position_embeddings=4096)
    given = inputs_for("llama", 1, 7)
    pair.check({**given, "position_ids": torch.arange(1000, 1007)[None]})
    pair.check(given)


def test_the_rotary_table_of_a_graph_outlives_the_models(graphs):
    pair = llama(max_position_embeddings=2048)
    pair.check(inputs_for("llama", 1, 7))
    table = weakref.ref(pair.ours._dsi.runner.table._rope.cos)
    pair.check(inputs_for("llama", 2, 7), max_new_tokens=400)
    gc.collect()
    # the larger table has taken its place, and the first graph would still read it
    assert table() is not None
    pair.check(inputs_for("llama", 1, 7))
    assert len(graphs) == 2


class Mirrored(nn.Module):
    """A head around the model's own."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    @property
    def weight(self) -> Any:
        return self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.head(x)


def rotary_changed(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def head_wrapped(model: Any) -> None:
    model.lm_head = Mirrored(model.lm_head).eval()


def weights_moved(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data.clone()


@pytest.mark.parametrize("change", [rotary_changed, head_wrapped, weights_moved])
def test_a_changed_model_gets_another_graph(change, graphs):
    pair, given = llama(), inputs_for("llama", 1, 7)
    pair.check(given)
    pair.check(given)
    assert len(graphs) == 1
    for model in (pair.stock, pair.ours):
        change(model)
    pair.check(given)
    assert len(graphs) == 2


def test_rotary_terms_of_the_text_s_length_are_computed_in_the_step(graphs):
    """Texts that pass the length from which the terms are others, and texts after them that do not."""
    pair = Pair(tiny("llama_longrope"))
    for turn, (length, new) in enumerate(((28, 12), (6, 12), (40, 8), (6, 12))):
        pair.check(inputs_for("llama", 2, length, seed=turn), max_new_tokens=new)
    # the module writes to its buffer at each step, and the graph stays right
    assert len(graphs) == 1


def mixture() -> Pair:
    config = MixtralConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Pair(MixtralForCausalLM(config).eval())


def expert_weights_moved(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data = experts.down_proj.data.flip(0).clone()


def test_experts_step_in_graphs(graphs):
    pair = mixture()
    for turn, batch in enumerate((1, 3, 1)):
        pair.check(inputs_for("llama", batch, 7, seed=turn))
    assert len(graphs) == 2
    for model in (pair.stock, pair.ours):
        expert_weights_moved(model)
    pair.check(inputs_for("llama", 1, 7))
    assert len(graphs) == 3


def hooked(experts: nn.Module) -> None:
    experts.register_forward_hook(lambda *_: None)


def patched(experts: nn.Module) -> None:
    experts.forward = lambda *given: type(experts).forward(experts, *given)


@pytest.mark.parametrize(("change", "reason"), [(hooked, "it has forward hooks"), (patched, "its forward is replaced")])
def test_what_watches_the_experts_is_called_at_every_step(change, reason):
    pair = mixture()
    runner, layer = pair.ours._dsi.runner, pair.ours.model.layers[1]
    assert KEPT_OBSTACLE(layer.mlp) == ""
    change(layer.mlp.experts)
    assert KEPT_OBSTACLE(layer.mlp) == f"experts: {reason}"
    for one in runner.model.model.layers:
        # the device's table of operations: no graph is asked for on a CPU
        one.ops_name = "triton"
    assert GRAPH_OBSTACLE(runner) == f"model.layers.1.mlp: experts: {reason}"


def test_inference_mode_or_not():
    pair = llama()
    pair.check(inputs_for("llama", 2, 7))
    with torch.inference_mode():
        pair.check(inputs_for("llama", 2, 7, "left"))
    pair.check(inputs_for("llama", 2, 7, "left"))


def windowed() -> Pair:
    config = MistralConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return Pair(MistralForCausalLM(config).eval())


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"no_repeat_ngram_size": 3}], ids=str)
def test_sliding_windows(arguments, pad):
    """Prompts within the window, of its length, and beyond."""
    pair = windowed()
    for turn, length in enumerate((4, 8, 13)):
        given = {name: x.clamp(max=66) for name, x in inputs_for("llama", 2, length, pad, seed=turn).items()}
        pair.check(given, **arguments)


BIASED = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=67, hidden_size=48, n_layer=2, n_head=6)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            vocab_size=67,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            alibi=True,
        )
    ),
}


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("family", BIASED)
def test_position_biases(family, pad):
    torch.manual_seed(0)
    pair = Pair(BIASED[family]().eval())
    settings = {"return_dict_in_generate": True, "output_logits": True}
    for turn, batch in enumerate((1, 3, 3)):
        given = inputs_for("llama", batch, 5 + turn, pad, seed=turn)
        given = {name: x for name, x in given.items() if name != "position_ids"}
        pair.check(given)
        # what transformers initialises gives small logits, and often one token all along
        one, other = (model.generate(**given, **GREEDY, **settings).logits for model in (pair.stock, pair.ours))
        torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=0, atol=1e-6)
        pair.check(given, num_beams=2)


def test_a_window_much_shorter_than_the_text_keeps_its_own_cache(monkeypatch):
    monkeypatch.setattr(graph_pool, "WHOLE_BELOW", 16)
    pair, given = windowed(), inputs_for("llama", 1, 7)
    pair.check(given, max_new_tokens=9)
    for settings in ({"max_new_tokens": 20}, {"max_new_tokens": 9, "return_dict_in_generate": True}):
        wanted, found = (model.generate(**given, do_sample=False, **settings) for model in (pair.stock, pair.ours))
        assert pair.ours._dsi.last_route.reason == "steps without a graph: a layer keeps another kind of cache"
        if torch.is_tensor(wanted):
            assert torch.equal(wanted, found)
        else:
            shapes = [one.past_key_values.layers[0].keys.shape for one in (wanted, found)]
            assert shapes[0] == shapes[1]


def test_windows_without_a_graph_read_the_window_alone(monkeypatch):
    pair = windowed()
    monkeypatch.setattr(decode.DecodeRunner, "graph_obstacle", lambda self: "not today")
    for turn, pad in enumerate((None, "left")):
        given = inputs_for("llama", 2, 13, pad, seed=turn)
        assert torch.equal(pair.ours.generate(**given, **GREEDY), pair.stock.generate(**given, **GREEDY))
        assert pair.ours._dsi.last_route.reason == "steps without a graph: not today"


def test_a_capture_that_fails_is_told_and_the_text_goes_on(monkeypatch):
    def fails(*_: Any) -> Any:
        raise ValueError("no such launch")

    pair = llama()
    monkeypatch.setattr(step_graph.StepGraph, "_captured", fails)
    given = inputs_for("llama", 1, 7)
    assert torch.equal(pair.ours.generate(**given, **GREEDY), pair.stock.generate(**given, **GREEDY))
    assert "no such launch" in pair.ours._dsi.last_route.reason


def test_calls_inside_calls():
    pair, given = llama(), inputs_for("llama", 1, 7)
    inner = []

    class Asks(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            if not inner:
                inner.append(pair.ours.generate(**inputs_for("llama", 1, 5, seed=8), **GREEDY))
            return torch.zeros(1, dtype=torch.bool)

    outer = pair.ours.generate(**given, **GREEDY, stopping_criteria=StoppingCriteriaList([Asks()]))
    assert torch.equal(outer, pair.stock.generate(**given, **GREEDY))
    assert torch.equal(inner[0], pair.stock.generate(**inputs_for("llama", 1, 5, seed=8), **GREEDY))


def test_copies_have_no_graphs():
    pair, given = llama(), inputs_for("llama", 1, 7)
    pair.check(given)
    copied = copy.deepcopy(pair.ours)
    assert copied._dsi.graphs is None
    assert torch.equal(copied.generate(**given, **GREEDY), pair.stock.generate(**given, **GREEDY))


def test_restore_drops_them(graphs):
    pair, given = llama(), inputs_for("llama", 1, 7)
    pair.check(given)
    graph = weakref.ref(graphs.pop())
    pair.engine.restore()
    gc.collect()
    assert graph() is None
    assert torch.equal(pair.ours.generate(**given, **GREEDY), pair.stock.generate(**given, **GREEDY))


def test_no_memory_for_a_graph_is_told_and_tried_again(monkeypatch, graphs):
    captured = step_graph.StepGraph._captured

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("2 GiB")

    pair, given = llama(), inputs_for("llama", 1, 7)
    monkeypatch.setattr(step_graph.StepGraph, "_captured", fails)
    assert torch.equal(pair.ours.generate(**given, **GREEDY), pair.stock.generate(**given, **GREEDY))
    assert "no memory for a decode graph: 2 GiB" in pair.ours._dsi.last_route.reason
    monkeypatch.setattr(step_graph.StepGraph, "_captured", captured)
    pair.check(given)


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=str,
)
def test_beams_step_in_graphs(arguments, pad, graphs):
    pair = llama()
    forward = pair.ours.__dict__.get("forward")
    for turn in range(2):
        drawn = []
        for model in (pair.stock, pair.ours):
            torch.manual_seed(turn)
            drawn.append(model.generate(**inputs_for("llama", 2, 6, pad, seed=turn), **{**GREEDY, **arguments}))
        assert torch.equal(*drawn)
        assert pair.ours._dsi.last_route.graph
        assert pair.ours.__dict__.get("forward") is forward
    # the second call was lent the first one's cache
    assert len(graphs) == 1


def test_beams_outgrow_their_cache(monkeypatch):
    monkeypatch.setattr(sys.modules["dsi.runtime.generate"], "RESERVE", 4)
    monkeypatch.setattr(graph_pool, "ROUNDED_TO", 1)
    pair = llama()
    pair.check(inputs_for("llama", 2, 6, "left"), num_beams=3, max_new_tokens=30)


def test_scores_of_beams_stay_what_they_are():
    pair, found = llama(), []
    for model in (pair.stock, pair.ours):
        settings = {**GREEDY, "num_beams": 2, "return_dict_in_generate": True, "output_logits": True}
        found.append(model.generate(**inputs_for("llama", 1, 6), **settings))
    for one, other in zip(found[0].logits, found[1].logits, strict=True):
        torch.testing.assert_close(one, other)
    keys = found[1].past_key_values.layers[0].keys.clone()
    pair.check(inputs_for("llama", 1, 7), num_beams=2)
    assert torch.equal(found[1].past_key_values.layers[0].keys, keys)


@torch.no_grad()
def test_tokens_taken_back_between_steps():
    pair = llama()
    steps = step_forward.step_forward(pair.ours, pair.ours._dsi, {})
    ids, found = torch.arange(5, 25)[None], []
    for forward in (steps, pair.stock):
        cache = PreallocatedCache()
        logits = [forward(input_ids=ids[:, :9], past_key_values=cache).logits[:, -1:]]
        for begin, end, crop in ((9, 10, 0), (10, 11, 0), (11, 14, 2), (12, 13, 0), (13, 14, 1), (13, 14, 0)):
            given = {"input_ids": ids[:, begin:end], "attention_mask": torch.ones(1, end, dtype=torch.int64)}
            logits.append(forward(**given, past_key_values=cache).logits[:, -1:])
            cache.crop(-crop)
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found)
    assert steps.taken == 5


@torch.no_grad()
def test_keys_that_somebody_exchanged_between_steps():
    """And buffers that moved, as of a layer that was full."""
    pair = llama()
    steps = step_forward.step_forward(pair.ours, pair.ours._dsi, {})
    ids, found = torch.arange(5, 25)[None], []
    for forward in (steps, pair.stock):
        cache = PreallocatedCache()
        logits = [forward(input_ids=ids[:, :9], past_key_values=cache).logits[:, -1:]]
        for at in range(9, 13):
            given = {"input_ids": ids[:, at : at + 1], "attention_mask": torch.ones(1, at + 1, dtype=torch.int64)}
            logits.append(forward(**given, past_key_values=cache).logits[:, -1:])
            for layer in cache.layers:
                if at == 10:
                    layer.keys, layer.values = 0.5 * layer.keys, layer.values.flip(2).clone()
                if at == 11:
                    layer.make_room(200)
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found)
    assert steps.taken == 4


def test_an_assistant_may_be_injected_too():
    pair, helper = llama(), tiny("llama", seed=7, num_hidden_layers=1)
    dsi.init_inference(helper)
    helper._dsi.graphs = graph_pool.GraphPool()
    given = inputs_for("llama", 1, 9)
    for _ in range(2):
        wanted = pair.stock.generate(**given, **GREEDY, assistant_model=helper)
        assert torch.equal(pair.ours.generate(**given, **GREEDY, assistant_model=helper), wanted)


def test_a_cache_too_small_goes_before_the_larger_one_comes(graphs, monkeypatch):
    pair, alive = llama(max_position_embeddings=2048), []
    pair.check(inputs_for("llama", 1, 7))
    graphs.clear()
    small = weakref.ref(pair.ours._dsi.graphs._blocks[0]._flat[0][0])
    made = graph_pool.PreallocatedCache.of

    def watched(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        alive.append(small() is not None)
        return made(*args, **kwargs)

    monkeypatch.setattr(graph_pool.PreallocatedCache, "of", watched)
    pair.check(inputs_for("llama", 1, 7), max_new_tokens=400)
    assert alive == [False]
    assert len(pair.ours._dsi.graphs._graphs) == 1


def test_hidden_states_of_beams_are_the_models_own():
    pair = llama()
    settings = {"num_beams": 2, "return_dict_in_generate": True, "output_hidden_states": True}
    found = pair.ours.generate(**inputs_for("llama", 1, 6), **GREEDY, **settings)
    assert len(found.hidden_states) == 12
    assert not pair.ours._dsi.last_route.graph
