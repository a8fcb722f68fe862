"""`dsi plugins`: every plugin and what became of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import attrs

from dsi.cli.command import Answer, Command, columns
from dsi.registry import Record, Registry


def run(_args: argparse.Namespace) -> Answer:
    """The records of the registry, one a line, each with what would mend it."""
    registry = Registry.load()
    rows = [(one.name, _installed(one), one.state, _said(one)) for one in registry.records]
    lines = columns(rows).splitlines()
    text = [line for one, row in zip(registry.records, lines, strict=True) for line in _with_mend(row, one.mend)]
    data = {"plugins": [attrs.asdict(one) for one in registry.records], "digest": registry.digest()}
    return Answer(text="\n".join(text) or "no plugins are installed", data=data)


def _installed(record: Record) -> str:
    return f"{record.distribution} {record.version}".strip() or "-"


def _said(record: Record) -> str:
    registered = ", ".join((*record.policies, *record.containers, *record.quantizers, *record.checks))
    # one line each, whatever a plugin wrote into its names
    return " ".join("; ".join(part for part in (registered, record.reason) if part).split())


def _with_mend(row: str, mend: str) -> Iterator[str]:
    yield row
    if mend:
        yield f"    => {mend}"


COMMAND = Command(name="plugins", help="every plugin and what became of it", run=run)
