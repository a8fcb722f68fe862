"""The files of a plugin package, as text; what is not known says FILL IN."""

from __future__ import annotations

import attrs

from dsi.policy import API_VERSION

FILL = "FILL IN"


@attrs.frozen(kw_only=True)
class Names:
    """What a package calls things.

    Args:
        plugin: the entry point's name, which users write before the colon, e.g. "acme".
        distribution: what pip installs, e.g. "dsi-acme".
        package: what Python imports, e.g. "dsi_acme".
    """

    plugin: str
    distribution: str
    package: str


@attrs.frozen(kw_only=True)
class Sketch:
    """What is known of the layer; the defaults are what is to be filled in.

    Args:
        container: a class of `dsi.containers`.
        family: the module of its classes.
        layer: its class there.
        modules: what has parameters in it, a line each, for a comment.
        linears: how many of them are linear layers; 0 where that is not known.
        norm: the entries of `RMS`, the arguments of `Norm` after the path; empty for torch's LayerNorm.
        call: arguments of `Call`.
        facts: container fact -> expression.
        model: arguments of `CausalLM`, name -> expression; empty where no language model was found.
        requires: PEP 508.
    """

    container: str = "DecoderLayer"
    family: str = f"{FILL}: package.module"
    layer: str = f"{FILL}: Class"
    modules: tuple[str, ...] = ()
    linears: int = 0
    norm: tuple[tuple[str, str], ...] = ()
    call: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    model: tuple[tuple[str, str], ...] = ()
    requires: str = "transformers"


def files(names: Names, sketch: Sketch) -> dict[str, str]:
    """Path below the package's folder -> text."""
    return {
        "pyproject.toml": _PYPROJECT.format(n=names, constant=_constant(names)),
        "README.md": _README.format(n=names),
        f"{names.package}/__init__.py": policy(names, sketch),
        f"{names.package}/py.typed": "",
        "tests/test_conformance.py": _TEST.format(n=names, constant=_constant(names), cls=_camel(names)),
    }


def _constant(names: Names) -> str:
    name = names.plugin.replace("-", "_").upper()
    return name if name.isidentifier() else f"POLICY_{name}"


def _camel(names: Names) -> str:
    return "".join(part.capitalize() for part in names.plugin.split("-"))


_PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{n.distribution}"
version = "0.1.0"
description = "A dsi policy."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["dsi"]

[project.optional-dependencies]
test = ["dsi[testkit]"]

[project.entry-points.dsi]
{n.plugin} = "{n.package}"

[tool.hatch.build]
dev-mode-dirs = ["."]

[tool.hatch.build.targets.wheel]
packages = ["{n.package}"]
"""

_README = """\
# {n.distribution}

