"""The graphs of one model's decode steps, and the memory that they write to, lent to one text after the other.

What a text is done with is kept as a block for the next, so that its addresses, and with them the graphs, stay. A text
of other rows gets a view of a block, where one has room; a larger one gets its own. Kept are the largest block, and
beside it as many as take no more than a fortieth of the weights, or 64 MiB, together; four in all. A block that is too
small for its rows goes, with its graphs, before the larger one is made.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from dsi.runtime.cache_memory import Block, Place, capacity_of, place_of
from dsi.runtime.capture import end_failed_capture
from dsi.runtime.decode import DecodeRunner
from dsi.runtime.kv_cache import PreallocatedCache
from dsi.runtime.prompt_graph import BucketPrompt, PromptGraph, PromptGraphs
from dsi.runtime.prompt_pass import PromptPass
from dsi.runtime.sampling import noise_place, set_noise_place
from dsi.runtime.step_graph import GraphKey, StepGraph

logger = logging.getLogger(__name__)

# blocks of memory that a model keeps
KEPT = 4
# what blocks beside the largest may take while they are idle: a share of the weights, or this many bytes
SPARE, SPARE_BYTES = 40, 1 << 26
# times what is spared that is copied for a caller who gets the cache; more is given away where it fills half a block
COPIED = 4
# graphs that a model keeps: for batch sizes, reaches, kinds of mask, and ways to choose a token
GRAPHS = 16
# how many of them may be for caches that callers brought, who may come with them again
BROUGHT = 4
# positions of all rows together that caches for graphs are rounded up to, and of one row at least, so that a longer
# text does not ask for a graph of its own at once
ROUNDED_TO, LEAST = 256, 16
# layers with a window keep all positions, which a graph needs, of texts up to so many windows, or positions
WHOLE_WINDOWS, WHOLE_BELOW = 2, 8192


class GraphPool:
    """The graphs of one model, least recently used out, and the memory that they write to."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[GraphKey, Place], StepGraph] = OrderedDict()
        self._model: tuple[Any, ...] = ()
        self._blocks: list[Block] = []
        self._memory: Any = None
        # bytes that idle blocks may hold beside the largest
        self._spare = 0
        self.prompts = PromptGraphs()
        # why no graph may be tried any more, and why the latest was not to be had
        self.failure = self.reason = ""

    # --- memory -----------------------------------------------------------------------------------------------

    def cache_in_place_of(self, made: DynamicCache, rows: int, positions: int, *, returned: bool) -> PreallocatedCache:
        """One with room for so many positions of so many rows, for transformers' own that was just made.

        Whoever asks says by `give_back` or `hand_over` what became of it.

        Args:
            made: fresh.
            rows, positions: what will come.
            returned: the caller gets it, and expects of layers with a window what transformers keeps of them.
        """
        windows = [layer.sliding_window for layer in made.layers if hasattr(layer, "sliding_window")]
        if windows and (returned or positions > max(WHOLE_WINDOWS * min(windows), WHOLE_BELOW)):
            return PreallocatedCache.of(made, positions)
        # one that captured steps write to already
        lent = self._lent(made, rows, positions)
        if lent is not None:
            return lent
        grown = any(rows in block.views for block in self._blocks)
        capacity = rounded(positions, rows, grown=grown)
        self._make_way(rows, rows * capacity)
        return PreallocatedCache.of(made, capacity, whole=True)

    def _lent(self, made: DynamicCache, rows: int, positions: int) -> PreallocatedCache | None:
        wanted = rounded(positions, rows, grown=True)
        # one that has a view for it already, or the smallest with room
        for block in sorted(self._blocks, key=lambda one: (not one.serves(rows, positions), one.positions)):
            if block.lent is not None:
                continue
            before = block.views.get(rows)
            cache = block.lend(made, rows, positions, wanted)
            if cache is None:
                continue
            if before is not None and before is not cache:
                self._drop_graphs(place_of(before))
            for other in list(self._blocks):
                if other is not block:
                    self._forget_view(other, rows)
            return cache
        return None

    def _forget_view(self, block: Block, rows: int) -> None:
        """A text of so many rows will have another; a block that none will have goes."""
        if block.lent is not None or rows not in block.views:
            return
        self._drop_graphs(place_of(block.views.pop(rows)))
        if not block.views:
            self._remove(block)

    def _make_way(self, rows: int, coming: int) -> None:
        """Let go of what a new block of so many positions makes too much, and of what was too small for its rows."""
        for block in list(self._blocks):
            self._forget_view(block, rows)
        self._trim(coming)

    def _trim(self, coming: int = 0) -> None:
        """Idle blocks go until all but the largest, which may be one that is to come, take no more than is spared."""
        while self._blocks:
            each = self._blocks[0].nbytes / self._blocks[0].positions
            sizes = [block.nbytes for block in self._blocks] + ([int(coming * each)] if coming else [])
            if len(sizes) <= KEPT and sum(sizes) - max(sizes) <= self._spare:
                return
            largest = sizes.index(max(sizes))
            idle = [block for at, block in enumerate(self._blocks) if at != largest and block.lent is None]
            if not idle:
                return
            self._remove(max(idle, key=lambda block: block.nbytes))

    def _remove(self, block: Block) -> None:
        """Let go of a block's memory: graphs that write to it go too."""
        self._blocks.remove(block)
        self._drop_where(lambda place: place.addresses == block.addresses)
        block.views.clear()
        # what is allocated where it stood comes after what was written there
        block.wait()

    def release_idle(self) -> bool:
        """Let go of all memory that nobody has; whether there was any."""
        idle = [block for block in self._blocks if block.lent is None]
        for block in idle:
            self._remove(block)
        return bool(idle)

    def _block_of(self, cache: PreallocatedCache) -> Block | None:
        """The block that is lent to this cache."""
        return next((block for block in self._blocks if block.lent is not None and block.lent[0] is cache), None)

    def give_back(self, cache: PreallocatedCache) -> None:
        """The cache is nobody's any more; where a graph writes to its memory, that is kept for the next text."""
        block = self._home(cache)
        if block is not None:
            self._end(block)
        self._trim()

    def hand_over(self, cache: PreallocatedCache) -> None:
        """The cache is its caller's: a copy, where that is small, so that the memory and the graphs stay."""
        block = self._home(cache)
        if block is None:
            return
        layers: list[Any] = cache.layers
        place = place_of(cache)
        mine = place.addresses == block.addresses
        share = place.rows * cache.get_seq_length() / block.positions if mine else 0.0
        if share * block.nbytes > COPIED * self._spare and 2 * share > 1:
            self._remove(block)
            for layer in layers:
                layer.stay()
        else:
            if mine:
                for layer in layers:
                    layer.move_out()
            else:
                self._drop_graphs(place)
            block.take_back()
            block.views = {rows: view for rows, view in block.views.items() if view is not cache}
        self._trim()

    def _home(self, cache: PreallocatedCache) -> Block | None:
        """The block that was lent to the cache, or becomes of it where graphs write to it."""
        block = self._block_of(cache)
        if block is not None and not block.suits(cache):
            # it has memory of its own, as all that come will have
            self._remove(block)
            block = None
        if block is None and self._written_to(cache):
            block = self._adopt(cache)
        return block

    def _adopt(self, cache: PreallocatedCache) -> Block:
        block = Block(cache)
        self._blocks.append(block)
        return block

    def _end(self, block: Block) -> None:
        """Nobody has the block any more."""
        lent = block.lent
        block.take_back()
        if lent is None or place_of(lent[0]) == lent[1]:
            return
        cache, before = lent
        # it grew: within the block, or out of it
        self._drop_graphs(before)
        if not block.holds(cache) or len(set(place_of(cache).capacities)) > 1:
            block.views = {rows: view for rows, view in block.views.items() if view is not cache}

    def outgrown(self, cache: PreallocatedCache, positions: int) -> None:
        """The cache is about to grow: graphs of where it stands go, and the block, where that has no room for it."""
        place = place_of(cache)
        self._drop_graphs(place)
        block = self._block_of(cache)
        if block is not None and block.room(place.rows) < positions:
            self._remove(block)
            for layer in cache.layers:
                layer.stay()
            self._trim(2 * place.rows * positions)

    def forget(self, cache: PreallocatedCache) -> None:
        """Drop the graphs of a cache."""
        self._drop_graphs(place_of(cache))

    def _written_to(self, cache: PreallocatedCache) -> bool:
        if not cache.layers or not all(hasattr(layer, "buffers") for layer in cache.layers):
            return False
        place = place_of(cache)
        return any(written == place for _, written in self._graphs) or self.prompts.writes_to(place)

    def _drop_graphs(self, place: Place) -> None:
        self._drop_where(lambda written: written == place)

    def _drop_where(self, gone: Callable[[Place], bool]) -> None:
        for key in [key for key in self._graphs if gone(key[1])]:
            del self._graphs[key]
        self.prompts.drop(gone)

    # --- graphs -----------------------------------------------------------------------------------------------

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
        known = key, place_of(cache)
        found = self._graphs.pop(known, None)
        if found is None or found.reach < reach:
            # let go of the old one's memory before the new one asks for its own
            found = None
            found = self._make(runner, cache, key, reach)
            if found is None:
                return None
        self._graphs[known] = found
        self._keep_few()
        return found

    def _keep_few(self) -> None:
        while len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        ours = {block.addresses for block in self._blocks}
        for key in [key for key in self._graphs if key[1].addresses not in ours][:-BROUGHT]:
            del self._graphs[key]

    def _make(self, runner: DecodeRunner, cache: PreallocatedCache, key: GraphKey, reach: int) -> StepGraph | None:
        reach = max(reach, capacity_of(cache), key.slots)
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
            if self.release_idle():
                return self._make(runner, cache, key, reach)
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
    return PromptPass(runner.bind(capacity_of(cache)), runner.containers())


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
