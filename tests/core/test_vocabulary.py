"""What the public vocabulary can say beyond the families that ship, and what it refuses.

Whole families described by data alone are the plugins' matter: tests/plugins.
"""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

import dsi
from dsi.containers import DecoderLayer
from dsi.policy import Block, Const, Norm, Policy
from dsi_policies.llama import LLAMA
from tests.core.twins import FP32, distance, twins_of
from tests.plugins.families import VARIANTS
from tests.support import inputs_for, tiny


class _Parallel(torch.nn.Module):
    """A layer whose attention and MLP read the same hidden states, made of LLaMA's parts."""

    def __init__(self, stock: torch.nn.Module, one_norm: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = stock.self_attn, stock.mlp
        self.input_layernorm = stock.input_layernorm
        if not one_norm:
            self.post_attention_layernorm = stock.post_attention_layernorm

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        if hasattr(self, "post_attention_layernorm"):
            normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + attended + self.mlp(normed)


@pytest.mark.parametrize("one_norm", [True, False], ids=["one norm", "two norms"])
def test_a_parallel_layer_of_somebody_s_own(one_norm):
    model = tiny("llama")
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = _Parallel(layer, one_norm)
    llama = LLAMA.blocks[0]
    block: Block = attrs.evolve(
        llama,
        layer=f"{_Parallel.__module__}:{_Parallel.__qualname__}",
        slots={place: slot for place, slot in llama.slots.items() if not (one_norm and place == "norm_mlp")},
        facts={**llama.facts, "parallel": Const(True)},
    )
    pair = twins_of(model.eval(), {"injection_policy": Policy(name="parallel", blocks=[block]), "strict": True})
    batch = inputs_for("llama", pad="left")
    with torch.no_grad():
        assert distance(pair.model(**batch).logits, pair.stock(**batch).logits) <= FP32
    assert pair.fused_calls == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_norm": Norm("self_attn.q_norm")}, "k_norm and q_norm come together"),
        ({"gate_up": None}, "the MLP is"),
        ({"norm_mlp": None}, "only a parallel layer"),
    ],
)
def test_slots_that_make_no_layer_are_refused(change, message):
    llama = LLAMA.blocks[0]
    slots = {place: slot for place, slot in {**llama.slots, **change}.items() if slot is not None}
    facts = {name: fact.value if isinstance(fact, Const) else 4 for name, fact in llama.facts.items()}
    facts |= {"activation": "silu", "parallel": False}
    refusal = DecoderLayer.check(facts, slots)
    assert refusal is not None
    assert message in refusal.reason


def test_keep_under_another_name_is_the_policy_s_fault():
    variant = VARIANTS["mixtral"]
    block = variant.policy.blocks[0]
    slots = {("experts" if place == "mlp" else place): slot for place, slot in block.slots.items()}
    wrong = attrs.evolve(variant.policy, blocks=[attrs.evolve(block, slots=slots)])
    with pytest.raises(dsi.PolicyError, match="under its own name"):
        dsi.init_inference(variant.model(), injection_policy=wrong)
