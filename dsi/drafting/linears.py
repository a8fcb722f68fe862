"""Which modules are linear layers, and how they hold their weights: found by what they compute."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor

from dsi.drafting.replay import Run, same
from dsi.fit import CONV1D, LINEAR, class_name


@attrs.frozen(kw_only=True)
class LinearKind:
    """How a linear layer holds its weight; see `dsi.policy.Linear`."""

    transposed: bool
    cls: str
    rows: int
    columns: int

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a slot."""
        return {"transposed": self.transposed, "cls": self.cls}


def read_linear(module: Any, run: Run, path: str) -> LinearKind | None:
    """How the module is a linear layer of what went into it; None where it is none, or did not run."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    given, made = run.inputs.get(path), run.outputs.get(path)
    if weight is None or weight.dim() != 2 or given is None or made is None:
        return None
    for transposed in (False, True):
        matrix = weight.t() if transposed else weight
        if given.shape[-1] == matrix.shape[1] and _multiplies(given, matrix, bias, made):
            plain = class_name(module) == (CONV1D if transposed else LINEAR)
            return LinearKind(
                transposed=transposed,
                cls="" if plain else class_name(module),
                rows=matrix.shape[0],
                columns=matrix.shape[1],
            )
    return None


def _multiplies(given: Tensor, matrix: Tensor, bias: Tensor | None, made: Tensor) -> bool:
    found = given @ matrix.t()
    return same(found if bias is None else found + bias, made)
