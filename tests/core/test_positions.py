"""The ways in which a layer learns positions: tables of its own, pairs that turn together, biases of the scores."""

from __future__ import annotations

import copy

import attrs
import pytest
import torch
from transformers import DynamicCache
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_biases
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_biases
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

import dsi
from dsi.containers import DecoderLayer
from dsi.containers.ops import AtenOps, Rope, rotate, with_bias
from dsi.containers.tables import TABLES
from dsi.containers.triton_ops import TritonLayerOps
from dsi.policy import Alibi, Attr, Call, Const, Inverse, Linear, RotaryTable
from dsi.runtime.alibi import biases_of, places_of, slopes
from dsi_gpts.bloom import BLOOM
from dsi_gpts.falcon import TWO_NORMS
from dsi_gpts.gptj import GPTJ
from tests.core.positions import KINDS, positioned
from tests.core.twins import FP32, distance, twins_of

TRITON = ["triton", "triton, attention aten"]


def inputs(pad: str | None = None, batch: int = 3, seq: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 67, (batch, seq), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if pad is not None:
        mask[0, :3] = 0
    if pad == "right":
        mask[0] = mask[0].flip(0)
    if pad == "ragged":
        mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


# --- whole models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "left", "right", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_and_generates_what_stock_does(kind, pad):
    pair = twins_of(positioned(kind), {"strict": True})
    given = inputs(pad)
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        assert distance(pair.model(**given).logits, pair.stock(**given).logits) <= FP32
    found, wanted = pair.model.generate(**given, **settings), pair.stock.generate(**given, **settings)
    assert pair.model._dsi.last_route.fast, pair.model._dsi.last_route.reason
    assert torch.equal(found.sequences, wanted.sequences)
    assert distance(found.logits, wanted.logits) <= FP32
    assert pair.stock_calls == 0


@pytest.mark.parametrize("kind", KINDS)
def test_stock_may_go_on_with_the_cache_and_dsi_with_stock_s(kind):
    # what lies in the cache is stock's, not another order of it: attentions wanted run the stock layer in between
    pair = twins_of(positioned(kind), {"strict": True})
    ids = inputs()["input_ids"]
    caches = [DynamicCache(config=pair.stock.config) for _ in range(2)]
    with torch.no_grad():
        for start, end, attentions in ((0, 4, False), (4, 6, True), (6, 7, False), (7, 9, False)):
            found, wanted = (
                model(input_ids=ids[:, start:end], past_key_values=cache, output_attentions=attentions)
                for model, cache in zip((pair.model, pair.stock), caches, strict=True)
            )
            assert distance(found.logits, wanted.logits) <= FP32
            assert distance(found.past_key_values, wanted.past_key_values) <= FP32
    assert pair.fused_calls == 6
    assert pair.stock_calls == 2


@pytest.mark.parametrize("kind", ["table", "repeated, biased mask"])
def test_copies_and_casts_know_the_positions(kind):
    pair = twins_of(positioned(kind), {"strict": True})
    half, stock = copy.deepcopy(pair.model).to(torch.bfloat16), copy.deepcopy(pair.stock).to(torch.bfloat16)
    given = inputs("left")
    with torch.no_grad():
        reference = pair.stock(**given).logits
        errors = [float((model(**given).logits.float() - reference).norm()) for model in (half, stock)]
        # the model that was copied is as it was
        assert distance(pair.model(**given).logits, reference) <= FP32
    assert errors[0] <= 1.2 * errors[1]


def test_terms_have_the_dtype_of_the_layer_whatever_the_table_has():
    # as from_pretrained(dtype=) leaves it: buffers that no checkpoint holds stay float32
    pair = twins_of(positioned("table", dtype=torch.bfloat16), {"strict": True})
    layer = pair.containers[0]
    assert layer.rope_rows().dtype is torch.float32
    assert {term.dtype for term in layer.rope_at(torch.arange(3)[None])[:3]} == {torch.bfloat16}
    with torch.no_grad():
        assert pair.model(**inputs("left")).logits.dtype is torch.bfloat16


def test_text_beyond_the_layers_table_is_an_input_error():
    pair = twins_of(positioned("table"))
    with pytest.raises(dsi.InputError, match="64"):
        pair.engine(input_ids=torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(dsi.InputError, match="64"):
        pair.model.generate(**inputs(), max_new_tokens=56)
    with pytest.raises(dsi.InputError, match="64"):
        pair.model.generate(**inputs(), max_new_tokens=4, position_ids=torch.arange(56, 65).expand(3, -1))


def test_biases_have_no_last_position():
    pair = twins_of(positioned("biases"))
    assert pair.model._dsi.context is None
    given = inputs(batch=1, seq=40)
    assert torch.equal(
        pair.model.generate(**given, max_new_tokens=40, do_sample=False),
        pair.stock.generate(**given, max_new_tokens=40, do_sample=False),
    )


def test_layers_of_different_tables_take_stock_s_loop():
    pair = twins_of(positioned("table"))
    for layer in (pair.stock.transformer.h[1], pair.containers[1].original):
        layer.attn.embed_positions = layer.attn.embed_positions.flip(0)
    found = pair.model.generate(**inputs(), max_new_tokens=6, do_sample=False)
    assert pair.model._dsi.last_route.reason == "the layers' rotary tables differ"
    assert torch.equal(found, pair.stock.generate(**inputs(), max_new_tokens=6, do_sample=False))


# --- calls that only the stock layer knows ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("table", {"position_ids": None}),
        ("table", {"position_ids": torch.arange(4)[None]}),
        ("biases", {"alibi": None}),
        ("biases", {"alibi": torch.zeros(1, 1, 5)}),
        ("biases", {"alibi": torch.zeros(12, 1, 5, dtype=torch.float64)}),
    ],
)
def test_positions_of_another_form_are_stock_s_business(kind, change):
    layer = twins_of(positioned(kind)).containers[0]
    usual = {"position_ids": torch.arange(5)[None]} if kind == "table" else {"alibi": torch.zeros(12, 1, 5)}
    hidden = torch.randn(2, 5, layer.original.input_layernorm.weight.numel() if kind == "biases" else 32)
    assert layer._understand((hidden,), {"attention_mask": None, **usual}) is not None
    assert layer._understand((hidden,), {"attention_mask": None, **usual, **change}) is None


