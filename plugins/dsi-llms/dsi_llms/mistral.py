"""Mistral: every layer attends to the last `sliding_window` positions, where the config has one.

Source: Jiang et al. 2023, https://arxiv.org/abs/2310.06825.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Block, Config, Policy, hookimpl
from dsi_llms.decoder import CALL, FACTS, Family

DSI_API = (1, 1)

_FAMILY = Family(module="mistral", prefix="Mistral")

MISTRAL = Policy(
    name="mistral",
    requires=("transformers>=5.17",),
    blocks=[
        Block(
            layer=_FAMILY.named("DecoderLayer"),
            container="dsi.containers:DecoderLayer",
            call=CALL,
            slots=_FAMILY.slots(),
            facts={**FACTS, "window": Config("sliding_window")},
        )
    ],
    models=[_FAMILY.causal_lm()],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(MISTRAL)
