"""Plugins: which are installed, what became of each, and what each registered.

Every entry point of the group "dsi" gets one `Record`, whatever happens to it. Nothing a plugin does while it is loaded
takes down its host or another plugin, `os._exit` and an endless loop apart; what a broken plugin had registered is
dropped whole. dsi's own policies come through here too.

    discover   entry points, from metadata alone
    filter     DSI_PLUGINS and DSI_DISABLE_PLUGINS, before anything is imported
    import     one plugin at a time
    handshake  DSI_API
    hooks      one plugin at a time, so that whatever is registered or raised has an owner
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, Literal

import attrs
import pluggy
from packaging.requirements import InvalidRequirement, Requirement

from dsi import policy as vocabulary
from dsi.errors import PluginError
from dsi.policy import API_VERSION, Check, Container, Policy, Quantizer

logger = logging.getLogger(__name__)

GROUP = "dsi"
BUILT_IN = "dsi"
"""The distribution whose plugins are dsi's own."""

State = Literal["loaded", "disabled", "broken", "incompatible", "duplicate", "unknown"]

Registered = Policy | Container | Quantizer | Check

KINDS: Mapping[str, type[Registered]] = MappingProxyType(
    {"policies": Policy, "containers": Container, "quantizers": Quantizer, "checks": Check}
)
HOOKS = tuple(f"dsi_register_{kind}" for kind in KINDS)

Shelves = Mapping[str, Mapping[str, Registered]]
"""Kind -> full name "plugin:name" -> what was registered."""

_NOTHING: Shelves = MappingProxyType({kind: MappingProxyType({}) for kind in KINDS})


@attrs.frozen(kw_only=True)
class Record:
    """What became of one entry point.

    Args:
        name: the plugin's name, which is the entry point's.
        distribution, version: what installed it; "" where nothing did.
        state: "loaded", or why not: "disabled" by the environment, "broken" while loading, "incompatible" API,
            "duplicate" name, "unknown" name in the environment.
        reason: what was found and what would do. A loaded plugin may have one too: it is a warning then.
        hooks: the hooks it implements.
        policies, containers, quantizers, checks: full names of what it registered.
    """

    name: str
    distribution: str = ""
    version: str = ""
    state: State
    reason: str = ""
    hooks: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    quantizers: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Source:
    """A plugin before anything of it is imported.

    Args:
        name, distribution, version: as in `Record`.
        load: imports the plugin and gives it back.
        note: a warning about how it is installed.
        hidden: another installation of its distribution is in effect.
        identity: tells two entry points of one name apart.
    """

    name: str
    distribution: str = ""
    version: str = ""
    load: Callable[[], object] = attrs.field(eq=False)
    note: str = ""
    hidden: bool = False
    identity: tuple[str, ...] = ()


@attrs.frozen(kw_only=True, eq=False)
class Outcome:
    """A record with what was registered, or the error that spoiled it."""

    record: Record
    shelves: Shelves = _NOTHING
    error: BaseException | None = None


def discover() -> list[Source]:
    """Every entry point of the group, by metadata alone: dsi's own first, then by distribution and name.

    dsi's own come first so that no distribution takes the name of a built-in by sorting before it.
    """
    found: dict[tuple[str, ...], Source] = {}
    for distribution in metadata.distributions():
        for source in _sources(distribution):
            # one folder twice on sys.path is still one installation
            found.setdefault(source.identity, source)
    return sorted(
        found.values(), key=lambda s: (s.distribution != BUILT_IN, s.distribution, s.hidden, s.name, s.identity)
    )


def _sources(distribution: metadata.Distribution) -> list[Source]:
    place = str(distribution.locate_file(""))
    try:
        points = distribution.entry_points.select(group=GROUP)
        if not points:
            return []
        name, version = distribution.name, distribution.version
        if not name or not version:
            raise PluginError("it has entry points and no name or version; reinstall it")
        note, hidden = _copies(name, version, place)
    except Exception as error:
        logger.debug("unreadable metadata in %s", place, exc_info=True)
        # a path is all there is to tell it by, and not every kind of distribution has one
        where = str(getattr(distribution, "_path", place))
        raiser = _raising(PluginError(f"{where}: {explain(error)}"))
        return [Source(name=where.rstrip("/").rpartition("/")[2], load=raiser, identity=(where,))]
    return [
        Source(
            name=point.name,
            distribution=name,
            version=version,
            load=_raising(PluginError(note)) if hidden else point.load,
            note=note,
            hidden=hidden,
            identity=(name, version, place, point.name, point.value),
        )
        for point in points
    ]