@pytest.mark.parametrize("kind", ["biased mask", "repeated, biased mask"])
def test_eager_attention_that_counts_biases_twice_is_left_to_stock(kind):
    model = positioned(kind)
    # this family has no set_attn_implementation
    model.config._attn_implementation = "eager"
    plan = dsi.plan(model)
    assert plan.blocks == ()
    assert "attention implementation 'eager'; supported: sdpa" in plan.why_nothing
    # and also when it is chosen afterwards
    pair = twins_of(positioned(kind))
    for each in (pair.model, pair.stock):
        each.config._attn_implementation = "eager"
    with torch.no_grad():
        assert distance(pair.model(**inputs("left")).logits, pair.stock(**inputs("left")).logits) <= FP32
    assert (pair.fused_calls, pair.stock_calls) == (0, 2)


# --- what a policy says -------------------------------------------------------------------------------------------


def changed(policy, **changes):
    return attrs.evolve(policy, blocks=[attrs.evolve(policy.blocks[0], **changes)])


@pytest.mark.parametrize("path", ["attn.nothing", "nothing.embed_positions", "attn.scale_attn", "ln_1.weight"])
def test_a_rotary_table_that_is_not_there_is_the_policy_s_fault(path):
    wrong = changed(GPTJ, call=attrs.evolve(GPTJ.blocks[0].call, rope=RotaryTable(path=path)))
    with pytest.raises(dsi.PolicyError, match=r"rotary table|no submodule"):
        dsi.plan(positioned("table"), injection_policy=wrong)


def test_the_inverse_of_a_fact_is_read_and_one_of_nothing_is_refused():
    layer = twins_of(positioned("table")).containers[0]
    assert layer.scale == pytest.approx(8**-0.5)
    for nothing in (Const(0), Const(None), Attr("attn.nothing")):
        wrong = changed(GPTJ, facts={**GPTJ.blocks[0].facts, "scale": Inverse(nothing)})
        plan = dsi.plan(positioned("table"), injection_policy=wrong)
        assert "fact 'scale' cannot be read" in plan.why_nothing


def test_a_linear_layer_of_another_class_is_not_taken_for_the_one_named():
    slots = {**TWO_NORMS.blocks[0].slots, "out": Linear("self_attention.dense", split="row")}
    plan = dsi.plan(positioned("repeated"), injection_policy=changed(TWO_NORMS, slots=slots))
    assert "FalconLinear, not torch.nn.modules.linear:Linear" in plan.why_nothing


@pytest.mark.parametrize("fact", ["parallel", "pre_norm"])
def test_residuals_behind_norms_are_for_pre_norm_layers_in_sequence(fact):
    facts = {**BLOOM.blocks[0].facts, "add_to_normed": Const(True), fact: Const(fact == "parallel")}
    plan = dsi.plan(positioned("normed sum"), injection_policy=changed(BLOOM, facts=facts))
    assert "adds to the normed hidden states" in plan.why_nothing


