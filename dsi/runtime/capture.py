"""What a CUDA capture leaves behind, one that failed and one that did not, and how to be rid of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
