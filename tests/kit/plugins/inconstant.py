"""A plugin that registers something else each time."""

from __future__ import annotations

import attrs

from dsi.policy import hookimpl
from dsi_policies.llama import LLAMA

DSI_API = (1, 0)
POLICY = attrs.evolve(LLAMA, name="inconstant")
_CALLS: list[int] = []


@hookimpl
def dsi_register_policies(register):
    register(POLICY)
    _CALLS.append(len(_CALLS))
    register(attrs.evolve(POLICY, name=f"inconstant-{len(_CALLS)}"))
