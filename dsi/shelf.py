"""What a plugin registers, checked piece by piece: a `Shelf` for each hook."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import attrs
from packaging.requirements import InvalidRequirement, Requirement

from dsi import policy as vocabulary
from dsi.errors import PluginError
from dsi.policy import Block, Check, Container, Policy, Quantizer, Slot

Registered = Policy | Container | Quantizer | Check

KINDS: Mapping[str, type[Registered]] = MappingProxyType(
    {"policies": Policy, "containers": Container, "quantizers": Quantizer, "checks": Check}
)
HOOKS = tuple(f"dsi_register_{kind}" for kind in KINDS)

# (what was found, what would do)
Fault = tuple[str, str]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?", or "" where nothing is close."""
    close = difflib.get_close_matches(name[:80], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


@attrs.define
class Shelf:
    """What one hook of one plugin registers.

    Args:
        plugin: its name.
        cls: what belongs here.
        items: by full name "plugin:name".
        fault: the first thing that was wrong; the plugin is broken then, also where it swallowed the error.
        closed: the hook has returned.
    """

    plugin: str
    cls: type[Registered]
    items: dict[str, Registered] = attrs.field(factory=dict)
    fault: PluginError | None = None
    closed: bool = False

    def register(self, item: Any) -> None:
        """What the hook calls.

        Raises:
            PluginError: the item does not belong here.
        """
        try:
            self._check(item)
        except PluginError as error:
            self.fault = self.fault or error
            raise
        self.items[f"{self.plugin}:{item.name}"] = item

    def _check(self, item: Any) -> None:
        wanted = self.cls.__name__
        if self.closed:
            raise PluginError(
                f"{self.plugin} registered {item!r} after its hook had returned", hint="register inside the hook"
            )
        if not isinstance(item, self.cls):
            raise PluginError(
                f"it registered a {type(item).__name__} where a dsi.policy.{wanted} belongs",
                hint=f"build a dsi.policy.{wanted}, or move it to the hook for what it is",
            )
        if not isinstance(item.name, str) or not item.name or set(item.name) & set(":, \t\n"):
            raise PluginError(f"{item.name!r} is no name", hint="use a word without colon, comma or space")
        if f"{self.plugin}:{item.name}" in self.items:
            raise PluginError(f"it registered two {wanted} of the name {item.name!r}", hint="rename one")
        faults = _policy_faults(item) if isinstance(item, Policy) else _impl_faults(item)
        for found, mend in faults:
            raise PluginError(f"{wanted.lower()} {item.name!r}: {found}", hint=mend)


def _is_class(name: Any) -> bool:
    """Whether it is "package.module:Class"."""
    if not isinstance(name, str) or name.count(":") != 1:
        return False
    module, _, attribute = name.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def _impl_faults(item: Any) -> Iterator[Fault]:
    if not _is_class(item.impl):
        yield f"impl is {item.impl!r}", 'use "package.module:name"'


def _policy_faults(policy: Policy) -> Iterator[Fault]:
    for block in policy.blocks:
        yield from _block_faults(block)
    layers = [block.layer for block in policy.blocks]
    if len(set(layers)) < len(layers):
        yield f"two blocks for {next(layer for layer in layers if layers.count(layer) > 1)}", "leave one"
    if type(policy.priority) is not int:
        yield f"priority is {policy.priority!r}", "use an int"
    if not callable(policy.supports):
        yield f"supports is {policy.supports!r}", "use a function of the config"
    for text in policy.requires:
        yield from _requirement_faults(text)
    yield from _reference_faults(policy)


def _reference_faults(policy: Policy) -> Iterator[Fault]:
    for model in policy.models:
        if not isinstance(model, vocabulary.CausalLM):
            yield f"models holds {model!r}", "use dsi.policy.CausalLM"
    for entry in policy.entries:
        if not isinstance(entry, vocabulary.Entries) or not _is_class(entry.model):
            yield f"entries holds {entry!r}", 'use dsi.policy.Entries, of a model "package.module:Class"'
    for name in policy.replaces:
        if not isinstance(name, str) or name.count(":") != 1:
            yield f"replaces names {name!r}", 'use a tuple of full names, e.g. ("plugin:name",)'


def _block_faults(block: Block) -> Iterator[Fault]:
    if not _is_class(block.layer):
        yield f"layer is {block.layer!r}", 'use "package.module:Class"'
    if not isinstance(block.container, str) or block.container.count(":") != 1:
        yield f"container is {block.container!r}", 'use "package.module:Class", or "plugin:name" of a registered one'
    for place, slot in block.slots.items():
        if not isinstance(slot, Slot):
            yield f"slot {place!r} is {slot!r}", "use a slot of dsi.policy, e.g. Linear or Norm"
    for name, fact in block.facts.items():
        if not isinstance(fact, vocabulary.Fact):
            yield f"fact {name!r} is {fact!r}", "use Config, Attr or Const"
    if not isinstance(block.call, vocabulary.Call):
        yield f"call is {block.call!r}", "use dsi.policy.Call"


def _requirement_faults(text: Any) -> Iterator[Fault]:
    try:
        if Requirement(text).url:
            yield f"requires {text!r} has an address, which cannot be checked", "use a version"
    except (InvalidRequirement, TypeError):
        yield f"requires {text!r} is no PEP 508 requirement", 'use a tuple, e.g. ("transformers>=5.6",)'
