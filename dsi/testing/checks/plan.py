"""Does the policy describe the layer, and does the plan tell the truth?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from dsi.containers.conv import FusedConv
from dsi.containers.linear import FusedLinear
from dsi.containers.ops import NormOp
from dsi.fit import class_name
from dsi.plans import BlockPlan, SlotPlan
from dsi.policy import Block
from dsi.testing.checks.decoding import stepped
from dsi.testing.compare import check_same, forward
from dsi.testing.report import Failed, Outcome, failed, passed
from dsi.testing.subject import Subject, Twins


def applies(subject: Subject) -> Outcome:
    """The policy can be applied: every layer of the classes that it claims is replaced."""
    if subject.fault:
        return failed(
            f"the policy cannot be applied: {' '.join(subject.fault.split())}",
            measured="nothing replaced, or something left",
            allowed="every claimed layer replaced",
            mend="correct the policy; or give a config of a variant that it takes, in a PolicyConformance test",
        )
    return passed(f"{len(subject.plan.blocks)} layers are replaced")


# --- parameters -------------------------------------------------------------------------------------------------------


def parameters_once(subject: Subject) -> Outcome:
    """Every parameter of a layer feeds one slot or is ignored by name, and what is ignored takes no part."""
    layers = list(subject.layers(subject.stock()))
    for path, layer, block in layers:
        faults = list(_uncounted(layer, block))
        if faults:
            raise Failed(
                f"{path}: {'; '.join(faults)}",
                measured=f"{len(faults)} paths",
                allowed="each parameter once",
                mend="give each parameter one slot, or name it in Block.ignore where it takes no part",
            )
    _check_ignored(subject)
    count = sum(len(list(layer.parameters())) for _, layer, _ in layers)
    return passed(f"{count} parameters are read once", measured=count, allowed=count)


def _uncounted(layer: nn.Module, block: Block) -> Iterator[str]:
    readers: Counter[str] = Counter()
    modules = dict(layer.named_modules())
    for path in (*(path for slot in block.slots.values() for path in slot.sources()), *block.ignore):
        if path not in modules:
            if not _is_empty(layer, path):
                yield f"{path} is no module of the layer"
            continue
        prefix = f"{path}." if path else ""
        readers.update(f"{prefix}{name}" for name, _ in modules[path].named_parameters(remove_duplicate=False))
    for name, _ in layer.named_parameters(remove_duplicate=False):
        if readers[name] != 1:
            yield f"{name} is read {readers[name]} times"


def _is_empty(layer: nn.Module, path: str) -> bool:
    """Whether this layer has None on the way to a place."""
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, name, layer)
        if found is None:
            return True
    return False


def _check_ignored(subject: Subject) -> None:
    """Other values of what is ignored must not change what stock computes."""
    model = subject.fresh()
    ignored = [
        parameter
        for _, layer, block in subject.layers(model)
        for path in block.ignore
        for parameter in layer.get_submodule(path).parameters()
    ]
    if not ignored:
        return
    inputs = subject.inputs(2, 7)
    with torch.no_grad():
        for parameter in ignored:
            parameter.add_(1.0)
    check_same(
        forward(model, inputs),
        forward(subject.stock(), inputs),
        0.0,
        what="what Block.ignore names takes part in what the layer computes",
        mend="give it a slot",
    )


# --- the plan ---------------------------------------------------------------------------------------------------------

_LIES = "what a container holds and runs must be what the plan says; look at its finish() and forward()"


def plan_is_true(subject: Subject) -> Outcome:
    """What the plan says stands on the model, and the fused path runs, once a layer and call."""
    pair = subject.twins()
    for block in pair.engine.plan.blocks:
        faults = list(_untrue(pair.model, block))
        if faults:
            raise Failed(
                f"{block.path}: {'; '.join(faults)}",
                measured=f"{len(faults)} differences",
                allowed="what the plan says",
                mend=_LIES,
            )
    _check_left(subject)
    calls = sum(_count_calls(subject, what, twins, run, times) for what, twins, run, times in _runs(subject))
    return passed(f"{len(pair.containers)} layers are as planned, {calls} fused calls")


_Run = tuple[str, Twins, Callable[[], Any], int]


def _runs(subject: Subject) -> Iterator[_Run]:
    """(what, whose containers, the calls, how many forwards they are): in every dtype, and over a filled cache."""
    pair = subject.twins()
    padded = subject.inputs(3, 7, "ragged")
    yield "a forward", pair, lambda: forward(pair.model, subject.inputs(1, 6)), 1
    yield "a forward with padding", pair, lambda: forward(pair.model, padded), 1
    if subject.decodes:
        ids = subject.inputs(2, 7)["input_ids"]
        yield "a prompt, a second piece, a token", pair, lambda: stepped(pair.model, ids, (3, 6, 7)), 3
    for dtype in (torch.bfloat16, torch.float16):
        half = subject.twins(dtype=dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in padded.items()}
        yield f"a forward in {dtype}", half, partial(forward, half.model, given), 1


def _count_calls(subject: Subject, what: str, pair: Twins, run: Callable[[], Any], times: int) -> int:
    before = pair.calls()
    run()
    fused, stock = (after - one for after, one in zip(pair.calls(), before, strict=True))
    wanted = times * len(pair.containers)
    if (fused, stock) != (wanted, 0):
        raise Failed(
            f"{what}: not every layer took the fused path",
            measured=f"{fused} fused and {stock} stock calls",
            allowed=f"{wanted} fused and 0 stock calls",
            mend="name the caller's arguments in Call (mask, cache, rope, free); " + _LIES,
        )
    return fused


def _untrue(model: nn.Module, block: BlockPlan) -> Iterator[str]:
    container = model.get_submodule(block.path)
    if not isinstance(container, block.fit.container):
        yield f"a {type(container).__name__} stands there, not a {block.fit.container.__name__}"
        return
    if f"{container.original_class.__module__}:{container.original_class.__qualname__}" != block.original:
        yield f"it stands for {container.original_class.__qualname__}, not for {block.original}"
    if container.ops_name != block.ops:
        yield f"it runs {container.ops_name} operations, not {block.ops}"
    places = dict(container._modules)
    for slot in block.slots:
        yield from _untrue_slot(places.pop(slot.place, None), slot)
    if places:
        yield f"it also holds {', '.join(places)}"


def _untrue_slot(module: nn.Module | None, slot: SlotPlan) -> Iterator[str]:
    if module is None:
        yield f"{slot.place} is empty"
    elif isinstance(module, FusedLinear):
        shape, form = (module.out_features, module.in_features), module.form
        if (shape, form) != (slot.shape, slot.form):
            yield f"{slot.place} is {shape} {form}, not {slot.shape} {slot.form}"
        if tuple(one.path for one in module.sources) != slot.sources:
            yield f"{slot.place} comes from {[one.path for one in module.sources]}, not {list(slot.sources)}"
    elif isinstance(module, FusedConv):
        found, planned = (module.shape, module.form, (module.path,)), (tuple(slot.shape), slot.form, slot.sources)
        if found != planned:
            yield f"{slot.place} is {found}, not {planned}"
    elif isinstance(module, NormOp) and slot.form != "shared":
        yield f"{slot.place} is a norm, not {slot.form}"


def _check_left(subject: Subject) -> None:
    """What is left alone is of the class that it was."""
    pair = subject.twins()
    replaced = tuple(block.path for block in pair.engine.plan.blocks)
    found = dict(pair.model.named_modules())
    for path, module in pair.stock.named_modules():
        if path.startswith(tuple(f"{one}." for one in replaced)) or path in replaced:
            continue
        if path not in found or class_name(found[path]) != class_name(module):
            raise Failed(
                f"{path or 'the model'} is another class than before",
                measured=type(found.get(path)).__name__,
                allowed=type(module).__name__,
                mend="a container stands in the place of its own layer and touches nothing else",
            )
