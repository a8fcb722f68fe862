"""Tensors to pieces and back: `split` takes a rank's part of a layer, `assemble` makes the whole of all parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsi.errors import SplitError
from dsi.parallel.rules import LayerShard, Piece


def take(piece: Piece, whole: Tensor) -> Tensor:
    """A rank's piece of a parameter, in memory of its own; the parameter's layout in memory stays."""
    if piece.dim is None:
        return whole.clone()
    runs = [whole.narrow(piece.dim, start, stop - start) for start, stop in piece.runs]
    if len(runs) == 1:
        return runs[0].clone(memory_format=torch.contiguous_format)
    return torch.cat(runs, piece.dim) if runs else whole.narrow(piece.dim, 0, 0).clone()


def split(tensors: Mapping[str, Tensor], shard: LayerShard) -> dict[str, Tensor]:
    """A rank's part of a layer's tensors, by stock name.

    Args:
        tensors: of the whole layer, or some of them.
        shard: from `shard_layer`.
    """
    return {name: take(shard.pieces[name], whole) for name, whole in tensors.items() if name in shard.pieces}


def assemble(parts: Sequence[Mapping[str, Tensor]], shards: Sequence[LayerShard]) -> dict[str, Tensor]:
    """The whole layer's tensors of all ranks' parts, bit for bit: the inverse of `split`.

    Args:
        parts: by rank, tensors by stock name.
        shards: by rank.

    Raises:
        SplitError: a part is missing, has another shape than its piece, or is there twice; or ranks that should hold
            the same hold different bits.
    """
    if len(parts) != len(shards):
        raise SplitError(f"{len(parts)} parts are given, and the layer is split over {len(shards)} ranks")
    names = sorted({name for part in parts for name in part})
    return {name: _assemble_one(name, parts, shards) for name in names}


def _assemble_one(name: str, parts: Sequence[Mapping[str, Tensor]], shards: Sequence[LayerShard]) -> Tensor:
    held: list[tuple[int, Piece, Tensor]] = []
    for part, shard in zip(parts, shards, strict=True):
        if (name in part) != (name in shard.pieces):
            does, should = ("holds", "holds none") if name in part else ("lacks", "holds some")
            raise SplitError(f"{name}: rank {shard.rank} {does} it, and by the rules it {should}")
        if name in part:
            held.append((shard.rank, shard.pieces[name], part[name]))
    for rank, piece, tensor in held:
        if tuple(tensor.shape) != piece_shape(piece):
            raise SplitError(f"{name}: rank {rank} has {tuple(tensor.shape)}, its piece is {piece_shape(piece)}")
    if any(piece.dim is None for _, piece, _ in held):
        return _the_same(name, held)
    return _joined(name, held)


def piece_shape(piece: Piece) -> tuple[int, ...]:
    """The shape of the tensor that a rank holds."""
    return tuple(piece.length if axis == piece.dim else size for axis, size in enumerate(piece.shape))


def _the_same(name: str, held: Sequence[tuple[int, Piece, Tensor]]) -> Tensor:
    first, _, whole = held[0]
    for rank, _, tensor in held[1:]:
        if not same_bits(tensor, whole):
            raise SplitError(f"{name}: every rank holds all of it, and those of rank {first} and rank {rank} differ")
    return whole.clone()


def _joined(name: str, held: Sequence[tuple[int, Piece, Tensor]]) -> Tensor:
    _, piece, like = held[0]
    dim = piece.dim or 0
    whole = like.new_empty(piece.shape)
    owners = [-1] * piece.shape[dim]
    for rank, part, tensor in held:
        start = 0
        for begin, end in part.runs:
            for index in range(begin, end):
                if owners[index] >= 0:
                    raise SplitError(
                        f"{name}: rank {owners[index]} and rank {rank} both hold index {index} of dimension {dim}"
                    )
                owners[index] = rank
            whole.narrow(dim, begin, end - begin).copy_(tensor.narrow(dim, start, end - begin))
            start += end - begin
    if -1 in owners:
        raise SplitError(f"{name}: no rank holds index {owners.index(-1)} of dimension {dim}")
    return whole


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaNs and signs of zeros included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = (one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
    return torch.equal(*flat)
