"""A plugin that prints when it is imported."""

from __future__ import annotations

import sys

import attrs

from dsi.policy import hookimpl
from dsi_policies.llama import LLAMA

DSI_API = (1, 0)
POLICY = attrs.evolve(LLAMA, name="talkative")
sys.stdout.write("hello\n")


@hookimpl
def dsi_register_policies(register):
    register(POLICY)
