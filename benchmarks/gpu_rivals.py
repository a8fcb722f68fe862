"""The strongest plain PyTorch recipes: what dsi is measured against beside stock.

Decoding is a greedy loop of our own around one compiled step with a static cache and CUDA graphs, as gpt-fast and
transformers' documentation advise. What compiling costs is reported, and not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache


class Rivals(StrEnum):
    """Which cases meet torch.compile."""

    BARS = "bars"
    ALL = "all"
    NONE = "none"

    def meet(self, bar: float | None) -> bool:
        """Whether they do in a case with this bar; 0 is a case without one, None one that never meets them."""
        if self is Rivals.NONE or bar is None:
            return False
        return bool(bar) or self is Rivals.ALL


def tried(make: Callable[[], Any], facts: dict[str, Any]) -> Any:
    """What `make` makes; None where torch.compile breaks, and `facts` say how: our own time is not lost with it."""
    try:
        return make()
    except Exception as broken:  # noqa: BLE001
        facts["compile_failed"] = f"{type(broken).__name__}: {str(broken)[:2000]}"
        sys.stderr.write(f"torch.compile failed: {facts['compile_failed'][:600]}\n")
        return None


class CompiledLoop:
    """Greedy text from `torch.compile(mode="reduce-overhead", fullgraph=True)` over a static cache.

    Args:
        model: a stock model.
        ids: int64 [B, T], the prompt.
        capacity: positions of the cache: prompt and new tokens, no more, since every step reads them all.
        tune: search for better kernels by coordinate descent, which takes longer.
    """

    def __init__(self, model: Any, ids: Tensor, capacity: int, *, tune: bool = False) -> None:
        import torch._inductor.config as inductor

        # what was compiled for another shape would count as a change, and make sizes variable
        torch._dynamo.reset()
        inductor.coordinate_descent_tuning = tune
        self.model, self.ids = model, ids
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._step = torch.compile(self._eager_step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        started = time.perf_counter()
        # compiles, records its graph, replays it
        for _ in range(2):
            self(5)
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - started

    def _eager_step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        logits = self.model(tokens, position_ids=positions, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def __call__(self, count: int) -> Tensor:
        """int64 [B, T + count]."""
        rows, length = self.ids.shape
        self.cache.reset()
        outputs = self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        tokens = [outputs.logits[:, -1].argmax(-1, keepdim=True)]
        positions = torch.full((rows, 1), length, device=self.ids.device)
        for _ in range(count - 1):
            torch.compiler.cudagraph_mark_step_begin()
            # its output is overwritten by the next step
            tokens.append(self._step(tokens[-1], positions).clone())
            positions += 1
        return torch.cat([self.ids, *tokens], 1)


def compiled_forward(model: Any) -> Any:
    """The model as torch.compile makes it fastest at one shape: CUDA graphs, no breaks, kernels for that shape."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    inductor.coordinate_descent_tuning = False
    # left to itself, torch compiles the second shape that it meets for any size: twice as slow
    return torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
