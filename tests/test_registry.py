"""Plugins and the choice: what is wrong with a plugin is named and harms nobody else; no order decides anything."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import attrs
import pytest

from dsi.errors import AmbiguousPolicyError, PluginError, UnknownPolicyError
from dsi.policy import (
    API_VERSION,
    Block,
    Check,
    Config,
    Const,
    Container,
    Linear,
    Policy,
    Quantizer,
    Refusal,
    hookimpl,
)
from dsi.registry import Choice, Registry
from tests.support.site import forget_modules, put_distribution

LAYER = "some.models:Layer"
OTHER = "some.models:OtherLayer"

GOOD = """
    from dsi.policy import Block, Policy, hookimpl
    DSI_API = (1, 0)

    @hookimpl
    def dsi_register_policies(register):
        register(Policy(name="main", blocks=[Block(layer="some.models:Layer", container="c:C", slots={})]))
"""


def policy(name="main", layers=(LAYER,), **more):
    return Policy(name=name, blocks=[Block(layer=layer, container="c:C", slots={}) for layer in layers], **more)


def plugin(*policies, **more):
    """A plugin object that registers `policies`."""

    class Plugin:
        DSI_API = API_VERSION

        @hookimpl
        def dsi_register_policies(self, register):
            for one in policies:
                register(one)

    made = Plugin()
    for name, value in more.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs a distribution: its metadata and its modules, in a folder on sys.path."""
    before = set(sys.modules)

    def put(distribution, modules, points=None, version="1.0", folder="site"):
        site = put_distribution(tmp_path / folder, distribution, modules, points, version)
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(str(site))
        return site

    yield put
    forget_modules(tmp_path, before)


def load(**environ):
    return Registry.load(environ)


def record(registry, name, state=None):
    found = [one for one in registry.records if one.name == name and state in (None, one.state)]
    assert len(found) == 1, registry.records
    return found[0]


# --- loading ------------------------------------------------------------------------------------------------------


def test_a_plugin_is_loaded_with_everything_it_registers(install):
    install(
        "acme-dsi",
        {
            "acme": """
            from dsi.policy import *
            from dsi.policy import hookimpl, Block, Check, Container, Policy, Quantizer
            DSI_API = (1, 0)

            @hookimpl
            def dsi_register_policies(register, api):
                assert api >= DSI_API
                register(Policy(name="p", blocks=[Block(layer="some.models:Layer", container="acme:c", slots={})]))

            @hookimpl
            def dsi_register_containers(register):
                register(Container(name="c", impl="acme.c:C"))

            @hookimpl
            def dsi_register_quantizers(register):
                register(Quantizer(name="q", impl="acme.q:Q", bits=4.5))

            @hookimpl
            def dsi_register_checks(register):
                register(Check(name="k", impl="acme.k:k"))
            """
        },
        version="2.1",
    )
    registry = load()
    found = record(registry, "acme")
    assert (found.distribution, found.version, found.state, found.reason) == ("acme-dsi", "2.1", "loaded", "")
    assert found.policies == ("acme:p",)
    assert found.containers == ("acme:c",)
    assert found.quantizers == ("acme:q",)
    assert found.checks == ("acme:k",)
    assert found.hooks == tuple(f"dsi_register_{kind}" for kind in ("policies", "containers", "quantizers", "checks"))
    assert registry.policies["acme:p"].name == "p"
    assert registry.containers["acme:c"] == Container(name="c", impl="acme.c:C")
    assert registry.quantizers["acme:q"].bits == 4.5
    assert registry.checks["acme:k"] == Check(name="k", impl="acme.k:k")


