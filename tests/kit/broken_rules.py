"""dsi itself, broken in one place for the length of a context: shard rules, sums, the injection's manners."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import attrs
import transformers.models.llama.modeling_llama as llama

import dsi.engine
from dsi.engine import InferenceEngine
from dsi.parallel import rules
from dsi.parallel.linear import SummedLinear

Cutter = rules._Cutter


@contextlib.contextmanager
def classes_kept() -> Iterator[None]:
    """What mutants change on classes and modules is gone afterwards."""
    layer, rotate_half = llama.LlamaDecoderLayer, llama.rotate_half
    forward = layer.forward
    yield
    layer.forward, llama.rotate_half = forward, rotate_half
    if "fused_by" in vars(layer):
        del layer.fused_by


def naive_qkv() -> Any:
    """The fused projection is cut as if it were one run of rows."""

    def segments(self, place, slot):
        heads, kv_heads, width = (self.facts[name] for name in ("heads", "kv_heads", "head_dim"))
        return (rules._Segment(heads + 2 * kv_heads, width),)

    return mock.patch.object(Cutter, "_qkv_segments", segments)


def naive_gate_up() -> Any:
    """Gate and up are cut as if they were one run of rows."""
    stock = Cutter._unit_segments

    def segments(self, place, slot):
        found = stock(self, place, slot)
        return (rules._Segment(sum(one.units for one in found), 1),) if len(found) > 1 else found

    return mock.patch.object(Cutter, "_unit_segments", segments)


def bias_on_every_rank() -> Any:
    stock = Cutter._row

    def row(self, slot, runs, rank):
        return stock(self, slot, runs, 0)

    return mock.patch.object(Cutter, "_row", row)


def bias_on_no_rank() -> Any:
    stock = Cutter._row

    def row(self, slot, runs, rank):
        return stock(self, slot, runs, 1)

    return mock.patch.object(Cutter, "_row", row)


def ranks_swapped_in_rows() -> Any:
    """Ranks take each other's input columns."""
    stock = Cutter._row

    def row(self, slot, runs, rank):
        role = "heads" if slot is self.block.slots["out"] else "units_in"
        place = "out" if role == "heads" else "down"
        return stock(self, slot, rules._share(self.segments[place], self.size - 1 - rank, self.size), rank)

    return mock.patch.object(Cutter, "_row", row)


def last_index_lost() -> Any:
    stock = rules._share

    def share(segments, rank, size):
        runs = stock(segments, rank, size)
        return (*runs[:-1], (runs[-1][0], runs[-1][1] - 1))

    return mock.patch.object(rules, "_share", share)


def first_index_twice() -> Any:
    """Each rank but the first begins one index early."""
    stock = rules._share

    def share(segments, rank, size):
        runs = stock(segments, rank, size)
        return ((runs[0][0] - min(rank, 1), runs[0][1]), *runs[1:])

    return mock.patch.object(rules, "_share", share)


def heads_not_divided() -> Any:
    return mock.patch.object(Cutter, "_local_facts", return_value={})


def kv_heads_not_divided() -> Any:
    return mock.patch.object(Cutter, "_local_facts", lambda self: {"heads": self.facts["heads"] // self.size})


def never_uneven() -> Any:
    """What does not come out even is cut off."""
    return mock.patch.object(Cutter, "_check_divisible", return_value=None)


def refused_without_a_way_on() -> Any:
    stock = Cutter._check_divisible

    def check(self):
        try:
            stock(self)
        except rules.SplitError:
            raise rules.SplitError("no") from None

    return mock.patch.object(Cutter, "_check_divisible", check)


def no_sum() -> Any:
    stock = Cutter._shard

    def shard(self, rank):
        return attrs.evolve(stock(self, rank), sums=frozenset())

    return mock.patch.object(Cutter, "_shard", shard)


def no_sum_after_mlp() -> Any:
    stock = Cutter._shard

    def shard(self, rank):
        found = stock(self, rank)
        return attrs.evolve(found, sums=found.sums - {"down"})

    return mock.patch.object(Cutter, "_shard", shard)


def residual_on_every_rank() -> Any:
    def add(self, x, residual):
        return self.reduce(self.summand(x).add_(residual))

    return mock.patch.object(SummedLinear, "add", add)


def restores_nothing() -> Any:
    return mock.patch.object(InferenceEngine, "restore", lambda self: self.module)


def applied_twice() -> Any:
    """Nobody looks whether the model is optimized already."""
    return mock.patch.object(dsi.engine, "already_optimized", return_value=None)
