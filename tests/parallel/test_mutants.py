"""Rules that are wrong in one way each: every one of them is seen, most by nothing but what the ranks compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import attrs
import pytest
from torch import Tensor

import dsi
from dsi import ranks
from dsi.containers import TransformerLayer
from dsi.errors import DsiError, RankError, SplitError
from dsi.parallel import (
    LayerShard,
    ShardedContainer,
    SummedLinear,
    ThreadGroup,
    assemble,
    rules,
    same_bits,
    split,
)
from dsi.policy import Concat, Linear, Packed
from dsi.ranks import layer_shards
from dsi_policies.llama import LLAMA
from tests.parallel.families import Subject, assert_agree, built_in, described

Patch = pytest.MonkeyPatch
Mutate = Callable[[Patch], None]


@functools.cache
def subject_of(name: str) -> Subject:
    return built_in(name) if name in ("llama", "llama_mha", "gpt2", "bert") else described(name)


@functools.cache
def single_of(name: str) -> Any:
    return subject_of(name).single()


def agrees(name: str, size: int = 2) -> bool:
    """Whether the ranks say what one says."""
    subject = subject_of(name)
    try:
        assert_agree(ranks.lockstep(subject.model, subject.ask, size, timeout=5, **subject.options), single_of(name))
    except (AssertionError, DsiError):
        return False
    return True


def partitions(name: str, size: int = 2) -> bool:
    """Whether the parts make the whole."""
    subject = subject_of(name)
    for path, shards in layer_shards(subject.model, dsi.plan(subject.model, **subject.options), size).items():
        whole = subject.model.get_submodule(path).state_dict()
        try:
            back = assemble([split(whole, shard) for shard in shards], shards)
        except SplitError:
            return False
        if back.keys() != whole.keys() or not all(same_bits(back[key], whole[key]) for key in whole):
            return False
    return True


# --- the mutants ------------------------------------------------------------------------------------------------------


def naive_chunk(patch: Patch) -> None:
    """A fused projection is cut as one run of rows, whatever its parts."""
    cut = rules._Cutter._qkv_segments

    def segments(self, place, slot):
        rows = sum(segment.length for segment in cut(self, place, slot))
        return (rules._Segment(self.size, rows // self.size),)

    patch.setattr(rules._Cutter, "_qkv_segments", segments)


def naive_halves(patch: Patch) -> None:
    """Gate and up, stored as one, are cut as one run of rows."""
    cut = rules._Cutter._unit_segments

    def segments(self, place, slot):
        made = cut(self, place, slot)
        return (rules._Segment(sum(s.length for s in made), 1),) if isinstance(slot, Packed) else made

    patch.setattr(rules._Cutter, "_unit_segments", segments)


def interleaved_as_thirds(patch: Patch) -> None:
    """Heads that are stored q, k, v, q, k, v are taken for all q, all k, all v."""
    cut = rules._Cutter._qkv_segments

    def segments(self, place, slot):
        if isinstance(slot, Packed):
            slot = Concat("q", "k", "v", split="column")
        return cut(self, place, slot)

    patch.setattr(rules._Cutter, "_qkv_segments", segments)


def kv_group_off_by_one(patch: Patch) -> None:
    """A rank has the keys and values of the next rank's queries."""

    def share(segments, rank, size):
        runs, start = [], 0
        for index, segment in enumerate(segments):
            of = (rank + 1) % size if index and len(segments) == 3 else rank
            step = segment.units // size * segment.width
            runs.append((start + of * step, start + (of + 1) * step))
            start += segment.length
        return tuple(runs)

    patch.setattr(rules, "_share", share)


def heads_dealt_in_turn(patch: Patch) -> None:
    """A rank has every size-th unit, in all slots but those that are split by rows."""
    share, column = rules._share, rules._Cutter._column

    def dealt(self, slot, runs, rank):
        place = next(place for place, one in self.block.slots.items() if one is slot)
        every, start = [], 0
        for segment in self.segments[place]:
            units = range(rank, segment.units, self.size)
            every += [(start + unit * segment.width, start + (unit + 1) * segment.width) for unit in units]
            start += segment.length
        return column(self, slot, every, rank)

    patch.setattr(rules, "_share", share)
    patch.setattr(rules._Cutter, "_column", dealt)


def bias_on_every_rank(patch: Patch) -> None:
    """The bias of what is split by rows is summed as often as there are ranks."""
    row = rules._Cutter._row
    patch.setattr(rules._Cutter, "_row", lambda self, slot, runs, rank: row(self, slot, runs, 0))


def bias_on_no_rank(patch: Patch) -> None:
    """The bias of what is split by rows is lost."""
    row = rules._Cutter._row
    patch.setattr(rules._Cutter, "_row", lambda self, slot, runs, rank: row(self, slot, runs, 1))


def row_for_column(patch: Patch) -> None:
    """The container takes rows for columns."""
    swapped = {"qkv": "heads", "out": "qkv", "up": "units_in", "gate_up": "units_in", "down": "units"}
    patch.setattr(TransformerLayer, "SHARDING", MappingProxyType(swapped))


def qkv_by_units(patch: Patch) -> None:
    """The container does not know that its q, k and v rows are heads."""
    patch.setattr(TransformerLayer, "SHARDING", MappingProxyType({**TransformerLayer.SHARDING, "qkv": "units"}))


def whole_heads(patch: Patch) -> None:
    """A rank believes that it has all heads."""
    patch.setattr(rules._Cutter, "_local_facts", lambda self: {})


