"""Plugins written for an older API keep working: they load, plan, inject, equal stock, pass checks and are undone."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import GPT2Config, SeedOssConfig, SiglipVisionConfig

import dsi
from dsi.registry import Registry
from dsi.testing import conformance
from tests.support import difference, fingerprint, make_hostile_
from tests.support.site import on_path

FROZEN = Path(__file__).parent / "frozen"
SITE = FROZEN / "api_1_0"


@pytest.fixture(scope="module", autouse=True)
def installed():
    with on_path(SITE):
        yield


def seed_config(**more):
    settings = {
        "vocab_size": 67,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return SeedOssConfig(**{**settings, **more})


def gpt2_config():
    return GPT2Config(
        vocab_size=67, n_embd=48, n_inner=80, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )


def vision_config():
    return SiglipVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )


# policy -> (model class, its config)
POLICIES = {
    "frozen:seed-oss": ("SeedOssForCausalLM", seed_config),
    "frozen:seed-oss-kept-mlp": ("SeedOssForCausalLM", seed_config),
    "frozen:learned-positions": ("GPT2LMHeadModel", gpt2_config),
    "frozen:vision": ("SiglipVisionModel", vision_config),
}


def build(policy):
    name, config = POLICIES[policy]
    model = getattr(transformers, name)(config()).eval()
    make_hostile_(model)
    return model


def inputs(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(3, 67, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("site", [path for path in FROZEN.iterdir() if path.is_dir()], ids=lambda path: path.name)
def test_what_is_frozen_is_not_edited(site):
    (info,) = site.glob("*.dist-info")
    rows = {path: digest for path, digest, _ in csv.reader(io.StringIO((info / "RECORD").read_text())) if digest}
    files = {
        str(path.relative_to(site)) for path in site.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert rows.keys() == files - {f"{info.name}/RECORD"}
    for path, digest in rows.items():
        found = base64.urlsafe_b64encode(hashlib.sha256((site / path).read_bytes()).digest()).rstrip(b"=").decode()
        assert digest == f"sha256={found}", f"{path} was edited; a frozen plugin is never changed"


def test_it_loads_without_a_word():
    registry = Registry.load()
    (found,) = (one for one in registry.records if one.name == "frozen")
    assert (found.distribution, found.version, found.state, found.why) == ("dsi-frozen", "1.0.0", "loaded", "")
    assert found.policies == tuple(POLICIES)
    assert found.containers == ("frozen:counting", "frozen:plain")
    assert found.checks == ("frozen:same_class",)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_plans_injects_equals_stock_and_is_restored(policy):
    model = build(policy)
    given = inputs(model)
    with torch.no_grad():
        expected = model(**given)[0]
        before = fingerprint(model)
        engine = dsi.init_inference(model, injection_policy=policy, strict=True)
        assert [block.policy for block in engine.plan.blocks] == [policy, policy]
        found = model(**given)[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    layers = [one for one in model.modules() if isinstance(one, dsi.containers.Container)]
    assert [one.fused_calls for one in layers] == [1, 1]
    assert [one.stock_calls for one in layers] == [0, 0]
    if policy == "frozen:seed-oss":
        assert [one.runs for one in layers] == [1, 1]
    engine.restore()
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "frozen:vision"])
def test_it_generates_stocks_tokens_in_dsis_loop(policy):
    model = build(policy)
    given = inputs(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    expected = model.generate(**given, max_new_tokens=8, do_sample=False)
    engine = dsi.init_inference(model, injection_policy=policy)
    assert engine.plan.decode is not None
    assert torch.equal(model.generate(**given, max_new_tokens=8, do_sample=False), expected)


def test_it_is_chosen_by_itself():
    """`priority` and `replaces` mean what they meant: the better of its two policies for one layer wins."""
    made = dsi.plan(build("frozen:seed-oss"))
    assert {block.policy for block in made.blocks} == {"frozen:seed-oss"}
    assert {block.container for block in made.blocks} == {"frozen:counting"}
    # the built-in policy outranks the one of a lower priority
    assert {block.policy for block in dsi.plan(build("frozen:learned-positions")).blocks} == {"gpt2:gpt2"}


def test_its_refusals_are_heard():
    model = transformers.SeedOssForCausalLM(seed_config(hidden_act="relu")).eval()
    made = dsi.plan(model, injection_policy="frozen:seed-oss")
    assert not made.blocks
    assert "hidden_act='relu' was never tried" in made.why_nothing
    siglip = transformers.SiglipVisionModel(
        SiglipVisionConfig(**{**vision_config().to_diff_dict(), "hidden_act": "relu"})
    ).eval()
    assert "activation 'relu' is not computed" in dsi.plan(siglip).why_nothing


@pytest.mark.parametrize("policy", ["frozen:seed-oss", "frozen:vision"])
def test_its_check_runs_in_the_kit(policy):
    report = conformance(policy, POLICIES[policy][1], only=["frozen:same_class", "applies", "numerics_fp32"])
    assert report.ok, str(report)
    assert "frozen:same_class" in {row.check for row in report.rows}


def test_importing_it_is_light():
    code = "import sys, dsi_frozen; print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{SITE}:{':'.join(filter(None, sys.path))}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]", done.stderr
