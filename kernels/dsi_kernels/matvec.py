"""A matrix times one or two vectors, with the norm before it and what follows it, for decoding (forward only).

    y   = norm(x)                                        rms, layer, or x itself
    h   = W y + b
    out = [residual +] h,  activation(h),  or  activation(h[:N]) * h[N:]  (gated)

A token reads every weight once: N * K * itemsize bytes, memory bound; all else is small. A program owns BLOCK_N rows of
W and walks along K, reading one tile ahead of its products; each thread adds those up by itself in fp32 until the end,
so that the loop holds loads and multiply-adds alone. The first tile is on its way before the row is there; launched
dependently, before the kernel that makes the row has ended.

The norm of x is taken anew by every program, out of the L2 cache: cheaper than a launch. Of rms the scale is a factor
of the whole row, so it multiplies the sum, and the mean square is found along the way; a pass of its own before the
first weight arrives cost 11 of 111 us a LLaMA 7B layer (H200). layer takes that pass, under the first tile: its
variance would lose digits otherwise. No atomics, one order of summing: same input, same output.

Casting: everything in fp32, the normalised row too, which the layers round to the dtype; one rounding at the end.

Source: https://github.com/msaroufim/megakernels-vs-cuda-graphs, for the norm that every program takes anew.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsi_kernels._pdl import launch_dependents, launch_options, wait
from dsi_kernels._triton import tl, triton
from dsi_kernels.activations import activate, activate_reference, check_kind
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, shapes
from dsi_kernels.tuned import device_facts, launch_config

MAX_ROWS = 2
# the norm holds a whole row of x
MAX_NORM_WIDTH = 16384
NORMS = ("", "rms", "layer")


def matvec_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "",
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    y = x.float()
    if norm == "rms":
        y = F.rms_norm(y, x.shape[-1:], _float(norm_weight), eps)
    elif norm == "layer":
        y = F.layer_norm(y, x.shape[-1:], _float(norm_weight), _float(norm_bias), eps)
    h = F.linear(y, weight.float(), _float(bias))
    if gated:
        gate, up = h.chunk(2, dim=-1)
        h = activate_reference(gate, kind) * up
    elif kind:
        h = activate_reference(h, kind)
    if residual is not None:
        h = residual.float() + h
    return h.to(x.dtype)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


@triton.jit
def _statistics(x_ptr, K, eps, NORM: tl.constexpr, BLOCK_ROW: tl.constexpr):
    """(mean, 1 / deviation) of one row, fp32, for the layer norm; else (0, 1)."""
    mean, rstd = 0.0, 1.0
    if NORM == "layer":
        k = tl.arange(0, BLOCK_ROW)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=0) / K
        x = tl.where(k < K, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    return mean, rstd


@triton.jit
def _row(x_ptr, k, K, mean, rstd, g_ptr, c_ptr, NORM: tl.constexpr):
    """(a tile of the row as the product wants it, the same as it lies in memory), both [BLOCK_K] fp32."""
    x = tl.load(x_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
    y = x
    if NORM == "rms":
        y = x * tl.load(g_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if NORM == "layer":
        y = (x - mean) * rstd
        if g_ptr is not None:
            y = y * tl.load(g_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if c_ptr is not None:
            y = y + tl.load(c_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        y = tl.where(k < K, y, 0.0)
    return y, x


@triton.jit
def _weights(w_rows, k, inside, N, K, GATED: tl.constexpr):
    """(a tile of the matrix, the one N rows below it if there is a gate), [BLOCK_N, BLOCK_K] in the dtype it has."""
    mask = inside[:, None] & (k < K)[None, :]
    w = tl.load(w_rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    up = w
    if GATED:
        # int64 before the multiply
        second = w_rows + N.to(tl.int64) * K
        up = tl.load(second + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    return w, up


@triton.jit
def _folded(products, FOLD: tl.constexpr):
    """Neighbours added up, those that one thread holds: [BLOCK_N, BLOCK_K // FOLD]."""
    shape: tl.constexpr = [products.shape[0], products.shape[1] // FOLD, FOLD]
    return tl.sum(tl.reshape(products, shape), axis=2)


@triton.jit
def _multiply(
    h, up, squares, w, w_up, x_ptr, k, K, mean, rstd, g_ptr, c_ptr,
    NORM: tl.constexpr, GATED: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """(h, up, squares) with a tile's products added."""
    y, x = _row(x_ptr, k, K, mean, rstd, g_ptr, c_ptr, NORM)
    if NORM == "rms":
        squares += x * x
    h += _folded(w.to(tl.float32) * y[None, :], FOLD)
    if GATED:
        up += _folded(w_up.to(tl.float32) * y[None, :], FOLD)
    return h, up, squares


@triton.jit
def _finish(
    h, up, squares, K, eps, b_ptr, r_ptr, out_ptr, n, N, row,
    NORM: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The sums of BLOCK_N rows, the scale of rms, bias, activation, gate and residual, and the store."""
    inside = n < N
    h, up = tl.sum(h, axis=1), tl.sum(up, axis=1)
    if NORM == "rms":
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        h, up = h * scale, up * scale
    if b_ptr is not None:
        h += tl.load(b_ptr + n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(b_ptr + N + n, mask=inside, other=0.0).to(tl.float32)
    if KIND != "":
        h = activate(h, KIND)
    if GATED:
        h = h * up
    at = row * N + n
    if r_ptr is not None:
        h += tl.load(r_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["eps"])
def _matvec_kernel(
    x_ptr, w_ptr, b_ptr, g_ptr, c_ptr, r_ptr, out_ptr, N, K, eps,
    NORM: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, TWO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROW: tl.constexpr, FOLD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    eps, rows, k = tl.cast(eps, tl.float32), n < N, tl.arange(0, BLOCK_K)
    # int64 before the multiply: a head of 256k x 16k passes 2**31 elements
    w_rows = w_ptr + (n.to(tl.int64) * K)[:, None]
    # the first weights are on their way before the row is there, be it from the kernel before or from its own norm
    w, w_up = _weights(w_rows, k, rows, N, K, GATED)
    if PDL:
        wait()

    mean, rstd = _statistics(x_ptr, K, eps, NORM, BLOCK_ROW)
    mean2, rstd2 = 0.0, 1.0
    if TWO:
        mean2, rstd2 = _statistics(x_ptr + K, K, eps, NORM, BLOCK_ROW)
    squares, squares2 = tl.zeros([BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    h, up = tl.zeros([BLOCK_N, BLOCK_K // FOLD], tl.float32), tl.zeros([BLOCK_N, BLOCK_K // FOLD], tl.float32)
    h2, up2 = tl.zeros([BLOCK_N, BLOCK_K // FOLD], tl.float32), tl.zeros([BLOCK_N, BLOCK_K // FOLD], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=1):
        k = k0 + tl.arange(0, BLOCK_K)
        # a tile ahead; beyond the last one the mask lets nothing be read
        next_w, next_up = _weights(w_rows, k + BLOCK_K, rows, N, K, GATED)
        h, up, squares = _multiply(
            h, up, squares, w, w_up, x_ptr, k, K, mean, rstd, g_ptr, c_ptr, NORM, GATED, FOLD
        )  # fmt: skip
        if TWO:
            h2, up2, squares2 = _multiply(
                h2, up2, squares2, w, w_up, x_ptr + K, k, K, mean2, rstd2, g_ptr, c_ptr, NORM, GATED, FOLD
            )  # fmt: skip
        w, w_up = next_w, next_up
    _finish(h, up, squares, K, eps, b_ptr, r_ptr, out_ptr, n, N, 0, NORM, KIND, GATED)
    if TWO:
        _finish(h2, up2, squares2, K, eps, b_ptr, r_ptr, out_ptr, n, N, 1, NORM, KIND, GATED)


def _check_options(x: Tensor, norm: str, norm_weight: Tensor | None, kind: str, gated: bool) -> None:
    if norm not in NORMS:
        raise ValueError(f"matvec: norm {norm!r} is unknown; one of {', '.join(map(repr, NORMS))} will do")
    if norm and x.shape[1] > MAX_NORM_WIDTH:
        raise ValueError(f"matvec: the norm takes rows of up to {MAX_NORM_WIDTH}, not {x.shape[1]}")
    if norm == "rms" and norm_weight is None:
        raise ValueError("matvec: the rms norm has a weight")
    if kind or gated:
        check_kind("matvec", kind)


def _check_shapes(x: Tensor, weight: Tensor, gated: bool, residual: Tensor | None, **vectors: Tensor | None) -> None:
    if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"matvec: {shapes(x=x, weight=weight)} must be [1 to {MAX_ROWS}, K] and [N, K]")
    rows, (width, K) = x.shape[0], weight.shape
    if gated and width % 2:
        raise ValueError(f"matvec: a gated weight has rows for gate and for up; {width} are odd")
    for name, t in vectors.items():
        size = width if name == "bias" else K
        if t is not None and t.shape != (size,):
            raise ValueError(f"matvec: {name} has shape {tuple(t.shape)}; ({size},) is needed")
    wanted = (rows, width // 2 if gated else width)
    if residual is not None and residual.shape != wanted:
        raise ValueError(f"matvec: residual has shape {tuple(residual.shape)}; {wanted} is needed")


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "",
    gated: bool = False,
    residual: Tensor | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:
    """The rows of x, normalised if asked, times the matrix; with bias, activation, gate and residual.

    Args:
        x: [B, K], B 1 or 2, fp16, bf16 or fp32, contiguous.
        weight: [N, K], same dtype, contiguous; where gated [2 N, K], the gate's rows first.
        bias: [N], where gated [2 N], or None.
        norm: "" for none, "rms" or "layer"; over K, up to 16384.
        norm_weight, norm_bias: [K] or None; rms needs a weight and has no bias.
        eps: of the norm; dimensionless.
        kind: an activation of `dsi_kernels.KINDS`, or "" for none; a gate has one.
        gated: activation(gate) * up.
        residual: [B, N], added last; or None.
        config: block_n, block_k and num_warps in the place of the tuned ones.

    Returns:
        [B, N] in x's dtype. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout, devices, norm or kind do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    _check_shapes(x, weight, gated, residual, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    _check_options(x, norm, norm_weight, kind, gated)
    operands = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check_dtypes("matvec", **operands, residual=residual)
    check_contiguous("matvec", **operands, residual=residual)
    check_devices("matvec", **operands, residual=residual)

    rows, K = x.shape
    N = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((rows, N), dtype=x.dtype, device=x.device)
    shape = f"rows={rows},n={weight.shape[0]},k={K},bytes={x.element_size()}"
    sizes = launch_config("matvec", shape, device_facts(x.device)[0]) if config is None else config
    block_k = min(sizes["block_k"], triton.next_power_of_2(K))
    with torch.cuda.device_of(x):
        _matvec_kernel[(triton.cdiv(N, sizes["block_n"]),)](
            x, weight, bias, norm_weight, norm_bias, residual, out, N, K, eps, NORM=norm, KIND=kind, GATED=gated,
            TWO=rows == 2, BLOCK_N=sizes["block_n"], BLOCK_K=block_k, BLOCK_ROW=triton.next_power_of_2(K),
            FOLD=min(16 // x.element_size(), block_k), num_warps=sizes["num_warps"],
            **launch_options(x.device),
        )  # fmt: skip
    return out
