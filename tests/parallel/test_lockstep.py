"""Several ranks compute what one does, for every family and layout; they run as threads that meet at every sum."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import dsi
from dsi import ranks
from dsi.errors import InjectionError, RankError, RestoreError, SplitError, UnsupportedModelError
from dsi.parallel import SummedLinear, assemble, lockstep, same_bits, split, thread_groups
from dsi.ranks import Ask, init_rank, layer_shards
from tests.core.twins import containers, linears
from tests.parallel.families import BUILT_IN, VOCABULARY, assert_agree, built_in, described
from tests.support import inputs_for, tiny


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", BUILT_IN)
def test_a_built_in_family(family, size):
    subject = built_in(family)
    assert_agree(ranks.lockstep(subject.model, subject.ask, size), subject.single())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", VOCABULARY)
def test_a_layout_of_the_vocabulary(name, size):
    subject = described(name)
    assert_agree(ranks.lockstep(subject.model, subject.ask, size, **subject.options), subject.single())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_transformers_own_loop_runs_over_the_parts(family):
    subject = built_in(family)

    def beams(engine):
        return engine.generate(**subject.ask.inputs, max_new_tokens=5, num_beams=2, do_sample=False)

    wanted = beams(dsi.init_inference(copy.deepcopy(subject.model)))
    assert all(torch.equal(found, wanted) for found in ranks.lockstep(subject.model, beams, 2))


def test_a_factory_instead_of_a_model():
    subject = built_in("gpt2")
    assert_agree(ranks.lockstep(lambda: built_in("gpt2").model, subject.ask, 2), subject.single())


def test_one_rank_is_the_single_model():
    subject = built_in("llama")

    def work(engine):
        assert not any(isinstance(linear, SummedLinear) for linear in linears(engine.module))
        return subject.ask(engine)

    assert_agree(ranks.lockstep(subject.model, work, 1), subject.single())


def test_results_are_the_same_bits_from_run_to_run():
    subject = built_in("llama")
    first, second = (ranks.lockstep(subject.model, subject.ask, 4) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first[0].outputs, second[0].outputs, strict=True))


# --- what a rank is ---------------------------------------------------------------------------------------------------


def rank_of(subject, rank=0, size=2, model=None):
    model = copy.deepcopy(subject.model) if model is None else model
    return init_rank(model, thread_groups(size, timeout=5)[rank], strict=True, **subject.options)


@pytest.mark.parametrize(
    ("subject", "sums"),
    [
        (lambda: built_in("llama"), 2),
        (lambda: built_in("bert"), 2),
        (lambda: described("head_interleaved, in turn"), 2),
        (lambda: described("head_interleaved, parallel"), 1),
        (lambda: described("kv_grouped, repeated"), 1),
        (lambda: described("kept experts"), 1),
        (lambda: described("whole MLP"), 1),
    ],
    ids=["llama", "bert", "in turn", "side by side", "grouped", "experts", "whole MLP"],
)
def test_sums_a_layer(subject, sums):
    subject, groups = subject(), thread_groups(2)
    engines = [init_rank(copy.deepcopy(subject.model), group, strict=True, **subject.options) for group in groups]
    lockstep(lambda group: engines[group.rank](**subject.ask.inputs), groups)
    assert [group.sums for group in groups] == [sums * 2, sums * 2]
    assert sum(container.fused_calls for container in containers(engines[0].module)) == 2


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share_of_the_layers(size):
    subject = built_in("gpt2")

    def matrices(model):
        return sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)

    for rank in range(size):
        assert matrices(rank_of(subject, rank, size).module) == matrices(subject.model) / size


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", BUILT_IN)
def test_what_the_ranks_hold_makes_the_stock_layer(family, size):
    subject = built_in(family)
    every = layer_shards(subject.model, dsi.plan(subject.model), size)
    assert every
    engines = [rank_of(subject, rank, size) for rank in range(size)]
    for path, shards in every.items():
        stock = subject.model.get_submodule(path).state_dict()
        held = [engine.module.get_submodule(path).export() for engine in engines]
        whole = assemble(held, shards)
        assert all(same_bits(tensor, stock[name]) for name, tensor in whole.items())
        assert {name for name, piece in shards[0].pieces.items() if piece.dim is not None} <= whole.keys()
        back = assemble([split(stock, shard) for shard in shards], shards)
        assert back.keys() == stock.keys()
        assert all(same_bits(back[name], stock[name]) for name in stock)


def test_a_cast_on_the_way_in():
    subject = built_in("llama")
    wanted = subject.ask(dsi.init_inference(copy.deepcopy(subject.model), dtype="bfloat16"))
    for answer in ranks.lockstep(subject.model, subject.ask, 2, dtype="bfloat16"):
        assert answer.outputs[0].dtype is torch.bfloat16
        found, expected = answer.outputs[0].float(), wanted.outputs[0].float()
        # two roundings of bf16 a layer, at most
        assert (found - expected).abs().max() <= 2**-5 * expected.abs().max()


def test_moves_and_casts_of_a_rank_keep_the_sum():
    subject = built_in("llama_mha")
    wanted = subject.single()

    def work(engine):
        engine.module.double()
        engine.module.float()
        return subject.ask(engine)

    assert_agree(ranks.lockstep(subject.model, work, 2), wanted)


def test_a_copy_of_a_rank_talks_to_the_same_ranks():
    subject = built_in("opt")
    wanted = subject.single()

    def work(engine):
        with torch.no_grad():
            return copy.deepcopy(engine.module)(**subject.ask.inputs).logits

    found = ranks.lockstep(subject.model, work, 2)
    assert all((one - wanted.outputs[0]).abs().max() < 1e-4 for one in found)


# --- refusals ---------------------------------------------------------------------------------------------------------

INDIVISIBLE = [
    ("gpt2", {"n_head": 6, "n_embd": 48}, 4, "6 heads do not split over tp_size=4; use 1, 2, 3 or 6"),
    ("bert", {}, 3, "4 heads do not split over tp_size=3; use 1, 2 or 4"),
    ("llama", {}, 4, "4 heads over 2 kv heads do not split over tp_size=4; use 1 or 2"),
    ("llama", {"num_key_value_heads": 1}, 2, "4 heads over 1 kv head do not split over tp_size=2; use 1"),
    ("opt", {"ffn_dim": 50}, 4, "50 hidden units of 'down' do not split over tp_size=4; use 1 or 2"),
    ("bert", {"intermediate_size": 45}, 2, "45 hidden units of 'down' do not split over tp_size=2; use 1"),
    ("bert", {"intermediate_size": 45}, 8, "4 heads and 45 hidden units of 'down' do not split over tp_size=8; use 1"),
]


@pytest.mark.parametrize(("family", "overrides", "size", "words"), INDIVISIBLE)
def test_sizes_that_do_not_divide(family, overrides, size, words):
    model = tiny(family, **overrides)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SplitError) as caught:
        init_rank(model, thread_groups(size)[0])
    layers = {"gpt2": "transformer.h.0", "bert": "encoder.layer.0", "llama": "model.layers.0"}
    assert str(caught.value) == f"{layers.get(family, 'model.decoder.layers.0')}: {words}"
    assert containers(model) == []
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_takes_the_whole_layer_is_refused():
    engine = rank_of(built_in("bert"))
    model = engine.module
    with pytest.raises(UnsupportedModelError, match=r"state_dict\(\) takes the whole layer, and rank 0 of 2"):
        model.state_dict()
    with pytest.raises(UnsupportedModelError, match=r"load_state_dict\(\) takes the whole layer"):
        model.load_state_dict({}, strict=False)
    with pytest.raises(UnsupportedModelError, match="a call that only the stock layer knows"):
        model(**inputs_for("bert"), output_attentions=True)
    with pytest.raises(RestoreError, match="the original's weights are on 2 ranks"):
        engine.restore()
    with pytest.raises(RestoreError, match="could not give back what other ranks hold"), engine:
        pass
    assert not engine.plan.restorable
    assert "this is rank 0 of 2: what other ranks hold of the layers is given up for good" in str(engine.plan)


def test_a_failure_on_the_way_leaves_the_whole_model(monkeypatch):
    subject = built_in("gpt2")
    model = copy.deepcopy(subject.model)
    calls = []

    def failing(weight, bias, sources, reduce):
        calls.append(sources)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return SummedLinear(weight, bias, sources, reduce)

    monkeypatch.setattr("dsi.inject.SummedLinear", failing)
    with pytest.raises(InjectionError, match="the model is what it was before"):
        rank_of(subject, model=model)
    assert containers(model) == []
    stock = subject.model.state_dict()
    assert all(same_bits(tensor, stock[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**subject.ask.inputs).logits, subject.model(**subject.ask.inputs).logits)


def test_init_inference_refuses_by_name_still():
    with pytest.raises(dsi.ConfigError, match="tp_size"):
        dsi.init_inference(tiny("bert"), tensor_parallel={"tp_size": 2})


# --- ranks that fail --------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_is_named_and_nobody_waits():
    def work(group):
        if group.rank == 1:
            raise ValueError("no more")
        return group.all_reduce(torch.ones(1))

    with pytest.raises(RankError, match=r"rank 1 of 3 failed: ValueError\('no more'\)") as caught:
        lockstep(work, thread_groups(3))
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_rank_that_sums_less_often():
    def work(group):
        for _ in range(3 - group.rank):
            group.all_reduce(torch.ones(1))

    with pytest.raises(RankError, match="rank 1 finished after 2 sums, and rank 0 wants another"):
        lockstep(work, thread_groups(2))


def test_a_rank_that_is_late():
    release = threading.Event()

    def work(group):
        if group.rank == 1:
            release.wait(5)
        group.all_reduce(torch.ones(1))

    with pytest.raises(RankError, match=r"rank 1 did not come to sum 1 within 0.1 s"):
        lockstep(work, thread_groups(2, timeout=0.1))
    release.set()


def test_a_rank_that_is_stuck_alone():
    release = threading.Event()

    def work(group):
        if group.rank == 1:
            release.wait(5)

    with pytest.raises(RankError, match="rank 1 is stuck after 0 sums"):
        lockstep(work, thread_groups(2, timeout=0.1))
    release.set()


def test_ranks_that_disagree():
    with pytest.raises(RankError, match=r"sum 1: the ranks disagree: .*\(1,\).*\(2,\)"):
        lockstep(lambda group: group.all_reduce(torch.ones(group.rank + 1)), thread_groups(2))


def test_the_sum_is_taken_in_the_order_of_the_ranks():
    values = [1.0, 1e-8, -1.0]

    def work(group):
        return group.all_reduce(torch.tensor([values[group.rank]]))

    in_order = torch.tensor([values[0]]) + values[1] + values[2]
    assert all(torch.equal(found, in_order) for found in lockstep(work, thread_groups(3)))


def test_an_ask_leaves_gradients_off():
    subject = built_in("bert")
    assert all(not t.requires_grad for t in ranks.lockstep(subject.model, Ask(subject.ask.inputs), 2)[1].outputs)


# --- as init_inference ------------------------------------------------------------------------------------------------


def test_a_rank_decodes_in_dsi_s_loop():
    subject = built_in("llama")

    def work(engine):
        subject.ask(engine)
        return engine.module._dsi.last_route

    assert [route.fast for route in ranks.lockstep(subject.model, work, 2)] == [True, True]


def test_a_rank_s_steps_are_not_captured():
    # a sum in a CUDA graph is only what a process group of its own kind can do; until that is tested, no graph
    engine = rank_of(built_in("llama"))
    for container in containers(engine.module):
        container.ops_name = "triton"
    assert engine.module._dsi.runner.graph_obstacle() == "model.layers.0: it is split over ranks"


def test_strict_means_what_it_means():
    other = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(UnsupportedModelError, match="strict=True, and these would be left alone"):
        ranks.lockstep(other, lambda engine: None, 2)


def test_a_model_that_is_split_is_not_split_again():
    engine = rank_of(built_in("bert"))
    with pytest.raises(InjectionError, match="is optimized already"):
        init_rank(engine.module, thread_groups(2)[0])


def test_an_encoder_has_no_decode_step():
    bert, llama = (containers(rank_of(built_in(family)).module)[0] for family in ("bert", "llama"))
    assert (hasattr(bert, "decode"), hasattr(llama, "decode")) == (False, True)


def test_a_mask_of_other_heads_is_refused():
    container = containers(rank_of(built_in("bert")).module)[0]
    hidden = torch.randn(1, 3, 32)
    for heads in (1, 8):
        assert container._understand((hidden, torch.zeros(1, heads, 3, 3)), {}).mask.shape[1] == min(heads, 4)
    with pytest.raises(UnsupportedModelError, match="a call that only the stock layer knows"):
        container(hidden, torch.zeros(1, 4, 3, 3))
