"""The registry: every plugin's record, everything that was registered, and the choice for a layer class.

A registry is an instance and is passed in; two of them never meet. `dsi.plugins` loads, `dsi.choice` chooses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType, MappingProxyType
from typing import Any

import attrs

from dsi import choice as choosing
from dsi import plugins as loading
from dsi.choice import Candidate, Choice, Guard, Rejected
from dsi.discovery import BUILT_IN, Source, discover
from dsi.errors import PluginError, UnknownPolicyError
from dsi.plugins import Outcome, Record
from dsi.policy import API_VERSION, Block, Check, Container, Policy, Quantizer
from dsi.shelf import KINDS, did_you_mean

__all__ = ["Choice", "Record", "Registry", "Rejected"]

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True, eq=False)
class Registry:
    """What the plugins of one process brought.

    Args:
        records: one for each entry point, and for each unknown name in the environment.
        policies, containers, quantizers, checks: by full name "plugin:name".
    """

    records: tuple[Record, ...]
    policies: Mapping[str, Policy]
    containers: Mapping[str, Container]
    quantizers: Mapping[str, Quantizer]
    checks: Mapping[str, Check]
    _replaced: set[tuple[str, str]] = attrs.field(factory=set, init=False, repr=False)

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Registry:
        """The registry of what is installed.

        Args:
            environ: `DSI_PLUGINS` and `DSI_DISABLE_PLUGINS` choose plugins by name; `DSI_STRICT_PLUGINS=1` makes
                every plugin that is broken, incompatible, duplicate or unknown an error.

        Raises:
            PluginError: only under `DSI_STRICT_PLUGINS`, from the plugin's own error.
        """
        strict = environ.get("DSI_STRICT_PLUGINS", "0") not in ("", "0")
        return _build(loading.load_all(discover(), environ), strict=strict)

    @classmethod
    def from_plugins(
        cls, plugins: Mapping[str, object], *, distributions: Mapping[str, str] | None = None, strict: bool = False
    ) -> Registry:
        """The registry of plugins that are at hand, for tests.

        Args:
            plugins: name -> module or object with hooks.
            distributions: name -> the distribution to say it is from; "dsi" makes a built-in.
            strict: raise where a plugin does not load.
        """
        sources = [
            Source(name=name, distribution=(distributions or {}).get(name, ""), load=_at_hand(plugin))
            for name, plugin in plugins.items()
        ]
        return _build(loading.load_all(sources, {}), strict=strict)

    def blocks_for(self, layer_class: str, holder: str | None = None) -> list[tuple[str, Policy, Block]]:
        """(full name, policy, block) of every policy that claims "module:Class", by full name.

        Args:
            layer_class: "module:Class".
            holder: class of the module that holds the layer; None for any.
        """
        return [
            (full_name, policy, block)
            for full_name, policy in sorted(self.policies.items())
            for block in policy.blocks
            if stands(block, layer_class, holder)
        ]

    def choose(
        self,
        layer_class: str,
        model_config: Any,
        explicit: Policy | str | None = None,
        guard: Guard | None = None,
        holder: str | None = None,
    ) -> Choice:
        """The policy for a layer class, and why not the others.

        Args:
            layer_class: "module:Class".
            model_config: the config that the policies' `supports` read.
            explicit: a policy, or the full name of one, to use and no other. Its requirements and its refusals hold
                all the same; where it has no block for the class, nothing is chosen.
            guard: asked after each `supports`; see `dsi.choice.Guard`.
            holder: class of the module that holds the layer; None for any.

        Raises:
            UnknownPolicyError: `explicit` is no registered name.
            AmbiguousPolicyError: several apply and nothing settles it.
        """
        given, name = self.resolve(explicit)
        candidates = [
            Candidate(full_name=full_name, policy=policy, block=block, built_in=self._is_built_in(full_name))
            for full_name, policy, block in self.blocks_for(layer_class, holder)
        ]
        if given is not None and name not in self.policies:
            candidates += [
                Candidate(full_name=name, policy=given, block=block, built_in=False)
                for block in given.blocks
                if stands(block, layer_class, holder)
            ]
        choice = choosing.choose(layer_class, candidates, model_config, explicit=name, guard=guard)
        self._log_replaced(choice)
        return choice

    def resolve(self, explicit: Policy | str | None) -> tuple[Policy | None, str]:
        """The policy that is meant and its full name; None and "" where none is.

        Raises:
            UnknownPolicyError: `explicit` is no registered name.
        """
        if explicit is None:
            return None, ""
        if isinstance(explicit, Policy):
            registered = [full_name for full_name, policy in self.policies.items() if policy is explicit]
            # angle brackets cannot stand in a plugin's name as users write it, so this hides no registered policy
            return explicit, registered[0] if registered else f"<given>:{explicit.name}"
        if explicit not in self.policies:
            raise UnknownPolicyError(self._unknown(explicit))
        return self.policies[explicit], explicit

    def digest(self) -> str:
        """A SHA-256, in hex, of the plugins, their versions and what they registered.

        Equal in two processes iff they would make the same choices, so that ranks can compare it. Paths and reasons
        are left out; functions count by name.
        """
        facts = {
            "api": API_VERSION,
            "plugins": [(one.name, one.distribution, one.version, one.state) for one in self.records],
            "registered": [_plain(part) for part in (self.policies, self.containers, self.quantizers, self.checks)],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _unknown(self, name: str) -> str:
        owner = next((one for one in self.records if one.name == name.partition(":")[0]), None)
        if owner is not None and owner.state != "loaded":
            return f"no policy {name!r}: the plugin {owner.name} is {owner.state}: {owner.why}"
        known = ", ".join(sorted(self.policies)) or "none"
        return f"no policy {name!r}{did_you_mean(name, self.policies)}; registered are: {known}"

    def _is_built_in(self, full_name: str) -> bool:
        plugin = full_name.partition(":")[0]
        return any(one.name == plugin and one.distribution == BUILT_IN for one in self.records)

    def _log_replaced(self, choice: Choice) -> None:
        for one in choice.rejected:
            pair = (one.full_name, choice.full_name)
            if one.stage == "replaces" and self._is_built_in(one.full_name) and pair not in self._replaced:
                self._replaced.add(pair)
                logger.warning("the built-in policy %s is %s", one.full_name, one.reason)


def stands(block: Block, layer_class: str, holder: str | None) -> bool:
    """Whether a block is for layers of this class where a module of class `holder` holds them; None for any."""
    return block.layer == layer_class and (holder is None or not block.inside or holder in block.inside)


def _at_hand(plugin: object) -> Callable[[], object]:
    return lambda: plugin


def _build(outcomes: Iterable[Outcome], *, strict: bool) -> Registry:
    outcomes = list(outcomes)
    if strict:
        _raise_first(outcomes)
    shelves: dict[str, Any] = {
        kind: MappingProxyType({name: item for one in outcomes for name, item in one.shelves[kind].items()})
        for kind in KINDS
    }
    contests = _contests(outcomes)
    records = (one.record for one in outcomes)
    # a duplicate has the name of a plugin that was loaded, and claims nothing
    warned = (one.warned(contests.get(one.name)) if one.state == "loaded" else one for one in records)
    return Registry(records=tuple(warned), **shelves)


def _contests(outcomes: Iterable[Outcome]) -> dict[str, tuple[str, str]]:
    """By plugin: with whom it would tie over a layer class, and what settles that; dsi's own are not to blame."""
    claims: dict[str, list[tuple[Record, str, Policy, Block]]] = {}
    for layer, claim in _claims(outcomes):
        claims.setdefault(layer, []).append(claim)
    found = {}
    for layer, ones in claims.items():
        for record, name, policy, block in ones:
            rivals = [
                rival
                for other, rival, against, theirs in ones
                if other.name != record.name
                and _overlap(block, theirs)
                and not (rival in policy.replaces or name in against.replaces or policy.priority != against.priority)
            ]
            if rivals and record.distribution != BUILT_IN:
                reason = f"{name} claims {layer}, and so does {', '.join(rivals)}; where both apply, neither is chosen"
                found[record.name] = reason, f'settle it with injection_policy="{name}" or replaces=("{rivals[0]}",)'
    return found


