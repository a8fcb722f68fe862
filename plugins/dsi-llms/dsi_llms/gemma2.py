"""Gemma 2: sandwich norms, capped scores and logits, and a sliding window in every other layer.

Source: Gemma Team 2024, https://arxiv.org/abs/2408.00118.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Attr, Block, Config, Policy, hookimpl
from dsi_llms.decoder import CALL, FACTS, Family
from dsi_llms.gemma import supports

DSI_API = (1, 1)

_FAMILY = Family(module="gemma2", prefix="Gemma2", eps="eps", offset=1.0)

GEMMA2 = Policy(
    name="gemma2",
    requires=("transformers>=5.17",),
    supports=supports,
    blocks=[
        Block(
            layer=_FAMILY.named("DecoderLayer"),
            container="dsi.containers:DecoderLayer",
            call=CALL,
            slots={
                **_FAMILY.slots(),
                "norm_attn_out": _FAMILY.norm("post_attention_layernorm"),
                "norm_mlp": _FAMILY.norm("pre_feedforward_layernorm"),
                "norm_mlp_out": _FAMILY.norm("post_feedforward_layernorm"),
            },
            facts={
                **FACTS,
                "activation": Config("hidden_activation"),
                "softcap": Attr("self_attn.attn_logit_softcapping"),
                "window": Attr("self_attn.sliding_window"),
            },
        )
    ],
    models=[_FAMILY.causal_lm(logit_cap=Config("final_logit_softcapping"))],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(GEMMA2)
