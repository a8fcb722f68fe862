"""Forwards as graphs, with a stand-in for the capture: what is replayed for whom, what is copied, what is refused.

The stand-in runs the forward anew at each replay and writes into the first results' memory, as a graph would.
`tests/gpu/test_forward_graphs.py` has the real capture.
"""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dsi
from dsi.containers.launches import IN_GRAPH
from dsi.containers.packing import Packing
from dsi.runtime import forward_graph, forward_pool
from dsi.runtime.trees import tensors
from dsi_kernels._pdl import SWITCH
from tests.support.models import inputs_for, tiny

FAMILIES = ("bert", "roberta", "distilbert", "clip_text")


class Replayed:
    """Stands for a captured graph."""

    def __init__(self, run: Any) -> None:
        self.run, self.result = run, run()

    def replay(self) -> None:
        with torch.no_grad():
            for old, new in zip(tensors(self.result), tensors(self.run()), strict=True):
                old.copy_(new)


class Nothing:
    """Stands for events and streams."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 1.0


@pytest.fixture(autouse=True)
def graphs(monkeypatch: Any) -> list[Replayed]:
    """Everything that was captured, newest last."""
    import dsi_kernels

    made: list[Replayed] = []

    def capture(run: Any, device: Any, pool: Any) -> tuple[Any, Any]:
        with torch.inference_mode(False), torch.no_grad():
            one = Replayed(run)
        # a graph of the inputs' kernel has no result
        made.extend([one] if one.result is not None else [])
        return one, one.result

    monkeypatch.setattr(dsi_kernels, "input_flags", dsi_kernels.input_flags_reference)
    monkeypatch.setattr(forward_graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Event", Nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
    monkeypatch.setattr(torch.cuda, "synchronize", Nothing)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    monkeypatch.setattr(forward_pool, "end_failed_capture", lambda device: None)
    return made


class Pair:
    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.stock, self.ours = model, copy.deepcopy(model)
        self.engine = dsi.init_inference(self.ours, **options)
        self.ours._dsi.on_cuda = True

    @property
    def route(self) -> Any:
        return self.ours._dsi.last_forward

    def check(self, given: dict[str, Any], *, graph: bool | None = True) -> Any:
        """Equal where a token stands; returns dsi's result."""
        with torch.inference_mode():
            wanted, found = self.stock(**given), self.engine(**given)
        shown = given.get("attention_mask", torch.ones_like(given["input_ids"])) != 0
        ones, others = tensors(found), tensors(wanted)
        assert len(ones) == len(others)
        for one, other in zip(ones, others, strict=True):
            if one.shape[:2] == shown.shape:
                one, other = one[shown], other[shown]
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert graph is None or self.route.graph is graph, self.route
        return found


