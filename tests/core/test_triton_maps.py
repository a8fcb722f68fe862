"""Image layers with the Triton table of operations, end to end, in Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.core.probes import run_probe

pytest.importorskip("diffusers")

FP32 = 1e-5


@pytest.fixture(scope="module")
def probed(root):
    """What each model gave."""
    return run_probe("tests.core.map_probe", root)


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
