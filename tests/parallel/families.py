"""Tiny models that four ranks can share: eight heads, and four kv heads where they are grouped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor

import dsi
from dsi.policy import Attr, Block, Call, Concat, Config, Const, Keep, Linear, Norm, Packed, Policy
from dsi.ranks import Answer, Ask
from dsi_policies.llama import LLAMA
from tests.core.twins import FP32, distance
from tests.support import inputs_for, tiny
from tests.support.models import make_hostile_

HEADS: dict[str, dict[str, int]] = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "gpt2": {"n_head": 8},
    "distilbert": {"n_heads": 8},
    "clip": {},
    "clip_text": {"num_attention_heads": 8},
    "clip_vision": {"num_attention_heads": 8},
}
BUILT_IN = (
    *("llama", "llama_mha", "gpt2", "opt", "opt_post_norm"),
    *("bert", "roberta", "distilbert", "clip", "clip_text", "clip_vision"),
)
NEW_TOKENS = 5


@attrs.frozen(eq=False)
class Subject:
    """A stock model, what to ask of it, and the policy that fits; the registry's where it is left out."""

    model: Any
    ask: Ask
    policy: Policy | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.policy is None else {"injection_policy": self.policy}

    def single(self) -> Answer:
        """What one rank says."""
        return self.ask(dsi.init_inference(copy.deepcopy(self.model), strict=True, **self.options))


def built_in(family: str) -> Subject:
    """A family whose policy ships."""
    model = tiny(
        family, **HEADS.get(family, {"num_attention_heads": 8} if family in ("bert", "roberta", "opt") else {})
    )
    inputs = inputs_for(family, pad=None if family == "clip_vision" else "ragged")
    return Subject(model, Ask(dict(inputs), NEW_TOKENS if model.can_generate() else 0))


# --- the vocabulary beyond what ships ---------------------------------------------------------------------------------

_SIZE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 4}
_FACTS = {"activation": Config("hidden_act"), "pre_norm": Const(True), "causal": Const(True)}


def _llama_like(module: str, prefix: str, eps: str = "variance_epsilon", **slots: Any) -> Policy:
    """LLaMA's policy under other class names; a slot of None is taken out."""
    name = f"transformers.models.{module}.modeling_{module}:{prefix}"
    block = LLAMA.blocks[0]

    def norm(slot: Any) -> Any:
        return Norm(slot.path, kind="rms", eps=eps, cls=f"{name}RMSNorm") if isinstance(slot, Norm) else slot

    merged = {place: norm(slot) for place, slot in {**block.slots, **slots}.items() if slot is not None}
    return Policy(name=module, blocks=[attrs.evolve(block, layer=f"{name}DecoderLayer", slots=merged)])


def _phi3() -> tuple[Policy, Any]:
    packed = {
        "qkv": Packed("self_attn.qkv_proj", layout="thirds", split="column"),
        "gate_up": Packed("mlp.gate_up_proj", layout="halves", split="column"),
    }
    return _llama_like("phi3", "Phi3", **packed), transformers.Phi3Config(**_GROUPED)


def _qwen3() -> tuple[Policy, Any]:
    norms = {"q_norm": Norm("self_attn.q_norm"), "k_norm": Norm("self_attn.k_norm")}
    return _llama_like("qwen3", "Qwen3", **norms), transformers.Qwen3Config(**_GROUPED, head_dim=16)


def _mixtral() -> tuple[Policy, Any]:
    experts = {"mlp": Keep("mlp"), "gate_up": None, "down": None}
    config = transformers.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return _llama_like("mixtral", "Mixtral", **experts), config


def _replicated_mlp() -> tuple[Policy, Any]:
    whole = {"gate_up": Concat("mlp.gate_proj", "mlp.up_proj"), "down": Linear("mlp.down_proj")}
    return _llama_like("llama", "Llama", **whole), transformers.LlamaConfig(**_GROUPED, mlp_bias=True)


def _neox(*, parallel: bool) -> tuple[Policy, Any]:
    block = Block(
        layer="transformers.models.gpt_neox.modeling_gpt_neox:GPTNeoXLayer",
        container="dsi.containers:DecoderLayer",
        call=Call(cache="layer_past", rope="position_embeddings"),
        slots={
            "norm_attn": Norm("input_layernorm"),
            "qkv": Packed("attention.query_key_value", layout="head_interleaved", split="column"),
            "out": Linear("attention.dense", split="row"),
            "norm_mlp": Norm("post_attention_layernorm"),
            "up": Linear("mlp.dense_h_to_4h", split="column"),
            "down": Linear("mlp.dense_4h_to_h", split="row"),
        },
        facts={
            **_FACTS,
            "heads": Config("num_attention_heads"),
            "kv_heads": Config("num_attention_heads"),
            "head_dim": Attr("attention.head_size"),
            "scale": Attr("attention.scaling"),
            "layer_idx": Attr("attention.layer_idx"),
            "parallel": Attr("use_parallel_residual"),
        },
    )
    config = transformers.GPTNeoXConfig(**_SIZE, use_parallel_residual=parallel)
    return Policy(name="neox", blocks=[block]), config


