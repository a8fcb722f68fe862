"""Image layers with the Triton table of operations, end to end, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("diffusers")

FP32 = 1e-5


@pytest.fixture(scope="module")
def probed(root):
    """What each model gave."""
    paths = os.pathsep.join(str(root / part) for part in (".", "kernels", "policies"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.map_probe"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("model", ["unet", "vae"])
def test_computes_what_stock_computes(probed, model):
    assert max(probed[model]["distances"]) <= FP32


@pytest.mark.parametrize("model", ["unet", "vae"])
def test_the_kernels_really_ran(probed, model):
    launches = probed[model]["launches"]
    assert {"add_map", "group_norm", "summed_map", "upsample_map"} <= set(launches)
    assert ("geglu" in launches) == (model == "unet")


@pytest.mark.parametrize("model", ["unet", "vae"])
def test_a_residual_blocks_sum_leaves_its_moments_to_the_next_norm(probed, model):
    """Not where the blocks of the way up concatenate maps first, nor where a map is sampled anew."""
    launches = probed[model]["launches"]
    assert 0 < launches["moments"] <= launches["summed_map"]