def given_to(family: str, batch: int, length: int, seed: int = 0, *, padded: bool = False) -> dict[str, Any]:
    given = inputs_for(family, batch, length, seed=seed)
    mask = torch.ones_like(given["input_ids"])
    if padded:
        for row in range(batch):
            mask[row, max(1, length * (row + 1) // (2 * batch)) :] = 0
    return {**given, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_structure_is_a_graph_from_its_second_call_on(family, graphs):
    pair = Pair(tiny(family))
    pair.check(given_to(family, 2, 9), graph=False)
    assert pair.route.reason == "the first call of this structure"
    for seed in range(1, 4):
        pair.check(given_to(family, 2, 9, seed))
    assert len(graphs) == 1


@pytest.mark.parametrize("mask", ["none", "full", "padded", "padding first"])
def test_the_first_call_launches_what_the_graph_holds(mask, monkeypatch):
    """The kernels of a graph, in the graph's form, none of them early: so the bits are those of later calls."""
    pair, seen = Pair(tiny("bert")), []
    given = given_to("bert", 4, 16, padded=mask.startswith("pad"))
    if mask == "none":
        del given["attention_mask"]
    elif mask == "padding first":
        given["attention_mask"] = given["attention_mask"].flip(1)
    layer, run = pair.ours.encoder.layer[0], type(pair.ours.encoder.layer[0]).run

    def watched(self: Any, call: Any) -> Any:
        if self is layer:
            seen.append((IN_GRAPH.get(), SWITCH.get(), call.packed is not None, call.mask is not None))
        return run(self, call)

    monkeypatch.setattr(type(layer), "run", watched)
    first = [x.clone() for x in tensors(pair.check(given, graph=False))]
    form = mask == "padded", mask == "padding first"
    assert seen[-1] == (True, False, *form)
    assert pair.route.packed is form[0]
    for _ in range(2):
        assert all(map(torch.equal, tensors(pair.check(given)), first))


def test_a_launch_that_fails_leaves_the_call_to_the_model(monkeypatch, caplog):
    """Once: the structure is not tried again. An error of the model's own is raised, and forgotten."""
    pair, tries = Pair(tiny("bert")), []

    def fails(*_: Any) -> Any:
        tries.append(1)
        raise ValueError("no such kernel")

    monkeypatch.setattr(forward_pool.ForwardPool, "_launched", fails)
    wrong = {**given_to("bert", 2, 9), "token_type_ids": torch.zeros(7, 5, dtype=torch.long)}
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"size|expand"):
        pair.ours(**wrong)
    assert not pair.ours._dsi.forwards._failed
    for seed in range(3):
        pair.check(given_to("bert", 2, 9, seed), graph=False)
        assert "no such kernel" in pair.route.reason
    assert len(tries) == 2
    assert caplog.text.count("no such kernel") == 1


@pytest.mark.parametrize(
    ("host", "device", "graph"),
    [
        (0.010, 11.0, True),
        # the device is behind the host's back, and takes long
        (0.010, 16.0, False),
        # it waits for the host
        (0.018, 18.5, True),
        # something was compiled
        (2.0, 2010.0, False),
    ],
)
def test_a_forward_that_waits_for_the_host_is_a_graph_too(host, device, graph, monkeypatch):
    pair, clock = Pair(tiny("bert")), iter([0.0, host] * 2)
    monkeypatch.setattr(Nothing, "elapsed_time", lambda self, other: device)
    monkeypatch.setattr(forward_pool, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    pair.check(given_to("bert", 2, 9), graph=False)
    pair.check(given_to("bert", 2, 9, 1), graph=graph)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_padding_goes_where_there_is_some(family, graphs):
    pair = Pair(tiny(family))
    for seed in range(3):
        pair.check(given_to(family, 4, 16, seed), graph=seed > 0)
    for seed in range(3):
        pair.check(given_to(family, 4, 16, seed, padded=True))
        assert pair.route.packed
    # and back: the guess is that it goes on as before, and is put right
    pair.check(given_to(family, 4, 16, 7))
    assert not pair.route.packed
    assert len(graphs) == 2


@pytest.mark.parametrize("spare", [0, 3, -2])
def test_tokens_are_packed_in_order_and_come_back(spare):
    """Into as many rows as there are tokens, into more, and into too few: then the first ones, and nothing beyond."""
    torch.manual_seed(0)
    mask = torch.rand(4, 9) < 0.6
    mask[:, 0], mask[1], mask[3, 1:] = True, torch.arange(9) < 1, False
    total = int(mask.sum()) + spare
    x = torch.randn(4, 9, 5)
    packing = Packing(mask, total, ())
    rows, kept = packing.pack(x)[0], min(total, int(mask.sum()))
    assert rows.shape == (total, 5)
    assert torch.equal(rows[:kept], x[mask][:kept])
    assert packing.starts.tolist() == [0, *mask.sum(1).cumsum(0).clamp(max=total).tolist()]
    # what is computed for a row of no text is nobody's
    rows = torch.cat([rows[:kept], torch.full((total - kept, 5), float("nan"))])[None]
    if spare >= 0:
        assert torch.equal(packing.unpack(rows), torch.where(mask[..., None], x, 0.0))


def test_the_mask_of_the_call_before_is_not_waited_for(monkeypatch):
    """Its graph is launched before anything is known of it; what it says now decides all the same."""
    pair, looks = Pair(tiny("bert")), []
    given = given_to("bert", 4, 16, padded=True)
    for _ in range(2):
        pair.check(given, graph=None)
    look = forward_graph.Inputs.look
    monkeypatch.setattr(forward_graph.Inputs, "look", lambda self: (looks.append(1), look(self)))
    pair.check(given)
    assert pair.route.packed
    assert not looks
    pair.check({**given, "attention_mask": given["attention_mask"].clone()})
    assert len(looks) == 1
    # the same tensor says something else
    pair.check(given, graph=None)
    given["attention_mask"][:] = 1
    for _ in range(2):
        pair.check(given)
        assert not pair.route.packed
    given["attention_mask"][:, 1:] = 0
    pair.check(given)
    assert pair.route.packed


def test_a_first_position_that_is_hidden_keeps_its_padding():
    pair = Pair(tiny("bert"))
    for seed in range(2):
        pair.check(given_to("bert", 4, 16, seed, padded=True), graph=seed > 0)
    # packing is known to be equal, where the first token is one that is looked at
    assert pair.route.packed
    for seed in range(3):
        given = given_to("bert", 4, 16, seed, padded=True)
        given["attention_mask"] = given["attention_mask"].flip(1)
        pair.check(given)
        assert not pair.route.packed


def test_two_hundred_calls_in_any_order(graphs):
    pair, order = Pair(tiny("bert")), random.Random(0)
    for turn in range(200):
        batch, length = order.choice([1, 2, 4]), order.choice([3, 8, 16, 17])
        pair.check(given_to("bert", batch, length, turn, padded=order.random() < 0.5), graph=None)
    assert len(pair.ours._dsi.forwards) <= forward_pool.KEPT


def test_no_more_graphs_than_are_kept(monkeypatch, graphs):
    monkeypatch.setattr(forward_pool, "KEPT", 2)
    pair = Pair(tiny("bert"))
    for _ in range(2):
        for length in (3, 4, 5, 6):
            pair.check(given_to("bert", 1, length), graph=None)
    assert len(pair.ours._dsi.forwards) == len(pair.ours._dsi.forwards._inputs) == 2


def test_results_stay_what_they_are():
    pair = Pair(tiny("bert"))
    for seed in range(2):
        pair.check(given_to("bert", 2, 9, seed), graph=seed > 0)
    first = pair.check(given_to("bert", 2, 9, 3))
    kept = [x.clone() for x in tensors(first)]
    pair.check(given_to("bert", 2, 9, 4))
    assert all(map(torch.equal, tensors(first), kept))


def test_bad_ids_are_refused_and_the_next_call_is_right():
    pair = Pair(tiny("bert"))
    for seed in range(2):
        pair.check(given_to("bert", 2, 9, seed), graph=seed > 0)
    bad = given_to("bert", 2, 9, 5)
    bad["input_ids"][1, 3] = 10_000
    for call in (pair.engine, pair.ours):
        with torch.inference_mode(), pytest.raises(dsi.InputError, match=r"input_ids\[1, 3\] is 10000"):
            call(**bad)
    pair.check(given_to("bert", 2, 9, 6))


def moved_weights(model: Any) -> None:
    model.pooler.dense.weight.data = model.pooler.dense.weight.data.flip(0).clone()


def another_module(model: Any) -> None:
    model.pooler.activation = nn.Sigmoid().eval()


def other_embedding(model: Any) -> None:
    model.embeddings.word_embeddings.weight = nn.Parameter(model.embeddings.word_embeddings.weight.detach().flip(0))


@pytest.mark.parametrize("change", [moved_weights, another_module, other_embedding])
def test_a_changed_model_gets_other_graphs(change, graphs):
    pair = Pair(tiny("bert"))
    for seed in range(3):
        pair.check(given_to("bert", 2, 9, seed), graph=seed > 0)
    for model in (pair.stock, pair.ours):
        change(model)
    pair.check(given_to("bert", 2, 9, 3), graph=False)
    assert "graphs are made anew" in pair.route.reason
    pair.check(given_to("bert", 2, 9, 4))
    assert len(graphs) == 2


def grads(pair: Pair, given: Any) -> None:
    pair.engine(**given)


@torch.no_grad()
def training(pair: Pair, given: Any) -> None:
    pair.ours.embeddings.train()
    pair.engine(**given)


@torch.no_grad()
def hooked(pair: Pair, given: Any) -> None:
    pair.ours.pooler.register_forward_hook(grads)
    pair.ours.pooler._forward_hooks.popitem()
    pair.ours.pooler.register_forward_hook(lambda *_: None)
    pair.engine(**given)


@torch.no_grad()
def attentions(pair: Pair, given: Any) -> None:
    pair.engine(**given, output_attentions=True)


@torch.no_grad()
def autocast(pair: Pair, given: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        pair.engine(**given)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (grads, "gradients are enabled"),
        (training, "training mode"),
        (hooked, "a hook on a layer"),
        (attentions, "attentions are wanted"),
        (autocast, "autocast is on"),
    ],
)
@pytest.mark.parametrize("required", [False, True])
def test_what_has_no_graph_says_why(how, words, required):
    pair, given = Pair(tiny("bert")), given_to("bert", 2, 9)
    if required:
        pair.ours._dsi.config = dsi.InferenceConfig(enable_cuda_graph=True)
        with pytest.raises(dsi.UnsupportedModelError, match=words):
            how(pair, given)
        return
    for seed in range(2):
        pair.check(given_to("bert", 2, 9, seed), graph=seed > 0)
    how(pair, given)
    assert not pair.route.graph
    assert words in pair.route.reason


def test_required_graphs_come_at_once(graphs):
    pair = Pair(tiny("bert"))
    pair.ours._dsi.config = dsi.InferenceConfig(enable_cuda_graph=True)
    pair.check(given_to("bert", 2, 9))
    assert len(graphs) == 1


def test_required_graphs_are_refused_on_a_cpu():
    with pytest.raises(dsi.UnsupportedModelError, match="enable_cuda_graph=True, and the model is on cpu"):
        dsi.init_inference(tiny("bert"), enable_cuda_graph=True)


def test_none_if_asked(graphs):
    pair = Pair(tiny("bert"), enable_cuda_graph=False)
    for seed in range(3):
        pair.check(given_to("bert", 2, 9, seed), graph=False)
    assert not graphs


def test_a_capture_that_fails_is_told_and_not_tried_again(monkeypatch):
    calls = []

    def fails(run: Any, device: Any, pool: Any) -> Any:
        calls.append(run)
        raise ValueError("no such launch")

    pair = Pair(tiny("bert"))
    monkeypatch.setattr(forward_graph, "capture", fails)
    for seed in range(4):
        pair.check(given_to("bert", 2, 9, seed), graph=False)
    assert "no such launch" in pair.route.reason
    assert len(calls) == 1


class Averaged(nn.Module):
    """A pooler that reads padded positions too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def test_a_model_that_reads_padded_positions_keeps_them():
    model = tiny("bert")
    model.pooler = Averaged().eval()
    pair = Pair(model)
    for seed in range(3):
        pair.check(given_to("bert", 4, 16, seed, padded=True), graph=seed > 0)
        assert not pair.route.packed
    assert "depends on the padding" in next(iter(pair.ours._dsi.forwards.unpadded.reasons.values()))


def test_a_decoder_that_returns_its_cache():
    pair = Pair(tiny("llama"))
    for seed in range(2):
        pair.check(given_to("llama", 2, 9, seed), graph=seed > 0)
    first = pair.check(given_to("llama", 2, 9, 3))
    pair.check(given_to("llama", 2, 9, 4))
    with torch.inference_mode():
        wanted = pair.stock(**given_to("llama", 2, 9, 3)).past_key_values
    for one, other in zip(first.past_key_values.layers, wanted.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)


def test_copies_and_pickles_have_no_graphs():
    pair = Pair(tiny("bert"))
    for seed in range(2):
        pair.check(given_to("bert", 2, 9, seed), graph=seed > 0)
    for copied in (copy.deepcopy(pair.ours), pickle.loads(pickle.dumps(pair.ours))):  # noqa: S301 - our own
        assert copied._dsi.forwards is None
        assert copied.__dict__["forward"].model is copied
        with torch.inference_mode():
            given = given_to("bert", 2, 9, 5)
            torch.testing.assert_close(copied(**given)[0], pair.stock(**given)[0], rtol=1e-4, atol=1e-5)


def test_restore_and_moves_drop_them(graphs):
    pair = Pair(tiny("bert"))
    for end in (lambda: pair.ours.to(torch.float64).to(torch.float32), pair.engine.restore):
        for seed in range(2):
            pair.ours._dsi.on_cuda = True
            pair.check(given_to("bert", 2, 9, seed), graph=seed > 0)
        graph = weakref.ref(graphs.pop())
        graphs.clear()
        end()
        gc.collect()
        assert graph() is None
    assert "forward" not in pair.ours.__dict__
    with torch.inference_mode():
        given = given_to("bert", 2, 9)
        assert torch.equal(pair.ours(**given)[0], pair.stock(**given)[0])


def test_a_cpu_leaves_padding_out_too():
    pair = Pair(tiny("bert"))
    pair.ours._dsi.on_cuda = False
    for seed in range(3):
        pair.check(given_to("bert", 16, 32, seed, padded=True), graph=False)
        assert pair.route.packed is (seed > 0)
    # short batches, and those with little padding, keep it
    pair.check(given_to("bert", 2, 32, padded=True), graph=False)
    assert not pair.route.packed
    pair.check(given_to("bert", 16, 32), graph=False)
    assert not pair.route.packed
    seen = []
    pair.ours.encoder.layer[0].register_forward_hook(lambda _, args, output: seen.append(output))
    pair.check(given_to("bert", 16, 32, 4, padded=True), graph=False)
    assert not pair.route.packed
    assert seen[0].isfinite().all()


def test_hidden_states_are_never_placeholders():
    pair = Pair(tiny("bert"))
    for on_cuda in (False, True):
        pair.ours._dsi.on_cuda = on_cuda
        for seed in range(3):
            given = {**given_to("bert", 16, 32, seed, padded=True), "output_hidden_states": True}
            pair.check(given, graph=None)
            assert not pair.route.packed


def test_generate_goes_on():
    pair = Pair(tiny("llama"))
    given = inputs_for("llama", 2, 6, "left")
    settings = {"max_new_tokens": 8, "do_sample": False}
    pair.ours._dsi.on_cuda = False
    assert torch.equal(pair.ours.generate(**given, **settings), pair.stock.generate(**given, **settings))
    assert torch.equal(
        pair.ours.generate(**given, num_beams=2, **settings), pair.stock.generate(**given, num_beams=2, **settings)
    )


@pytest.mark.parametrize("lengths", [(17, 5, 17), (5, 17)], ids=str)
@pytest.mark.parametrize("on_cuda", [False, True])
def test_a_second_tower_has_other_positions(on_cuda, lengths, graphs):
    pair = Pair(tiny("clip"))
    pair.ours._dsi.on_cuda = on_cuda
    # there are 5 positions in the images: as short a text, and a longer one
    for length in lengths:
        for seed in range(3):
            given = given_to("clip", 64, length, seed, padded=True)
            pair.check(given, graph=None)
