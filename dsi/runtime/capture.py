"""What a CUDA capture that failed leaves behind, and how to be rid of it."""

from __future__ import annotations

import torch


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
