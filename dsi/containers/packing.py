"""Tokens without their padding: packed before the first layer of a run, unpacked after its last.

A run is a chain of layers each of which is given the very tensor that the one before it returned. Between them no stock
module computes anything, so what passes there is a placeholder in the padded shape, made of NaN: a module that does
read it spoils the result for everyone to see, and `dsi.runtime` compares results before it trusts a packing.

    Trace     watches a forward as it is, and finds the runs
    Packing   takes the layers of a forward through their runs without padding
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import torch
from torch import Tensor

if TYPE_CHECKING:
    from dsi.containers.base import Container, LayerCall
    from dsi.containers.ops import Rope


class Around(Protocol):
    """Who stands between the containers of a forward and their computation."""

    def run(self, container: Container, call: LayerCall) -> Tensor:
        """Hidden states after the layer, [B, S, H]."""


AROUND: ContextVar[Around | None] = ContextVar("dsi_around", default=None)


@contextmanager
def around(who: Around) -> Iterator[None]:
    """In this context, and thread, the containers' calls go through `who`."""
    before = AROUND.set(who)
    try:
        yield
    finally:
        AROUND.reset(before)


@attrs.frozen(kw_only=True)
class Stop:
    """One layer's place in a forward.

    Args:
        layer: the container's id.
        packs: it can do without the padding.
        first, last: of a run; of no meaning where it does not pack.
    """

    layer: int
    packs: bool
    first: bool
    last: bool


class Trace:
    """Runs every call as it is, and notes which tensor came from where.

    Args:
        shape: of the mask; layers that are given other positions, such as a second tower's, do not pack.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        # the tensors are held, so that no two of them have one id
        self._seen: list[tuple[int, bool, Tensor, Tensor]] = []

    def run(self, container: Container, call: LayerCall) -> Tensor:
        """See `Around`."""
        output = container.run(call)
        packs = container.packs(call) and call.hidden.shape[:2] == self.shape
        self._seen.append((id(container), packs, call.hidden, output))
        return output

    def stops(self) -> tuple[Stop, ...]:
        """The layers in the order of their calls."""
        # whether a call is given what the call before it returned, and both pack
        chained = [
            one[1] and other[1] and other[2] is one[3] for one, other in zip(self._seen, self._seen[1:], strict=False)
        ]
        firsts, lasts = [True, *(not link for link in chained)], [*(not link for link in chained), True]
        return tuple(
            Stop(layer=layer, packs=packs, first=first, last=last)
            for (layer, packs, _, _), first, last in zip(self._seen, firsts, lasts, strict=False)
        )


class AnotherWay(RuntimeError):
    """A forward called its layers otherwise than the trace has it."""


class Texts:
    """Rows that hold text after text, each of which is attended to by itself alone.

    Attributes:
        causal: a token sees those before it, not those after it.
        starts: int32 [B + 1], each text's first row, and at last the row after the last text.
    """

    causal = False
    starts: Tensor

    @property
    def longest(self) -> int:
        """No text has more rows."""
        raise NotImplementedError

    def bounds(self) -> list[int]:
        """`starts` on the host."""
        bounds: list[int] = self.starts.tolist()
        return bounds

    def keep(self, layer: Any, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [1, kv_heads, T, d] to a layer of a cache."""
        raise NotImplementedError


class Packing(Texts):
    """Where each token stands among `total` rows, by a mask, and the way of the layers through their runs.

    Nothing here asks the device, so all of it can stand in a CUDA graph. Rows beyond the tokens are repeats of the
    last position, and belong to no text.

    Args:
        mask: bool [B, S], True = a token; each row has one.
        total: rows, as many as there are tokens or more. Where there are too few the result is wrong, and no memory
            beyond them is touched.
        stops: of a trace of the same forward.
    """

    def __init__(self, mask: Tensor, total: int, stops: tuple[Stop, ...]) -> None:
        self.shape, self.total, self.stops = mask.shape, total, stops
        shown = mask.reshape(-1)
        # tokens up to each position, itself included
        count = shown.cumsum(0)
        # few launches: in a graph each of them takes the device some 2 us, whatever it does
        ordinals = torch.arange(1, total + 1, device=mask.device)
        self.index = torch.searchsorted(count, ordinals).clamp_(max=shown.numel() - 1)
        self.place, self.shown = (count - 1).clamp_(0, total - 1), shown[:, None]
        starts = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
        starts[1:] = count.view(mask.shape)[:, -1].clamp(max=total)
        self.starts = starts
        self.at = 0
        self._packed: Tensor | None = None
        self._placeholder: Tensor | None = None

    @property
    def longest(self) -> int:
        return self.shape[1]

    def run(self, container: Container, call: LayerCall) -> Tensor:
        """See `Around`; [B, S, H] with 0 where there is no token, or a placeholder within a run.

        Raises:
            AnotherWay: this is not the call of the trace.
        """
        stop = self.stops[self.at] if self.at < len(self.stops) else None
        self.at += 1
        if stop is None or stop.layer != id(container):
            raise AnotherWay("the layers are called in another order")
        if not stop.packs:
            return container.run(call)
        if call.hidden.shape[:2] != self.shape:
            raise AnotherWay("a layer is given other positions than the mask has")
        hidden = self.pack(call.hidden) if stop.first else self._packed
        strange = not stop.first and call.hidden is not self._placeholder
        if strange or hidden is None or call.mask is not None or not container.packs(call):
            raise AnotherWay("a layer is called otherwise")
        output = container.run(call._replace(hidden=hidden, rope=self._rope(call), packed=self))
        if stop.last:
            self._packed = self._placeholder = None
            return self.unpack(output)
        self._packed = output
        self._placeholder = call.hidden.new_full((1,), float("nan")).expand(call.hidden.shape)
        return self._placeholder

    def pack(self, x: Tensor) -> Tensor:
        """[1, total, ...] of x [B, S, ...]."""
        return x.reshape(self.place.shape[0], *x.shape[2:]).index_select(0, self.index)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[B, S, H] of x [1, total, H], 0 where there is no token."""
        rows = x[0].index_select(0, self.place)
        return torch.where(self.shown, rows, rows.new_zeros(())).view(*self.shape, -1)

    def _rope(self, call: LayerCall) -> Rope | None:
        rope = call.rope
        if rope is None:
            return None
        cos, sin, signed = (self.pack(x.expand(*self.shape, -1)) for x in (rope.cos, rope.sin, rope.signed))
        return type(rope)(cos, sin, signed, rope.pairs)
