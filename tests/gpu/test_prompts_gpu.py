"""Prompts on the device: past the model's own forward, and as graphs, the same as stock's whatever came before."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from dsi.runtime import prompt_graph
from dsi_kernels import add_rms_norm, attention, gated_activation, rms_norm, rope_kv_write
from tests.gpu.test_decode_graphs import Pair, exact_products  # noqa: F401
from tests.support.models import CAUSAL

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt waits for the host."""
    monkeypatch.setattr(prompt_graph, "WAITING", 1e9)
    monkeypatch.setattr(prompt_graph, "COMPILING", 1e9)


@pytest.mark.parametrize("family", CAUSAL)
def test_prompts_are_stocks(family: str) -> None:
    pair, order, ways = Pair(family), random.Random(0), set()
    for turn in range(8):
        pair.check(pair.inputs(1 + turn % 2, order.randint(1, 20), seed=turn), max_new_tokens=order.randint(4, 9))
        route = pair.ours._dsi.last_prompt
        ways.add((route.own, route.graph, route.reason))
    assert any(own for own, _, _ in ways) or ways == {(False, False, "the scores have position biases")}
    runner = pair.ours._dsi.runner
    if not runner.graph_obstacle() and runner.static_rope and any(own for own, _, _ in ways):
        assert any(graph for _, graph, _ in ways), ways


def test_two_hundred_prompts_in_any_order_are_what_one_alone_is() -> None:
    """In bits: a graph's bucket, what stood behind the prompt and whose cache it was make no difference."""
    pair, order = Pair("llama"), random.Random(1)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    first: dict[Any, Any] = {}
    for _ in range(200):
        key = order.randint(1, 3), order.choice([2, 5, 16, 17, 30])
        found = pair.engine.generate(**pair.inputs(*key), **settings)
        assert torch.equal(found, first.setdefault(key, pair.stock.generate(**pair.inputs(*key), **settings))), key
    assert pair.ours._dsi.last_prompt.graph, pair.ours._dsi.last_prompt.reason


def _half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def test_launches_past_the_look_up_compute_the_same() -> None:
    """A second call, which Triton is not asked about; operands at an odd address; and the first kind again."""
    x, weight, qkv = _half(1, 40, 256), _half(256), _half(1, 40, 768)
    caches = torch.empty(2, 1, 4, 50, 64, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (_half(1, 4, 40, 64) for _ in range(3))
    odd = _half(1 + 1 * 40 * 256)[1:].view(1, 40, 256).copy_(x)
    assert odd.data_ptr() % 16

    def all_of(x: torch.Tensor) -> list[torch.Tensor]:
        made = [rms_norm(x, weight, 1e-5), *add_rms_norm(x, x, weight, 1e-5), gated_activation(x, "silu")]
        made += [rope_kv_write(qkv, None, None, *caches, 3, 4, 4, 64), caches[:, :, :, 3:43].clone()]
        return [*made, attention(q, k, v, causal=True)]

    first = all_of(x)
    for given in (x, odd, x, odd):
        caches.fill_(torch.nan)
        assert all(torch.equal(one, other) for one, other in zip(all_of(given), first, strict=True))
