"""A decode step whose kernels begin while those before them end: the same bits, every time, as one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsi
from dsi.containers import launches
from tests.support.models import inputs_for, tiny

pytestmark = pytest.mark.gpu

REPLAYS = 1000


def captured(family: str, batch: int, monkeypatch: Any, *, dependent: bool) -> Any:
    """A step's graph, right after a text."""
    monkeypatch.setattr(launches, "DEPENDENT", dependent)
    torch.manual_seed(0)
    model = tiny(family, dtype=torch.bfloat16).cuda()
    engine = dsi.init_inference(model)
    given = {name: x.cuda() for name, x in inputs_for(family, batch, 9).items()}
    engine.generate(**given, max_new_tokens=12, do_sample=False)
    assert model._dsi.last_route.graph, model._dsi.last_route.reason
    ((_, graph),) = model._dsi.graphs._graphs.values()
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
