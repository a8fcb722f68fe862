"""What follows a product's sums before they are stored: bias, activation, gate and residual; and what must fit them."""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._triton import tl, triton
from dsi_kernels.activations import activate, activate_reference
from dsi_kernels.operands import shapes


@triton.jit
def finish(h, up, b_ptr, r_ptr, at, n, N, inside, KIND: tl.constexpr, GATED: tl.constexpr) -> tl.tensor:
    """Bias, activation, gate and residual on sums of any shape, fp32; n are columns that broadcast over it."""
    if b_ptr is not None:
        h += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(b_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
    if KIND != "":
        h = activate(h, KIND)
    if GATED:
        h = h * up
    if r_ptr is not None:
        h += tl.load(r_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return h


def finish_reference(h: Tensor, kind: str, gated: bool, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `finish` must compute of a product with its bias, float32 [..., N], gated [..., 2 N]."""
    if gated:
        gate, up = h.chunk(2, dim=-1)
        h = activate_reference(gate, kind) * up
    elif kind:
        h = activate_reference(h, kind)
    if residual is not None:
        h = residual.float() + h
    return h.to(dtype)


def check_rows_product(
    op: str, most: int, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, residual: Tensor | None
) -> None:
    """Raises ValueError, in the name of `op`, where the product of up to `most` rows and what follows do not fit."""
    if x.ndim != 2 or not 1 <= x.shape[0] <= most or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: {shapes(x=x, weight=weight)} must be [1 to {most}, K] and [N, K]")
    rows, width = x.shape[0], weight.shape[0]
    if gated and width % 2:
        raise ValueError(f"{op}: a gated weight has rows for gate and for up; {width} are odd")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; ({width},) is needed")
    wanted = (rows, width // 2 if gated else width)
    if residual is not None and residual.shape != wanted:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; {wanted} is needed")
