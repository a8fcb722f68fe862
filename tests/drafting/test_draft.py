"""Drafted policies hold; what no container computes is refused; no installed policy has a part in it."""

from __future__ import annotations

import json
import sys

import attrs
import pytest
import torch
import transformers
from torch import nn

import dsi.registry
from dsi.cli import main
from dsi.drafting import draft
from dsi.drafting.norms import epsilons, read_norm
from dsi.drafting.policy_file import load_source
from dsi.drafting.source import Guard, render
from dsi.drafting.specimen import FIRST, SECOND, Species
from dsi.drafting.trial import try_policy
from dsi.errors import UnsupportedModelError
from dsi.policy import Attr, Config, Const, Packed
from tests.drafting.families import FAMILIES, skeleton
from tests.drafting.table import lines

FAST = ("llama", "bert", "gemma2")


@pytest.fixture(scope="module")
def drafts():
    return {name: draft(skeleton(name)) for name in FAST}


def block_of(found):
    return found.policy.blocks[0]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_a_drafted_policy_says_what_the_written_one_says(drafts):
    from dsi_policies.llama import LLAMA

    written, found = LLAMA.blocks[0], block_of(drafts["llama"])
    assert found.slots == written.slots
    assert found.layer == written.layer
    assert found.call == written.call
    assert drafts["llama"].policy.models[0].norm == LLAMA.models[0].norm


def test_post_norm_and_its_facts_are_found(drafts):
    from dsi_policies.bert import BERT

    found = block_of(drafts["bert"])
    assert found.slots == BERT.blocks[0].slots
    assert found.facts["pre_norm"] == Const(False)
    assert found.facts["causal"] == Const(False)
    assert drafts["bert"].policy.context == BERT.context
    assert drafts["bert"].policy.models == ()


def test_sandwich_norms_caps_windows_and_scale_are_found(drafts):
    found = block_of(drafts["gemma2"])
    assert {"norm_attn_out", "norm_mlp_out"} <= found.slots.keys()
    assert found.slots["norm_attn"].offset == 1.0
    assert found.facts["softcap"] == Attr("self_attn.attn_logit_softcapping")
    assert found.facts["window"] == Attr("self_attn.sliding_window")
    assert found.facts["scale"] == Attr("self_attn.scaling")
    assert found.facts["activation"] == Config("hidden_activation")
    assert drafts["gemma2"].policy.models[0].logit_cap == Config("final_logit_softcapping")


def test_a_setting_that_changes_the_layer_is_refused(drafts):
    config = transformers.BertConfig(is_decoder=True)
    assert "is_decoder=True" in drafts["bert"].policy.supports(config).reason
    assert drafts["bert"].policy.supports(transformers.BertConfig()) is None


@pytest.mark.parametrize(
    ("name", "fact", "source"),
    [
        ("opt", "pre_norm", Attr("do_layer_norm_before")),
        ("gpt_neox", "parallel", Attr("use_parallel_residual")),
        ("bloom", "add_to_normed", Attr("apply_residual_connection_post_layernorm")),
    ],
)
def test_a_flag_is_read_where_a_changed_setting_shows_it(name, fact, source):
    found = draft(skeleton(name))
    assert block_of(found).facts[fact] == source
    assert found.policy.models


@pytest.mark.slow
def test_a_layout_that_one_kv_head_leaves_open_is_settled_with_more():
    assert block_of(draft(skeleton("falcon"))).slots["qkv"].layout == "kv_grouped"


@pytest.mark.parametrize("name", FAST)
def test_the_file_is_the_policy(drafts, name):
    found = drafts[name]
    policy = load_source(found.source)
    assert attrs.evolve(policy, supports=found.policy.supports) == found.policy
    assert "Sure, because it was run" in found.source
    assert f'name="{found.policy.name}"' in found.source


def test_no_installed_policy_is_asked(monkeypatch, drafts):
    """With no plugin at all the draft is the same."""
    monkeypatch.setenv("DSI_PLUGINS", "kit")
    assert dsi.registry.Registry.load().policies == {}
    assert draft(skeleton("llama")).source == drafts["llama"].source


# --- what is not drafted ----------------------------------------------------------------------------------------------


def test_a_layer_that_no_container_computes_is_refused(monkeypatch):
    """A residual connection that is halved is in no container's words."""
    module = sys.modules["transformers.models.llama.modeling_llama"]
    forward = module.LlamaDecoderLayer.forward

    def halved(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states, *args, **kwargs) - 0.5 * hidden_states

    monkeypatch.setattr(module.LlamaDecoderLayer, "forward", halved)
    with pytest.raises(UnsupportedModelError, match=r"no form of DecoderLayer computes .* the closest was scale=.*e-0"):
        draft(skeleton("llama"))


