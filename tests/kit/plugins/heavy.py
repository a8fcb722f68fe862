"""A plugin that imports torch when it is imported."""

from __future__ import annotations

import attrs
import torch

from dsi.policy import hookimpl
from dsi_policies.llama import LLAMA

DSI_API = (1, 0)
POLICY = attrs.evolve(LLAMA, name=f"heavy-{torch.float32.itemsize}")


@hookimpl
def dsi_register_policies(register):
    register(POLICY)
