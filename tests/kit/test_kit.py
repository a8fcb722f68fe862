"""The kit's own manners: what it counts, what it refuses, what it says it cannot see, how it ends."""

from __future__ import annotations

import importlib
import json
import re
from types import SimpleNamespace

import attrs
import pytest
import torch

from dsi.cli import main
from dsi.errors import ConfigError, PluginError, UnknownPolicyError
from dsi.policy import Check, Concat, hookimpl
from dsi.registry import Registry
from dsi.testing import Failed, Report, Row, Subject, absent, conformance, failed, not_run, passed, tiny_config
from dsi.testing import plugin as kit
from dsi.testing.checks.moves import recorded
from dsi.testing.compare import distance
from dsi.testing.hostile import make_hostile_
from dsi.testing.plugin import CHECKS
from dsi_policies import llama as llama_plugin
from dsi_policies.llama import LLAMA
from tests.kit.subjects import SUBJECTS, llama_config
from tests.support.models import tiny_config as family_config

QUICK = ("applies", "numerics_fp32")


def run(**options):
    options = {"only": QUICK, **options}
    return conformance("llama:llama", llama_config, **options)


# --- what is counted --------------------------------------------------------------------------------------------------


def row(check, status, what="said"):
    return Row(check=check, status=status, what=what)


def test_the_last_line_counts_every_row():
    rows = [row("a", "pass"), row("b", "pass"), row("c", "expected-fail"), row("d", "not-run", "no CUDA")]
    report = Report(policy="p", model="M", rows=rows, absent={"e": "no use"})
    assert str(report).splitlines()[-1] == "4 checks: 2 pass, 1 expected-fail, 1 not-run (no CUDA)"
    assert report.counts() == {"pass": 2, "fail": 0, "expected-fail": 1, "not-run": 1}
    assert "does not apply: e (no use)" in str(report)


@pytest.mark.parametrize(
    ("statuses", "ok"),
    [
        (["pass"], True),
        (["pass", "not-run", "expected-fail"], True),
        (["pass", "fail"], False),
        # what did not run is not green
        (["not-run"], False),
        ([], False),
    ],
)
def test_a_report_is_ok_where_something_passed_and_nothing_failed(statuses, ok):
    rows = [row(str(index), status) for index, status in enumerate(statuses)]
    assert Report(policy="p", model="M", rows=rows).ok is ok


def test_a_report_of_a_real_policy():
    report = run()
    assert report.ok
    assert [one.check for one in report.rows] == list(QUICK)
    numbers = report.row("numerics_fp32")
    assert 0 < float(numbers.measured) <= float(numbers.allowed) == 1e-5
    assert json.loads(json.dumps(report.to_dict()))["counts"]["pass"] == 2
    with pytest.raises(KeyError):
        report.row("nothing")


def test_what_does_not_apply_is_named_and_not_counted():
    report = conformance("bert:bert", lambda: family_config("bert"), only=("applies", "greedy_generate"))
    assert dict(report.absent) == {"greedy_generate": "the model generates no text"}
    assert len(report.rows) == 1


def test_what_cannot_run_is_not_green():
    report = run(only=("quantized",))
    assert report.counts()["not-run"] == 1
    assert not report.ok


def test_required_checks_fail_where_they_are_not_run():
    found = run(only=("applies", "quantized"), require="all").row("quantized")
    assert found.status == "fail"
    assert "no quantizer is registered" in found.what


# --- what authors say -------------------------------------------------------------------------------------------------


def broken_policy():
    block = LLAMA.blocks[0]
    order = Concat("mlp.up_proj", "mlp.gate_proj", split="column")
    return attrs.evolve(LLAMA, blocks=[attrs.evolve(block, slots={**block.slots, "gate_up": order})])


def test_an_expected_failure():
    report = conformance(
        broken_policy(), llama_config, only=QUICK, expected_failures={"numerics_fp32": "gate and up are swapped"}
    )
    found = report.row("numerics_fp32")
    assert (found.status, found.reason) == ("expected-fail", "gate and up are swapped")
    assert report.ok
    assert "expected: gate and up are swapped" in str(report)


def test_an_expected_failure_that_passes_fails():
    report = run(expected_failures={"numerics_fp32": "who knows"})
    assert report.row("numerics_fp32").status == "fail"
    assert "who knows" in report.row("numerics_fp32").what
    assert not report.ok


