"""Which part of a layer's parameters each rank holds: pure data, made from a block, the facts and the shapes alone.

A slot that is split by columns is cut in its output rows, one that is split by rows in its input columns; what is
between the two stays on its rank, and the products of the second are added up over the ranks. Cuts fall between heads
or hidden units, never through them, and a fused projection is cut in each of its parts:

    stored              "thirds", Concat          "head_interleaved"        "kv_grouped"
    rows                q0 q1 q2 q3|k0 k1|v0 v1   q0k0v0 q1k1v1 ...         q0q1k0v0 q2q3k1v1
    of rank 0 of 2      q0 q1      |k0   |v0      q0k0v0                    q0q1k0v0

A bias of a slot that is split by rows is rank 0's alone, so that the sum has it once. Norms, kept modules and slots
with split="none" are held whole by every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs

from dsi.containers.base import Container
from dsi.containers.stand_in import StandIn
from dsi.errors import PolicyError, SplitError
from dsi.policy import Block, Concat, Linear, Packed

Shapes = Mapping[str, tuple[int, ...]]
"""Stock name -> shape of every parameter and persistent buffer of a layer, e.g. "self_attn.q_proj.weight"."""

Run = tuple[int, int]
"""Indices [start, stop)."""

# role of a place (see `Container.SHARDING`) -> the split that it takes
_SPLIT_OF_ROLE = {"qkv": "column", "heads": "row", "units": "column", "units_in": "row"}
_ENDS = (("qkv", "heads"), ("units", "units_in"))


@attrs.frozen(kw_only=True)
class Piece:
    """What one rank holds of one stock parameter.

    Args:
        shape: of the whole parameter, as a checkpoint stores it.
        dim: the dimension that is cut; None where the rank holds all of it.
        runs: of `dim`, ascending, in the order of the piece.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    runs: tuple[Run, ...] = ()

    @property
    def length(self) -> int:
        """Indices of `dim` that the rank holds."""
        return sum(stop - start for start, stop in self.runs)


def _read_only(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(mapping))


@attrs.frozen(kw_only=True)
class LayerShard:
    """One rank's part of one layer.

    Args:
        rank, size: which part of how many.
        pieces: stock name -> what the rank holds; a name that is absent is held by another rank alone.
        facts: container facts that are not the whole layer's, e.g. the rank's own number of heads.
        sums: places whose product is one summand of many: the ranks add theirs up.
    """

    rank: int
    size: int
    pieces: Mapping[str, Piece] = attrs.field(converter=_read_only)
    facts: Mapping[str, Any] = attrs.field(converter=_read_only, factory=dict)
    sums: frozenset[str] = frozenset()

    def __reduce__(self) -> tuple[Any, ...]:
        # read-only mappings can be neither copied nor pickled
        return _layer_shard, (self.rank, self.size, dict(self.pieces), dict(self.facts), self.sums)


def _layer_shard(
    rank: int, size: int, pieces: dict[str, Piece], facts: dict[str, Any], sums: frozenset[str]
) -> LayerShard:
    return LayerShard(rank=rank, size=size, pieces=pieces, facts=facts, sums=sums)


def shard_layer(
    block: Block, container: type[StandIn], facts: Mapping[str, Any], shapes: Shapes, size: int, where: str
) -> tuple[LayerShard, ...]:
    """The shards of one layer, by rank.

    Args:
        block: the policy's words about the layer.
        container: the class that stands in for it; it knows what the rows and columns of its places are.
        facts: as read for the whole layer.
        shapes: of the whole layer.
        size: how many ranks.
        where: the layer's path, for messages.

    Raises:
        SplitError: heads or hidden units do not divide; the message says which sizes would do.
        PolicyError: the policy splits a slot in a way that the container does not have.
    """
    if size < 1:
        raise SplitError(f"{where}: tp_size={size}; one rank is the least")
    if not issubclass(container, Container):
        raise SplitError(f"{where}: {container.__name__} does not split over ranks; use one")
    return _Cutter(block, container, facts, shapes, size, where).shards()


@attrs.frozen
class _Segment:
    """A run of stored rows (or columns) that is dealt out evenly: `units` of `width` indices each."""

    units: int
    width: int

    @property
    def length(self) -> int:
        return self.units * self.width


