"""The graphs of one model's decode steps, and the caches that they write to, lent to one text after the other.

A cache that a text is done with is kept for the next of the same batch size, so that its addresses, and with them the
graph, stay. Kept are the latest, and as many before it as take no more than a twentieth of the weights, or 256 MiB,
together; four in all. A cache that is too small goes, with its graphs, before the larger one is made.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from dsi.runtime.capture import end_failed_capture
from dsi.runtime.decode import DecodeRunner
from dsi.runtime.kv_cache import PreallocatedCache
from dsi.runtime.prompt_graph import BucketPrompt, PromptGraph, PromptGraphs, addresses_of
from dsi.runtime.prompt_pass import PromptPass
from dsi.runtime.sampling import noise_place, set_noise_place
from dsi.runtime.step_graph import GraphKey, StepGraph

logger = logging.getLogger(__name__)

# caches that a model keeps: one for each batch size
KEPT = 4
# what kept caches beside the latest may take: a share of the weights, or this many bytes
SPARE, SPARE_BYTES = 20, 1 << 28
# graphs that a model keeps: for batch sizes, kinds of mask, and ways to choose a token
GRAPHS = 8
# positions of all rows together that caches for graphs are rounded up to, and of one row at least, so that a longer
# text does not ask for a graph of its own at once
ROUNDED_TO, LEAST = 256, 16
# layers with a window keep all positions, which a graph needs, of texts up to so many windows, or positions
WHOLE_WINDOWS, WHOLE_BELOW = 2, 8192


class GraphPool:
    """The graphs of one model, least recently used out, each with the cache that it writes to."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[GraphKey, tuple[tuple[int, ...], StepGraph]] = OrderedDict()
        self._model: tuple[Any, ...] = ()
        self._caches: OrderedDict[int, PreallocatedCache] = OrderedDict()
        self._memory: Any = None
        # bytes that idle caches may hold beside the latest
        self._spare = 0
        self.prompts = PromptGraphs()
        # why no graph may be tried any more, and why the latest was not to be had
        self.failure = self.reason = ""

    def cache_in_place_of(self, made: DynamicCache, rows: int, positions: int, *, returned: bool) -> PreallocatedCache:
        """One with room for so many positions of so many rows, for transformers' own that was just made.

        Args:
            made: fresh.
            rows, positions: what will come.
            returned: the caller gets it, and expects of layers with a window what transformers keeps of them.
        """
        windows = [layer.sliding_window for layer in made.layers if hasattr(layer, "sliding_window")]
        if windows and (returned or positions > max(WHOLE_WINDOWS * min(windows), WHOLE_BELOW)):
            return PreallocatedCache.of(made, positions)
        grown = rows in self._caches
        # one that a captured step writes to already
        lent = self.lend(rows, positions)
        if lent is not None:
            return lent
        return PreallocatedCache.of(made, rounded(positions, rows, grown=grown), whole=True)

    def lend(self, batch: int, positions: int) -> PreallocatedCache | None:
        """An empty cache that a graph may write to already, with room for so many positions; None where there is none.

        Whoever keeps it beyond the call does not give it back.
        """
        cache = self._caches.pop(batch, None)
        if cache is None:
            return None
        if min(layer.capacity for layer in cache.layers) < positions:
            # before the larger one asks for its own
            self._drop(cache)
            return None
        cache.reset()
        return cache

    def give_back(self, batch: int, cache: PreallocatedCache) -> None:
        """The cache is nobody's any more; where a graph writes to it, it is kept for the next text.

        The oldest go where they are too many.
        """
        if not self._written_to(cache):
            return
        self._caches.pop(batch, None)
        self._caches[batch] = cache
        while len(self._caches) > 1 and (len(self._caches) > KEPT or self._idle_bytes() > self._spare):
            self._drop(self._caches.popitem(last=False)[1])

    def _written_to(self, cache: PreallocatedCache) -> bool:
        if not all(hasattr(layer, "buffers") for layer in cache.layers):
            return False
        addresses = addresses_of(cache)
        return any(written == addresses for written, _ in self._graphs.values()) or self.prompts.writes_to(addresses)

    def _idle_bytes(self) -> int:
        """Memory of all caches but the latest."""
        return sum(map(_bytes, list(self._caches.values())[:-1]))

    def _drop(self, cache: PreallocatedCache) -> None:
        """Let go of a cache's memory: graphs that write to it go too."""
        addresses = addresses_of(cache)
        for key in [key for key, (written, _) in self._graphs.items() if written == addresses]:
            del self._graphs[key]
        self.prompts.drop(addresses)

    def forget(self, key: GraphKey) -> None:
        """Drop a graph: the cache that it writes to is somebody else's now."""
        if (found := self._graphs.pop(key, None)) is not None:
            self.prompts.drop(found[0])

    def prompt(
        self, model: nn.Module, runner: DecodeRunner, cache: PreallocatedCache, rows: int, length: int
    ) -> PromptGraph | None:
        """A graph of a prompt that fills this cache, whose buffers it has already; None where capturing failed."""
        self._meet(model, runner)
        return self.prompts.get(cache, rows, length, lambda: _pass(runner, cache), self._pool())

    def plain_prompt(
        self, model: nn.Module, runner: DecodeRunner, cache: PreallocatedCache, rows: int, length: int
    ) -> BucketPrompt:
        """What `prompt` would capture."""
        self._meet(model, runner)
        return self.prompts.plain(cache, rows, length, _pass(runner, cache))

    def _meet(self, model: nn.Module, runner: DecodeRunner) -> None:
        """Graphs that hold weights or parts that are no longer the model's go."""
        if (parts := _parts(model, runner)) == self._model:
            return
        self._graphs.clear()
        self.prompts.clear()
        self._model = parts
        weights = sum(parameter.nbytes for parameter in model.parameters())
        self._spare = max(weights // SPARE, SPARE_BYTES)

    def _pool(self) -> Any:
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        return self._memory

    def get(
        self, model: nn.Module, runner: DecodeRunner, cache: PreallocatedCache, key: GraphKey, reach: int
    ) -> StepGraph | None:
        """A graph for this cache and positions below `reach`; None where capturing failed."""
        if self.failure:
            return None
        self._meet(model, runner)
        addresses = addresses_of(cache)
        found = self._graphs.pop(key, None)
        if found is None or found[0] != addresses or found[1].reach < reach:
            # let go of the old one's memory before the new one asks for its own
            found = None
            made = self._make(runner, cache, key, reach)
            if made is None:
                return None
            found = addresses, made
        self._graphs[key] = found
        while len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        return found[1]

    def _make(self, runner: DecodeRunner, cache: PreallocatedCache, key: GraphKey, reach: int) -> StepGraph | None:
        reach = max(reach, *(layer.capacity for layer in cache.layers))
        device = cache.layers[0].keys.device
        place = noise_place(device)
        try:
            # tensors made in inference mode could not be written to outside
            with torch.inference_mode(False), torch.no_grad():
                made = StepGraph(runner.bind(reach), cache, key, reach, self._pool())
            # what the step before the capture drew
            set_noise_place(device, place)
            return made
        except torch.OutOfMemoryError as error:
            end_failed_capture(device)
            set_noise_place(device, place)
            self.reason = f"no memory for a decode graph: {error}"
            logger.warning("%s", self.reason)
            return None
        # whatever a capture, a compiler or a launcher raises: steps without a graph are right
        except Exception as error:  # noqa: BLE001
            end_failed_capture(device)
            set_noise_place(device, place)
            self.failure = self.reason = f"capturing a decode step failed: {error}"
            logger.warning("%s", self.failure)
            return None


def rounded(positions: int, rows: int = 1, *, grown: bool = False) -> int:
    """The capacity of a cache for so many positions: at most `ROUNDED_TO` of all rows together more, or a 32nd.

    Args:
        positions: of a row.
        rows: of the cache.
        grown: an earlier text of so many rows was shorter, and the next may be longer: `ROUNDED_TO` of each row more at
            most, or an eighth.
    """
    halvings, share = (0, 8) if grown else ((rows - 1).bit_length(), 32)
    step = max(ROUNDED_TO >> halvings, min(ROUNDED_TO, LEAST), (1 << positions.bit_length() - 1) // share)
    return -(-positions // step) * step


def _pass(runner: DecodeRunner, cache: PreallocatedCache) -> PromptPass:
    return PromptPass(runner.bind(min(layer.capacity for layer in cache.layers)), runner.containers())


def _bytes(cache: PreallocatedCache) -> int:
    return sum(buffer.nbytes for layer in cache.layers for buffer in layer.buffers())


def _parts(model: nn.Module, runner: DecodeRunner) -> tuple[Any, ...]:
    """What of a model a graph was captured from: differs once weights moved, or parts were exchanged."""
    return (*_parameters(model), *runner.parts_identity())


def _parameters(module: nn.Module) -> list[int]:
    """The addresses of its parameters; past `parameters()`, which asks for names: 60 us against 195 in 32 layers."""
    tables: dict[str, Any] = module.__dict__
    found = [parameter.data_ptr() for parameter in tables["_parameters"].values() if parameter is not None]
    for child in tables["_modules"].values():
        if child is not None:
            found += _parameters(child)
    return found
