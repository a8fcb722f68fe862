"""What the commands about a MODEL share: their arguments, the model without weights, the plan, the exit code."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from dsi.config import InferenceConfig, load_config
from dsi.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from dsi.plans import Plan


def add_arguments(command: argparse.ArgumentParser) -> None:
    """MODEL and the options that a plan depends on."""
    command.add_argument("model", metavar="MODEL", help="a config.json, its folder, or a model id in the local cache")
    command.add_argument("--dtype", help="cast to float16, bfloat16 or float32")
    command.add_argument("--policy", metavar="PLUGIN:NAME", help="use this policy and no other")
    command.add_argument(
        "--strict", action="store_true", help="exit with 1 where something claimed would be left alone"
    )


def prepare(args: argparse.Namespace) -> tuple[nn.Module, InferenceConfig, Registry]:
    """What every command about a MODEL starts from; a wrong option is found before torch is imported."""
    config = load_config(None, {"dtype": args.dtype, "injection_policy": args.policy, "strict": args.strict})
    registry = Registry.load()
    registry.resolve(config.injection_policy)
    # read when huggingface_hub is imported; a config may name a backbone that transformers would fetch
    os.environ["HF_HUB_OFFLINE"] = "1"
    from dsi.skeleton import build_skeleton

    return build_skeleton(args.model), config, registry


def plan_of(model: nn.Module, config: InferenceConfig, registry: Registry) -> Plan:
    """The plan for a model whose weights are not there."""
    from dsi.planner import make_plan

    return make_plan(model, config, registry, assume_loaded=True)


def exit_code(config: InferenceConfig, plan: Plan) -> int:
    """1 where `init_inference` would refuse under strict."""
    passed_over = [one for one in plan.left if one.reason.code != "no_policy"]
    return 1 if config.strict and (passed_over or not plan.blocks) else 0