BROKEN = {
    "import": ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
    "syntax": ("def broken(:", "SyntaxError: "),
    "exit": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "quiet_exit": ("raise SystemExit", "SystemExit"),
    "raise": ("raise ValueError('two\\nlines')", "ValueError: two lines"),
    "no_api": (GOOD.replace("DSI_API = (1, 0)", ""), f"add the line DSI_API = {API_VERSION}"),
    "bad_api": (GOOD.replace("(1, 0)", "'1.0'"), f"DSI_API is '1.0'; write DSI_API = {API_VERSION}"),
    "bool_api": (GOOD.replace("(1, 0)", "(True, 0)"), "DSI_API is (True, 0)"),
    "short_api": (GOOD.replace("(1, 0)", "(1,)"), "DSI_API is (1,)"),
    "no_hooks": ("DSI_API = (1, 0)", "it implements no hook; mark one of dsi_register_policies"),
    "wrapper": (
        GOOD.replace("@hookimpl", "@hookimpl(wrapper=True)").replace("def dsi", "def dsi")
        + "\n        return (yield)\n",
        "dsi_register_policies is a wrapper",
    ),
    "old_wrapper": (
        GOOD.replace("@hookimpl", "@hookimpl(hookwrapper=True)") + "\n        yield\n",
        "dsi_register_policies is a wrapper",
    ),
    "misspelt": (GOOD.replace("def dsi_register_policies", "def dsi_register_polices"),
                 "dsi_register_polices is no hook; did you mean dsi_register_policies?"),
    "unmarked": (GOOD + "\n    def dsi_register_checks(register):\n        pass\n",
                 "dsi_register_checks would never be called; mark it with @hookimpl"),
    "unmarked_misspelt": (GOOD + "\n    def dsi_register_chekcs(register):\n        pass\n",
                          "dsi_register_chekcs would never be called"),
    "default": (GOOD.replace("(register)", "(register, api=None)", 1),
                "api has a default and would never be passed"),
    "argument": (GOOD.replace("(register)", "(register, model)", 1), "model"),
    "wrong_type": (GOOD + "        register({'name': 'x'})\n",
                   "it registered a dict where a dsi.policy.Policy belongs"),
    "swallowed": (
        GOOD + "        try:\n            register(3)\n        except Exception:\n            pass\n",
        "it registered a int where a dsi.policy.Policy belongs",
    ),
    "wrong_kind": (GOOD.replace("register_policies", "register_checks"),
                   "it registered a Policy where a dsi.policy.Check belongs"),
    "twice": (GOOD + "        register(Policy(name='main', blocks=[Block(layer='m:L', container='c:C', slots={})]))\n",
              "it registered two Policy of the name 'main'"),
    "hook_raises": (GOOD + "        raise RuntimeError('no')\n", "RuntimeError: no"),
    "hook_exits": (GOOD + "        raise SystemExit(2)\n", "SystemExit: 2"),
    "name": (GOOD.replace("name=\"main\"", "name=\"a:b\""), "'a:b' is no name"),
    "no_name": (GOOD.replace("name=\"main\"", "name=3"), "3 is no name"),
    "requires": (GOOD.replace("name=\"main\"", "name=\"main\", requires=('torch >== 2',)"),
                 "'torch >== 2' is no PEP 508 requirement"),
    "requires_url": (GOOD.replace("name=\"main\"", "name=\"main\", requires=('torch @ https://x.y/z',)"),
                     "has an address, which cannot be checked"),
    "replaces": (GOOD.replace("name=\"main\"", "name=\"main\", replaces='a:b'"), "write ('a:b',)"),
    "priority": (GOOD.replace("name=\"main\"", "name=\"main\", priority=1.5"), "priority is 1.5; use an int"),
    "supports": (GOOD.replace("name=\"main\"", "name=\"main\", supports=None"), "supports is None; use a function"),
    "blocks": (GOOD.replace("[Block(", "[Block(layer='some.models:Layer', container='c:C', slots={}), Block("),
               "two blocks for some.models:Layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_harms_nobody(install, case):
    source, reason = BROKEN[case]
    install("rotten", {f"rotten_{case}": source})
    install("acme", {"acme": GOOD}, folder="other")
    registry = load()
    found = record(registry, f"rotten_{case}")
    assert (found.state, found.distribution) == ("broken", "rotten")
    assert reason in found.why
    assert found.mend
    assert "\n" not in found.why
    assert found.policies == ()
    assert record(registry, "acme").state == "loaded"
    assert [name for name in registry.policies if name.startswith(("rotten", "acme"))] == ["acme:main"]


def test_what_a_broken_plugin_registered_before_it_broke_is_gone():
    def containers(register):
        register(Container(name="c", impl="a:b"))
        register("no container")

    broken = plugin(policy(), dsi_register_containers=hookimpl(containers))
    registry = Registry.from_plugins({"broken": broken, "good": plugin(policy())})
    assert registry.records[0].state == "broken"
    assert set(registry.policies) == {"good:main"}
    assert not registry.containers


def test_registering_after_the_hook_returned_is_an_error():
    kept = []

    def policies(register):
        kept.append(register)
        register(policy())

    registry = Registry.from_plugins(
        {"late": SimpleNamespace(DSI_API=(1, 0), dsi_register_policies=hookimpl(policies))}
    )
    with pytest.raises(PluginError, match="after its hook had returned"):
        kept[0](policy("another"))
    assert set(registry.policies) == {"late:main"}


def test_an_interrupt_is_not_caught(install):
    install("acme", {"interrupted": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        load()


@pytest.mark.parametrize(
    ("api", "advice"),
    [
        ((API_VERSION[0], API_VERSION[1] + 1), "upgrade dsi"),
        ((API_VERSION[0] + 1, 0), "upgrade dsi"),
        ((API_VERSION[0] - 1, 9), "upgrade the plugin"),
    ],
    ids=["minor", "major", "older"],
)
def test_another_api_is_incompatible(install, api, advice):
    install("acme", {"acme": GOOD.replace("(1, 0)", str(api))})
    found = record(load(), "acme")
    assert found.state == "incompatible"
    assert found.why == f"it needs plugin API {api}, and dsi has {API_VERSION}; {advice}"


def test_an_entry_point_may_name_an_object(install):
    source = GOOD.replace(
        "    @hookimpl", "    class P:\n        DSI_API = (1, 0)\n        @staticmethod\n        @hookimpl"
    )
    source = (
        textwrap.dedent(source).replace("\ndef dsi", "\n    def dsi").replace("\n    register(", "\n        register(")
    )
    install("acme", {"acme_module": source}, points={"acme": "acme_module:P", "gone": "acme_module:Q"})
    registry = load()
    assert record(registry, "acme").policies == ("acme:main",)
    assert record(registry, "gone").state == "broken"
    assert "AttributeError" in record(registry, "gone").reason


@pytest.mark.parametrize("name", ["a:b", "a,b", "a b"])
def test_a_name_that_cannot_be_written_is_broken(name):
    registry = Registry.from_plugins({name: plugin(policy())})
    assert registry.records[0].state == "broken"
    assert registry.records[0].mend == "rename the entry point"


def test_the_order_is_by_distribution_and_name(install):
    install("zeta", {"b_zeta": GOOD, "a_zeta": GOOD})
    install("alpha", {"z_alpha": GOOD}, folder="last")
    names = [one.name for one in load().records if one.distribution in ("alpha", "zeta")]
    assert names == ["z_alpha", "a_zeta", "b_zeta"]


def test_the_second_plugin_of_a_name_is_a_duplicate(install):
    install("alpha", {"alpha_module": GOOD}, points={"acme": "alpha_module"})
    install("beta", {"beta_module": GOOD}, points={"acme": "beta_module"}, folder="b")
    registry = load()
    assert record(registry, "acme", "loaded").distribution == "alpha"
    second = record(registry, "acme", "duplicate")
    assert second.distribution == "beta"
    assert second.why == "the name belongs to alpha 1.0; rename one entry point or uninstall one"
    assert "beta_module" not in sys.modules


def test_a_name_twice_in_one_distribution_is_a_duplicate(install):
    install("alpha", {"one": GOOD, "two": GOOD}, points=[("acme", "one"), ("acme", "two")])
    registry = load()
    assert {one.state for one in registry.records if one.name == "acme"} == {"loaded", "duplicate"}


def test_nobody_takes_the_name_of_a_built_in_by_sorting_before_it():
    if not any(one.distribution == "dsi" for one in load().records):
        pytest.skip("dsi is not installed: its own policies are found through its entry points")
    ours = next(one for one in load().records if one.distribution == "dsi")
    assert "aaa" < "dsi"
    assert load().records[0] == ours


def test_a_built_in_keeps_its_name(install):
    ours = next((one for one in load().records if one.distribution == "dsi"), None)
    if ours is None:
        pytest.skip("dsi is not installed: its own policies are found through its entry points")
    install("aaa", {"aaa_module": GOOD}, points={ours.name: "aaa_module"})
    registry = load()
    assert record(registry, ours.name, "loaded").distribution == "dsi"
    assert record(registry, ours.name, "duplicate").distribution == "aaa"


@pytest.mark.parametrize("versions", [("1.0", "2.0"), ("2.0", "1.0")], ids=str)
def test_two_installations_of_one_distribution_are_warned_of(install, versions):
    install("acme", {"acme": GOOD}, version=versions[0], folder="first")
    install("acme", {"acme": GOOD}, version=versions[1], folder="second")
    registry = load()
    found = record(registry, "acme", "loaded")
    # the folder put on the path last comes first
    assert found.version == versions[1]
    assert re.match(rf"acme is installed 2 times \({versions[1]} in .*second, {versions[0]} in .*first\)", found.reason)
    assert found.mend == "uninstall the others"
    assert record(registry, "acme", "duplicate").version == versions[0]


def test_a_stale_installation_that_hides_a_plugin_is_named(install):
    """vllm#43987: the installation in effect has no entry point, so nobody ever heard of the plugin."""
    install("acme", {"acme": GOOD}, version="2.0", folder="new")
    install("acme", {}, version="1.0", folder="stale")
    found = record(load(), "acme")
    assert (found.state, found.version) == ("broken", "2.0")
    assert "Python uses the first" in found.reason


def test_one_folder_twice_on_the_path_is_one_installation(install, monkeypatch):
    site = install("acme", {"acme": GOOD})
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    assert record(load(), "acme").reason == ""


def test_metadata_that_cannot_be_read_is_named(install, tmp_path):
    site = install("acme", {"acme": GOOD})
    bad = site / "bad-1.0.dist-info"
    bad.mkdir()
    (bad / "entry_points.txt").write_bytes(b"[dsi]\nbad = \xff\xfe\n")
    nameless = site / "nameless-1.0.dist-info"
    nameless.mkdir()
    (nameless / "entry_points.txt").write_text("[dsi]\nx = y\n")
    registry = load()
    assert record(registry, "acme").state == "loaded"
    reasons = [record(registry, folder.name, "broken").reason for folder in (bad, nameless)]
    assert reasons[0].startswith(f"{bad}: UnicodeDecodeError")
    assert "no name or version" in reasons[1]


# --- the environment ----------------------------------------------------------------------------------------------


@pytest.fixture
def three(install):
    install("acme", {"acme_a": GOOD, "acme_b": GOOD, "acme_c": "raise SystemExit"})


@pytest.mark.parametrize(
    ("environ", "states", "reason"),
    [
        ({"DSI_DISABLE_PLUGINS": "acme_a, acme_c"}, "disabled loaded disabled", "DSI_DISABLE_PLUGINS names it"),
        ({"DSI_PLUGINS": "acme_b"}, "disabled loaded disabled", "DSI_PLUGINS does not name it"),
        ({"DSI_PLUGINS": ""}, "disabled disabled disabled", "DSI_PLUGINS does not name it"),
        ({"DSI_PLUGINS": "acme_a,acme_b", "DSI_DISABLE_PLUGINS": "acme_a"}, "disabled loaded disabled",
         "DSI_DISABLE_PLUGINS names it"),
        ({"DSI_DISABLE_PLUGINS": ""}, "loaded loaded broken", ""),
    ],
    ids=str,
)  # fmt: skip
def test_the_environment_chooses(three, environ, states, reason):
    registry = load(**environ)
    found = [record(registry, f"acme_{letter}") for letter in "abc"]
    assert [one.state for one in found] == states.split()
    assert found[0].reason.startswith(reason)


def test_a_disabled_plugin_is_not_imported(three):
    load(DSI_DISABLE_PLUGINS="acme_a,acme_b,acme_c")
    assert not {"acme_a", "acme_b", "acme_c"} & set(sys.modules)
    load(DSI_PLUGINS="acme_a")
    assert "acme_a" in sys.modules
    assert "acme_b" not in sys.modules


@pytest.mark.parametrize("variable", ["DSI_PLUGINS", "DSI_DISABLE_PLUGINS"])
def test_a_name_that_matches_nothing_is_unknown(three, variable):
    found = record(load(**{variable: "acme_a,acme_x"}), "acme_x")
    assert (found.state, found.distribution, found.version) == ("unknown", "", "")
    assert found.reason.startswith(f"{variable} names it, and it is not installed; did you mean acme_")


@pytest.mark.parametrize("value", ["1", "true"])
def test_strict_raises_with_every_plugin_that_is_wrong(install, value):
    install("acme", {"acme": GOOD, "rotten": "import not_there", "newer": GOOD.replace("(1, 0)", "(1, 9)")})
    with pytest.raises(PluginError) as caught:
        load(DSI_STRICT_PLUGINS=value, DSI_DISABLE_PLUGINS="typo")
    text = str(caught.value)
    assert "plugin rotten (acme 1.0) is broken: ModuleNotFoundError" in text
    assert "plugin newer (acme 1.0) is incompatible" in text
    assert "plugin typo (- -) is unknown" in text
    assert "plugin acme " not in text
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("value", ["", "0"])
def test_strict_is_off(install, value):
    install("acme", {"rotten": "import not_there"})
    assert record(load(DSI_STRICT_PLUGINS=value), "rotten").state == "broken"


def test_strict_does_not_mind_what_is_disabled(three):
    load(DSI_STRICT_PLUGINS="1", DSI_DISABLE_PLUGINS="acme_c")


def test_strict_from_plugins():
    with pytest.raises(PluginError, match=r"plugin bad .* is broken"):
        Registry.from_plugins({"bad": SimpleNamespace()}, strict=True)


# --- the registry -------------------------------------------------------------------------------------------------


def test_registries_never_meet():
    one, other = Registry.from_plugins({"a": plugin(policy())}), Registry.from_plugins({"b": plugin(policy())})
    assert set(one.policies) == {"a:main"}
    assert set(other.policies) == {"b:main"}


def test_a_plugin_loads_again_in_the_same_process():
    made = plugin(policy())
    assert Registry.from_plugins({"a": made}).digest() == Registry.from_plugins({"a": made}).digest()


def test_a_module_is_a_plugin():
    module = ModuleType("made")
    exec(textwrap.dedent(GOOD), module.__dict__)  # noqa: S102 - a module without a file
    assert set(Registry.from_plugins({"made": module}).policies) == {"made:main"}


def test_what_is_registered_is_read_only():
    registry = Registry.from_plugins({"a": plugin(policy())})
    with pytest.raises(TypeError):
        registry.policies["b:x"] = policy()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        registry.records = ()


def test_blocks_for_one_class():
    registry = Registry.from_plugins({"b": plugin(policy()), "a": plugin(policy(layers=(OTHER, LAYER)))})
    assert [(name, block.layer) for name, _, block in registry.blocks_for(LAYER)] == [
        ("a:main", LAYER),
        ("b:main", LAYER),
    ]
    assert [name for name, _, _ in registry.blocks_for(OTHER)] == ["a:main"]
    assert registry.blocks_for("no:Such") == []


# --- choice -------------------------------------------------------------------------------------------------------


def registry_of(built_in=(), **policies):
    """One plugin "x" per keyword, with one policy "x:main" that has what the keyword says."""
    plugins = {name: plugin(policy(**more)) for name, more in policies.items()}
    return Registry.from_plugins(plugins, distributions=dict.fromkeys(built_in, "dsi"), strict=True)


def chosen(registry, config=None, explicit=None, layer=LAYER):
    """(the full name chosen, {rejected: (stage, reason, hint)})"""
    choice = registry.choose(layer, config, explicit)
    return choice.full_name, {one.full_name: (one.stage, one.reason, one.hint) for one in choice.rejected}


def test_one_candidate_is_chosen():
    registry = registry_of(a={})
    choice = registry.choose(LAYER, None)
    assert choice.policy is registry.policies["a:main"]
    assert choice.block is choice.policy.blocks[0]
    assert (choice.full_name, choice.rejected) == ("a:main", ())


def test_no_candidate():
    assert registry_of(a={}).choose(OTHER, None) == Choice()


def test_the_block_is_the_one_of_the_class():
    registry = registry_of(a={"layers": (OTHER, LAYER)})
    assert registry.choose(LAYER, None).block.layer == LAYER
    assert registry.choose(OTHER, None).block.layer == OTHER


def test_a_tie_is_an_error_with_the_line_that_settles_it():
    with pytest.raises(AmbiguousPolicyError, match=r"a:main, b:main all apply with priority 0") as caught:
        registry_of(b={}, a={}).choose(LAYER, None)
    assert str(caught.value).startswith(LAYER)
    assert 'settle it with injection_policy="a:main" or injection_policy="b:main"' in str(caught.value)


def test_order_of_loading_decides_nothing():
    for names in (("a", "b"), ("b", "a")):
        registry = registry_of(**{name: {"priority": 1 if name == "b" else 0} for name in names})
        assert chosen(registry)[0] == "b:main"


def test_a_higher_priority_wins():
    name, rejected = chosen(registry_of(a={}, b={"priority": 2}, c={"priority": 1}))
    assert name == "b:main"
    assert rejected == {
        "a:main": ("priority", "priority 0 is below 2 of b:main", ""),
        "c:main": ("priority", "priority 1 is below 2 of b:main", ""),
    }


def test_the_loser_of_a_tie_below_the_top_does_not_matter():
    assert chosen(registry_of(a={}, b={}, c={"priority": 1}))[0] == "c:main"


# explicit


@pytest.mark.parametrize("as_object", [False, True])
def test_explicit_beats_priority(as_object):
    registry = registry_of(a={}, b={"priority": 9}, c={"replaces": ("a:main",)})
    explicit = registry.policies["a:main"] if as_object else "a:main"
    name, rejected = chosen(registry, explicit=explicit)
    assert name == "a:main"
    assert rejected["b:main"] == ("explicit", "injection_policy asks for a:main", "")
    assert rejected["c:main"][0] == "explicit"


def test_an_explicit_policy_need_not_be_registered():
    mine = policy("mine")
    choice = registry_of(a={}).choose(LAYER, None, mine)
    assert choice.policy is mine
    assert choice.full_name == "<given>:mine"
    assert [one.stage for one in choice.rejected] == ["explicit"]


def test_an_equal_policy_of_another_plugin_is_not_the_explicit_one():
    registry = registry_of(a={}, b={})
    assert registry.choose(LAYER, None, registry.policies["b:main"]).full_name == "b:main"


@pytest.mark.parametrize("explicit", ["a:main", policy("mine", layers=(OTHER,))], ids=["name", "object"])
def test_an_explicit_policy_without_a_block_gives_none(explicit):
    registry = registry_of(a={"layers": (OTHER,)}, b={})
    choice = registry.choose(LAYER, None, explicit)
    assert (choice.policy, choice.block, choice.full_name) == (None, None, "")
    assert [(one.full_name, one.stage) for one in choice.rejected] == [("b:main", "explicit")]


def test_an_explicit_policy_is_refused_like_any_other():
    registry = registry_of(a={"supports": lambda config: Refusal(reason="no", hint="h")}, b={})
    name, rejected = chosen(registry, explicit="a:main")
    assert name == ""
    assert rejected["a:main"] == ("supports", "no", "h")


def test_an_unknown_policy_is_named_with_what_there_is():
    with pytest.raises(
        UnknownPolicyError, match=r"no policy 'a:mian'; did you mean a:main\?; registered are: a:main, b:main"
    ):
        registry_of(a={}, b={}).choose(LAYER, None, "a:mian")


def test_an_unknown_policy_where_there_is_none():
    with pytest.raises(UnknownPolicyError, match="registered are: none"):
        Registry.from_plugins({}).resolve("a:b")


def test_an_unknown_policy_of_a_plugin_that_did_not_load_says_why():
    registry = Registry.from_plugins({"acme": SimpleNamespace()})
    with pytest.raises(UnknownPolicyError, match=r"no policy 'acme:x': the plugin acme is broken: .*DSI_API"):
        registry.resolve("acme:x")


def test_resolve():
    registry = registry_of(a={})
    assert registry.resolve(None) == (None, "")
    assert registry.resolve("a:main") == (registry.policies["a:main"], "a:main")


# requires


@pytest.mark.parametrize(
    ("requirement", "reason"),
    [
        ("attrs>=999", r"attrs>=999 is unmet by \d+"),
        ("no-such-distribution-xyz", "no-such-distribution-xyz is not installed"),
        ("attrs>=1,<2", "attrs>=1,<2 is unmet by"),
    ],
)
def test_an_unmet_requirement_is_out(requirement, reason):
    name, rejected = chosen(registry_of(a={"requires": ("pluggy", requirement), "priority": 5}, b={}))
    assert name == "b:main"
    stage, why, hint = rejected["a:main"]
    assert stage == "requires"
    assert re.match(reason, why)
    assert hint == f"pip install {requirement!r}"


@pytest.mark.parametrize(
    "requirement", ["attrs", "attrs>=20", "nothing; python_version < '3'", "Attrs >= 20", "attrs[x]"]
)
def test_a_requirement_that_is_met(requirement):
    assert chosen(registry_of(a={"requires": (requirement,)}))[0] == "a:main"


def test_a_development_version_meets_a_requirement(install):
    install("devel", {}, points={}, version="2.0.dev1")
    assert chosen(registry_of(a={"requires": ("devel>=1.5",)}))[0] == "a:main"


def test_a_requirement_is_checked_without_an_import(install):
    install("heavy", {"heavy": "raise SystemExit('imported')"}, points={})
    assert chosen(registry_of(a={"requires": ("heavy>=1",)}))[0] == "a:main"
    assert "heavy" not in sys.modules


# supports


@attrs.frozen
class ModelConfig:
    hidden_act: str = "gelu"


def raises(error):
    def supports(config):
        raise error

    return supports


@pytest.mark.parametrize(
    ("supports", "reason"),
    [
        (lambda config: Refusal(reason=f"hidden_act={config.hidden_act!r} is not implemented"),
         "hidden_act='gelu' is not implemented"),
        (lambda config: config.rope_theta, "config has no attribute 'rope_theta'"),
        (lambda config: config.hidden_act.nope, "supports() raised AttributeError: 'str' object has no attribute"),
        (raises(AttributeError("by hand")), "supports() raised AttributeError: by hand"),
        (raises(KeyError("x")), "supports() raised KeyError: 'x'"),
        (lambda config: True, "supports() returned True, which is no Refusal and not None"),
        (lambda: None, "supports() raised TypeError"),
    ],
)  # fmt: skip
def test_a_refusal_is_out_with_its_reason(supports, reason):
    name, rejected = chosen(registry_of(a={"supports": supports, "priority": 3}, b={}), ModelConfig())
    assert name == "b:main"
    assert rejected["a:main"][0] == "supports"
    assert rejected["a:main"][1].startswith(reason)


def test_the_hint_of_a_refusal_is_kept():
    refusal = Refusal(reason="no", hint="use another")
    assert chosen(registry_of(a={"supports": lambda config: refusal}))[1] == {
        "a:main": ("supports", "no", "use another")
    }


def test_supports_is_not_asked_where_a_requirement_is_unmet():
    registry = registry_of(a={"requires": ("no-such-thing",), "supports": raises(RuntimeError("asked"))})
    assert chosen(registry)[1]["a:main"][0] == "requires"


def test_a_model_without_config_is_refused_by_the_attribute():
    registry = registry_of(a={"supports": lambda config: config.hidden_act})
    assert chosen(registry)[1]["a:main"][1] == "config has no attribute 'hidden_act'"


# replaces and built-ins


def test_a_policy_replaces_a_built_in_and_it_is_logged_once(caplog):
    registry = registry_of(("llama",), llama={"priority": 7}, acme={"replaces": ("llama:main",)})
    with caplog.at_level(logging.WARNING, logger="dsi"):
        for _ in range(3):
            name, rejected = chosen(registry)
    assert name == "acme:main"
    assert rejected == {"llama:main": ("replaces", "replaced by acme:main", "")}
    assert [one.getMessage() for one in caplog.records] == ["the built-in policy llama:main is replaced by acme:main"]
    assert caplog.records[0].levelno == logging.WARNING


def test_replacing_another_plugins_policy_is_not_logged(caplog):
    with caplog.at_level(logging.WARNING, logger="dsi"):
        assert chosen(registry_of(a={}, b={"replaces": ("a:main",)}))[0] == "b:main"
    assert not caplog.records


def test_a_policy_that_is_out_replaces_nothing():
    registry = registry_of(
        ("llama",), llama={}, acme={"replaces": ("llama:main",), "supports": lambda config: Refusal(reason="no")}
    )
    assert chosen(registry)[0] == "llama:main"


def test_outranking_a_built_in_needs_replaces():
    name, rejected = chosen(registry_of(("llama",), llama={"priority": 1}, acme={"priority": 2}))
    assert name == "llama:main"
    assert rejected["acme:main"] == (
        "priority",
        "priority 2 does not outrank the built-in llama:main by itself",
        'add replaces=("llama:main",) to the policy',
    )


def test_outranking_one_built_in_that_another_replaced_needs_nothing():
    registry = registry_of(
        ("llama",), llama={}, acme={"replaces": ("llama:main",), "priority": 1}, best={"priority": 2}
    )
    assert chosen(registry)[0] == "best:main"


def test_a_built_in_outranks_a_built_in():
    assert chosen(registry_of(("a", "b"), a={}, b={"priority": 1}))[0] == "b:main"


def test_a_plugin_below_a_built_in_just_loses():
    name, rejected = chosen(registry_of(("llama",), llama={}, acme={"priority": -1}))
    assert name == "llama:main"
    assert rejected["acme:main"][1] == "priority -1 is below 0 of llama:main"


def test_a_plugin_level_with_a_built_in_is_a_tie():
    with pytest.raises(AmbiguousPolicyError, match="acme:main, llama:main all apply"):
        registry_of(("llama",), llama={}, acme={}).choose(LAYER, None)


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_policies_that_replace_one_another_are_an_error(names):
    circle = {name: {"replaces": (f"{names[i - 1]}:main",)} for i, name in enumerate(names)}
    with pytest.raises(AmbiguousPolicyError, match="replace one another; settle it with"):
        registry_of(**circle).choose(LAYER, None)


def test_a_policy_that_replaces_itself_is_still_there():
    assert chosen(registry_of(a={"replaces": ("a:main",)}))[0] == "a:main"


# --- digest -------------------------------------------------------------------------------------------------------


def refuses(config):
    return None


def test_the_digest_is_that_of_what_is_there():
    base = {"a": {"priority": 1}}
    digest = registry_of(**base).digest()
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert registry_of(**base).digest() == digest
    others = [
        {"a": {}},
        {"b": {"priority": 1}},
        {"a": {"priority": 1, "supports": refuses}},
        {"a": {"priority": 1, "layers": (OTHER,)}},
        {"a": {"priority": 1, "requires": ("attrs",)}},
        {**base, "b": {}},
    ]
    for other in others:
        assert registry_of(**other).digest() != digest, other
    assert registry_of(("a",), **base).digest() != digest


@pytest.mark.parametrize("kind", ["containers", "quantizers", "checks"])
def test_the_digest_has_every_kind(kind):
    item = {"containers": Container, "checks": Check, "quantizers": Quantizer}[kind]
    more = {"bits": 4.0} if kind == "quantizers" else {}

    def registry(impl):
        hook = hookimpl(lambda register: register(item(name="n", impl=impl, **more)))
        return Registry.from_plugins(
            {"a": SimpleNamespace(DSI_API=(1, 0), **{f"dsi_register_{kind}": hook})}, strict=True
        )

    assert registry("m:A").digest() != registry("m:B").digest()


def test_the_version_of_a_plugin_is_in_the_digest(install):
    site = install("acme", {"acme": GOOD}, version="1.0")
    before = load().digest()
    (site / "acme-1.0.dist-info").rename(site / "acme-1.1.dist-info")
    metadata = site / "acme-1.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    assert record(load(), "acme").version == "1.1"
    assert load().digest() != before


DIGEST = """
from dsi.policy import Block, Call, Config, Const, Linear, Policy, hookimpl
from dsi.registry import Registry

class Thing:
    pass

class P:
    DSI_API = (1, 0)
    @staticmethod
    @hookimpl
    def dsi_register_policies(register):
        call = Call(free={"a", "b", "c", "d", "e"})
        register(Policy(name="x", supports=lambda config: None, blocks=[Block(layer="m:L", container="c:C", call=call,
            slots={"q": Linear("q"), "a": Linear("a")}, facts={"h": Config("heads"), "o": Const(Thing())})]))

print(Registry.from_plugins({"p": P}, strict=True).digest())
"""


def test_the_digest_is_the_same_in_every_process():
    """Neither addresses nor the order of sets are in it."""
    root = Path(__file__).resolve().parent.parent
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            cwd=root,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1


def test_facts_and_slots_are_in_the_digest():
    def digest(**block):
        one = Policy(name="x", blocks=[Block(layer=LAYER, container="c:C", **{"slots": {}, **block})])
        return Registry.from_plugins({"a": plugin(one)}, strict=True).digest()

    found = {
        digest(),
        digest(slots={"q": Linear("q")}),
        digest(slots={"q": Linear("k")}),
        digest(facts={"h": Config("h")}),
        digest(facts={"h": Const("h")}),
        digest(facts={"h": Const(("h",))}),
        # the same fields in another class
        digest(facts={"h": Const(Container(name="n", impl="i"))}),
        digest(facts={"h": Const(Check(name="n", impl="i"))}),
    }
    assert len(found) == 8


# --- classes that belong to no architecture ---------------------------------------------------------------------------


def held_by(*holders):
    return Policy(name="main", blocks=[Block(layer=LAYER, container="c:C", slots={}, inside=holders)])


def test_blocks_of_one_class_in_different_holders_never_meet():
    ones = {"acme": held_by("a:A"), "bold": held_by("b:B"), "cool": held_by("b:B", "c:C")}
    registry = Registry.from_plugins({name: plugin(one) for name, one in ones.items()})
    assert [name for name, *_ in registry.blocks_for(LAYER, "a:A")] == ["acme:main"]
    assert [name for name, *_ in registry.blocks_for(LAYER, "b:B")] == ["bold:main", "cool:main"]
    assert registry.blocks_for(LAYER, "d:D") == []
    assert len(registry.blocks_for(LAYER)) == 3
    assert registry.choose(LAYER, None, holder="a:A").full_name == "acme:main"
    with pytest.raises(AmbiguousPolicyError, match="bold:main"):
        registry.choose(LAYER, None, holder="b:B")
    # only those that may meet are warned of each other
    assert {record.name: bool(record.why) for record in registry.records} == {"acme": False, "bold": True, "cool": True}


def test_a_given_policy_heeds_its_holders_too():
    registry = Registry.from_plugins({})
    given = held_by("a:A")
    assert registry.choose(LAYER, None, given, holder="a:A").policy is given
    assert registry.choose(LAYER, None, given, holder="b:B").policy is None
