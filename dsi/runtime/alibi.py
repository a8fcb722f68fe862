"""Position biases of the decode loop: what the model's own forward makes of the attention mask, one new row at a time.

Source: Press et al. 2022, https://arxiv.org/abs/2108.12409.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsi.containers.ops import Biased
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


def biases_of(alibi: Alibi, layer: TransformerLayer, device: torch.device) -> Biased:
    """The biases of a text without padding.

    Args:
        alibi: how the model rounds and scales.
        layer: any of the layers; its heads and scale count.
        device: of the layers.
    """
    rounded: torch.dtype | None = getattr(torch, alibi.rounded) if alibi.rounded else None
    own = slopes(layer.all_heads).to(device)
    own = own if rounded is None else own.to(rounded).float()
    return Biased(None, own, None, rounded, layer.scale if alibi.scaled else 1.0)


def places_of(mask: Tensor) -> Tensor:
    """int64 [B, T]: how many keys before each are attended to, 0 where it is not itself; mask is bool [B, 1, 1, T]."""
    rows = mask[:, 0, 0]
    return (rows.long().cumsum(dim=-1) - 1) * rows
