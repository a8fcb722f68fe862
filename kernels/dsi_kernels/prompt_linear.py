"""A linear layer with what follows it, for the many tokens of a prompt, on Hopper (forward only).

    h = x W^T + b
    y = activation(h)  or  activation(h[:N]) * h[N:]  (gated),  [+ residual]

A program multiplies one tile; a gated one owns the two halves of its columns. x, W and y go through the tensor memory
accelerator, several blocks ahead of the tensor cores. Programs that share rows of x run near one another (group_m). No
atomics: same input, same output. Work: 2 * M * N * K operations; bytes: x, W and y once.

On an H200, bf16, M = 2048, all candidates in turn, in microseconds: 16384 rows of 4096 with bias and ReLU 362, cuBLAS's
product and `bias_activation` 384; gate and up of 2 x 8192 rows of 2048 with SiLU 204 against 211, of 2 x 11008 of 4096
523 against 510; 4096 rows with a residual as cuBLAS's. Turning and caching the heads of q|k|v in such a tile was tried:
404 against 294, for what lies between the layout of the sums and that of heads.

Casting: sums, bias, activation, gate and residual in fp32, and one rounding at the end.

Source: Hopper tuning guide, tensor memory accelerator.
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
from dsi_kernels.activations import check_kind, rounded_kind
from dsi_kernels.epilogue import finish
from dsi_kernels.linear_fused import check_product, linear_fused_reference, tile_of
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


# what changes with every prompt is no reason to compile again
@triton.jit(do_not_specialize=["M"])
def _prompt_linear_kernel(
    x_desc, w_desc, y_desc, b_ptr, r_ptr, M, N, K,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N]; W [N, K], gated [2 N, K]."""
    begin(PDL)
    # without it the assembler of Triton 3.6 keeps a way around the loop, and has every product of tiles wait for the
    # one before: 700 us for 523 (gate and up of 2 x 11008 rows, M = 2048, H200)
    tl.assume(K > 0)
    tile_m, tile_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
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
        follows: what comes after it: "nothing", "activation", "gate" or "add".
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
        fixed = (M, N, K, rounded_kind(kind, x.dtype), gated, *_blocks(sizes), options.pop("PDL"))
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


_LAUNCHES: Launches[tuple[Launch, Mapping[str, int]]] = Launches()


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
