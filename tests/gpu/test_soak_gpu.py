"""A thousand texts of changing shapes: what is allocated stays the same to the byte, and all of it comes back."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import pytest
import torch

import dsi
from tests.support.models import inputs_for, tiny

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# (rows, padding): at most as many kinds as the pool keeps graphs, or each text would make its graph anew
KINDS = ((1, None), (2, None), (2, "left"), (3, None))


def _inputs(family: str, batch: int, seq: int, pad: Any, seed: int = 0) -> dict[str, Any]:
    return {name: x.to(DEVICE) for name, x in inputs_for(family, batch, seq, pad, seed=seed).items()}


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    # what cuBLAS works in on the caller's stream is torch's own, and comes and goes with captures
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_thousand_texts(family: str) -> None:
    engine, order = dsi.init_inference(tiny(family).to(DEVICE)), random.Random(0)

    def write(kind: tuple[int, Any]) -> None:
        engine.generate(
            **_inputs(family, kind[0], order.randint(4, 20), kind[1]),
            max_new_tokens=order.randint(4, 8),
            do_sample=order.random() < 0.2,
        )

    for turn in range(40):
        write(KINDS[turn % len(KINDS)])
    flat = _allocated()
    for turn in range(1000):
        write(order.choice(KINDS))
        if turn % 100 == 99:
            assert _allocated() == flat, f"after {turn + 1} texts"


def test_a_deleted_engine_gives_everything_back() -> None:
    # what libraries set up for themselves, once a process
    _use(tiny("llama").to(DEVICE))
    before = _allocated()
    _use(tiny("llama").to(DEVICE))
    assert _allocated() == before


def test_a_restored_model_holds_what_it_held() -> None:
    model = tiny("llama").to(DEVICE)
    _use(copy.deepcopy(model))
    before = _allocated()
    for _ in range(3):
        engine = dsi.init_inference(model)
        engine.generate(**_inputs("llama", 2, 7, None), max_new_tokens=8, do_sample=False)
        engine.restore()
        del engine
        assert _allocated() == before


def _use(model: Any) -> None:
    engine = dsi.init_inference(model)
    for batch in (1, 2):
        engine.generate(**_inputs("llama", batch, 7, None), max_new_tokens=8, do_sample=False)
    engine(**_inputs("llama", 2, 9, "left"))