def test_a_norm_that_dsi_does_not_know_is_refused(monkeypatch):
    module = sys.modules["transformers.models.llama.modeling_llama"]
    monkeypatch.setattr(module.LlamaRMSNorm, "forward", lambda self, x: self.weight * x)
    with pytest.raises(UnsupportedModelError, match=r"norm"):
        draft(skeleton("llama"))


def test_a_model_without_attention_is_refused():
    with torch.device("meta"):
        model = transformers.MambaForCausalLM(transformers.MambaConfig(num_hidden_layers=2, state_size=4))
    with pytest.raises(UnsupportedModelError):
        draft(model)


def test_a_wrong_candidate_is_not_equal(drafts):
    """The trial sees a wrong layout, scale and cap: else the search would keep the first candidate."""
    found = drafts["gemma2"]
    # the cap of the config is too wide to be felt
    specimen = Species.of(skeleton("gemma2"), epsilons).specimen(changes={"attn_logit_softcapping": 2.0})
    assert try_policy(found.policy, specimen).equal
    for name, fact in (("scale", Const(0.3)), ("softcap", Const(None)), ("activation", Const("gelu"))):
        block = attrs.evolve(block_of(found), facts={**block_of(found).facts, name: fact})
        assert not try_policy(attrs.evolve(found.policy, blocks=[block]), specimen).equal, name


def test_a_cap_of_the_logits_that_is_lost_is_not_equal(drafts):
    found = drafts["gemma2"]
    specimen = Species.of(skeleton("gemma2"), epsilons).specimen(changes={"final_logit_softcapping": 2.0})
    assert try_policy(found.policy, specimen, generate=True).equal
    lost = attrs.evolve(found.policy, models=[attrs.evolve(found.policy.models[0], logit_cap=None)])
    assert try_policy(lost, specimen).equal
    assert not try_policy(lost, specimen, generate=True).equal


def test_a_wrong_layout_is_not_equal():
    found = draft(skeleton("gpt2"))
    slot = block_of(found).slots["qkv"]
    assert slot == Packed("attn.c_attn", layout="thirds", split="column", transposed=True)
    wrong = attrs.evolve(slot, layout="head_interleaved")
    block = attrs.evolve(block_of(found), slots={**block_of(found).slots, "qkv": wrong})
    specimen = Species.of(skeleton("gpt2"), epsilons).specimen()
    assert not try_policy(attrs.evolve(found.policy, blocks=[block]), specimen).equal


# --- parts ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Mean square, times one plus the weight."""

    def __init__(self, offset, eps=1e-6):
        super().__init__()
        self.weight, self.offset, self.epsilon = nn.Parameter(torch.randn(8)), offset, eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * (self.weight + self.offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_known_by_what_it_computes(offset):
    module = Scaled(int(offset))
    found = read_norm(module)
    assert (found.kind, found.eps, found.offset) == ("rms", "epsilon", offset)
    assert module.epsilon == 1e-6


def test_what_is_no_norm_is_none():
    assert read_norm(Scaled(3)) is None
    assert read_norm(nn.Linear(4, 4)) is None
    assert read_norm(nn.BatchNorm1d(8)) is None


def test_sizes_of_the_two_specimens_have_nothing_in_common():
    species = Species.of(skeleton("llama"), epsilons)
    first, second = (species.specimen(sizes).model.config for sizes in (FIRST, SECOND))
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
        assert getattr(first, name) != getattr(second, name), name


def test_a_guard_becomes_a_refusal(drafts):
    source = render(
        drafts["llama"].policy, [Guard("rope_theta", 2.0, "it was run"), Guard("tied", None, "so was it")], [], []
    )
    supports = load_source(source).supports

    class Given:
        rope_theta, tied = 3.0, None

    assert "rope_theta=3.0 is not implemented" in supports(Given()).reason
    Given.rope_theta = 2.0
    assert supports(Given()) is None


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_file_once(tmp_path, capsys):
    transformers.DistilBertConfig(architectures=["DistilBertModel"]).save_pretrained(tmp_path)
    path = tmp_path / "mine.py"
    assert main(["draft", str(tmp_path), "--output", str(path), "--name", "mine", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["policy"] == "mine"
    assert load_source(path.read_text()).name == "mine"
    assert main(["draft", str(tmp_path), "--output", str(path)]) == 2
    assert "overwrites nothing" in capsys.readouterr().err


def test_the_command_writes_nothing_where_it_is_stopped(tmp_path, capsys):
    config = transformers.MambaConfig(architectures=["MambaForCausalLM"], num_hidden_layers=2, state_size=4)
    config.save_pretrained(tmp_path)
    path = tmp_path / "mine.py"
    assert main(["draft", str(tmp_path), "--output", str(path)]) == 1
    assert capsys.readouterr().err.startswith("dsi: ")
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_draft_passes_the_kit(name, tmp_path):
    line = next(iter(lines([name], str(tmp_path))))
    assert line.ok, str(line)