@pytest.mark.parametrize("reason", ["", "  ", None])
def test_an_expected_failure_needs_a_reason(reason):
    with pytest.raises(ValueError, match="numerics_fp32: say why"):
        run(expected_failures={"numerics_fp32": reason})


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="expected_failures: no check numerics; there are: applies"):
        run(expected_failures={"numerics": "because"})
    with pytest.raises(ConfigError, match="only: no check nothing"):
        run(only=("nothing",))
    with pytest.raises(ValueError, match="no tolerance fp64; there are: fp32, rounding, memory"):
        run(tolerances={"fp64": 1})
    with pytest.raises(ValueError, match="require='some'"):
        run(require="some")
    with pytest.raises(UnknownPolicyError, match="did you mean llama:llama"):
        conformance("llama:lama", llama_config)


def test_tolerances_hold():
    found = run(tolerances={"fp32": 1e-12}).row("numerics_fp32")
    assert (found.status, found.allowed) == ("fail", "1e-12")


def test_a_failure_says_what_was_measured_what_was_allowed_and_how_to_mend_it():
    text = str(conformance(broken_policy(), llama_config, only=QUICK))
    assert "numerics_fp32  fail" in text
    assert "measured: " in text
    assert "allowed: 1e-05" in text
    assert "mend: compare slot by slot" in text


def test_a_policy_that_cannot_be_applied_fails_once():
    nothing = attrs.evolve(LLAMA, requires=("transformers>=99",))
    report = conformance(nothing, llama_config, only=("applies", "numerics_fp32", "restore"))
    assert report.counts() == {"pass": 0, "fail": 1, "expected-fail": 0, "not-run": 2}
    assert "transformers>=99" in report.row("applies").what
    assert report.row("restore").what == "the policy cannot be applied, see applies"


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num_key_value_heads": 3}, "does not run"), ({"hidden_size": -1}, "cannot be built: RuntimeError")],
)
def test_a_config_that_is_wrong_itself_is_told_apart(change, said):
    def impossible():
        config = llama_config()
        for name, value in change.items():
            setattr(config, name, value)
        return config

    report = conformance("llama:llama", impossible, only=("applies", "left_padding", "restore"))
    assert [one.status for one in report.rows] == ["fail", "not-run", "not-run"]
    assert f"the stock model of this config {said}" in report.row("applies").what


# --- what it cannot see -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"num_key_value_heads": 8}, "as many kv heads as heads"),
        ({"head_dim": 4}, "heads \\* head_dim is hidden_size"),
        ({"attention_bias": False, "mlp_bias": False}, "every bias is off"),
        ({"intermediate_size": 128}, "four times"),
        ({"num_hidden_layers": 1}, "one layer"),
    ],
)
def test_a_blind_config_is_called_blind(changes, note):
    def config():
        given = llama_config()
        for name, value in changes.items():
            setattr(given, name, value)
        return given

    report = conformance("llama:llama", config, only=QUICK)
    assert report.ok
    assert any(re.search(note, said) for said in report.row("numerics_fp32").blind)
    assert "  blind: " in str(report)


def test_a_seeing_config_is_not_called_blind():
    assert run().row("numerics_fp32").blind == ()


def test_blindness_is_real():
    # with as many kv heads as heads, heads taken for kv heads cannot show; with fewer they do
    block = LLAMA.blocks[0]
    facts = {**block.facts, "kv_heads": block.facts["heads"]}
    wrong = attrs.evolve(LLAMA, blocks=[attrs.evolve(block, facts=facts)])

    def blind():
        config = llama_config()
        config.num_key_value_heads = 8
        return config

    assert conformance(wrong, blind, only=QUICK).ok
    assert not conformance(wrong, llama_config, only=QUICK).ok


# --- checks of others -------------------------------------------------------------------------------------------------


def says_pass(subject):
    return passed(f"saw {subject.policy.name}", measured=1, allowed=2)


def says_no(subject):
    raise Failed("deep inside", measured=3, allowed=2, mend="do better")


def breaks(subject):
    raise RuntimeError("on the\n floor")


def says_fail(subject):
    return failed("at once", mend="later")


def says_not_run(subject):
    return not_run("no oracle")


def says_absent(subject):
    return absent("no use")


def plugin_with(*names):
    @hookimpl
    def dsi_register_checks(register):
        for name in names:
            register(Check(name=name.replace("_", "-"), impl=f"{__name__}:{name}"))

    return SimpleNamespace(DSI_API=(1, 0), dsi_register_checks=dsi_register_checks)


def registry_with(*names):
    return Registry.from_plugins({"acme": plugin_with(*names), "kit": kit, "llama": llama_plugin})


