"""The linear layer whose product is one summand of many: each rank has some input columns, and the ranks add up."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dsi.containers.linear import FusedLinear, Source

Reduce = Callable[[Tensor], Tensor]


class SummedLinear(FusedLinear):
    """A `FusedLinear` that is split by rows; a residual is added after the sum, on every rank.

    It is a class of its own so that a layer that is not split pays nothing, not even a test.

    Args:
        weight: [N, K / ranks].
        bias: [N] on one rank, None on the others.
        sources: of this rank's columns.
        reduce: the sum over the ranks; may overwrite its argument.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sources: tuple[Source, ...], reduce: Reduce) -> None:
        super().__init__(weight, bias, sources)
        self.reduce = reduce

    def summand(self, x: Tensor) -> Tensor:
        """[..., K / ranks] -> [..., N], this rank's product alone."""
        return super().forward(x)

    def add_summands(self, x: Tensor, other: Tensor) -> Tensor:
        """All ranks' `summand(x) + other` together."""
        return self.reduce(super().forward(x).add_(other))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K / ranks] -> [..., N], all ranks' products together."""
        return self.reduce(super().forward(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`forward(x) + residual`."""
        return self.forward(x).add_(residual)