def kv_heads_kept(patch: Patch) -> None:
    """A rank has its own heads, and all kv heads."""
    patch.setattr(rules._Cutter, "_local_facts", lambda self: {"heads": self.facts["heads"] // self.size})


def _without_sum(place: str) -> Mutate:
    def mutate(patch: Patch) -> None:
        shard = rules._Cutter._shard

        def shard_without(self, rank) -> LayerShard:
            made = shard(self, rank)
            return attrs.evolve(made, sums=made.sums - {place})

        patch.setattr(rules._Cutter, "_shard", shard_without)

    mutate.__doc__ = f"What the ranks have of {place!r} is not added up."
    return mutate


def residual_on_every_rank(patch: Patch) -> None:
    """The residual goes into the sum, as often as there are ranks."""

    def add(self: SummedLinear, x: Tensor, residual: Tensor) -> Tensor:
        return self.reduce(self.summand(x).add_(residual))

    patch.setattr(SummedLinear, "add", add)


def residual_lost(patch: Patch) -> None:
    """The residual is not added."""
    patch.setattr(SummedLinear, "add", lambda self, x, residual: self.forward(x))


def one_rank_alone(patch: Patch) -> None:
    """A rank goes on with its own summand."""
    meet = ThreadGroup.all_reduce
    patch.setattr(ThreadGroup, "all_reduce", lambda self, x: x if self.rank else meet(self, x))


def mean_for_sum(patch: Patch) -> None:
    """The ranks take the mean."""
    meet = ThreadGroup.all_reduce
    patch.setattr(ThreadGroup, "all_reduce", lambda self, x: meet(self, x) / self.size)


def biases_of_the_first_heads(patch: Patch) -> None:
    """Every rank takes the position biases of rank 0."""
    patch.setattr(ShardedContainer, "own_heads", lambda self, x: x[:, : self.facts["heads"]] if x is not None else x)


# by mutant: the families that must see it, and whether the parts make the whole all the same
MUTANTS: list[tuple[Mutate, tuple[str, ...], bool]] = [
    (naive_chunk, ("gpt2", "llama", "thirds of groups, halves"), True),
    (naive_halves, ("thirds of groups, halves",), True),
    (interleaved_as_thirds, ("head_interleaved, parallel", "head_interleaved, in turn"), True),
    (kv_group_off_by_one, ("llama", "gpt2"), True),
    (heads_dealt_in_turn, ("llama", "gpt2", "bert"), True),
    (bias_on_every_rank, ("gpt2", "bert", "llama_mha", "head_interleaved, parallel"), True),
    (bias_on_no_rank, ("gpt2", "bert", "llama_mha"), False),
    (row_for_column, ("llama", "gpt2"), False),
    (qkv_by_units, ("llama", "gpt2"), False),
    (whole_heads, ("llama", "gpt2", "bert"), True),
    (kv_heads_kept, ("llama", "gpt2"), True),
    (_without_sum("out"), ("llama", "gpt2", "bert"), True),
    (_without_sum("down"), ("llama", "gpt2", "bert"), True),
    (residual_on_every_rank, ("llama", "gpt2", "bert"), True),
    (residual_lost, ("llama", "gpt2", "bert"), True),
    (one_rank_alone, ("llama", "bert"), True),
    (mean_for_sum, ("llama", "bert"), True),
    (biases_of_the_first_heads, ("biases of heads",), True),
]


def name_of(mutate: Mutate) -> str:
    return (mutate.__doc__ or mutate.__name__).splitlines()[0]


@pytest.mark.parametrize(
    ("mutate", "family"),
    [pytest.param(mutate, family, id=f"{family}: {name_of(mutate)}") for mutate, seen, _ in MUTANTS for family in seen],
)
def test_a_wrong_rule_is_seen(mutate, family, monkeypatch):
    assert agrees(family)
    mutate(monkeypatch)
    assert not agrees(family)


@pytest.mark.parametrize(
    ("mutate", "family"),
    [pytest.param(mutate, seen[0], id=name_of(mutate)) for mutate, seen, whole in MUTANTS if whole],
)
def test_most_of_them_partition_the_weights_perfectly(mutate, family, monkeypatch):
    # why the outputs are compared too
    mutate(monkeypatch)
    assert partitions(family)


POLICY_MUTANTS = {
    "row for column": {"qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="row")},
    "column for row": {"out": Linear("self_attn.o_proj", split="column")},
    "qkv whole": {"qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    "out whole": {"out": Linear("self_attn.o_proj")},
    "down whole": {"down": Linear("mlp.down_proj")},
    "kv before q": {
        "qkv": Concat("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", split="column"),
    },
}


@pytest.mark.parametrize("name", POLICY_MUTANTS)
def test_a_policy_that_splits_wrong_is_seen(name):
    block = attrs.evolve(LLAMA.blocks[0], slots={**LLAMA.blocks[0].slots, **POLICY_MUTANTS[name]})
    subject = attrs.evolve(subject_of("llama"), policy=attrs.evolve(LLAMA, blocks=[block]))
    try:
        answers = ranks.lockstep(subject.model, subject.ask, 2, timeout=5, **subject.options)
    except DsiError:
        return
    with pytest.raises(AssertionError):
        assert_agree(answers, single_of("llama"))


def test_an_error_of_a_rank_is_no_agreement(monkeypatch):
    monkeypatch.setattr(SummedLinear, "forward", lambda self, x: 1 / 0)
    with pytest.raises(RankError, match="ZeroDivisionError"):
        ranks.lockstep(subject_of("bert").model, subject_of("bert").ask, 2, timeout=5)
