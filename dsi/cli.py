"""The command `dsi`: what is installed, what would become of a model, and why.

    dsi plugins           every plugin and what became of it
    dsi plan MODEL        what init_inference would do to the model
    dsi explain MODEL     which policies claim its layers, and why one was chosen and the others were not

Each takes `--json`. Exit codes: 0 fine, 1 refused, 2 the command line is wrong, 3 the environment lacks something.
torch and transformers are imported for a MODEL only, and never to print help or plugins.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import attrs

from dsi.config import InferenceConfig, load_config
from dsi.errors import AmbiguousPolicyError, ConfigError, DsiError, PluginError, UnknownPolicyError
from dsi.registry import Choice, Record, Registry

if TYPE_CHECKING:
    from torch import nn

    from dsi.planner import Plan

# the first class that fits decides
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 2),
    (UnknownPolicyError, 2),
    (AmbiguousPolicyError, 1),
    (PluginError, 3),
    (DsiError, 1),
    (ImportError, 3),
)


@attrs.frozen(kw_only=True)
class _Answer:
    """What a command found: as text, as JSON-able data, and the exit code."""

    text: str
    data: Any
    code: int = 0


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
        answer: _Answer = args.run(args)
    except tuple(cls for cls, _ in _EXIT_CODES) as error:
        answer = _failed(error)
        if not args.json:
            print(f"dsi: {answer.text}", file=sys.stderr)
            return answer.code
    print(json.dumps(answer.data, indent=2) if args.json else answer.text)
    return answer.code


def _failed(error: Exception) -> _Answer:
    code = next(code for cls, code in _EXIT_CODES if isinstance(error, cls))
    data = {"error": {"type": type(error).__name__, "message": str(error)}}
    return _Answer(text=str(error), data=data, code=code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsi", description="Fused inference for models you already loaded.")
    parser.add_argument("--version", action="version", version=f"dsi {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    plugins = commands.add_parser("plugins", help="every plugin and what became of it")
    plan = commands.add_parser("plan", help="what init_inference would do to a model")
    explain = commands.add_parser("explain", help="which policies claim a model's layers, and why one was chosen")
    for command, run in ((plugins, _plugins), (plan, _plan), (explain, _explain)):
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    for command in (plan, explain):
        command.add_argument(
            "model", metavar="MODEL", help="a config.json, its folder, or a model id in the local cache"
        )
        command.add_argument("--dtype", help="cast to float16, bfloat16 or float32")
        command.add_argument("--policy", metavar="PLUGIN:NAME", help="use this policy and no other")
        command.add_argument(
            "--strict", action="store_true", help="exit with 1 where something claimed would be left alone"
        )
    return parser


def _version() -> str:
    try:
        return metadata.version("dsi")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _plugins(_args: argparse.Namespace) -> _Answer:
    registry = Registry.load()
    rows = [(one.name, _installed(one), one.state, _said(one)) for one in registry.records]
    data = {"plugins": [attrs.asdict(one) for one in registry.records], "digest": registry.digest()}
    return _Answer(text=_columns(rows) or "no plugins are installed", data=data)


def _installed(record: Record) -> str:
    return f"{record.distribution} {record.version}".strip() or "-"


def _said(record: Record) -> str:
    registered = ", ".join((*record.policies, *record.containers, *record.quantizers, *record.checks))
    return "; ".join(part for part in (registered, record.reason) if part)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    # the last column is free text and is not padded
    widths = [max(len(cell) for cell in column) for column in list(zip(*rows, strict=True))[:-1]]
    lines = ("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _prepare(args: argparse.Namespace) -> tuple[nn.Module, InferenceConfig, Registry]:
    """What both model commands start from; a wrong option is found before torch is imported."""
    config = load_config(None, {"dtype": args.dtype, "injection_policy": args.policy, "strict": args.strict})
    registry = Registry.load()
    registry.resolve(config.injection_policy)
    # read when huggingface_hub is imported; a config may name a backbone that transformers would fetch
    os.environ["HF_HUB_OFFLINE"] = "1"
    from dsi.skeleton import build_skeleton

    return build_skeleton(args.model), config, registry


def _plan(args: argparse.Namespace) -> _Answer:
    model, config, registry = _prepare(args)
    plan = _make_plan(model, config, registry)
    return _Answer(text=plan.table(), data=plan.to_dict(), code=_code(config, plan))


def _make_plan(model: nn.Module, config: InferenceConfig, registry: Registry) -> Plan:
    from dsi.planner import make_plan

    return make_plan(model, config, registry, assume_loaded=True)


def _code(config: InferenceConfig, plan: Plan) -> int:
    """1 where `init_inference` would refuse under strict."""
    passed_over = [one for one in plan.left if one.reason.code != "no_policy"]
    return 1 if config.strict and (passed_over or not plan.blocks) else 0


@attrs.frozen(kw_only=True)
class _Verdict:
    """What became of one candidate for a layer class."""

    full_name: str
    distribution: str
    version: str
    priority: int
    chosen: bool
    stage: str = ""
    reason: str = ""
    hint: str = ""


@attrs.frozen(kw_only=True)
class _Claim:
    """One layer class under one config, with everyone who claims it."""

    layer: str
    paths: tuple[str, ...]
    verdicts: tuple[_Verdict, ...]
    error: str = ""


def _explain(args: argparse.Namespace) -> _Answer:
    model, config, registry = _prepare(args)
    claims = [_claim(registry, config, layer, *found) for layer, found in _claimed(model, registry)]
    text = [line for claim in claims for line in _claim_lines(claim)] or ["no policy claims a layer of this model"]
    data: dict[str, Any] = {"layers": [attrs.asdict(claim) for claim in claims]}
    if any(claim.error for claim in claims):
        return _Answer(text="\n".join(text), data=data, code=1)
    plan = _make_plan(model, config, registry)
    return _Answer(
        text="\n".join([*text, "", plan.table()]), data={**data, "plan": plan.to_dict()}, code=_code(config, plan)
    )


def _claimed(model: nn.Module, registry: Registry) -> Iterator[tuple[str, tuple[Any, tuple[str, ...]]]]:
    """Each claimed layer class, once for each config that its instances stand under, with their paths."""
    configs: dict[str, Any] = {}
    found: dict[tuple[str, int], list[str]] = {}
    for path, module in model.named_modules():
        own = getattr(module, "config", None)
        configs[path] = own if own is not None else configs.get(path.rpartition(".")[0])
        layer = f"{type(module).__module__}:{type(module).__qualname__}"
        if registry.blocks_for(layer):
            found.setdefault((layer, id(configs[path])), []).append(path)
    for (layer, _), paths in found.items():
        yield layer, (configs[paths[0]], tuple(paths))


def _claim(
    registry: Registry, config: InferenceConfig, layer: str, model_config: Any, paths: tuple[str, ...]
) -> _Claim:
    try:
        choice, error = registry.choose(layer, model_config, config.injection_policy), ""
    except AmbiguousPolicyError as tie:
        choice, error = Choice(), str(tie)
    rejected = {one.full_name: one for one in choice.rejected}
    verdicts = []
    for full_name, policy, _ in registry.blocks_for(layer):
        record = next(one for one in registry.records if one.name == full_name.partition(":")[0])
        out = rejected.get(full_name)
        verdicts.append(
            _Verdict(
                full_name=full_name,
                distribution=record.distribution,
                version=record.version,
                priority=policy.priority,
                chosen=full_name == choice.full_name,
                **(attrs.asdict(out, filter=lambda field, _: field.name != "full_name") if out is not None else {}),
            )
        )
    return _Claim(layer=layer, paths=paths, verdicts=tuple(verdicts), error=error)


def _claim_lines(claim: _Claim) -> Iterator[str]:
    first, last = claim.paths[0], claim.paths[-1]
    yield f"{claim.layer}: {first}" + (f" .. {last}, {len(claim.paths)} layers" if first != last else "")
    for one in claim.verdicts:
        who = f"{one.full_name} ({f'{one.distribution} {one.version}'.strip() or '-'}, priority {one.priority})"
        verdict = "chosen" if one.chosen else f"not chosen, {one.stage}: {one.reason}" if one.stage else "undecided"
        yield f"  {'*' if one.chosen else '-'} {who}: {verdict}"
        if one.hint:
            yield f"      {one.hint}"
    if claim.error:
        yield f"  => {claim.error}"
