"""Plugins: what became of each that is installed, and what it registered.

Every entry point of the group "dsi" gets one `Record`, whatever happens to it. Nothing a plugin does while it is loaded
takes down its host or another plugin, `os._exit` and an endless loop apart (`dsi plugins --probe` finds those); what a
broken plugin had registered is dropped whole, and what it replaced of torch is put back. dsi's own policies come
through here too.

    discover   entry points, from metadata alone; see `dsi.discovery`
    filter     DSI_PLUGINS and DSI_DISABLE_PLUGINS, before anything is imported
    import     one plugin at a time, watched; see `dsi.watch`
    handshake  DSI_API
    hooks      one plugin at a time, so that whatever is registered or raised has an owner; see `dsi.shelf`
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

import attrs
import pluggy

from dsi import policy as vocabulary
from dsi.discovery import Source
from dsi.errors import DsiError, PluginError
from dsi.policy import API_VERSION
from dsi.shelf import HOOKS, KINDS, Registered, Shelf, did_you_mean
from dsi.watch import Traces, watch

logger = logging.getLogger(__name__)

State = Literal["loaded", "disabled", "broken", "incompatible", "duplicate", "unknown"]

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
        reason: what was found. A loaded plugin may have one too: it is a warning then.
        mend: what would do; there is one wherever there is a reason.
        hooks: the hooks it implements.
        policies, containers, quantizers, checks: full names of what it registered.
    """

    name: str
    distribution: str = ""
    version: str = ""
    state: State
    reason: str = ""
    mend: str = ""
    hooks: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    quantizers: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """The reason and its mend, as one line."""
        return "; ".join(part for part in (self.reason, self.mend) if part)

    def warned(self, *warnings: tuple[str, str] | None) -> Record:
        """The same with more warnings: what was found, and what would do."""
        found = [(self.reason, self.mend), *(one for one in warnings if one is not None)]
        reason, mend = ("; ".join(part for part in parts if part) for parts in zip(*found, strict=True))
        return attrs.evolve(self, reason=reason, mend=mend)


@attrs.frozen(kw_only=True, eq=False)
class Outcome:
    """A record with what was registered, or the error that spoiled it, and what happened meanwhile."""

    record: Record
    shelves: Shelves = _NOTHING
    error: BaseException | None = None
    traces: Traces = attrs.field(factory=Traces)


def load_all(sources: Iterable[Source], environ: Mapping[str, str]) -> list[Outcome]:
    """One outcome for each source, and one for each name in the environment that matches none.

    Args:
        sources: in the order in which names are given away.
        environ: `DSI_PLUGINS` names the plugins to load (set and empty: none), `DSI_DISABLE_PLUGINS` those not to
            load; comma-separated. Both hold for dsi's own plugins too.
    """
    outcomes: list[Outcome] = []
    owners: dict[str, Source] = {}
    for source in sources:
        outcomes.append(refused(source, environ, owners) or load_one(source))
        owners.setdefault(source.name, source)
    return [*outcomes, *_unknown(environ, owners)]


def refused(source: Source, environ: Mapping[str, str], owners: Mapping[str, Source]) -> Outcome | None:
    """The outcome of a plugin that is not imported at all, or None.

    Args:
        source: the plugin.
        environ: see `load_all`.
        owners: the plugins before it, by name.
    """
    allowed, denied = _names(environ, "DSI_PLUGINS"), _names(environ, "DSI_DISABLE_PLUGINS") or ()
    state: State = "disabled"
    if source.name in denied:
        reason, mend = "DSI_DISABLE_PLUGINS names it", "take it out of the variable to load it"
    elif allowed is not None and source.name not in allowed:
        reason, mend = "DSI_PLUGINS does not name it", "add it to the variable to load it"
    elif source.name in owners:
        state, owner = "duplicate", owners[source.name]
        reason = f"the name belongs to {owner.distribution} {owner.version}"
        mend = "rename one entry point or uninstall one"
    else:
        return None
    return Outcome(record=_record(source, state, reason, mend))


def _names(environ: Mapping[str, str], variable: str) -> tuple[str, ...] | None:
    value = environ.get(variable)
    return None if value is None else tuple(name for part in value.split(",") if (name := part.strip()))


def _unknown(environ: Mapping[str, str], known: Iterable[str]) -> list[Outcome]:
    installed = list(known)
    outcomes = []
    for variable in ("DSI_PLUGINS", "DSI_DISABLE_PLUGINS"):
        for name in dict.fromkeys(_names(environ, variable) or ()):
            if name not in installed:
                reason = f"{variable} names it, and it is not installed{did_you_mean(name, installed)}"
                mend = "install it, or correct the variable"
                outcomes.append(Outcome(record=Record(name=name, state="unknown", reason=reason, mend=mend)))
    return outcomes


def _record(source: Source, state: State, reason: str, mend: str, **registered: tuple[str, ...]) -> Record:
    return Record(
        name=source.name,
        distribution=source.distribution,
        version=source.version,
        state=state,
        reason=reason,
        mend=mend,
        **registered,
    )


# --- one plugin -------------------------------------------------------------------------------------------------------


class _Incompatible(PluginError):
    """The plugin was written for another API."""


