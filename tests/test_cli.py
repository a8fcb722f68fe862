"""The command line: what it prints, as text and as JSON, and its exit codes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from dsi import skeleton
from dsi.cli import explain, main
from dsi.errors import ConfigError, UnsupportedModelError
from dsi.policy import API_VERSION, Block, Policy, Refusal, hookimpl
from dsi.registry import Registry
from dsi.skeleton import build_skeleton

LAYER = "transformers.models.llama.modeling_llama:LlamaDecoderLayer"


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """The command sets an environment variable for its own process, which is ours here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def of(one):
    """A plugin that registers one policy."""
    return SimpleNamespace(DSI_API=API_VERSION, dsi_register_policies=hookimpl(lambda register: register(one)))


@pytest.fixture
def plugins(monkeypatch):
    """A function that makes `Registry.load` give these policies, beside the built-in one of LLaMA."""

    def use(built_in=True, **policies):
        made = {}
        for name, one in policies.items():
            made[name] = of(one)
        if built_in:
            from dsi_policies import llama

            made["llama"] = llama
        registry = Registry.from_plugins(made, distributions={"llama": "dsi"}, strict=True)
        monkeypatch.setattr(Registry, "load", lambda *_: registry)

    return use


def policy(**more):
    return Policy(name="main", blocks=[Block(layer=LAYER, container="dsi.containers:DecoderLayer", slots={})], **more)


def run(capsys, *argv):
    """(exit code, standard output, standard error)"""
    code = main(list(argv))
    out = capsys.readouterr()
    return code, out.out, out.err


def write(path, **facts):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(facts))
    return str(path)


