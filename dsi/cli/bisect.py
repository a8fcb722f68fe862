"""`dsi bisect`: the first layer and place where an optimized model and stock part ways."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import attrs

from dsi.cli.command import Answer, Command
from dsi.config import InferenceConfig, load_config
from dsi.policy import Policy
from dsi.registry import Registry


def run(args: argparse.Namespace) -> Answer:
    """The finding; exit code 1 where something differs."""
    # a wrong option is found before torch is imported
    settings = load_config(None, {"dtype": args.dtype})
    policy = _policy(args.policy)
    # read when huggingface_hub is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    from dsi.drafting import bisect

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, weights = _model(args.model, settings)
    found = bisect(model, policy, allowed=args.allowed)
    data: dict[str, Any] = {**attrs.asdict(found), "weights": weights}
    # JSON has no infinity
    data["measured"] = found.measured if found.measured < float("inf") else None
    return Answer(text=f"{found}\n  {weights}", data=data, code=0 if found.equal else 1)


def _policy(given: str | None) -> Policy | str | None:
    if given is None or not given.endswith(".py"):
        Registry.load().resolve(given)
        return given
    from dsi.drafting.policy_file import load_file

    return load_file(Path(given))


def _model(given: str, settings: InferenceConfig) -> tuple[Any, str]:
    """(the model, what its weights are)."""
    from dsi.skeleton import build_skeleton, find_config

    skeleton: Any = build_skeleton(given)
    path = find_config(given)
    dtype = settings.dtype
    if Path(given).is_dir() and any(path.parent.glob("*.safetensors")):
        found = type(skeleton).from_pretrained(path.parent, dtype=dtype or "auto", local_files_only=True)
        return found.eval(), f"weights of {path.parent}"
    from dsi.drafting.norms import epsilons
    from dsi.drafting.specimen import Species

    model = Species.of(skeleton, epsilons).specimen().model
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model, "random weights in a small model of the config's classes"


def _arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODEL", help="a folder with weights; or a config, for random weights in a small model"
    )
    command.add_argument("--policy", metavar="PLUGIN:NAME|FILE.py", help="a registered policy, or a file with one")
    command.add_argument("--dtype", help="float16, bfloat16 or float32")
    command.add_argument("--allowed", type=float, help="largest difference as a share of the largest value")


COMMAND = Command(
    name="bisect", help="the first layer and place where a policy and stock part ways", run=run, arguments=_arguments
)
