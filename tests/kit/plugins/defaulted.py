"""A plugin whose hook has a default, so that nobody would pass the argument."""

from __future__ import annotations

import attrs

from dsi.policy import hookimpl
from dsi_policies.llama import LLAMA

DSI_API = (1, 0)
POLICY = attrs.evolve(LLAMA, name="defaulted")


@hookimpl
def dsi_register_policies(register=None):
    register(POLICY)
