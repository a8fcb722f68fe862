"""The steps of one text through captured graphs: one at a time for whoever chooses the tokens, or chained.

Chained, a greedy text needs no word from the host: the host launches steps and looks, one step behind, whether the text
has ended. What was computed beyond the end is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsi.runtime.decode import DecodeRunner
from dsi.runtime.kv_cache import PreallocatedCache, PreallocatedLayer
from dsi.runtime.step_graph import GraphKey, GraphPool, StepGraph

# tokens from which on a graph is worth its capture: it takes as long as some steps without one
WORTH_IT = 4


def graph_obstacle(runner: DecodeRunner, cache: Any, new: int, *, biased: bool) -> str:
    """Why the steps of a text are not graphs, or "".

    Args:
        runner: of the model.
        cache: filled by the prompt.
        new: tokens to come.
        biased: the scores of attention are biased by position.
    """
    from dsi_kernels.greedy_token import MAX_ROWS

    if new < WORTH_IT:
        return f"{new} new tokens are too few"
    if cache.layers[0].keys.shape[0] > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if not all(type(layer) is PreallocatedLayer for layer in cache.layers):
        return "a layer keeps another kind of cache"
    return "the scores are biased by position" if biased else runner.graph_obstacle()


class GraphRun:
    """One text's steps.

    Args:
        pool: of the model's graphs.
        model, runner: whose steps.
        cache: filled by the prompt.
        positions: where the first token to be fed stands: an int for all rows, or int64 [B, 1].
        reach: the steps to come stay below this position.
        mask: bool [B, 1, 1, T] of all positions to come, True = attend, or None.
        end_ids, pad: tokens that end a row, and what follows them; none where nobody wants to know.
    """

    def __init__(
        self,
        pool: GraphPool,
        model: nn.Module,
        runner: DecodeRunner,
        cache: PreallocatedCache,
        positions: Tensor | int,
        reach: int,
        mask: Tensor | None,
        end_ids: list[int],
        pad: Tensor | None,
    ) -> None:
        self.pool, self.model, self.runner, self.cache = pool, model, runner, cache
        self.positions, self.reach, self.mask, self.end_ids, self.pad = positions, reach, mask, end_ids, pad
        self.layers: list[Any] = cache.layers
        self.key = GraphKey(self.layers[0].keys.shape[0], mask is not None, len(end_ids))
        self.graph: StepGraph | None = None
        # steps taken, how many of them by earlier graphs, and how many the cache's layers have been told of
        self.taken = self.before = self.told = 0
        self.chosen: list[Tensor] = []

    def ready(self, tokens: Tensor) -> bool:
        """Whether there is a graph; it is set to the text, `tokens` int64 [B] to be fed first."""
        # the capture itself writes to the next position
        for layer in self.layers:
            layer.make_room(1)
        graph = self.pool.get(self.model, self.runner, self.cache, self.key, self.reach)
        if graph is None:
            return False
        if self.runner.reads_whole_buffers():
            for layer in self.layers:
                layer.clear_rest()
        length = self.cache.get_seq_length()
        graph.begin(tokens, self.positions + self.taken, length, self.mask)
        graph.set_ends(self.end_ids, self.pad)
        self.graph = graph
        return True

    def take(self, tokens: Tensor) -> Tensor:
        """Feed these tokens, int64 [B]: float32 logits [B, vocab]."""
        graph = self._with_room(tokens)
        graph.tokens.copy_(tokens[:, None])
        logits = graph.replay().to(torch.float32, copy=True)
        self.taken += 1
        return logits

    def chain(self, count: int) -> Iterator[Tensor]:
        """Take that many greedy steps: after each the next tokens, int64 [B, 1], valid until the next step."""
        assert self.graph is not None
        for _ in range(count):
            graph = self._with_room(self.graph.tokens[:, 0])
            graph.replay()
            self.taken += 1
            yield graph.tokens

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
        assert self.graph is not None
        if self.cache.get_seq_length() + self.taken - self.told < self.graph.capacity:
            return self.graph
        kept, self.chosen = (tokens.clone(), self.graph.finished.clone()), [self.tokens()]
        self.before = self.taken
        self.settle()
        if not self.ready(kept[0]):
            raise RuntimeError(f"generate: the text outgrew its KV cache, and {self.pool.reason}")
        self.graph.finished.copy_(kept[1])
        return self.graph
