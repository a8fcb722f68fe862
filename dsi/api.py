"""The two functions that most users call: `plan` and `init_inference`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from dsi.config import InferenceConfig, load_config
from dsi.containers import StandIn
from dsi.engine import InferenceEngine, attach_session
from dsi.errors import InjectionError, UnsupportedModelError
from dsi.inject import inject
from dsi.parallel import Group
from dsi.planner import Plan, make_plan
from dsi.registry import Registry

ConfigSource = Mapping[str, Any] | str | os.PathLike[str] | None


def plan(model: nn.Module, config: ConfigSource = None, **kwargs: Any) -> Plan:
    """What `init_inference` with the same arguments would do; the model is not touched.

    Args:
        model: a loaded model.
        config, **kwargs: see `init_inference`.

    Returns:
        The plan; `print(plan)` shows it as a table, `plan.to_dict()` gives JSON-able data.

    Raises:
        ConfigError, PluginError, PolicyError, UnsupportedModelError: see `dsi.errors`.
    """
    return make_plan(model, load_config(config, kwargs), Registry.load())


def init_inference(model: nn.Module, config: ConfigSource = None, **kwargs: Any) -> InferenceEngine:
    """Replace a loaded model's layers by fused ones, in place.

    Args:
        model: a loaded model in eval mode, on the device where it shall run. It is changed in place and stays what it
            is:
            same class, same call, same `generate`, same `state_dict`.
        config: a dict, the path of a JSON file, or None.
        **kwargs: options, alone or beside `config`; see `dsi.InferenceConfig` for their names and defaults.

    Returns:
        The engine; `engine.module is model`, `engine.plan` says what was done, `engine.restore()` takes it back.

    Raises:
        ConfigError: an option is unknown, malformed, conflicting or not supported; every fault is listed.
        PluginError, PolicyError: a policy is wrong or the choice among several is open.
        UnsupportedModelError: with `strict=True`, something that a policy claims would be left alone, or nothing is
            claimed.
        InjectionError: a step failed, or the model is optimized already. In every case the model is what it was.
    """
    return optimize(model, load_config(config, kwargs))


def optimize(model: nn.Module, settings: InferenceConfig, group: Group | None = None) -> InferenceEngine:
    """`init_inference` with the options read; as one rank of a group, where one is given.

    Args:
        model: see `init_inference`.
        settings: the options.
        group: the ranks over which the layers are split.

    Raises:
        DsiError: see `init_inference` and `dsi.inject.inject`.
    """
    if isinstance(model, nn.Module) and (where := _optimized(model)) is not None:
        raise InjectionError(f"{where} is optimized already", hint="call restore() on its engine first")
    made = make_plan(model, settings, Registry.load())
    _complain(made, settings)
    session = None

    def attach(injection: Any) -> None:
        nonlocal session
        session = attach_session(model, injection, settings)

    injection = inject(model, made, settings, attach, group)
    assert session is not None
    return InferenceEngine(model, injection, settings, session)


def _optimized(model: nn.Module) -> str | None:
    """The model, or the first part of it, that another engine has changed."""
    for path, module in model.named_modules():
        if "_dsi" in module.__dict__ or isinstance(module, StandIn):
            return f"{path} of {type(model).__name__}" if path else type(model).__name__
    return None


def _complain(made: Plan, settings: InferenceConfig) -> None:
    """What cannot be had, or was not: an error where it was asked for, a warning where it is everything."""
    if settings.enable_cuda_graph is True and not made.device.startswith("cuda"):
        raise UnsupportedModelError(
            f"enable_cuda_graph=True, and the model is on {made.device}",
            hint="move the model to CUDA first, or leave the option out",
        )
    if not settings.replace_with_kernel_inject:
        return
    if settings.strict:
        passed_over = [f"{x.path}: {x.reason.code}: {x.reason.text}" for x in made.left if x.reason.code != "no_policy"]
        if not made.blocks or passed_over:
            raise UnsupportedModelError(
                "strict=True, and these would be left alone:\n  " + "\n  ".join(passed_over or [made.why_nothing])
            )
    if not made.blocks:
        warnings.warn(f"dsi replaced nothing: {made.why_nothing}", UserWarning, stacklevel=4)
