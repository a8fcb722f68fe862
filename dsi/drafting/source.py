"""A policy as python source, as a person would write it: what has its default is left out, what repeats has a name."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from dsi.drafting.norms import LAYER_NORM
from dsi.policy import API_VERSION, Call, Concat, Keep, Linear, Norm, Packed, Policy

_WIDTH = 100
_POSITIONAL = (Linear, Packed, Norm, Keep)


@attrs.frozen
class Guard:
    """A setting of the config that must be as it was found.

    Args:
        name: of the attribute.
        value: that it must have.
        why: what happens otherwise.
    """

    name: str
    value: Any
    why: str


def render(policy: Policy, guards: Sequence[Guard], sure: Sequence[str], unsure: Sequence[str]) -> str:
    """The file of a policy with its hook.

    Args:
        policy: without `supports`; that is written of the guards.
        guards: in the order in which they are asked.
        sure, unsure: sentences for the docstring.
    """
    return _Writer(policy).text(guards, sure, unsure)


class _Writer:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.module = policy.blocks[0].layer.partition(":")[0] + ":"
        self.names: set[str] = {"Policy", "hookimpl"}
        norms = [s for s in policy.blocks[0].slots.values() if isinstance(s, Norm) and s.cls != LAYER_NORM]
        self.rms = (norms[0].kind, norms[0].eps, norms[0].cls, norms[0].offset) if norms else None

    def text(self, guards: Sequence[Guard], sure: Sequence[str], unsure: Sequence[str]) -> str:
        constant = self.policy.name.upper()
        body = f"{constant} = {self._policy(guards)}"
        names = sorted(self.names | ({"Refusal"} if guards else set()), key=lambda n: (n[0].islower(), n))
        parts = [
            _docstring(self.policy, sure, unsure),
            "\nfrom __future__ import annotations\n",
            "from collections.abc import Callable" + ("\nfrom typing import Any" if guards or self.rms else "") + "\n",
            "from dsi.policy import (\n" + "".join(f"    {name},\n" for name in names) + ")\n",
            f"DSI_API = {API_VERSION}\n",
            f'_FAMILY = "{self.module}"',
            *([self._rms_line()] if self.rms else []),
            *(["", "", _supports(guards), ""] if guards else [""]),
            body,
            _HOOK.format(constant=constant),
        ]
        return "\n".join(parts)

    # --- expressions ----------------------------------------------------------------------------------------------

    def _policy(self, guards: Sequence[Guard]) -> str:
        policy = self.policy
        arguments = [("name", repr_(policy.name)), ("requires", self.write(list(policy.requires)))]
        if guards:
            arguments.append(("supports", "supports"))
        if policy.context is not None:
            arguments.append(("context", self.write(policy.context)))
        arguments.append(("blocks", self.write(list(policy.blocks))))
        if policy.models:
            arguments.append(("models", self.write(list(policy.models))))
        return _call("Policy", [f"{name}={value}" for name, value in arguments], wide=True)

    def write(self, value: Any) -> str:
        """The expression of a value."""
        if isinstance(value, Norm):
            return self._norm(value)
        if isinstance(value, Concat):
            return self._attrs(value, [self.write(path) for path in value.paths], {"paths"})
        if isinstance(value, _POSITIONAL):
            return self._attrs(value, [self.write(value.path)], {"path"})
        if attrs.has(type(value)):
            fields = attrs.fields(type(value))
            if not fields[0].kw_only and len(fields) == 1:
                return self._attrs(value, [self.write(getattr(value, fields[0].name))], {fields[0].name})
            return self._attrs(value, [], set())
        if isinstance(value, Mapping):
            return _block("{", [f"{self.write(k)}: {self.write(v)}" for k, v in value.items()], "}")
        if isinstance(value, list | tuple | frozenset | set):
            return self._sequence(value)
        return self._string(value) if isinstance(value, str) else repr(value)

    def _sequence(self, value: Any) -> str:
        items = [self.write(item) for item in (sorted(value) if isinstance(value, frozenset | set) else value)]
        text = f"[{', '.join(items)}]"
        return text if len(text) < 60 and "\n" not in text else _block("[", items, "]")

    def _string(self, value: str) -> str:
        if value.startswith(self.module):
            return f"_FAMILY + {repr_(value.removeprefix(self.module))}"
        return repr_(value)

    def _norm(self, norm: Norm) -> str:
        self.names.add("Norm")
        if self.rms is not None and (norm.kind, norm.eps, norm.cls, norm.offset) == self.rms:
            return f"Norm({self.write(norm.path)}, **_NORM)"
        return self._attrs(norm, [self.write(norm.path)], {"path"})

    def _attrs(self, value: Any, first: list[str], done: set[str]) -> str:
        self.names.add(type(value).__name__)
        items = list(first)
        for name, one in _differences(value):
            if name not in done:
                items.append(f"{name}={self.write(one)}")
        return _call(type(value).__name__, items)

    def _rms_line(self) -> str:
        assert self.rms is not None
        kind, eps, cls, offset = self.rms
        more = f', "offset": {offset}' if offset else ""
        return f'_NORM: dict[str, Any] = {{"kind": "{kind}", "eps": "{eps}", "cls": {self._string(cls)}{more}}}'


# what a slot is without its options
_PLAIN: Mapping[type, Any] = {
    Linear: Linear("x"),
    Concat: Concat("x", "y"),
    Packed: Packed("x", layout="thirds"),
    Norm: Norm("x"),
}
_ALWAYS = {Packed: {"layout"}}
# what people read last
_LAST = {"slots": 1, "facts": 2, "ignore": 3}


def _differences(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields that are not as they are by default."""
    plain = _PLAIN.get(type(value), Call() if isinstance(value, Call) else None)
    fields = sorted(attrs.fields(type(value)), key=lambda field: _LAST.get(field.name, 0))
    for field in fields:
        one = getattr(value, field.name)
        always = field.name in _ALWAYS.get(type(value), ())
        if plain is not None:
            if always or one != getattr(plain, field.name):
                yield field.name, one
        elif one != _default(field):
            yield field.name, one


