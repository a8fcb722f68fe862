"""Transformers of two streams as graphs, with a stand-in for the capture; `plugins/dsi-mmdit` has their layers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.pipelines.test_pipeline_graphs import Pair
from tests.runtime.test_forward_graphs import graphs  # noqa: F401 - a fixture of every test here
from tests.support.pipelines import HIDDEN, hostile


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sd3() -> Any:
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, joint_attention_dim=HIDDEN, pooled_projection_dim=HIDDEN, **sizes
    )
    return hostile(model)


def sd3_call(rows: int = 2, side: int = 8, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(rows, 4, side, side, seed=seed),
        "timestep": torch.full((rows,), 700.0 - 100 * seed),
        "encoder_hidden_states": noise(rows, 7, HIDDEN, seed=seed),
        "pooled_projections": noise(rows, HIDDEN, seed=seed),
        "joint_attention_kwargs": None,
        "return_dict": False,
        **more,
    }


def flux() -> Any:
    sizes = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=HIDDEN, pooled_projection_dim=HIDDEN, axes_dims_rope=(4, 4, 8), **sizes
    )
    return hostile(model)


def flux_call(rows: int = 1, side: int = 4, seed: int = 0, **more: Any) -> dict[str, Any]:
    places = [(0.0, float(row), float(column)) for row in range(side) for column in range(side)]
    return {
        "hidden_states": noise(rows, side * side, 4, seed=seed),
        "timestep": torch.full((rows,), 0.7 - 0.1 * seed),
        "encoder_hidden_states": noise(rows, 7, HIDDEN, seed=seed),
        "pooled_projections": noise(rows, HIDDEN, seed=seed),
        "txt_ids": torch.zeros(7, 3),
        "img_ids": torch.tensor(places),
        "joint_attention_kwargs": {},
        "return_dict": False,
        **more,
    }


MODELS = {
    "sd3": (sd3, sd3_call, {"block_controlnet_hidden_states": [noise(2, 16, 32, seed=3)]}),
    "flux": (flux, flux_call, {"controlnet_block_samples": [noise(1, 16, 32, seed=3)]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_structure_is_right_at_its_first_call_and_replayed_after(name):
    build, call, control = MODELS[name]
    pair = Pair(build())
    for more in ({}, {"rows": 3}, {"side": 6}, control):
        for seed in range(3):
            pair.check(**call(seed=seed, **more), graph=None)
        assert pair.route.graph, pair.route
