"""`dsi check`: hold one registered policy to the conformance kit, on a tiny model that is built here."""

from __future__ import annotations

import argparse
import os

from dsi.cli.command import Answer, Command
from dsi.registry import Registry


def _arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("policy", metavar="PLUGIN:POLICY", help="the full name of a registered policy")
    command.add_argument("--require", choices=("run", "all"), default="run", help="all: what is not run is a failure")
    command.add_argument(
        "--only", metavar="CHECK", action="append", help="this check alone; may be given several times"
    )


def _check(args: argparse.Namespace) -> Answer:
    registry = Registry.load()
    # a wrong name is found before torch is imported
    policy, _ = registry.resolve(args.policy)
    assert policy is not None
    # read when huggingface_hub is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    from dsi.testing import conformance, tiny_config

    # stock's own remarks on tiny models are not about the policy
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report = conformance(
        args.policy,
        lambda: tiny_config(policy),
        require=args.require,
        only=args.only,
        registry=registry,
    )
    return Answer(text=str(report), data=report.to_dict(), code=0 if report.ok else 1)


COMMAND = Command(name="check", help="hold a policy to the conformance kit", run=_check, arguments=_arguments)
