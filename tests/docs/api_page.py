"""The page docs/plugins/api.md, made of `dsi.policy` itself.

python -m tests.docs.api_page       writes it
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import attrs

from dsi import policy as vocabulary
from dsi.containers import DecoderLayer, EncoderLayer
from dsi.policy import API_VERSION
from dsi.shelf import HOOKS

PAGE = Path(__file__).parents[2] / "docs" / "plugins" / "api.md"

# in the order in which an author needs them
CHAPTERS = {
    "A policy": ("Policy", "Block", "Call", "RotaryTable", "Refusal"),
    "Slots: which weights": ("Linear", "Concat", "Packed", "Conv", "Norm", "Keep"),
    "Facts: which numbers": ("Config", "Attr", "Const", "Inverse"),
    "Around the layers": ("CausalLM", "Positions", "Rotary", "Alibi", "Context", "Entries"),
    "Other things to register": ("Container", "Quantizer", "Check"),
}
CONTAINERS = (DecoderLayer, EncoderLayer)

HEAD = """\
# The plugin API

Version {version}. A plugin is a module, or an object, that an entry point of the group `dsi` names:

```toml
[project.entry-points.dsi]
acme = "dsi_acme"
```

It says `DSI_API = {version}` and implements one hook or more. Loading it imports `dsi.policy` and nothing heavy:
everything here is frozen data that names classes by string, `"package.module:Class"`.
[How to write one](write-a-policy.md); [what may change](versioning.md).

This page is made of `dsi.policy` by `python -m tests.docs.api_page`, and a test compares the two.
"""

CONTAINER_TEXT = """\
## Containers

A container is a subclass of `dsi.containers.Container`, or of one that does most of it already. What may be used and
overridden:

| | |
|---|---|
| `SLOTS` | place -> whether a policy must fill it |
| `FACTS` | names of the facts that a policy must give |
| `OPTIONAL_FACTS` | fact -> what an absent one means |
| `check(facts, slots)` | class method; a `Refusal` for what is not computed, or None. It may only read |
| `finish()` | called once all places are filled, and again after a move or cast; call `super().finish()` first |
| `run(call)` | the computation: hidden states [B, S, H] after the layer, of the shape and dtype of `call.hidden` |
| `facts`, `call` | what the policy gave: the facts' values, and its `Call` |
| places | attributes named as in `SLOTS`: a linear one is called like a module; a norm has `weight`, `bias`, `eps` |

`run` gets a `LayerCall`: `hidden`; `mask`, None, or [B, 1 or heads, S, T], bool (True = attend) or added to the scores;
`cache`, None or a cache whose `update(k, v, layer_idx)` gives all keys and values; `rope`, the rotary terms or None;
`causal`, what a missing mask means. Calls that a container need not understand (unknown arguments, attention weights
wanted, training) never reach `run`: the stock layer answers them.

Layers of maps [B, C, H, W] have containers of their own, subclasses of `dsi.containers.MapContainer`: `INPUTS` names
what they take beside the map (`Call.inputs` says under which arguments), `takes(hidden, inputs)` is False for a call
that is the stock layer's affair, and `run` gets a `MapCall`: `hidden`, channels-last, and `inputs`. All containers are
`dsi.containers.StandIn`.

Layers that change two sequences at once, hidden states [B, S, C] and a context [B, T, E], have subclasses of
`dsi.containers.PairContainer`, a `MapContainer` whose `run` gives both: (context or None, hidden states). One of its
`INPUTS` is `context`, and policies say `Call(returns="pair")`. `plugins/dsi-mmdit` brings such containers.

What a device may have faster than torch is in `self.ops`, with a place first:

| | |
|---|---|
| `ops.norm(place, x)` | the norm of the last axis |
| `ops.project(place, x)` | a linear place's product |
| `ops.project_add(place, x, residual)` | its sum with `residual` |
| `ops.activate(place, x, kind)` | it through "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu" |
| `ops.attend(q, k, v, mask, causal, scale)` | attention of q [B, heads, S, d] to k and v [B, kv_heads, T, d]; the \
mask as in `LayerCall`; [B, S, heads * d] |
"""

CHECK_TEXT = """\
## Checks

