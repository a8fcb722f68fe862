"""A plugin that registers another policy than the one it has."""

from __future__ import annotations

import attrs

from dsi.policy import hookimpl
from dsi_policies.llama import LLAMA

DSI_API = (1, 0)
POLICY = attrs.evolve(LLAMA, name="forgetful")


@hookimpl
def dsi_register_policies(register):
    register(attrs.evolve(POLICY))
