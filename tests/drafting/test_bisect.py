"""`bisect` names the layer and the place of faults that were put there."""

from __future__ import annotations

import json

import attrs
import pytest
import torch
import transformers

from dsi.cli import main
from dsi.containers.base import Container
from dsi.drafting import bisect
from dsi.errors import PolicyError, UnsupportedModelError
from dsi.policy import Attr, Concat, Const, Packed
from dsi_policies.bert import BERT
from dsi_policies.gpt2 import GPT2
from dsi_policies.llama import LLAMA
from dsi_policies.opt import OPT
from tests.support.models import inputs_for, tiny


def broken(policy, slots=None, facts=None, models=None, **parts):
    block = policy.blocks[0]
    slots, facts = {**block.slots, **(slots or {})}, {**block.facts, **(facts or {})}
    changed = attrs.evolve(block, slots=slots, facts=facts, **parts)
    return attrs.evolve(policy, blocks=[changed], **({} if models is None else {"models": models}))


SLOTS = LLAMA.blocks[0].slots
SELF = "self_attn."

# family, policy, the layer's path, the place, what mends it
FAULTS = {
    "swapped norms": (
        "llama",
        broken(LLAMA, {"norm_attn": SLOTS["norm_mlp"], "norm_mlp": SLOTS["norm_attn"]}),
        "model.layers.0",
        "norm_attn",
        "norm_attn and norm_mlp exchanged",
    ),
    "wrong scale": ("llama", broken(LLAMA, facts={"scale": Const(0.3)}), "model.layers.0", "scale", "scale=0.25"),
    "one place in the cache": (
        "llama",
        broken(LLAMA, facts={"layer_idx": Const(0)}),
        "model.layers.1",
        "layer_idx",
        "layer_idx=1",
    ),
    "up for gate": (
        "llama",
        broken(LLAMA, {"gate_up": Concat("mlp.up_proj", "mlp.gate_proj", split="column")}),
        "model.layers.0",
        "gate_up",
        "in the order mlp.gate_proj, mlp.up_proj",
    ),
    "k before q": (
        "opt",
        broken(OPT, {"qkv": Concat(SELF + "k_proj", SELF + "q_proj", SELF + "v_proj", split="column")}),
        "model.decoder.layers.0",
        "qkv",
        "in the order self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
    ),
    "not causal": ("llama", broken(LLAMA, facts={"causal": Const(False)}), "model.layers.0", "causal", "causal=True"),
    "wrong layout": (
        "gpt2",
        broken(GPT2, {"qkv": Packed("attn.c_attn", layout="head_interleaved", split="column", transposed=True)}),
        "transformer.h.0",
        "qkv",
        "layout='thirds'",
    ),
    "erf for tanh": (
        "gpt2",
        broken(GPT2, facts={"activation": Const("gelu")}),
        "transformer.h.0",
        "activation",
        "gelu_pytorch_tanh",
    ),
    "parallel": (
        "gpt2",
        broken(GPT2, facts={"parallel": Const(True)}),
        "transformer.h.0",
        "norm_mlp",
        "parallel=False",
    ),
    "pre-norm for post-norm": (
        "bert",
        broken(BERT, facts={"pre_norm": Const(True)}),
        "encoder.layer.0",
        "norm_attn",
        "pre_norm=False",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_where_it_is(name):
    family, policy, layer, place, mend = FAULTS[name]
    found = bisect(tiny(family), policy)
    assert (found.layer, found.place) == (layer, place), found
    assert mend in found.mend
    assert found.measured > found.allowed == 1e-5
    assert not found.equal


@pytest.mark.parametrize(
    ("family", "policy"), [("llama", LLAMA), ("gpt2", GPT2), ("bert", BERT), ("opt_post_norm", OPT)]
)
def test_a_policy_that_is_right_is_equal(family, policy):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = bisect(model, policy)
    assert found.equal, found
    assert 0 <= found.measured <= found.allowed
    assert not any(isinstance(module, Container) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_fault_of_one_layer_alone_is_found_there():
    model = tiny("llama", num_hidden_layers=4)
    for index, layer in enumerate(model.model.layers):
        layer.said = "gelu" if index == 2 else "silu"
    found = bisect(model, broken(LLAMA, facts={"activation": Attr("said")}))
    assert (found.layer, found.place) == ("model.layers.2", "activation")
    assert "activation='silu'" in found.mend


@pytest.mark.parametrize("place", ["norm_attn", "norm_mlp"])
def test_the_epsilon_of_one_norm_in_one_layer_is_found(place):
    model = tiny("llama", num_hidden_layers=3)
    slot = SLOTS[place]
    for index, layer in enumerate(model.model.layers):
        norm = layer.get_submodule(slot.path)
        norm.other = 0.3 if index == 1 else norm.variance_epsilon
    found = bisect(model, broken(LLAMA, {place: attrs.evolve(slot, eps="other")}))
    assert (found.layer, found.place) == ("model.layers.1", place)
    assert "gives other numbers" in found.what


def test_a_wrong_container_is_found_by_the_place_it_gets_wrong(monkeypatch):
    """A sum that is left out lies between two places."""
    from dsi.containers.linear import FusedLinear

    monkeypatch.setattr(FusedLinear, "add", lambda self, x, residual: self.forward(x) + 0.5 * residual)
    found = bisect(tiny("llama"), LLAMA)
    assert (found.layer, found.place) == ("model.layers.0", "norm_mlp")
    assert "reads other numbers than post_attention_layernorm" in found.what


def test_parts_around_the_layers_are_told_from_layers():
    parts = attrs.evolve(OPT.models[0], positions=attrs.evolve(OPT.models[0].positions, offset=1))
    found = bisect(tiny("opt"), broken(OPT, models=[parts]))
    assert (found.layer, found.place) == ("", "decode loop")


def test_inputs_may_be_given():
    found = bisect(tiny("bert"), FAULTS["pre-norm for post-norm"][1], inputs_for("bert", pad="left"))
    assert (found.layer, found.call) == ("encoder.layer.0", "the inputs given")


def test_16_bits_have_their_own_tolerance():
    found = bisect(tiny("llama", dtype=torch.bfloat16), LLAMA)
    assert found.equal, found
    assert found.allowed == 4 * 2**-7
    wrong = bisect(tiny("llama", dtype=torch.bfloat16), FAULTS["swapped norms"][1])
    assert wrong.place == "norm_attn"


def test_what_cannot_be_applied_is_an_error():
    with pytest.raises(PolicyError, match="no submodule"):
        bisect(tiny("llama"), broken(LLAMA, {"out": attrs.evolve(SLOTS["out"], path="self_attn.missing")}))
    with pytest.raises(UnsupportedModelError, match="nothing to compare"):
        bisect(tiny("bert"), LLAMA)


def test_the_command_takes_a_policy_file(tmp_path, capsys):
    transformers.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(
        "import attrs\nfrom dsi.policy import Const\nfrom dsi_policies.gpt2 import GPT2 as _right\n"
        "_block = _right.blocks[0]\n"
        "MINE = attrs.evolve(_right, blocks=[attrs.evolve(_block, facts={**_block.facts, 'scale': Const(0.5)})])\n"
        "del _right\n"
    )
    assert main(["bisect", str(tmp_path), "--policy", str(path), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["layer"], answer["place"]) == ("transformer.h.0", "scale")
    assert main(["bisect", str(tmp_path), "--policy", "gpt2:gpt2"]) == 0
    assert "random weights" in capsys.readouterr().out
    assert main(["bisect", str(tmp_path), "--policy", str(tmp_path / "absent.py")]) == 2
    assert main(["bisect", str(tmp_path), "--policy", "absent:absent"]) == 2


def test_the_command_reads_real_weights(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path)
    assert main(["bisect", str(tmp_path), "--dtype", "float32", "--policy", "llama:llama"]) == 0
    assert f"weights of {tmp_path}" in capsys.readouterr().out