class _Cutter:
    """One layer's cut over `size` ranks."""

    def __init__(
        self, block: Block, container: type[Container], facts: Mapping[str, Any], shapes: Shapes, size: int, where: str
    ) -> None:
        self.block, self.container, self.facts = block, container, facts
        self.shapes, self.size, self.where = shapes, size, where
        self.roles = {place: self._role(place, slot) for place, slot in block.slots.items() if _is_split(slot)}
        self._check_ends()
        self.segments = {place: self._segments(place, role) for place, role in self.roles.items()}
        self._check_divisible()

    def shards(self) -> tuple[LayerShard, ...]:
        return tuple(self._shard(rank) for rank in range(self.size))

    def _shard(self, rank: int) -> LayerShard:
        pieces: dict[str, Piece | None] = {name: Piece(shape=tuple(shape)) for name, shape in self.shapes.items()}
        for place, role in self.roles.items():
            cut = self._column if _SPLIT_OF_ROLE[role] == "column" else self._row
            pieces.update(cut(self.block.slots[place], _share(self.segments[place], rank, self.size), rank))
        return LayerShard(
            rank=rank,
            size=self.size,
            pieces={name: piece for name, piece in pieces.items() if piece is not None},
            facts=self._local_facts(),
            sums=frozenset(place for place, role in self.roles.items() if _SPLIT_OF_ROLE[role] == "row"),
        )

    def _local_facts(self) -> dict[str, Any]:
        if "qkv" not in self.roles.values():
            return {}
        return {name: self.facts[name] // self.size for name in ("heads", "kv_heads")}

    # --- what the policy and the container say ------------------------------------------------------------------

    def _role(self, place: str, slot: Any) -> str:
        role = self.container.SHARDING.get(place, "")
        name = self.container.__name__
        if not role:
            raise PolicyError(f"{self.where}: {name} does not say how slot {place!r} splits; write split='none'")
        if slot.split != _SPLIT_OF_ROLE[role]:
            raise PolicyError(
                f"{self.where}: slot {place!r} says split={slot.split!r}; "
                f"{name} splits it by {_SPLIT_OF_ROLE[role]}, or not at all"
            )
        if role in ("heads", "units_in") and not isinstance(slot, Linear):
            raise PolicyError(f"{self.where}: slot {place!r} is split by rows, which only a Linear can be")
        return role

    def _check_ends(self) -> None:
        """A cut begins in one slot and ends in another: both are split or neither is."""
        present = {place: self.container.SHARDING.get(place, "") for place in self.block.slots}
        for ends in _ENDS:
            places = [place for place, role in present.items() if role in ends]
            whole = [place for place in places if place not in self.roles]
            if whole and len(whole) < len(places):
                split = ", ".join(place for place in places if place in self.roles)
                raise PolicyError(
                    f"{self.where}: {split} is split and {', '.join(whole)} is not; they are the ends of one cut, "
                    "split both or neither"
                )

    # --- units --------------------------------------------------------------------------------------------------

    def _segments(self, place: str, role: str) -> tuple[_Segment, ...]:
        slot: Any = self.block.slots[place]
        if role == "heads":
            made: tuple[_Segment, ...] = (_Segment(self.facts["heads"], self.facts["head_dim"]),)
        elif role == "qkv":
            made = self._qkv_segments(place, slot)
        else:
            made = self._unit_segments(place, slot)
        found = sum(self._extent(slot, path, role) for path in slot.sources())
        wanted = sum(segment.length for segment in made)
        if found != wanted:
            raise PolicyError(f"{self.where}: slot {place!r} has {found} indices to split, and its parts are {wanted}")
        return made

    def _qkv_segments(self, place: str, slot: Any) -> tuple[_Segment, ...]:
        heads, kv_heads, width = (self.facts[name] for name in ("heads", "kv_heads", "head_dim"))
        layout = slot.layout if isinstance(slot, Packed) else "thirds"
        if layout == "thirds":
            return (_Segment(heads, width), _Segment(kv_heads, width), _Segment(kv_heads, width))
        if layout == "head_interleaved":
            return (_Segment(heads, 3 * width),)
        if layout == "kv_grouped":
            return (_Segment(kv_heads, (heads // kv_heads + 2) * width),)
        raise PolicyError(f"{self.where}: slot {place!r}: layout {layout!r} is none of queries, keys and values")

    def _unit_segments(self, place: str, slot: Any) -> tuple[_Segment, ...]:
        role = self.roles[place]
        if isinstance(slot, Packed):
            if slot.layout != "halves":
                raise PolicyError(f"{self.where}: slot {place!r}: layout {slot.layout!r} is none of gate and up")
            return (_Segment(self._extent(slot, slot.path, role) // 2, 1),) * 2
        return tuple(_Segment(self._extent(slot, path, role), 1) for path in slot.sources())

    def _extent(self, slot: Any, path: str, role: str) -> int:
        """Output rows of a source, or input columns where it is split by rows."""
        shape = self.shapes[f"{path}.weight"]
        return shape[_dim(slot, role)]

    def _check_divisible(self) -> None:
        units = sorted({segment.units for segments in self.segments.values() for segment in segments})
        if all(count % self.size == 0 for count in units):
            return
        common = math.gcd(*units)
        sizes = [str(size) for size in range(1, common + 1) if common % size == 0]
        use = sizes[0] if len(sizes) == 1 else f"{', '.join(sizes[:-1])} or {sizes[-1]}"
        raise SplitError(f"{self.where}: {self._culprits()} do not split over tp_size={self.size}; use {use}")

    def _culprits(self) -> str:
        found = []
        if "qkv" in self.roles.values():
            heads, kv_heads = self.facts["heads"], self.facts["kv_heads"]
            if heads % self.size or kv_heads % self.size:
                over = "" if heads == kv_heads else f" over {kv_heads} kv head{'s' if kv_heads > 1 else ''}"
                found.append(f"{heads} heads{over}")
        for place, role in self.roles.items():
            uneven = [s.units for s in self.segments[place] if role == "units_in" and s.units % self.size]
            found += [f"{count} hidden units of {place!r}" for count in uneven]
        return " and ".join(found)

    # --- pieces -------------------------------------------------------------------------------------------------

    def _column(self, slot: Any, runs: Sequence[Run], rank: int) -> dict[str, Piece | None]:
        dim, start, pieces = _dim(slot, "qkv"), 0, {}
        for path in slot.sources():
            weight = f"{path}.weight"
            stop = start + self.shapes[weight][dim]
            own = tuple((max(a, start) - start, min(b, stop) - start) for a, b in runs if a < stop and b > start)
            pieces[weight] = self._piece(weight, dim, own)
            if f"{path}.bias" in self.shapes:
                pieces[f"{path}.bias"] = self._piece(f"{path}.bias", 0, own)
            start = stop
        return pieces

    def _row(self, slot: Any, runs: Sequence[Run], rank: int) -> dict[str, Piece | None]:
        weight, bias = f"{slot.path}.weight", f"{slot.path}.bias"
        pieces = {weight: self._piece(weight, _dim(slot, "heads"), tuple(runs))}
        if rank and bias in self.shapes:
            pieces[bias] = None
        return pieces

    def _piece(self, name: str, dim: int, runs: tuple[Run, ...]) -> Piece | None:
        return Piece(shape=tuple(self.shapes[name]), dim=dim, runs=runs)


def _is_split(slot: Any) -> bool:
    return isinstance(slot, Linear | Concat | Packed) and slot.split != "none"


def _dim(slot: Any, role: str) -> int:
    """The dimension of a stored weight that a role cuts: [out, in], or [in, out] where it is transposed."""
    return int((_SPLIT_OF_ROLE[role] == "row") != slot.transposed)


def _share(segments: Sequence[_Segment], rank: int, size: int) -> tuple[Run, ...]:
    """A rank's indices of all segments; runs that touch are one."""
    runs: list[Run] = []
    start = 0
    for segment in segments:
        step = segment.units // size * segment.width
        run = (start + rank * step, start + (rank + 1) * step)
        if runs and runs[-1][1] == run[0]:
            run = (runs.pop()[0], run[1])
        runs.append(run)
        start += segment.length
    return tuple(runs)