# --- usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["plan", "--help"], ["explain", "-h"], ["--version"]], ids=" ".join)
def test_help_is_no_error(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "dsi" in out


@pytest.mark.parametrize(
    "argv",
    ["", "nope", "plan", "explain", "plan a b", "plugins x", "plan x --nope", "plan x --dtype"],
)
def test_usage_errors_are_2(capsys, argv):
    code, out, err = run(capsys, *argv.split())
    assert code == 2
    assert out == ""
    assert "usage: dsi" in err


def test_a_wrong_option_is_2_before_torch_is_needed(capsys):
    code, out, err = run(capsys, "plan", "not-there", "--dtype", "int8")
    assert (code, out) == (2, "")
    assert "dtype: 'int8' is not supported: quantizers" in err


def test_an_unknown_policy_is_2(capsys, plugins):
    plugins()
    code, _, err = run(capsys, "explain", "not-there", "--policy", "llama:lama")
    assert code == 2
    assert "did you mean llama:llama?" in err


@pytest.mark.parametrize("command", ["plan", "explain"])
def test_a_model_that_is_not_there_is_2(capsys, plugins, command):
    plugins()
    code, out, err = run(capsys, command, "nobody/nothing")
    assert (code, out) == (2, "")
    assert "'nobody/nothing' is no file or folder and not in the Hugging Face cache" in err


def test_an_error_as_json(capsys, plugins):
    plugins()
    code, out, err = run(capsys, "plan", "nobody/nothing", "--json")
    assert (code, err) == (2, "")
    error = json.loads(out)["error"]
    assert error["type"] == "ConfigError"
    assert "nobody/nothing" in error["message"]


def test_a_missing_package_is_3(capsys, plugins, monkeypatch, pyllama_path):
    plugins()
    monkeypatch.setitem(sys.modules, "dsi.skeleton", None)
    code, _, err = run(capsys, "plan", str(pyllama_path))
    assert code == 3
    assert "dsi.skeleton" in err


def test_a_broken_plugin_under_strict_is_3(capsys, monkeypatch):
    monkeypatch.setenv("DSI_STRICT_PLUGINS", "1")
    monkeypatch.setenv("DSI_DISABLE_PLUGINS", "nobody-has-this")
    code, _, err = run(capsys, "plugins")
    assert code == 3
    assert "plugin nobody-has-this (- -) is unknown" in err


# --- dsi plugins --------------------------------------------------------------------------------------------------


def test_plugins_as_text(capsys, monkeypatch):
    broken = SimpleNamespace()
    registry = Registry.from_plugins({"acme": of(policy()), "a-broken-one": broken}, distributions={"acme": "acme-dsi"})
    monkeypatch.setattr(Registry, "load", lambda: registry)
    code, out, err = run(capsys, "plugins")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "acme          acme-dsi  loaded  acme:main"
    assert out.splitlines()[1].startswith("a-broken-one  -         broken  it does not say which plugin API")
    assert out.splitlines()[2] == f"    => add the line DSI_API = {API_VERSION}"
    assert len(out.splitlines()) == 3


def test_plugins_as_json(capsys, plugins):
    plugins(acme=policy())
    code, out, _ = run(capsys, "plugins", "--json")
    data = json.loads(out)
    assert code == 0
    assert [one["name"] for one in data["plugins"]] == ["acme", "llama"]
    assert data["plugins"][1]["policies"] == ["llama:llama"]
    assert data["digest"] == Registry.load().digest()


def test_no_plugins(capsys, plugins):
    plugins(built_in=False)
    assert run(capsys, "plugins")[:2] == (0, "no plugins are installed\n")


# --- dsi plan -----------------------------------------------------------------------------------------------------


def test_plan_as_text(capsys, plugins, pyllama_path):
    plugins()
    code, out, err = run(capsys, "plan", str(pyllama_path))
    assert (code, err) == (0, "")
    assert "plan for LlamaForCausalLM" in out
    assert "6 layers replaced" in out
    assert "policy llama:llama" in out


def test_plan_as_json(capsys, plugins, pyllama_path):
    plugins()
    code, out, _ = run(capsys, "plan", str(pyllama_path), "--json", "--dtype", "half")
    data = json.loads(out)
    assert code == 0
    assert [one["path"] for one in data["blocks"]] == [f"model.layers.{i}" for i in range(6)]
    assert (data["dtype_before"], data["dtype_after"]) == ("bfloat16", "float16")


def test_plan_of_a_model_that_nobody_knows(capsys, plugins, tmp_path):
    plugins()
    folder = write(tmp_path / "m", model_type="albert", hidden_size=16, num_attention_heads=2, intermediate_size=16)
    assert run(capsys, "plan", folder)[0] == 0
    assert run(capsys, "plan", folder, "--strict")[0] == 1
    code, out, _ = run(capsys, "explain", folder, "--strict")
    assert code == 1
    assert out.startswith("no policy claims a layer of this model\n")


# --- dsi explain --------------------------------------------------------------------------------------------------


def test_explain_as_text(capsys, plugins, pyllama_path):
    refusing = policy(
        priority=-1, supports=lambda config: Refusal(reason=f"no {config.hidden_act}", hint="take another")
    )
    plugins(acme=refusing, zeta=policy(priority=5))
    code, out, err = run(capsys, "explain", str(pyllama_path))
    assert (code, err) == (0, "")
    assert out.splitlines()[:7] == [
        f"{LAYER}: model.layers.0 .. model.layers.5, 6 layers",
        "  - acme:main (-, priority -1): not chosen, supports: no silu",
        "      take another",
        "  * llama:llama (dsi, priority 0): chosen",
        "  - zeta:main (-, priority 5): not chosen, priority: "
        "priority 5 does not outrank the built-in llama:llama by itself",
        '      add replaces=("llama:llama",) to the policy',
        "",
    ]
    assert "plan for LlamaForCausalLM" in out
    assert "qkv" in out


def test_explain_as_json(capsys, plugins, pyllama_path):
    plugins(acme=policy(requires=("no-such-thing>=2",)))
    code, out, _ = run(capsys, "explain", str(pyllama_path), "--json")
    data = json.loads(out)
    assert code == 0
    (layer,) = data["layers"]
    assert layer["layer"] == LAYER
    assert len(layer["paths"]) == 6
    verdicts = {one["full_name"]: one for one in layer["verdicts"]}
    assert verdicts["llama:llama"]["chosen"] is True
    assert verdicts["acme:main"]["chosen"] is False
    assert verdicts["acme:main"]["stage"] == "requires"
    assert verdicts["acme:main"]["reason"] == "no-such-thing>=2 is not installed"
    assert len(data["plan"]["blocks"]) == 6


def test_explain_a_tie_is_1_and_prints_the_line_that_settles_it(capsys, plugins, pyllama_path):
    plugins(acme=policy())
    code, out, _ = run(capsys, "explain", str(pyllama_path))
    assert code == 1
    assert "  - acme:main (-, priority 0): undecided" in out
    assert 'settle it with injection_policy="acme:main" or injection_policy="llama:llama"' in out
    assert run(capsys, "plan", str(pyllama_path))[0] == 1


def test_a_tie_is_settled_by_the_option(capsys, plugins, pyllama_path):
    plugins(acme=policy())
    code, out, _ = run(capsys, "explain", str(pyllama_path), "--policy", "llama:llama")
    assert code == 0
    assert "acme:main (-, priority 0): not chosen, explicit: injection_policy asks for llama:llama" in out


def test_explain_each_config_of_one_layer_class(capsys, monkeypatch, tmp_path):
    """A model with two towers has one layer class under two configs, and each gets its own verdict."""
    layer = "transformers.models.clip.modeling_clip:CLIPEncoderLayer"

    def supports(config):
        return Refusal(reason="vision") if hasattr(config, "image_size") else None

    one = Policy(name="main", supports=supports, blocks=[Block(layer=layer, container="c:C", slots={})])
    registry = Registry.from_plugins({"acme": of(one)}, strict=True)
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    folder = write(
        tmp_path / "clip", model_type="clip", architectures=["CLIPModel"], text_config=small, vision_config=small
    )
    model = build_skeleton(folder)
    verdicts = {
        paths[0]: registry.choose(found, config).full_name
        for found, _, config, paths in explain._claimed(model, registry)
    }
    assert verdicts == {"text_model.encoder.layers.0": "acme:main", "vision_model.encoder.layers.0": ""}


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])


