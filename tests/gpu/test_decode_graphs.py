"""Decode steps as CUDA graphs: the same tokens as stock, whatever came before and whatever comes after."""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import pytest
import torch
import transformers

import dsi
from dsi.runtime import graph_pool
from tests.support.models import CAUSAL, inputs_for, tiny

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# their rotary terms depend on the length of the text, which the host is asked for
WAITS = ("llama_dynamic",)


class Pair:
    """A stock model and an injected copy of it, both on the device."""

    def __init__(self, family: str, **settings: Any) -> None:
        self.family = family
        self.stock = tiny(family, **settings).to(DEVICE)
        self.ours = copy.deepcopy(self.stock)
        self.engine = dsi.init_inference(self.ours)

    def inputs(self, batch: int = 1, seq: int = 7, pad: Any = None, seed: int = 0) -> dict[str, Any]:
        return {name: x.to(DEVICE) for name, x in inputs_for(self.family, batch, seq, pad, seed=seed).items()}

    def check(self, given: dict[str, Any], **arguments: Any) -> Any:
        """Both generate the same, in graphs; returns dsi's result."""
        settings = {"max_new_tokens": 12, "do_sample": False, **arguments}
        wanted, found = self.stock.generate(**given, **settings), self.engine.generate(**given, **settings)
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(found, wanted)
        else:
            assert torch.equal(found.sequences, wanted.sequences)
        route = self.ours._dsi.last_route
        if self.family in WAITS:
            assert "capturing a decode step failed" in route.reason
        else:
            assert route.graph, route.reason
        return found


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """fp32 products in fp32, on both sides."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("family", CAUSAL)
def test_greedy(family: str, batch: int, pad: Any) -> None:
    pair = Pair(family)
    for turn in range(3):
        pair.check(pair.inputs(batch, 5 + 3 * turn, pad, seed=turn))


@pytest.mark.parametrize("watched", [False, True])
def test_end_tokens(watched: bool) -> None:
    pair = Pair("llama")
    given = pair.inputs(3, 6, "left")
    free = pair.stock.generate(**given, max_new_tokens=12, do_sample=False)
    # tokens that come early in one row and late in another
    ends = [int(free[0, 7]), int(free[1, 10]), int(free[2, 9])]
    for model in (pair.stock, pair.ours):
        model.generation_config.pad_token_id = 0
    streamed = [_Recorder() if watched else None for _ in range(2)]
    for count in range(1, 4):
        pair.check(given, eos_token_id=ends[:count])
    if watched:
        one = pair.inputs(1, 6)
        for model, streamer in zip((pair.stock, pair.ours), streamed, strict=True):
            model.generate(**one, eos_token_id=ends, max_new_tokens=9, do_sample=False, streamer=streamer)
        assert streamed[0].tokens == streamed[1].tokens
        assert streamed[1].ended


class _Recorder:
    def __init__(self) -> None:
        self.tokens, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.view(-1).tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"return_dict_in_generate": True},
        {"min_new_tokens": 5},
    ],
    ids="+".join,
)
def test_processors_and_records(arguments: dict[str, Any]) -> None:
    pair = Pair("llama")
    pair.check(pair.inputs(2, 6), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"top_k": 0},
        {"top_k": 9},
        {"top_k": 0, "top_p": 0.7, "temperature": 0.8},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
        {"top_k": 9, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_a_seed_samples_what_stock_samples(arguments: dict[str, Any]) -> None:
    """The same tokens, and after them the same random numbers, where a text is cut and where it ends."""
    pair = Pair("llama")
    given, stop = pair.inputs(2, 7, "left"), None
    pair.stock.generation_config.pad_token_id = pair.ours.generation_config.pad_token_id = 0
    for turn in range(2):
        drawn = []
        for model in (pair.stock, pair.ours, pair.ours):
            torch.manual_seed(3)
            ids = model.generate(**given, **arguments, do_sample=True, max_new_tokens=12, eos_token_id=stop)
            drawn.append((ids, torch.rand(2, device=DEVICE)))
        for ids, after in drawn[1:]:
            assert torch.equal(ids, drawn[0][0])
            assert torch.equal(after, drawn[0][1])
        assert pair.ours._dsi.last_route.graph
        if turn == 0:
            stop = [int(drawn[0][0][0, 10]), int(drawn[0][0][1, 12])]


@pytest.mark.parametrize("rows", [33, 65, 256])
def test_many_rows(rows: int) -> None:
    pair = Pair("llama")
    pair.check(pair.inputs(rows, 6))


def _mixture(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=67, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, **settings,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval().to(DEVICE, torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_experts_step_in_graphs(batch: int) -> None:
    """The step of the graph is the step without it: the same logits, but for the order of sums."""
    model = _mixture()
    engines = [dsi.init_inference(copy.deepcopy(model), enable_cuda_graph=on) for on in (False, None)]
    ids = torch.randint(4, 67, (batch, 7), device=DEVICE)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for _ in range(2):
        without, within = (one.generate(ids, **settings) for one in engines)
        route = engines[1].module._dsi.last_route
        assert route.graph, route.reason
        torch.testing.assert_close(within.logits[0], without.logits[0], rtol=0, atol=0.02)
        same = (within.sequences == without.sequences).cumprod(1)[:, 7:].T
        for step, (one, other) in enumerate(zip(within.logits, without.logits, strict=True)):
            rows = same[step - 1].bool() if step else slice(None)
            torch.testing.assert_close(one[rows], other[rows], rtol=0, atol=0.02)


def test_experts_that_wait_for_the_host_step_without_a_graph() -> None:
    model = _mixture(experts_implementation="eager")
    engine = dsi.init_inference(copy.deepcopy(model))
    ids = torch.randint(4, 67, (1, 7), device=DEVICE)
    for _ in range(2):
        found = engine.generate(ids, max_new_tokens=12, do_sample=False)
        route = engine.module._dsi.last_route
        assert not route.graph
        assert "capturing a decode step failed" in route.reason
    assert found.shape == (1, 19)
    # the device's random numbers can be drawn again after it
    torch.rand(2, device=DEVICE)


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str)
def test_beams(arguments: dict[str, Any], pad: Any) -> None:
    pair, drawn = Pair("llama"), []
    for turn in range(2):
        drawn = []
        for model in (pair.stock, pair.ours):
            torch.manual_seed(turn)
            settings = {"do_sample": False, "max_new_tokens": 12, **arguments}
            settings |= {"return_dict_in_generate": True, "output_logits": True}
            drawn.append(model.generate(**pair.inputs(2, 6, pad, seed=turn), **settings))
        assert torch.equal(*(one.sequences for one in drawn))
        # those of one step are not the next one's
        for one, other in zip(*(one.logits for one in drawn), strict=True):
            torch.testing.assert_close(one, other)
        assert pair.ours._dsi.last_route.graph


@pytest.mark.parametrize("length", [4, 13])
def test_sliding_windows(length: int) -> None:
    config = transformers.MistralConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = transformers.MistralForCausalLM(config).eval().to(DEVICE)
    ours = copy.deepcopy(stock)
    dsi.init_inference(ours)
    given = {"input_ids": torch.randint(4, 60, (2, length), device=DEVICE), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(ours.generate(**given), stock.generate(**given))
    assert ours._dsi.last_route.graph, ours._dsi.last_route.reason


def test_a_text_outgrows_its_cache(monkeypatch: Any) -> None:
    # the package's function has the module's name
    for module in ("fast_loop", "generate"):
        monkeypatch.setattr(sys.modules[f"dsi.runtime.{module}"], "RESERVE", 4)
    monkeypatch.setattr(graph_pool, "ROUNDED_TO", 1)
    pair = Pair("llama")
    for count in (40, 23, 50):
        pair.check(pair.inputs(2, 6, "left"), max_new_tokens=count)
        pair.check(pair.inputs(1, 6), max_new_tokens=count, eos_token_id=[66])


def test_what_was_returned_stays_what_it_was() -> None:
    pair = Pair("llama")
    first = pair.check(pair.inputs(2, 6), return_dict_in_generate=True)
    keys, ids = first.past_key_values.layers[0].keys.clone(), first.sequences.clone()
    pair.check(pair.inputs(2, 9, seed=4))
    assert torch.equal(first.past_key_values.layers[0].keys, keys)
    assert torch.equal(first.sequences, ids)
    # and can be gone on from
    more = torch.cat([first.sequences, torch.full((2, 1), 9, device=DEVICE)], 1)
    again = pair.engine.generate(more, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, pair.stock.generate(more, max_new_tokens=6, do_sample=False))


def test_other_weights() -> None:
    pair, other = Pair("llama"), tiny("llama", seed=5).to(DEVICE)
    given = pair.inputs(1, 6)
    pair.check(given)
    for model in (pair.stock, pair.ours):
        model.load_state_dict(other.state_dict())
    pair.check(given)
    pair.engine.restore()
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(pair.ours.generate(**given, **settings), pair.stock.generate(**given, **settings))


def test_any_order_of_shapes() -> None:
    pair, order = Pair("gpt2"), random.Random(0)
    for turn in range(40):
        batch, seq = order.choice([1, 2, 4, 8]), order.randint(1, 20)
        pair.check(
            pair.inputs(batch, seq, order.choice([None, "left"]), seed=turn), max_new_tokens=order.randint(5, 15)
        )


def test_replays_are_equal_bit_for_bit() -> None:
    pair = Pair("llama", dtype=torch.bfloat16)
    given = pair.inputs(1, 9)
    settings = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = pair.engine.generate(**given, **settings).logits
    for _ in range(20):
        again = pair.engine.generate(**given, **settings).logits
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_memory_is_flat_and_given_back() -> None:
    transformers.set_seed(0)
    pair = Pair("llama")
    torch.cuda.synchronize()
    sizes = []
    for turn in range(30):
        pair.engine.generate(**pair.inputs(1 + turn % 3, 4 + turn % 5), max_new_tokens=8, do_sample=False)
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())
    assert len(set(sizes[15:])) == 1
    before = sizes[-1]
    pair.engine.restore()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < before


def test_a_text_begins_while_the_device_is_at_its_prompt() -> None:
    pair = Pair("llama")
    given = pair.inputs(2, 6)
    pair.ours.generate(**given, do_sample=True, max_new_tokens=9, eos_token_id=[66], pad_token_id=0)
    (graph,) = pair.ours._dsi.graphs._graphs.values()
    tokens, pad = torch.ones(2, dtype=torch.int64, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.begin(tokens, 6, 6, None)
        graph.set_ends([66], pad)
        graph.set_sampling((1.0,) * 6, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graph.counters.tolist() == [6, 7, 1]
    assert graph.ends.tolist() == [66]


def test_without_graphs_if_asked() -> None:
    stock = tiny("llama").to(DEVICE)
    engine = dsi.init_inference(copy.deepcopy(stock), enable_cuda_graph=False)
    given = {name: x.to(DEVICE) for name, x in inputs_for("llama", 2, 6, "left").items()}
    settings = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(engine.generate(**given, **settings), stock.generate(**given, **settings))
    assert not engine.module._dsi.last_route.graph


def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch: Any) -> None:
    from dsi.runtime.step_graph import StepGraph

    run, calls = StepGraph._run, []

    def reads_back(self: StepGraph) -> torch.Tensor:
        logits = run(self)
        calls.append(1)
        # the warm-up may, the capture may not
        return logits if len(calls) == 1 else logits * float(logits.sum())

    monkeypatch.setattr(StepGraph, "_run", reads_back)
    stock = tiny("llama").to(DEVICE)
    engine = dsi.init_inference(copy.deepcopy(stock))
    given = {name: x.to(DEVICE) for name, x in inputs_for("llama", 2, 6).items()}
    settings = {"max_new_tokens": 9, "do_sample": False}
    stream = torch.cuda.current_stream()
    assert torch.equal(engine.generate(**given, **settings), stock.generate(**given, **settings))
    assert torch.cuda.current_stream() == stream
    assert "capturing a decode step failed" in engine.module._dsi.last_route.reason
    # random numbers, and captures, go on
    assert torch.randn(4, device=DEVICE).isfinite().all()
    engine.generate(**given, do_sample=True, max_new_tokens=5)
