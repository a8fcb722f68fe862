"""dsi: a model that somebody already loaded, at the speed of the hardware, without changing how it is called.

    import dsi
    engine = dsi.init_inference(model)
    engine.generate(...)
    engine.restore()

Importing this package imports neither torch nor transformers; the functions that need them import them on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dsi.config import InferenceConfig, default_inference_config
from dsi.errors import (
    AmbiguousPolicyError,
    CacheMemoryError,
    ConfigError,
    DsiError,
    InjectionError,
    InputError,
    PluginError,
    PolicyError,
    ProfilingError,
    RankError,
    RestoreError,
    SplitError,
    UnknownPolicyError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from dsi.api import init_inference, plan
    from dsi.engine import InferenceEngine
    from dsi.pipeline import PipelineEngine, PipelinePlan
    from dsi.plans import Plan

__version__ = "0.1.0"

_LAZY = {
    "InferenceEngine": "dsi.engine",
    "PipelineEngine": "dsi.pipeline",
    "PipelinePlan": "dsi.pipeline",
    "Plan": "dsi.plans",
    "init_inference": "dsi.api",
    "plan": "dsi.api",
}

__all__ = [
    "AmbiguousPolicyError",
    "CacheMemoryError",
    "ConfigError",
    "DsiError",
    "InferenceConfig",
    "InferenceEngine",
    "InjectionError",
    "InputError",
    "PipelineEngine",
    "PipelinePlan",
    "Plan",
    "PluginError",
    "PolicyError",
    "ProfilingError",
    "RankError",
    "RestoreError",
    "SplitError",
    "UnknownPolicyError",
    "UnsupportedModelError",
    "default_inference_config",
    "init_inference",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dsi' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
