"""A matrix times a few rows, with the norm before it and what follows it, for decoding in batches (forward only).

    y   = norm(x)                                        rms, layer, or x itself
    h   = W y + b
    out = [residual +] h,  activation(h),  or  activation(h[:N]) * h[N:]  (gated)

Every weight is read once: N * K * itemsize bytes, memory bound up to 32 rows. The operands of the tensor cores are
swapped: rows of W where they want many (M), rows of x, padded to 16 or 32, where they take few (N). A program owns
BLOCK_N rows of W, and one of `splits` parts of K where N alone does not fill the device; parts are left in fp32 and a
second kernel adds them up in their order. No atomics: same input, same output.

The norm before it is a launch of its own (`rms_norm`, `layer_norm`), 1.6 us at 8 x 4096; `skinny_norm` takes the norm
after it with the sum of the parts, for no launch at all. What was slower (H200, 8 rows): the norm in the product's
loop, where x then passes through registers, 5 to 9 of 28 us; K cut among the warps of a program, with no parts to add
up, 12.5 and 25.9 us for 11.6 and 26.6 (4096 x 4096 and x 11008); lines of the first tiles brought into the L2 cache, or
the first tile into registers, before x is there, 0 to 2 us. With the loop's first tiles on their way before the wait x
is read outside of the pipeline, as the compiler would read it early too: of a LLaMA 7B layer of 118 us, 120 at best,
with 256 columns a tile, and no less where descriptors bring the tiles.

Casting: the normalised row is rounded to the dtype, as the layers do; products and sums are in fp32, one rounding at
the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dsi_kernels._pdl import begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.activations import check_kind
from dsi_kernels.epilogue import check_rows_product, finish, finish_reference
from dsi_kernels.layer_norm import layer_norm, layer_norm_reference
from dsi_kernels.linear_norm import check_norm, sum_norm
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes
from dsi_kernels.rms_norm import rms_norm, rms_norm_reference
from dsi_kernels.tuned import device_facts, launch_config

MAX_ROWS = 32
NORMS = ("", "rms", "layer")
HALVES = (torch.float16, torch.bfloat16)
# columns of the output that a program of the second kernel adds up
BLOCK_SUM = 256


def skinny_reference(
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
    """What the kernels must compute, in plain torch. The tests' oracle and the CPU path."""
    if norm == "rms" and norm_weight is not None:
        x = rms_norm_reference(x, norm_weight, eps)
    elif norm == "layer":
        x = layer_norm_reference(x, norm_weight, norm_bias, eps)
    h = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return finish_reference(h, kind, gated, residual, x.dtype)


