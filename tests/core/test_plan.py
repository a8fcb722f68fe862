"""The plan names everything, says why, touches nothing, and tells a wrong policy from a model it does not fit."""

from __future__ import annotations

import copy
import json
import re
import sys
from types import SimpleNamespace

import accelerate
import attrs
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import dsi
from dsi.config import load_config
from dsi.planner import make_plan
from dsi.policy import Attr, Config, Linear, Norm, Policy, Refusal, hookimpl
from dsi.registry import Registry
from dsi_policies.bert import BERT
from dsi_policies.gpt2 import GPT2
from dsi_policies.llama import LLAMA
from tests.core.twins import FP32, LARGE, containers, distance, linears, twins_of
from tests.support import FAMILIES, cases, difference, fingerprint, inputs_for, tiny, tiny_config
from tests.support.models import LAYERS


def reasons(plan):
    """path -> code of everything left alone on purpose."""
    return {entry.path: entry.reason.code for entry in plan.left if entry.reason.code != "no_policy"}


def text_of(plan, path):
    return next(entry.reason.text for entry in plan.left if entry.path == path)


# --- what it names ------------------------------------------------------------------------------------------------


def entry_of(plan, name):
    """The entries that name the parameter `name`: whole layers, whole modules, or a module's own parameters."""
    owner = name.rpartition(".")[0]
    wholes = [block.path for block in plan.blocks if owner == block.path or owner.startswith(f"{block.path}.")]
    lefts = ["" if entry.path == "(model)" else entry.path for entry in plan.left]
    inside = [path for path in lefts if path and owner.startswith(f"{path}.") and not _around(plan, path)]
    return wholes + [path for path in lefts if path == owner] + inside


def _around(plan, path):
    """Whether other entries stand below `path`, which then stands for its own parameters alone."""
    return any(other.path.startswith(f"{path}.") for other in (*plan.blocks, *plan.left))


@pytest.mark.parametrize(("family", "head"), cases())
def test_every_parameter_is_named_once(family, head):
    model = tiny(family, head)
    plan = dsi.plan(model)
    named = list(model.named_parameters(remove_duplicate=False))
    for name, _ in named:
        assert len(entry_of(plan, name)) == 1, name
    paths = [block.path for block in plan.blocks] + [entry.path for entry in plan.left]
    assert len(paths) == len(set(paths))
    # a parameter that is tied counts once for each entry it belongs to
    total = sum(b.bytes_before for b in plan.blocks) + sum(x.bytes for x in plan.left)
    assert sum(p.nbytes for p in model.parameters()) <= total <= sum(p.nbytes for _, p in named)
    assert len(plan.blocks) == LAYERS * (2 if family == "clip" else 1)


def test_a_parameter_of_the_model_itself_is_named():
    plan = dsi.plan(tiny("clip"))
    assert [(x.path, x.bytes) for x in plan.left if x.path == "(model)"] == [("(model)", 4)]


