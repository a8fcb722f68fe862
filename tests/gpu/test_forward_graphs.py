"""Forwards as CUDA graphs: equal to stock, whatever came before; results stay; memory is bounded and given back."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import pytest
import torch

import dsi
from dsi.runtime.trees import tensors
from tests.support.models import tiny

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def given(batch: int, length: int, seed: int = 0, *, padded: bool = False) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 60, (batch, length), generator=drawn)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            mask[row, max(1, length * (row + 1) // (2 * batch)) :] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


class Pair:
    def __init__(self, family: str, **options: Any) -> None:
        self.stock = tiny(family).to(DEVICE)
        self.ours = copy.deepcopy(self.stock)
        self.engine = dsi.init_inference(self.ours, **options)

    def check(self, call: dict[str, Any]) -> Any:
        with torch.inference_mode():
            wanted, found = self.stock(**call), self.engine(**call)
        shown = call["attention_mask"] != 0
        for one, other in zip(tensors(found), tensors(wanted), strict=True):
            if one.shape[:2] == shown.shape:
                one, other = one[shown], other[shown]
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        return self.ours._dsi.last_forward


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """fp32 products in fp32, on both sides."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "clip_text", "llama"])
def test_every_call_is_equal_and_the_later_ones_are_graphs(family: str) -> None:
    pair = Pair(family, enable_cuda_graph=True)
    for seed in range(4):
        route = pair.check(given(3, 12, seed))
        assert route.graph, route.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (4, 32), (3, 17)], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_first_call_has_the_bits_of_later_ones(shape: tuple[int, int], dtype: torch.dtype, padded: bool) -> None:
    engine = dsi.init_inference(tiny("bert").to(DEVICE, dtype))
    call, routes, results = given(*shape, padded=padded), [], []
    for _ in range(4):
        with torch.inference_mode():
            results.append([x.clone() for x in tensors(engine(**call))])
        routes.append(engine.module._dsi.last_forward)
    assert [route.graph for route in routes][::3] == [False, True], routes
    shown = call["attention_mask"] != 0
    for later in results[1:]:
        for one, other in zip(later, results[0], strict=True):
            if one.shape[:2] == shown.shape:
                one, other = one[shown], other[shown]
            assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_padding_is_left_out(family: str) -> None:
    pair = Pair(family, enable_cuda_graph=True)
    for seed in range(4):
        route = pair.check(given(4, 32, seed, padded=True))
        assert route.packed, pair.ours._dsi.forwards.unpadded.reasons
        assert not pair.check(given(4, 32, seed)).packed


def test_two_hundred_calls_in_any_order() -> None:
    pair, order, reserved = Pair("bert"), random.Random(0), []
    for turn in range(200):
        batch, length = order.choice([1, 2, 4]), order.choice([3, 16, 17, 40])
        pair.check(given(batch, length, turn, padded=order.random() < 0.5))
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[150]


def test_replays_are_equal_bit_for_bit_and_results_stay() -> None:
    pair = Pair("bert", enable_cuda_graph=True)
    with torch.inference_mode():
        first = tensors(pair.engine(**given(2, 16)))
        kept = [x.clone() for x in first]
        for seed in range(1, 20):
            pair.engine(**given(2, 16, seed))
            assert all(map(torch.equal, tensors(pair.engine(**given(2, 16))), kept))
    assert all(map(torch.equal, first, kept))


def test_ids_out_of_range_are_refused_and_the_device_lives_on() -> None:
    pair = Pair("bert", enable_cuda_graph=True)
    pair.check(given(2, 16))
    bad = given(2, 16, 1)
    bad["input_ids"][1, 3] = 10_000
    with torch.inference_mode(), pytest.raises(dsi.InputError, match=r"input_ids\[1, 3\] is 10000"):
        pair.engine(**bad)
    pair.check(given(2, 16, 2))


def test_moved_weights_and_restore() -> None:
    pair = Pair("bert", enable_cuda_graph=True)
    pair.check(given(2, 16))
    for model in (pair.stock, pair.ours):
        model.pooler.dense.weight.data = model.pooler.dense.weight.data.flip(0).clone()
    assert pair.check(given(2, 16, 1)).graph
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    pair.engine.restore()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
    assert "forward" not in pair.ours.__dict__


def test_a_forward_that_asks_the_device_runs_without() -> None:
    pair = Pair("bert")
    for model in (pair.stock, pair.ours):
        model.pooler.activation = _Asks().eval()
    for seed in range(3):
        route = pair.check(given(2, 16, seed))
    assert "capturing a forward failed" in route.reason
    assert torch.randn(4, device=DEVICE).isfinite().all()


class _Asks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x if float(x.sum()) > 0 else x
