"""`dsi explain`: which policies claim a model's layers, and why one was chosen and the others were not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from dsi.cli.command import Answer, Command
from dsi.cli.model import add_arguments, exit_code, plan_of, prepare
from dsi.config import InferenceConfig
from dsi.errors import AmbiguousPolicyError
from dsi.registry import Choice, Registry

if TYPE_CHECKING:
    from torch import nn


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


def run(args: argparse.Namespace) -> Answer:
    """A verdict on every candidate for every claimed layer class, then the plan."""
    model, config, registry = prepare(args)
    claims = [_claim(registry, config, *found) for found in _claimed(model, registry)]
    text = [line for claim in claims for line in _claim_lines(claim)] or ["no policy claims a layer of this model"]
    data: dict[str, Any] = {"layers": [attrs.asdict(claim) for claim in claims]}
    if any(claim.error for claim in claims):
        return Answer(text="\n".join(text), data=data, code=1)
    plan = plan_of(model, config, registry)
    return Answer(
        text="\n".join([*text, "", plan.table()]), data={**data, "plan": plan.to_dict()}, code=exit_code(config, plan)
    )


def _claimed(model: nn.Module, registry: Registry) -> Iterator[tuple[str, str, Any, tuple[str, ...]]]:
    """Each claimed layer class, once for each class that holds it and config that it stands under, with its paths."""
    from dsi.planner import walk

    found: dict[tuple[str, str, int], tuple[Any, list[str]]] = {}
    for path, module, config, holder in walk(model):
        layer = f"{type(module).__module__}:{type(module).__qualname__}"
        if registry.blocks_for(layer, holder):
            found.setdefault((layer, holder, id(config)), (config, []))[1].append(path)
    for (layer, holder, _), (config, paths) in found.items():
        yield layer, holder, config, tuple(paths)


def _claim(
    registry: Registry, config: InferenceConfig, layer: str, holder: str, model_config: Any, paths: tuple[str, ...]
) -> _Claim:
    try:
        choice, error = registry.choose(layer, model_config, config.injection_policy, holder=holder), ""
    except AmbiguousPolicyError as tie:
        choice, error = Choice(), str(tie)
    rejected = {one.full_name: one for one in choice.rejected}
    verdicts = []
    for full_name, policy, _ in registry.blocks_for(layer, holder):
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


COMMAND = Command(
    name="explain",
    help="which policies claim a model's layers, and why one was chosen",
    run=run,
    arguments=add_arguments,
)
