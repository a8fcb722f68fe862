"""What the places of a container read and write while it runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from torch import Tensor

from dsi.containers.activations import ACTIVATIONS
from dsi.containers.base import Container
from dsi.containers.linear import FusedLinear
from dsi.containers.ops import AtenOps

ACTIVATION = "activation"


@attrs.frozen(eq=False)
class Event:
    """One use of a place: what it read and what it wrote."""

    place: str
    read: Tensor
    wrote: Tensor


class Tape:
    """The events of one container, in order.

    Args:
        container: whose places are watched in the context of `recording`.
    """

    def __init__(self, container: Container) -> None:
        self.container = container
        self.events: list[Event] = []
        self.names = {module: name for name, module in container._modules.items() if module is not None}

    def add(self, place: str, read: Tensor, wrote: Tensor) -> None:
        """Note an event; copies, for some operations write over what they read."""
        self.events.append(Event(place, read.detach().clone(), wrote.detach().clone()))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """In this context the container notes what it does."""
        container, cls = self.container, type(self.container)
        linears = [one for one in self.names if isinstance(one, FusedLinear)]
        # an instance of a subclass, which differs in its table of operations alone
        container.__class__ = type(cls.__name__, (cls,), {"ops": _taped(container.ops, self)})
        for linear in linears:
            self._watch(linear)
        try:
            yield
        finally:
            container.__class__ = cls
            for linear in linears:
                for name in ("forward", "add", "activate"):
                    linear.__dict__.pop(name, None)

    def _watch(self, linear: Any) -> None:
        forward, add, place = linear.forward, linear.add, self.names[linear]

        @functools.wraps(forward)
        def watched_forward(x: Tensor) -> Tensor:
            result: Tensor = forward(x)
            self.add(place, x, result)
            return result

        @functools.wraps(add)
        def watched_add(x: Tensor, residual: Tensor) -> Tensor:
            before = residual.clone()
            watched_forward(x)
            result: Tensor = add(x, before)
            return result

        linear.__dict__.update(forward=watched_forward, add=watched_add)


def _taped(ops: AtenOps, tape: Tape) -> AtenOps:
    """The same table, which notes what goes through norms and activations."""
    cls: Any = type("TapedOps", (_Taped, type(ops)), {})
    table: AtenOps = cls()
    table.tape = tape  # type: ignore[attr-defined]
    return table


class _Taped(AtenOps):
    """Operations in pieces small enough to be watched."""

    tape: Tape

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        result = super().norm(norm, x)
        self.tape.add(self.tape.names.get(norm, "norm"), x, result)
        return result

    def project_norm(self, linear: Any, x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        total = linear.add(x, residual)
        return self.norm(norm, total), total

    def activate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        wide = linear.forward(x)
        result = ACTIVATIONS[kind](wide)
        self.tape.add(ACTIVATION, wide, result)
        return result

    def gate(self, linear: Any, x: Tensor, kind: str) -> Tensor:
        wide = linear.forward(x)
        gate, up = wide.chunk(2, dim=-1)
        result = ACTIVATIONS[kind](gate) * up
        self.tape.add(ACTIVATION, wide, result)
        return result
