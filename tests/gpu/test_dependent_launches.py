"""A decode step whose kernels begin while those before them end: the same bits, every time, as one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsi
from dsi.containers import launches
from dsi.runtime.sampling import set_noise_place
from dsi_kernels import sampling_settings
from tests.support.models import inputs_for, tiny

pytestmark = pytest.mark.gpu

REPLAYS = 1000


def captured(family: str, batch: int, monkeypatch: Any, *, dependent: bool, sampled: bool = False) -> Any:
    """A step's graph, right after a text."""
    monkeypatch.setattr(launches, "DEPENDENT", dependent)
    torch.manual_seed(0)
    model = tiny(family, dtype=torch.bfloat16).cuda()
    engine = dsi.init_inference(model)
    given = {name: x.cuda() for name, x in inputs_for(family, batch, 9).items()}
    engine.generate(**given, max_new_tokens=12, do_sample=sampled)
    assert model._dsi.last_route.graph, model._dsi.last_route.reason
    (graph,) = model._dsi.graphs._graphs.values()
    return engine, graph


def logits(graph: Any, batch: int) -> torch.Tensor:
    """Those of three steps from a fixed state."""
    tokens = torch.arange(3, 3 + batch, device="cuda")
    graph.begin(tokens, 9, 9, None)
    return torch.stack([graph.replay().clone() for _ in range(3)])


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_thousand_replays_are_the_same_bits(family: str, batch: int, monkeypatch: Any) -> None:
    _kept, plain = captured(family, batch, monkeypatch, dependent=False)
    wanted = logits(plain, batch)
    _also, graph = captured(family, batch, monkeypatch, dependent=True)
    found = [logits(graph, batch) for _ in range(REPLAYS // 3 + 1)]
    assert torch.isfinite(wanted).all()
    assert all(torch.equal(one, wanted) for one in found)


def drawn(graph: Any, batch: int) -> torch.Tensor:
    """The tokens of three steps from a fixed state, and from fixed random numbers."""
    set_noise_place(graph.tokens.device, 0)
    graph.begin(torch.arange(3, 3 + batch, device="cuda"), 9, 9, None)
    graph.set_sampling(tuple(sampling_settings(top_k=40, top_p=0.9, temperature=2.0)), None)
    tokens = []
    for _ in range(3):
        graph.replay()
        tokens.append(graph.tokens.clone())
    return torch.stack(tokens)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_thousand_replays_draw_the_same_tokens(batch: int, monkeypatch: Any) -> None:
    _kept, plain = captured("llama", batch, monkeypatch, dependent=False, sampled=True)
    torch.manual_seed(0)
    wanted = drawn(plain, batch)
    _also, graph = captured("llama", batch, monkeypatch, dependent=True, sampled=True)
    torch.manual_seed(0)
    assert all(torch.equal(drawn(graph, batch), wanted) for _ in range(REPLAYS // 3 + 1))
