"""Whatever a plugin does while it is loaded, its host and the others work, and `dsi plugins` names it with its mend."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers

import dsi
from dsi.registry import Registry
from tests.support import difference, fingerprint, inputs_for, tiny
from tests.support.hostile import DEADLY, POLICIES, RUNNING, ZOO, install_zoo
from tests.support.site import on_path, run_dsi


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The folder with everything of `ZOO`, on the path."""
    site = tmp_path_factory.mktemp("zoo")
    install_zoo(site)
    with on_path(site):
        yield site


@pytest.fixture(scope="module")
def registry(zoo):
    return Registry.load()


def records(registry, name):
    return [one for one in registry.records if one.distribution == f"hostile-{name}"]


def test_there_are_enough():
    assert len(ZOO) + len(DEADLY) + len(POLICIES) + len(RUNNING) >= 60


@pytest.mark.parametrize("name", ZOO)
def test_a_hostile_plugin_is_named_with_its_reason_and_the_mend(registry, name):
    expected = ZOO[name]
    (found,) = records(registry, name)
    assert found.state == expected.state, found
    assert expected.reason in found.reason
    assert expected.mend in found.mend
    assert "\n" not in found.why
    if found.state != "loaded":
        assert (found.policies, found.containers, found.quantizers, found.checks) == ((), (), (), ())


def test_everybody_else_is_loaded(registry):
    others = [one for one in registry.records if not one.distribution.startswith("hostile-")]
    ours = [one for one in others if one.distribution in ("dsi", "a-neighbour")]
    assert {one.state for one in ours} == {"loaded"}
    assert {one.reason for one in ours} == {""}
    assert registry.policies["neighbour:main"].blocks[0].layer == "some.models:Layer"


def test_the_process_is_what_it_was(registry):
    weight = torch.ones(2, 3)
    assert torch.equal(torch.nn.functional.linear(torch.ones(1, 3), weight), torch.full((1, 2), 3.0))
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    sys.stdout.write("")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_host_and_its_models_work_among_them(zoo, family):
    model = tiny(family)
    inputs = inputs_for(family, 2, 7, "ragged")
    with torch.no_grad():
        expected = model(**inputs)[0]
        before = fingerprint(model)
        engine = dsi.init_inference(model)
        assert len(engine.plan.blocks) == 2
        assert torch.allclose(model(**inputs)[0], expected, atol=1e-5)
    engine.restore()
    assert difference(before, fingerprint(model)) == []


def test_a_tie_is_an_error_for_the_models_it_is_about_and_changes_nothing(zoo):
    config = transformers.OlmoConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=31
    )
    model = transformers.OlmoForCausalLM(config).eval()
    before = fingerprint(model)
    with pytest.raises(dsi.AmbiguousPolicyError, match='settle it with injection_policy="tie_a:main"'):
        dsi.init_inference(model)
    assert difference(before, fingerprint(model)) == []


def test_the_command_names_each_and_stays_readable(zoo):
    done = run_dsi("plugins", site=zoo)
    assert done.returncode == 0, done.stderr
    for name, one in ZOO.items():
        if name not in ("same_name", "patches", "settings"):
            assert one.mend in done.stdout
            line = next(line for line in done.stdout.splitlines() if line.startswith(name))
            assert one.reason in line
    data = json.loads(run_dsi("plugins", "--json", site=zoo).stdout)
    found = {one["name"]: one for one in data["plugins"] if one["distribution"].startswith("hostile-")}
    assert len(found) == len(ZOO)
    # nothing was imported that could be watched, and importing it is a fault of its own
    assert found["patches"]["reason"].startswith("it imports torch")
