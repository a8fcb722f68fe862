"""`dsi plan`: what `init_inference` would do to a model."""

from __future__ import annotations

import argparse

from dsi.cli.command import Answer, Command
from dsi.cli.model import add_arguments, exit_code, plan_of, prepare


def run(args: argparse.Namespace) -> Answer:
    """The plan, and 1 where strict would refuse."""
    model, config, registry = prepare(args)
    plan = plan_of(model, config, registry)
    return Answer(text=plan.table(), data=plan.to_dict(), code=exit_code(config, plan))


COMMAND = Command(name="plan", help="what init_inference would do to a model", run=run, arguments=add_arguments)
