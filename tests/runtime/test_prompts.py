"""The way from `generate` to the first token: past the model's own forward, as a graph, and when neither may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dsi.containers import launches
from dsi.runtime import prompt_graph, prompt_start
from dsi.runtime.forward import Forward
from dsi.runtime.prompt_graph import bucket
from dsi.runtime.prompt_pass import PromptPass
from tests.runtime.test_graph_steps import BIASED, GREEDY, Nothing, Pair, graphs, llama, windowed  # noqa: F401
from tests.support.models import CAUSAL, inputs_for, tiny

BIASED_AND_PADDED = "the scores have position biases, and some of the prompt is padding"


class Replayed:
    """Stands for a captured graph: runs anew, into the memory of the first result."""

    def __init__(self, run: Any, result: torch.Tensor) -> None:
        self.run, self.result = run, result

    def replay(self) -> None:
        with launches.graph_kernels():
            self.result.copy_(self.run())


@pytest.fixture
def prompts(monkeypatch: Any) -> list[Replayed]:
    """Every prompt that was captured; each waits for the host."""
    made: list[Replayed] = []

    def capture(run: Any, device: Any, pool: Any) -> tuple[Any, Any]:
        with torch.no_grad(), launches.graph_kernels():
            made.append(Replayed(run, run()))
        return made[-1], made[-1].result

    monkeypatch.setattr(prompt_graph, "capture", capture)
    monkeypatch.setattr(prompt_graph, "end_failed_capture", lambda device: None)
    monkeypatch.setattr(Nothing, "elapsed_time", lambda self, other: 0.0)
    return made


@pytest.fixture
def forwards(monkeypatch: Any) -> list[Any]:
    """Every call of a model's own forward."""
    called: list[Any] = []
    call = Forward.__call__

    def counted(self: Forward, *args: Any, **kwargs: Any) -> Any:
        called.append(kwargs)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Forward, "__call__", counted)
    return called


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_prompt_goes_past_the_models_own_forward(family, rows, forwards):
    pair = Pair(tiny(family))
    for seed, length in enumerate((7, 1, 12)):
        pair.check(inputs_for(family, rows, length, seed=seed))
        route = pair.ours._dsi.last_prompt
        assert route.own
    assert not forwards
    assert all(layer.stock_calls == 0 for layer in pair.ours.modules() if hasattr(layer, "stock_calls"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_its_logits_are_the_models_own(family):
    pair = Pair(tiny(family))
    for given in (inputs_for(family, 2, 9), inputs_for(family, 2, 9, seed=1)):
        settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
        wanted, found = (model.generate(**given, **settings) for model in (pair.stock, pair.ours))
        torch.testing.assert_close(found.logits[0], wanted.logits[0], rtol=1e-5, atol=1e-5)
        assert pair.ours._dsi.last_prompt.own
        for one, other in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
            torch.testing.assert_close(one.keys[:, :, :9], other.keys[:, :, :9], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(one.values[:, :, :9], other.values[:, :, :9], rtol=1e-5, atol=1e-5)


def test_positions_that_are_given_are_those_of_their_rows():
    pair, given = llama(), inputs_for("llama", 2, 6)
    given["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]])
    pair.check(given)
    assert pair.ours._dsi.last_prompt.own


def test_positions_are_counted_as_stock_counts_the_numbers_of_a_mask(prompts):
    pair = llama()
    given = inputs_for("llama", 2, 9)
    given["attention_mask"] = torch.tensor([[2], [1]]).expand(2, 9).contiguous()
    for _ in range(2):
        pair.check(given)
        assert pair.ours._dsi.last_prompt.own
    assert not prompts


def test_a_prompt_beyond_a_window_takes_the_models_own_forward(prompts):
    """Its mask is the model's to make; within the window there is no more to mask than the causal order."""
    pair = windowed()
    for turn, length in enumerate((8, 7, 9, 13, 8)):
        given = {name: x.clamp(max=66) for name, x in inputs_for("llama", 2, length, seed=turn).items()}
        pair.check(given)
        assert pair.ours._dsi.last_prompt.own is (length <= 8)
        if length > 8:
            assert pair.ours._dsi.last_prompt.reason == "the prompt is longer than a layer's window"


@pytest.mark.parametrize("family", CAUSAL)
def test_a_ragged_prompt_is_computed_without_its_padding(family, forwards):
    pair = Pair(tiny(family))
    for seed, length in enumerate((7, 5, 12)):
        given = inputs_for(family, 3, length, "left", seed=seed)
        assert not given["attention_mask"].all()
        pair.check(given)
        route = pair.ours._dsi.last_prompt
        assert (route.own and "padding" in route.reason) or route.reason == BIASED_AND_PADDED
    assert len(forwards) == (0 if route.own else 3)


@pytest.mark.parametrize("family", BIASED)
def test_prompts_of_scores_with_biases(family, prompts, forwards, monkeypatch):
    torch.manual_seed(0)
    pair = Pair(BIASED[family]().eval())
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    for turn, (rows, length) in enumerate(((1, 9), (3, 17), (1, 12), (1, 10), (3, 20))):
        given = {"input_ids": inputs_for("llama", rows, length, seed=turn)["input_ids"]}
        wanted, found = (model.generate(**given, **settings) for model in (pair.stock, pair.ours))
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=0, atol=1e-6)
        route = pair.ours._dsi.last_prompt
        assert route.own
        assert route.graph is (turn > 1)
    assert not forwards
    assert len(prompts) == 2
    monkeypatch.setattr(prompt_start, "MOST_BIASED", 16)
    pair.check(given)
    assert pair.ours._dsi.last_prompt.reason == "biases of more than 16 positions are not held for a graph"
    assert pair.ours._dsi.last_prompt.own


def test_a_ragged_prompts_logits_are_the_models_own():
    pair = llama()
    given = inputs_for("llama", 3, 9, "left")
    # holes too
    given["attention_mask"][1, 5] = 0
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    wanted, found = (model.generate(**given, **settings) for model in (pair.stock, pair.ours))
    assert pair.ours._dsi.last_prompt.own
    assert torch.equal(wanted.sequences, found.sequences)
    shown = given["attention_mask"].bool()
    for one, other in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        for ours, stocks in ((one.keys, other.keys), (one.values, other.values)):
            ours, stocks = (x[:, :, :9].transpose(1, 2) for x in (ours, stocks))
            torch.testing.assert_close(ours[shown], stocks[shown], rtol=1e-5, atol=1e-5)
            assert not ours[~shown].any()


def ends_with_padding(pair: Pair) -> dict[str, Any]:
    return inputs_for("llama", 3, 6, "right")


def embedded(pair: Pair) -> dict[str, Any]:
    ids = inputs_for("llama", 2, 6)["input_ids"]
    return {"inputs_embeds": pair.stock.get_input_embeddings()(ids).detach()}


def continued(pair: Pair) -> dict[str, Any]:
    given = inputs_for("llama", 1, 9)
    one = {name: x[:, :6] for name, x in given.items()}
    cache = pair.ours.generate(**one, **GREEDY | {"max_new_tokens": 1}, return_dict_in_generate=True).past_key_values
    return {**given, "past_key_values": cache}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (ends_with_padding, "ends with padding"),
        (embedded, "argument inputs_embeds"),
        (continued, "positions in the cache"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_takes_the_models_own_forward_says_why(how, words, forwards):
    pair = llama()
    given = how(pair)
    before = len(forwards)
    found = pair.ours.generate(**given, **GREEDY)
    given.pop("past_key_values", None)
    assert torch.equal(found, pair.stock.generate(**given, **GREEDY))
    assert words in pair.ours._dsi.last_prompt.reason
    assert not pair.ours._dsi.last_prompt.own
    assert len(forwards) == before + 1


def test_a_cpu_takes_the_models_own_forward(forwards):
    pair = llama()
    pair.ours._dsi.graphs = None
    pair.ours.generate(**inputs_for("llama", 1, 6), **GREEDY)
    assert pair.ours._dsi.last_prompt.reason == "the model is on no GPU"
    assert len(forwards) == 1


# --- graphs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "least"), [(1, 16), (16, 16), (17, 32), (100, 112), (129, 144), (513, 576)])
def test_buckets(length, least):
    assert bucket(length) == least
    assert bucket(least) == least


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "llama_mha"])
def test_a_prompt_is_a_graph_from_its_second_call_on(family, rows, prompts, graphs):  # noqa: F811
    pair = Pair(tiny(family))
    for turn, length in enumerate((9, 12, 3, 16, 1, 7)):
        pair.check(inputs_for(family, rows, length, seed=turn))
        assert pair.ours._dsi.last_prompt.graph is (turn > 0)
    # one for all lengths of a bucket, and the steps' is still the first
    assert len(prompts) == len(graphs) == 1
    # a longer one has its own, and gives way
    for turn, length in enumerate((20, 9, 31)):
        pair.check(inputs_for(family, rows, length, seed=turn))
        assert pair.ours._dsi.last_prompt.graph is (turn > 0)
    assert len(prompts) == 2


def test_what_stood_behind_the_prompt_is_never_read(prompts):
    """Ids and keys of a longer text before, under a shorter one that grows over them."""
    pair = llama()
    for turn, (length, new) in enumerate([(9, 5), (16, 5), (2, 30), (15, 4), (1, 40)]):
        pair.check(inputs_for("llama", 2, length, seed=turn), max_new_tokens=new)
    assert pair.ours._dsi.last_prompt.graph
    assert len(prompts) >= 1


def test_a_shorter_graph_after_a_longer_one(prompts):
    pair = llama()
    for turn, length in enumerate((31, 30, 9, 9, 31)):
        pair.check(inputs_for("llama", 1, length, seed=turn))
    assert len(prompts) == 2
    assert pair.ours._dsi.last_prompt.graph


def test_one_new_token_keeps_its_graph(prompts):
    pair = llama()
    for turn in range(4):
        given = inputs_for("llama", 1, 9, seed=turn)
        assert torch.equal(*(m.generate(**given, max_new_tokens=1, do_sample=False) for m in (pair.stock, pair.ours)))
    assert pair.ours._dsi.last_prompt.graph
    assert len(prompts) == 1


def test_a_returned_cache_is_never_written_to_again(prompts):
    pair = llama()
    for turn in range(3):
        pair.check(inputs_for("llama", 1, 9, seed=turn))
    assert pair.ours._dsi.last_prompt.graph
    found = pair.check(inputs_for("llama", 1, 9, seed=5), return_dict_in_generate=True)
    assert pair.ours._dsi.last_prompt.graph
    kept = [layer.keys.clone() for layer in found.past_key_values.layers]
    for turn in range(3):
        pair.check(inputs_for("llama", 1, 12, seed=turn))
    assert all(torch.equal(one, layer.keys) for one, layer in zip(kept, found.past_key_values.layers, strict=True))


def test_a_cache_that_is_brought_has_no_graph(prompts):
    pair = llama()
    for turn in range(3):
        given = inputs_for("llama", 1, 9, seed=turn)
        wanted, cache = pair.stock.generate(**given, **GREEDY), DynamicCache(config=pair.ours.config)
        assert torch.equal(pair.ours.generate(**given, **GREEDY, past_key_values=cache), wanted)
        assert pair.ours._dsi.last_prompt.own
        assert pair.ours._dsi.last_prompt.reason == "the cache is the caller's"
        assert cache.get_seq_length() == wanted.shape[1] - 1
    assert not prompts


def test_another_cache_gets_another_graph(prompts):
    pair = llama()
    for turn in range(3):
        pair.check(inputs_for("llama", 1, 9, seed=turn))
    # the memory is gone, and the graph is not
    pair.ours._dsi.graphs._blocks.clear()
    pair.check(inputs_for("llama", 1, 9, seed=5))
    assert pair.ours._dsi.last_prompt.graph
    assert len(prompts) == 2


def test_terms_that_depend_on_the_texts_length_have_no_graph(prompts):
    """A bucket is longer than its text."""
    pair = Pair(tiny("llama_dynamic"))
    for turn, length in enumerate((9, 10, 17, 18, 9)):
        pair.check(inputs_for("llama_dynamic", 1, length, seed=turn))
        assert pair.ours._dsi.last_prompt.own
        assert pair.ours._dsi.last_prompt.reason == "the rotary terms depend on the text's length"
    assert not prompts


def test_positions_that_are_given_have_no_graph(prompts):
    pair = llama()
    for turn in range(3):
        given = inputs_for("llama", 1, 6, seed=turn) | {"position_ids": torch.tensor([[3, 4, 5, 6, 7, 8]])}
        pair.check(given)
        assert pair.ours._dsi.last_prompt.reason == "positions are given"
    assert not prompts


def test_other_weights_get_other_graphs(prompts):
    pair = llama()
    for turn in range(3):
        pair.check(inputs_for("llama", 1, 9, seed=turn))
    other = torch.randn_like(pair.stock.get_output_embeddings().weight)
    for model in (pair.stock, pair.ours):
        model.get_output_embeddings().weight = torch.nn.Parameter(other.clone(), requires_grad=False)
    for turn in range(3):
        pair.check(inputs_for("llama", 1, 9, seed=turn))
    assert len(prompts) == 2
    assert pair.ours._dsi.last_prompt.graph


def test_graphs_are_few_and_caches_go(prompts, monkeypatch):
    monkeypatch.setattr(prompt_graph, "KEPT", 2)
    pair = llama(max_position_embeddings=512)
    for _ in range(2):
        for length in (9, 20, 40):
            pair.check(inputs_for("llama", 1, length))
    pool = pair.ours._dsi.graphs
    assert len(pool.prompts._graphs) == 2
    old = {place for place, _ in pool.prompts._graphs.values()}
    # no room in the kept memory: it goes, and its graphs with it
    pair.check(inputs_for("llama", 1, 9), max_new_tokens=300)
    assert not old & {place for place, _ in pool.prompts._graphs.values()}


def test_a_capture_that_fails_is_told_and_not_tried_again(prompts, monkeypatch):
    pair, tried = llama(), []

    def fails(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("no such stream")

    monkeypatch.setattr(prompt_graph, "capture", fails)
    for turn in range(4):
        pair.check(inputs_for("llama", 1, 9, seed=turn))
    assert pair.ours._dsi.last_prompt.own
    assert "no such stream" in pair.ours._dsi.last_prompt.reason
    assert tried == [1]


def test_a_prompt_that_the_device_takes_long_for_has_none(prompts, monkeypatch):
    monkeypatch.setattr(Nothing, "elapsed_time", lambda self, other: 1e9)
    pair = llama()
    for turn in range(3):
        pair.check(inputs_for("llama", 1, 9, seed=turn))
    assert pair.ours._dsi.last_prompt.reason == "the device is the limit"
    assert not prompts


@pytest.mark.parametrize(("rows", "tokens"), [(1, 2048), (32, 16)])
def test_a_prompt_of_too_many_rows_or_tokens_has_none(rows, tokens, prompts, monkeypatch):
    monkeypatch.setattr(prompt_graph, "ROWS", rows)
    monkeypatch.setattr(prompt_graph, "MOST", tokens)
    pair = llama()
    for turn in range(3):
        pair.check(inputs_for("llama", 2, 9, seed=turn))
    assert pair.ours._dsi.last_prompt.reason == f"more than {rows} rows, or {tokens} tokens"
    assert not prompts


@pytest.mark.parametrize(("rows", "length"), [(1, 9), (2, 16)])
def test_the_last_place_is_taken(rows, length, prompts, monkeypatch):
    """Of a prompt with others behind it, the logits of its own last token; before there is a graph as from it."""
    pair = llama()
    seen = []
    logits = PromptPass.logits

    def watched(self: PromptPass, ids: Any, *args: Any) -> Any:
        seen.append((ids.shape[1], launches.IN_GRAPH.get()))
        return logits(self, ids, *args)

    monkeypatch.setattr(prompt_start.PromptPass, "logits", watched)
    for turn in range(2):
        pair.check(inputs_for("llama", rows, length, seed=turn))
    assert seen == [(16, True)] * 3


def test_rotary_terms_that_depend_on_the_length_are_of_the_prompts_own(prompts):
    """The graph's length would choose others: it is beyond the length from which they change, the prompt is not."""
    pair = Pair(tiny("llama_longrope"))
    for seed in range(3):
        pair.check(inputs_for("llama", 1, 31, seed=seed))
    assert not prompts
    assert "rotary terms depend" in pair.ours._dsi.last_prompt.reason


def test_no_graph_is_longer_than_the_positions_that_there_are(prompts):
    pair = Pair(tiny("gpt2", n_positions=47))
    assert bucket(35) == 48
    for seed in range(3):
        pair.check(inputs_for("gpt2", 1, 35, seed=seed))
    assert not prompts
    assert "longer than the positions" in pair.ours._dsi.last_prompt.reason
    for seed in range(2):
        pair.check(inputs_for("gpt2", 1, 17, seed=seed))
    assert len(prompts) == 1
