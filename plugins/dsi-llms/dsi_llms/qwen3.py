"""Qwen3: q and k are normalized over each head; some layers see a sliding window, where the config asks for it.

Source: Yang et al. 2025, https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Attr, Block, Policy, hookimpl
from dsi_llms.decoder import CALL, FACTS, Family

DSI_API = (1, 1)

_FAMILY = Family(module="qwen3", prefix="Qwen3")

QWEN3 = Policy(
    name="qwen3",
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
            facts={**FACTS, "window": Attr("self_attn.sliding_window")},
        )
    ],
    models=[_FAMILY.causal_lm()],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(QWEN3)
