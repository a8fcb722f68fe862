"""A matrix times one or two vectors, with the norm before it and what follows it, for decoding (forward only).

    y   = norm(x)                                        rms, layer, or x itself
    h   = W y + b
    out = [residual +] h,  activation(h),  or  activation(h[:N]) * h[N:]  (gated)

A token reads every weight once: N * K * itemsize bytes, memory bound; all else is small. A program owns BLOCK_N rows of
W and walks along K, reading one tile of weights and of the row ahead of its products; each thread adds those up by
itself in fp32 until the end, so that the loop holds loads and multiply-adds alone. The first tile, the only one where
BLOCK_K holds a row, is on its way before the row is there; launched dependently, before the kernel that makes the row
has ended. Several tiles of rows a program, with the row taken once, were no faster (H200), nor were they as a loop
whose first tiles are on their way before the row is there: slower in every layer of GPT-2 XL and OPT 6.7B.

The norm of x is taken anew by every program, out of the L2 cache: cheaper than a launch. Of rms the scale is a factor
of the whole row, so it multiplies the sum, and the mean square is found along the way; a pass of its own before the
first weight arrives cost 11 of 111 us a LLaMA 7B layer (H200). layer takes that pass, under the first tile. Bringing
what a later kernel reads into the L2 cache meanwhile cost 1 to 2 us a layer. No atomics, one order of summing: same
input, same output.

Casting: everything in fp32, the normalised row too, which the layers round to the dtype; one rounding at the end.

Source: https://github.com/msaroufim/megakernels-vs-cuda-graphs, for the norm that every program takes anew.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsi_kernels._pdl import launch_dependents, launch_options, wait
from dsi_kernels._triton import tl, triton
from dsi_kernels.activations import check_kind
from dsi_kernels.epilogue import check_rows_product, finish, finish_reference
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes
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
    return finish_reference(h, kind, gated, residual, x.dtype)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _statistics(x_ptr, x, inside, K, eps):
    """(mean, 1 / deviation) of a row, in one pass.

    Around the middle one of three elements: neither an offset that all have in common costs digits then, nor one
    element that is far from all others.
    """
    a, b, c = (tl.load(x_ptr), tl.load(x_ptr + K // 2), tl.load(x_ptr + K - 1))
    pivot = tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c)).to(tl.float32)
    d = tl.where(inside, x - pivot, 0.0)
    total, squares = tl.reduce((d, d * d), 0, _both)
    shift = total / K
    return pivot + shift, tl.rsqrt(squares / K - shift * shift + eps)


@triton.jit
def _tile(ptr, k, K):
    """A tile of a row as it lies in memory; of a row that is not there, something."""
    tile = k
    if ptr is not None:
        tile = tl.load(ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last")
    return tile


@triton.jit
def _weights(w_ptr, n, k, N, K, GATED: tl.constexpr):
    """(a tile of the matrix, the one N rows below it if there is a gate), [BLOCK_N, BLOCK_K] in the dtype it has."""
    mask = (n < N)[:, None] & (k < K)[None, :]
    # int64 before the multiply: a head of 256k x 16k passes 2**31 elements
    rows = w_ptr + (n.to(tl.int64) * K)[:, None]
    w = tl.load(rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    up = w
    if GATED:
        up = tl.load(rows + N.to(tl.int64) * K + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    return w, up


@triton.jit
def _normed(x, mean, rstd, g, c, g_ptr, c_ptr, NORM: tl.constexpr):
    """A tile of the row as the product wants it, fp32; of rms without its scale."""
    if NORM == "layer":
        x = (x - mean) * rstd
    if g_ptr is not None:
        x = x * g.to(tl.float32)
    if c_ptr is not None:
        x = x + c.to(tl.float32)
    return x


@triton.jit
def _counted(x, squares, mean, rstd, g, c, g_ptr, c_ptr, NORM: tl.constexpr):
    """(`_normed`, squares with the tile's added where the norm is rms)."""
    x = x.to(tl.float32)
    if NORM == "rms":
        squares += x * x
    return _normed(x, mean, rstd, g, c, g_ptr, c_ptr, NORM), squares


@triton.jit
def _folded(products, FOLD: tl.constexpr):
    """Neighbours added up, those that one thread holds: [BLOCK_N, BLOCK_K // FOLD]."""
    shape: tl.constexpr = [products.shape[0], products.shape[1] // FOLD, FOLD]
    return tl.sum(tl.reshape(products, shape), axis=2)


@triton.jit
def _multiply(h, up, w, w_up, y, GATED: tl.constexpr, FOLD: tl.constexpr):
    """(h, up) with a tile's products added."""
    h += _folded(w.to(tl.float32) * y[None, :], FOLD)
    if GATED:
        up += _folded(w_up.to(tl.float32) * y[None, :], FOLD)
    return h, up


@triton.jit
def _finish(
    h, up, scale, b_ptr, r_ptr, out_ptr, n, N, row, NORM: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """The sums of BLOCK_N rows, the scale of rms, what follows a product, and the store."""
    h, up, inside, at = tl.sum(h, axis=1), tl.sum(up, axis=1), n < N, row * N + n
    if NORM == "rms":
        h, up = h * scale, up * scale
    h = finish(h, up, b_ptr, r_ptr, at, n, N, inside, KIND, GATED)
    tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _whole_row(x_ptr, k, K, eps, g, c, g_ptr, c_ptr, NORM: tl.constexpr):
    """(the row as the product wants it, its scale), where it is one tile."""
    x, scale, mean, rstd = _tile(x_ptr, k, K).to(tl.float32), 1.0, 0.0, 1.0
    if NORM == "rms":
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    if NORM == "layer":
        mean, rstd = _statistics(x_ptr, x, k < K, K, eps)
    return _normed(x, mean, rstd, g, c, g_ptr, c_ptr, NORM), scale


@triton.jit
def _whole_tile(
    w, w_up, y, scale, y2, scale2, b_ptr, r_ptr, out_ptr, n, N,
    NORM: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, TWO: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """One or two whole rows times BLOCK_N rows of the matrix, to the end."""
    zeros = tl.zeros([w.shape[0], w.shape[1] // FOLD], tl.float32)
    h, up = _multiply(zeros, zeros, w, w_up, y, GATED, FOLD)
    _finish(h, up, scale, b_ptr, r_ptr, out_ptr, n, N, 0, NORM, KIND, GATED)
    if TWO:
        h, up = _multiply(zeros, zeros, w, w_up, y2, GATED, FOLD)
        _finish(h, up, scale2, b_ptr, r_ptr, out_ptr, n, N, 1, NORM, KIND, GATED)


@triton.jit
def _figures(x_ptr, K, eps, NORM: tl.constexpr, BLOCK_ROW: tl.constexpr):
    """(mean, 1 / deviation) of a row of several tiles for the layer norm; else (0, 1)."""
    mean, rstd = 0.0, 1.0
    if NORM == "layer":
        k = tl.arange(0, BLOCK_ROW)
        mean, rstd = _statistics(x_ptr, _tile(x_ptr, k, K).to(tl.float32), k < K, K, eps)
    return mean, rstd


@triton.jit
def _by_rows(
    x_ptr, w_ptr, b_ptr, g_ptr, c_ptr, r_ptr, out_ptr, N, K, eps,
    NORM: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, TWO: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, FOLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row is one tile."""
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # the weights are on their way before the row is there
    w, w_up = _weights(w_ptr, n, k, N, K, GATED)
    g, c = _tile(g_ptr, k, K), _tile(c_ptr, k, K)
    if PDL:
        wait()
    y, scale = _whole_row(x_ptr, k, K, eps, g, c, g_ptr, c_ptr, NORM)
    y2, scale2 = y, scale
    if TWO:
        y2, scale2 = _whole_row(x_ptr + K, k, K, eps, g, c, g_ptr, c_ptr, NORM)
    _whole_tile(w, w_up, y, scale, y2, scale2, b_ptr, r_ptr, out_ptr, n, N, NORM, KIND, GATED, TWO, FOLD)


@triton.jit
def _by_tiles(
    x_ptr, w_ptr, b_ptr, g_ptr, c_ptr, r_ptr, out_ptr, N, K, eps,
    NORM: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, TWO: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_ROW: tl.constexpr, FOLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row has several tiles, and is walked along with the rows of the matrix."""
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # the first weights are on their way before the row is there
    w, w_up = _weights(w_ptr, n, k, N, K, GATED)
    g, c = _tile(g_ptr, k, K), _tile(c_ptr, k, K)
    if PDL:
        wait()
    x = _tile(x_ptr, k, K)
    mean, rstd = _figures(x_ptr, K, eps, NORM, BLOCK_ROW)
    x2, mean2, rstd2 = x, mean, rstd
    if TWO:
        x2 = _tile(x_ptr + K, k, K)
        mean2, rstd2 = _figures(x_ptr + K, K, eps, NORM, BLOCK_ROW)
    squares = tl.zeros([BLOCK_K], tl.float32)
    h = tl.zeros([BLOCK_N, BLOCK_K // FOLD], tl.float32)
    squares2, up, h2, up2 = squares, h, h, h
    for k0 in tl.range(BLOCK_K, K + BLOCK_K, BLOCK_K, num_stages=1):
        # everything a tile ahead; beyond the last one the mask lets nothing be read
        k = k0 + tl.arange(0, BLOCK_K)
        next_w, next_up = _weights(w_ptr, n, k, N, K, GATED)
        next_x, next_g, next_c = _tile(x_ptr, k, K), _tile(g_ptr, k, K), _tile(c_ptr, k, K)
        y, squares = _counted(x, squares, mean, rstd, g, c, g_ptr, c_ptr, NORM)
        h, up = _multiply(h, up, w, w_up, y, GATED, FOLD)
        if TWO:
            y, squares2 = _counted(x2, squares2, mean2, rstd2, g, c, g_ptr, c_ptr, NORM)
            h2, up2 = _multiply(h2, up2, w, w_up, y, GATED, FOLD)
            x2 = _tile(x_ptr + K, k, K)
        w, w_up, x, g, c = next_w, next_up, next_x, next_g, next_c
    scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    _finish(h, up, scale, b_ptr, r_ptr, out_ptr, n, N, 0, NORM, KIND, GATED)
    if TWO:
        scale = tl.rsqrt(tl.sum(squares2, axis=0) / K + eps)
        _finish(h2, up2, scale, b_ptr, r_ptr, out_ptr, n, N, 1, NORM, KIND, GATED)


@triton.jit(do_not_specialize=["eps"])
def _matvec_kernel(
    x_ptr, w_ptr, b_ptr, g_ptr, c_ptr, r_ptr, out_ptr, N, K, eps,
    NORM: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, TWO: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROW: tl.constexpr, FOLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        launch_dependents()
    eps = tl.cast(eps, tl.float32)
    if WHOLE:
        _by_rows(
            x_ptr, w_ptr, b_ptr, g_ptr, c_ptr, r_ptr, out_ptr, N, K, eps, NORM, KIND, GATED, TWO, BLOCK_N, BLOCK_K,
            FOLD, PDL,
        )  # fmt: skip
    else:
        _by_tiles(
            x_ptr, w_ptr, b_ptr, g_ptr, c_ptr, r_ptr, out_ptr, N, K, eps, NORM, KIND, GATED, TWO, BLOCK_N, BLOCK_K,
            BLOCK_ROW, FOLD, PDL,
        )  # fmt: skip


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
    check_rows_product("matvec", MAX_ROWS, x, weight, vectors.pop("bias"), gated, residual)
    for name, t in vectors.items():
        if t is not None and t.shape != x.shape[1:]:
            raise ValueError(f"matvec: {name} has shape {tuple(t.shape)}; ({x.shape[1]},) is needed")


def shape_key(rows: int, width: int, columns: int, itemsize: int, norm: str = "") -> str:
    """What a product's settings are kept under: a layer norm, which goes over the row first, has its own."""
    return f"rows={rows},n={width},k={columns},bytes={itemsize}" + (",layer" if norm == "layer" else "")


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
    key = shape_key(rows, weight.shape[0], K, x.element_size(), norm)
    sizes = launch_config("matvec", key, device_facts(x.device)[0]) if config is None else config
    block_k = min(sizes["block_k"], triton.next_power_of_2(K))
    with torch.cuda.device_of(x):
        _matvec_kernel[(triton.cdiv(N, sizes["block_n"]),)](
            x, weight, bias, norm_weight if norm else None, norm_bias if norm == "layer" else None, residual, out, N, K,
            eps, NORM=norm, KIND=kind, GATED=gated, TWO=rows == 2, WHOLE=block_k >= K, BLOCK_N=sizes["block_n"],
            BLOCK_K=block_k, BLOCK_ROW=triton.next_power_of_2(K), FOLD=min(16 // x.element_size(), block_k),
            num_warps=sizes["num_warps"], **launch_options(x.device),
        )  # fmt: skip
    return out