def test_anyone_brings_checks():
    names = ("says_pass", "says_no", "breaks", "says_fail", "says_not_run", "says_absent")
    full = [f"acme:{name.replace('_', '-')}" for name in names]
    report = run(registry=registry_with(*names), only=("applies", *full))
    # dsi's own come first
    assert [one.check for one in report.rows] == ["applies", *full[:-1]]
    assert [one.status for one in report.rows] == ["pass", "pass", "fail", "fail", "fail", "not-run"]
    assert report.row("acme:says-pass").what == "saw llama"
    assert report.row("acme:says-no").mend == "do better"
    assert report.row("acme:breaks").what == "raised RuntimeError: on the floor"
    assert dict(report.absent) == {"acme:says-absent": "no use"}


def test_without_checks_there_is_an_error_not_a_green_report():
    with pytest.raises(PluginError, match="nothing to check with: the plugin kit is not installed"):
        conformance(LLAMA, llama_config, registry=Registry.from_plugins({"llama": llama_plugin}))


def test_the_disabled_kit_is_named():
    registry = Registry.load({"DSI_DISABLE_PLUGINS": "kit"})
    with pytest.raises(PluginError, match="the plugin kit is disabled: DSI_DISABLE_PLUGINS names it"):
        conformance("llama:llama", llama_config, registry=registry)


def test_every_check_is_there():
    for name, module in CHECKS.items():
        function = getattr(importlib.import_module(f"dsi.testing.checks.{module}"), name)
        assert function.__doc__


# --- its parts --------------------------------------------------------------------------------------------------------


def test_hostile_weights_leave_nothing_neutral():
    model = torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
    make_hostile_(model, seed=0, norms=[(model[2], "eps")])
    assert all(parameter.abs().min() > 0 for parameter in model.parameters())
    assert (model[2].weight - 1).abs().min() > 0
    assert model[2].eps > 1e-3
    assert 0.2 < model[1].weight.std() * 6**0.5 < 2


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        (torch.ones(2), torch.ones(2), 0.0),
        (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.25),
        (torch.tensor([float("nan")]), torch.ones(1), float("inf")),
        # where stock has none either, it is no difference
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), 0.0),
        (torch.ones(2), torch.ones(3), float("inf")),
        (torch.ones(2).double(), torch.ones(2), float("inf")),
        ((torch.ones(2),), (torch.ones(2), torch.ones(2)), float("inf")),
    ],
)
def test_distances(found, wanted, said):
    assert distance(found, wanted)[0] == said


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_layers_are_called_with_can_be_given_again(family):
    # the capture itself needs CUDA; what it is made of does not
    whole, config = SUBJECTS[family]
    subject = Subject(whole(), config)
    model = subject.twins().model
    one, other = (recorded(model, subject.inputs(2, 6, seed=seed), subject) for seed in (0, 1))
    for layer, call in one.items():
        static = call.copy()
        wanted = other[layer].on(layer)
        assert distance(static.on(layer), wanted)[0] > 0
        static.fill_(other[layer])
        assert distance(static.on(layer), wanted)[0] == 0
    assert len(one) == 2


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table(capsys):
    assert main(["check", "llama:llama", "--only", "applies", "--only", "numerics_fp32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama:llama on LlamaForCausalLM"
    assert lines[-1] == "2 checks: 2 pass"


def test_the_command_prints_json(capsys):
    assert main(["check", "clip:clip", "--json", "--only", "numerics_fp32"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "CLIPModel"
    assert report["ok"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["llama:llama", "--only", "quantized", "--only", "applies"], 0, "1 not-run (no quantizer is registered)"),
        (["llama:llama", "--only", "quantized", "--only", "applies", "--require", "all"], 1, "1 fail"),
        (["llama:lama"], 2, "did you mean llama:llama?"),
        (["llama:llama", "--only", "nothing"], 2, "only: no check nothing"),
        (["llama:llama", "--require", "some"], 2, "invalid choice"),
    ],
)
def test_exit_codes(arguments, code, said, capsys):
    assert main(["check", *arguments]) == code
    output = capsys.readouterr()
    assert said in output.out + output.err


@pytest.mark.parametrize("name", sorted(Registry.load().policies))
def test_a_tiny_config_is_guessed_for_every_policy(name):
    if name in ("flux:flux", "sd3:sd3"):
        # several models of several configs hold such layers: the plugin's own tests bring theirs
        with pytest.raises(ConfigError, match="write a test"):
            tiny_config(Registry.load().policies[name])
        return
    guessed = tiny_config(Registry.load().policies[name])
    if isinstance(guessed, dict):
        assert guessed["block_out_channels"] == (16, 32)
        return
    config = guessed.get_text_config()
    assert config.num_hidden_layers == 2
    assert config.num_attention_heads == 8
