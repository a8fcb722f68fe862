"""How the group norm of a map is cut into launches: what group_norm.py and summed_map.py share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dsi_kernels._group_kernels import group_apply_kernel, group_merge_kernel, group_moments_kernel
from dsi_kernels._launch import Launch
from dsi_kernels._pdl import launch_options
from dsi_kernels._triton import triton
from dsi_kernels.add_map import channel_block, check_map
from dsi_kernels.operands import check_devices, check_dtypes, check_rows_contiguous, shapes
from dsi_kernels.tuned import device_facts, launch_config

# parts that a program merges at a time, and the most that one of two launches does: as many bytes as it shows
MERGED, MERGED_AT_MOST = 4096, 1024


class Work(NamedTuple):
    """What is computed: the sizes of a map, and what is done to it."""

    batch: int
    rows: int
    channels: int
    width: int
    eps: float
    adds: bool
    silu: bool
    # of the addend, by batch row
    stride: int


class Cut(NamedTuple):
    """How a map is cut into chunks of rows and blocks of channels."""

    chunk: int
    chunks: int
    blocks: int
    block_n: int
    block_c: int
    # groups that a block may have channels of, and blocks that a group may, powers of two
    places: int
    span: int

    @classmethod
    def of(cls, work: Work, sizes: Mapping[str, int]) -> Cut:
        C, width = work.channels, work.width
        block_c = channel_block(C, sizes["block_c"])
        block_n, whole = sizes["tile"] // block_c, block_c % width == 0
        chunk = sizes["tiles"] * block_n
        places = max(block_c // width, 1) if whole or width % block_c == 0 else (block_c - 2) // width + 2
        span = 1 if whole else (width - 2) // block_c + 2
        two = triton.next_power_of_2
        return cls(
            chunk, triton.cdiv(work.rows, chunk), triton.cdiv(C, block_c), block_n, block_c, two(places), two(span)
        )

    def parts(self, batch: int) -> tuple[int, ...]:
        """Shape of what the first launch leaves."""
        return (batch, self.chunks, self.blocks, self.places, 2)


class MapMoments(NamedTuple):
    """Means and squares of a map's groups, by chunk of its rows: what whoever made the map leaves to its norm.

    parts: float32; groups: that the channels divide into; cut: how the map was cut.
    """

    parts: Tensor
    groups: int
    cut: Cut


def group_norm_config(x: Tensor) -> Mapping[str, int]:
    """The tuned settings for a map.

    launches: 1, 2 or 3, where two become three with too much to merge; hold: HOLD to make it one launch where a group's
    strip fits the registers; block_c: channels of a block, at most; tile, tiles: elements that are read at a time for
    the sums, and how many such tiles a program takes; shown: elements that a program applies them to; num_warps.
    """
    size = max(x.nbytes, 1)
    shape = f"megabytes={1 << max(0, (size - 1).bit_length() - 20)}"
    return launch_config("group_norm", shape, device_facts(x.device)[0])


def check_groups(op: str, x: Tensor, groups: int, **operands: Tensor | None) -> None:
    """A ValueError, in the name of `op`, where these operands make no norm of a map over its groups."""
    if x.ndim < 3 or not x.shape[1:].numel() or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{op}: x {tuple(x.shape)} must be [B, C, pixels ...], its C in {groups} groups")
    wanted = dict.fromkeys(operands, x.shape[1:2]) | {"addend": x.shape[:2], "residual": x.shape}
    for name, t in operands.items():
        if t is not None and t.shape != wanted[name]:
            raise ValueError(f"{op}: {shapes(x=x, **{name: t})}; {tuple(wanted[name])} is needed")
    check_dtypes(op, x=x, **operands)
    check_rows_contiguous(op, **{name: t for name, t in operands.items() if name != "residual"})
    check_map(op, x=x, residual=operands["residual"])
    check_devices(op, x=x, **operands)


def work_of(
    x: Tensor,
    groups: int,
    x_bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
    eps: float,
    silu: bool,
) -> Work:
    """What a norm of these operands computes."""
    B, C = x.shape[:2]
    adds = any(t is not None for t in (x_bias, addend, residual))
    stride = 0 if addend is None else addend.stride(0)
    return Work(B, x.shape[2:].numel(), C, C // groups, float(eps), adds, silu, stride)


def sums_launch(work: Work, cut: Cut, warps: int, device: torch.device) -> Launch:
    """Given x, residual, addend, x_bias, parts and s."""
    options = launch_options(device) | {"num_warps": warps}
    constants = (work.adds, work.width, cut.places, cut.block_n, cut.block_c, options.pop("PDL"))
    fixed = (work.rows, work.channels, work.stride, cut.chunk, *constants)
    return Launch(group_moments_kernel, (cut.chunks, cut.blocks, work.batch), fixed, options)


def shown_launches(
    work: Work, cut: Cut, sizes: Mapping[str, int], device: torch.device, *, adds: bool
) -> tuple[Launch, ...]:
    """Given parts and moments, if there are two; and x, residual, addend, x_bias, moments or parts, weight, bias, y."""
    options = launch_options(device) | {"num_warps": sizes["num_warps"]}
    pdl, groups = options.pop("PDL"), work.channels // work.width
    merges = sizes["launches"] == 2 and cut.chunks * cut.places * cut.span <= MERGED_AT_MOST
    at_a_time = MERGED // (cut.span * (cut.places if merges else 1))
    block_k = max(1, min(triton.next_power_of_2(cut.chunks), at_a_time))
    sides, of_rows = (work.width, cut.places, cut.span, block_k), (cut.chunk, cut.chunks, work.eps)
    step = sizes["shown"] // cut.block_c
    fixed = (work.rows, work.channels, work.stride, *of_rows, adds, work.silu, merges, *sides, step, cut.block_c, pdl)
    last = Launch(group_apply_kernel, (triton.cdiv(work.rows, step), cut.blocks, work.batch), fixed, options)
    if merges:
        return (last,)
    merge = (work.rows, work.channels, *of_rows, *sides, cut.block_c, pdl)
    return Launch(group_merge_kernel, (groups, work.batch), merge, options), last
