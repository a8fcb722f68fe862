"""A channels-last map with every pixel repeated to twice its sides, for inference (forward only).

    y[b, :, 2 i + a, 2 j + c] = x[b, :, i, j],   a, c in {0, 1}

One program per tile of pixels times a block of channels. Reads x once and writes it four times: 5 * B * H * W * C *
itemsize bytes, memory bound. torch's own, for such maps, takes one element a thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.add_map import channel_block, check_map
from dsi_kernels.operands import check_devices, check_dtypes

BLOCK, CHANNELS = 2048, 64


def upsample_map_reference(x: Tensor) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    y = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return y.contiguous(memory_format=torch.channels_last)


@triton.jit
def _upsample_map_kernel(x_ptr, y_ptr, pixels, W, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    pixel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = (pixel < pixels)[:, None] & (cols < C)[None, :]
    # int64 before the multiply: 4 maps of 1024 x 1024 x 512 pass 2**31 elements
    x = tl.load(x_ptr + pixel.to(tl.int64)[:, None] * C + cols[None, :], mask=live, other=0.0)
    row, column = pixel // W, pixel % W
    first = (row.to(tl.int64) * 4 * W + column * 2) * C
    to = y_ptr + first[:, None] + cols[None, :]
    tl.store(to, x, mask=live)
    tl.store(to + C, x, mask=live)
    tl.store(to + 2 * W * C, x, mask=live)
    tl.store(to + 2 * W * C + C, x, mask=live)


def upsample_map(x: Tensor) -> Tensor:
    """x with every pixel four times.

    Args:
        x: [B, C, H, W], fp16, bf16 or fp32, channels-last.

    Returns:
        [B, C, 2 H, 2 W], channels-last.

    Raises:
        ValueError: shape, dtype, layout or device does not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    launch = _LAUNCHES.get((kind_of(x), SWITCH.get()), lambda: _launch(x))
    B, C, H, W = x.shape
    y = torch.empty((B, 2 * H, 2 * W, C), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    launch(x, y)
    return y


_LAUNCHES: Launches[Launch] = Launches()


def _launch(x: Tensor) -> Launch:
    if x.ndim != 4 or not x.shape[1:].numel():
        raise ValueError(f"upsample_map: x {tuple(x.shape)} must be [B, C, H, W]")
    check_dtypes("upsample_map", x=x)
    check_map("upsample_map", x=x)
    check_devices("upsample_map", x=x)
    C, options = x.shape[1], launch_options(x.device)
    pixels, block_c = x.numel() // C, channel_block(C, CHANNELS)
    block_n = BLOCK // block_c
    fixed = (pixels, x.shape[3], C, block_n, block_c, options.pop("PDL"))
    return Launch(_upsample_map_kernel, (triton.cdiv(pixels, block_n), triton.cdiv(C, block_c)), fixed, options)
