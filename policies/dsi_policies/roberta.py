"""RoBERTa: BERT's layer under a class of its own.

Source: Liu et al. 2019, https://arxiv.org/abs/1907.11692.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from dsi.policy import Context, Policy, hookimpl
from dsi_policies.bert import BERT, encoder_block

DSI_API = (1, 0)

ROBERTA = attrs.evolve(
    BERT,
    name="roberta",
    context=Context(after="pad_token_id"),
    blocks=[encoder_block("transformers.models.roberta.modeling_roberta:RobertaLayer")],
)


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register(ROBERTA)