def _default(field: attrs.Attribute[Any]) -> Any:
    if field.default is attrs.NOTHING:
        return attrs.NOTHING
    default: Any = field.default
    made = default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]
    return field.converter(made) if callable(field.converter) and isinstance(made, list | tuple) else made


def _call(name: str, items: list[str], *, wide: bool = False) -> str:
    text = f"{name}({', '.join(items)})"
    return text if not wide and "\n" not in text and len(text) < _WIDTH else _block(f"{name}(", items, ")")


def _block(start: str, items: list[str], end: str) -> str:
    if not items:
        return start + end
    return start + "\n" + textwrap.indent("".join(f"{item},\n" for item in items), "    ") + end


def repr_(value: str) -> str:
    """A string in double quotes."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _docstring(policy: Policy, sure: Sequence[str], unsure: Sequence[str]) -> str:
    layer = policy.blocks[0].layer.partition(":")[2]
    lines = [f"{layer}: drafted by `dsi draft` from the layer itself; read it, then run `dsi check` on it.", ""]
    for head, sentences in (("Sure, because it was run against the stock layer:", sure), ("Not known:", unsure)):
        if sentences:
            lines += [head, "", *(line for one in sentences for line in _item(one)), ""]
    text = "\n".join(lines).rstrip().replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{text}\n"""'


def _item(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, 112, initial_indent="- ", subsequent_indent="  ")


def _supports(guards: Sequence[Guard]) -> str:
    lines = ["def supports(config: Any) -> Refusal | None:", '    """No variant but the ones that were run."""']
    for guard in guards:
        test = "is not" if guard.value is None or isinstance(guard.value, bool) else "!="
        shown = repr_(guard.value) if isinstance(guard.value, str) else repr(guard.value)
        reason = f'reason=f"{guard.name}={{config.{guard.name}!r}} is not implemented"'
        lines += [f"    # {guard.why}", f"    if config.{guard.name} {test} {shown}:"]
        if len(reason) < _WIDTH - 10:
            lines.append(f"        return Refusal({reason})")
        else:
            lines += ["        return Refusal(", f"            {reason}", "        )"]
    return "\n".join([*lines, "    return None\n"])


_HOOK = '''

@hookimpl
def dsi_register_policies(register: Callable[[Policy], None]) -> None:
    """Register the family."""
    register({constant})
'''
