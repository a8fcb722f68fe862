"""One decode step as a CUDA graph: embedding, layers, norm, head and the choice of the token, no host in between.

A graph holds addresses: of the weights, of the cache's buffers, of its own few inputs. Whatever a step needs to know,
how much of the cache is filled, where the tokens stand, which rows have ended, lies on the device and is moved on by
the graph itself, so that steps chain without a word from the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from dsi.containers.launches import graph_kernels
from dsi.containers.ops import Biased, Heads
from dsi.runtime.alibi import places_of
from dsi.runtime.capture import captured, nothing_waits
from dsi.runtime.decode import Step
from dsi.runtime.kv_cache import PreallocatedCache, PreallocatedLayer


class GraphLayer:
    """A cache layer as a graph sees it: the buffers up to its reach, and on the device how much of them is filled.

    Args:
        layer: whose buffers they are.
        start: int64 [], where the new position is written.
        filled: int64 [], positions filled, the new one included.
        reach: positions that the texts of the graph stay below: what work is divided by, whatever the buffers hold.
    """

    # position p stands at slot p, or at p % capacity
    ring = False

    def __init__(self, layer: PreallocatedLayer, start: Tensor, filled: Tensor, reach: int) -> None:
        # of how many positions the buffers are is of no account: what reads all that it is shown has the same to read
        shown = min(reach, layer.capacity)
        keys, values = layer.buffers()
        self.keys, self.values, self.address = keys.narrow(2, 0, shown), values.narrow(2, 0, shown), keys.data_ptr()
        self.start, self.filled, self.reach, self.capacity = start, filled, reach, layer.capacity
        # for the kernel of a step's attention; it leaves them as it finds them
        self.tickets = torch.zeros(self.keys.shape[:2].numel(), dtype=torch.int32, device=self.keys.device)

    def let_go(self) -> None:
        """A graph needs no more than where the buffers stood: their memory is its owner's to give back."""
        del self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one position a row; returns the buffers."""
        at = self.start.view(1)
        self.keys.index_copy_(2, at, keys)
        self.values.index_copy_(2, at, values)
        return self.keys, self.values

    def reserve(self, batch: int, shape: Heads, length: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of `PreallocatedLayer`, the position as a tensor."""
        return self.start, self.keys, self.values

    def visible(self) -> tuple[Tensor, Tensor]:
        """The buffers."""
        return self.keys, self.values

    def seen(self, mask: Tensor) -> Tensor:
        """The mask itself."""
        return mask


@attrs.frozen
class GraphKey:
    """What a graph was captured for.

    Args:
        batch: rows.
        masked: some positions are padding.
        ends: how many end tokens there are.
        sampled: tokens are drawn; otherwise the most likely one is taken.
        penalized: how many tokens the vocabulary has, where those that came before are counted; 0 where not.
        slots: positions of the cache that the texts stay below, rounded up.
    """

    batch: int
    masked: bool
    ends: int
    sampled: bool = False
    penalized: int = 0
    slots: int = 0


