"""Rotary terms of every position, computed once by the model's own module and read from a table afterwards.

Right only for rope types whose terms depend on the position alone, which the policy lists. Where they depend on the
length of the text the module is asked at each step, in a graph too if it does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsi.containers.launches import IN_GRAPH
from dsi.containers.ops import Rope

FIRST_POSITIONS = 256


class RopeTable:
    """Terms for the module, dtype and device that it was last asked for; neither saved nor moved with the model."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._rope: Rope | None = None

    def bind(self, rotary: nn.Module, reach: int, pairs: bool = False) -> Callable[[Tensor, Tensor | int], Rope]:
        """A function of (hidden states, positions) that gives the terms of the positions, each [1 or B, 1, rotary_dim].

        Args:
            rotary: computes (cos, sin) from (hidden states, position ids).
            reach: positions given as a tensor are below this; an int may be any.
            pairs: see `Rope`.
        """
        source = (rotary, pairs, *map(identity, rotary.buffers()))
        # a CUDA graph reads the memory of the table that it was captured with, however much the table grows
        held: list[Rope] = []

        def rows(hidden: Tensor, positions: Tensor | int) -> Rope:
            needed = positions + 1 if isinstance(positions, int) else reach
            held[:] = [self._grown(source, hidden, needed)]
            return rope_rows(held[0], positions)

        return rows

    def _grown(self, source: tuple[Any, ...], hidden: Tensor, length: int) -> Rope:
        """The whole table: each term [1, N, rotary_dim], N >= length."""
        key = (hidden.dtype, hidden.device, source)
        have = self._rope.cos.shape[1] if self._rope is not None and key == self._key else 0
        if self._rope is None or have < length:
            self._rope = _terms(source[0], hidden, max(length, 2 * have, FIRST_POSITIONS), pairs=source[1])
            self._key = key
        return self._rope


def rope_rows(table: Rope, positions: Tensor | int) -> Rope:
    """Terms of the positions, each [1 or B, 1, rotary_dim], from those of all positions."""
    cos, sin, signed, pairs, _ = table
    if isinstance(positions, int):
        at = (1, positions, 1)
        return Rope(cos.narrow(*at), sin.narrow(*at), signed.narrow(*at), pairs)
    rope = Rope(cos, sin, signed, pairs, positions)
    # the kernel of a graph's step takes the rows by itself
    return rope if cos.is_cuda and IN_GRAPH.get() else rope.taken()


def identity(buffer: Tensor) -> tuple[Any, ...]:
    """Differs once the frequencies were cast, moved or written to."""
    return buffer.data_ptr(), buffer.dtype, 0 if buffer.is_inference() else buffer._version


def _terms(rotary: nn.Module, hidden: Tensor, length: int, *, pairs: bool) -> Rope:
    cos, sin = rotary(hidden, torch.arange(length, device=hidden.device)[None])
    return Rope.of(cos, sin, pairs)