def _copies(name: str, version: str, place: str) -> tuple[str, bool]:
    """A warning where several distributions of one name are installed, and whether this one is out of effect."""
    copies = list(dict.fromkeys((one.version, str(one.locate_file(""))) for one in metadata.distributions(name=name)))
    if len(copies) < 2:
        return "", False
    shown = ", ".join(f"{version} in {place}" for version, place in copies)
    note = f"{name} is installed {len(copies)} times ({shown}) and Python uses the first; uninstall the others"
    return note, copies[0] != (version, place)


def _raising(error: Exception) -> Callable[[], object]:
    def load() -> object:
        raise error

    return load


def load_all(sources: Iterable[Source], environ: Mapping[str, str]) -> list[Outcome]:
    """One outcome for each source, and one for each name in the environment that matches none.

    Args:
        sources: in the order in which names are given away.
        environ: `DSI_PLUGINS` names the plugins to load (set and empty: none), `DSI_DISABLE_PLUGINS` those not to
            load; comma-separated. Both hold for dsi's own plugins too.
    """
    allowed, denied = _names(environ, "DSI_PLUGINS"), _names(environ, "DSI_DISABLE_PLUGINS") or ()
    outcomes: list[Outcome] = []
    owners: dict[str, Source] = {}
    for source in sources:
        outcomes.append(_refused(source, allowed, denied, owners) or _load(source))
        owners.setdefault(source.name, source)
    return [*outcomes, *_unknown(environ, owners)]


def explain(error: BaseException) -> str:
    """An error as one line: dsi's own by its message, any other with its type in front."""
    text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    line = " ".join(text.split()).removesuffix(":")
    return line if len(line) <= 500 else line[:500] + "..."


def _names(environ: Mapping[str, str], variable: str) -> tuple[str, ...] | None:
    value = environ.get(variable)
    return None if value is None else tuple(name for part in value.split(",") if (name := part.strip()))


def _refused(
    source: Source, allowed: tuple[str, ...] | None, denied: tuple[str, ...], owners: Mapping[str, Source]
) -> Outcome | None:
    state: State = "disabled"
    if source.name in denied:
        reason = "DSI_DISABLE_PLUGINS names it"
    elif allowed is not None and source.name not in allowed:
        reason = "DSI_PLUGINS does not name it"
    elif source.name in owners:
        state, owner = "duplicate", owners[source.name]
        reason = f"the name belongs to {owner.distribution} {owner.version}; rename one entry point or uninstall one"
    else:
        return None
    return Outcome(record=_record(source, state, reason))