def load_one(source: Source) -> Outcome:
    """What becomes of one plugin when it is imported and its hooks are called."""
    with watch() as traces:
        outcome = _load(source)
    if traces.patched and outcome.record.state == "loaded":
        names = ", ".join(traces.patched[:5])
        more = f" and {len(traces.patched) - 5} more" if len(traces.patched) > 5 else ""
        error = PluginError(
            f"it replaced {names}{more}, which every model in the process uses; that is put back",
            hint="change nothing that is not the plugin's own: a container may compute as it likes",
        )
        return Outcome(record=_record(source, "broken", error.message, error.hint), error=error, traces=traces)
    warned = outcome.record.warned(*traces.complaints()) if outcome.record.state == "loaded" else outcome.record
    return attrs.evolve(outcome, record=warned, traces=traces)


def _load(source: Source) -> Outcome:
    try:
        if set(source.name) & set(":, \t"):
            raise PluginError("the name of a plugin holds no colon, comma or space", hint="rename the entry point")
        plugin = source.load()
        _shake_hands(plugin)
        manager = _manager(plugin, source.name)
        shelves = _collect(manager, source.name)
    except KeyboardInterrupt:
        # somebody pressed Ctrl-C
        raise
    # also SystemExit: a plugin that calls sys.exit() while it is imported ends no host
    except BaseException as error:
        logger.debug("plugin %s of %s", source.name, source.distribution, exc_info=True)
        state: State = "incompatible" if isinstance(error, _Incompatible) else "broken"
        return Outcome(record=_record(source, state, explain(error), mend_of(error, source)), error=error)
    hooks = tuple(hook for hook in HOOKS if getattr(manager.hook, hook).get_hookimpls())
    registered = {kind: tuple(shelf) for kind, shelf in shelves.items()}
    return Outcome(
        record=_record(source, "loaded", source.note, source.mend, hooks=hooks, **registered), shelves=shelves
    )


def explain(error: BaseException) -> str:
    """An error as one line: dsi's own by its message, any other by its type, its message and where it was raised."""
    if isinstance(error, DsiError):
        text = str(error.message)
    else:
        text = f"{type(error).__name__}: {_words(error)}".rstrip(": ") + _place(error)
    line = " ".join(text.split())
    return line if len(line) <= 500 else line[:500] + "..."


def _words(error: BaseException) -> str:
    try:
        return str(error).strip().removesuffix(":")
    except Exception as fault:  # noqa: BLE001 - it is the plugin's code that is asked for words
        return f"its message cannot be read ({type(fault).__name__})"


def _place(error: BaseException) -> str:
    """Where in the plugin it was raised, as " (file:line)"; "" where no code of it had run."""
    if isinstance(error, SyntaxError):
        # its message says
        return ""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
        if module.partition(".")[0] not in ("dsi", "pluggy", "importlib") and "<frozen" not in file:
            return f" ({file}:{line})"
    return ""


def mend_of(error: BaseException, source: Source) -> str:
    """What the user of a broken plugin can do."""
    if isinstance(error, PluginError) and error.hint:
        return error.hint
    who = source.distribution or source.name
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install what provides the module {error.name!r}, or reinstall {who} with its dependencies"
    if isinstance(error, SystemExit):
        return f"a plugin must not end its host; upgrade {who}, or set DSI_DISABLE_PLUGINS={source.name}"
    return f"mend it there or upgrade {who}; until then DSI_DISABLE_PLUGINS={source.name}"


def _shake_hands(plugin: object) -> None:
    line = f"DSI_API = {API_VERSION}"
    api = getattr(plugin, "DSI_API", None)
    if api is None:
        raise PluginError("it does not say which plugin API it was written for", hint=f"add the line {line}")
    if not (isinstance(api, tuple) and len(api) == 2 and all(type(part) is int for part in api)):
        raise PluginError(f"DSI_API is {api!r}", hint=f"write {line}")
    if api[0] != API_VERSION[0] or api[1] > API_VERSION[1]:
        older = "dsi" if api > API_VERSION else "the plugin"
        raise _Incompatible(f"it needs plugin API {api}, and dsi has {API_VERSION}", hint=f"upgrade {older}")


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
        raise PluginError("it implements no hook", hint=f"mark one of {', '.join(HOOKS)} with @hookimpl")
    return manager


def _check_hook(caller: pluggy.HookCaller, impl: pluggy.HookImpl) -> None:
    if not caller.has_spec() and not impl.optionalhook:
        raise PluginError(
            f"{caller.name} is no hook{did_you_mean(caller.name, HOOKS)}", hint=f"the hooks are {', '.join(HOOKS)}"
        )
    if impl.hookwrapper or impl.wrapper:
        raise PluginError(
            f"{caller.name} is a wrapper, which would act on other plugins", hint="register what is yours"
        )
    if impl.kwargnames:
        names = ", ".join(impl.kwargnames)
        raise PluginError(f"{caller.name}: {names} has a default and would never be passed", hint="remove the default")


def _check_unmarked(plugin: object) -> None:
    for name in dir(plugin):
        value = inspect.getattr_static(plugin, name, None) if name.startswith("dsi_register") else None
        function = getattr(value, "__func__", value)
        if not callable(function) or hasattr(function, "dsi_spec"):
            continue
        if not hasattr(value, "dsi_impl") and not hasattr(function, "dsi_impl"):
            raise PluginError(f"{name} would never be called", hint="mark it with @hookimpl")


def _collect(manager: pluggy.PluginManager, name: str) -> Shelves:
    shelves: dict[str, Mapping[str, Registered]] = {}
    for kind, cls in KINDS.items():
        shelf = Shelf(name, cls)
        getattr(manager.hook, f"dsi_register_{kind}")(register=shelf.register, api=API_VERSION)
        shelf.closed = True
        if shelf.fault is not None:
            raise shelf.fault
        shelves[kind] = MappingProxyType(shelf.items)
    return shelves