class StepGraph:
    """A captured step and its inputs.

    Args:
        step: the model's parts, bound for as many positions as the cache has room for.
        cache: filled by the prompt; its next position is written to while the graph is made. The graph is right for
            caches that stand where this one does now, and does not hold it.
        key: what it is for.
        reach: positions below this may be fed.
        pool: of the allocator, shared by the graphs of one model.
    """

    def __init__(self, step: Step, cache: PreallocatedCache, key: GraphKey, reach: int, pool: Any) -> None:
        from dsi_kernels import sampling_settings

        layers: list[Any] = cache.layers
        device, rows = layers[0].keys.device, key.batch
        self.key, self.step, self.reach = key, step, reach
        self.capacity = min(key.slots, *(layer.capacity for layer in layers))
        # the latest text's last step: the next text may come on another stream
        self.done = torch.cuda.Event()
        integers = {"dtype": torch.int64, "device": device}
        self.tokens, self.positions = torch.zeros(rows, 1, **integers), torch.zeros(rows, 1, **integers)
        # the new position, how many are filled once it is, and its column of the history
        self.counters = torch.zeros(3, **integers)
        start, filled = self.counters[0], self.counters[1]
        self.history = torch.zeros(rows, self.capacity, **integers)
        self.ends, self.pad = torch.full((max(key.ends, 1),), -1, **integers), torch.zeros((), **integers)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        wide = (rows, 1, 1, self.capacity)
        self.mask = torch.ones(wide, dtype=torch.bool, device=device) if key.masked else None
        # of padded rows' keys
        self.places = torch.zeros(rows, self.capacity, **integers) if key.masked and step.biases is not None else None
        # how tokens are chosen, which of them came before, and whether logits were no distribution
        self.settings = torch.tensor(sampling_settings(), dtype=torch.float32, device=device)
        self.seen = torch.zeros(rows, key.penalized, dtype=torch.int8, device=device) if key.penalized else None
        self.invalid = torch.zeros(1, dtype=torch.bool, device=device)
        # positions of the text that it is made for
        self.first = cache.get_seq_length()
        self._count_from(self.first)
        self.layers = [GraphLayer(layer, start, filled, key.slots) for layer in layers]
        self.graph, self.logits = self._captured(pool)
        for layer in self.layers:
            layer.let_go()

    def _captured(self, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        from dsi_kernels import compile_ahead

        stream = torch.cuda.Stream(self.counters.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), graph_kernels():
            # all at once; what ran meanwhile ran on what the others would have written
            compile_ahead(self._run, self.counters.device)
            self._count_from(self.first)
            self.tokens.zero_()
            self.positions.zero_()
            # sets up what the libraries set up at their first call
            with nothing_waits():
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with captured(graph, pool, stream), graph_kernels():
            logits = self._run()
        return graph, logits

    def _run(self) -> Tensor:
        import dsi_kernels

        mask: Tensor | Biased | None = self.mask
        if self.step.biases is not None:
            mask = self.step.biases._replace(mask=self.mask, places=self.places)
        logits = self.step.logits(self.tokens, self.positions, self.layers, mask)
        ending = {"finished": self.finished, "ends": self.ends, "pad": self.pad} if self.key.ends else {}
        state = (self.tokens, self.history, self.positions, self.counters)
        if not (self.key.sampled or self.key.penalized):
            dsi_kernels.greedy_token(logits.contiguous(), *state, **ending)
            return logits
        # torch.multinomial draws the same numbers from the same generator
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_() if self.key.sampled else None
        given = (logits.contiguous(), noise, self.settings, *state, self.invalid)
        dsi_kernels.sample_token(*given, seen=self.seen, **ending)
        return logits

    def writes_to(self, layers: Sequence[PreallocatedLayer]) -> bool:
        """Whether these layers' keys and values stand in the graph's buffers."""
        return all(
            layer.intact() and layer.capacity == seen.capacity and layer.buffers()[0].data_ptr() == seen.address
            for seen, layer in zip(self.layers, layers, strict=True)
        )

    def _count_from(self, length: int) -> None:
        _send([length, length + 1, 1], self.counters)

    def begin(self, tokens: Tensor, positions: Tensor | int, length: int, mask: Tensor | None) -> None:
        """Set a text's state.

        Args:
            tokens: int64 [B], the first tokens to feed.
            positions: where they stand.
            length: positions in the cache.
            mask: bool [B, 1, 1, T], True = attend, or None.
        """
        torch.cuda.current_stream().wait_event(self.done)
        self.tokens.copy_(tokens[:, None])
        self.positions.copy_(positions) if isinstance(positions, Tensor) else self.positions.fill_(positions)
        self._count_from(length)
        self.history[:, 0] = tokens
        self.finished.fill_(False)
        if self.mask is not None and mask is not None:
            self.mask.fill_(True)
            # of a text that is to outgrow the cache, the part that has room
            known = mask[..., : self.capacity]
            self.mask[..., : known.shape[-1]] = known
            if self.places is not None:
                self.places.copy_(places_of(self.mask))

    def set_ends(self, end_ids: list[int], pad: Tensor | None) -> None:
        """The tokens that end a row, and what follows them."""
        if self.key.ends:
            _send(end_ids, self.ends)
            self.finished.copy_((self.tokens == self.ends).any(1))
            assert pad is not None, "transformers gives a padding token wherever there is an end token"
            self.pad.copy_(pad.view(()))

    def set_sampling(self, settings: tuple[float, ...], seen: Tensor | None) -> None:
        """How tokens are chosen, and int8 [B, vocabulary], which of them came before."""
        _send(settings, self.settings)
        self.invalid.fill_(False)
        if self.seen is not None and seen is not None:
            self.seen.copy_(seen)

    def replay(self) -> Tensor:
        """One step: logits [B, vocab], valid until the next; the greedy next tokens stand in `tokens` then."""
        self.graph.replay()
        return self.logits


def _send(numbers: Sequence[float], place: Tensor) -> None:
    """Write numbers to the device, which may still be at the prompt, and go on."""
    made = torch.tensor(numbers, dtype=place.dtype)
    place.copy_(made.pin_memory() if place.is_cuda else made, non_blocking=True)
