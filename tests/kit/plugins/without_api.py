"""A plugin that does not say which API it was written for."""

from __future__ import annotations

import attrs

from dsi.policy import hookimpl
from dsi_policies.llama import LLAMA

POLICY = attrs.evolve(LLAMA, name="without-api")


@hookimpl
def dsi_register_policies(register):
    register(POLICY)
