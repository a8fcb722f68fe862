"""The one exception tree of dsi.

    DsiError
    |-- ConfigError              an option is unknown, malformed, conflicting or not supported yet
    |-- PluginError              a plugin or what it registered is wrong
    |   |-- UnknownPolicyError   a policy was named that nobody registered
    |   `-- AmbiguousPolicyError several policies claim one layer and nothing settles it
    |-- PolicyError              a policy does not fit the layer it claims
    |-- UnsupportedModelError    nothing of this model can be replaced (strict), or it cannot be optimized at all
    |-- InjectionError           a step of the injection failed; the model is what it was before
    |-- RestoreError             the original cannot be given back
    |-- SplitError               a layer does not split over so many ranks, or its parts make no whole
    |-- RankError                a rank died, is stuck, or the ranks disagree
    |-- InputError               a call's tensors do not fit the model; raised before anything runs
    |-- CacheMemoryError         a text outgrew its KV cache, and there is no memory for a larger one
    `-- ProfilingError           a profile was asked for that was never started

Messages say where, what was found and what would do.
"""

from __future__ import annotations


class DsiError(Exception):
    """Base of every error that dsi raises on purpose.

    Args:
        message: where, what was found, what would do.
        hint: one line on how to go on; appended to the message when given.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}\n  hint: {hint}" if hint else message)
        self.message, self.hint = message, hint


class ConfigError(DsiError, ValueError):
    """A configuration cannot be used. `faults` lists every one of them, each a line."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        head = "1 fault in the configuration" if len(faults) == 1 else f"{len(faults)} faults in the configuration"
        super().__init__(head + "".join(f"\n  - {fault}" for fault in faults))


class PluginError(DsiError):
    """A plugin, or something it registered, is wrong."""


class UnknownPolicyError(PluginError):
    """A policy was asked for by a name that nobody registered."""


class AmbiguousPolicyError(PluginError):
    """Several policies claim the same layer class and nothing says which one wins."""


class PolicyError(DsiError):
    """A policy does not fit the layer it claims: a path is missing or a parameter is left over."""


class UnsupportedModelError(DsiError):
    """The model cannot be optimized as asked; the message lists the reasons."""


class InjectionError(DsiError):
    """A step of the injection failed. The model is bitwise what it was before the call."""


class RestoreError(DsiError):
    """The original model cannot be given back."""


class SplitError(DsiError):
    """A layer does not split over that many ranks, or the parts given do not make a whole."""


class RankError(DsiError):
    """Ranks that work together no longer do: one died, raised or is stuck, or they disagree."""


class InputError(DsiError, ValueError):
    """The tensors of one call do not fit the model. Raised on the host, before any launch."""


class CacheMemoryError(DsiError):
    """A text outgrew its KV cache, and there is no memory for a larger one. The engine goes on with the next call."""


class ProfilingError(DsiError):
    """Model times were asked for while profiling is off."""