def _overlap(one: Block, other: Block) -> bool:
    """Whether two blocks of one layer class may claim one layer."""
    return not one.inside or not other.inside or bool({*one.inside} & {*other.inside})


def _claims(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, tuple[Record, str, Policy, Block]]]:
    for outcome in outcomes:
        for full_name, policy in outcome.shelves["policies"].items():
            if isinstance(policy, Policy):
                yield from ((block.layer, (outcome.record, full_name, policy, block)) for block in policy.blocks)


def _raise_first(outcomes: Iterable[Outcome]) -> None:
    bad = [one for one in outcomes if one.record.state not in ("loaded", "disabled")]
    if not bad:
        return
    lines = [
        f"plugin {r.name} ({r.distribution or '-'} {r.version or '-'}) is {r.state}: {r.why}"
        for r in (one.record for one in bad)
    ]
    raise PluginError("\n".join(lines)) from next((one.error for one in bad if one.error is not None), None)


def _plain(value: Any) -> Any:
    """`value` as JSON types in a fixed order, equal in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if attrs.has(type(value)):
        fields = {field.name: _plain(getattr(value, field.name)) for field in attrs.fields(type(value))}
        return [type(value).__qualname__, fields]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, FunctionType | type):
        return f"{value.__module__}:{value.__qualname__}"
    # an address differs from process to process
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
