"""Seed-OSS: pre-norm layers with RMSNorm, a gated MLP and grouped kv heads; biases where the config asks for them."""

from dsi.policy import Attr, Block, Call, CausalLM, Concat, Config, Const, Linear, Norm, Policy, Rotary, hookimpl

DSI_API = (1, 0)
HOME = "transformers.models.seed_oss.modeling_seed_oss:SeedOss"
RMS = {"kind": "rms", "eps": "variance_epsilon", "cls": HOME + "RMSNorm"}
SLOTS = {
    "norm_attn": Norm("input_layernorm", **RMS),
    "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="column"),
    "out": Linear("self_attn.o_proj", split="row"),
    "norm_mlp": Norm("post_attention_layernorm", **RMS),
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
CALL = Call(rope="position_embeddings")
LAYER = Block(layer=HOME + "DecoderLayer", container="dsi.containers:DecoderLayer", call=CALL, slots=SLOTS, facts=FACTS)
PARTS = {"embed": "model.embed_tokens", "layers": "model.layers", "norm": Norm("model.norm", **RMS), "head": "lm_head"}
MODEL = CausalLM(model=HOME + "ForCausalLM", rotary=Rotary(path="model.rotary_emb"), **PARTS)
SEED_OSS = Policy(name="seed_oss", requires=["transformers>=5.17"], blocks=[LAYER], models=[MODEL])


@hookimpl
def dsi_register_policies(register):
    register(SEED_OSS)
