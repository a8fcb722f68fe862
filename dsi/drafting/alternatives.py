"""Blocks that differ from one in a single answer: another layout, another order, another scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from dsi.containers.activations import KIND_OF_NAME
from dsi.drafting.facts import CANONICAL
from dsi.drafting.heads import LAYOUTS
from dsi.policy import Block, Concat, Const, Fact, Packed, Slot

_FLAGS = ("causal", "rope_pairs", "pre_norm", "parallel", "add_to_normed", "repeat_kv")


@attrs.frozen
class Alternative:
    """Another block.

    Args:
        place: what is different in it.
        words: how.
        block: it.
    """

    place: str
    words: str
    block: Block


def alternatives(block: Block, facts: Mapping[str, Any], index: int | None = None) -> Iterator[Alternative]:
    """Every block that differs from `block` in one answer.

    Args:
        block: of the policy.
        facts: as they were read.
        index: the layer's place in its stack, where that is known.
    """
    if index is not None and facts.get("layer_idx", index) != index:
        yield Alternative("layer_idx", f"layer_idx={index}", _with_fact(block, "layer_idx", Const(index)))
    yield from _orders(block)
    yield from _swapped(block)
    for name, value in _other_facts(facts):
        yield Alternative(name, f"{name}={value!r}", _with_fact(block, name, Const(value)))


def _orders(block: Block) -> Iterator[Alternative]:
    for place, slot in block.slots.items():
        if isinstance(slot, Packed) and slot.layout != "halves":
            for layout in LAYOUTS:
                if layout != slot.layout:
                    other = attrs.evolve(slot, layout=layout)
                    yield Alternative(place, f"layout={layout!r} in {place}", _with_slot(block, {place: other}))
        elif isinstance(slot, Concat):
            for paths in itertools.permutations(slot.paths):
                if paths != slot.paths:
                    words = f"{place} in the order {', '.join(paths)}"
                    yield Alternative(place, words, _with_slot(block, {place: _reordered(slot, paths)}))


def _reordered(slot: Concat, paths: tuple[str, ...]) -> Concat:
    # its paths are positional
    return Concat(*paths, split=slot.split, transposed=slot.transposed, cls=slot.cls)


def _swapped(block: Block) -> Iterator[Alternative]:
    """Two places of one kind, each with the other's modules."""
    for (one, first), (other, second) in itertools.combinations(block.slots.items(), 2):
        if type(first) is type(second) and first != second:
            yield Alternative(one, f"{one} and {other} exchanged", _with_slot(block, {one: second, other: first}))


def _other_facts(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    width = facts.get("head_dim")
    if isinstance(width, int) and width > 0:
        yield from (("scale", scale) for scale in (width**-0.5, 1.0) if scale != facts.get("scale"))
    if facts.get("softcap") is not None:
        yield "softcap", None
    kind = KIND_OF_NAME.get(facts.get("activation", ""), "")
    yield from (("activation", name) for one, name in CANONICAL.items() if one != kind)
    yield from ((name, not facts[name]) for name in _FLAGS if name in facts)


def _with_fact(block: Block, name: str, fact: Fact) -> Block:
    return attrs.evolve(block, facts={**block.facts, name: fact})


def _with_slot(block: Block, slots: Mapping[str, Slot]) -> Block:
    return attrs.evolve(block, slots={**block.slots, **slots})
