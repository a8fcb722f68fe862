"""A weight of embedding and head, held packed: everything that stock models do with it still does it, and once."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import dsi
from dsi.containers import packed_table
from dsi.containers.linear import has_bf16
from dsi.containers.packed_table import Packed, PackedEmbedding, PackedHead
from dsi.runtime.forward import vocab_size
from tests.core.twins import distance, held
from tests.support import difference, fingerprint, tiny

pytestmark = pytest.mark.skipif(not has_bf16(), reason="bf16 weights are packed where the processor multiplies them")

# padded to 1088 x 768 and 1024 x 768
VOCAB = 1083
SIZES = {"n_embd": 768, "n_inner": 768, "n_head": 12, "n_layer": 1, "vocab_size": VOCAB}


def model_of(dtype=torch.bfloat16, **overrides):
    return tiny("gpt2", dtype=dtype, tie_word_embeddings=True, **{**SIZES, **overrides})


@pytest.fixture
def pair():
    """(stock, engine) of one model."""
    stock = model_of()
    return stock, dsi.init_inference(copy.deepcopy(stock))


def is_packed(model):
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = head._parameters["weight"] is embedding._parameters["weight"]
    return type(head) is PackedHead and type(embedding) is PackedEmbedding and shared and head.held is not None


def same_values(one, other):
    values = other.state_dict()
    return all(torch.equal(value, values.pop(name)) for name, value in one.state_dict().items()) and not values


def ids_of(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1083, 768), (4096, 64), (128, 32), (50257, 64)], ids=str)
def test_every_row_comes_back_bit_for_bit(shape):
    bits = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int16)
    weight = bits.view(torch.bfloat16)
    packed = Packed.of(weight)
    if shape == (1083, 768):
        assert packed is None or torch.ops.mkldnn._nbytes(packed.weight) <= 1.01 * weight.nbytes
    rows = packed.rows(torch.arange(shape[0]))
    assert torch.equal(rows.view(torch.int16), bits)
    one = packed.rows(torch.tensor([[shape[0] - 1]]))
    assert one.shape == (1, 1, shape[1])
    assert torch.equal(one.view(torch.int16)[0, 0], bits[-1])
    assert packed.rows(torch.tensor(3)).shape == (shape[1],)


@pytest.mark.parametrize("bad", [-1, VOCAB, VOCAB + 2, 10**6])
@pytest.mark.parametrize("others", [0, 3])
def test_an_id_without_a_row_is_an_error(pair, bad, others):
    _, engine = pair
    # beyond the last row the packed layout has zeros, and an index from behind would find a row
    with pytest.raises(IndexError, match="index out of range in self"):
        engine.module.get_input_embeddings()(torch.tensor([[1] * others + [bad]]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_of_a_model(pair, dtype):
    stock, engine = pair
    for ids in (ids_of(1, 1), ids_of(3, 5), ids_of(2, 300), ids_of(7), torch.empty(2, 0)):
        wanted = stock.get_input_embeddings()(ids.to(dtype))
        found = engine.module.get_input_embeddings()(ids.to(dtype))
        assert found.dtype is wanted.dtype
        assert torch.equal(found, wanted)
    with pytest.raises(RuntimeError, match="Expected tensor for argument"):
        engine.module.get_input_embeddings()(torch.tensor([1.0]))


# --- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_computes_what_stock_does(pair):
    stock, engine = pair
    ids = ids_of(2, 17)
    reference = copy.deepcopy(stock).float()(ids).logits
    error, own = (distance(found(ids).logits.float(), reference) for found in (engine, stock))
    assert error <= 1.2 * own
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert engine.generate(ids, **greedy).shape == stock.generate(ids, **greedy).shape
    for options in ({"do_sample": True}, {"num_beams": 2}):
        engine.generate(ids, max_new_tokens=2, pad_token_id=0, **options)
    engine.generate(ids[:1], max_new_tokens=2, prompt_lookup_num_tokens=2, pad_token_id=0)
    assert vocab_size(engine.module) == VOCAB
    # nothing on the way asked for the plain weight
    assert is_packed(engine.module)


@torch.no_grad()
def test_products_of_other_dtypes_are_torchs_own(pair):
    stock, engine = pair
    x = torch.randn(2, 3, 768)
    with pytest.raises(RuntimeError, match="same dtype"):
        engine.module.lm_head(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine.module.lm_head(x), stock.lm_head(x))
    with torch.autocast("cpu", torch.float16):
        assert engine.module.lm_head(x.bfloat16()).dtype is torch.float16
    assert engine.module.lm_head(x[:0].bfloat16()).shape == (0, 3, VOCAB)
    assert is_packed(engine.module)


def test_no_gradients_come_of_it(pair):
    _, engine = pair
    for output in (
        engine.module.lm_head(torch.randn(1, 768).bfloat16()),
        engine.module.get_input_embeddings()(ids_of(3)),
    ):
        assert output.requires_grad
        with pytest.raises(dsi.UnsupportedModelError, match="no gradients flow"):
            output.sum().backward()


def test_who_freezes_the_model_freezes_it(pair):
    stock, engine = pair
    ids, name = ids_of(1, 5), "transformer.wte.weight"
    for wanted in (True, False):
        for model in (stock, engine.module):
            model.requires_grad_(wanted)
        for model in (stock, engine.module, copy.deepcopy(engine.module)):
            assert dict(model.named_parameters())[name].requires_grad is wanted
            assert model(ids).logits.requires_grad is wanted
        assert is_packed(engine.module)
    engine.restore()
    assert not engine.module.lm_head.weight.requires_grad


def test_the_weight_is_there_once():
    model = model_of()
    table, before = model.lm_head.weight.nbytes, held()
    engine = dsi.init_inference(model)
    gc.collect()
    assert is_packed(model)
    assert held() - before <= 0.01 * table
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model_of().parameters())
    assert dict(model.named_parameters())["transformer.wte.weight"].shape == (VOCAB, 768)
    engine.restore()
    gc.collect()
    assert abs(held() - before) <= 0.01 * table


# --- plan and restore -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [None, "bfloat16"])
def test_the_plan_names_it_and_restore_gives_it_back(cast):
    model = model_of(torch.float32 if cast else torch.bfloat16)
    parameter, before = model.lm_head.weight, fingerprint(model)
    engine = dsi.init_inference(model, dtype=cast, keep_original="host" if cast else None)
    (table,) = engine.plan.tables
    assert table.paths == ("transformer.wte", "lm_head")
    assert table.bytes_after == VOCAB * 768 * 2
    assert not {"transformer.wte", "lm_head"} & {left.path for left in engine.plan.left}
    assert "transformer.wte + lm_head: one weight, held packed, 1083 x 768" in str(engine.plan)
    assert engine.plan.to_dict()["tables"][0]["paths"] == ("transformer.wte", "lm_head")
    assert is_packed(model)
    assert parameter.numel() == 0
    engine.restore()
    assert type(model.lm_head) is nn.Linear
    assert type(model.transformer.wte) is nn.Embedding
    assert model.lm_head.weight is parameter is model.transformer.wte.weight
    assert difference(before, fingerprint(model)) == []


def _renorms(model):
    model.transformer.wte.max_norm = 1.0


def _patched(model):
    model.lm_head.forward = lambda x: F.linear(x, model.lm_head.weight)


def _third(model):
    model.mirror = nn.Linear(768, VOCAB, bias=False)
    model.mirror.weight = model.lm_head.weight
    model.mirror.eval()


def _untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _strided(model):
    model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()


@pytest.mark.parametrize("change", [_renorms, _patched, _third, _untied, _strided])
def test_what_is_not_plain_stocks_stays_as_it_is(change):
    model = model_of()
    change(model)
    engine = dsi.init_inference(model)
    assert engine.plan.blocks
    assert not engine.plan.tables
    assert type(model.lm_head) is nn.Linear
    assert {"transformer.wte", "lm_head"} <= {left.path for left in engine.plan.left}


def test_a_model_without_replaced_layers_is_left_alone():
    model = model_of()
    assert not dsi.plan(model, replace_with_kernel_inject=False).tables
    assert not dsi.plan(model_of(torch.float32)).tables


@torch.no_grad()
def test_a_layout_that_cannot_be_read_is_a_listed_reason(monkeypatch):
    monkeypatch.setattr(packed_table, "BLOCKS", (40, 24))
    stock = model_of()
    engine = dsi.init_inference(copy.deepcopy(stock))
    reasons = {left.path: left.reason.code for left in engine.plan.left}
    assert reasons["lm_head"] == reasons["transformer.wte"] == "layout"
    assert not engine.plan.tables
    assert type(engine.module.lm_head) is nn.Linear
    engine(ids_of(1, 4))


def test_a_view_of_the_rows_keeps_them():
    weight = torch.randn(VOCAB, 768).bfloat16()
    # nobody holds the packed tensor itself
    words = Packed.of(weight).words
    gc.collect()
    others = [torch.full((VOCAB, 768), 7.0).bfloat16() for _ in range(4)]
    assert packed_table._holds(words, weight.view(torch.int32))
    assert len(others) == 4


def test_a_weight_in_another_order_stays_plain():
    assert Packed.of(torch.randn(768, VOCAB).bfloat16().t()) is None


@pytest.mark.parametrize("row", [0, 500, VOCAB - 1])
def test_one_wrong_row_is_seen(row):
    weight = torch.randn(VOCAB, 768).bfloat16()
    words, other = Packed.of(weight).words, weight.clone()
    assert packed_table._holds(words, other.view(torch.int32))
    other[row, -1] += 1
    assert not packed_table._holds(words, other.view(torch.int32))


def test_a_failure_behind_it_takes_it_back():
    model = model_of()
    before = fingerprint(model)

    def fail(injection):
        assert is_packed(model)
        raise RuntimeError("no")

    from dsi.config import load_config
    from dsi.inject import inject

    config = load_config({})
    with pytest.raises(dsi.InjectionError):
        inject(model, dsi.plan(model), config, attach=fail)
    assert difference(before, fingerprint(model)) == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_stocks(pair, tmp_path):
    stock, engine = pair
    wanted, found = stock.state_dict(), engine.module.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
    for name, model in (("stock", stock), ("ours", engine.module)):
        model.save_pretrained(tmp_path / name)
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("stock", "ours")]
    assert len(read[0]) == len(read[1])
    loaded = type(stock).from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert all(torch.equal(one, wanted[name]) for name, one in loaded.state_dict().items())
    assert is_packed(engine.module)


@torch.no_grad()
def test_a_checkpoint_that_is_loaded_is_what_counts(pair):
    stock, engine = pair
    kept = engine.module.state_dict()
    other = {name: value * 2 for name, value in kept.items()}
    engine.module.load_state_dict(other)
    stock.load_state_dict(other)
    assert is_packed(engine.module)
    # the copy made before is not taken for the new one's
    assert torch.equal(engine.module.state_dict()["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(engine.module.get_input_embeddings()(ids_of(5)), stock.get_input_embeddings()(ids_of(5)))
    copied = engine.module.state_dict()["lm_head.weight"]
    assert engine.module.state_dict()["lm_head.weight"] is copied
    # nor one that somebody has written to
    copied.zero_()
    assert torch.equal(engine.module.state_dict()["lm_head.weight"], other["lm_head.weight"])
    engine.restore()
    assert same_values(stock, engine.module)


def test_a_checkpoint_that_does_not_fit_is_refused(pair):
    _, engine = pair
    state = engine.module.state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for lm_head\.weight"):
        engine.module.load_state_dict({**state, "lm_head.weight": torch.zeros(2, 768)})
    missing = {name: value for name, value in state.items() if name != "lm_head.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key(.|\n)*lm_head\.weight"):
        nn.Module.load_state_dict(engine.module, missing)
    assert is_packed(engine.module)


@torch.no_grad()
def test_a_checkpoint_that_is_assigned_unties_as_stocks_does(pair):
    stock, engine = pair
    state = stock.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] * 2
    layer = engine.module.get_output_embeddings()
    for name in ("transformer.wte", "lm_head"):
        module = engine.module.get_submodule(name)
        module.load_state_dict({"weight": state[f"{name}.weight"]}, assign=True)
    assert torch.equal(layer.weight, state["lm_head.weight"])
    assert torch.equal(engine.module.transformer.wte.weight, state["transformer.wte.weight"])
    assert type(layer) is nn.Linear


# --- what users do to embeddings --------------------------------------------------------------------------------------


def _pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - of this test's own making


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("way", [copy.deepcopy, _pickled, _saved])
def test_copies_are_packed_and_their_own(pair, way):
    _, engine = pair
    ids = ids_of(1, 9)
    other, wanted = way(engine.module), engine(ids).logits
    assert is_packed(other)
    assert list(other.state_dict()) == list(engine.module.state_dict())
    assert torch.equal(other(ids).logits, wanted)
    other.load_state_dict({name: value * 2 for name, value in other.state_dict().items()})
    assert torch.equal(engine(ids).logits, wanted)
    engine.restore()
    assert is_packed(other)


def test_who_asks_for_the_weight_gets_the_parameter(pair, caplog):
    stock, engine = pair
    model = engine.module
    with caplog.at_level(logging.WARNING):
        weight = model.lm_head.weight
    assert "held plain from now on" in caplog.text
    assert weight is model.transformer.wte.weight
    assert torch.equal(weight, stock.lm_head.weight)
    with torch.no_grad():
        # what is written to it is what counts
        weight[3] = 7
        assert bool((model.transformer.wte(torch.tensor([3])) == 7).all())
        engine(ids_of(1, 4))
    engine.restore()
    assert model.lm_head.weight is weight
    assert bool((weight[3] == 7).all())


@pytest.mark.parametrize("name", ["transformer.wte", "lm_head"])
def test_another_thread_may_ask_for_the_weight_meanwhile(pair, name, monkeypatch):
    stock, engine = pair
    rows, product, module = Packed.rows, packed_table._product, engine.module.get_submodule(name)

    def asked(compute):
        def computed(*given):
            assert engine.module.lm_head.weight is engine.module.transformer.wte.weight
            return compute(*given)

        return computed

    monkeypatch.setattr(Packed, "rows", asked(rows))
    monkeypatch.setattr(packed_table, "_product", asked(product))
    given = ids_of(1, 5) if name == "transformer.wte" else torch.randn(2, 768).bfloat16()
    found = module(given)
    assert type(module) in (nn.Embedding, nn.Linear)
    assert found.requires_grad
    assert distance(found.detach(), stock.get_submodule(name)(given).detach()) <= 0.01


@torch.no_grad()
def test_a_call_with_tensors_in_the_place_of_parameters(pair):
    _, engine = pair
    model, ids = engine.module, ids_of(1, 5)
    detached = {name: one.detach() for name, one in model.named_parameters()}
    found = torch.func.functional_call(model, detached, (ids,)).logits
    assert distance(found.float(), model(ids).logits.float()) <= 0.01
    assert is_packed(model)


def test_a_weight_that_is_deleted_is_missed_as_stocks(pair):
    for model in (pair[0], pair[1].module):
        del model.lm_head.weight
        assert not hasattr(model.lm_head, "weight")
        with pytest.raises(AttributeError, match="has no attribute 'weight'"):
            model.lm_head.weight.zero_()
        assert model.transformer.wte(ids_of(1, 3)).shape == (1, 3, 768)


@torch.no_grad()
def test_embeddings_that_are_resized(pair):
    stock, engine = pair
    for model in (stock, engine.module):
        model.resize_token_embeddings(1100, mean_resizing=False)
        model.lm_head.weight[VOCAB:] = 0.5
    ids = torch.tensor([[1, 1099, VOCAB]])
    assert engine.module.lm_head.weight is engine.module.transformer.wte.weight
    assert distance(engine(ids).logits.float(), stock(ids).logits.float()) <= 0.05
    assert vocab_size(engine.module) == 1100


def _assign(module, weight):
    module.weight = weight


def _write(module, weight):
    # as accelerate does; nobody has asked for the weight then
    module._parameters["weight"] = weight


@torch.no_grad()
@pytest.mark.parametrize("put", [_assign, _write])
@pytest.mark.parametrize("name", ["transformer.wte", "lm_head"])
def test_a_parameter_that_is_exchanged(pair, name, put):
    stock, engine = pair
    doubled = stock.get_submodule(name).weight.detach() * 2
    for model in (stock, engine.module):
        put(model.get_submodule(name), nn.Parameter(doubled.clone()))
    ids = ids_of(1, 1)
    assert distance(engine(ids).logits.float(), stock(ids).logits.float()) <= 0.05
    assert torch.equal(engine.module.transformer.wte(ids), stock.transformer.wte(ids))
    exchanged = engine.module.get_submodule(name)._parameters["weight"]
    engine.restore()
    assert engine.module.get_submodule(name).weight is exchanged
    assert same_values(stock, engine.module)


@torch.no_grad()
def test_casts_of_the_model(pair):
    stock, engine = pair
    engine.module.float()
    assert type(engine.module.lm_head) is nn.Linear
    assert engine.module.lm_head.weight is engine.module.transformer.wte.weight
    assert torch.equal(engine.module.lm_head.weight, stock.lm_head.weight.float())
    assert distance(engine(ids_of(1, 4)).logits, copy.deepcopy(stock).float()(ids_of(1, 4)).logits) <= 1e-4


def test_a_move_that_changes_nothing_leaves_it_packed(pair):
    _, engine = pair
    engine.module.to(torch.bfloat16)
    engine.module.cpu()
    assert is_packed(engine.module)
    engine.module.lm_head.to("meta")
    assert engine.module.lm_head.weight.is_meta


def test_a_masked_language_model_has_such_a_table_too():
    stock = tiny(
        "bert",
        "BertForMaskedLM",
        dtype=torch.bfloat16,
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=768,
        num_attention_heads=12,
    )
    engine = dsi.init_inference(copy.deepcopy(stock))
    assert is_packed(engine.module)
    assert engine.module.get_output_embeddings().bias is not None
    # weight before bias, also in a copy
    assert list(copy.deepcopy(engine.module).state_dict()) == list(stock.state_dict())
    ids = ids_of(2, 12)
    with torch.no_grad():
        wanted = copy.deepcopy(stock).float()(ids).logits
        assert distance(engine(ids).logits.float(), wanted) <= 1.2 * distance(stock(ids).logits.float(), wanted)
    engine.restore()
    assert same_values(stock, engine.module)


def test_hooks_on_the_two_run(pair):
    _, engine = pair
    seen = []
    engine.module.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    engine.module.transformer.wte.register_forward_pre_hook(lambda *_: seen.append("embedding"))
    with torch.no_grad():
        engine(ids_of(1, 3))
    assert seen == ["embedding", "head"]
    assert isinstance(engine.module, transformers.PreTrainedModel)
