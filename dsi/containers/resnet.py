"""Layers of convolutions: residual blocks, changes of size, and single norms and convolutions between them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from dsi.containers.conv import FusedConv
from dsi.containers.map_base import MapCall, MapContainer
from dsi.containers.ops import NormOp
from dsi.containers.shared_products import SharedLinear
from dsi.policy import Refusal, Slot


def _sides(conv: FusedConv, height: int, width: int) -> tuple[int, int]:
    """The sides of a map behind a convolution."""
    window, (kernel_h, kernel_w) = conv.window, conv.shape[2:]
    sides = ((height, kernel_h), (width, kernel_w))
    found = [
        (side + 2 * pad - spread * (kernel - 1) - 1) // stride + 1
        for (side, kernel), stride, pad, spread in zip(
            sides, window.stride, window.padding, window.dilation, strict=True
        )
    ]
    return found[0], found[1]


class ResnetBlock(MapContainer):
    """norm, SiLU, convolution, time, norm, SiLU, convolution, and the sum with what came in.

    Inputs:
        time: an embedding [B, E], which is projected and added to every pixel; None where the layer has no `time`.

    Facts:
        time_activation: what the embedding goes through first, see `dsi.containers.activations`; "" for nothing.
        skip_time_act: the caller did that already, and the layer must not.
        time_norm: what the embedding does; "default" is what this computes, and without an embedding any name but
            "scale_shift" is.
        divisor: of the sum.
        up, down: the stock layer's `upsample` or `downsample`, which has no weights, changes the sides of the map
            behind the first activation, and of what is added at the end.
    """

    SLOTS = MappingProxyType(
        {"norm_in": True, "conv_in": True, "time": False, "norm_out": True, "conv_out": True, "shortcut": False}
    )
    FACTS = frozenset({"divisor"})
    OPTIONAL_FACTS = MappingProxyType(
        {
            "time_activation": "silu",
            "skip_time_act": False,
            "time_norm": "default",
            "up": False,
            "down": False,
        }
    )
    INPUTS = frozenset({"time"})

    norm_in: NormOp
    norm_out: NormOp
    conv_in: FusedConv
    conv_out: FusedConv

    @classmethod
    def check(cls, facts: Mapping[str, Any], slots: Mapping[str, Slot]) -> Refusal | None:
        if not isinstance(facts["divisor"], int | float) or not facts["divisor"]:
            return Refusal(reason=f"a sum divided by {facts['divisor']!r}")
        if facts["time_norm"] == "scale_shift" or (facts["time_norm"] != "default" and "time" in slots):
            return Refusal(reason=f"the time embedding's way is {facts['time_norm']!r}; 'default' is implemented")
        return None

    def finish(self) -> None:
        super().finish()
        self.projects = "time" in self._modules
        self.kind = "" if self.facts["skip_time_act"] else self.facts["time_activation"]
        self.divisor = float(self.facts["divisor"])
        self.resample = "upsample" if self.facts["up"] else "downsample" if self.facts["down"] else ""

    def takes(self, hidden: Tensor, inputs: Mapping[str, Any]) -> bool:
        time = inputs.get("time")
        if not self.projects:
            return time is None
        return (
            isinstance(time, Tensor)
            and time.dim() == 2
            and time.dtype is self.dtype
            and time.shape[0] in (1, hidden.shape[0])
        )

    def _expected(self, call: MapCall) -> tuple[int, ...]:
        height, width = call.hidden.shape[2:]
        if self.resample:
            height, width = (2 * height, 2 * width) if self.facts["up"] else (height // 2, width // 2)
        return (call.hidden.shape[0], self.conv_out.shape[0], height, width)

    def run(self, call: MapCall) -> Tensor:
        own: dict[str, Any] = self._modules
        ops, x = self.ops, call.hidden
        hidden = ops.group_norm(self.norm_in, x, silu=True)
        if self.resample:
            change = getattr(self.original, self.resample)
            hidden, x = change(hidden), change(x)
        addend = self._time(call)
        hidden = ops.conv_norm(self.conv_in, hidden, self.norm_out, addend, silu=True)
        # the norm that comes after the layer divides as the layer's own do
        groups = self.norm_out.groups
        return ops.conv_add(self.conv_out, hidden, x, self.divisor, shortcut=own.get("shortcut"), groups=groups)

    def _time(self, call: MapCall) -> Tensor | None:
        if not self.projects:
            return None
        time: Any = self._modules["time"]
        assert isinstance(time, SharedLinear), "policies share the product of the time"
        rows = time.forward(call.inputs["time"], self.kind)
        return rows if rows.shape[0] == call.hidden.shape[0] else rows.expand(call.hidden.shape[0], -1)


class Downsample(MapContainer):
    """A convolution that makes a map smaller; of a layer without padding, the map first gets a row and a column of
    zeros at its ends.

    Facts:
        padding: of the layer; 0 adds that row and column.
    """

    SLOTS = MappingProxyType({"conv": True})
    FACTS = frozenset({"padding"})

    conv: FusedConv

    def finish(self) -> None:
        super().finish()
        self.pads = self.facts["padding"] == 0

    def _expected(self, call: MapCall) -> tuple[int, ...]:
        rows, _, height, width = call.hidden.shape
        return (rows, self.conv.shape[0], *_sides(self.conv, height + self.pads, width + self.pads))

    def run(self, call: MapCall) -> Tensor:
        return self.ops.downsample_conv(self.conv, call.hidden, pads=self.pads)


class Upsample(MapContainer):
    """A map with every pixel repeated, to twice its sides or to a size, and a convolution.

    Inputs:
        size: (height, width), or None for twice the sides.
    """

    SLOTS = MappingProxyType({"conv": True})
    INPUTS = frozenset({"size"})

    conv: FusedConv

    def takes(self, hidden: Tensor, inputs: Mapping[str, Any]) -> bool:
        size = inputs.get("size")
        return size is None or (isinstance(size, tuple | list) and len(size) == 2)

    def _expected(self, call: MapCall) -> tuple[int, ...]:
        rows, _, height, width = call.hidden.shape
        height, width = call.inputs.get("size") or (2 * height, 2 * width)
        return (rows, self.conv.shape[0], *_sides(self.conv, height, width))

    def run(self, call: MapCall) -> Tensor:
        return self.ops.upsample_conv(self.conv, call.hidden, call.inputs.get("size"))


class MapConv(MapContainer):
    """One convolution."""

    SLOTS: ClassVar[Mapping[str, bool]] = MappingProxyType({"conv": True})

    conv: FusedConv

    def _expected(self, call: MapCall) -> tuple[int, ...]:
        return (call.hidden.shape[0], self.conv.shape[0], *_sides(self.conv, *call.hidden.shape[2:]))

    def run(self, call: MapCall) -> Tensor:
        return self.ops.conv(self.conv, call.hidden)


class MapNorm(MapContainer):
    """One norm over groups of channels."""

    SLOTS: ClassVar[Mapping[str, bool]] = MappingProxyType({"norm": True})

    norm: NormOp

    def run(self, call: MapCall) -> Tensor:
        return self.ops.group_norm(self.norm, call.hidden)