def test_explain_heeds_what_holds_a_layer():
    """Torch's own classes stand everywhere; a policy says in which of its own they are meant."""
    layer = "torch.nn.modules.linear:Linear"
    held = f"{Holder.__module__}:{Holder.__qualname__}"
    one, other = (
        Policy(name="main", blocks=[Block(layer=layer, container="c:C", slots={}, inside=(holder,))])
        for holder in (held, "some.where:Else")
    )
    registry = Registry.from_plugins({"one": of(one), "other": of(other)}, strict=True)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Holder())
    ((found, holder, config, paths),) = explain._claimed(model, registry)
    assert (found, holder, paths) == (layer, held, ("1.layers.0",))
    assert registry.choose(found, config, holder=holder).full_name == "one:main"


# --- skeletons ----------------------------------------------------------------------------------------------------


def test_a_skeleton_has_no_weights(pyllama_path):
    model = build_skeleton(str(pyllama_path))
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert not model.training
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.state_dict().keys() == transformers.LlamaForCausalLM(model.config).state_dict().keys()


def test_a_config_file_and_its_folder_are_the_same(pyllama_path):
    of_file = build_skeleton(str(pyllama_path / "config.json"))
    assert type(of_file) is type(build_skeleton(str(pyllama_path)))


def test_a_model_in_the_cache(tmp_path, monkeypatch, pyllama_path):
    """The layout of the Hugging Face cache, made by hand."""
    from huggingface_hub import constants

    repo = tmp_path / "models--acme--tiny"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_bytes((pyllama_path / "config.json").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert isinstance(build_skeleton("acme/tiny"), transformers.LlamaForCausalLM)
    with pytest.raises(ConfigError, match="not in the Hugging Face cache"):
        build_skeleton("acme/other")


@pytest.mark.parametrize(
    ("architectures", "cls"),
    [
        (["BertForSequenceClassification", "BertModel"], "BertForSequenceClassification"),
        (["NotInTransformers"], "BertModel"),
        (["AutoModel"], "BertModel"),
        (["BertConfig"], "BertModel"),
        (["utils"], "BertModel"),
        (["__class__"], "BertModel"),
        ([], "BertModel"),
        (None, "BertModel"),
        ("BertForMaskedLM", "BertModel"),
        ([3], "BertModel"),
    ],
    ids=str,
)
def test_only_models_that_transformers_exports_are_built_by_name(tmp_path, architectures, cls):
    folder = write(tmp_path / "m", model_type="bert", architectures=architectures, num_hidden_layers=1)
    assert type(build_skeleton(folder)).__name__ == cls


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "has no model_type"),
        ('{"architectures": ["LlamaForCausalLM"]}', "has no model_type"),
        ("{" * 100_000, "is not JSON"),
        ('{"a":' * 100_000, "is not JSON"),
        (" " * ((4 << 20) + 1), "more than 4194304 bytes"),
        (b"\xff\xfe\x00", "is not JSON"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_config_that_is_none(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=rf"MODEL: .*config\.json.* {words}"):
        build_skeleton(str(path))


@pytest.mark.parametrize("model", ["", "no\0thing", "a b", "a/b/c", "/nowhere/at/all", "../x/../../y"], ids=repr)
def test_a_model_that_is_not_there(model):
    with pytest.raises(ConfigError, match="MODEL: "):
        build_skeleton(model)


def test_a_folder_without_a_config_says_what_it_has(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no config\.json \(it has model_index\.json\)"):
        build_skeleton(str(tmp_path))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel is a diffusers model"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantized already"),
        ({"model_type": "from_the_future"}, "model_type 'from_the_future' is not in this version of transformers"),
        ({"model_type": ["llama"]}, "is not in this version"),
        ({"model_type": "own", "auto_map": {"AutoModel": "m.M"}}, "dsi runs no code of a checkpoint"),
        ({"auto_map": {"AutoModel": "m.M"}}, "dsi runs no code of a checkpoint"),
        ({"model_type": "llama", "hidden_size": "many"}, "transformers"),
        ({"model_type": "llama", "hidden_size": -8, "num_attention_heads": 2}, "transformers"),
        ({"model_type": "llama", "architectures": ["BertModel"]}, "BertModel, which is no model of model_type 'llama'"),
    ],
    ids=str,
)
def test_a_model_that_is_refused(tmp_path, facts, words):
    with pytest.raises(UnsupportedModelError, match=words):
        build_skeleton(write(tmp_path / "m", **facts))


