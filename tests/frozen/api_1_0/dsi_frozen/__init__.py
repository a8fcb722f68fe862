"""Four policies, two containers and a check, as a third party wrote them for plugin API 1.0."""

from dsi.policy import (
    API_VERSION,
    Attr,
    Block,
    Call,
    CausalLM,
    Check,
    Concat,
    Config,
    Const,
    Container,
    Context,
    Keep,
    Linear,
    Norm,
    Packed,
    Policy,
    Positions,
    Refusal,
    Rotary,
    hookimpl,
)

DSI_API = (1, 0)

SEED = "transformers.models.seed_oss.modeling_seed_oss:"
GPT2 = "transformers.models.gpt2.modeling_gpt2:"
RMS = {"kind": "rms", "eps": "variance_epsilon", "cls": SEED + "SeedOssRMSNorm", "offset": 0.0}

ATTENTION = {
    "norm_attn": Norm("input_layernorm", **RMS),
    "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="column", transposed=False),
    "out": Linear("self_attn.o_proj", split="row", transposed=False),
    "norm_mlp": Norm("post_attention_layernorm", **RMS),
}
GATED = {
    "gate_up": Concat("mlp.gate_proj", "mlp.up_proj", split="column"),
    "down": Linear("mlp.down_proj", split="row"),
}
FACTS = {
    "heads": Config("num_attention_heads"),
    "kv_heads": Config("num_key_value_heads"),
    "head_dim": Attr("self_attn.head_dim"),
    "scale": Attr("self_attn.scaling"),
    "layer_idx": Attr("self_attn.layer_idx"),
    "activation": Config("hidden_act"),
    "pre_norm": Const(True),
    "causal": Const(True),
}
CALL = Call(
    mask="attention_mask",
    cache="past_key_values",
    rope="position_embeddings",
    free=("position_ids", "use_cache"),
    returns="tensor",
)


def supports(config):
    """Everything but one activation, to have a refusal."""
    if config.hidden_act == "relu":
        return Refusal(reason="hidden_act='relu' was never tried", hint="use silu")
    return None


def language_model(**more):
    return CausalLM(
        model=SEED + "SeedOssForCausalLM",
        embed="model.embed_tokens",
        layers="model.layers",
        head="lm_head",
        norm=Norm("model.norm", **RMS),
        rotary=Rotary(path="model.rotary_emb", static_when=("default", "linear", "llama3", "yarn")),
        project_in="",
        project_out="",
        context="max_position_embeddings",
        **more,
    )


SEED_OSS = Policy(
    name="seed-oss",
    requires=("transformers>=5.6",),
    supports=supports,
    priority=1,
    replaces=("frozen:seed-oss-kept-mlp",),
    blocks=[
        Block(
            layer=SEED + "SeedOssDecoderLayer",
            container="frozen:counting",
            call=CALL,
            slots={**ATTENTION, **GATED},
            facts={**FACTS, "gain": Const(1.0)},
        )
    ],
    models=[language_model()],
)

# the MLP is left to the stock module
SEED_OSS_KEPT_MLP = Policy(
    name="seed-oss-kept-mlp",
    blocks=[
        Block(
            layer=SEED + "SeedOssDecoderLayer",
            container="dsi.containers:DecoderLayer",
            call=Call(rope="position_embeddings"),
            slots={**ATTENTION, "mlp": Keep("mlp")},
            facts=FACTS,
        )
    ],
    models=[language_model()],
)

# weights stored [in, out], fused in the checkpoint; learned positions; below the built-in policy of the same layer
LEARNED = Policy(
    name="learned-positions",
    priority=-1,
    context=Context(config="n_positions", after=""),
    blocks=[
        Block(
            layer=GPT2 + "GPT2Block",
            container="dsi.containers:DecoderLayer",
            slots={
                "norm_attn": Norm("ln_1", kind="layer", eps="eps"),
                "qkv": Packed("attn.c_attn", layout="thirds", split="column", transposed=True),
                "out": Linear("attn.c_proj", split="row", transposed=True),
                "norm_mlp": Norm("ln_2"),
                "up": Linear("mlp.c_fc", split="column", transposed=True),
                "down": Linear("mlp.c_proj", split="row", transposed=True),
            },
            facts={
                "heads": Attr("attn.num_heads"),
                "kv_heads": Attr("attn.num_heads"),
                "head_dim": Attr("attn.head_dim"),
                "scale": Attr("attn.scaling"),
                "layer_idx": Attr("attn.layer_idx"),
                "activation": Config("activation_function"),
                "pre_norm": Const(True),
                "causal": Const(True),
            },
            ignore=(),
        )
    ],
    models=[
        CausalLM(
            model=GPT2 + "GPT2LMHeadModel",
            embed="transformer.wte",
            positions=Positions(path="transformer.wpe", offset=0),
            layers="transformer.h",
            norm=Norm("transformer.ln_f"),
            head="lm_head",
            context="n_positions",
        )
    ],
)

VISION = Policy(
    name="vision",
    blocks=[
        Block(
            layer="transformers.models.siglip.modeling_siglip:SiglipEncoderLayer",
            container="frozen:plain",
            call=Call(cache=""),
            slots={
                "norm1": Norm("layer_norm1"),
                "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="column"),
                "out": Linear("self_attn.out_proj", split="row"),
                "norm2": Norm("layer_norm2"),
                "up": Linear("mlp.fc1", split="column"),
                "down": Linear("mlp.fc2", split="row"),
            },
            facts={
                "heads": Config("num_attention_heads"),
                "scale": Attr("self_attn.scale"),
                "activation": Config("hidden_act"),
                "causal": Const(False),
            },
        )
    ],
)


@hookimpl
def dsi_register_policies(register, api):
    assert api >= DSI_API
    assert api == API_VERSION
    for policy in (SEED_OSS, SEED_OSS_KEPT_MLP, LEARNED, VISION):
        register(policy)


@hookimpl
def dsi_register_containers(register):
    register(Container(name="counting", impl="dsi_frozen.layers:CountingLayer"))
    register(Container(name="plain", impl="dsi_frozen.layers:PlainLayer"))


@hookimpl
def dsi_register_checks(register):
    register(Check(name="same_class", impl="dsi_frozen.checks:same_class"))
