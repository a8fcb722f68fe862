"""Linear layers over an input that many layers of one model get, computed in one product.

The weights of all of them are one matrix, of which each layer has its rows. The first layer that sees an input computes
the rows of all; the others read theirs. What came of an input is kept while the same tensor, unchanged, comes back, and
dropped with it: the tensor is held weakly. So a model's layers take one product a step for what changes with every
step, and none where the caller passes what it passed before.

Inputs that are not shared after all (each layer gets another) are noticed, and each layer then computes its own rows
until an input goes round again.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsi.containers.activations import ACTIVATIONS
from dsi.containers.linear import FusedLinear, Source


class _Kept(NamedTuple):
    """What came of an input.

    Args:
        x: the input.
        version: what it had been written to by then.
        kind: the activation that it went through first.
        captured: it was computed in a stream's capture, in the graph's memory.
        rows: the product.
    """

    x: weakref.ref[Tensor]
    version: int
    kind: str
    captured: bool
    rows: Tensor

    def is_of(self, x: Tensor, kind: str, *, captured: bool) -> bool:
        """Whether it is what comes of this input now."""
        if self.x() is not x or x.is_inference():
            return False
        return (self.version, self.kind, self.captured) == (x._version, kind, captured)


class SharedProduct:
    """One matrix of the rows of several layers.

    Args:
        name: as the policy calls it.
        rows, columns: of the matrix.
        like: a tensor of its dtype and device.
        bias: some layer has a bias.
    """

    def __init__(self, name: str, rows: int, columns: int, like: Tensor, *, bias: bool) -> None:
        self.name, self.total, self.columns = name, rows, columns
        self.weight: Tensor | None = like.new_empty(rows, columns)
        self.bias: Tensor | None = like.new_zeros(rows) if bias else None
        self.filled = 0
        # products computed so far, and changes of weights seen
        self.products = self._changes = 0
        self._start()

    def _start(self) -> None:
        self._layers: list[weakref.ref[SharedLinear]] = []
        self._kept: _Kept | None = None
        self._pinned: list[tuple[Tensor, str, Tensor]] = []
        # layers that read the last product, the first of them included; each computes its own; the last input that
        # was seen meanwhile, by how many in a row
        self._readers, self._alone = math.inf, False
        self._seen: tuple[Any, int] = (None, 0)

    # --- layers -----------------------------------------------------------------------------------------------

    def add(self, layer: SharedLinear) -> None:
        """A layer that has its rows here."""
        self._layers.append(weakref.ref(layer))

    def layers(self) -> list[SharedLinear]:
        """The layers that there are, in the order of their rows."""
        found = [layer for ref in self._layers if (layer := ref()) is not None and layer.product is self]
        return sorted(found, key=lambda layer: layer.start)

    def scatter(self) -> None:
        """Some layer's rows were moved away from the matrix; it is made again when it is next needed."""
        self.weight = self.bias = None
        self.outdate()

    def outdate(self) -> None:
        """Some layer's weights are others now."""
        self._changes += 1
        self.forget()

    @property
    def stamp(self) -> int:
        """A number that is another one once weights have changed: pinned products are refreshed then."""
        return self._changes + sum(layer.weight._version for layer in self.layers())

    def latest(self) -> tuple[Tensor, str] | None:
        """The input of what is kept, and the activation that it went through; None where nothing is."""
        kept = self._kept
        x = None if kept is None else kept.x()
        return None if kept is None or x is None else (x, kept.kind)

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept = None

    def gather(self) -> None:
        """Make the matrix now, where the layers' rows had been moved: they are where it has them from then on."""
        with torch.inference_mode(False), torch.no_grad():
            self._gather()

    def _gather(self) -> tuple[Tensor, Tensor | None]:
        """The matrix, made of the layers' rows where they had been moved."""
        if self.weight is None:
            layers, end = self.layers(), 0
            self.weight = torch.cat([layer.weight.data for layer in layers])
            if any(layer.bias is not None for layer in layers):
                self.bias = self.weight.new_zeros(self.weight.shape[0])
            for layer in layers:
                layer.start, end = end, end + layer.out_features
                layer.share_()
        return self.weight, self.bias

    # --- computing --------------------------------------------------------------------------------------------

    def of(self, layer: SharedLinear, x: Tensor, kind: str) -> Tensor:
        """The layer's rows of the product with an input that goes through an activation first; "" for none."""
        for pinned, its_kind, rows in self._pinned:
            if pinned is x and its_kind == kind:
                return layer.own(rows)
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        kept = self._kept
        if kept is not None and kept.is_of(x, kind, captured=captured):
            self._readers += 1
            return layer.own(kept.rows)
        # what is written to an inference tensor leaves no trace
        if x.is_inference() or self._each_its_own(x):
            return layer.alone(_through(x, kind))
        rows = self.compute(x, kind)
        self._kept = _Kept(weakref.ref(x, self._drop), x._version, kind, captured, rows)
        self._readers = 1
        return layer.own(rows)

    def compute(self, x: Tensor, kind: str) -> Tensor:
        """All rows of the product, [..., rows]."""
        weight, bias = self._gather()
        self.products += 1
        given = _through(x, kind)
        if given.device.type == "cpu" and given.dtype is torch.float16:
            return F.linear(given.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
        return F.linear(given, weight, bias)

    def _drop(self, ref: Any) -> None:
        kept = self._kept
        if kept is not None and kept.x is ref:
            self._kept = None

    def _each_its_own(self, x: Tensor) -> bool:
        """Whether inputs turned out not to be shared."""
        half = len(self._layers) / 2
        if self._alone:
            last, times = self._seen
            times = times + 1 if last is not None and last() is x else 1
            self._seen = weakref.ref(x), times
            self._alone = times < half
        elif self._readers < half:
            self._alone, self._seen = True, (weakref.ref(x), 1)
        return self._alone

    # --- for graphs -------------------------------------------------------------------------------------------

    def pin(self, x: Tensor, kind: str = "") -> None:
        """Compute for an input that a graph has as its own memory, into memory that stays until `unpin`.

        A graph that is captured meanwhile reads the product and does not compute it. Whoever writes to x calls
        `refresh` before the graph runs.
        """
        self.unpin(x)
        self._pinned.append((x, kind, self.compute(x, kind)))

    def refresh(self, x: Tensor) -> None:
        """Compute the product of a pinned input anew, into the same memory."""
        for pinned, kind, rows in self._pinned:
            if pinned is x:
                rows.copy_(self.compute(x, kind))

    def unpin(self, x: Tensor) -> None:
        """Give up the memory of a pinned input."""
        self._pinned = [entry for entry in self._pinned if entry[0] is not x]

    # --- copies -----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """The layers have the rows, and report with their copies."""
        left = ("_layers", "_kept", "_pinned", "_readers", "_alone", "_seen", "weight", "bias")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.weight = self.bias = None
        self.products = 0
        self._start()


def _through(x: Tensor, kind: str) -> Tensor:
    return ACTIVATIONS[kind](x) if kind else x


class SharedLinear(FusedLinear):
    """A layer's rows of a shared product.

    Args:
        weight, bias: the rows, which are copied to the product's matrix.
        sources: see `FusedLinear`.
        product: whose next rows they become.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, sources: tuple[Source, ...], product: SharedProduct
    ) -> None:
        super().__init__(weight, bias, sources)
        self.product, self.start = product, product.filled
        product.filled += self.out_features
        matrix, biases = product.weight, product.bias
        assert matrix is not None, "the product's matrix is filled before any layer of it runs"
        matrix[self.start : product.filled].copy_(weight)
        if bias is not None:
            assert biases is not None, "a product that has a layer with a bias has one"
            biases[self.start : product.filled].copy_(bias)
        self.share_()
        product.add(self)

    def share_(self) -> None:
        """Have the rows where the product's matrix has them."""
        part, product = slice(self.start, self.start + self.out_features), self.product
        assert product.weight is not None, "the matrix is there"
        product.weight[part] = self.weight.data
        self.weight.data = product.weight[part]
        if self.bias is not None and product.bias is not None:
            product.bias[part] = self.bias.data
            self.bias.data = product.bias[part]

    def forward(self, x: Tensor, kind: str = "") -> Tensor:
        """[..., K] -> [..., N], of x through an activation where one is named."""
        return self.product.of(self, x, kind)

    def own(self, rows: Tensor) -> Tensor:
        """This layer's part of the product of all, a view."""
        return rows.narrow(-1, self.start, self.out_features)

    def alone(self, x: Tensor) -> Tensor:
        """This layer's product on its own."""
        return super().forward(x)

    def choose_form_(self) -> None:
        """Plain: the matrix is one."""

    def load(self, parts: dict[str, Tensor]) -> None:
        weight, bias = self.weight.data, None if self.bias is None else self.bias.data
        super().load(parts)
        weight.copy_(self.weight.data)
        self.weight.data = weight
        if self.bias is not None and bias is not None:
            bias.copy_(self.bias.data)
            self.bias.data = bias
        self.product.outdate()

    def _apply(self, fn: Any, recurse: bool = True) -> SharedLinear:
        nn.Module._apply(self, fn, recurse)
        self.product.scatter()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.product.add(self)


def shared_products(model: nn.Module) -> list[SharedProduct]:
    """The shared products of a model's layers, each once."""
    found = {id(m.product): m.product for m in model.modules() if isinstance(m, SharedLinear)}
    return list(found.values())
