"""Gemma: norms multiply by 1 + weight in fp32, and the embedding module scales what it looks up by sqrt(hidden size).

Source: Gemma Team 2024, https://arxiv.org/abs/2403.08295.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsi.policy import Block, Policy, Refusal, hookimpl
from dsi_llms.decoder import CALL, FACTS, Family

DSI_API = (1, 1)

_FAMILY = Family(module="gemma", prefix="Gemma", eps="eps", offset=1.0)


def supports(config: Any) -> Refusal | None:
    """Not where it embeds text."""
    if config.use_bidirectional_attention:
        return Refusal(reason="use_bidirectional_attention=True is not implemented", hint="the model runs as it is")
    return None


GEMMA = Policy(
    name="gemma",
    requires=("transformers>=5.17",),
    supports=supports,
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
    register(GEMMA)
