"""The keys and values of a layer that attends to the last positions alone, written in place.

Between calls it holds what transformers' layer of this kind holds, the last `sliding_window - 1` positions, and a new
position sees them and itself. The buffers have room for some more: a position is appended by one copy of its own, and
once they are full the last positions move to new ones. A prompt, or several positions at once, goes the way of the
class above, by concatenation; so does everything while a rollback may come (`record_past`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from dsi.containers.ops import Heads
from dsi.errors import InputError
from dsi.runtime.buffers import FIRST_CAPACITY, empty_as, moved

# positions beyond the window, as its share and at least: what the last positions move for
SLACK = (8, 64)


class PreallocatedSlidingLayer(DynamicSlidingWindowLayer):
    """Keys and values of one layer with a sliding window.

    Args:
        sliding_window: positions that a new one sees, itself included; 2 at least.
        capacity: positions that will come altogether, as far as known.
    """

    is_compileable = False
    # how much of the buffers is filled, where only the device knows it
    filled: Tensor | None = None

    keys: Tensor
    values: Tensor
    _shown: Tensor | None

    def __init__(self, sliding_window: int, capacity: int = FIRST_CAPACITY) -> None:
        super().__init__(sliding_window)
        self.first_capacity = capacity
        self._forget()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(length={self.get_seq_length()}, window={self.sliding_window})"

    @classmethod
    def of(cls, layer: DynamicSlidingWindowLayer, capacity: int) -> PreallocatedSlidingLayer:
        """One that holds the same keys and values."""
        new = cls(layer.sliding_window, capacity)
        new.__dict__.update(layer.__dict__)
        return new

    # --- writing ----------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that the new positions may see, themselves last.

        Args:
            keys, values: the new positions, [B, kv_heads, S, head_dim].

        Raises:
            InputError: the cache holds another number of rows.
        """
        if keys.shape[2] != 1 or self.record_past or (torch.is_grad_enabled() and self._tracked(keys, values)):
            seen: tuple[Tensor, Tensor] = super().update(keys, values)
            return seen
        start = self._make_room(keys, values)
        self._key_buffer.narrow(2, start, 1).copy_(keys)
        self._value_buffer.narrow(2, start, 1).copy_(values)
        return self.visible()

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """`append`, under the name that transformers calls."""
        return self.append(key_states, value_states)

    def reserve(self, batch: int, shape: Heads, length: int, like: Tensor) -> tuple[int, Tensor, Tensor]:
        """Room for one new position, which the caller must fill; see `PreallocatedLayer.reserve`."""
        assert length == 1, "a sliding window takes one position at a time"
        # no memory behind it: only the shape is read
        new = like.new_empty(()).expand(batch, shape.kv_heads, length, shape.head_dim)
        start = self._make_room(new, new)
        return start, self._key_buffer, self._value_buffer

    def visible(self) -> tuple[Tensor, Tensor]:
        """What the position that was last appended sees, itself included: [B, kv_heads, T, head_dim], T <= window."""
        return self._visible

    def seen(self, mask: Tensor) -> Tensor:
        """Of a mask [B, 1, 1, T] over all positions, the next one last: the part that the next position sees."""
        held = self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0
        return mask.narrow(3, mask.shape[3] - held - 1, held + 1)

    def _tracked(self, keys: Tensor, values: Tensor) -> bool:
        return any(one is not None and one.requires_grad for one in (keys, values, self.keys, self.values))

    def _make_room(self, keys: Tensor, values: Tensor) -> int:
        """Where the new position stands in the buffers; it counts as filled."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self.keys is not self._shown or self._sealed():
            self._adopt(keys, values)
        if keys.shape[0] != self._key_buffer.shape[0]:
            raise InputError(
                f"KV cache: it holds {self._key_buffer.shape[0]} rows and {keys.shape[0]} were given; "
                "use a cache of the same batch size, or batch_repeat_interleave() and batch_select_indices()"
            )
        if self._end == self._key_buffer.shape[2]:
            self._hold(self.keys, self.values)
        start = self._end
        self._end += 1
        self.cumulative_length += 1
        self._show()
        return start

    def _adopt(self, keys: Tensor, values: Tensor) -> None:
        """Buffers with what `keys` and `values` hold, which others may have assigned."""
        if self.keys.dim() != 4:
            # a layer that is ready and empty knows a dtype and no shape
            self.keys, self.values = keys.narrow(2, 0, 0), values.narrow(2, 0, 0)
        self._hold(self.keys, self.values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """New buffers that begin with these positions, with room for one more at least."""
        held = keys.shape[2]
        most = self.sliding_window - 1 + max(self.sliding_window // SLACK[0], SLACK[1])
        capacity = max(min(max(self.first_capacity, 2 * held), most), held + 1)
        self._key_buffer, self._value_buffer = moved(keys, held, capacity), moved(values, held, capacity)
        self._made_for_inference = torch.is_inference_mode_enabled()
        self._held = self._end = held

    def _show(self) -> None:
        """`visible()` and what is held, after one position more."""
        length = self._held + 1
        keys = self._key_buffer.narrow(2, self._end - length, length)
        values = self._value_buffer.narrow(2, self._end - length, length)
        self._visible = keys, values
        if length == self.sliding_window:
            keys, values = keys.narrow(2, 1, length - 1), values.narrow(2, 1, length - 1)
        self._held = keys.shape[2]
        self.keys = self._shown = keys
        self.values = values

    def _sealed(self) -> bool:
        """The buffers must not be written to: inference mode made them and is over."""
        return self._made_for_inference and not torch.is_inference_mode_enabled()

    def _forget(self) -> None:
        nothing = empty_as(torch.empty(0, 0, 0, 0), 0)
        self._key_buffer = self._value_buffer = nothing
        self._visible = nothing, nothing
        self._shown = None
        self._held = self._end = 0
        self._made_for_inference = False

    # --- what transformers does to a layer --------------------------------------------------------------------

    def reset(self) -> None:
        """Empty."""
        super().reset()
        self._forget()

    def offload(self) -> None:
        """Move what is held to the CPU; the rest of the buffers goes."""
        if self.is_initialized:
            super().offload()
            self._forget()


def windows_of(config: Any) -> tuple[int | None, ...]:
    """For each layer the window that transformers' cache for this config keeps; None for all positions."""
    return windows(DynamicCache(config=config))


def windows(cache: DynamicCache) -> tuple[int | None, ...]:
    """For each layer of a cache its window; None for one that keeps all positions."""
    return tuple(getattr(layer, "sliding_window", None) for layer in cache.layers)