# --- operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads_at", [1, 2])
@pytest.mark.parametrize("width", [8, 4])
def test_neighbours_turn_together(heads_at, width):
    x, angles = torch.randn(2, 5, 3, 8), torch.rand(2, 5, width // 2)
    rope = Rope.from_rows(torch.cat((angles.sin(), angles.cos()), -1), True)
    wanted = torch.cat((apply_rotary_pos_emb(x[..., :width], angles.sin(), angles.cos()), x[..., width:]), -1)
    found = rotate(x if heads_at == 2 else x.transpose(1, 2), rope, heads_at)
    torch.testing.assert_close(found if heads_at == 2 else found.transpose(1, 2), wanted)
    # the other form turns other dimensions
    halves = Rope.from_rows(torch.cat((angles.sin(), angles.cos()), -1), False)
    assert not torch.allclose(rotate(x, halves), wanted, atol=1e-3)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive"])
def test_a_bias_and_a_mask_are_one(mask):
    bias, q, k, v = torch.randn(2, 4, 1, 6), *torch.randn(3, 2, 4, 6, 8)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 1, 6, 6).clone()
    allowed[1, 0, 3] = False
    given = {"none": None, "causal": None, "bool": allowed, "additive": torch.randn(2, 1, 6, 6)}[mask]
    both = with_bias(given, bias, 6, causal=mask == "causal")
    found = AtenOps().attend(q, k, v, both, False, 0.3)
    scores = q @ k.transpose(-1, -2) * 0.3 + bias
    if mask == "causal":
        scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    if mask in ("bool", "additive"):
        scores = scores.masked_fill(~allowed, -torch.inf) if mask == "bool" else scores + given
    # a row that may attend to nothing gives 0
    wanted = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).reshape(2, 6, 32)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_query_of_grouped_heads_takes_a_bias_a_head(rows):
    q, (k, v), bias = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 2, 5, 8), torch.randn(rows, 6, 1, 5)
    found = AtenOps().decode(q, k, v, bias, 0.3)
    scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) * 0.3 + bias
    torch.testing.assert_close(found, (scores.softmax(-1) @ v.repeat_interleave(3, 1)).reshape(2, 48))


class _Layer:
    """As much of a layer as a step of biases asks for."""

    scale = 0.5

    def __init__(self, heads: int) -> None:
        self.all_heads = heads


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 71])
def test_slopes_are_transformers(heads):
    one = torch.ones(1, 2, dtype=torch.long)
    assert torch.equal(slopes(heads), bloom_biases(one, heads, torch.float32).view(heads, 2)[:, 1])


@pytest.mark.parametrize("pad", [None, "left", "right", "ragged"])
@pytest.mark.parametrize(
    ("alibi", "stock", "scale"),
    [(Alibi(), bloom_biases, 1.0), (Alibi(rounded="bfloat16", scaled=True), falcon_biases, 0.5)],
    ids=["plain", "rounded"],
)
def test_biases_of_a_step_are_the_model_s(alibi, stock, scale, pad):
    mask = inputs(pad)["attention_mask"]
    # slopes of twelve heads are no powers of two, so that a rounding shows
    wanted = stock(mask, 12, torch.float32).view(3, 12, 1, 9) * scale
    allowed = None if pad is None else mask[:, None, None].bool()
    biased = biases_of(alibi, _Layer(12), torch.device("cpu"))
    if allowed is not None:
        biased = biased._replace(mask=allowed, places=places_of(allowed))
    for length in (4, 9):
        found = biased.additive(torch.float32, length).expand(3, 12, 1, length)
        kept = mask[:, None, None, :length].bool().expand(3, 12, 1, length)
        assert torch.equal(found[kept], wanted[..., :length][kept])
        assert (found[~kept] == torch.finfo(torch.float32).min).all()


# --- which table --------------------------------------------------------------------------------------------------

PLAIN = {"heads": 4, "kv_heads": 2, "head_dim": 64, "rope_pairs": False, "biased": False, "repeat_kv": False}


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, True),
        ({"rope_pairs": True}, False),
        ({"biased": True}, False),
        ({"repeat_kv": True}, False),
        ({"heads": 128, "kv_heads": 1}, True),
        ({"heads": 256, "kv_heads": 1}, False),
        ({"heads": 128, "kv_heads": 1, "head_dim": 256}, False),
        ({"head_dim": 288}, False),
    ],
)
def test_attention_that_no_kernel_knows_is_torch_s(change, known):
    facts = {**PLAIN, **change}
    assert DecoderLayer.operations("triton", facts) == TRITON[not known]
    assert DecoderLayer.operations("aten", facts) == "aten"


def test_the_mixed_table_takes_torch_s_attention_and_kernels_around_it():
    table = TABLES["triton, attention aten"]
    assert type(table) is TritonLayerOps
    for name in ("split", "append", "decode", "attend"):
        assert getattr(TritonLayerOps, name) is getattr(AtenOps, name)
    for name in ("norm", "project_norm", "project_normed", "activate", "gate"):
        assert getattr(TritonLayerOps, name) is getattr(type(TABLES["triton"]), name)


def test_calls_name_their_attention():
    with pytest.raises(TypeError, match="one string"):
        Call(attention="eager")


@pytest.mark.parametrize("kind", ["biases", "biased mask", "repeated, biased mask"])
def test_rows_of_nothing_but_padding_are_even_in_fp16_too(kind):
    # fp16's least number does not swallow the scores that are added to it
    stock = positioned(kind, dtype=torch.float16)
    pair, given = twins_of(stock, {"strict": True}), inputs("left")
    padding = given["attention_mask"] == 0
    with torch.no_grad():
        reference = copy.deepcopy(stock).float()(**given).logits
        found = pair.model(**given).logits
    error = (found.float() - reference).norm(dim=-1) / reference.norm(dim=-1)
    assert float(error[padding].max()) <= 1.2 * float(error[~padding].max()) + 0.02
