"""Containers of layers that change two sequences at once: hidden states, and a context that is computed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from dsi.containers.map_base import MapCall, MapContainer
from dsi.containers.stand_in import shape_error


class PairContainer(MapContainer):
    """Base of the containers of layers from (hidden states [B, S, C], context [B, T, E]) to (context, hidden states).

    The context that comes out is None where the layer drops it. Policies say so by `Call(returns="pair")`.

    Inputs:
        context: the sequence beside the hidden states.
    """

    INPUTS: ClassVar[frozenset[str]] = frozenset({"context"})
    DIMENSIONS = 3

    def run(self, call: MapCall) -> Any:
        """The fused computation: (context or None, hidden states), of the shapes of what came in."""
        raise NotImplementedError

    def takes(self, hidden: Tensor, inputs: Mapping[str, Any]) -> bool:
        """Whether `run` computes this call; here: whether there is a context that goes with the hidden states."""
        context = inputs.get("context")
        return (
            isinstance(context, Tensor)
            and context.dim() == 3
            and context.dtype is self.dtype
            and context.device == hidden.device
            and context.shape[0] == hidden.shape[0]
            and context.numel() > 0
        )

    def _check_shape(self, call: MapCall, output: Any) -> None:
        if not (isinstance(output, tuple) and len(output) == 2):
            raise shape_error(self, output, call.hidden)
        context, hidden = output
        given = call.inputs["context"]
        if context is not None and getattr(context, "shape", None) != given.shape:
            raise shape_error(self, context, given)
        super()._check_shape(call, hidden)

    def _without_gradients(self, source: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(self._without_gradients(source, one) for one in output)
        return super()._without_gradients(source, output) if isinstance(output, Tensor) else output
