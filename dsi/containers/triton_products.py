"""The matrix products of a decode step through dsi_kernels: one or two rows, a few, or more than a kernel takes.

One and two rows go through `matvec`, up to 32 through `skinny`, where the device's settings say that it is faster than
cuBLAS; everything else is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dsi.containers.launches import IN_GRAPH
from dsi.containers.linear import FusedLinear
from dsi.containers.ops import NormOp

Product = Callable[..., Tensor]


def product_of(x: Tensor, weight: Tensor, norm: NormOp | None = None) -> Product | None:
    """The kernel that takes norm(x) @ weight^T in a graph, or None where torch is to."""
    if not IN_GRAPH.get() or x.dim() != 2:
        return None
    if not x.is_contiguous() or not weight.is_contiguous() or weight.dtype is not x.dtype:
        return None
    if norm is not None and not _known(norm):
        return None
    return _kernel(x, weight, normed=norm is not None)


def _known(norm: NormOp) -> bool:
    return norm.kind == "layer" or (norm.weight is not None and not norm.offset)


def _kernel(x: Tensor, weight: Tensor, *, normed: bool) -> Product | None:
    from dsi_kernels.matvec import MAX_NORM_WIDTH, matvec
    from dsi_kernels.matvec import MAX_ROWS as FEWEST
    from dsi_kernels.skinny import HALVES, MAX_ROWS, skinny, skinny_config

    if x.shape[0] <= FEWEST:
        return None if normed and x.shape[1] > MAX_NORM_WIDTH else matvec
    if x.shape[0] > MAX_ROWS or x.dtype not in HALVES:
        return None
    return None if skinny_config(x, weight)["library"] == 2 else skinny


def linear_product(linear: Any, x: Tensor, norm: NormOp | None = None) -> Product | None:
    """As `product_of`, of a layer."""
    # a rank's part of a layer has a class of its own
    plain = type(linear) is FusedLinear and linear.form == "aten"
    return product_of(x, linear.weight, norm) if plain else None


def sum_product(linear: Any, x: Tensor, residual: Tensor, norm: NormOp) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel that takes linear(x) + residual, and its norm with the sum of the product's parts; None for none."""
    from dsi_kernels.skinny import skinny, skinny_norm

    taken = _known(norm) and residual.is_contiguous() and linear_product(linear, x) is skinny
    return skinny_norm if taken else None


def norm_arguments(norm: NormOp) -> dict[str, Any]:
    """A norm, as the kernels take it."""
    return {"norm": norm.kind, "norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