@pytest.mark.parametrize("config", [{}, {"dtype": "bfloat16"}, {"strict": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_planning_touches_nothing(family, config):
    model = tiny(family)
    before = fingerprint(model)
    plan = dsi.plan(model, config)
    str(plan)
    plan.to_dict()
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dict_is_json(family):
    model = tiny(family)
    found = json.loads(json.dumps(dsi.plan(model, dtype="bfloat16").to_dict()))
    assert found["dtype_before"], found["dtype_after"] == ("float32", "bfloat16")
    assert [block["path"] for block in found["blocks"]] == [block.path for block in dsi.plan(model).blocks]
    assert all(slot["bytes_before"] == 2 * slot["bytes_after"] for b in found["blocks"] for slot in b["slots"])
    assert found["restorable"] is False


def test_the_table_says_what_the_plan_knows():
    plan = dsi.plan(tiny("llama"), dtype="bfloat16")
    table = str(plan)
    for line in (
        r"plan for LlamaForCausalLM on cpu, float32 -> bfloat16: 2 layers replaced",
        r"model\.layers\.0 \.\. model\.layers\.1: LlamaDecoderLayer -> DecoderLayer, policy llama:llama, operations ",
        r"qkv +\w+ +128 x 32 +16\.4 kB -> +8\.2 kB  self_attn\.q_proj \+ self_attn\.k_proj \+ self_attn\.v_proj",
        r"lm_head \(Linear, 8\.6 kB\): no_policy: no policy claims this class",
        r"restore: refused",
        r"generate: dsi's decode loop",
        r'note: the cast torch\.float32 -> torch\.bfloat16 loses bits: .*keep_original="host"',
    ):
        assert re.search(line, table), line
    assert plan.table() == table


def test_a_plan_is_made_again_the_same():
    model = tiny("gpt2")
    assert dsi.plan(model).to_dict() == dsi.plan(model).to_dict()


def test_a_model_inside_a_model():
    class Search(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.passages = tiny("bert"), tiny("distilbert")
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, **inputs):
            one, other = (model(**inputs).last_hidden_state for model in (self.queries, self.passages))
            return one @ other.transpose(1, 2) * self.scale

    stock = Search().eval()
    model = copy.deepcopy(stock)
    engine = dsi.init_inference(model)
    assert {block.policy for block in engine.plan.blocks} == {"bert:bert", "distilbert:distilbert"}
    inputs = inputs_for("bert", 2, 6, "ragged")
    with torch.no_grad():
        assert distance(engine(**inputs), stock(**inputs)) <= FP32
    engine.restore()
    assert difference(fingerprint(stock, identity=False), fingerprint(model, identity=False)) == []


# --- why not ------------------------------------------------------------------------------------------------------


def _cast_one(model, dtype):
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data.to(dtype)


class QuantizedLinear(nn.Linear):
    """What bitsandbytes, torchao and others put in the place of a linear layer."""


class Wrapper(nn.Module):
    """What PEFT puts there."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base):
        super().__init__()
        self.base_layer = base


class Subclassed(torch.Tensor):
    """A tensor that is more than its values."""


class DTensor(torch.Tensor):
    """One of a device mesh."""


def _wrap(model):
    attention = model.model.layers[1].self_attn
    attention.q_proj = Wrapper(attention.q_proj)


def _quantize(model):
    attention = model.model.layers[1].self_attn
    linear = QuantizedLinear(32, 64, bias=False)
    linear.load_state_dict(attention.q_proj.state_dict())
    attention.q_proj = linear.eval()


def _subclass(kind):
    def change(model):
        linear = model.model.layers[1].self_attn.q_proj
        linear.weight = nn.Parameter(linear.weight.data.as_subclass(kind))

    return change


def _int8(model):
    linear = model.model.layers[1].self_attn.q_proj
    linear.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)


def _share(model):
    model.model.layers.append(model.model.layers[1])


def _share_far(model):
    model.model.other = nn.ModuleDict({"again": model.model.layers[1]})


def _tie(model):
    model.extra = nn.Linear(64, 32, bias=False)
    model.extra.weight = model.model.layers[1].self_attn.o_proj.weight


def _meta(model):
    model.model.layers[1].to("meta")


def _hook(model):
    accelerate.hooks.add_hook_to_module(model.model.layers[1].mlp, accelerate.hooks.ModelHook())


def _hook_layer(model):
    accelerate.hooks.add_hook_to_module(model.model.layers[1], accelerate.hooks.ModelHook())


def _train(model):
    model.model.layers[1].train()


def _parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)


def _prune(model):
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)


def _patch(model):
    model.model.layers[1].mlp.forward = lambda x: x


def _other_norm(model):
    model.model.layers[1].input_layernorm = nn.RMSNorm(32)


OBSTACLES = {
    "training mode": (_train, "training_mode", r"call model\.eval\(\) first"),
    "meta": (_meta, "meta", r"self_attn\.q_proj\.weight is on the meta device; load the weights first"),
    "accelerate inside": (_hook, "offloaded", r"mlp carries an accelerate hook; remove_hook_from_module first"),
    "accelerate on it": (_hook_layer, "offloaded", r"the layer carries an accelerate hook"),
    "float64": (lambda model: _cast_one(model, torch.float64), "dtype", r"mlp\.up_proj\.weight is torch\.float64"),
    "two dtypes": (lambda model: _cast_one(model, torch.float16), "mixed", r"float16 on cpu, torch\.float32 on cpu"),
    "int8": (_int8, "dtype", r"q_proj\.weight is torch\.int8; float32, float16 and bfloat16 are supported"),
    "wrapped": (_wrap, "wrapped", r"self_attn\.q_proj is peft\.tuners\.lora\.layer:Wrapper, not torch\.nn"),
    "quantized": (
        _quantize,
        "quantized",
        r"self_attn\.q_proj is .*:QuantizedLinear, not torch\.nn\.modules\.linear:Linear",
    ),
    "tensor subclass": (_subclass(Subclassed), "quantized", r"q_proj\.weight is a \w+, not a plain"),
    "dtensor": (_subclass(DTensor), "dtensor", r"q_proj\.weight is a \w+, not a plain tensor"),
    "shared in one list": (_share, "shared", "stands in several places"),
    "shared elsewhere": (_share_far, "shared", "stands in several places"),
    "tied": (_tie, "tied", r"self_attn\.o_proj\.weight is shared with another part of the model"),
    "parametrized": (_parametrize, None, r"up_proj"),
    "pruned": (_prune, None, r"up_proj"),
    "patched": (_patch, "patched_forward", "mlp has its own forward"),
    "another norm": (_other_norm, None, r"input_layernorm is torch\.nn\.modules\.normalization:RMSNorm"),
}


@pytest.mark.parametrize(("change", "code", "text"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_stands_in_the_way_is_named_and_the_rest_is_replaced(change, code, text):
    model = tiny("llama")
    change(model)
    plan = dsi.plan(model)
    found = reasons(plan)
    assert "model.layers.1" in found
    assert code in (None, found["model.layers.1"])
    assert re.search(text, text_of(plan, "model.layers.1"))
    assert [block.path for block in plan.blocks] == ["model.layers.0"]
    assert plan.decode is None
    assert "not every layer is replaced" in plan.decode_text
    with pytest.raises(dsi.UnsupportedModelError, match=r"strict=True(.|\n)*model\.layers\.1"):
        dsi.init_inference(model, strict=True)


RUNNABLE = (
    "accelerate inside",
    "accelerate on it",
    "quantized",
    "shared in one list",
    "tied",
    "parametrized",
    "pruned",
    "patched",
)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_model_that_is_replaced_in_part_computes_the_same(name):
    stock = tiny("llama")
    OBSTACLES[name][0](stock)
    stock.config.num_hidden_layers = len(stock.model.layers)
    # accelerate's hooks and patches are bound to the model they were made for, so no deepcopy
    inputs = inputs_for("llama", 2, 6, "left")
    with torch.no_grad():
        wanted = stock(**inputs, use_cache=False)
        before = fingerprint(stock)
        engine = dsi.init_inference(stock)
        assert len(containers(stock)) == 1
        assert distance(stock(**inputs, use_cache=False), wanted) <= FP32
    engine.restore()
    assert difference(before, fingerprint(stock)) == []


def test_weights_that_are_offloaded():
    model = accelerate.cpu_offload(tiny("llama"))
    plan = dsi.plan(model)
    assert reasons(plan) == {f"model.layers.{n}": "offloaded" for n in range(LAYERS)}
    with pytest.warns(UserWarning, match="dsi replaced nothing: offloaded: .*accelerate hook"):
        dsi.init_inference(model)
    with torch.no_grad():
        assert distance(model(**inputs_for("llama")), tiny("llama")(**inputs_for("llama"))) <= FP32


def test_a_whole_model_in_training_mode():
    model = tiny("bert").train()
    assert set(reasons(dsi.plan(model)).values()) == {"training_mode"}


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "paged|sdpa", "my_own"])
def test_an_attention_implementation_that_is_not_known(attention):
    model = tiny("llama")
    model.config._attn_implementation_internal = attention
    plan = dsi.plan(model)
    assert set(reasons(plan).values()) == {"attention"}
    assert repr(attention) in text_of(plan, "model.layers.0")


REFUSED = {
    "decoder BERT": ("bert", "BertLMHeadModel", {"is_decoder": True}, "only the encoder is implemented"),
    "decoder BERT with cross attention": (
        "bert",
        "BertLMHeadModel",
        {"is_decoder": True, "add_cross_attention": True},
        "add_cross_attention=True",
    ),
    "decoder RoBERTa": ("roberta", "RobertaForCausalLM", {"is_decoder": True}, "only the encoder is implemented"),
    "cross attention": ("gpt2", None, {"add_cross_attention": True}, "add_cross_attention=True is not implemented"),
    "upcast attention": ("gpt2", None, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
    "unknown activation": ("llama", None, {"hidden_act": "mish"}, "activation 'mish' has no fused form. known: gelu"),
}


@pytest.mark.parametrize(("family", "head", "overrides", "words"), REFUSED.values(), ids=REFUSED)
def test_a_variant_that_is_not_implemented_is_refused_with_a_reason(family, head, overrides, words):
    model = tiny(family, head, **overrides)
    plan = dsi.plan(model)
    assert not plan.blocks
    assert set(reasons(plan).values()) == {"refused"}
    assert words in plan.why_nothing
    assert words in str(plan)
    before = fingerprint(model)
    with pytest.warns(UserWarning, match="dsi replaced nothing: .*" + re.escape(words)):
        engine = dsi.init_inference(model)
    assert not containers(model)
    engine.restore()
    assert difference(before, fingerprint(model)) == []
    with pytest.raises(dsi.UnsupportedModelError, match=re.escape(words)):
        dsi.init_inference(model, strict=True)


def test_what_is_optimized_already():
    model = tiny("llama")
    dsi.init_inference(model)
    plan = dsi.plan(model)
    assert reasons(plan) == {f"model.layers.{n}": "already_replaced" for n in range(LAYERS)}
    assert "restore() first" in plan.why_nothing
    assert sum(x.bytes for x in plan.left) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    "layer", [BertLayer(tiny_config("bert")).eval(), LlamaDecoderLayer(tiny_config("llama"), 0).eval()]
)
def test_a_model_that_is_itself_a_layer(layer):
    layer.config = tiny_config("bert" if isinstance(layer, BertLayer) else "llama")
    plan = dsi.plan(layer)
    assert reasons(plan) == {"(model)": "root"}
    assert "pass the model around it" in plan.why_nothing


def test_layers_around_which_nobody_has_a_config():
    model = nn.Sequential(BertLayer(tiny_config("bert"))).eval()
    plan = dsi.plan(model)
    assert reasons(plan) == {"0": "refused"}
    assert "config has no attribute" in plan.why_nothing


def test_replacing_switched_off():
    model = tiny("llama")
    before = fingerprint(model)
    plan = dsi.plan(model, replace_with_kernel_inject=False)
    assert [(x.path, x.reason.code) for x in plan.left] == [("(model)", "switched_off")]
    assert plan.left[0].bytes == sum(p.nbytes for p in model.parameters())
    # asked for, so no warning
    engine = dsi.init_inference(model, replace_with_kernel_inject=False)
    assert not containers(model)
    engine.restore()
    assert difference(before, fingerprint(model)) == []


def test_replacing_switched_off_still_casts():
    model = tiny("llama")
    engine = dsi.init_inference(model, replace_with_kernel_inject=False, dtype="bfloat16", keep_original="host")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    engine.restore()
    assert difference(fingerprint(tiny("llama"), identity=False), fingerprint(model, identity=False)) == []


def test_a_model_that_nobody_knows():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    plan = dsi.plan(model)
    assert [(x.path, x.reason.code) for x in plan.left] == [("(model)", "no_policy")]
    with pytest.warns(UserWarning, match="dsi replaced nothing: no_policy: no policy claims this class") as caught:
        dsi.init_inference(model).restore()
    # at the line that called, not inside dsi
    assert caught[0].filename == __file__
    with pytest.raises(dsi.UnsupportedModelError, match="no policy claims this class"):
        dsi.init_inference(model, strict=True)


def test_strict_takes_a_model_whose_every_layer_is_replaced():
    dsi.init_inference(tiny("llama"), strict=True)


@pytest.mark.parametrize(
    "thing", [None, 3, "gpt2", {"a": 1}, SimpleNamespace(parameters=list), torch.ones(3)], ids=repr
)
def test_what_is_no_model(thing):
    for function in (dsi.plan, dsi.init_inference):
        with pytest.raises(
            dsi.UnsupportedModelError, match=r"expected a torch\.nn\.Module, got .*\n.*pipe\.text_encoder"
        ):
            function(thing)


def test_a_model_without_parameters():
    with pytest.raises(dsi.UnsupportedModelError, match="ReLU has no floating-point parameters"):
        dsi.plan(nn.ReLU())


def test_a_module_whose_attributes_are_strange():
    class Odd(nn.Module):
        """As some remote code does."""

        config = "not a config"

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.nothing = None
            self.register_parameter("absent", None)
            self.register_buffer("gone", None)

    assert not dsi.plan(Odd()).blocks


# --- wrong policies -----------------------------------------------------------------------------------------------


def changed(slots=None, facts=None, drop=(), **fields):
    """LLAMA's policy with its block changed."""
    block = LLAMA.blocks[0]
    slots = {name: slot for name, slot in {**block.slots, **(slots or {})}.items() if name not in drop}
    facts = {name: fact for name, fact in {**block.facts, **(facts or {})}.items() if name not in drop}
    return attrs.evolve(LLAMA, name="wrong", blocks=[attrs.evolve(block, slots=slots, facts=facts, **fields)])


WRONG = {
    "a path that is not there": (
        {"slots": {"out": Linear("self_attn.dense")}},
        r"model\.layers\.0: slot 'out': LlamaDecoderLayer has no submodule 'self_attn\.dense' \(stopped at 'dense'\)",
    ),
    "a path that is no module": (
        {"slots": {"out": Linear("self_attn.head_dim")}},
        r"has no submodule 'self_attn\.head_dim'",
    ),
    "a parameter that is not read": (
        {"drop": ("gate_up",), "slots": {"up": Linear("mlp.up_proj")}},
        r"model\.layers\.0: the policy reads no slot from mlp\.gate_proj\.weight",
    ),
    "a parameter that is read twice": (
        {"slots": {"out": Linear("mlp.down_proj")}},
        r"model\.layers\.0: mlp\.down_proj feeds both slot '(out|down)' and slot '(out|down)'",
    ),
    "a fact that is missing": ({"drop": ("scale",)}, r"DecoderLayer needs the facts .*missing: scale"),
    "a fact too many": ({"facts": {"colour": Config("hidden_act")}}, r"unknown: colour"),
    "a slot that is unknown": (
        {"drop": ("out",), "slots": {"outwards": Linear("self_attn.o_proj")}},
        r"takes the slots norm_attn, .*unknown: outwards; missing: out",
    ),
    "a container that is not there": ({"container": "dsi.containers:NoSuchLayer"}, r"cannot be imported"),
    "a module that is not there": (
        {"container": "no.such.module:Layer"},
        r"'no\.such\.module:Layer' cannot be imported",
    ),
    "a container that is none": ({"container": "torch.nn:Linear"}, r"not a subclass of dsi\.containers\.Container"),
    "a container's name of nobody": ({"container": "nobody:layer"}, r"'nobody:layer' cannot be imported"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_policy_is_an_error_that_names_the_place(change, words):
    model = tiny("llama")
    before = fingerprint(model)
    policy = changed(**change)
    for function in (dsi.plan, dsi.init_inference):
        with pytest.raises(dsi.PolicyError, match=words):
            function(model, injection_policy=policy)
    assert difference(before, fingerprint(model)) == []


def test_a_slot_of_another_kind_than_the_weight():
    # q|k|v of GPT-2 are stored [in, out]; a policy that forgets it must not transpose by luck
    block = GPT2.blocks[0]
    slots = {**block.slots, "out": Linear("attn.c_proj")}
    policy = attrs.evolve(GPT2, name="wrong", blocks=[attrs.evolve(block, slots=slots)])
    plan = dsi.plan(tiny("gpt2"), injection_policy=policy)
    assert not plan.blocks
    assert "attn.c_proj is transformers.pytorch_utils:Conv1D, not torch.nn.modules.linear:Linear" in plan.why_nothing


def test_a_norm_of_another_kind_than_the_policy_says():
    plan = dsi.plan(tiny("llama"), injection_policy=changed(slots={"norm_attn": Norm("input_layernorm")}))
    assert not plan.blocks
    assert "LlamaRMSNorm, not torch.nn.modules.normalization:LayerNorm" in plan.why_nothing


@pytest.mark.parametrize("fact", [Config("no_such_thing"), Attr("self_attn.no_such_thing"), Attr("nothing.scaling")])
def test_a_fact_that_cannot_be_read_is_a_refusal(fact):
    plan = dsi.plan(tiny("llama"), injection_policy=changed(facts={"scale": fact}))
    assert not plan.blocks
    assert "fact 'scale' cannot be read" in plan.why_nothing


@pytest.mark.parametrize("place", ["down", "gate_up", "norm_mlp"])
def test_slots_that_make_no_layer(place):
    gone = LLAMA.blocks[0].slots[place].sources()
    plan = dsi.plan(tiny("llama"), injection_policy=changed(drop=(place,), ignore=gone))
    assert not plan.blocks
    assert "refused: the policy's slots make no layer" in plan.why_nothing


def test_a_buffer_that_nobody_mentions():
    model = tiny("llama")
    model.model.layers[0].self_attn.register_buffer("alibi", torch.ones(3))
    with pytest.raises(dsi.PolicyError, match=r"says nothing of the persistent buffers self_attn\.alibi"):
        dsi.plan(model)
    # one that no checkpoint holds is the layer's own affair
    del model.model.layers[0].self_attn.alibi
    model.model.layers[0].self_attn.register_buffer("alibi", torch.ones(3), persistent=False)
    assert len(dsi.plan(model).blocks) == LAYERS


def test_a_policy_that_was_named():
    model = tiny("llama")
    assert {block.policy for block in dsi.plan(model, injection_policy="llama:llama").blocks} == {"llama:llama"}
    plan = dsi.plan(model, injection_policy="bert:bert")
    assert not plan.blocks
    assert "injection_policy asks for bert:bert" in plan.why_nothing
    with pytest.raises(dsi.UnknownPolicyError, match=r"did you mean|registered are"):
        dsi.plan(model, injection_policy="llama:lama")


def test_a_policy_that_was_given_replaces_the_built_in_for_its_class_alone():
    own = attrs.evolve(LLAMA, name="own")
    pair = twins_of(tiny("llama"), {"injection_policy": own})
    assert {block.policy for block in pair.engine.plan.blocks} == {"<given>:own"}
    with torch.no_grad():
        assert distance(pair.model(**inputs_for("llama")), pair.stock(**inputs_for("llama"))) <= FP32
    assert not dsi.plan(tiny("bert"), injection_policy=own).blocks


def test_a_policy_whose_supports_raises_is_named_and_does_no_harm():
    def explode(config):
        raise ZeroDivisionError("ouch")

    plan = dsi.plan(tiny("llama"), injection_policy=attrs.evolve(LLAMA, name="own", supports=explode))
    assert not plan.blocks
    assert "<given>:own: supports() raised ZeroDivisionError: ouch" in plan.why_nothing


def test_a_refusal_says_what_would_do():
    refuse = attrs.evolve(LLAMA, name="own", supports=lambda config: Refusal(reason="too blue", hint="paint it"))
    assert "too blue" in dsi.plan(tiny("llama"), injection_policy=refuse).why_nothing


# --- blocks inside blocks -----------------------------------------------------------------------------------------


def nested_registry():
    """Policies for BERT's layer and, as if somebody had wanted less, for a module inside of it."""
    inner = attrs.evolve(
        BERT.blocks[0], layer="transformers.models.bert.modeling_bert:BertAttention", slots=BERT.blocks[0].slots
    )
    plugins = {}
    for name, blocks in (("outer", BERT.blocks), ("inner", [inner])):
        plugins[name] = _plugin(Policy(name=name, blocks=blocks))
    return Registry.from_plugins(plugins)


def _plugin(policy):
    module = type(sys)("plugin_of_a_test")
    module.DSI_API = (1, 0)

    @hookimpl
    def dsi_register_policies(register):
        register(policy)

    module.dsi_register_policies = dsi_register_policies
    return module


def test_what_stands_inside_a_replaced_layer_is_not_planned_again():
    model = tiny("bert")
    plan = make_plan(model, load_config(), nested_registry())
    assert [block.path for block in plan.blocks] == [f"encoder.layer.{n}" for n in range(LAYERS)]
    assert not reasons(plan)


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "limit"), [("bert", 64), ("roberta", 64), ("gpt2", 64), ("opt", 64), ("distilbert", 64), ("llama", None)]
)
def test_the_longest_input_of_models_with_learned_positions(family, limit):
    model = tiny(family)
    assert dsi.plan(model).input_limit == limit
    if limit is not None:
        with pytest.raises(dsi.ConfigError, match=rf"max_out_tokens: {limit + 1} is more than the model's {limit}"):
            dsi.plan(model, max_out_tokens=limit + 1)
        engine = dsi.init_inference(model)
        engine(**inputs_for(family, 1, limit))
        with pytest.raises(dsi.InputError, match=rf"{limit + 1} positions, and the context is {limit}"):
            engine(**inputs_for(family, 1, limit + 1))
        engine(**inputs_for(family, 1, limit))


# --- planning without weights -------------------------------------------------------------------------------------


def test_a_skeleton_is_planned_as_if_it_were_loaded():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny_config("llama", **LARGE["llama"])).eval()
    assert set(reasons(dsi.plan(model)).values()) == {"meta"}
    plan = make_plan(model, load_config(), Registry.load(), assume_loaded=True)
    real = tiny("llama", **LARGE["llama"])
    assert plan.to_dict() == dsi.plan(real).to_dict()
    dsi.init_inference(real)
    assert {slot.form for block in plan.blocks for slot in block.slots} - {"shared"} == {x.form for x in linears(real)}
