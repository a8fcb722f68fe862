"""A ragged batch's prompt: the tokens of all rows one after the other, the padding left out.

Between embedding and head every operation is then of as many rows as there are tokens. Keys and values go to the places
in the cache that the padded prompt would have them at, so that the steps after it are those of any padded batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsi.containers.ops import Heads
from dsi.containers.packing import Texts


class Ragged(Texts):
    """Where the tokens of a prompt stand.

    Args:
        mask: int or bool [B, S], not 0 = a token.
    """

    causal = True

    def __init__(self, mask: Tensor) -> None:
        shown = mask != 0
        *counts, self.ends = torch.cat([shown.sum(1), shown[:, -1].all()[None]]).tolist()
        self.counts: list[int] = counts
        self.shape = shown.shape
        # [T] each: of each token its place among all positions, its row, and its place there
        self.index = shown.reshape(-1).nonzero()[:, 0]
        self.rows, self.slots = self.index // self.shape[1], self.index % self.shape[1]
        self.starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=mask.device)
        self.starts[1:] = shown.sum(1).cumsum(0)

    @property
    def obstacle(self) -> str:
        """Why such a batch is no prompt without its padding, or ""."""
        return "" if self.ends else "the prompt ends with padding"

    @property
    def longest(self) -> int:
        return max(self.counts)

    def bounds(self) -> list[int]:
        return [sum(self.counts[:n]) for n in range(len(self.counts) + 1)]

    def pack(self, x: Tensor) -> Tensor:
        """[1, T, ...] of x [B, S, ...]."""
        return x.reshape(-1, *x.shape[2:]).index_select(0, self.index)[None]

    def last(self, x: Tensor) -> Tensor:
        """Of x [1, T, H] each row's last token: [B, H]."""
        return x[0].index_select(0, self.starts[1:] - 1)

    def keep(self, layer: Any, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [1, kv_heads, T, d] to a cache layer, zeros where there is no token."""
        _, heads, _, width = keys.shape
        batch, length = self.shape
        start, *buffers = layer.reserve(batch, Heads(heads, heads, width), length, keys)
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer.narrow(2, start, length).zero_()
            buffer[self.rows, :, self.slots + start] = new[0].transpose(0, 1)
