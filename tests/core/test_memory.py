"""Weights are in memory once, and an injection needs no more beside them than one layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import dsi
from tests.core.memory_probe import PROBES
from tests.core.twins import LARGE, bytes_of, containers, held, linears
from tests.support import FAMILIES, inputs_for, tiny

# page tables, allocator and interpreter
SLACK = 1 << 18


@pytest.fixture(scope="module")
def probed(root):
    """Bytes that injections take; in a process of its own, because only then is every byte accounted for."""
    paths = os.pathsep.join(str(root / part) for part in (".", "kernels", "policies"))
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.memory_probe"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths, **malloc},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PROBES)
def test_peak_and_rest_of_an_injection(probed, name):
    found = probed[name]
    assert found["weights"] > 50e6
    grown = found["weights_after"] - found["weights"]
    if PROBES[name][3] == "host":
        # what the cast loses is kept, and cast and loss take the bytes of the original
        grown = 0
    layer = max(found["layer_before"], found["layer_after"])
    # weights alive afterwards: 1 % more than there must be
    assert found["init"]["after"] <= grown + 0.01 * found["weights"]
    assert found["init"]["peak"] <= max(grown, 0) + layer + SLACK


@pytest.mark.parametrize("name", [name for name, probe in PROBES.items() if name != "gpt2, 16 bits"])
def test_peak_and_rest_of_a_restore(probed, name):
    found = probed[name]
    grown = max(found["weights_after"] - found["weights"], 0)
    layer = max(found["layer_before"], found["layer_after"])
    assert abs(found["restore"]["after"]) <= 0.01 * found["weights"]
    assert found["restore"]["peak"] <= grown + layer + SLACK


# --- counted in this process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("family", LARGE)
def test_every_weight_is_there_once(family, large):
    model = tiny(family, **(LARGE[family] if large else {}))
    weights = sum(p.nbytes for p in model.parameters())
    before = held()
    engine = dsi.init_inference(model)
    assert held() - before <= 0.01 * weights
    with torch.no_grad():
        model(**inputs_for(family, 1, 4), output_attentions=True, is_causal=True)
        model.train()
        model(**inputs_for(family, 1, 4))
        model.eval()
    assert held() - before <= 0.01 * weights
    engine.restore()
    assert abs(held() - before) <= 0.01 * weights


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_halves_the_weights(dtype):
    model = tiny("llama", **LARGE["llama"])
    weights = sum(p.nbytes for p in model.parameters())
    before = held()
    dsi.init_inference(model, dtype=dtype)
    assert held() - before <= -0.49 * weights
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


# --- the plan is what is there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [*((family, {}) for family in FAMILIES), *LARGE.items(), ("bert", {"hidden_size": 774, "num_attention_heads": 6})],
    ids=str,
)
def test_the_plan_is_what_stands_on_the_model(family, overrides, dtype):
    model = tiny(family, **overrides)
    original = {path: type(module) for path, module in model.named_modules()}
    plan = dsi.plan(model, dtype=dtype)
    engine = dsi.init_inference(model, dtype=dtype)
    assert engine.plan.to_dict() == plan.to_dict()
    layers = dict(model.named_modules())
    assert sorted(block.path for block in plan.blocks) == sorted(
        path for path, module in layers.items() if module in containers(model)
    )
    for block in plan.blocks:
        container = layers[block.path]
        assert f"{type(container).container_class.__module__}".startswith("dsi.containers")
        assert type(container).container_class.__name__ == block.container.partition(":")[2]
        assert isinstance(container, original[block.path])
        assert container.ops_name == block.ops
        there = 0
        for slot in block.slots:
            place = getattr(container, slot.place)
            there += sum(bytes_of(p) for p in place.parameters())
            if slot.form != "shared":
                assert place.form == slot.form
                assert (place.out_features, place.in_features) == slot.shape
        assert abs(there - block.bytes_after) <= 0.01 * block.bytes_after
    total = sum(b.bytes_after for b in plan.blocks)
    assert abs(sum(bytes_of(p) for layer in containers(model) for p in layer.parameters()) - total) <= 0.01 * total
    assert len(linears(model)) == sum(slot.form != "shared" for block in plan.blocks for slot in block.slots)