def test_a_config_never_selects_code(tmp_path, caplog, pyllama_path):
    """auto_map beside a known model type is ignored aloud; the module it names would end the test run."""
    facts = json.loads((pyllama_path / "config.json").read_text())
    facts |= {
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        "_attn_implementation": "someone/evil-kernel",
        "attn_implementation": "someone/evil-kernel",
    }
    folder = write(tmp_path / "m", **facts)
    (Path(folder) / "evil.py").write_text("raise SystemExit('ran')")
    with caplog.at_level(logging.WARNING, logger="dsi"):
        model = build_skeleton(folder)
    assert [one.getMessage() for one in caplog.records] == [
        f"{folder}/config.json: auto_map names code of the checkpoint; it is ignored"
    ]
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "auto_map")
    assert not [name for name in sys.modules if "evil" in name]


def test_what_is_taken_out_is_taken_out_at_every_depth():
    facts = {
        "text_config": {"auto_map": 1, "a": [{"_attn_implementation": "x", "b": 2}]},
        "use_pretrained_backbone": True,
    }
    assert skeleton._without_code(facts) == {"text_config": {"a": [{"b": 2}]}, "use_pretrained_backbone": False}


def test_a_large_model_is_planned_without_its_weights(capsys, plugins, tmp_path):
    """70 billion parameters: 140 GB, if anything were allocated."""
    plugins()
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    folder = write(tmp_path / "m", model_type="llama", architectures=["LlamaForCausalLM"], **sizes, **heads)
    started = time.perf_counter()
    code, out, _ = run(capsys, "plan", folder)
    assert code == 0
    assert "80 layers replaced" in out
    assert time.perf_counter() - started < 30


NO_NETWORK = """
import socket, sys

def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"network: {event} {args}")

sys.addaudithook(hook)
from dsi.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("model", "code"), [("data/pyllama-7m", 0), ("bert-base-uncased-not-here", 2)])
def test_no_command_uses_the_network(root, model, code):
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, "plan", model], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert "network" not in done.stderr
    assert done.returncode == code
