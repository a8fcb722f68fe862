"""`dsi plugins`: every plugin and what became of it; with `--probe`, what loading it does to a process."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs

from dsi.cli.command import Answer, Command, columns
from dsi.registry import Record, Registry


def run(args: argparse.Namespace) -> Answer:
    """The records of the registry, one a line, each with what would mend it."""
    if args.probe:
        return _probe(args.timeout)
    registry = Registry.load()
    rows = [(one.name, _installed(one), one.state, _said(one)) for one in registry.records]
    data = {"plugins": [attrs.asdict(one) for one in registry.records], "digest": registry.digest()}
    return Answer(text=_lines(rows, (one.mend for one in registry.records)), data=data)


def _installed(one: Any) -> str:
    return f"{one.distribution} {one.version}".strip() or "-"


def _said(record: Record) -> str:
    registered = ", ".join((*record.policies, *record.containers, *record.quantizers, *record.checks))
    return "; ".join(part for part in (registered, record.reason) if part)


def _lines(rows: Sequence[Sequence[str]], mends: Iterable[str]) -> str:
    # one line each, whatever a plugin wrote into its names
    flat = [tuple(" ".join(cell.split()) for cell in row) for row in rows]
    text = [line for row, mend in zip(columns(flat).splitlines(), mends, strict=True) for line in _with_mend(row, mend)]
    return "\n".join(text) or "no plugins are installed"


def _with_mend(row: str, mend: str) -> Iterator[str]:
    yield row
    if mend:
        yield f"    => {mend}"


def _probe(timeout: float) -> Answer:
    """Each plugin loaded in a process of its own; 1 where one harms its host."""
    from dsi.probe import probe

    found = probe(timeout=timeout)
    rows = [
        (one.name, _installed(one), one.verdict, f"{one.seconds * 1000:.0f} ms", f"{one.modules} modules", one.reason)
        for one in found
    ]
    text = _lines(rows, (one.mend for one in found))
    code = 0 if all(one.good or one.verdict == "warned" for one in found) else 1
    return Answer(text=text, data={"plugins": [attrs.asdict(one) for one in found]}, code=code)


def _arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--probe", action="store_true", help="load each in a process of its own, and say what that does to the process"
    )
    command.add_argument(
        "--timeout", type=float, default=20.0, metavar="SECONDS", help="with --probe: what one may take (20)"
    )


COMMAND = Command(name="plugins", help="every plugin and what became of it", run=run, arguments=_arguments)
