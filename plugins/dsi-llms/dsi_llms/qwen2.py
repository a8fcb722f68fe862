"""Qwen2 and Qwen2.5: biases on q, k and v; some layers see a sliding window, where the config asks for it.

Source: Yang et al. 2024, https://arxiv.org/abs/2407.10671.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Attr, Block, Policy, hookimpl
from dsi_llms.decoder import CALL, FACTS, Family

DSI_API = (1, 1)

_FAMILY = Family(module="qwen2", prefix="Qwen2")

QWEN2 = Policy(
    name="qwen2",
    requires=("transformers>=5.17",),
    blocks=[
        Block(
            layer=_FAMILY.named("DecoderLayer"),
            container="dsi.containers:DecoderLayer",
            call=CALL,
            slots=_FAMILY.slots(),
            facts={**FACTS, "window": Attr("self_attn.sliding_window")},
        )
    ],
    models=[_FAMILY.causal_lm()],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(QWEN2)
