"""Phi-3 and Phi-4-mini: the checkpoint holds q, k and v as one projection, and gate and up as another.

Rotary terms may cover a part of each head, and change past a length ("longrope"): they arrive from the model. Once a
text grows past that length the model computes its cache anew, which transformers' loop knows how to do.

Source: Abdin et al. 2024, https://arxiv.org/abs/2404.14219.
"""

from __future__ import annotations

from collections.abc import Callable

from dsi.policy import Block, Config, Packed, Policy, hookimpl
from dsi_llms.decoder import CALL, FACTS, Family

DSI_API = (1, 1)

_FAMILY = Family(module="phi3", prefix="Phi3")

PHI3 = Policy(
    name="phi3",
    requires=("transformers>=5.17",),
    blocks=[
        Block(
            layer=_FAMILY.named("DecoderLayer"),
            container="dsi.containers:DecoderLayer",
            call=CALL,
            slots={
                **_FAMILY.slots(),
                "qkv": Packed("self_attn.qkv_proj", layout="thirds", split="column"),
                "gate_up": Packed("mlp.gate_up_proj", layout="halves", split="column"),
            },
            facts={**FACTS, "window": Config("sliding_window")},
        )
    ],
    models=[
        _FAMILY.causal_lm(
            overrides={"prepare_inputs_for_generation": Config("original_max_position_embeddings")},
        )
    ],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(PHI3)
