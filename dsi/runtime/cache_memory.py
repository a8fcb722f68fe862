"""Memory for keys and values that texts of every batch size use in turn: a cache is a view of it.

A block begins as the buffers of the cache that a text was given. It is lent to one text at a time: a cache of other
rows or another capacity is a view of the same memory from its start, so that what is captured for any of them stays
right, and batch sizes that alternate hold no more than the largest of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from dsi.runtime.kv_cache import PreallocatedCache, preallocate_

# positions from which on memory is handed out in whole kernels' tiles
ALIGNED = 16


class Place(NamedTuple):
    """Where a cache's buffers stand, and how they are cut: what a graph that writes to them was captured for."""

    rows: int
    dtype: torch.dtype
    capacities: tuple[int, ...]
    addresses: tuple[int, ...]


def place_of(cache: PreallocatedCache) -> Place:
    """Of a cache whose layers have buffers."""
    layers: list[Any] = cache.layers
    addresses = tuple(buffer.data_ptr() for layer in layers for buffer in layer.buffers())
    first = layers[0].buffers()[0]
    return Place(first.shape[0], first.dtype, tuple(layer.capacity for layer in layers), addresses)


def capacity_of(cache: PreallocatedCache) -> int:
    """Positions that every layer has room for."""
    layers: list[Any] = cache.layers
    return min(layer.capacity for layer in layers)


class Block:
    """Memory of all layers.

    Args:
        cache: whose buffers they are; none of them is part of another block.
    """

    def __init__(self, cache: PreallocatedCache) -> None:
        layers: list[Any] = cache.layers
        self._flat = [tuple(buffer.view(-1) for buffer in layer.buffers()) for layer in layers]
        self._shapes = [tuple(buffer.shape for buffer in layer.buffers()) for layer in layers]
        for layer, flat in zip(layers, self._flat, strict=True):
            layer.lie_in(flat)
        place = place_of(cache)
        self.addresses = place.addresses
        # of all rows together
        self.positions = place.rows * min(place.capacities)
        self.nbytes = sum(tensor.nbytes for pair in self._flat for tensor in pair)
        # by the number of rows: the cache that the next text of so many is lent
        self.views: dict[int, PreallocatedCache] = {place.rows: cache}
        # who has it, and where that stood then
        self.lent: tuple[PreallocatedCache, Place] | None = None
        # the latest text's last step: the next text may come on another stream
        self._done = torch.cuda.Event()
        self._device = self._flat[0][0].device

    def serves(self, rows: int, positions: int) -> bool:
        """Whether there is a view for so many positions of so many rows."""
        view = self.views.get(rows)
        return view is not None and capacity_of(view) >= positions

    def lend(self, made: DynamicCache, rows: int, positions: int, wanted: int) -> PreallocatedCache | None:
        """An empty cache in this memory; None where there is no room.

        Args:
            made: transformers' own, which tells the kinds of layers.
            rows, positions: what will come.
            wanted: positions of a row that are asked for where there is room.
        """
        if not self.serves(rows, positions):
            room = self.positions // rows
            if room < positions:
                return None
            if positions <= room - room % ALIGNED:
                room -= room % ALIGNED
            self.views[rows] = self._view(made, rows, min(wanted, room))
        view = self.views[rows]
        view.reset()
        self.wait()
        self.lent = view, place_of(view)
        return view

    def _view(self, made: DynamicCache, rows: int, capacity: int) -> PreallocatedCache:
        cache = PreallocatedCache.of(made, capacity, whole=True)
        preallocate_(cache, capacity, len(self._flat))
        layers: list[Any] = cache.layers
        for layer, flat, shapes in zip(layers, self._flat, self._shapes, strict=True):
            layer.lie_in(flat, tuple((rows, shape[1], capacity, shape[3]) for shape in shapes))
        return cache

    def holds(self, cache: PreallocatedCache) -> bool:
        """Whether all of a cache lies here."""
        return place_of(cache).addresses == self.addresses

    def suits(self, cache: PreallocatedCache) -> bool:
        """Whether a cache could lie here: not that of a model which was cast or moved since."""
        layers: list[Any] = cache.layers
        first, flat = layers[0].buffers()[0], self._flat[0][0]
        return first.numel() == 0 or (first.dtype == flat.dtype and first.device == flat.device)

    def room(self, rows: int) -> int:
        """Positions of each of so many rows."""
        return self.positions // rows

    def take_back(self) -> None:
        """Nobody has it any more."""
        self.lent = None
        self._done.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Have the current stream wait for the latest text's end."""
        torch.cuda.current_stream(self._device).wait_event(self._done)
