"""Programmatic dependent launch: a kernel of a CUDA graph that begins while the one before it still runs (Hopper on).

    launch_dependents()   the next kernel of the stream may begin once every program has come here
    wait()                returns when the kernels before have ended, and what they wrote can be seen

A kernel launched with `launch_options` takes a constexpr PDL and, where that is set, calls both: launch_dependents at
its start, wait before it touches anything that an earlier kernel may have written or may still read. Before the wait
it may load what no kernel of the graph writes: weights, biases, tables.

Rules, each of which has bitten somebody:

- every kernel launched so waits, also one that needs nothing of its predecessor: the next may need it through that one;
- nothing is stored before the wait: an earlier kernel may still read what stood there;
- the wait stands before a loop that reads ahead, never inside;
- several kernels back may still be running at the start, not the one before alone.

Both are inline assembler with a memory clobber, which `triton.language.extra.cuda.gdc_wait` lacks (3.6), so that no
compiler pass moves a load over them. The switch is off unless a caller, who knows that the launches go into a graph
whose weights stand still, sets it; a device older than Hopper has none.

Source: CUDA programming guide, programmatic dependent launch; PTX ISA, griddepcontrol.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

from dsi_kernels._triton import INTERPRETED, tl, triton

SWITCH: ContextVar[bool] = ContextVar("dsi_kernels_pdl", default=False)


@triton.jit
def wait():
    """Until the kernels before have ended."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def launch_dependents():
    """The next kernel may begin."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def begin(PDL: tl.constexpr):
    """Both at once, at the start of a kernel that has nothing to load before."""
    if PDL:
        launch_dependents()
        wait()


@contextmanager
def dependent_launches(on: bool) -> Iterator[None]:
    """In this context, and thread, kernels begin before their predecessors have ended, or not."""
    before = SWITCH.set(on)
    try:
        yield
    finally:
        SWITCH.reset(before)


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, Any]:
    """What a launch of a kernel with a constexpr PDL is given: {"PDL": ...}, and Triton's own option where it is on."""
    on = SWITCH.get() and not INTERPRETED and device.type == "cuda" and _capable(device)
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}
