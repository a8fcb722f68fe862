"""Which plugins are installed, by metadata alone: a `Source` for every entry point of the group "dsi"."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import metadata

import attrs

from dsi.errors import PluginError

logger = logging.getLogger(__name__)

GROUP = "dsi"
BUILT_IN = "dsi"
"""The distribution whose plugins are dsi's own."""


@attrs.frozen(kw_only=True)
class Source:
    """A plugin before anything of it is imported.

    Args:
        name: the plugin's name, which is the entry point's.
        distribution, version: what installed it; "" where nothing did.
        load: imports the plugin and gives it back.
        note, mend: a warning about how it is installed, and what would do.
        hidden: another installation of its distribution is in effect.
        identity: tells two entry points of one name apart.
    """

    name: str
    distribution: str = ""
    version: str = ""
    load: Callable[[], object] = attrs.field(eq=False)
    note: str = ""
    mend: str = ""
    hidden: bool = False
    identity: tuple[str, ...] = ()


def discover() -> list[Source]:
    """Every entry point of the group: dsi's own first, then by distribution and name.

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
            raise PluginError("it has entry points and no name or version", hint="reinstall it")
        note, hidden = _copies(name, version, place)
    except Exception as error:
        logger.debug("unreadable metadata in %s", place, exc_info=True)
        return [_unreadable(distribution, place, error)]
    mend = "uninstall the others" if note else ""
    return [
        Source(
            name=point.name,
            distribution=name,
            version=version,
            load=_raising(PluginError(note, hint=mend)) if hidden else point.load,
            note=note,
            mend=mend,
            hidden=hidden,
            identity=(name, version, place, point.name, point.value),
        )
        for point in points
    ]


def _unreadable(distribution: metadata.Distribution, place: str, error: Exception) -> Source:
    # a path is all there is to tell it by, and not every kind of distribution has one
    where = str(getattr(distribution, "_path", place))
    found = error.message if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    fault = PluginError(f"{where}: {found}", hint="reinstall what this folder belongs to, or remove it")
    return Source(name=where.rstrip("/").rpartition("/")[2], load=_raising(fault), identity=(where,))


def _copies(name: str, version: str, place: str) -> tuple[str, bool]:
    """A warning where several distributions of one name are installed, and whether this one is out of effect."""
    copies = list(dict.fromkeys((one.version, str(one.locate_file(""))) for one in metadata.distributions(name=name)))
    if len(copies) < 2:
        return "", False
    shown = ", ".join(f"{version} in {place}" for version, place in copies)
    return f"{name} is installed {len(copies)} times ({shown}) and Python uses the first", copies[0] != (version, place)


def _raising(error: Exception) -> Callable[[], object]:
    def load() -> object:
        raise error

    return load
