"""What a CUDA capture leaves behind, one that failed and one that did not, and how to be rid of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WaitsForHost(RuntimeError):
    """What was to be captured reads back from the device."""


class _NothingWaits(TorchDispatchMode):
    _READS = frozenset({"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.name().split(".")[0], kwargs or {}
        reads = name in self._READS or (name == "aten::_to_copy" and str(given.get("device", "")).startswith("cpu"))
        if reads and any(isinstance(x, torch.Tensor) and x.is_cuda for x in args):
            raise WaitsForHost(f"{name} waits for the device")
        return func(*args, **given)


def nothing_waits() -> TorchDispatchMode:
    """A context, of this thread, in which an operation that reads back from a CUDA device raises `WaitsForHost`.

    A capture would fail at it as well, and a capture that fails leaves the allocator believing that it goes on (torch
    2.11 to 2.13). Not all of them can be seen from here, so a capture may still fail.
    """
    return _NothingWaits()


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """What runs in this context, on `stream`, becomes the graph; its memory is of the allocator's `pool`.

    Where a capture fails, torch.cuda.graph (2.11 to 2.13) leaves its stream the current one, and all that the caller
    does from then on would run there: here the stream of before is the current one afterwards, however it ended.
    """
    before = torch.cuda.current_stream(stream.device)
    try:
        with own_workspaces(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        torch.cuda.set_stream(before)


@contextmanager
def own_workspaces() -> Iterator[None]:
    """Around a capture: the memory that cuBLAS works in, 32 MiB on Hopper, is the graph's, and nobody else's.

    torch keeps such memory for each stream that a product ran on, and takes it back from all of them where a graph of
    torch.compile is captured. A graph that was captured after a product on its own stream would go on working in what
    is somebody else's by then, and each capture, on a stream of its own, would leave 32 MiB behind. What is taken
    within a capture is of the graph's pool, where it stays as long as the graph.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def end_failed_capture(device: torch.device | str = "cuda") -> None:
    """Make torch's generators usable again after a capture that failed.

    A capture tells the generators that it begins, and one that fails does not tell them that it is over: every later
    random number on the device would raise "Offset increment outside graph capture" (torch 2.11). A small capture
    that succeeds tells them.
    """
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        nothing = torch.zeros(1, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            nothing.add_(1)
