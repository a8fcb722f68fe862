"""Prompts as CUDA graphs, where the device would wait for the host: one for a number of rows and a bucket of lengths.

A prompt is filled up to its bucket's length with ids that nobody sees: under a causal mask no position looks at those
behind it, the last one's row is taken by its place, and the cache counts the prompt's positions alone, so that steps
overwrite the rest. Before there is a graph, and where none pays, such a prompt is the same launches over the same
shapes: a call has the same bits the first time and later.

A graph writes to one cache's buffers and goes with them. The graphs of one model share the memory of what they hold
between their products.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsi.containers.launches import graph_kernels, without_plans
from dsi.containers.ops import Heads
from dsi.runtime.cache_memory import Place, place_of
from dsi.runtime.capture import end_failed_capture
from dsi.runtime.forward_graph import capture
from dsi.runtime.kv_cache import PreallocatedCache, PreallocatedLayer
from dsi.runtime.prompt_pass import PromptPass

logger = logging.getLogger(__name__)

# graphs that a model keeps, and shapes whose time is remembered
KEPT, REMEMBERED = 8, 256
# rows, and tokens, from which on no prompt waits for the host
ROWS, MOST = 32, 2048
# how much longer than the host a prompt of up to so many milliseconds may take to have waited for it; beyond, something
# was compiled
WAITING, COMPILING = 1.15, 100.0
# the least bucket, and how many there are between two powers of two
LEAST, STEPS = 16, 8


def too_large(rows: int, length: int) -> str:
    """Why a prompt is never a graph, or ""."""
    return f"more than {ROWS} rows, or {MOST} tokens" if rows > ROWS or rows * bucket(length) > MOST else ""


def bucket(length: int) -> int:
    """The least length of a graph that has room for so many positions: at most an eighth more, or 15."""
    step = max(LEAST, (1 << (length - 1).bit_length() - 1) // STEPS) if length > 1 else LEAST
    return -(-length // step) * step


class PromptLayer:
    """A cache layer as a prompt's graph sees it: the buffers, written from the start.

    Args:
        layer: whose buffers they are.
        length: positions of the graph.
    """

    def __init__(self, layer: PreallocatedLayer, length: int) -> None:
        self.keys, self.values = (buffer.narrow(2, 0, length) for buffer in layer.buffers())

    def reserve(self, batch: int, shape: Heads, length: int, like: Tensor) -> tuple[int, Tensor, Tensor]:
        """As of `PreallocatedLayer`."""
        return 0, self.keys, self.values

    def visible(self) -> tuple[Tensor, Tensor]:
        """All keys and values."""
        return self.keys, self.values


class PromptCache:
    """The layers of a graph's cache, and the way that stock's layers write to them."""

    def __init__(self, cache: PreallocatedCache, length: int) -> None:
        self.layers = [PromptLayer(layer, length) for layer in cache.layers]

    def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Write a whole prompt; returns it."""
        layer = self.layers[index]
        layer.keys.copy_(keys)
        layer.values.copy_(values)
        return layer.keys, layer.values


class PromptInputs:
    """What the graphs of one model are given and give: memory that all share, so that none takes any for itself.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False), torch.no_grad():
            self.ids = torch.zeros(MOST, dtype=torch.int64, device=device)
            self.positions = torch.arange(MOST, device=device)[None]
            self.last = torch.zeros(1, dtype=torch.int64, device=device)
        # by the number of rows: fp32 [B, vocab]
        self._logits: dict[int, Tensor] = {}
        # shapes of ids whose kernels are compiled
        self.compiled: set[torch.Size] = set()
        # the latest text's logits are taken: the next text may come on another stream
        self.done = torch.cuda.Event()

    def take(self, logits: Tensor) -> Tensor:
        """Logits [B, vocab] in their place."""
        place = self._logits.get(logits.shape[0])
        if place is None:
            with torch.inference_mode(False):
                place = self._logits[logits.shape[0]] = torch.empty_like(logits, dtype=torch.float32)
        return place.copy_(logits)


class BucketPrompt:
    """A prompt of a bucket's length.

    Args:
        prompt: the model's parts, bound for as many positions as the cache has room for.
        cache: holds buffers of `rows` rows.
        rows, length: of the ids.
        inputs: of the model's graphs.
    """

    def __init__(
        self, prompt: PromptPass, cache: PreallocatedCache, rows: int, length: int, inputs: PromptInputs
    ) -> None:
        self.inputs = inputs
        self.ids = inputs.ids[: rows * length].view(rows, length)
        self.positions = inputs.positions[:, :length]
        # the tables that the graph reads live as long as it
        self.prompt, self.cache = prompt, PromptCache(cache, length)

    def run(self, ids: Tensor) -> Tensor:
        """As a graph's `replay`, launch by launch: the same kernels over the same shapes, so the same bits."""
        from dsi_kernels import compile_ahead

        inputs, shape = self.inputs, self.ids.shape
        self._give(ids)
        with graph_kernels(dependent=False):
            if shape not in inputs.compiled:
                # all at once; what ran meanwhile ran on what the others would have written, and runs again
                compile_ahead(self._run, inputs.device)
                inputs.compiled.add(shape)
            logits = self._run().clone()
        self.inputs.done.record()
        return logits

    def _give(self, ids: Tensor) -> None:
        inputs = self.inputs
        torch.cuda.current_stream().wait_event(inputs.done)
        self.ids[:, : ids.shape[1]].copy_(ids)
        inputs.last.fill_(ids.shape[1] - 1)

    def _run(self) -> Tensor:
        # of a bucket of 512 cuDNN's attention saves 0.06 ms in all 32 layers of 7B, and its plan takes 48 (H200)
        with without_plans():
            return self.inputs.take(self.prompt.logits(self.ids, self.positions, self.cache, self.inputs.last))


