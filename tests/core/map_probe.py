"""Image layers with the Triton table of operations, on a CPU: `TRITON_INTERPRET=1 python -m tests.core.map_probe`.

As `triton_probe`, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import dsi
import dsi.containers.stand_in
import dsi.planner
import dsi_kernels

OPS = ("add_map", "geglu", "group_norm", "summed_map", "upsample_map")


def tiny(cls: Any, **config: Any) -> nn.Module:
    """A model whose norms and biases all matter."""
    torch.manual_seed(0)
    model: nn.Module = cls(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers import UNet2DConditionModel

    model = tiny(
        UNet2DConditionModel, sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, (torch.randn(2, 4, 6, 8), torch.tensor(7), torch.randn(2, 5, 12))


def vae() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers import AutoencoderKL

    model = tiny(
        AutoencoderKL, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, (torch.randn(1, 3, 12, 8),)


def counted(name: str, launches: Counter[str]) -> Any:
    """The kernel, counting its calls, and those of a group norm that was left its moments."""
    op = getattr(dsi_kernels, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        launches[name] += 1
        launches["moments"] += kwargs.get("moments") is not None
        return op(*args, **kwargs)

    return count


def probe(model: nn.Module, inputs: tuple[Tensor, ...], launches: Counter[str]) -> dict[str, Any]:
    stock = deepcopy(model)
    engine = dsi.init_inference(model, dtype=torch.float32, replace_with_kernel_inject=True)
    launches.clear()
    with torch.no_grad():
        expected, found = stock(*inputs)[0], engine.module(*inputs)[0]
        counted = dict(launches)
        with torch.inference_mode():
            inferred = engine.module(*inputs)[0]
    apart = [float((y - expected).norm() / expected.norm()) for y in (found, inferred)]
    return {"distances": apart, "launches": counted}


if __name__ == "__main__":
    assert dsi_kernels.INTERPRETED
    torch.set_num_threads(1)
    for module in (dsi.containers.stand_in, dsi.planner):
        module.choose_ops = lambda _device, _use_triton: "triton"  # type: ignore[attr-defined]
    counter: Counter[str] = Counter()
    for op in OPS:
        setattr(dsi_kernels, op, counted(op, counter))
    sys.stdout.write(json.dumps({make.__name__: probe(*make(), counter) for make in (unet, vae)}))
