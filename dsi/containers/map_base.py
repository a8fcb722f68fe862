"""Containers of layers of maps [B, C, H, W]: how a call is understood, and maps as sequences.

Maps are channels-last between such layers; what comes in otherwise is converted once. In that layout a map and the
sequence of its pixels, [B, H * W, C], are the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from dsi.containers.conv import channels_last
from dsi.containers.stand_in import StandIn


class MapCall(NamedTuple):
    """One call of a layer, understood.

    Args:
        hidden: what the layer changes: a map [B, C, H, W], channels-last, or a sequence [B, S, C].
        inputs: by the container's names; absent ones are None.
    """

    hidden: Tensor
    inputs: Mapping[str, Any]


def pixels(x: Tensor) -> Tensor:
    """[B, H * W, C] of a channels-last map, the same memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_map(x: Tensor, like: Tensor) -> Tensor:
    """The channels-last map of pixels [B, H * W, C], with the sides of another map; the same memory."""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class MapContainer(StandIn):
    """Base of the containers of layers of maps; they implement `run` and say in `INPUTS` what they take."""

    INPUTS: ClassVar[frozenset[str]] = frozenset()
    DIMENSIONS: ClassVar[int] = 4
    MANY_ROWS = True

    def run(self, call: MapCall) -> Any:
        """The fused computation: one map or sequence."""
        raise NotImplementedError

    def takes(self, hidden: Tensor, inputs: Mapping[str, Any]) -> bool:
        """Whether `run` computes this call."""
        return all(value is None for value in inputs.values())

    def _run(self, call: MapCall) -> Any:
        return self.run(call)

    def _returned(self, output: Any) -> Any:
        return (output,) if self.call.returns == "single" else output

    def _without_gradients(self, source: Any, output: Any) -> Any:
        if hasattr(output, "sample"):
            # an output object of the stock layer, which is a mapping: its one tensor is marked
            output.sample = super()._without_gradients(source, output.sample)
            return output
        return super()._without_gradients(source, output)

    def _understand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MapCall | None:
        if self.training or len(args) > len(self.positional) or not self._plain_context() or self.changed():
            return None
        given = dict(zip(self.positional, args, strict=False))
        given.update(kwargs)
        if self.call.returns == "single" and given.pop("return_dict", True) is not False:
            return None
        hidden = given.pop(self.positional[0], None)
        inputs = {name: given.pop(argument, None) for name, argument in self.call.inputs.items()}
        if any(_means_something(value) for name, value in given.items() if name not in self.call.free):
            return None
        if not self._fits(hidden) or not self.takes(hidden, inputs):
            return None
        return MapCall(channels_last(hidden) if hidden.dim() == 4 else hidden, inputs)

    def _fits(self, hidden: Any) -> bool:
        if not isinstance(hidden, Tensor) or hidden.dim() != self.DIMENSIONS:
            return False
        return hidden.dtype is self.dtype and hidden.numel() > 0


def _means_something(value: Any) -> bool:
    """Whether an argument that no container knows asks for anything: None and empty dicts do not."""
    return value is not None and not (isinstance(value, dict) and not value)