def _unknown(environ: Mapping[str, str], known: Iterable[str]) -> list[Outcome]:
    installed = list(known)
    outcomes = []
    for variable in ("DSI_PLUGINS", "DSI_DISABLE_PLUGINS"):
        for name in dict.fromkeys(_names(environ, variable) or ()):
            if name not in installed:
                reason = f"{variable} names it, and it is not installed{did_you_mean(name, installed)}"
                outcomes.append(Outcome(record=Record(name=name, state="unknown", reason=reason)))
    return outcomes


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?", or "" where nothing is close."""
    close = difflib.get_close_matches(name[:80], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _record(source: Source, state: State, reason: str, **registered: tuple[str, ...]) -> Record:
    return Record(
        name=source.name,
        distribution=source.distribution,
        version=source.version,
        state=state,
        reason=reason,
        **registered,
    )


class _Incompatible(PluginError):
    """The plugin was written for another API."""


def _load(source: Source) -> Outcome:
    try:
        if set(source.name) & set(":, \t"):
            raise PluginError("the name of a plugin holds no colon, comma or space; rename the entry point")
        plugin = source.load()
        _shake_hands(plugin)
        manager = _manager(plugin, source.name)
        shelves = _collect(manager, source.name)
    # SystemExit, because a plugin that calls sys.exit() while it is imported ends no host
    except (Exception, SystemExit) as error:
        logger.debug("plugin %s of %s", source.name, source.distribution, exc_info=True)
        state: State = "incompatible" if isinstance(error, _Incompatible) else "broken"
        return Outcome(record=_record(source, state, explain(error)), error=error)
    hooks = tuple(hook for hook in HOOKS if getattr(manager.hook, hook).get_hookimpls())
    registered = {kind: tuple(shelf) for kind, shelf in shelves.items()}
    return Outcome(record=_record(source, "loaded", source.note, hooks=hooks, **registered), shelves=shelves)


def _shake_hands(plugin: object) -> None:
    line = f"DSI_API = {API_VERSION}"
    api = getattr(plugin, "DSI_API", None)
    if api is None:
        raise PluginError(f"it does not say which plugin API it was written for; add the line {line}")
    if not (isinstance(api, tuple) and len(api) == 2 and all(type(part) is int for part in api)):
        raise PluginError(f"DSI_API is {api!r}; write {line}")
    if api[0] != API_VERSION[0] or api[1] > API_VERSION[1]:
        older = "dsi" if api > API_VERSION else "the plugin"
        raise _Incompatible(f"it needs plugin API {api}, and dsi has {API_VERSION}; upgrade {older}")


def _manager(plugin: object, name: str) -> pluggy.PluginManager:
    """A manager that holds this plugin alone, its hooks checked.

    A manager each, because a manager of many runs the hooks of all and cannot say whose raised.
    """
    manager = pluggy.PluginManager("dsi")
    manager.add_hookspecs(vocabulary)
    manager.register(plugin, name)
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        for impl in caller.get_hookimpls():
            _check_hook(caller, impl)
    _check_unmarked(plugin)
    if not callers:
        raise PluginError(f"it implements no hook; mark one of {', '.join(HOOKS)} with @hookimpl")
    return manager


def _check_hook(caller: pluggy.HookCaller, impl: pluggy.HookImpl) -> None:
    if not caller.has_spec() and not impl.optionalhook:
        raise PluginError(f"{caller.name} is no hook{did_you_mean(caller.name, HOOKS)}")
    if impl.hookwrapper or impl.wrapper:
        raise PluginError(f"{caller.name} is a wrapper, which would act on other plugins; register what is yours")
    if impl.kwargnames:
        names = ", ".join(impl.kwargnames)
        raise PluginError(f"{caller.name}: {names} has a default and would never be passed; remove the default")


def _check_unmarked(plugin: object) -> None:
    for name in dir(plugin):
        value = inspect.getattr_static(plugin, name, None) if name.startswith("dsi_register") else None
        function = getattr(value, "__func__", value)
        if not callable(function) or hasattr(function, "dsi_spec"):
            continue
        if not hasattr(value, "dsi_impl") and not hasattr(function, "dsi_impl"):
            raise PluginError(f"{name} would never be called; mark it with @hookimpl")


@attrs.define
class _Shelf:
    """What one hook of one plugin registers, checked one by one."""

    plugin: str
    cls: type[Registered]
    items: dict[str, Registered] = attrs.field(factory=dict)
    fault: PluginError | None = None
    closed: bool = False

    def register(self, item: Any) -> None:
        try:
            self._check(item)
        except PluginError as error:
            # kept, so that a plugin that swallows the error is broken all the same
            self.fault = self.fault or error
            raise
        self.items[f"{self.plugin}:{item.name}"] = item

    def _check(self, item: Any) -> None:
        if self.closed:
            raise PluginError(
                f"{self.plugin} registered {item!r} after its hook had returned; register inside the hook"
            )
        if not isinstance(item, self.cls):
            raise PluginError(f"it registered a {type(item).__name__} where a dsi.policy.{self.cls.__name__} belongs")
        if not isinstance(item.name, str) or not item.name or set(item.name) & set(":, \t\n"):
            raise PluginError(f"{item.name!r} is no name; use a word without colon, comma or space")
        if f"{self.plugin}:{item.name}" in self.items:
            raise PluginError(f"it registered two {self.cls.__name__} of the name {item.name!r}; rename one")
        if isinstance(item, Policy) and (fault := _policy_fault(item)):
            raise PluginError(f"policy {item.name!r}: {fault}")


def _policy_fault(policy: Policy) -> str | None:
    layers = [block.layer for block in policy.blocks]
    if len(set(layers)) < len(layers):
        return f"two blocks for {next(layer for layer in layers if layers.count(layer) > 1)}; leave one"
    if type(policy.priority) is not int:
        return f"priority is {policy.priority!r}; use an int"
    if not callable(policy.supports):
        return f"supports is {policy.supports!r}; use a function of the config"
    for name in policy.replaces:
        if not isinstance(name, str) or name.count(":") != 1:
            return f'replaces names {name!r}; use a tuple of full names, e.g. ("plugin:name",)'
    return next((fault for one in policy.requires if (fault := _requirement_fault(one))), None)


def _requirement_fault(text: Any) -> str | None:
    try:
        if Requirement(text).url:
            return f"requires {text!r} has an address, which cannot be checked; use a version"
    except (InvalidRequirement, TypeError):
        return f'requires {text!r} is no PEP 508 requirement; use a tuple, e.g. ("transformers>=5.6",)'
    return None


def _collect(manager: pluggy.PluginManager, name: str) -> Shelves:
    shelves: dict[str, Mapping[str, Registered]] = {}
    for kind, cls in KINDS.items():
        shelf = _Shelf(name, cls)
        getattr(manager.hook, f"dsi_register_{kind}")(register=shelf.register, api=API_VERSION)
        shelf.closed = True
        if shelf.fault is not None:
            raise shelf.fault
        shelves[kind] = MappingProxyType(shelf.items)
    return shelves
