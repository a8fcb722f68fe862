"""A linear layer with what follows it, for the many tokens of a prompt, on Hopper (forward only).

    h = x W^T + b
    y = activation(h)  or  activation(h[:N]) * h[N:]  (gated),  [+ residual]
    or, of a fused q|k|v projection, its heads turned by their positions, the keys and values in the cache

A program multiplies one tile; a gated one owns the two halves of its columns, one of q|k|v whole heads. x, W and y go
through the tensor memory accelerator, several blocks ahead of the tensor cores. Programs that share rows of x run near
one another (group_m). No atomics: same input, same output. Work: 2 * M * N * K operations; bytes: x, W and y once.

On an H200, bf16, M = 2048, in microseconds: gate and up of 2 x 11008 rows of 4096 with SiLU 496, cuBLAS's product 483
and `gated_activation` 36; 12288 rows of 4096 alone 266, as cuBLAS's.

Casting: sums, bias, activation, gate and residual in fp32, and one rounding at the end. Heads are rounded before they
are turned, as the product of its own would be, and turned in fp32.

Source: Hopper tuning guide, tensor memory accelerator; Su et al. 2021, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, begin, launch_options
from dsi_kernels._triton import TensorDescriptor, tl, triton
from dsi_kernels.activations import check_kind
from dsi_kernels.epilogue import finish
from dsi_kernels.linear_fused import check_product, linear_fused_reference
from dsi_kernels.rope_kv_write import check_rope_kv_write, rope_kv_write_reference
from dsi_kernels.tuned import device_facts, launch_config

# values of the setting `choice`: a library's product and a kernel of its own for what follows, or this op
LIBRARY, OWN = 1, 2
# a bucket holds the token counts up to a power of two, from the first to the last
FIRST_BUCKET, LAST_BUCKET = 128, 16384
# elements of a matrix from which its tiles are many, and deep
LARGE = 1 << 23
# bytes that the accelerator's rows begin at multiples of
ALIGNED = 16


def prompt_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "",
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    return linear_fused_reference(x, weight, bias, kind=kind, gated=gated, residual=residual)


def prompt_qkv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    qkv = linear_fused_reference(x, weight, bias)
    return rope_kv_write_reference(qkv, cos, sin, k_cache, v_cache, start, heads, kv_heads, head_dim)


@triton.jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and first column of this program's tile: GROUP_M row tiles pass over the columns together."""
    tile, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


# what changes with every prompt is no reason to compile again
@triton.jit(do_not_specialize=["M"])
def _prompt_linear_kernel(
    x_desc, w_desc, y_desc, b_ptr, r_ptr, M, N, K,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N]; W [N, K], gated [2 N, K]."""
    begin(PDL)
    # without it the assembler keeps a way around the loop, and has every product of tiles wait for the one before
    tl.assume(K > 0)
    m0, n0 = _place(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x = x_desc.load([m0, k0])
        h = tl.dot(x, w_desc.load([n0, k0]).T, h)
        if GATED:
            up = tl.dot(x, w_desc.load([N + n0, k0]).T, up)
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    at = (m.to(tl.int64) * N)[:, None] + n[None, :]
    h = finish(h, up, b_ptr, r_ptr, at, n[None, :], N, (m < M)[:, None] & (n < N)[None, :], KIND, GATED)
    y_desc.store([m0, n0], h.to(y_desc.dtype))


@triton.jit
def _turned(x, other, cos_at, sin_at, inside) -> tl.tensor:
    """One half of heads [BLOCK_M, slots, half] turned, with the other half's numbers in fp32."""
    cos = tl.load(cos_at, mask=inside, other=1.0).to(tl.float32)[:, None, :]
    sin = tl.load(sin_at, mask=inside, other=0.0).to(tl.float32)[:, None, :]
    return (x.to(tl.float32) * cos + other * sin).to(x.dtype)


