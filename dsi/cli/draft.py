"""`dsi draft`: a policy for a model that none knows, found by running candidates against its own layers."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from dsi.cli.command import Answer, Command
from dsi.errors import ConfigError

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def run(args: argparse.Namespace) -> Answer:
    """Write the policy, and say what is sure of it and what is not."""
    if args.name and not _NAME.fullmatch(args.name):
        raise ConfigError([f"--name: {args.name!r} is no name for a policy; use small letters, digits and _"])
    if args.output and Path(args.output).exists():
        raise ConfigError([f"--output: {args.output} is there already; dsi draft overwrites nothing"])
    # read when huggingface_hub is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    from dsi.drafting import draft
    from dsi.skeleton import build_skeleton

    # stock's own remarks on tiny models are not about the policy
    transformers.logging.set_verbosity_error()
    found = draft(build_skeleton(args.model), args.name or "")
    path = Path(args.output or f"{found.policy.name}.py")
    _write(path, found.source)
    lines = [f"wrote {path}: {found.policy.blocks[0].layer}, after {found.trials} candidates", "", "settled"]
    lines += [f"  {one}" for one in found.sure]
    lines += ["", "open", *(f"  {one}" for one in found.unsure)] if found.unsure else []
    lines += ["", f"next: dsi bisect {args.model} --policy {path}; put it into a package (dsi new), and dsi check it"]
    data = {
        "file": str(path),
        "policy": found.policy.name,
        "layer": found.policy.blocks[0].layer,
        "candidates": found.trials,
        "settled": list(found.sure),
        "open": list(found.unsure),
    }
    return Answer(text="\n".join(lines), data=data)


def _write(path: Path, text: str) -> None:
    try:
        # x: what somebody else has written meanwhile is theirs
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError([f"--output: {path} cannot be written: {error.strerror or error}"]) from error


def _arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a config.json, its folder, or a model id in the local cache")
    command.add_argument("--output", metavar="FILE", help="where to write the policy (NAME.py, here)")
    command.add_argument("--name", help="of the policy; made of the architecture's module where left out")


COMMAND = Command(name="draft", help="propose a policy for a model that none knows", run=run, arguments=_arguments)
