"""Row orders of fused projections: from how a checkpoint stores them to how a container reads them, and back.

A container reads q rows, then k rows, then v rows (or gate rows, then up rows). A permutation `p` of the stored rows
does it: `fused = stored[p]`; `stored = fused[inverse(p)]`. None stands for the identity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def row_permutation(layout: str, *, heads: int, kv_heads: int, head_dim: int) -> Tensor | None:
    """The permutation that turns a stored layout into q|k|v (or gate|up) rows.

    Args:
        layout: a `dsi.policy.Packed` layout.
        heads, kv_heads, head_dim: of the attention the rows belong to.

    Returns:
        int64 [(heads + 2 * kv_heads) * head_dim], or None where the rows are in order already.

    Raises:
        ValueError: the layout is unknown, or its heads do not fit.
    """
    if layout in ("thirds", "halves"):
        return None
    if layout == "head_interleaved":
        if kv_heads != heads:
            raise ValueError(f"layout 'head_interleaved' needs as many kv heads as heads, got {kv_heads} and {heads}")
        rows = torch.arange(heads * 3 * head_dim).view(heads, 3, head_dim)
        return rows.transpose(0, 1).reshape(-1)
    if layout == "kv_grouped":
        if heads % kv_heads:
            raise ValueError(f"layout 'kv_grouped' needs heads divisible by kv heads, got {heads} and {kv_heads}")
        group = heads // kv_heads
        rows = torch.arange(kv_heads * (group + 2) * head_dim).view(kv_heads, group + 2, head_dim)
        return torch.cat([rows[:, :group].reshape(-1), rows[:, group].reshape(-1), rows[:, group + 1].reshape(-1)])
    raise ValueError(f"unknown layout {layout!r}; known: thirds, halves, head_interleaved, kv_grouped")


class Runs(NamedTuple):
    """A permutation that keeps rows together, in little memory: whole heads move, so it has as many runs as heads.

    Args:
        starts: int64, the first row of each run.
        length: rows of each.
    """

    starts: Tensor
    length: int

    @classmethod
    def of(cls, permutation: Tensor) -> Runs:
        """The longest runs of one length that make up an int64 permutation."""
        breaks = (permutation[1:] != permutation[:-1] + 1).nonzero().view(-1) + 1
        length = math.gcd(permutation.numel(), *breaks.tolist())
        return cls(permutation[::length].clone(), length)

    def permutation(self) -> Tensor:
        """The permutation itself."""
        return (self.starts[:, None] + torch.arange(self.length)).view(-1)


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes `permutation`, int64 of the same length."""
    result = torch.empty_like(permutation)
    result[permutation] = torch.arange(permutation.numel())
    return result
