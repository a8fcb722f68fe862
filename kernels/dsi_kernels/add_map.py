"""A channels-last map plus a bias by channel and a second map, for inference (forward only).

    y = (x + bias + residual) / divisor

One program per 4096 elements, 64 channels side by side. Reads x and residual once and writes y once: 3 * B * N * C *
itemsize bytes, memory bound. A convolution of cuDNN through torch adds its bias in a pass of its own; this is that
pass, with the residual in it.

Casting: one rounding at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, shapes

BLOCK, CHANNELS = 4096, 64
# channels side by side, two bytes each, that fill a sector
LEAST_CHANNELS = 16


def add_map_reference(x: Tensor, bias: Tensor | None, residual: Tensor | None = None, divisor: float = 1.0) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    h = x.float()
    h = h if bias is None else h + bias.float().view(-1, *[1] * (x.ndim - 2))
    h = h if residual is None else h + residual.float()
    return (h / divisor).to(x.dtype)


@triton.jit(do_not_specialize=["divisor"])
def _add_map_kernel(
    x_ptr, r_ptr, b_ptr, y_ptr, rows, C, divisor, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr
):
    begin(PDL)
    row, cols = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane, inside = tl.arange(0, BLOCK_N), cols < C
    # int64 before the multiply: 4 maps of 1024 x 1024 x 512 pass 2**31 elements
    base = row.to(tl.int64) * C
    at = lane[:, None] * C + cols[None, :]
    live = (row + lane < rows)[:, None] & inside[None, :]
    x = tl.load(x_ptr + base + at, mask=live, other=0.0)
    h = x.to(tl.float32)
    if b_ptr is not None:
        h += tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if r_ptr is not None:
        h += tl.load(r_ptr + base + at, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + base + at, (h / divisor).to(x.dtype), mask=live)


def add_map(
    x: Tensor, bias: Tensor | None, residual: Tensor | None = None, divisor: float = 1.0, *, out: Tensor | None = None
) -> Tensor:
    """x plus bias and residual, over the divisor.

    Args:
        x: [B, C, ...], fp16, bf16 or fp32, a map with its channels side by side (channels-last).
        bias: [C], same dtype, or None.
        residual: as x, or None.
        divisor: of the sum.
        out: as x, x itself too; None for new memory.

    Returns:
        As x. x is not modified unless it is `out`.

    Raises:
        ValueError: shapes, dtypes, layout or devices do not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    key = (kind_of(x, bias, residual, out), float(divisor), SWITCH.get())
    launch = _LAUNCHES.get(key, lambda: _launch(x, bias, residual, float(divisor), out))
    y = torch.empty_like(x) if out is None else out
    launch(x, residual, bias, y)
    return y


_LAUNCHES: Launches[Launch] = Launches()


def channel_block(channels: int, most: int) -> int:
    """Channels side by side that a program takes, all of them there where the number of channels allows it."""
    dividing = min(channels & -channels, most)
    return dividing if dividing >= LEAST_CHANNELS else min(most, triton.next_power_of_2(channels))


def check_map(op: str, **operands: Tensor | None) -> None:
    """A ValueError, in the name of `op`, where one of these is no map with its channels side by side."""
    for name, t in operands.items():
        if t is not None and not t.movedim(1, -1).is_contiguous():
            raise ValueError(f"{op}: {name} must be channels-last, has shape {tuple(t.shape)}, stride {t.stride()}")


def _launch(x: Tensor, bias: Tensor | None, residual: Tensor | None, divisor: float, out: Tensor | None) -> Launch:
    operands = {"x": x, "bias": bias, "residual": residual, "out": out}
    alike = all(t is None or t.shape == x.shape for t in (residual, out))
    if x.ndim < 3 or not x.shape[1] or not alike or (bias is not None and bias.shape != x.shape[1:2]):
        raise ValueError(f"add_map: {shapes(**operands)} must be [B, C, pixels ...], and [C] for the bias")
    check_dtypes("add_map", **operands)
    check_contiguous("add_map", bias=bias)
    check_map("add_map", x=x, residual=residual, out=out)
    check_devices("add_map", **operands)
    options, C = launch_options(x.device) | {"num_warps": 4}, x.shape[1]
    rows, block_c = x.numel() // C, channel_block(C, CHANNELS)
    block_n = BLOCK // block_c
    fixed = (rows, C, divisor, block_n, block_c, options.pop("PDL"))
    return Launch(_add_map_kernel, (triton.cdiv(rows, block_n), triton.cdiv(C, block_c)), fixed, options)