@triton.jit
def _store_heads(
    x, y, b, s, slot, half, inside, q_ptr, k_ptr, v_ptr, start, S, capacity, heads, kv_heads, k_b, k_h, k_t,
    v_b, v_h, v_t, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The two halves [BLOCK_M, slots, HEAD_DIM / 2] of heads, to the queries [B, S, heads, HEAD_DIM] and the cache."""
    t = start + s
    k_slot, v_slot = slot - heads, slot - heads - kv_heads
    at = ((b * S + s) * heads)[:, None, None] + slot[None, :, None]
    q_at = q_ptr + at * HEAD_DIM + half
    is_q = inside & (slot < heads)[None, :, None]
    tl.store(q_at, x, mask=is_q)
    tl.store(q_at + HEAD_DIM // 2, y, mask=is_q)
    fits = inside & (t < capacity)[:, None, None]
    k_at = k_ptr + (b * k_b + t * k_t)[:, None, None] + (k_slot * k_h)[None, :, None] + half
    is_k = fits & ((k_slot >= 0) & (v_slot < 0))[None, :, None]
    tl.store(k_at, x, mask=is_k)
    tl.store(k_at + HEAD_DIM // 2, y, mask=is_k)
    v_at = v_ptr + (b * v_b + t * v_t)[:, None, None] + (v_slot * v_h)[None, :, None] + half
    is_v = fits & (v_slot >= 0)[None, :, None]
    tl.store(v_at, x, mask=is_v)
    tl.store(v_at + HEAD_DIM // 2, y, mask=is_v)


@triton.jit(do_not_specialize=["start", "S", "capacity", "M", "k_b", "k_h", "v_b", "v_h"])
def _prompt_qkv_kernel(
    x_desc, w_desc, b_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, start, S, capacity, M, N, K, heads, kv_heads,
    cos_b, cos_s, k_b, k_h, k_t, v_b, v_h, v_t,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q [B, S, heads, HEAD_DIM], keys and values at start .. start + S of the cache; W [N, K], N whole heads."""
    SLOTS: tl.constexpr = BLOCK_N // HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    tl.assume(K > 0)
    m0, n0 = _place(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        h = tl.dot(x_desc.load([m0, k0]), w_desc.load([n0, k0]).T, h)
    n = n0 + tl.arange(0, BLOCK_N)
    if b_ptr is not None:
        h += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    # [rows, slots, which half, place in it], the halves apart
    pairs = h.to(dtype).reshape(BLOCK_M, SLOTS, 2, HALF).permute(0, 1, 3, 2)
    x, y = pairs.split()

    m, slot, half = m0 + tl.arange(0, BLOCK_M), n0 // HEAD_DIM + tl.arange(0, SLOTS), tl.arange(0, HALF)
    b, s, slot = (m // S).to(tl.int64), (m % S).to(tl.int64), slot.to(tl.int64)
    inside = (m < M)[:, None, None] & (slot < heads + 2 * kv_heads)[None, :, None] & (half < HALF)[None, None, :]
    if cos_ptr is not None:
        at = (b * cos_b + s * cos_s)[:, None] + half[None, :]
        there = (m < M)[:, None] & (half < HALF)[None, :]
        turns = (slot < heads + kv_heads)[None, :, None]
        turned_x = _turned(x, -y.to(tl.float32), cos_ptr + at, sin_ptr + at, there)
        turned_y = _turned(y, x.to(tl.float32), cos_ptr + at + HALF, sin_ptr + at + HALF, there)
        x, y = tl.where(turns, turned_x, x), tl.where(turns, turned_y, y)
    _store_heads(
        x, y, b, s, slot, half[None, None, :], inside, q_ptr, k_ptr, v_ptr, tl.cast(start, tl.int64), S, capacity,
        heads, kv_heads, k_b, k_h, k_t, v_b, v_h, v_t, HEAD_DIM,
    )  # fmt: skip


@cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the accelerator reads them: 16 bit, dense, rows and addresses at multiples of 16 bytes; on Hopper."""
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype or not _hopper(x.device):
        return False
    dense = x.is_contiguous() and weight.is_contiguous()
    rows = weight.shape[0] % (2 * ALIGNED // x.element_size()) == 0 and x.shape[-1] * x.element_size() % ALIGNED == 0
    return dense and rows and not (x.data_ptr() | weight.data_ptr()) % ALIGNED


def prompt_config(x: Tensor, weight: Tensor, follows: str) -> Mapping[str, int]:
    """The tuned settings of a product, `choice` among them: whether it is this op's (OWN) or a library's (LIBRARY).

    Args:
        x: [..., K].
        weight: [N, K], gated [2 N, K].
        follows: what comes after it: "nothing", "activation", "gate", "add" or "heads".
    """
    tokens = x.numel() // x.shape[-1]
    bucket = min(max(FIRST_BUCKET, 1 << (tokens - 1).bit_length()), LAST_BUCKET)
    size = "large" if weight.numel() >= LARGE else "small"
    shape = f"m={bucket},matrix={size},then={follows},bytes={x.element_size()}"
    return launch_config("prompt_linear", shape, device_facts(x.device)[0])


def prompt_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "",
    gated: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """x times the matrix, with bias, activation, gate and residual.

    Args:
        x: [..., K], fp16 or bf16, contiguous; K a multiple of 8.
        weight: [N, K], same dtype, contiguous, N a multiple of 8; where gated [2 N, K], the gate's rows first.
        bias: [N], where gated [2 N], or None.
        kind: an activation of `dsi_kernels.KINDS`, or "" for none; a gate has one.
        gated: activation(gate) * up.
        residual: [..., N], added last; or None.
        out: the result's memory, [..., N], contiguous, which may be the residual's; None for new memory.
        config: all settings of tuned/prompt_linear/default.json, in the place of the tuned ones.

    Returns:
        [..., N] in x's dtype. Inputs are not modified, but for `out`.

    Raises:
        ValueError: shapes, dtypes, layout, devices or kind do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    wanted = (*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0])
    settings = None if config is None else tuple(config.items())
    key = (kind, gated, settings, SWITCH.get(), kind_of(x, weight, bias, residual))

    def make() -> tuple[Launch, Mapping[str, int]]:
        if kind or gated:
            check_kind("prompt_linear", kind)
        check_product("prompt_linear", x, weight, bias, residual, gated=gated)
        _check_accelerated(x, weight, weight.shape[0] // 2 if gated else weight.shape[0])
        follows = "gate" if gated else "activation" if kind else "add" if residual is not None else "nothing"
        sizes = prompt_config(x, weight, follows) if config is None else config
        K, N = x.shape[-1], wanted[-1]
        M = x.numel() // K
        grid = (triton.cdiv(M, sizes["block_m"]) * triton.cdiv(N, sizes["block_n"]),)
        options = {"num_warps": sizes["num_warps"], **launch_options(x.device)}
        fixed = (M, N, K, kind, gated, *_blocks(sizes), options.pop("PDL"))
        return Launch(_prompt_linear_kernel, grid, fixed, options), sizes

    launch, sizes = _LAUNCHES.get(key, make)
    y = torch.empty(wanted, dtype=x.dtype, device=x.device) if out is None else out
    if y.shape != wanted or y.dtype != x.dtype or y.device != x.device or not y.is_contiguous():
        raise ValueError(f"prompt_linear: out {tuple(y.shape)} must be {tuple(wanted)}, {x.dtype} and contiguous")
    if not y.numel():
        return y
    x_desc, w_desc = _descriptors(x, weight, sizes)
    launch(x_desc, w_desc, _rows(y, sizes["block_m"], sizes["block_n"]), bias, residual)
    return y


def prompt_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """`rope_kv_write(x W^T + b, ...)`: the turned queries; keys and values in the caches, at start .. start + S.

    Args:
        x: [B, S, K], fp16 or bf16, contiguous; K a multiple of 8.
        weight: [(heads + 2 kv_heads) * head_dim, K], same dtype, contiguous: all q heads, all k, all v.
        bias: of as many rows, or None.
        cos, sin, k_cache, v_cache, start: as of `rope_kv_write`; start an int, and cos of head_dim columns.
        heads, kv_heads, head_dim: how the rows divide; head_dim a power of two, from 16 to the block of columns.
        config: all settings of tuned/prompt_linear/default.json, in the place of the tuned ones.

    Returns:
        [B, heads, S, head_dim], in memory [B, S, heads, head_dim], in x's dtype.

    Raises:
        ValueError: shapes, dtypes, layout, devices or start do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    B, S, _ = x.shape
    settings = None if config is None else tuple(config.items())
    key = (heads, kv_heads, head_dim, settings, kind_of(x, weight, bias, cos, sin, k_cache, v_cache))

    def make() -> tuple[Launch, Mapping[str, int]]:
        check_product("prompt_qkv", x, weight, bias, None)
        _check_accelerated(x, weight, weight.shape[0])
        # no memory behind it: only what it is is read
        qkv = x.new_empty(()).expand(B, S, weight.shape[0])
        check_rope_kv_write("prompt_qkv", qkv, cos, sin, k_cache, v_cache, heads, kv_heads, head_dim)
        sizes = prompt_config(x, weight, "heads") if config is None else config
        _check_heads(head_dim, cos, sizes)
        (N, K), M = weight.shape, B * S
        grid = (triton.cdiv(M, sizes["block_m"]) * triton.cdiv(N, sizes["block_n"]),)
        turns = (0, 0) if cos is None else (cos.stride(0) * (cos.shape[0] > 1), cos.stride(1))
        strides = (*turns, *k_cache.stride()[:3], *v_cache.stride()[:3])
        fixed = (S, k_cache.shape[2], M, N, K, heads, kv_heads, *strides, head_dim, *_blocks(sizes))
        return Launch(_prompt_qkv_kernel, grid, fixed, {"num_warps": sizes["num_warps"]}), sizes

    launch, sizes = _QKV_LAUNCHES.get(key, make)
    if not 0 <= start <= k_cache.shape[2] - S:
        raise ValueError(f"prompt_qkv: {S} tokens from start={start} on do not fit a cache of {k_cache.shape[2]}")
    q = torch.empty((B, S, heads, head_dim), dtype=x.dtype, device=x.device)
    if q.numel():
        launch(*_descriptors(x, weight, sizes), bias, cos, sin, q, k_cache, v_cache, start)
    return q.transpose(1, 2)


_LAUNCHES: Launches[tuple[Launch, Mapping[str, int]]] = Launches()
_QKV_LAUNCHES: Launches[tuple[Launch, Mapping[str, int]]] = Launches()


def _rows(x: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, columns])


def _descriptors(x: Tensor, weight: Tensor, sizes: Mapping[str, int]) -> tuple[Any, Any]:
    return _rows(x, sizes["block_m"], sizes["block_k"]), _rows(weight, sizes["block_n"], sizes["block_k"])


def _blocks(sizes: Mapping[str, int]) -> tuple[int, ...]:
    """As the kernels have them."""
    return tuple(sizes[name] for name in ("block_m", "block_n", "block_k", "group_m", "stages"))


def _check_accelerated(x: Tensor, weight: Tensor, columns: int) -> None:
    if x.dtype == torch.float32:
        raise ValueError("prompt_linear: x is torch.float32; float16 and bfloat16 will do")
    each = ALIGNED // x.element_size()
    if columns % each or x.shape[-1] % each:
        raise ValueError(f"prompt_linear: {columns} columns of {x.shape[-1]} terms; both must be multiples of {each}")


def _check_heads(head_dim: int, cos: Tensor | None, sizes: Mapping[str, int]) -> None:
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= sizes["block_n"]:
        raise ValueError(f"prompt_qkv: head_dim {head_dim} must be a power of two from 16 to {sizes['block_n']}")
    if cos is not None and cos.shape[-1] != head_dim:
        raise ValueError(f"prompt_qkv: cos has {cos.shape[-1]} columns; all {head_dim} of a head turn")
