"""`dsi plugins`: every plugin and what became of it."""

from __future__ import annotations

import argparse

import attrs

from dsi.cli.command import Answer, Command, columns
from dsi.registry import Record, Registry


def run(_args: argparse.Namespace) -> Answer:
    """The records of the registry, one a line."""
    registry = Registry.load()
    rows = [(one.name, _installed(one), one.state, _said(one)) for one in registry.records]
    data = {"plugins": [attrs.asdict(one) for one in registry.records], "digest": registry.digest()}
    return Answer(text=columns(rows) or "no plugins are installed", data=data)


def _installed(record: Record) -> str:
    return f"{record.distribution} {record.version}".strip() or "-"


def _said(record: Record) -> str:
    registered = ", ".join((*record.policies, *record.containers, *record.quantizers, *record.checks))
    return "; ".join(part for part in (registered, record.reason) if part)


COMMAND = Command(name="plugins", help="every plugin and what became of it", run=run)
