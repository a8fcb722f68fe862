"""Tensor parallelism: which part of a layer each rank holds, and the sums over the ranks."""

from dsi.parallel.groups import Group, ProcessGroup
from dsi.parallel.layer import ShardedContainer, sharded_class
from dsi.parallel.linear import SummedLinear
from dsi.parallel.lockstep import ThreadGroup, lockstep, thread_groups
from dsi.parallel.pieces import assemble, piece_shape, same_bits, split, take
from dsi.parallel.processes import run_gloo
from dsi.parallel.rules import LayerShard, Piece, shard_layer

__all__ = [
    "Group",
    "LayerShard",
    "Piece",
    "ProcessGroup",
    "ShardedContainer",
    "SummedLinear",
    "ThreadGroup",
    "assemble",
    "lockstep",
    "piece_shape",
    "run_gloo",
    "same_bits",
    "shard_layer",
    "sharded_class",
    "split",
    "take",
    "thread_groups",
]
