"""What the public vocabulary can say beyond the families that ship: policies as a third party would write them.

Each is handed to `init_inference` as an object, so nothing but `dsi.policy` is used to describe an architecture.
"""

from __future__ import annotations

import copy
from typing import Any

import attrs
import pytest
import torch
import transformers

import dsi
from dsi.policy import Attr, Block, Config, Const, Keep, Norm, Packed, Policy, Slot
from dsi_policies.llama import LLAMA
from tests.core.twins import FP32, distance, twins_of
from tests.support.models import make_hostile_

SIZE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD_DIM = {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2}


@attrs.frozen(kw_only=True)
class Case:
    """A decoder family told in terms of LLaMA's block.

    Args:
        module: of transformers.models.
        prefix: of its class names.
        config: settings beyond `SIZE`.
        eps, offset: of its norms.
        facts, slots: what differs from LLaMA; a slot of None is taken out.
    """

    module: str
    prefix: str
    config: dict[str, Any] = attrs.field(factory=dict)
    eps: str = "variance_epsilon"
    offset: float = 0.0
    facts: dict[str, Any] = attrs.field(factory=dict)
    slots: dict[str, Slot | None] = attrs.field(factory=dict)

    def name_of(self, cls: str) -> str:
        return f"transformers.models.{self.module}.modeling_{self.module}:{self.prefix}{cls}"

    def norm(self, path: str) -> Norm:
        return Norm(path, kind="rms", eps=self.eps, cls=self.name_of("RMSNorm"), offset=self.offset)

    def policy(self) -> Policy:
        llama = LLAMA.blocks[0]
        slots = {
            **llama.slots,
            "norm_attn": self.norm("input_layernorm"),
            "norm_mlp": self.norm("post_attention_layernorm"),
            **{place: self.norm(slot.path) if isinstance(slot, Norm) else slot for place, slot in self.slots.items()},
        }
        block = attrs.evolve(
            llama,
            layer=self.name_of("DecoderLayer"),
            slots={place: slot for place, slot in slots.items() if slot is not None},
            facts={**llama.facts, **self.facts},
        )
        return Policy(name=self.module, blocks=[block])

    def model(self) -> Any:
        config = getattr(transformers, f"{self.prefix}Config")(**{**SIZE, **self.config})
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.prefix}ForCausalLM")(config).eval()
        make_hostile_(model)
        model.generation_config.eos_token_id = None
        return model


QK_NORM: dict[str, Slot | None] = {"q_norm": Norm("self_attn.q_norm"), "k_norm": Norm("self_attn.k_norm")}
MOE: dict[str, Slot | None] = {"mlp": Keep("mlp"), "gate_up": None, "down": None}
CASES = [
    Case(module="mistral", prefix="Mistral", config={**HEAD_DIM, "sliding_window": 8}),
    Case(module="qwen2", prefix="Qwen2"),
    Case(module="qwen3", prefix="Qwen3", config=HEAD_DIM, slots=QK_NORM),
    Case(
        module="phi3",
        prefix="Phi3",
        slots={
            "qkv": Packed("self_attn.qkv_proj", layout="thirds", split="column"),
            "gate_up": Packed("mlp.gate_up_proj", layout="halves", split="column"),
        },
    ),
    Case(module="gemma", prefix="Gemma", config=HEAD_DIM, eps="eps", offset=1.0),
    Case(
        module="gemma2",
        prefix="Gemma2",
        config={**HEAD_DIM, "sliding_window": 8},
        eps="eps",
        offset=1.0,
        facts={"activation": Config("hidden_activation"), "softcap": Attr("self_attn.attn_logit_softcapping")},
        slots={
            "norm_attn_out": Norm("post_attention_layernorm"),
            "norm_mlp": Norm("pre_feedforward_layernorm"),
            "norm_mlp_out": Norm("post_feedforward_layernorm"),
        },
    ),
    Case(module="mixtral", prefix="Mixtral", config={**EXPERTS, "num_local_experts": 4}, slots=MOE),
    Case(
        module="qwen3_moe",
        prefix="Qwen3Moe",
        config={**HEAD_DIM, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 24},
        slots={**MOE, **QK_NORM},
    ),
]


def inputs(pad: str | None) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 67, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if pad is not None:
        mask[0, : 3 if pad == "left" else None] = 0
    if pad == "right":
        mask[0] = 1
        mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.module)
def test_a_family_described_by_data_alone_equals_stock(case):
    pair = twins_of(case.model(), {"injection_policy": case.policy(), "strict": True})
    assert len(pair.containers) == 2
    for pad in (None, "left", "right"):
        batch = inputs(pad)
        with torch.no_grad():
            assert distance(pair.model(**batch).logits, pair.stock(**batch).logits) <= FP32
    assert pair.stock_calls == 0
    for mode in ({}, {"num_beams": 2}):
        arguments = {**inputs("left"), "max_new_tokens": 8, "do_sample": False, **mode}
        assert torch.equal(pair.engine.generate(**arguments), pair.stock.generate(**arguments))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.module)
def test_its_weights_come_back(case):
    pair = twins_of(case.model(), {"injection_policy": case.policy(), "dtype": "bf16", "keep_original": "host"})
    assert list(pair.model.state_dict()) == list(pair.stock.state_dict())
    pair.engine.restore()
    for name, value in pair.stock.state_dict().items():
        assert torch.equal(pair.model.state_dict()[name], value), name


def test_a_kept_mixture_of_experts_still_records_its_router():
    case = next(case for case in CASES if case.module == "mixtral")
    pair = twins_of(case.model(), {"injection_policy": case.policy()})
    wanted = pair.stock(**inputs(None), output_router_logits=True).router_logits
    found = pair.model(**inputs(None), output_router_logits=True).router_logits
    assert len(found) == len(wanted) > 0
    assert distance(found, wanted) <= FP32


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
    case = Case(module="llama", prefix="Llama", config=HEAD_DIM)
    model = case.model()
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
    with torch.no_grad():
        assert distance(pair.model(**inputs("left")).logits, pair.stock(**inputs("left")).logits) <= FP32
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
    from dsi.containers import DecoderLayer

    refusal = DecoderLayer.check(facts, slots)
    assert refusal is not None
    assert message in refusal.reason


def test_keep_under_another_name_is_the_policy_s_fault():
    case = next(case for case in CASES if case.module == "mixtral")
    policy = case.policy()
    slots = {("experts" if place == "mlp" else place): slot for place, slot in policy.blocks[0].slots.items()}
    wrong = attrs.evolve(policy, blocks=[attrs.evolve(policy.blocks[0], slots=slots)])
    with pytest.raises(dsi.PolicyError, match="under its own name"):
        dsi.init_inference(copy.deepcopy(case.model()), injection_policy=wrong)
