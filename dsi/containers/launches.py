"""Whose launch is worth it: our kernels in a CUDA graph, or where there is much to do; torch's elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

# bytes of the hidden states (or keys) from which a kernel of ours is worth its launch outside of a CUDA graph. A launch
# through Triton costs the host 40 to 90 us, one of torch's 5 to 15 (H200 machine), and below this the device waits for
# the host: an encoder of 12 layers of 768 at 1 x 128 took 10.9 ms with our kernels alone, 10.0 ms stock
KERNEL_FROM = 1 << 22
# whether the kernels of a graph begin while those before them end (`dsi_kernels._pdl`): a decoder of 7B took 3.61 and
# 3.67 ms a token without, 3.54 and 3.60 with, 8 rows 4.16 and 4.19, 4.05 and 4.04 (H200); 1,000 replays agree in bits
DEPENDENT = True

IN_GRAPH: ContextVar[bool] = ContextVar("dsi_in_graph", default=False)
# whether what a library plans anew for every shape pays off in the graph that is made
PLANS: ContextVar[bool] = ContextVar("dsi_plans", default=True)


@contextmanager
def graph_kernels(*, dependent: bool = True) -> Iterator[None]:
    """In this context, and thread, what is launched goes into a CUDA graph, whose replay launches for free.

    Args:
        dependent: kernels may begin while those before them end; not where they are launched without a graph, for the
            sake of the same bits.
    """
    from dsi_kernels._pdl import dependent_launches

    before = IN_GRAPH.set(True)
    try:
        with dependent_launches(DEPENDENT and dependent):
            yield
    finally:
        IN_GRAPH.reset(before)


@contextmanager
def without_plans() -> Iterator[None]:
    """In this context, and thread, a graph is one of many for shapes near each other: none pays for its own plans."""
    before = PLANS.set(False)
    try:
        yield
    finally:
        PLANS.reset(before)


def torch_wins(x: Tensor) -> bool:
    """Whether torch's own launches are the faster ones: little to do, and no graph that would replay ours for free."""
    return x.is_cuda and x.nbytes < KERNEL_FROM and not IN_GRAPH.get()
