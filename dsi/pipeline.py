"""Whole pipelines: several models, and the code between them that stays what it is.

A pipeline is known by its form, without importing anything: no module itself, it has `components` by name, some of them
modules. Each of those that a policy claims is optimized in place, all of them or none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from dsi.config import InferenceConfig
from dsi.engine import Handle, InferenceEngine, already_optimized, carry_out
from dsi.errors import DsiError, InjectionError, RestoreError, UnsupportedModelError
from dsi.fit import class_name
from dsi.planner import make_plan
from dsi.plans import LeftPlan, Plan
from dsi.registry import Registry
from dsi.report import size


class Pipeline(Protocol):
    """What is taken for a pipeline."""

    @property
    def components(self) -> dict[str, Any]:
        """Modules, and what else it is made of, by name."""


# what takes other components: of pipelines, and of modular ones
_TAKES = ("register_modules", "register_components")


def is_pipeline(thing: Any) -> bool:
    """Whether it is no module and has components, as pipelines of diffusers have them."""
    if isinstance(thing, nn.Module | type):
        return False
    return hasattr(type(thing), "components") and any(callable(getattr(thing, name, None)) for name in _TAKES)


@attrs.frozen(kw_only=True, eq=False)
class ComponentPlan:
    """What becomes of one component.

    Args:
        name: in the pipeline.
        original: its class, "module:Class".
        bytes: of its weights.
        plan: what is done to it; None where it is left alone.
        reason: why none of its layers is replaced; "" where some are.
        left: what stays as it is in it, and why.
    """

    name: str
    original: str
    bytes: int
    plan: Plan | None
    reason: str = ""
    left: tuple[LeftPlan, ...] = ()


@attrs.frozen(kw_only=True, eq=False)
class PipelinePlan:
    """What `init_inference` would do to a pipeline.

    Args:
        pipeline: its class, "module:Class".
        components: those that are modules, in the pipeline's order.
        refusals: why nothing is done at all; empty where it is.
    """

    pipeline: str
    components: tuple[ComponentPlan, ...]
    refusals: tuple[str, ...] = ()

    @property
    def plans(self) -> Mapping[str, Plan]:
        """The plans of the components that are changed, by name."""
        return MappingProxyType({one.name: one.plan for one in self.components if one.plan is not None})

    @property
    def restorable(self) -> bool:
        """Whether `restore()` can give every component back bit for bit."""
        return all(plan.restorable for plan in self.plans.values())

    @property
    def why_nothing(self) -> str:
        """The reasons, where no layer of any component is replaced; "" otherwise."""
        if any(plan.blocks for plan in self.plans.values()):
            return ""
        return "; ".join(f"{one.name}: {one.reason}" for one in self.components) or "no component is a module"

    def table(self) -> str:
        """A line a component, and why, then the plans of those that are changed."""
        lines = [f"plan for {self.pipeline.rpartition(':')[2]}: {len(self.plans)} components changed"]
        lines += [f"refused: {refusal}" for refusal in self.refusals]
        lines += [_line(one) for one in self.components]
        lines.append(f"restore: {'bit for bit' if self.restorable else 'refused'}")
        for name, plan in self.plans.items():
            lines += ["", f"{name}: {plan.table()}"]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {
            "pipeline": self.pipeline,
            "refusals": list(self.refusals),
            "restorable": self.restorable,
            "components": [
                {
                    "name": one.name,
                    "original": one.original,
                    "bytes": one.bytes,
                    "reason": one.reason,
                    "plan": None if one.plan is None else one.plan.to_dict(),
                }
                for one in self.components
            ],
        }


def _line(one: ComponentPlan) -> str:
    what = f"    {one.name} ({one.original.rpartition(':')[2]}, {size(one.bytes)}): "
    if one.plan is None:
        return what + f"left alone: {one.reason}"
    before, after = (str(dtype).removeprefix("torch.") for dtype in (one.plan.dtype_before, one.plan.dtype_after))
    dtypes = before if before == after else f"{before} -> {after}"
    return (
        what
        + f"{len(one.plan.blocks)} layers replaced, {dtypes} on {one.plan.device}"
        + (f" ({one.reason})" if one.reason else "")
    )


# --- planning ---------------------------------------------------------------------------------------------------------


def plan_pipeline(pipe: Pipeline, settings: InferenceConfig, registry: Registry) -> PipelinePlan:
    """Decide for every component what becomes of it; nothing is touched.

    Args:
        pipe: the pipeline.
        settings: see `dsi.config`.
        registry: the plugins' policies.

    Raises:
        DsiError: see `dsi.planner.make_plan`.
    """
    names: dict[int, str] = {}
    planned = []
    for name, module in modules_of(pipe).items():
        if (first := names.setdefault(id(module), name)) != name:
            reason = f"it is the same module as {first}"
            planned.append(ComponentPlan(name=name, original=class_name(module), bytes=0, plan=None, reason=reason))
        else:
            planned.append(_component(name, module, settings, registry))
    return PipelinePlan(pipeline=class_name(pipe), components=tuple(planned), refusals=tuple(_refusals(pipe)))


def modules_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """A pipeline's components that are modules, by name.

    Raises:
        UnsupportedModelError: the pipeline does not know its components.
    """
    try:
        components = dict(pipe.components)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{class_name(pipe)} does not name its components: {error}") from error
    return {name: one for name, one in components.items() if isinstance(one, nn.Module)}


def _component(name: str, module: nn.Module, settings: InferenceConfig, registry: Registry) -> ComponentPlan:
    held = sum(tensor.nbytes for tensor in module.parameters())
    about: dict[str, Any] = {"name": name, "original": class_name(module), "bytes": held}
    if not any(parameter.is_floating_point() for parameter in module.parameters()):
        return ComponentPlan(**about, plan=None, reason="it has no floating-point parameters")
    made = make_plan(module, settings, registry)
    changed = bool(made.blocks) or made.cast is not None
    return ComponentPlan(**about, plan=made if changed else None, reason=made.why_nothing, left=made.left)


# where torch.compile keeps the module that it was given
_INNER = "_orig_mod"


# --- what stands in the way -------------------------------------------------------------------------------------------


def _refusals(pipe: Pipeline) -> Iterator[str]:
    if getattr(pipe, "_all_hooks", None):
        yield "model offload is on; call pipe.remove_all_hooks() and pipe.to(device) first"
    if getattr(pipe, "hf_device_map", None) is not None:
        yield "the components are mapped to devices; call pipe.reset_device_map() and pipe.to(device) first"
    devices: dict[torch.device, str] = {}
    for name, module in modules_of(pipe).items():
        yield from _module_refusals(name, module)
        for tensor in _weights(module):
            devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        yield f"the components are on different devices ({found}); call pipe.to(device) first"


def _weights(module: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in module.parameters() if parameter.is_floating_point())


def _module_refusals(name: str, root: nn.Module) -> Iterator[str]:
    checks: tuple[Callable[[nn.Module], str], ...] = (_hooked, _adapted, _compiled)
    for check in checks:
        for path, module in root.named_modules():
            if found := check(module):
                yield f"{name}{f'.{path}' if path else ''} {found}"
                break


def _hooked(module: nn.Module) -> str:
    if "_hf_hook" in module.__dict__:
        return "carries an accelerate hook (offload or a device map); call pipe.remove_all_hooks() first"
    hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", None)
    if hooks:
        return f"carries hooks of diffusers ({', '.join(hooks)}); remove them first"
    return ""


def _adapted(module: nn.Module) -> str:
    if type(module).__module__.partition(".")[0] == "peft" or module.__dict__.get("_hf_peft_config_loaded"):
        return "carries adapters of peft; fuse them (pipe.fuse_lora()) and call pipe.unload_lora_weights() first"
    return ""


def _compiled(module: nn.Module) -> str:
    return "is compiled; optimize the pipeline as it was before, and compile then" if _INNER in module._modules else ""


def _complain(made: PipelinePlan, settings: InferenceConfig) -> None:
    """What keeps the plan from being made true, or what was not done though it was asked for: errors.

    Raises:
        UnsupportedModelError: there are such.
    """
    if made.refusals:
        raise UnsupportedModelError(
            f"{made.pipeline} cannot be optimized:\n  " + "\n  ".join(made.refusals),
            hint="nothing was changed",
        )
    for name, plan in made.plans.items():
        if settings.enable_cuda_graph is True and not plan.device.startswith("cuda"):
            raise UnsupportedModelError(
                f"enable_cuda_graph=True, and {name} is on {plan.device}",
                hint="move the pipeline to CUDA first, or leave the option out",
            )
    if not (settings.strict and settings.replace_with_kernel_inject):
        return
    passed_over = [
        f"{one.name}.{left.path}: {left.reason.code}: {left.reason.text}"
        for one in made.components
        for left in one.left
        if left.reason.code != "no_policy"
    ]
    if passed_over or made.why_nothing:
        reasons = passed_over or [made.why_nothing]
        raise UnsupportedModelError("strict=True, and these would be left alone:\n  " + "\n  ".join(reasons))


# --- doing it ---------------------------------------------------------------------------------------------------------


def optimize_pipeline(pipe: Pipeline, settings: InferenceConfig) -> PipelineEngine:
    """`init_inference` of a pipeline, with the options read.

    Args:
        pipe: the pipeline; changed in place.
        settings: the options.

    Raises:
        DsiError: see `dsi.api.init_inference`; no component is changed then.
    """
    modules = modules_of(pipe)
    for name, module in modules.items():
        if (where := already_optimized(module)) is not None:
            raise InjectionError(f"{name}: {where} is optimized already", hint="call restore() on its engine first")
    made = plan_pipeline(pipe, settings, Registry.load())
    _complain(made, settings)
    if made.why_nothing and settings.replace_with_kernel_inject:
        warnings.warn(f"dsi replaced nothing: {made.why_nothing}", UserWarning, stacklevel=3)
    engines: dict[str, InferenceEngine] = {}
    failed: list[tuple[str, DsiError]] = []
    waiting = list(made.plans.items())

    def go_on() -> None:
        # one inside the other: until the last is done, each can be taken back, whatever its cast loses
        if not waiting:
            return
        name, plan = waiting.pop(0)
        try:
            engines[name] = carry_out(modules[name], plan, settings, then=go_on)
        except DsiError as error:
            failed.append((name, error))
            raise

    try:
        go_on()
    except DsiError as error:
        name, first = failed[0]
        raise InjectionError(f"{name}: {first.message}", hint="no component of the pipeline is changed") from error
    ordered = {name: engines[name] for name in made.plans}
    return PipelineEngine(pipe, made, ordered, settings)


class PipelineEngine(Handle):
    """An optimized pipeline. Attributes that the engine has not are the pipeline's own.

    Made by `dsi.init_inference`. As a context manager it gives the original components back at the end.
    """

    def __init__(
        self, pipe: Pipeline, plan: PipelinePlan, engines: Mapping[str, InferenceEngine], config: InferenceConfig
    ) -> None:
        self.module: Any = pipe
        self.plan = attrs.evolve(
            plan,
            components=tuple(
                # an injection may have told its plan more
                attrs.evolve(one, plan=engines[one.name].plan if one.name in engines else one.plan)
                for one in plan.components
            ),
        )
        self.engines = MappingProxyType(dict(engines))
        self.inference_config = config

    @property
    def active(self) -> bool:
        """Whether some component is still changed; False after `restore()`."""
        return any(engine.active for engine in self.engines.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline returns."""
        return self.module(*args, **kwargs)

    def restore(self) -> Any:
        """Give every component back, bit for bit, and return the pipeline. A second call does nothing.

        Raises:
            RestoreError: a cast lost bits that were not kept, and nothing is changed; or a component could not be given
                back, and a second call tries again.
        """
        if self.active and not self.plan.restorable:
            lost = [name for name, plan in self.plan.plans.items() if not plan.restorable]
            raise RestoreError(
                f"the casts of {', '.join(lost)} cannot be undone bit for bit",
                hint='pass keep_original="host" to keep the lost bits in host memory',
            )
        failures: list[tuple[str, RestoreError]] = []
        for name, engine in self.engines.items():
            try:
                engine.restore()
            except RestoreError as error:
                failures.append((name, error))
        if failures:
            words = "; ".join(f"{name}: {error.message}" for name, error in failures)
            raise RestoreError(words, hint=failures[0][1].hint) from failures[0][1]
        return self.module

    def __enter__(self) -> PipelineEngine:
        if not self.plan.restorable:
            raise RestoreError(
                "the end of this block could not undo the casts",
                hint='pass keep_original="host", or do without the with statement',
            )
        return self

    def __repr__(self) -> str:
        state = f"{len(self.engines)} components optimized" if self.active else "restored"
        return f"PipelineEngine({type(self.module).__name__}, {state})"
