"""Mixtral: fused attention and norms; the router and the experts stay transformers' own.

Source: Jiang et al. 2024, https://arxiv.org/abs/2401.04088.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Block, Policy, hookimpl
from dsi_moe.decoder import CALL, FACTS, Family

DSI_API = (1, 1)

_FAMILY = Family(module="mixtral", prefix="Mixtral")

MIXTRAL = Policy(
    name="mixtral",
    requires=("transformers>=5.17",),
    blocks=[
        Block(
            layer=_FAMILY.named("DecoderLayer"),
            container="dsi.containers:DecoderLayer",
            call=CALL,
            slots=_FAMILY.slots(),
            facts=FACTS,
        )
    ],
    models=[_FAMILY.causal_lm()],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(MIXTRAL)
