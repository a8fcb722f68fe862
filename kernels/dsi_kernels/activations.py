"""The activations that the elementwise kernels share, each as a torch reference and as an inline for Triton kernels.

    silu         x * sigmoid(x)
    gelu         x * (1 + erf(x / sqrt(2))) / 2
    gelu_tanh    x * (1 + tanh(u)) / 2 = x * sigmoid(2 u),  u = sqrt(2 / pi) * (x + 0.044715 x^3)
    relu         max(x, 0), NaN kept
    quick_gelu   x * sigmoid(1.702 x)

All in fp32; the caller rounds, once. torch does the same for silu, gelu and relu. transformers writes quick_gelu and
some tanh GELUs as several torch operations, each rounded to the dtype: these have the one rounding instead.

Where the result is rounded to 16 bit, `rounded_kind` names a gelu with half of erf's instructions: x * sigmoid(u); u,
the logarithm of the odds of the normal distribution, is x times a polynomial of x^2. Before the rounding it is within
4e-7 of the exact value (computed in fp32: 8e-7), and for |x| <= 2 within 3e-6 of itself, a hundredth of the rounding
to fp16: 99.9 % of normal arguments get the bits of the exact value. 1 + erf, which cancels for negative x, is as far
from it.

Source: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415; Elfwing et al. 2017, https://arxiv.org/abs/1702.03118.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsi_kernels._triton import tl, triton

KINDS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


def check_kind(op: str, kind: str) -> None:
    """Nothing for a kind in KINDS, a ValueError that lists them for any other."""
    if kind not in KINDS:
        raise ValueError(f"{op}: kind {kind!r} is unknown; one of {', '.join(KINDS)} will do")


def activate_reference(x: Tensor, kind: str) -> Tensor:
    """The activation of x, computed in fp32 and rounded to x's dtype."""
    check_kind("activate", kind)
    h = x.float()
    if kind == "silu":
        h = F.silu(h)
    elif kind == "relu":
        h = F.relu(h)
    elif kind == "quick_gelu":
        h = h * torch.sigmoid(1.702 * h)
    else:
        h = F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")
    return h.to(x.dtype)


def rounded_kind(kind: str, dtype: torch.dtype) -> str:
    """How `activate` shall compute a kind whose result is rounded to this dtype."""
    return "gelu_16" if kind == "gelu" and dtype.itemsize == 2 else kind


@triton.jit
def _gelu_16(x) -> tl.tensor:
    """gelu for results of 16 bit; log2(odds) / x was fitted for |x| <= 5, small x exp(x^2 / 5.8) times nearer."""
    s = tl.minimum(x * x, 25.0)
    p = -9.982943160883331e-11 * s + 1.0985162884225123e-08
    p = p * s - 5.096425678415925e-07
    p = p * s + 1.2715040301721507e-05
    p = p * s - 0.000165583796910243
    p = p * s - 8.212413593519903e-05
    p = p * s + 0.1048290526048706
    p = p * s + 2.3022070765900624
    # exp2 of a large number is inf, and x over inf 0
    return x / (1.0 + tl.exp2(-x * p))


@triton.jit
def activate(x, KIND: tl.constexpr) -> tl.tensor:
    """The activation of an fp32 block, in fp32."""
    if KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu_16":
        y = _gelu_16(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 1 + tanh(u) is 2 sigmoid(2 u), without the cancellation for negative u; 1.5957... is 2 sqrt(2 / pi)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(KIND == "relu")
        y = tl.where(x < 0.0, 0.0, x)
    return y
