"""The command line: one parser for every command, and one way to print what a command answers.

    dsi plugins           every plugin and what became of it
    dsi plan MODEL        what init_inference would do to the model
    dsi explain MODEL     which policies claim its layers, and why one was chosen and the others were not
    dsi check POLICY      hold a policy to the conformance kit
    dsi new NAME          write a plugin package to be filled in
    dsi draft MODEL       propose a policy for a model that none knows
    dsi bisect MODEL      the first layer and place where a policy and stock part ways
    dsi tune MODEL        measure the launch settings of its decode step on this device

Each takes `--json`. Exit codes: 0 fine, 1 refused, 2 the command line is wrong, 3 the environment lacks something.
torch and transformers are imported for a MODEL only, and never to print help or plugins.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import metadata

from dsi.cli import bisect, check, draft, explain, new, plan, plugins, tune
from dsi.cli.command import Answer, Command
from dsi.errors import AmbiguousPolicyError, ConfigError, DsiError, PluginError, UnknownPolicyError

COMMANDS: tuple[Command, ...] = (
    plugins.COMMAND,
    plan.COMMAND,
    explain.COMMAND,
    check.COMMAND,
    new.COMMAND,
    draft.COMMAND,
    bisect.COMMAND,
    tune.COMMAND,
)

# the first class that fits decides
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 2),
    (UnknownPolicyError, 2),
    (AmbiguousPolicyError, 1),
    (PluginError, 3),
    (DsiError, 1),
    (ImportError, 3),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code.

    Args:
        argv: the arguments after the program's name; None takes them from `sys.argv`.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        answer: Answer = args.run(args)
    except tuple(cls for cls, _ in _EXIT_CODES) as error:
        answer = _failed(error)
        if not args.json:
            print(f"dsi: {answer.text}", file=sys.stderr)
            return answer.code
    print(json.dumps(answer.data, indent=2) if args.json else answer.text)
    return answer.code


def _failed(error: Exception) -> Answer:
    code = next(code for cls, code in _EXIT_CODES if isinstance(error, cls))
    data = {"error": {"type": type(error).__name__, "message": str(error)}}
    return Answer(text=str(error), data=data, code=code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsi", description="Fused inference for models you already loaded.")
    parser.add_argument("--version", action="version", version=f"dsi {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for one in COMMANDS:
        command = commands.add_parser(one.name, help=one.help)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=one.run)
        one.arguments(command)
    return parser


def _version() -> str:
    try:
        return metadata.version("dsi")
    except metadata.PackageNotFoundError:
        return "(not installed)"
