"""Activation of the first half of a row times its second half (SwiGLU, GeGLU), for inference (forward only).

    gate, up = gate_up[..., :I], gate_up[..., I:]
    y        = act(gate) * up

One program per row and block of 1024 columns. Reads gate_up once and writes y once: 3 * T * I * itemsize bytes, memory
bound.

Casting follows `act_fn(gate_proj(x)) * up_proj(x)`: the activation is computed in fp32 and rounded to the input dtype,
the product is rounded again.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsi_kernels._launch import Launch, Launches, kind_of
from dsi_kernels._pdl import SWITCH, begin, launch_options
from dsi_kernels._triton import tl, triton
from dsi_kernels.activations import activate, activate_reference, check_kind
from dsi_kernels.operands import check_contiguous, check_devices, check_dtypes, check_row

BLOCK = 1024
# the second axis of a CUDA grid has 65535 places
MAX_ROW_BYTES = 65535 * BLOCK * 2


def gated_activation_reference(gate_up: Tensor, kind: str) -> Tensor:
    """What the kernel must compute, in plain torch. The tests' oracle and the CPU path."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate_reference(gate, kind) * up


@triton.jit
def _gated_activation_kernel(x_ptr, y_ptr, D, KIND: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    # int64 before the multiply: T * 2 I passes 2**31 at 64k tokens of width 16384
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D

    gate = tl.load(x_ptr + row * 2 * D + cols, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * D + D + cols, mask=inside, other=0.0)
    a = activate(gate.to(tl.float32), KIND).to(gate.dtype)
    # the product of two halves is exact in fp32, so this rounds as a multiply in their own dtype does
    y = a.to(tl.float32) * up.to(tl.float32)
    tl.store(y_ptr + row * D + cols, y.to(gate.dtype), mask=inside)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """The activation of the first half of the last axis, times the second half.

    Args:
        gate_up: [..., 2 I], fp16, bf16 or fp32, contiguous: the gate's columns, then those it gates.
        kind: one of dsi_kernels.KINDS.

    Returns:
        [..., I], in gate_up's dtype. gate_up is not modified.

    Raises:
        ValueError: shape, dtype, layout, device or kind does not fit; the message names the offender.
        ImportError: Triton is not installed.
    """
    dependent = SWITCH.get()
    launch = _LAUNCHES.get((kind, dependent, kind_of(gate_up)), lambda: _launch(gate_up, kind))
    y = torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    launch(gate_up, y)
    return y


_LAUNCHES: Launches[Launch] = Launches()


def _launch(gate_up: Tensor, kind: str) -> Launch:
    check_kind("gated_activation", kind)
    check_row("gated_activation", "gate_up", gate_up, MAX_ROW_BYTES)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gated_activation: gate_up {tuple(gate_up.shape)} must be [..., 2 I]; its last axis is odd")
    check_dtypes("gated_activation", gate_up=gate_up)
    check_contiguous("gated_activation", gate_up=gate_up)
    check_devices("gated_activation", gate_up=gate_up)

    D = gate_up.shape[-1] // 2
    block, options = min(BLOCK, triton.next_power_of_2(D)), launch_options(gate_up.device)
    grid = gate_up.numel() // (2 * D), triton.cdiv(D, block)
    return Launch(_gated_activation_kernel, grid, (D, kind, block, options.pop("PDL")), options)
