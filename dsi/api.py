"""The two functions that most users call: `plan` and `init_inference`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, overload

from torch import nn

from dsi.config import load_config
from dsi.engine import InferenceEngine, optimize
from dsi.pipeline import Pipeline, PipelineEngine, PipelinePlan, is_pipeline, optimize_pipeline, plan_pipeline
from dsi.planner import make_plan
from dsi.plans import Plan
from dsi.registry import Registry

ConfigSource = Mapping[str, Any] | str | os.PathLike[str] | None


@overload
def plan(model: nn.Module, config: ConfigSource = None, **kwargs: Any) -> Plan: ...
@overload
def plan(model: Pipeline, config: ConfigSource = None, **kwargs: Any) -> PipelinePlan: ...
def plan(model: Any, config: ConfigSource = None, **kwargs: Any) -> Plan | PipelinePlan:
    """What `init_inference` with the same arguments would do; the model is not touched.

    Args:
        model: a loaded model, or a diffusers pipeline.
        config, **kwargs: see `init_inference`.

    Returns:
        The plan; `print(plan)` shows it as a table, `plan.to_dict()` gives JSON-able data. Of a pipeline, one plan for
        each component.

    Raises:
        ConfigError, PluginError, PolicyError, UnsupportedModelError: see `dsi.errors`.
    """
    settings = load_config(config, kwargs)
    if is_pipeline(model):
        return plan_pipeline(model, settings, Registry.load())
    return make_plan(model, settings, Registry.load())


@overload
def init_inference(model: nn.Module, config: ConfigSource = None, **kwargs: Any) -> InferenceEngine: ...
@overload
def init_inference(model: Pipeline, config: ConfigSource = None, **kwargs: Any) -> PipelineEngine: ...
def init_inference(model: Any, config: ConfigSource = None, **kwargs: Any) -> InferenceEngine | PipelineEngine:
    """Replace a loaded model's layers by fused ones, in place; of a pipeline, those of every component.

    Args:
        model: a loaded model in eval mode, on the device where it shall run, or a diffusers pipeline of such. It is
            changed in place and stays what it is: same class, same call, same `generate`, same `state_dict`.
        config: a dict, the path of a JSON file, or None.
        **kwargs: options, alone or beside `config`; see `dsi.InferenceConfig` for their names and defaults.

    Returns:
        The engine; `engine.module is model`, `engine.plan` says what was done, `engine.restore()` takes it back.

    Raises:
        ConfigError: an option is unknown, malformed, conflicting or not supported; every fault is listed.
        PluginError, PolicyError: a policy is wrong or the choice among several is open.
        UnsupportedModelError: with `strict=True`, something that a policy claims would be left alone, or nothing is
            claimed; a pipeline's components are offloaded, wrapped by adapters, or on several devices.
        InjectionError: a step failed, or the model is optimized already. In every case the model is what it was.
    """
    settings = load_config(config, kwargs)
    if is_pipeline(model):
        return optimize_pipeline(model, settings)
    return optimize(model, settings)
