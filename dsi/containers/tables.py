"""The tables of operations by name, and which of them a device gets."""

from __future__ import annotations

import torch

from dsi.containers.ops import AtenOps
from dsi.containers.triton_ops import TritonLayerOps, TritonOps

TABLES: dict[str, AtenOps] = {table.name: table for table in (AtenOps(), TritonOps(), TritonLayerOps())}


def choose_ops(device: torch.device, use_triton: bool | None) -> str:
    """The name of the table for a device: "triton" on CUDA unless refused, else "aten"."""
    return "triton" if device.type == "cuda" and use_triton is not False else "aten"
