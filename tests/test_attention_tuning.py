"""Which settings of a step's attention are tried, and for which shapes; the measuring itself is in tests/gpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsi import attention_tuning
from dsi.attention_tuning import FILLED, ROWS, Heads, candidates, heads_of, tune_attentions
from dsi.config import load_config
from dsi.containers.launches import IN_GRAPH
from dsi.planner import make_plan
from dsi.registry import Registry
from dsi.tuning import Found
from dsi_kernels import step_attention
from dsi_kernels.tuned import FOLDER, read_settings
from tests.support.models import tiny

MODELS = [Heads(heads=32, kv_heads=kv, head_dim=size) for kv, size in ((32, 128), (8, 128), (8, 64), (2, 80))]


def test_a_models_heads_are_its_layers() -> None:
    model = tiny("llama")
    config = model.config
    plan = make_plan(model, load_config(None, {}), Registry.load())
    given = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert heads_of(plan) == (Heads(heads=given[0], kv_heads=given[1], head_dim=given[2]),)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reach", FILLED)
@pytest.mark.parametrize("heads", MODELS, ids=str)
def test_candidates_are_settings_that_files_may_have(heads: Heads, reach: int, rows: int, tmp_path: Path) -> None:
    known = frozenset(read_settings(FOLDER / "step_attention" / "default.json")["*"])
    every = list(candidates(heads, 2, rows, reach))
    assert 8 <= len(every) <= 40
    assert len({tuple(sorted(one.items())) for one in every}) == len(every)
    assert all(set(one) == known for one in every)
    (path := tmp_path / "all.json").write_text(json.dumps({str(n): one for n, one in enumerate(every)}))
    assert len(read_settings(path, known)) == len(every)


def test_settings_are_kept_for_what_is_measured() -> None:
    """What the tuner fills is, in its turn, the greatest of its kind."""
    module = __import__("sys").modules[step_attention.__module__]
    assert module.ROWS == ROWS
    assert tuple(FILLED) == module.REACHES
    assert all(0 < filled < reach for reach, filled in FILLED.items())
    key = module.settings_key(64, 4, 2, 3, 1025)
    assert key == module.settings_key(64, 4, 2, 8, 8192) == "head_dim=64,group=4,bytes=2,rows=8,reach=8192"
    assert module.settings_key(64, 4, 2, 64, 10**6) == module.settings_key(64, 4, 2, 32, 32768)


def test_products_beside_it_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    assert torch.equal(attention_tuning._product(x, weight), x @ weight.mT)
    seen: list[bool] = []

    def product_of(x: torch.Tensor, weight: torch.Tensor) -> Any:
        seen.append(IN_GRAPH.get())
        return lambda x, weight: x @ weight.mT + 1

    monkeypatch.setattr(attention_tuning, "product_of", product_of)
    assert torch.equal(attention_tuning._product(x, weight), x @ weight.mT + 1)
    assert seen == [True]


def test_short_caches_come_first_and_a_budget_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[tuple[int, int]] = []

    def tune(heads: Heads, rows: int, reach: int, dtype: torch.dtype) -> Found | None:
        tuned.append((reach, rows))
        return None if rows == 8 else Found(op="step_attention", shape=str(reach), settings={}, time=1.0)

    monkeypatch.setattr(attention_tuning, "tune_attention", tune)
    every: dict[str, Any] = {"every": MODELS[:1], "rows": (1, 8), "dtype": torch.float16}
    assert len(list(tune_attentions(**every))) == 4
    assert tuned == [(reach, rows) for reach in FILLED for rows in (1, 8)]
    tuned.clear()
    # a case takes a second: the third is begun at two, the fourth is not
    assert len(list(tune_attentions(**every, budget=2.5, clock=iter(range(99)).__next__))) == 1
    assert tuned == [(256, 1), (256, 8)]
    # rows are those that settings are kept for, each once
    tuned.clear()
    list(tune_attentions(**every | {"rows": (1, 2, 4, 8), "reaches": (1024,)}))
    assert tuned == [(1024, 1), (1024, 8)]
    # a cache that is longer than the memory that is worth it
    tuned.clear()
    list(tune_attentions(**every | {"rows": (32,)}))
    assert tuned == [(256, 32), (1024, 32), (8192, 32)]
