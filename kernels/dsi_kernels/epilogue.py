"""What follows a product's sums before they are stored: bias, activation, gate and residual."""

from __future__ import annotations

from dsi_kernels._triton import tl, triton
from dsi_kernels.activations import activate


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
