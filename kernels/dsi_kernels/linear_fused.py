"""A linear layer with what follows it, for the tokens of a whole forward (forward only).

    h = x W^T + b
    y = activation(h)  or  activation(h[:N]) * h[N:]  (gated),  [+ residual]

A program multiplies one tile of y through the tensor cores; a gated one owns the two halves of its columns. Programs
that share rows of x run near one another (group_m), so that W comes out of the L2 cache. Where M * N is small, tiles
alone do not fill the device: `splits` cuts K, each part leaves its sums in fp32, and a second kernel adds them up in a
fixed order. No atomics: same input, same output. Work: 2 * M * N * K operations; bytes: x, W and y once.

Where kernels begin early (`_pdl`) the programs have their part of W brought to the L2 cache while the kernel before
still runs: no value is read, so that nothing depends on who writes it.

Casting: sums, bias, activation, gate and residual in fp32, and one rounding at the end, where a linear layer and what
follows it round two or three times. fp32 is multiplied as fp32, not as TF32.

Source: Osama et al. 2023, https://arxiv.org/abs/2301.03598, for cutting K where tiles are few.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dsi_kernels._pdl import begin, launch_dependents, launch_options, wait
from dsi_kernels._triton import tl, triton
from dsi_kernels.activations import check_kind, rounded_kind
from dsi_kernels.epilogue import finish, finish_reference
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, shapes
from dsi_kernels.tuned import device_facts, launch_config

# values of the setting `choice`: a library's product and a kernel of its own for what follows, or this op
LIBRARY, FUSED = 1, 2
# a bucket holds the token counts up to a power of two, from the first to the last
FIRST_BUCKET, LAST_BUCKET = 16, 16384
# the second kernel's columns a program
BLOCK = 1024


def linear_fused_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "",
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    h = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return finish_reference(h, kind, gated, residual, x.dtype)


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(row tile, column tile) of a program; GROUP_M row tiles pass over the columns together."""
    tile, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def _fetch(w_ptr, n, N, K, lo, hi, each, sharers):
    """Has columns lo to hi of rows n of W brought to the L2 cache, by `sharers` programs of which this is `each`."""
    # elements of a cache line, and of eight
    line: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
    run: tl.constexpr = 8 * line
    row = tl.minimum(n, N - 1).to(tl.int64) * K
    for k0 in tl.range(lo + each * run, hi, sharers * run):
        # at the end of a row the last line once more: nothing beyond the matrix is asked for
        columns = tl.minimum(k0 + tl.arange(0, 8) * line, hi - 1)
        at = (w_ptr + row[:, None] + columns[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _begin_early(w_ptr, n, N, K, lo, hi, each, sharers, GATED: tl.constexpr):
    """What can be done before the kernels before have ended, and their end."""
    launch_dependents()
    _fetch(w_ptr, n, N, K, lo, hi, each, sharers)
    if GATED:
        _fetch(w_ptr + tl.cast(N, tl.int64) * K, n, N, K, lo, hi, each, sharers)
    wait()


@triton.jit
def _store_part(y_ptr, h, up, split, m, n, M, N, inside, GATED: tl.constexpr):
    """One part's sums into [SPLITS, M, N], gated [SPLITS, M, 2 N]."""
    width = 2 * N if GATED else N
    at = (split.to(tl.int64) * M + m)[:, None] * width + n[None, :]
    tl.store(y_ptr + at, h, mask=inside)
    if GATED:
        tl.store(y_ptr + at + N, up, mask=inside)


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, b_ptr, r_ptr, y_ptr, M, N, K,
    KIND: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr, RAGGED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N]; or with SPLITS > 1 the sums of each part of K, [SPLITS, M, N], gated [SPLITS, M, 2 N], fp32."""
    tile_m, tile_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split, k = tl.program_id(1), tl.arange(0, BLOCK_K)
    rows, columns = (m < M)[:, None], (n < N)[None, :]
    inside = rows & columns
    step = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
    lo, hi = split * step, tl.minimum(split * step + step, K)
    if PDL:
        _begin_early(w_ptr, n, N, K, lo, hi, tile_m, tl.cdiv(M, BLOCK_M), GATED)

    # int64 before the multiply: 128k tokens of width 16384 pass 2**31 elements
    x_at = x_ptr + (m.to(tl.int64) * K)[:, None] + k[None, :]
    w_at = w_ptr + (n.to(tl.int64) * K)[None, :] + k[:, None]
    h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(lo, hi, BLOCK_K, num_stages=STAGES):
        x_in, w_in = rows, columns
        if RAGGED:
            x_in, w_in = rows & (k0 + k < hi)[None, :], columns & (k0 + k < hi)[:, None]
        x = tl.load(x_at + k0, mask=x_in, other=0.0)
        w = tl.load(w_at + k0, mask=w_in, other=0.0)
        h = tl.dot(x, w, h, input_precision="ieee")
        if GATED:
            second = tl.load(w_at + tl.cast(N, tl.int64) * K + k0, mask=w_in, other=0.0)
            up = tl.dot(x, second, up, input_precision="ieee")

    if SPLITS > 1:
        _store_part(y_ptr, h, up, split, m, n, M, N, inside, GATED)
    else:
        at = (m.to(tl.int64) * N)[:, None] + n[None, :]
        h = finish(h, up, b_ptr, r_ptr, at, n[None, :], N, inside, KIND, GATED)
        tl.store(y_ptr + at, h.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_parts(p_ptr, row, cols, inside, M, width, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr) -> tl.tensor:
    """The sum over parts [SPLITS, M, width] of columns of one row, in order, fp32 [BLOCK_D]."""
    h = tl.zeros([BLOCK_D], tl.float32)
    for split in tl.static_range(SPLITS):
        at = (tl.cast(M, tl.int64) * split + row) * width + cols
        h += tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return h


@triton.jit
def _sum_kernel(
    p_ptr, b_ptr, r_ptr, y_ptr, M, N,
    KIND: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < N
    width = 2 * N if GATED else N
    h = sum_parts(p_ptr, row, cols, inside, M, width, SPLITS, BLOCK_D)
    up = tl.zeros([BLOCK_D], tl.float32)
    if GATED:
        up = sum_parts(p_ptr + N, row, cols, inside, M, width, SPLITS, BLOCK_D)
    h = finish(h, up, b_ptr, r_ptr, row * N + cols, cols, N, inside, KIND, GATED)
    tl.store(y_ptr + row * N + cols, h.to(y_ptr.dtype.element_ty), mask=inside)


def linear_config(x: Tensor, weight: Tensor, follows: str) -> Mapping[str, int]:
    """The tuned settings of a product, `choice` among them: whether it is this op's (FUSED) or a library's (LIBRARY).

    Args:
        x: [..., K].
        weight: [N, K], gated [2 N, K].
        follows: what comes after it: "" for nothing, an activation's kind, "gate", "add" or "norm".
    """
    tokens, itemsize = x.numel() // x.shape[-1], x.element_size()
    bucket = min(max(FIRST_BUCKET, 1 << (tokens - 1).bit_length()), LAST_BUCKET)
    shape = f"m={bucket},n={weight.shape[0]},k={weight.shape[1]},then={follows or 'nothing'},bytes={itemsize}"
    return launch_config("linear_fused", shape, device_facts(x.device)[0])


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, config: Mapping[str, int],
    *, kind: str = "", gated: bool = False,
) -> None:  # fmt: skip
    """y written: [M, N], or with config's splits > 1 the parts, [splits, M, N] or gated [splits, M, 2 N], fp32."""
    K, splits = x.shape[-1], config["splits"]
    M, N = x.numel() // K, weight.shape[0] // 2 if gated else weight.shape[0]
    tiles = triton.cdiv(M, config["block_m"]) * triton.cdiv(N, config["block_n"])
    with torch.cuda.device_of(x):
        _linear_kernel[(tiles, splits)](
            x, weight, bias, residual, y, M, N, K, KIND=rounded_kind(kind, x.dtype), GATED=gated, SPLITS=splits,
            RAGGED=K % config["block_k"] != 0, BLOCK_M=config["block_m"], BLOCK_N=config["block_n"],
            BLOCK_K=config["block_k"], GROUP_M=config["group_m"], STAGES=config["stages"],
            num_warps=config["num_warps"], **launch_options(x.device),
        )  # fmt: skip


def check_product(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, gated: bool = False
) -> tuple[int, ...]:
    """The shape of the product; a ValueError that names the offender where shapes do not fit."""
    if x.ndim < 1 or weight.ndim != 2 or not weight.numel() or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: {shapes(x=x, weight=weight)} must be [..., K] and [N, K], N and K 1 or more")
    rows = weight.shape[0]
    if gated and rows % 2:
        raise ValueError(f"{op}: a gated weight has rows for gate and for up; {rows} are odd")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; ({rows},) is needed")
    wanted = (*x.shape[:-1], rows // 2 if gated else rows)
    if residual is not None and residual.shape != wanted:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; {wanted} is needed")
    check_dtypes(op, x=x, weight=weight, bias=bias, residual=residual)
    check_contiguous(op, x=x, weight=weight, bias=bias, residual=residual)
    check_devices(op, x=x, weight=weight, bias=bias, residual=residual)
    return wanted


def linear_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "",
    gated: bool = False,
    residual: Tensor | None = None,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """x times the matrix, with bias, activation, gate and residual.

    Args:
        x: [..., K], fp16, bf16 or fp32, contiguous.
        weight: [N, K], same dtype, contiguous; where gated [2 N, K], the gate's rows first.
        bias: [N], where gated [2 N], or None.
        kind: an activation of `dsi_kernels.KINDS`, or "" for none; a gate has one.
        gated: activation(gate) * up.
        residual: [..., N], added last; or None.
        config: all settings of tuned/linear_fused/default.json, in the place of the tuned ones.

    Returns:
        [..., N] in x's dtype. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout, devices or kind do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    if kind or gated:
        check_kind("linear_fused", kind)
    wanted = check_product("linear_fused", x, weight, bias, residual, gated=gated)
    follows = "gate" if gated else kind or ("add" if residual is not None else "")
    sizes = linear_config(x, weight, follows) if config is None else config
    y = torch.empty(wanted, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if sizes["splits"] == 1:
        multiply(x, weight, bias, residual, y, sizes, kind=kind, gated=gated)
        return y
    M, N, splits = y.numel() // wanted[-1], wanted[-1], sizes["splits"]
    parts = torch.empty((splits, M, weight.shape[0]), dtype=torch.float32, device=x.device)
    multiply(x, weight, None, None, parts, sizes, gated=gated)
    block = min(BLOCK, triton.next_power_of_2(N))
    with torch.cuda.device_of(x):
        _sum_kernel[(M, triton.cdiv(N, block))](
            parts, bias, residual, y, M, N, KIND=rounded_kind(kind, x.dtype), GATED=gated, SPLITS=splits, BLOCK_D=block,
            **launch_options(x.device),
        )  # fmt: skip
    return y
