"""A forward whose kernels begin while those before them end: the same bits, every time, as one after the other."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import dsi
from dsi.containers import launches
from dsi.runtime.trees import tensors
from tests.support.models import inputs_for, tiny

pytestmark = pytest.mark.gpu

CALLS = 1000
BLOCKS = {"block_m": 32, "block_n": 32, "block_k": 32, "group_m": 2, "num_warps": 4, "stages": 3, "choice": 2}
WHOLE = {"block_s": 16, "block_t": 32, "num_warps": 4, "stages": 2, "choice": 2}


@pytest.fixture
def ours(monkeypatch: Any) -> None:
    """The tables' answers: our products and attention."""

    def product(x: torch.Tensor, weight: torch.Tensor, follows: str) -> dict[str, int]:
        return BLOCKS | {"splits": 2 if follows == "norm" else 1}

    for op, name, answer in (
        ("linear_fused", "linear_config", product),
        ("attention", "attention_config", lambda *_, **__: WHOLE),
    ):
        # the package has the ops under their modules' names
        monkeypatch.setattr(importlib.import_module(f"dsi_kernels.{op}"), name, answer)


def engine(family: str, monkeypatch: Any, *, dependent: bool) -> Any:
    monkeypatch.setattr(launches, "DEPENDENT", dependent)
    torch.manual_seed(0)
    return dsi.init_inference(tiny(family, dtype=torch.float16).cuda(), enable_cuda_graph=True)


def call(engine: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        found = tensors(engine(**given))
    assert engine.module._dsi.last_forward.graph, engine.module._dsi.last_forward.reason
    return found


@pytest.mark.parametrize("family", ["bert", "roberta", "clip_text"])
def test_a_thousand_forwards_are_the_same_bits(family: str, ours: None, monkeypatch: Any) -> None:
    given = {name: x.cuda() for name, x in inputs_for(family, 2, 9).items()}
    wanted = call(engine(family, monkeypatch, dependent=False), given)
    early = engine(family, monkeypatch, dependent=True)
    found = [call(early, given) for _ in range(CALLS)]
    assert all(torch.isfinite(one).all() for one in wanted)
    for one in found:
        assert all(map(torch.equal, one, wanted))