The function that `Check.impl` names takes a `dsi.testing.Subject` and gives a `dsi.testing.Outcome`, made by `passed`,
`failed` (with `mend=`), `not_run` or `absent`:

```python
# acme_checks.py
from dsi.testing import failed, passed


def keeps_class(subject):
    twins = subject.twins()  # .stock, .model, .engine, .containers
    if type(twins.model) is not type(twins.stock):
        return failed("the class changed", measured=type(twins.model), allowed=type(twins.stock), mend="report it")
    return passed("the class is stock's")
```
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD.format(version=API_VERSION)]
    for title, names in CHAPTERS.items():
        parts += [f"## {title}\n", *(_class(name) for name in names)]
    parts += [CONTAINER_TEXT, *(_container(cls) for cls in CONTAINERS), CHECK_TEXT, "## Hooks\n"]
    parts += [_hook(name) for name in HOOKS]
    return "\n".join(parts)


def fields(name: str) -> dict[str, str]:
    """Field -> its default as it would be written, or "" where there is none, of a class of the vocabulary."""
    parameters = inspect.signature(getattr(vocabulary, name)).parameters
    attributes = attrs.fields_dict(getattr(vocabulary, name))
    return {
        each.name.lstrip("*"): _default(each, attributes[each.name])
        for each in parameters.values()
        if each.name != "self"
    }


def _default(parameter: inspect.Parameter, attribute: Any) -> str:
    if parameter.default is inspect.Parameter.empty:
        return ""
    default = attribute.default
    if isinstance(default, attrs.Factory):
        return f"{default.factory.__name__}()".replace("dict()", "{}")
    value = parameter.default if default is attrs.NOTHING else default
    if inspect.isfunction(value):
        return "takes every config"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(repr, value))) + "}" if value else "none"
    return repr(value) if not attrs.has(type(value)) else f"{type(value).__name__}()"


def _class(name: str) -> str:
    cls = getattr(vocabulary, name)
    body, arguments = documented(cls)
    rows = []
    types = {each.name: each.type for each in attrs.fields(cls)}
    for field, default in fields(name).items():
        kind = str(types[field]).replace("|", "\\|")
        rows.append(
            f"| `{field}` | `{kind}` | {f'`{default}`' if default else 'needed'} | {arguments.get(field, '')} |"
        )
    table = "\n".join(["| field | type | default | |", "|---|---|---|---|", *rows])
    return f"### {name}\n\n{body}\n\n{table}\n"


def documented(cls: type) -> tuple[str, dict[str, str]]:
    """The text of a class's docstring, and what it says of each argument."""
    text = inspect.cleandoc(cls.__doc__ or "")
    body, _, rest = text.partition("\nArgs:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(rest)) if rest else ():
        names, _, said = entry.partition(":")
        for one in names.split(","):
            found[one.strip()] = " ".join(said.replace("|", "\\|").replace("<", "&lt;").split())
    return " ".join(body.split()), found


def _container(cls: Any) -> str:
    places = ", ".join(f"`{name}`" if needed else f"`{name}` (may be left out)" for name, needed in cls.SLOTS.items())
    facts = ", ".join(f"`{name}`" for name in sorted(cls.FACTS))
    optional = ", ".join(f"`{name}` ({value!r})" for name, value in sorted(cls.OPTIONAL_FACTS.items()))
    return f"### dsi.containers:{cls.__name__}\n\nPlaces: {places}.\n\nFacts: {facts}. May be left out: {optional}.\n"


def _hook(name: str) -> str:
    function = getattr(vocabulary, name)
    parameters = ", ".join(inspect.signature(function).parameters)
    code = f"```python\nfrom dsi.policy import hookimpl\n\n\n@hookimpl\ndef {name}({parameters}): ...\n```"
    said = f"{inspect.cleandoc(function.__doc__)} Name the arguments that you want, without defaults."
    return f"### {name}\n\n{code}\n\n{said}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
