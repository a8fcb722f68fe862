"""What a command of the command line is, and what it answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Answer:
    """What a command found: as text, as JSON-able data, and the exit code."""

    text: str
    data: Any
    code: int = 0


@attrs.frozen(kw_only=True)
class Command:
    """One command.

    Args:
        name, help: as the command line shows them.
        run: gives the answer; what it raises is printed by its message, with the exit code of its class.
        arguments: adds the command's own arguments to its parser, which has `--json` already.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace], Answer]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda _parser: None


def columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines, with their cells in columns; the last column is free text and is not padded."""
    if not rows:
        return ""
    widths = [max(len(cell) for cell in column) for column in list(zip(*rows, strict=True))[:-1]]
    lines = ("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
