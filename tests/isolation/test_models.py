"""Whatever a policy or a container does when a model is planned, injected or run, the model is what it was."""

from __future__ import annotations

import os

import pytest
import torch

import dsi
from tests.support import difference, fingerprint, inputs_for, tiny
from tests.support.hostile import POLICIES, RUNNING, install_policies
from tests.support.site import on_path


@pytest.fixture(scope="module", autouse=True)
def policies(tmp_path_factory):
    """Policies that strike later, installed."""
    site = tmp_path_factory.mktemp("policies")
    install_policies(site)
    with on_path(site):
        yield


REFUSED = {
    "edits_config": r"supports\(\) changed the config \(hidden_act, rope_parameters\)",
    "edits_model": r"supports\(\) changed the model \(.*training",
    "exits_when_asked": r"supports\(\) raised SystemExit: 1",
    "raises_when_asked": r"supports\(\) raised KeyError: 'x'",
    "answers_nonsense": r"supports\(\) returned 'no'",
}
WRONG = {
    "no_container": "policy no_container:main: container 'not_there_at_all:Layer' cannot be imported",
    "container_fails_to_import": "cannot be imported: RuntimeError: at import",
    "container_exits": "cannot be imported: SystemExit: 2",
    "no_layer": r"not a subclass of dsi\.containers\.Container",
    "check_raises": r"model\.layers\.0: check\(\) of .* raised ValueError: in check",
    "check_answers_nonsense": r"check\(\) of .* returned 3",
    "wrong_path": r"policy wrong_path:main: .* has no submodule 'self_attn.proj_out'",
    "wrong_place": "policy wrong_place:main: .*mlp.down_proj feeds both",
    "lost_parameter": r"policy lost_parameter:main: .*reads no slot from self_attn.v_proj.weight",
    "zeroes_model": r"while it was planned \(the values of weight of lm_head\).*zeroes_model:main",
}
FAILING = {
    "wrong_constructor": r"wrong_constructor_layers:Layer that was to replace model\.layers\.0",
    "raises_at_layer_1": r"at layer 1(.|\n)*replace model\.layers\.1, by the policy raises_at_layer_1:main",
    "wrecks_the_original": r"after the wreck(.|\n)*replace model\.layers\.1",
    "exits_at_layer_1": r"SystemExit\(3\)(.|\n)*replace model\.layers\.1",
    "slots_do_not_fit": r"replace model\.layers\.0",
}


def test_every_policy_is_tried():
    assert {*REFUSED, *WRONG, *FAILING} == set(POLICIES)


class Untouched:
    """A context after which the model is what it was before, to the bit, and computes the same."""

    def __enter__(self):
        self.model, self.inputs = tiny("llama"), inputs_for("llama", 2, 6, "ragged")
        self.expected = self.output()
        self.before = fingerprint(self.model)
        return self.model, self.inputs

    def __exit__(self, kind, *_):
        if kind is None:
            assert difference(self.before, fingerprint(self.model)) == []
            assert torch.equal(self.output(), self.expected)

    def output(self):
        with torch.no_grad():
            return self.model(**self.inputs).logits


@pytest.mark.parametrize("name", REFUSED)
def test_a_policy_that_strikes_when_it_is_asked_is_refused(name):
    with Untouched() as (model, _):
        with pytest.warns(UserWarning, match=f"{name}:main: {REFUSED[name]}"):
            engine = dsi.init_inference(model, injection_policy=f"{name}:main")
        assert not engine.plan.blocks
        engine.restore()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", [*WRONG, *FAILING])
def test_a_policy_or_container_that_is_wrong_is_an_error_and_changes_nothing(name, dtype):
    kind, words = (dsi.PolicyError, WRONG[name]) if name in WRONG else (dsi.InjectionError, FAILING[name])
    with Untouched() as (model, _), pytest.raises(kind, match=words):
        dsi.init_inference(model, dtype=dtype, injection_policy=f"{name}:main")


@pytest.mark.parametrize("name", RUNNING)
def test_a_container_that_fails_at_a_call_is_taken_out_by_restore(name):
    kind, words = dsi.PolicyError, f"{name}_layers:Layer gave .* for \\[2, 6, "
    if name == "raises_in_run":
        kind, words = RuntimeError, "in run"
    with Untouched() as (model, inputs):
        engine = dsi.init_inference(model, injection_policy=f"{name}:main")
        with torch.no_grad(), pytest.raises(kind, match=words):
            model(**inputs)
        engine.restore()


def test_a_model_is_planned_among_all_of_them():
    """They are all asked about every LLaMA layer; the built-in policy wins by its priority, and is right."""
    disabled = os.environ["DSI_DISABLE_PLUGINS"]
    with Untouched() as (model, inputs), pytest.MonkeyPatch.context() as patch:
        # what it writes into a tensor can be seen and not be undone: that one is an error
        patch.setenv("DSI_DISABLE_PLUGINS", f"{disabled},zeroes_model")
        engine = dsi.init_inference(model)
        assert {block.policy for block in engine.plan.blocks} == {"llama:llama"}
        reasons = {one.full_name: one.reason for one in engine.plan.rejected[engine.plan.blocks[0].original]}
        assert "changed the model" in reasons["edits_model:main"]
        assert "changed the config" in reasons["edits_config:main"]
        with torch.no_grad():
            model(**inputs)
        assert model.model.layers[0].fused_calls == 1
        engine.restore()