class PromptGraph(BucketPrompt):
    """A captured one.

    Args:
        prompt, cache, rows, length, inputs: of `BucketPrompt`.
        pool: of the allocator.
    """

    def __init__(
        self, prompt: PromptPass, cache: PreallocatedCache, rows: int, length: int, inputs: PromptInputs, pool: Any
    ) -> None:
        super().__init__(prompt, cache, rows, length, inputs)
        # the last place of a longer graph's text is none of this one's
        inputs.last.zero_()
        self.graph, self.logits = capture(self._run, inputs.device, pool)

    def replay(self, ids: Tensor) -> Tensor:
        """float32 logits [B, vocab] of a prompt, int64 [B, S]; its keys and values stand in the cache's buffers."""
        self._give(ids)
        self.graph.replay()
        logits = self.logits.clone()
        self.inputs.done.record()
        return logits


class Watch:
    """What a prompt takes the host, and from its first launch to its end the device, in milliseconds."""

    def __init__(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.host = 0.0

    def __enter__(self) -> Watch:
        self._events[0].record()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.host = 1e3 * (time.perf_counter() - self._began)
        self._events[1].record()

    def device(self) -> float:
        """Waits for the prompt's end."""
        start, end = self._events
        end.synchronize()
        return start.elapsed_time(end)


class PromptGraphs:
    """The prompts' graphs of one model, least recently used out."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[int, int], tuple[Place, PromptGraph]] = OrderedDict()
        self._watches: OrderedDict[tuple[int, int], Watch] = OrderedDict()
        self._inputs: PromptInputs | None = None
        self.failure = ""

    def watch(self, rows: int, length: int) -> Watch:
        """Who measures a prompt that runs without a graph."""
        watch = self._watches[rows, bucket(length)] = Watch()
        if len(self._watches) > REMEMBERED:
            self._watches.popitem(last=False)
        return watch

    def obstacle(self, rows: int, length: int) -> str:
        """Why a prompt that could be a graph is none yet, or not any more; or ""."""
        key = rows, bucket(length)
        if self.failure or key in self._graphs:
            return self.failure
        watch = self._watches.get(key)
        if watch is None:
            return "the first prompt of about this length"
        return "" if watch.device() < min(WAITING * watch.host, COMPILING) else "the device is the limit"

    def get(
        self, cache: PreallocatedCache, rows: int, length: int, prompt: Callable[[], PromptPass], pool: Any
    ) -> PromptGraph | None:
        """A graph that writes to this cache; None where capturing failed."""
        key, place = (rows, bucket(length)), place_of(cache)
        found = self._graphs.pop(key, None)
        if found is None or found[0] != place:
            # let go of the old one's memory before the new one asks for its own
            found = None
            made = self._made(cache, key, prompt, pool)
            if made is None:
                return None
            found = place, made
        self._graphs[key] = found
        while len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        return found[1]

    def _made(
        self, cache: PreallocatedCache, key: tuple[int, int], prompt: Callable[[], PromptPass], pool: Any
    ) -> PromptGraph | None:
        device = cache.layers[0].buffers()[0].device
        try:
            return PromptGraph(prompt(), cache, *key, self._shared(device), pool)
        # whatever a capture, a compiler or a launcher raises: a prompt without a graph is right
        except Exception as error:  # noqa: BLE001
            end_failed_capture(device)
            self.failure = f"capturing a prompt failed: {error}"
            logger.warning("%s", self.failure)
            return None

    def plain(self, cache: PreallocatedCache, rows: int, length: int, prompt: PromptPass) -> BucketPrompt:
        """What a graph for this cache would be, without one."""
        return BucketPrompt(prompt, cache, rows, bucket(length), self._shared(cache.layers[0].buffers()[0].device))

    def _shared(self, device: torch.device) -> PromptInputs:
        if self._inputs is None:
            self._inputs = PromptInputs(device)
        return self._inputs

    def writes_to(self, place: Place) -> bool:
        """Whether a graph writes to the buffers there."""
        return any(written == place for written, _ in self._graphs.values())

    def drop(self, gone: Callable[[Place], bool]) -> None:
        """Graphs that write to such places go."""
        for key in [key for key, (written, _) in self._graphs.items() if gone(written)]:
            del self._graphs[key]

    def clear(self) -> None:
        """All graphs go: the model's weights or parts are others now."""
        self._graphs.clear()
        self._inputs = None
