"""The cases of benchmarks/gpu_diffusion.py, with tiny parts on a CPU: that each checks, measures and reports."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

PLACES = ("gpu_diffusion", "diffusion_models", "gpu_models", "gpu_rivals", "gpu_decode", "measure", "documents")


@pytest.fixture
def table(root, monkeypatch):
    """(cases by name, the module of the cases, the module of what is measured)."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    before = set(sys.modules)
    module = importlib.import_module("gpu_diffusion")
    models, rivals = (importlib.import_module(name) for name in ("diffusion_models", "gpu_rivals"))
    stage = importlib.import_module("gpu_models").Stage()
    options = {"quick": True, "peak": {"TFLOP/s bf16": 1.0}, "rivals": rivals.Rivals.NONE}
    with torch.no_grad():
        yield module.diffusion_cases(stage, sizes=models.TINY, **options), module, models
    for name in set(sys.modules) - before:
        if name in PLACES:
            del sys.modules[name]


PARTS = ("sd1.5-unet", "sd-vae", "sdxl-unet")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_measured_beside_stock(table, part):
    cases, _, _ = table
    name = next(name for name in cases if name.startswith(part))
    result = cases[name]()
    assert set(result.times) == {"stock", "dsi"}
    assert 0 < result.check["ratio"] <= 1.2
    assert result.ceiling["TFLOP/s"] > 0
    assert result.facts["ready_seconds"] > 0


def test_a_part_that_is_wrong_is_refused(table, monkeypatch):
    cases, module, models = table
    right = models.denoise

    def wrong(unet, *given):
        found = right(unet, *given)
        return found * 1.05 if hasattr(unet, "_dsi") else found

    monkeypatch.setattr(module, "denoise", wrong)
    name = next(name for name in cases if name.startswith("sd1.5-unet"))
    with pytest.raises(module.Refused, match=r"sd1\.5-unet 2x8x8: error"):
        cases[name]()


def test_pictures_are_measured_beside_stock(table):
    cases, _, models = table
    name = next(name for name in cases if name.startswith("sd1.5-picture"))
    result = cases[name]()
    assert set(result.times) == {"stock", "dsi"}
    assert result.facts["steps"] == models.TINY.steps
    assert set(result.facts["ms a step"]) == {"stock", "dsi"}
    assert 0 < result.check["worst ratio of a step's latents"] <= 1.2
