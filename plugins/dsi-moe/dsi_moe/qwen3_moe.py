"""Qwen3-MoE: q and k are normalized over each head; experts in all or some layers, a plain MLP in the others.

Source: Yang et al. 2025, https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Block, Policy, hookimpl
from dsi_moe.decoder import CALL, FACTS, Family

DSI_API = (1, 1)

_FAMILY = Family(module="qwen3_moe", prefix="Qwen3Moe")

QWEN3_MOE = Policy(
    name="qwen3_moe",
    requires=("transformers>=5.17",),
    blocks=[
        Block(
            layer=_FAMILY.named("DecoderLayer"),
            container="dsi.containers:DecoderLayer",
            call=CALL,
            slots={
                **_FAMILY.slots(),
                "q_norm": _FAMILY.norm("self_attn.q_norm"),
                "k_norm": _FAMILY.norm("self_attn.k_norm"),
            },
            facts=FACTS,
        )
    ],
    models=[_FAMILY.causal_lm()],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(QWEN3_MOE)