A policy for [dsi](https://pypi.org/project/dsi/): it maps the layers of one architecture to dsi's fused ones.

    pip install {n.distribution}
    dsi plugins
    dsi check {n.plugin}:{n.plugin}

To work on it: `pip install -e .[test]`, then `pytest`. The mapping is in `{n.package}/__init__.py`.
"""

_TEST = """\
\"\"\"The policy, held to dsi's conformance kit.\"\"\"

from dsi.testing import PolicyConformance, tiny_config

from {n.package} import {constant}


class Test{cls}(PolicyConformance):
    policy = {constant}

    def tiny_config(self):
        # sizes by common attribute names; write your own config where the architecture has options worth a test
        return tiny_config(self.policy)
"""


def policy(names: Names, sketch: Sketch) -> str:
    """The module with the policy and its hook."""
    constant = _constant(names)
    lines = [
        '"""Which weights of a layer go where; everything this needs is in dsi.policy."""',
        "",
        _imports(sketch),
        "",
        "# the plugin API that this was written for",
        f"DSI_API = {API_VERSION}",
        "",
        f'FAMILY = "{sketch.family}:"',
        *_rms(sketch),
        "",
        "",
        "def supports(config):",
        f'    """A Refusal for a variant that the container does not compute; {FILL} or leave it."""',
        "    return None",
        "",
        "",
        f"{constant} = Policy(",
        f'    name="{names.plugin}",',
        f'    requires=["{sketch.requires}"],',
        "    supports=supports,",
        "    blocks=[",
        "        Block(",
        f'            layer=FAMILY + "{sketch.layer}",',
        f'            container="dsi.containers:{sketch.container}",',
        *([f"            call=Call({sketch.call}),"] if sketch.call else []),
        *_comment(sketch),
        "            slots={",
        *(f"                {line}" for line in _slots(sketch)),
        "            },",
        "            facts={",
        *(f'                "{fact}": {value},' for fact, value in sketch.facts or _UNKNOWN_FACTS),
        "            },",
        "        )",
        "    ],",
        *_model(sketch),
        ")",
        "",
        "",
        "@hookimpl",
        "def dsi_register_policies(register):",
        f"    register({constant})",
        "",
    ]
    return "\n".join(lines)


def _imports(sketch: Sketch) -> str:
    text = " ".join([*_slots(sketch), *(value for _, value in (*sketch.facts, *sketch.model))])
    names = {"Block", "Config", "Const", "Linear", "Norm", "Policy", "hookimpl"}
    names |= {name for name in ("Attr", "Concat", "Packed", "Rotary") if f"{name}(" in text}
    names |= {"CausalLM"} if sketch.model else set()
    names |= {"Call"} if sketch.call else set()
    ordered = sorted(names, key=lambda name: (name[0].islower(), name))
    return "from dsi.policy import (\n" + "".join(f"    {name},\n" for name in ordered) + ")"


def _rms(sketch: Sketch) -> list[str]:
    entries = ", ".join(f'"{name}": {value}' for name, value in sketch.norm)
    return [f"RMS = {{{entries}}}"] if entries else []


def _comment(sketch: Sketch) -> list[str]:
    head = "            # what has parameters in the layer, with its weight's shape in a tiny model:"
    return [head, *(f"            #   {line}" for line in sketch.modules)] if sketch.modules else []


def _slots(sketch: Sketch) -> list[str]:
    """One line a slot; how many linear layers there are tells which are fused already, and whether there is a gate."""
    norm = ", **RMS" if sketch.norm else ""
    packed, gated = sketch.linears in (4, 5), sketch.linears in (0, 5, 7)
    return [
        f'"norm_attn": Norm("{FILL}"{norm}),',
        f'"qkv": Packed("{FILL}", layout="{FILL}", split="column"),'
        if packed
        else f'"qkv": Concat("{FILL}: q", "{FILL}: k", "{FILL}: v", split="column"),',
        f'"out": Linear("{FILL}", split="row"),',
        f'"norm_mlp": Norm("{FILL}"{norm}),',
        f'"gate_up": Concat("{FILL}: gate", "{FILL}: up", split="column"),'
        if gated
        else f'"up": Linear("{FILL}", split="column"),',
        f'"down": Linear("{FILL}", split="row"),',
    ]


_UNKNOWN_FACTS = (
    ("heads", 'Config("num_attention_heads")'),
    ("kv_heads", 'Config("num_key_value_heads")'),
    ("head_dim", f'Config("{FILL}")'),
    ("scale", f'Config("{FILL}: what q.k is multiplied by")'),
    ("layer_idx", f'Config("{FILL}: Attr, the layer\'s place in the cache")'),
    ("activation", 'Config("hidden_act")'),
    ("pre_norm", "Const(True)"),
    ("causal", "Const(True)"),
)


def _model(sketch: Sketch) -> list[str]:
    if not sketch.model:
        return []
    return [
        "    # with the parts around the layers, generate takes dsi's loop",
        "    models=[",
        "        CausalLM(",
        *(f"            {name}={value}," for name, value in sketch.model),
        "        )",
        "    ],",
    ]
