"""Launches past Triton's look-up and past the operator's own checks, where all is as it was but the addresses.

At every launch Triton reads the dtype and alignment of each tensor, the value of each number and each option, to find
what it compiled for them, and before it the operator has checked shapes, strides and devices. An operator that is
called with the same operands, addresses apart, for every layer of a model keeps what that came to: `Launches` by what
the operands are, `Launch` the compiled kernel, which is launched as Triton's own tutorials launch one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dsi_kernels._triton import INSTALLED, INTERPRETED

# addresses that Triton compiles wide loads for
ALIGNED = 16
# launches that an operator keeps: prompts come in any length
KEPT = 512


class Launch:
    """One kernel over one grid, with every argument but the first few.

    Args:
        kernel: of `triton.jit`.
        grid: its sizes, up to three; nothing is launched where one is 0.
        fixed: the arguments behind those that a call gives, in order, constexprs among them.
        options: of the launch, such as num_warps.
    """

    __slots__ = ("_compiled", "_device", "fixed", "grid", "kernel", "options")

    def __init__(self, kernel: Any, grid: tuple[int, ...], fixed: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self.kernel, self.fixed, self.options = kernel, fixed, dict(options)
        self.grid = (*grid, 1, 1)[:3]
        self._compiled: Any = None
        self._device = -1

    def __call__(self, *given: Any) -> None:
        """Launch it.

        Args:
            *given: the first arguments: tensors, their descriptors, or None, of which all but the addresses is as at
                every call, the first no None; numbers only where the kernel is not specialized on them.
        """
        addresses = 0
        for one in given:
            if isinstance(one, Tensor):
                addresses |= one.data_ptr()
        aligned = not addresses % ALIGNED
        if aligned and self._compiled is not None and self._device == torch.cuda.current_device():
            self._compiled[self.grid](*given, *self.fixed)
        elif all(self.grid):
            self._launched(given, aligned=aligned)

    def _launched(self, given: tuple[Any, ...], *, aligned: bool) -> None:
        # a descriptor's tensor
        first: Tensor = given[0] if isinstance(given[0], Tensor) else given[0].base
        with torch.cuda.device_of(first):
            found = self.kernel[self.grid](*given, *self.fixed, **self.options)
        if aligned and first.is_cuda and INSTALLED and not INTERPRETED:
            self._compiled, self._device = found, first.device.index


Made = TypeVar("Made")


class Launches(Generic[Made]):
    """The launches of one operator, and what else it has to know of them, by what its operands are."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Made] = {}

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made for such operands; `make` checks them and makes it where they are new."""
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            found = self._known[key] = make()
        return found


def kind_of(*operands: Tensor | None) -> tuple[Any, ...]:
    """What operands are, their addresses apart."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in operands])