@triton.jit
def _weights(w_rows, n, k, N, K, GATED: tl.constexpr):
    """(a tile of the matrix, the one N rows below it if there is a gate), [BLOCK_N, BLOCK_K]."""
    inside = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(w_rows + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
    up = w
    if GATED:
        # int64 before the multiply
        below = w_rows + N.to(tl.int64) * K
        up = tl.load(below + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
    return w, up


@triton.jit
def _rows(x_rows, k, b, rows, K):
    """A tile of x on its side, [BLOCK_K, BLOCK_B]."""
    return tl.load(x_rows + k[:, None], mask=(k < K)[:, None] & (b < rows)[None, :], other=0.0)


@triton.jit
def _multiply_tile(h, up, w, w_up, x, GATED: tl.constexpr):
    """(h, up) with a tile's products added."""
    h = tl.dot(w, x, h)
    if GATED:
        up = tl.dot(w_up, x, up)
    return h, up


@triton.jit
def _finish(h, up, b_ptr, r_ptr, out_ptr, at, n, N, inside, KIND: tl.constexpr, GATED: tl.constexpr):
    """What follows the sums that belong to columns n, and the store."""
    h = finish(h, up, b_ptr, r_ptr, at, n, N, inside, KIND, GATED)
    tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _leave(part_ptr, part, rows, N, h, up, at, kept, GATED: tl.constexpr):
    """The sums of one part of K, in fp32, the gate's first."""
    mine = part_ptr + part.to(tl.int64) * rows * N * (2 if GATED else 1)
    tl.store(mine + at, h, mask=kept)
    if GATED:
        tl.store(mine + rows * N + at, up, mask=kept)


@triton.jit(do_not_specialize=["rows", "steps"])
def _skinny_kernel(
    x_ptr, w_ptr, b_ptr, r_ptr, out_ptr, part_ptr, rows, N, K, steps,
    KIND: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    # int64 before a stride multiplies: a head of 256k x 16k passes 2**31 elements
    part, n = tl.program_id(1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * steps * BLOCK_K
    last = tl.minimum(first + steps * BLOCK_K, K)
    b = tl.arange(0, BLOCK_B)
    w_rows, x_rows = w_ptr + (n.to(tl.int64) * K)[:, None], x_ptr + (b * K)[None, :]
    h, up = tl.zeros([BLOCK_N, BLOCK_B], tl.float32), tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for k0 in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        w, w_up = _weights(w_rows, n, k, N, K, GATED)
        h, up = _multiply_tile(h, up, w, w_up, _rows(x_rows, k, b, rows, K), GATED)
    at, kept = b[None, :] * N + n[:, None], (n < N)[:, None] & (b < rows)[None, :]
    if SPLIT:
        _leave(part_ptr, part, rows, N, h, up, at, kept, GATED)
    else:
        _finish(h, up, b_ptr, r_ptr, out_ptr, at, n[:, None], N, kept, KIND, GATED)


@triton.jit(do_not_specialize=["rows", "parts"])
def _sum_parts_kernel(
    part_ptr, b_ptr, r_ptr, out_ptr, rows, N, parts,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    n, row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    inside, at = n < N, row * N + n
    h, up = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    stride = rows.to(tl.int64) * N
    for part in range(parts):
        mine = part_ptr + part * stride * (2 if GATED else 1) + at
        h += tl.load(mine, mask=inside, other=0.0)
        if GATED:
            up += tl.load(mine + stride, mask=inside, other=0.0)
    _finish(h, up, b_ptr, r_ptr, out_ptr, at, n, N, inside, KIND, GATED)


def _check_options(norm: str, norm_weight: Tensor | None, kind: str, gated: bool) -> None:
    if norm not in NORMS:
        raise ValueError(f"skinny: norm {norm!r} is unknown; one of {', '.join(map(repr, NORMS))} will do")
    if norm == "rms" and norm_weight is None:
        raise ValueError("skinny: the rms norm has a weight")
    if kind or gated:
        check_kind("skinny", kind)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, residual: Tensor | None) -> None:
    check_rows_product(op, MAX_ROWS, x, weight, bias, gated, residual)
    if x.dtype not in HALVES:
        raise ValueError(f"{op}: x is {x.dtype}; float16 and bfloat16 will do")
    operands = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    check_dtypes(op, **operands)
    check_contiguous(op, **operands)
    check_devices(op, **operands)


def skinny_config(x: Tensor, weight: Tensor) -> Mapping[str, int]:
    """The settings for x [B, K] and weight [N, K] on their device; `library` 2 says that cuBLAS is the faster one."""
    rows = max(4, triton.next_power_of_2(x.shape[0]))
    shape = f"rows={rows},n={weight.shape[0]},k={weight.shape[1]},bytes={x.element_size()}"
    return launch_config("skinny", shape, device_facts(x.device)[0])


def _normed(x: Tensor, norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float) -> Tensor:
    if norm == "layer":
        return layer_norm(x, norm_weight, norm_bias, eps)
    return x if norm_weight is None or not norm else rms_norm(x, norm_weight, eps)


def skinny(
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
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """The rows of x, normalised if asked, times the matrix; with bias, activation, gate and residual.

    Args:
        x: [B, K], B 1 to 32, fp16 or bf16, contiguous.
        weight: [N, K], same dtype, contiguous; where gated [2 N, K], the gate's rows first.
        bias: [N], where gated [2 N], or None.
        norm: "" for none, "rms" or "layer"; over K.
        norm_weight, norm_bias: [K] or None; rms needs a weight and has no bias.
        eps: of the norm; dimensionless.
        kind: an activation of `dsi_kernels.KINDS`, or "" for none; a gate has one.
        gated: activation(gate) * up.
        residual: [B, N], added last; or None.
        config: block_n, block_k, splits, stages, num_warps and dependent (2: it begins while the kernel before ends,
            where the switch is on) in the place of the tuned ones.

    Returns:
        [B, N] in x's dtype. Inputs are not modified.

    Raises:
        ValueError: shapes, dtypes, layout, devices, norm or kind do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    _check("skinny", x, weight, bias, gated, residual)
    _check_options(norm, norm_weight, kind, gated)
    x = _normed(x, norm, norm_weight, norm_bias, eps)
    return _whole(x, weight, bias, kind, gated, residual, skinny_config(x, weight) if config is None else config)


def _parts(x: Tensor, config: Mapping[str, int]) -> tuple[int, int]:
    """(how many parts K is cut into, tiles in each): no part without a tile."""
    tiles = triton.cdiv(x.shape[1], config["block_k"])
    steps = triton.cdiv(tiles, config["splits"])
    return triton.cdiv(tiles, steps), steps


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    gated: bool,
    residual: Tensor | None,
    out: Tensor | None,
    partial: Tensor | None,
    config: Mapping[str, int],
) -> None:
    """The product, to the end in `out`, or the sums of its parts in `partial`."""
    rows, K = x.shape
    N = weight.shape[0] // 2 if gated else weight.shape[0]
    parts, steps = _parts(x, config)
    # beginning early cost 1 to 2 of 28 to 47 us where K is one part (H200, 12288 and 22016 x 4096, 4 to 16 rows)
    own = launch_options(x.device) if config["dependent"] == 2 else {"PDL": False}
    with torch.cuda.device_of(x):
        _skinny_kernel[(triton.cdiv(N, config["block_n"]), parts)](
            x, weight, bias, residual, out, partial, rows, N, K, steps, SPLIT=partial is not None, KIND=kind,
            GATED=gated, BLOCK_B=16 if rows <= 16 else 32, BLOCK_N=config["block_n"],
            BLOCK_K=config["block_k"], STAGES=config["stages"],
            num_warps=config["num_warps"], **own,
        )  # fmt: skip


def _whole(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    gated: bool,
    residual: Tensor | None,
    config: Mapping[str, int],
) -> Tensor:
    rows = x.shape[0]
    N = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((rows, N), dtype=x.dtype, device=x.device)
    parts, _ = _parts(x, config)
    if parts == 1:
        _multiply(x, weight, bias, kind, gated, residual, out, None, config)
        return out
    partial = torch.empty((parts, 1 + gated, rows, N), dtype=torch.float32, device=x.device)
    _multiply(x, weight, None, "", gated, None, None, partial, config)
    with torch.cuda.device_of(x):
        _sum_parts_kernel[(triton.cdiv(N, BLOCK_SUM), rows)](
            partial, bias, residual, out, rows, N, parts, KIND=kind, GATED=gated, BLOCK_N=BLOCK_SUM, num_warps=2,
            **launch_options(x.device),
        )  # fmt: skip
    return out


def skinny_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of the product plus bias and residual, and that sum: a launch that adds up the parts does both.

    Args:
        x, weight, bias, residual, config: of `skinny`.
        norm: "layer" or "rms", over N.
        norm_weight, norm_bias: [N] or None; rms needs a weight and has no bias.
        eps: added to the variance or mean square.

    Returns:
        (y, s): both [B, N], in x's dtype. Inputs are not modified. The reference is `linear_norm_reference`.

    Raises:
        ValueError: shapes, dtypes, layout, devices or norm do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    _check("skinny_norm", x, weight, bias, False, residual)
    check_norm("skinny_norm", residual, norm, norm_weight, norm_bias)
    config = skinny_config(x, weight) if config is None else config
    parts, _ = _parts(x, config)
    partial = torch.empty((parts, *residual.shape), dtype=torch.float32, device=x.device)
    _multiply(x, weight, None, "", False, None, None, partial, config)
    y, total = sum_norm(partial, bias, residual, norm, norm_weight, norm_bias, eps)
    assert total is not None, "it was asked for"
    return y, total
