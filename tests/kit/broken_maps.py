"""Containers of layers of maps that are broken, each in one way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsi.containers import (
    CrossTransformerBlock,
    ImageAttention,
    MapConv,
    MapNorm,
    ResnetBlock,
    SpatialTransformer,
    Upsample,
)
from dsi.containers import shared_products as shared
from dsi.containers.ops import AtenOps

# --- operations -------------------------------------------------------------------------------------------------------


def computing(base: type, table: type[AtenOps]) -> Any:
    """A container that computes with a table of operations, under the table's name."""
    ops = table()
    return type(table.__name__, (base,), {"ops": property(lambda self: ops), "__module__": __name__})


class _NoSilu(AtenOps):
    def group_norm(self, norm: Any, x: Tensor, *, silu: bool = False, **rest: Any) -> Tensor:
        return super().group_norm(norm, x, silu=False, **rest)


class _OneGroup(AtenOps):
    """Every channel counts towards one mean."""

    def group_norm(self, norm: Any, x: Tensor, **rest: Any) -> Tensor:
        groups, norm.groups = norm.groups, 1
        try:
            return super().group_norm(norm, x, **rest)
        finally:
            norm.groups = groups


class _GateAndValueSwapped(AtenOps):
    def geglu(self, linear: Any, x: Tensor) -> Tensor:
        gate, value = linear.forward(x).chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate).mul_(value)


class _ResidualLost(AtenOps):
    def conv_add(self, conv: Any, x: Tensor, residual: Tensor, *rest: Any, **named: Any) -> Tensor:
        return super().conv_add(conv, x, torch.zeros_like(residual), *rest, **named)


NoSilu = computing(ResnetBlock, _NoSilu)
OneGroup = computing(ResnetBlock, _OneGroup)
OneGroupOfANorm = computing(MapNorm, _OneGroup)
GateAndValueSwapped = computing(CrossTransformerBlock, _GateAndValueSwapped)
ResidualLost = computing(ResnetBlock, _ResidualLost)


class TimeLost(ResnetBlock):
    def _time(self, call):
        time = super()._time(call)
        return None if time is None else torch.zeros_like(time)


class TimeOfFirstRow(ResnetBlock):
    """One row's time for all."""

    def _time(self, call):
        time = super()._time(call)
        return None if time is None else time[:1].expand_as(time)


class ContextNotSeen(SpatialTransformer):
    """Its layers are given no context."""

    def run(self, call):
        return super().run(call._replace(inputs={**call.inputs, "context": torch.zeros_like(call.inputs["context"])}))


class DividedOnce(ImageAttention):
    """Divides the sum by two, whatever the layer says."""

    def run(self, call):
        return super().run(call) / 2


# --- sizes, layouts, steps --------------------------------------------------------------------------------------------


class SizeNotSeen(Upsample):
    """Twice the sides, whatever was asked for."""

    def run(self, call):
        return super().run(call._replace(inputs={**call.inputs, "size": None}))


class TakesMemoryAsItLies(MapConv):
    """Reads a channels-last map of few channels as if it were contiguous."""

    def _understand(self, args, kwargs):
        call = super()._understand(args, kwargs)
        given = args[0] if args else None
        if call is None or self.conv.shape[1] != 4 or given.is_contiguous():
            return call
        return call._replace(hidden=call.hidden.flip(2))


@contextlib.contextmanager
def versions_not_seen() -> Iterator[None]:
    """What came of a tensor is kept when the tensor is written to."""
    kept, stock = shared._Kept, shared._Kept.is_of

    def is_of(self, x, kind, *, captured):
        return self.x() is x and (self.kind, self.captured) == (kind, captured)

    kept.is_of = is_of
    try:
        yield
    finally:
        kept.is_of = stock


# --- manners ----------------------------------------------------------------------------------------------------------


class AlwaysStockMap(ResnetBlock):
    def _understand(self, args, kwargs):
        return None


class OtherConvForm(ResnetBlock):
    """Holds a convolution in another form than planned."""

    def finish(self):
        super().finish()
        self.conv_in.unpack_()


class MapNameLost(ResnetBlock):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "conv1.bias"]


class ChannelsLastSaved(ResnetBlock):
    """Gives a convolution's weight in the order in which it is held."""

    def export(self):
        found = super().export()
        weight = found["conv2.weight"]
        return {**found, "conv2.weight": weight.permute(0, 2, 3, 1).reshape(weight.shape)}


class LastBitsLost(ResnetBlock):
    """Holds a convolution a little off, less than any tolerance sees."""

    def finish(self):
        super().finish()
        if not self.__dict__.get("nudged"):
            self.nudged = True
            self.conv_out.unpack_()
            self.conv_out.weight.data.mul_(1 + 2**-20)
            self.conv_out.choose_form_()


class MarksTheMapsOriginal(ResnetBlock):
    def finish(self):
        super().finish()
        self.original.seen_by_dsi = True


class SecondMapCopy(ResnetBlock):
    def finish(self):
        super().finish()
        if "spare" not in self.__dict__:
            self.__dict__["spare"] = [p.detach().clone() for p in self.original.parameters()]
            self.__dict__["spare"] += [self.conv_out.export()["conv2.weight"].clone()]


class ReadsMapBack(ResnetBlock):
    """Waits for the device within a call."""

    def run(self, call):
        if float(call.hidden.sum()) != float("inf"):
            return super().run(call)
        return call.hidden