def _falcon() -> tuple[Policy, Any]:
    linear = "transformers.models.falcon.modeling_falcon:FalconLinear"
    block = Block(
        layer="transformers.models.falcon.modeling_falcon:FalconDecoderLayer",
        container="dsi.containers:DecoderLayer",
        call=Call(cache="layer_past", rope="position_embeddings", returns="tuple"),
        slots={
            "norm_attn": Norm("ln_attn"),
            "norm_mlp": Norm("ln_mlp"),
            "qkv": Packed("self_attention.query_key_value", layout="kv_grouped", split="column", cls=linear),
            "out": Linear("self_attention.dense", split="row", cls=linear),
            "up": Linear("mlp.dense_h_to_4h", split="column", cls=linear),
            "down": Linear("mlp.dense_4h_to_h", split="row", cls=linear),
        },
        facts={
            **_FACTS,
            "heads": Attr("self_attention.num_heads"),
            "kv_heads": Attr("self_attention.num_kv_heads"),
            "head_dim": Attr("self_attention.head_dim"),
            "scale": Attr("self_attention.inv_norm_factor"),
            "layer_idx": Attr("self_attention.layer_idx"),
            "activation": Config("activation"),
            "parallel": Const(True),
            "repeat_kv": Const(True),
        },
    )
    size = {
        name: value for name, value in _SIZE.items() if name not in ("intermediate_size", "max_position_embeddings")
    }
    config = transformers.FalconConfig(**size, num_kv_heads=4, new_decoder_architecture=True, bias=True)
    return Policy(name="falcon", blocks=[block]), config


def _bloom() -> tuple[Policy, Any]:
    neox = _neox(parallel=False)[0].blocks[0]
    block = attrs.evolve(
        neox,
        layer="transformers.models.bloom.modeling_bloom:BloomBlock",
        call=Call(cache="layer_past", bias="alibi", returns="tuple", attention=("eager",)),
        slots={
            **neox.slots,
            "qkv": Packed("self_attention.query_key_value", layout="head_interleaved", split="column"),
            "out": Linear("self_attention.dense", split="row"),
        },
        facts={
            **_FACTS,
            "heads": Attr("self_attention.num_heads"),
            "kv_heads": Attr("self_attention.num_heads"),
            "head_dim": Attr("self_attention.head_dim"),
            "scale": Attr("self_attention.inv_norm_factor"),
            "layer_idx": Attr("self_attention.layer_idx"),
            "activation": Const("gelu_pytorch_tanh"),
            "biased": Const(True),
            "causal": Const(False),
        },
    )
    config = transformers.BloomConfig(vocab_size=67, hidden_size=32, n_layer=2, n_head=8, pad_token_id=0)
    config._attn_implementation = "eager"
    return Policy(name="bloom", blocks=[block]), config


VOCABULARY: dict[str, Callable[[], tuple[Policy, Any]]] = {
    "thirds of groups, halves": _phi3,
    "qk-norms": _qwen3,
    "kept experts": _mixtral,
    "whole MLP": _replicated_mlp,
    "head_interleaved, parallel": lambda: _neox(parallel=True),
    "head_interleaved, in turn": lambda: _neox(parallel=False),
    "kv_grouped, repeated": _falcon,
    "biases of heads": _bloom,
}


def described(name: str) -> Subject:
    """A family told in the vocabulary alone."""
    policy, config = VOCABULARY[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    make_hostile_(model)
    model.generation_config.eos_token_id = None
    ids = torch.randint(4, 67, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return Subject(model, Ask({"input_ids": ids, "attention_mask": mask}, NEW_TOKENS), policy)


# --- agreement --------------------------------------------------------------------------------------------------------


def assert_agree(found: list[Answer], wanted: Answer) -> None:
    """Every rank says what a single one does, and all the same bits."""
    for answer in found:
        assert distance(answer.outputs, wanted.outputs) <= FP32
        assert _same(answer.tokens, wanted.tokens)
        assert all(torch.equal(one, other) for one, other in zip(answer.outputs, found[0].outputs, strict=True))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
