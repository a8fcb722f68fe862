"""Falcon: one layer class in several forms, each a policy; the config decides which of them applies.

    two-norms    attention and MLP side by side, each with its norm            new_decoder_architecture: 40B, 180B
    one-norm     attention and MLP side by side, behind one norm                                         7B
    sequential   the MLP after the attention                                   parallel_attn=False:      RW 1B

Each form also with "-alibi", where the model adds position biases to the mask in the place of rotary embedding. Rows of
the fused projection are stored by kv head in all of them: one kv head (multi_query), as many as heads, or groups; with
new_decoder_architecture keys and values are repeated for every head before the cache.

Source: Almazrouei et al. 2023, https://arxiv.org/abs/2311.16867.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dsi.policy import (
    Alibi,
    Attr,
    Block,
    Call,
    CausalLM,
    Config,
    Const,
    Linear,
    Norm,
    Packed,
    Policy,
    Refusal,
    Rotary,
    hookimpl,
)

DSI_API = (1, 1)

_FALCON = "transformers.models.falcon.modeling_falcon:"
_LINEAR = _FALCON + "FalconLinear"

_NORMS: Mapping[str, Mapping[str, Norm]] = {
    "two-norms": {"norm_attn": Norm("ln_attn"), "norm_mlp": Norm("ln_mlp")},
    "one-norm": {"norm_attn": Norm("input_layernorm")},
    "sequential": {"norm_attn": Norm("input_layernorm"), "norm_mlp": Norm("post_attention_layernorm")},
}

_ROTARY_CALL = Call(cache="layer_past", rope="position_embeddings", returns="tuple")
# the biases come in the mask too, and the argument is read by eager attention alone; rotary terms come and are not read
_ALIBI_CALL = Call(
    cache="layer_past",
    returns="tuple",
    free=("alibi", "position_embeddings", "position_ids", "use_cache"),
    attention=("sdpa",),
)


def form(config: Any) -> str:
    """The name of the policy that is made for the config; "" where transformers' own layer does not run."""
    if config.new_decoder_architecture:
        norms = {1: "one-norm", 2: "two-norms"}.get(config.num_ln_in_parallel_attn, "")
        name = norms if config.parallel_attn else ""
    elif config.parallel_attn:
        name = "" if config.num_ln_in_parallel_attn == 2 else "one-norm"
    else:
        name = "sequential"
    if not (config.new_decoder_architecture or config.multi_query or config.num_kv_heads == config.num_attention_heads):
        return ""
    return f"{name}-alibi" if name and config.alibi else name


def _supports(wanted: str) -> Callable[[Any], Refusal | None]:
    def supports(config: Any) -> Refusal | None:
        found = form(config)
        if found == wanted:
            return None
        return Refusal(reason=f"the config is of the form {found}" if found else "transformers runs no such layer")

    return supports


def _policy(norms: str, *, alibi: bool) -> Policy:
    name = f"{norms}-alibi" if alibi else norms
    return Policy(
        name=name,
        requires=("transformers>=5.17",),
        supports=_supports(name),
        blocks=[
            Block(
                layer=_FALCON + "FalconDecoderLayer",
                container="dsi.containers:DecoderLayer",
                call=_ALIBI_CALL if alibi else _ROTARY_CALL,
                slots={
                    **_NORMS[norms],
                    "qkv": Packed("self_attention.query_key_value", layout="kv_grouped", split="column", cls=_LINEAR),
                    "out": Linear("self_attention.dense", split="row", cls=_LINEAR),
                    "up": Linear("mlp.dense_h_to_4h", split="column", cls=_LINEAR),
                    "down": Linear("mlp.dense_4h_to_h", split="row", cls=_LINEAR),
                },
                facts={
                    "heads": Attr("self_attention.num_heads"),
                    "kv_heads": Attr("self_attention.num_kv_heads"),
                    "head_dim": Attr("self_attention.head_dim"),
                    "scale": Attr("self_attention.inv_norm_factor"),
                    "layer_idx": Attr("self_attention.layer_idx"),
                    "activation": Config("activation"),
                    "pre_norm": Const(True),
                    "parallel": Const(norms != "sequential"),
                    "repeat_kv": Attr("self_attention.new_decoder_architecture"),
                    "biased": Const(alibi),
                    "causal": Const(True),
                },
            )
        ],
        models=[_causal_lm(alibi=alibi)],
    )


def _causal_lm(*, alibi: bool) -> CausalLM:
    rotary = Rotary(path="transformer.rotary_emb", static_when=("default", "linear", "llama3", "yarn"))
    return CausalLM(
        model=_FALCON + "FalconForCausalLM",
        embed="transformer.word_embeddings",
        rotary=None if alibi else rotary,
        alibi=Alibi(rounded="bfloat16", scaled=True) if alibi else None,
        layers="transformer.h",
        norm=Norm("transformer.ln_f"),
        head="lm_head",
    )


TWO_NORMS, TWO_NORMS_ALIBI = (_policy("two-norms", alibi=alibi) for alibi in (False, True))
ONE_NORM, ONE_NORM_ALIBI = (_policy("one-norm", alibi=alibi) for alibi in (False, True))
SEQUENTIAL, SEQUENTIAL_ALIBI = (_policy("sequential", alibi=alibi) for alibi in (False, True))


@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register all forms."""
    for policy in (TWO_NORMS, TWO_NORMS_ALIBI, ONE_NORM, ONE_NORM_ALIBI, SEQUENTIAL, SEQUENTIAL_ALIBI):
        register(policy)
