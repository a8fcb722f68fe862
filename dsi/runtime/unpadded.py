"""Which forwards of a model can do without their padding, or without a mask that hides nothing: tried, not assumed.

A packed forward is given no mask at all, and its layers keep the texts apart. Whether a model's result depends on the
mask in any other way, or on what stands at padded positions, is seen by comparing one result of each kind with the
model's own, once for each set of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsi.containers.base import Container
from dsi.containers.packing import AnotherWay, Packing, Stop, Trace, around
from dsi.runtime.model_parts import ModelParts
from dsi.runtime.trees import NoTree, tensors

MASK = "attention_mask"
# rows that a packed forward is rounded up to, as a part of all: so few sizes that graphs are used again
STEPS = 16
# packed rows, as a part of all, up to which packing is worth its gathers
WORTH = 0.85
# of one result to the other, relative to its size, by the bytes of a number: rounding in another order, and no more
CLOSE = {8: 1e-6, 4: 1e-3, 2: 3e-2}

Call = Callable[[Mapping[str, Any]], Any]


def bucket(visible: int, total: int) -> int:
    """Rows for so many tokens of `total` positions."""
    step = max(total // STEPS, 1)
    return min(-(-visible // step) * step, total)


def worth_packing(rows: int, total: int) -> bool:
    """Whether that many packed rows are less work than all positions."""
    return rows <= WORTH * total


def packs(model: nn.Module) -> bool:
    """Whether a mask may be of positions that layers can do without: those of hidden states [B, S, H] are some."""
    return any(isinstance(module, Container) for module in model.modules())


class Unpadded:
    """What was found about the forwards of one model, by the names of the arguments given.

    Args:
        parts: of the model that it was found about.
    """

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts
        self._stops: dict[Any, tuple[Stop, ...]] = {}
        self._maskless: dict[Any, bool] = {}
        # why padding stays, by the names of arguments
        self.reasons: dict[Any, str] = {}

    def stops(self, names: Any) -> tuple[Stop, ...] | None:
        """The layers' order where a packed forward was found equal; None where it was not tried, or is not."""
        return self._stops.get(names) or None

    def tried(self, names: Any) -> bool:
        """Whether packing was tried."""
        return names in self._stops

    def packed(self, call: Call, given: Mapping[str, Any], rows: int, names: Any) -> Any:
        """The forward without its padding."""
        packing = Packing(given[MASK] != 0, rows, self._stops[names])
        with around(packing):
            return call({**given, MASK: None})

    def try_packing(self, call: Call, given: Mapping[str, Any], rows: int, names: Any) -> Any:
        """The forward's own result, and from then on it is known whether a packed one is equal."""
        trace = Trace(given[MASK].shape)
        with around(trace):
            wanted = call(given)
        stops, reason = trace.stops(), "no layer can do without its padding"
        if any(stop.packs and not stop.first for stop in stops):
            self._stops[names] = stops
            try:
                reason = difference(self.packed(call, given, rows, names), wanted, given[MASK] != 0)
            except (AnotherWay, NoTree) as error:
                reason = str(error)
        if reason:
            self._stops[names], self.reasons[names] = (), reason
        return wanted

    def maskless(self, call: Call, given: Mapping[str, Any], names: Any, padding: int | None) -> bool:
        """Whether the forward gives the same bits without a mask as with one that hides nothing."""
        if names not in self._maskless:
            ids = given.get("input_ids")
            salted = dict(given)
            if isinstance(ids, Tensor) and padding is not None:
                # a model that makes a mask of the ids itself shows it here
                salted["input_ids"] = ids.clone()
                salted["input_ids"].view(-1)[1::3] = padding
            salted[MASK] = torch.ones_like(given[MASK])
            one, other = tensors(call(salted)), tensors(call({**salted, MASK: None}))
            same = len(one) == len(other) and all(map(torch.equal, one, other))
            self._maskless[names] = same
        return self._maskless[names]


def difference(found: Any, wanted: Any, shown: Tensor) -> str:
    """How two results differ where a token stands, and in all that has no positions; "" where they are close."""
    ones, others = tensors(found), tensors(wanted)
    if [x.shape for x in ones] != [x.shape for x in others]:
        return "the results have other shapes without the padding"
    for one, other in zip(ones, others, strict=True):
        if not one.is_floating_point():
            continue
        if one.shape[:2] == shown.shape:
            one, other = one[shown], other[shown]
        distance = (one.double() - other.double()).abs().amax()
        if not distance <= CLOSE[one.element_size()] * other.double().abs().amax():
            return "a result depends on the padding, or on the mask in another way than through attention"
    return ""
