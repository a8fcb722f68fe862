"""Running an injected model: the KV cache, the decode loop, `generate`, and the checks before each."""

from dsi.runtime.decode import DecodeRunner, Step
from dsi.runtime.generate import INSTANCE_OVERRIDES, generate, prepare_cache
from dsi.runtime.kv_cache import PreallocatedCache, PreallocatedLayer
from dsi.runtime.limits import check_generation, check_inputs
from dsi.runtime.session import Route, Session, Timer

__all__ = [
    "INSTANCE_OVERRIDES",
    "DecodeRunner",
    "PreallocatedCache",
    "PreallocatedLayer",
    "Route",
    "Session",
    "Step",
    "Timer",
    "check_generation",
    "check_inputs",
    "generate",
    "prepare_cache",
]
