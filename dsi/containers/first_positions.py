"""The first keys and values of a growing cache layer, made where they stay."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dsi.containers.ops import Heads


class FirstPositions:
    """One of transformers' growing cache layers, empty: a kernel fills it, where stock's `update` copies to it.

    The copies of a prompt's keys and values are two launches a layer, and 2 * 2 * B * kv_heads * S * head_dim elements.

    Args:
        layer: without positions.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        self.layer = layer

    def reserve(self, batch: int, shape: Heads, length: int, like: Tensor) -> tuple[int, Tensor, Tensor]:
        """As of `dsi.runtime.kv_cache.PreallocatedLayer`; the layer holds as many positions from here on."""
        size = (batch, shape.kv_heads, length, shape.head_dim)
        layer, keys, values = self.layer, like.new_empty(size), like.new_empty(size)
        layer.dtype, layer.device, layer.is_initialized = like.dtype, like.device, True
        layer.keys, layer.values = keys, values
        return 0, keys, values

    def visible(self) -> tuple[Tensor, Tensor]:
        """All keys and values."""
        return self.layer.keys, self.layer.values
