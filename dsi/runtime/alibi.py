"""Position biases of the decode loop: what the model's own forward makes of the attention mask, one new row at a time.

Source: Press et al. 2022, https://arxiv.org/abs/2108.12409.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsi.containers.transformer import TransformerLayer
from dsi.policy import Alibi


def slopes(heads: int) -> Tensor:
    """float32 [heads]: 2 ** (-8 i / heads) for a power of two; else every second slope of twice as many follows."""
    below = 2 ** math.floor(math.log2(heads))
    found = _powers(below, torch.arange(1, 1 + below, dtype=torch.int32))
    if below == heads:
        return found
    more = min(below, heads - below)
    return torch.cat((found, _powers(2 * below, torch.arange(1, 1 + 2 * more, 2, dtype=torch.int32))))


def _powers(heads: int, exponents: Tensor) -> Tensor:
    base = torch.full((), 2 ** (-(2 ** -(math.log2(heads) - 3))), dtype=torch.float32)
    return torch.pow(base, exponents)


class AlibiSteps:
    """The additive mask of each decode step: biases of the keys, and the dtype's minimum where a key is masked.

    Args:
        alibi: how the model rounds and scales.
        layer: any of the layers; its heads, scale and dtype count.
        mask: bool [B, 1, 1, capacity], True = attend, or None.
        capacity: the longest text.
        device: of the layers.
    """

    def __init__(
        self, alibi: Alibi, layer: TransformerLayer, mask: Tensor | None, capacity: int, device: torch.device
    ) -> None:
        per_head = slopes(layer.all_heads).to(device).view(1, -1, 1, 1)
        self.slopes = per_head.to(getattr(torch, alibi.rounded)) if alibi.rounded else per_head
        self.scale = layer.scale if alibi.scaled else 1.0
        self.dtype = layer.dtype
        self.masked = None if mask is None else ~mask
        if mask is None:
            self.positions = torch.arange(capacity, device=device).view(1, 1, 1, -1)
        else:
            self.positions = (mask.long().cumsum(dim=-1) - 1) * mask

    def __call__(self, length: int) -> Tensor:
        """[1 or B, heads, 1, length]: of the newest query, over `length` keys, its own included."""
        bias = (self.slopes * self.positions.narrow(3, 0, length)).to(self.dtype)
        if self.scale != 1.0:
            bias = bias * self.scale
        if self.masked is None:
            return bias
        return bias.masked_fill(self.masked.narrow(3, 0, length), torch.finfo(self.dtype).min)
