"""A KV cache that is written in place: one append is a copy of the new positions, not of the whole past.

Each layer holds two buffers [B, kv_heads, capacity, head_dim] and counts in a python int how much of them is filled, so
that nothing is read back from the device. To transformers both classes are the dynamic ones: they grow without bound,
are never compiled, and crop, reorder, copy and iterate as those do. `keys` and `values` are views of the filled part;
whoever assigns to them puts other tensors in the place of the buffers.

Elements copied by one append of S positions to T: 2*B*H*S*D, against 2*B*H*(T + S)*D for the concatenation it replaces.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dsi.containers.ops import Heads
from dsi.errors import InputError
from dsi.runtime.buffers import FIRST_CAPACITY, cut, empty_as, moved
from dsi.runtime.sliding_window import PreallocatedSlidingLayer

# a request for a long text often ends early: at most this many new positions are set aside at first, the rest on demand
RESERVE = 2048


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer.

    Args:
        capacity: positions to set aside at the first append; more are taken on demand, by doubling.
    """

    is_compileable = False
    # how much of the buffers is filled, where only the device knows it
    filled: Tensor | None = None

    keys: Tensor
    values: Tensor
    _shown_keys: Tensor | None
    _shown_values: Tensor | None
    # flat, of keys and of values, where the buffers are the start of more
    _memory: tuple[Tensor, ...] | None

    def __init__(self, capacity: int = FIRST_CAPACITY, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first_capacity = max(int(capacity), 1)
        self._forget()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(length={self.get_seq_length()}, capacity={self.capacity})"

    # --- writing ----------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last.

        Args:
            keys, values: the new positions, [B, kv_heads, S, head_dim].

        Returns:
            Views of the buffers, each [B, kv_heads, T, head_dim].

        Raises:
            InputError: the cache holds another number of rows.
        """
        if torch.is_grad_enabled() and self._tracked(keys, values):
            return self._append_by_copy(keys, values)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        batch, _, length, _ = keys.shape
        start = self._make_room(batch, length)
        self._key_buffer.narrow(2, start, length).copy_(keys)
        self._value_buffer.narrow(2, start, length).copy_(values)
        return self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """`append`, under the name that transformers calls."""
        return self.append(key_states, value_states)

    def reserve(self, batch: int, shape: Heads, length: int, like: Tensor) -> tuple[int, Tensor, Tensor]:
        """Room for new positions, which the caller must fill: for kernels that write keys and values themselves.

        Args:
            batch: rows.
            shape: of it `kv_heads` and `head_dim` are read.
            length: how many positions.
            like: a tensor of the dtype and on the device of the keys.

        Returns:
            (first new position, key buffer, value buffer); the buffers are [B, kv_heads, capacity, head_dim].

        Raises:
            InputError: the cache holds another number of rows.
        """
        if not self.is_initialized:
            # no memory behind it: only the shape is read
            new = like.new_empty(()).expand(batch, shape.kv_heads, length, shape.head_dim)
            self._begin(new, new)
        start = self._make_room(batch, length)
        self._show()
        return start, self._key_buffer, self._value_buffer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers for tensors such as these, empty; those of before a `reset()` where they fit."""
        self._begin(key_states, value_states)
        self._show()

    def _begin(self, key_states: Tensor, value_states: Tensor) -> None:
        """As `lazy_initialization`; whoever calls shows what there is."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._length = 0
        if self._sealed() or not (_alike(self._key_buffer, key_states) and _alike(self._value_buffer, value_states)):
            capacity = max(self.first_capacity, key_states.shape[2])
            self._set_buffers(empty_as(key_states, capacity), empty_as(value_states, capacity))
        self.is_initialized = True

    def visible(self) -> tuple[Tensor, Tensor]:
        """What the position that was last appended sees, itself included: all keys and values."""
        return self.keys, self.values

    def buffers(self) -> tuple[Tensor, Tensor]:
        """The memory behind `keys` and `values`, each [B, kv_heads, capacity, head_dim]."""
        return self._key_buffer, self._value_buffer

    def lie_in(self, memory: Sequence[Tensor], shapes: Sequence[Sequence[int]] = ()) -> None:
        """Say of what the buffers are the start, which they may grow in.

        Args:
            memory: flat, of the keys and of the values.
            shapes: of the buffers, where they are others than now; the layer is empty then.
        """
        buffers = [cut(flat, shape) for flat, shape in zip(memory, shapes, strict=True)] if shapes else self.buffers()
        self._set_buffers(*buffers)
        self._memory = tuple(memory)

    def stay(self) -> None:
        """The memory that the buffers are part of is the layer's own, and is let go of as it grows."""
        self._memory = None

    def move_out(self) -> None:
        """Other buffers, just as large as what is filled: somebody else writes to these."""
        if not self.intact() or not self.is_initialized:
            self._forget()
            return
        length = self._length
        self._set_buffers(*(moved(buffer, length, max(length, 1)) for buffer in self.buffers()))
        self._show()

    def room(self) -> int:
        """Positions that there is room for where the buffers lie."""
        if self._memory is None or not self.capacity:
            return self.capacity
        each = [buffer.numel() // self.capacity for buffer in self.buffers()]
        return min(flat.numel() // one for flat, one in zip(self._memory, each, strict=True))

    def make_room(self, positions: int) -> None:
        """Other buffers, where these have no room for so many positions more or must not be written to."""
        if not self.intact():
            self._adopt(positions)
        if self._length + positions > self.capacity or self._sealed():
            self._grow(self._length + positions)
        self._show()

    def clear_rest(self) -> None:
        """Zeros where nothing is filled, for attention that reads the whole buffers and masks what is not."""
        for buffer in self.buffers():
            buffer.narrow(2, self._length, self.capacity - self._length).zero_()

    def advance(self, positions: int) -> None:
        """So many positions more count as filled: somebody has written them to the buffers."""
        self._length += positions
        self._show()

    def seen(self, mask: Tensor) -> Tensor:
        """Of a mask [B, 1, 1, T] over all positions, the next one last: the part that the next position sees."""
        return mask

    def _tracked(self, keys: Tensor, values: Tensor) -> bool:
        return any(one is not None and one.requires_grad for one in (keys, values, self.keys, self.values))

    def _append_by_copy(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As stock: what autograd has seen must not be written to."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys = torch.cat([self.keys, keys], dim=-2)
        self.values = torch.cat([self.values, values], dim=-2)
        return self.keys, self.values

    def _make_room(self, batch: int, length: int) -> int:
        """The first new position; `length` more count as filled."""
        if not self.intact():
            self._adopt(length)
        if batch != self._batch:
            raise InputError(
                f"KV cache: it holds {self._batch} rows and {batch} were given; "
                "use a cache of the same batch size, or batch_repeat_interleave() and batch_select_indices()"
            )
        start = self._length
        if start + length > self.capacity or self._sealed():
            self._grow(start + length)
        self._length = start + length
        return start

    def _adopt(self, more: int) -> None:
        """Somebody assigned `keys` and `values`, and may hold them still: copy them to buffers with room for more."""
        self._length = self.keys.shape[2]
        capacity = max(self._length + more, 2 * self._length, self.first_capacity)
        self._set_buffers(moved(self.keys, self._length, capacity), moved(self.values, self._length, capacity))

    def _grow(self, needed: int) -> None:
        length = self._length
        capacity = max(needed, 2 * self.capacity) if needed > self.capacity else self.capacity
        if self._memory is not None and needed <= self.room() and not self._sealed():
            self._spread(min(capacity, self.room()))
            return
        self._set_buffers(moved(self._key_buffer, length, capacity), moved(self._value_buffer, length, capacity))

    def _spread(self, capacity: int) -> None:
        """The same memory, cut for more positions of fewer rows than it has room for."""
        memory, buffers = self._memory, []
        assert memory is not None
        for flat, buffer in zip(memory, self.buffers(), strict=True):
            kept = buffer.narrow(2, 0, self._length).clone()
            wider = cut(flat, (*buffer.shape[:2], capacity, buffer.shape[3]))
            wider.narrow(2, 0, self._length).copy_(kept)
            buffers.append(wider)
        self._set_buffers(*buffers)
        self._memory = memory

    def _set_buffers(self, keys: Tensor, values: Tensor) -> None:
        self._key_buffer, self._value_buffer = keys, values
        self._batch = keys.shape[0]
        self.capacity = keys.shape[2]
        self._made_for_inference = keys.is_inference()
        self._memory = None

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys = self._shown_keys = self._key_buffer.narrow(2, 0, self._length)
        self.values = self._shown_values = self._value_buffer.narrow(2, 0, self._length)
        return self.keys, self.values

    def intact(self) -> bool:
        """`keys` and `values` are still the views that were last shown."""
        return self.keys is self._shown_keys and self.values is self._shown_values

    def _sealed(self) -> bool:
        """The buffers must not be written to: inference mode made them and is over."""
        return self._made_for_inference and not torch.is_inference_mode_enabled()

    def _forget(self) -> None:
        nothing = torch.empty(0, 0, 0, 0)
        self._set_buffers(nothing, nothing)
        self._shown_keys = self._shown_values = None
        self._length = 0

    def get_seq_length(self) -> int:
        """Positions filled."""
        if not self.is_initialized:
            return 0
        return self._length if self.keys is self._shown_keys else int(self.keys.shape[2])

    # --- what transformers does to a layer --------------------------------------------------------------------

    def reset(self) -> None:
        """Empty; the memory is kept for the next text of the same batch size."""
        self._length = 0
        self.keys = self.values = None  # type: ignore[assignment]
        self._shown_keys = self._shown_values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last positions; the count is negative, as transformers writes it."""
        if not self.is_initialized:
            return
        if tokens_to_remove > 0 or not self.intact():
            super().crop(tokens_to_remove)
        elif tokens_to_remove:
            self._length = max(self._length + tokens_to_remove, 0)
            self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]. As many rows as before stay in the same memory."""
        if self.get_seq_length() == 0:
            return
        keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
        values = self.values.index_select(0, beam_idx.to(self.values.device))
        if keys.shape == self.keys.shape and self.intact() and not self._sealed():
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values

    def offload(self) -> None:
        """Move what is filled to the CPU; the rest of the buffers goes."""
        if self.is_initialized:
            super().offload()
            self._forget()


class WindowedLayer(PreallocatedLayer):
    """All positions of a layer with a sliding window: what a graph, which holds addresses, can write to.

    Args:
        sliding_window: positions that a new one sees, itself included.
        capacity: of `PreallocatedLayer`.
    """

    def __init__(self, sliding_window: int, capacity: int = FIRST_CAPACITY) -> None:
        super().__init__(capacity)
        self.sliding_window = sliding_window

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new position; what it sees."""
        super().append(keys, values)
        return self.visible()

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values: the masks that transformers makes know the window."""
        return super().append(key_states, value_states)

    def visible(self) -> tuple[Tensor, Tensor]:
        """The window's positions, the new one last."""
        length = min(self._length, self.sliding_window)
        at = (2, self._length - length, length)
        return self.keys.narrow(*at), self.values.narrow(*at)

    def seen(self, mask: Tensor) -> Tensor:
        """Of a mask [B, 1, 1, T], the next position last, the window."""
        length = min(mask.shape[3], self.sliding_window)
        return mask.narrow(3, mask.shape[3] - length, length)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Both have the same rows, heads and head size, dtype and device."""
    same_rows = one.shape[:2] == other.shape[:2] and one.shape[3] == other.shape[3]
    return same_rows and one.dtype == other.dtype and one.device == other.device


class PreallocatedCache(DynamicCache):
    """A `DynamicCache` whose attention layers, full or with a sliding window, are preallocated.

    Layers of other kinds (state-space layers) are what transformers makes for the config.

    Args:
        ddp_cache_data: as in `DynamicCache`: for each layer its keys and values.
        config: the model's config, which tells the kinds of layers; without it layers appear on first use.
        capacity: positions to set aside in each layer.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[Tensor | None, ...]] | None = None,
        config: Any = None,
        *,
        capacity: int = FIRST_CAPACITY,
    ) -> None:
        super().__init__(ddp_cache_data, config)
        preallocate_(self, capacity)

    @classmethod
    def of(cls, cache: DynamicCache, capacity: int, *, whole: bool = False) -> PreallocatedCache:
        """A cache in the place of `cache`, which is given up: other kinds of layers are shared.

        Args:
            cache: fresh, where `whole`.
            capacity: positions to set aside in each layer.
            whole: layers with a window keep all positions.
        """
        new = cls()
        new.layers, new.layer_class_to_replicate = cache.layers, cache.layer_class_to_replicate
        for index, layer in enumerate(cache.layers):
            if whole and type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1:
                new.layers[index] = WindowedLayer(layer.sliding_window, capacity)
        preallocate_(new, capacity)
        return new


def preallocate_(cache: DynamicCache, capacity: int, layers: int = 0) -> None:
    """Exchange the dynamic layers of `cache` for preallocated ones that hold the same keys and values.

    Args:
        cache: changed in place, so that whoever holds it sees what is generated.
        capacity: positions to set aside in each new layer.
        layers: where layers appear on first use, make this many now.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _preallocated(layer, capacity)
        elif type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1:
            cache.layers[index] = PreallocatedSlidingLayer.of(layer, capacity)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = functools.partial(PreallocatedLayer, capacity)
        cache.layers.extend(PreallocatedLayer(capacity) for _ in range(len(cache.layers), layers))


def _preallocated(layer: DynamicLayer, capacity: int) -> PreallocatedLayer:
    new = PreallocatedLayer(capacity)
    # readied ahead of its first use a dynamic layer knows a dtype and no shape
    if layer.is_initialized and layer.keys.dim() == 4:
        new.dtype, new.device, new.is_initialized = layer.dtype, layer.device, True
        new.keys, new.values = layer.keys, layer.values
    return new
