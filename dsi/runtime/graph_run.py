"""The steps of one text through captured graphs: one at a time for whoever chooses the tokens, or chained.

Chained, a text whose tokens the graph itself chooses needs no word from the host: the host launches steps and looks,
one step behind, whether the text has ended. What was computed beyond the end is cut off, and its random numbers are
given back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dsi.errors import CacheMemoryError
from dsi.runtime.cache_memory import capacity_of
from dsi.runtime.decode import DecodeRunner
from dsi.runtime.graph_pool import GraphPool, rounded
from dsi.runtime.kv_cache import PreallocatedCache, PreallocatedLayer, WindowedLayer
from dsi.runtime.sampling import Sampling, noise_place, set_noise_place
from dsi.runtime.step_graph import GraphKey, StepGraph

# tokens from which on a graph is worth its capture: it takes as long as some steps without one
WORTH_IT = 4
_SMALLER = "use fewer rows, or a smaller max_new_tokens"


def graph_obstacle(runner: DecodeRunner, cache: Any, new: int) -> str:
    """Why the steps of a text are not graphs, or "".

    Args:
        runner: of the model.
        cache: filled by the prompt.
        new: tokens to come.
    """
    from dsi_kernels.greedy_token import MAX_ROWS

    if new < WORTH_IT:
        return f"{new} new tokens are too few"
    if cache.layers[0].keys.shape[0] > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if not all(type(layer) in (PreallocatedLayer, WindowedLayer) for layer in cache.layers):
        return "a layer keeps another kind of cache"
    return runner.graph_obstacle()


@attrs.frozen(kw_only=True, eq=False)
class Text:
    """What the steps of one text have in common.

    Args:
        positions: where the first token to be fed stands: an int for all rows, or int64 [B, 1].
        reach: the steps to come stay below this position.
        slots: so many positions of the cache are filled in the end at most; 0 where nobody knows.
        mask: bool [B, 1, 1, T] of all positions to come, True = attend, or None.
        end_ids, pad: tokens that end a row, and what follows them; none where nobody wants to know.
        sampling: how the graph chooses tokens, or None for the most likely.
        seen: int8 [B, vocabulary], tokens that came before, where the choice asks for them.
    """

    positions: Tensor | int
    reach: int
    mask: Tensor | None
    slots: int = 0
    end_ids: list[int] = attrs.field(factory=list)
    pad: Tensor | None = None
    sampling: Sampling | None = None
    seen: Tensor | None = None


class GraphRun:
    """One text's steps.

    Args:
        pool: of the model's graphs.
        model, runner: whose steps.
        cache: filled by the prompt.
        text: the rest.
    """

    def __init__(
        self, pool: GraphPool, model: nn.Module, runner: DecodeRunner, cache: PreallocatedCache, text: Text
    ) -> None:
        self.pool, self.model, self.runner, self.cache, self.text = pool, model, runner, cache, text
        self.layers: list[Any] = cache.layers
        choice = text.sampling
        self.key = GraphKey(
            batch=self.layers[0].keys.shape[0],
            masked=text.mask is not None,
            ends=len(text.end_ids),
            sampled=choice is not None and choice.sampled,
            penalized=0 if choice is None or choice.penalty is None else choice.vocabulary,
            # not by the cache's capacity, which an earlier text may have enlarged
            slots=rounded(text.slots or capacity_of(cache), grown=True),
        )
        self.graph: StepGraph | None = None
        # steps taken, how many of them by earlier graphs, and how many the cache's layers have been told of
        self.taken = self.before = self.told = self.place = 0
        self.chosen: list[Tensor] = []
        self.first_length = 0

    def ready(self, tokens: Tensor) -> bool:
        """Whether there is a graph; it is set to the text, `tokens` int64 [B] to be fed first."""
        # the capture itself writes to the next position
        self._make_room()
        text, length = self.text, self.cache.get_seq_length()
        if length >= self.key.slots:
            # more came than anybody had said
            self.key = attrs.evolve(self.key, slots=rounded(length + 1, grown=True))
        graph = self.pool.get(self.model, self.runner, self.cache, self.key, text.reach)
        if graph is None:
            return False
        if self.runner.reads_whole_buffers():
            for layer in self.layers:
                layer.clear_rest()
        self.first_length = length - self.taken
        graph.begin(tokens, text.positions + self.taken, length, text.mask)
        graph.set_ends(text.end_ids, text.pad)
        if text.sampling is not None:
            graph.set_sampling(text.sampling.settings, text.seen)
        self.graph = graph
        return True

    def take(self, tokens: Tensor) -> Tensor:
        """Feed these tokens, int64 [B]: float32 logits [B, vocab]."""
        return self.logits(tokens).float()

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Feed these tokens, int64 [B], at positions [1 or B, 1] or one further: a copy of the logits [B, vocab]."""
        graph = self._with_room(tokens)
        graph.tokens.copy_(tokens[:, None])
        if positions is not None:
            graph.positions.copy_(positions.expand_as(graph.positions))
        logits = graph.replay().clone()
        self.taken += 1
        return logits

    @property
    def length(self) -> int:
        """Positions that the device counts as filled."""
        return self.first_length + self.taken

    def chain(self, count: int) -> Iterator[Tensor]:
        """Take that many steps: after each the next tokens, int64 [B, 1], valid until the next step."""
        for _ in range(count):
            # no name holds the graph while another may take its place
            yield self._chained()

    def _chained(self) -> Tensor:
        assert self.graph is not None
        graph = self._with_room(self.graph.tokens[:, 0])
        self.place = noise_place(graph.tokens.device) if self.key.sampled else 0
        graph.replay()
        self.taken += 1
        return graph.tokens

    def take_back_noise(self) -> None:
        """The random numbers of the latest step were not drawn."""
        if self.key.sampled and self.graph is not None:
            set_noise_place(self.graph.tokens.device, self.place)

    def check_choices(self) -> None:
        """Raises RuntimeError, in torch's words, where the logits of some step were no distribution."""
        if self.key.sampled and self.graph is not None and bool(self.graph.invalid):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    def tokens(self) -> Tensor:
        """What was chosen after each step, the token that was fed first before them: int64 [B, 1 + steps]."""
        assert self.graph is not None
        here = self.graph.history[:, (1 if self.chosen else 0) : 1 + self.taken - self.before]
        return torch.cat([*self.chosen, here], dim=1)

    def settle(self, taken: int | None = None) -> None:
        """Tell the cache's layers of the steps taken, or of the first `taken` of them."""
        total = self.taken if taken is None else taken
        for layer in self.layers:
            layer.advance(total - self.told)
        self.told = total
        if self.graph is not None:
            self.graph.done.record()

    def _with_room(self, tokens: Tensor) -> StepGraph:
        graph = self.graph
        assert graph is not None
        if self.cache.get_seq_length() + self.taken - self.told < graph.capacity:
            return graph
        kept, self.chosen = (tokens.clone(), graph.finished.clone(), graph.invalid.clone()), [self.tokens()]
        seen = None if graph.seen is None else graph.seen.clone()
        self.text = attrs.evolve(self.text, seen=seen)
        self.before = self.taken
        self.settle()
        # the old buffers are let go of before the graph for the new ones asks for memory
        self.graph = graph = None
        if not self.ready(kept[0]):
            raise CacheMemoryError(f"generate: the text outgrew its KV cache, and {self.pool.reason}", hint=_SMALLER)
        graph = self.graph
        assert graph is not None
        graph.finished.copy_(kept[1])
        graph.invalid.copy_(kept[2])
        return graph

    def _make_room(self) -> None:
        length = self.cache.get_seq_length()
        if length >= capacity_of(self.cache):
            self.pool.outgrown(self.cache, length + 1)
        try:
            self._grow()
        except torch.OutOfMemoryError:
            # what earlier texts left
            self.pool.release_idle()
            try:
                self._grow()
            except torch.OutOfMemoryError as error:
                self.pool.forget(self.cache)
                raise CacheMemoryError(
                    f"generate: the KV cache is full at {length} positions, and there is no memory to grow: {error}",
                    hint=_SMALLER,
                ) from error

    def _grow(self) -> None:
        # the first layer's grows beside the others' old ones: each layer lets go of its own
        for layer in self.layers:
            layer.make_room(1)
