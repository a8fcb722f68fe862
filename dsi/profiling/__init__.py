"""Timers and tables: how long a model takes, call by call and layer by layer."""

from dsi.profiling.layers import LayerTime, Profile, profile_layers
from dsi.profiling.model_times import ModelTime, ModelTimer

__all__ = ["LayerTime", "ModelTime", "ModelTimer", "Profile", "profile_layers"]
