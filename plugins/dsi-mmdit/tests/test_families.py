"""Every family of this package, held to dsi's conformance kit."""

from __future__ import annotations

import diffusers
import torch

from dsi.testing import PolicyConformance
from dsi_mmdit.flux import FLUX
from dsi_mmdit.sd3 import SD3

TEXT, POOLED = 20, 12


def noise(seed, *shapes):
    """Tensors of these shapes."""
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=drawn) for shape in shapes]


def sd3_inputs(model, rows, length, seed):
    """Arguments of a forward."""
    text, pooled, image = noise(seed, (rows, length, TEXT), (rows, POOLED), (rows, 4, 3, 5))
    return {
        "hidden_states": image,
        "timestep": torch.linspace(300.0, 700.0, rows),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
    }


class TestSD3(PolicyConformance):
    policy = SD3
    model_class = diffusers.SD3Transformer2DModel
    model_inputs = staticmethod(sd3_inputs)

    def tiny_config(self):
        # sizes that differ; one layer with a second attention, a plain one, and the last
        return {
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 3,
            "caption_projection_dim": 24,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": POOLED,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        }


class TestSD3WithoutNorms(TestSD3):
    def tiny_config(self):
        return {**super().tiny_config(), "qk_norm": None, "dual_attention_layers": ()}


def flux_inputs(model, rows, length, seed):
    """Arguments of a forward, for a picture of 3 x 5."""
    text, pooled, image = noise(seed, (rows, length, TEXT), (rows, POOLED), (rows, 15, 4))
    places = [(0.0, float(row), float(column)) for row in range(3) for column in range(5)]
    return {
        "hidden_states": image,
        "timestep": torch.linspace(0.3, 0.7, rows),
        "guidance": torch.full((rows,), 3.5),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "txt_ids": torch.zeros(length, 3),
        "img_ids": torch.tensor(places),
    }


class TestFlux(PolicyConformance):
    policy = FLUX
    model_class = diffusers.FluxTransformer2DModel
    model_inputs = staticmethod(flux_inputs)

    def tiny_config(self):
        return {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": POOLED,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        }
