"""The same call, the same bits: a thousand times, in any order of shapes, and whatever was called in between."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

import dsi
from tests.support.models import inputs_for, tiny

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
REPLAYS, SHAPES = 1000, 200


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """fp32 products in fp32, on both sides."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _inputs(family: str, batch: int, seq: int, pad: Any, seed: int = 0) -> dict[str, Any]:
    return {name: x.to(DEVICE) for name, x in inputs_for(family, batch, seq, pad, seed=seed).items()}


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_thousand_steps(family: str, rows: int) -> None:
    """Each text takes as many steps as fit into a tiny model's context: their logits are the first text's."""
    engine = dsi.init_inference(tiny(family, dtype=torch.bfloat16).to(DEVICE))
    given, new = _inputs(family, rows, 5, None), 51
    settings = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = torch.stack(engine.generate(**given, **settings).logits)
    assert engine.module._dsi.last_route.graph, engine.module._dsi.last_route.reason
    chained = engine.generate(**given, max_new_tokens=new, do_sample=False)
    for _ in range(REPLAYS // (2 * (new - 1))):
        again = torch.stack(engine.generate(**given, **settings).logits)
        assert torch.equal(first, again)
        assert torch.equal(engine.generate(**given, max_new_tokens=new, do_sample=False), chained)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_text_has_its_own_bits(rows: int) -> None:
    """Whatever was before it: longer texts and more rows enlarge the cache, and leave other memory."""
    stock = tiny("llama", dtype=torch.bfloat16, max_position_embeddings=2048).to(DEVICE)
    given, found = _inputs("llama", rows, 90, None), []
    settings = {"max_new_tokens": 100, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for before in ((), ((rows, 1500),), ((8, 300), (1, 700), (rows, 5))):
        engine = dsi.init_inference(copy.deepcopy(stock))
        for count, length in before:
            engine.generate(**_inputs("llama", count, length, None), max_new_tokens=30, do_sample=False)
        for _ in range(2):
            found.append(torch.stack(engine.generate(**given, **settings).logits))
            assert engine.module._dsi.last_route.graph, engine.module._dsi.last_route.reason
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_two_hundred_shapes_in_any_order(family: str) -> None:
    """Texts of a model that decodes in graphs are those of the same model without."""
    stock = tiny(family).to(DEVICE)
    engine = dsi.init_inference(copy.deepcopy(stock))
    plain = dsi.init_inference(copy.deepcopy(stock), enable_cuda_graph=False)
    order = random.Random(0)
    for turn in range(SHAPES):
        given = _inputs(family, order.choice([1, 2, 3, 8]), order.randint(1, 24), order.choice([None, "left"]), turn)
        settings = {"max_new_tokens": order.randint(1, 12), "do_sample": False}
        assert torch.equal(engine.generate(**given, **settings), plain.generate(**given, **settings)), turn


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "clip_text"])
def test_two_hundred_shapes_of_an_encoder(family: str) -> None:
    stock = tiny(family).to(DEVICE)
    engine, order = dsi.init_inference(copy.deepcopy(stock)), random.Random(0)
    for turn in range(SHAPES):
        pad = order.choice([None, "right", "ragged"])
        given = _inputs(family, order.choice([1, 2, 3, 8]), order.randint(2, 24), pad, turn)
        kept = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        with torch.no_grad():
            wanted, found = stock(**given)[0][kept], engine(**given)[0][kept]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()), msg=f"turn {turn}")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_results_stay_after_the_next_calls(family: str) -> None:
    engine = dsi.init_inference(tiny(family).to(DEVICE))
    with torch.no_grad():
        held = []
        for turn in range(6):
            given = _inputs(family, 2, 9, None, turn)
            result = engine(**given)[0]
            held.append((result, result.clone()))
            if family == "llama":
                text = engine.generate(**given, max_new_tokens=8, do_sample=False)
                held.append((text, text.clone()))
    assert all(torch.equal(result, copied) for result, copied in held)
    assert len({result.data_ptr() for result, _ in held}) == len(held)
